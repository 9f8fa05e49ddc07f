"""Dataclass fields that come from files: presets below, types checked, options without effect refused."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin, get_type_hints


def merge_fields(
    cls: type,
    data: Mapping[str, Any],
    presets: Mapping[str, Mapping[str, Any]],
    instead: tuple[tuple[str, str], ...] = (),
) -> dict[str, Any]:
    """The preset's fields overlaid with the mapping's own.

    Args:
        instead: pairs of fields that say the same in two ways: setting one drops the preset's other.
    """
    if not isinstance(data, Mapping):
        raise ValueError(f"{cls.__name__} must be a mapping or a preset's name, got {data!r}.")
    name = data.get("preset")
    if name is not None and not (isinstance(name, str) and name in presets):
        raise ValueError(f"preset of {cls.__name__} must be one of {sorted(presets)}, got {name!r}.")
    own = {key: value for key, value in data.items() if key != "preset"}
    replaced = {other for pair in instead for key, other in (pair, pair[::-1]) if key in own}
    fields = {**{key: value for key, value in presets.get(name, {}).items() if key not in replaced}, **own}
    known = [f.name for f in dataclasses.fields(cls)]
    unknown = sorted(set(fields) - set(known))
    if unknown:
        raise ValueError(f"{cls.__name__} has no field {', '.join(unknown)}; its fields are {known}.")
    return fields


def check_types(config: Any) -> None:
    """Every field holds its declared type. An int passes for a float, a bool never for a number."""
    for name, hint in get_type_hints(type(config)).items():
        value = getattr(config, name)
        if not any(_is_a(value, option) for option in _options(hint)):
            expected = " or ".join(
                repr(list(get_args(o))) if get_origin(o) is Literal else "None" if o is type(None) else o.__name__
                for o in _options(hint)
            )
            raise ValueError(f"{name} must be {expected}, got {value!r}.")


def _options(hint: Any) -> tuple[Any, ...]:
    """The members of a union, or the hint itself."""
    return (hint,) if get_origin(hint) is Literal or not get_args(hint) else get_args(hint)


def _is_a(value: Any, hint: Any) -> bool:
    if get_origin(hint) is Literal:
        return isinstance(value, str) and value in get_args(hint)
    if hint in (int, float):
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    return isinstance(value, hint)


def check_entry(config: Any, name: str, table: Mapping[str, Any]) -> None:
    """The field ``name`` is None or the name of an entry of ``table``."""
    value = getattr(config, name)
    if value is not None and value not in table:
        close = difflib.get_close_matches(value, table, 1)
        guess = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"{name} must be one of {list(table)}, got {value!r}.{guess}")


def check_positive(config: Any, *names: str) -> None:
    """The named numbers are positive and finite where they are set."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"{name} must be positive and finite, got {value!r}.")


def refuse(config: Any, name: str, default: Any, useless: bool, why: str) -> None:
    """An option that was set, and that nothing reads."""
    if useless and getattr(config, name) != default:
        raise ValueError(f"{name}={getattr(config, name)!r} has no effect: {why}. Leave it {default!r}.")
