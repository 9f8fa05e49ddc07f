"""YAML as a configuration writes it: repeated keys are refused, 1e-3 is a number, faults are one sentence."""

from __future__ import annotations

import re
from typing import Any

import yaml


def parse_yaml(text: str, source: str) -> Any:
    """The value of a YAML text.

    Raises:
        ValueError: naming ``source`` and the fault.
    """
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that does not exist
        raise ValueError(f"{source} is not valid YAML: {' '.join(str(error).split())}. Mend what it names.") from error


class _Loader(yaml.SafeLoader):
    """Of repeated keys the last would win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: list[Any] = []
        for key, _ in node.value:  # before `<<` is merged into it, whose keys may be given again
            if key.value in seen:
                raise yaml.YAMLError(f"key {key.value!r} is given twice, again in line {key.start_mark.line + 1}")
            seen.append(key.value)
        return super().construct_mapping(node, deep)


def _no_sexagesimal(loader: _Loader, node: yaml.ScalarNode) -> Any:
    """Numbers; to YAML 1.1 alone 1:30 is 90, to a reader it is text."""
    kind = node.tag.rpartition(":")[2]
    return node.value if ":" in node.value else getattr(loader, f"construct_yaml_{kind}")(node)


_Loader.add_constructor("tag:yaml.org,2002:int", _no_sexagesimal)
_Loader.add_constructor("tag:yaml.org,2002:float", _no_sexagesimal)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), "-+0123456789"
)
