"""Numbers as people write them: 32K tokens, 80GB of memory, 400M bits per second; and back into words."""

from __future__ import annotations

import re
from collections.abc import Mapping

_BINARY = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}
_DECIMAL = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}
_BYTES = {"B": 1, "MB": 10**6, "GB": 10**9, "TB": 10**12, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_size(text: str, what: str) -> int:
    """Tokens or bytes: a number with an optional K, M or G (powers of 1024).

    Raises:
        ValueError: it is none.
    """
    size = _scaled(text, _BINARY)
    if size < 1 or size != int(size):
        raise ValueError(
            f"{what} must be a whole number of at least 1 with an optional K, M or G, like 32K or 4M, got {text!r}."
        )
    return int(size)


def parse_bytes(text: str, what: str) -> float:
    """Bytes of a memory: a number with B, MB, GB, TB or MiB, GiB, TiB.

    Raises:
        ValueError: it is none.
    """
    size = _scaled(text, _BYTES)
    if size == 0:
        raise ValueError(f"{what} must be a number of bytes with a unit, like 80GB or 40GiB, got {text!r}.")
    return size


def parse_rate(text: str, what: str) -> float:
    """Bits per second: a number with an optional K, M or G (powers of 1000).

    Raises:
        ValueError: it is none.
    """
    rate = _scaled(text, _DECIMAL)
    if rate == 0:
        raise ValueError(f"{what} must be bits per second, like 400M or 2G, got {text!r}.")
    return rate


def _scaled(text: str, units: Mapping[str, int]) -> float:
    """The number times its unit; 0 where the text is not a number with one of the units."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Z]*)", str(text).strip().upper())
    return float(found[1]) * units[found[2]] if found and found[2] in units else 0.0


def readable(size: float) -> str:
    """Bytes in words; K, M and G are powers of 1024."""
    unit = _unit(size, _BINARY)
    return f"{size / _BINARY[unit]:.4g} {unit}iB" if unit else f"{size:g} B"


def readable_rate(rate: float) -> str:
    """Bits per second in words."""
    unit = _unit(rate, _DECIMAL)
    return f"{rate / _DECIMAL[unit]:.4g} {unit}bit/s" if unit else f"{rate:g} bit/s"


def _unit(value: float, units: Mapping[str, int]) -> str:
    """The largest unit that the value holds; none below the smallest."""
    return next((unit for unit, scale in reversed(units.items()) if value >= scale), "")
