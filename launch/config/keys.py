"""Which keys a section of the YAML file may have."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from lasp.launch.config.sections import Section
from lasp.models.config import MixerConfig, ModelConfig


def nest(keys: list[str], value: Any) -> dict[str, Any]:
    """``value`` below dotted keys."""
    for key in reversed(keys):
        value = {key: value}
    return value


def _known_keys(owner: type) -> dict[str, type | None]:
    """Keys of a section, each with the type of the section below it, if any."""
    if dataclasses.is_dataclass(owner):
        below = {"mixer": MixerConfig}
        return {"preset": None} | {f.name: below.get(f.name) for f in dataclasses.fields(owner)}
    below = {"model": ModelConfig}
    for name, info in owner.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, Section):
            below[name] = info.annotation
    return {name: below.get(name) for name in owner.model_fields}


def check_keys(values: Mapping[str, Any], source: str, owner: type, prefix: str = "") -> None:
    """Refuse keys that a section does not have, a value where keys belong, and keys where a value belongs.

    Args:
        values: what a file or an override says.
        source: how messages call it.
        owner: the section: a pydantic model, or a dataclass, which may be named by a preset.
        prefix: of its keys.

    Raises:
        ValueError: naming the key, those that are near, and those there are.
    """
    known = _known_keys(owner)
    for key, value in values.items():
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=3, cutoff=0.6)
            guess = f" Did you mean {' or '.join(prefix + name for name in close)}?" if close else ""
            where = f"of {prefix[:-1]}" if prefix else "at the top"
            raise ValueError(f"{source}: unknown key {prefix}{key}.{guess} Keys {where}: {', '.join(known)}.")
        section = known[key]
        if section is not None and isinstance(value, Mapping):
            check_keys(value, source, section, f"{prefix}{key}.")
        elif section is not None and value is not None and not (isinstance(value, str) and _has_presets(section)):
            preset = " or a preset's name" if _has_presets(section) else ""
            raise ValueError(f"{source}: {prefix}{key} must be a mapping of keys{preset}, got {value!r}. Set its keys.")
        elif section is None and isinstance(value, Mapping):
            raise ValueError(
                f"{source}: {prefix}{key} holds one value and no keys below it, got {dict(value)!r}. Set {key}=VALUE."
            )


def _has_presets(section: type) -> bool:
    return dataclasses.is_dataclass(section)
