"""The words of the benchmarks' options: lists, sizes like 256K, rates like 400M."""

from __future__ import annotations

from collections.abc import Collection

_SIZES = {"K": 2**10, "M": 2**20, "G": 2**30}
_RATES = {"K": 10**3, "M": 10**6, "G": 10**9}


def counts(name: str, text: str, least: int = 1, most: int | None = None) -> list[int]:
    """``2,4,8`` as numbers.

    Raises:
        ValueError: what is no whole number between ``least`` and ``most``.
    """
    found = []
    for part in _parts(name, text):
        if not part.isdecimal() or int(part) < least or (most is not None and int(part) > most):
            between = f"of {least} to {most}" if most is not None else f"from {least} on"
            raise ValueError(f"{name} must be whole numbers {between}, like {least},{2 * least}, got {part!r}.")
        found.append(int(part))
    return found


def sizes(name: str, text: str) -> list[int]:
    """``256K,2M`` as bytes (K = 1024).

    Raises:
        ValueError: what is no size above 0.
    """
    return [_scaled(name, part, _SIZES, "bytes, like 256K or 2M") for part in _parts(name, text)]


def rates(name: str, text: str) -> list[float]:
    """``100M,2G`` as bits per second (K = 1000).

    Raises:
        ValueError: what is no rate above 0.
    """
    return [float(_scaled(name, part, _RATES, "bits per second, like 400M or 2G")) for part in _parts(name, text)]


def names(name: str, text: str, known: Collection[str]) -> list[str]:
    """``ring,all_scan`` as a list; each once.

    Raises:
        ValueError: an unknown name.
    """
    found = list(dict.fromkeys(_parts(name, text)))
    if unknown := [part for part in found if part not in known]:
        raise ValueError(f"{name} must be among {', '.join(known)}, got {unknown[0]!r}. Choose some of them.")
    return found


def readable(size: float) -> str:
    """Bytes in the words of :func:`sizes`."""
    unit = next((u for u, s in reversed(_SIZES.items()) if size >= s), None)
    return f"{size / _SIZES[unit]:.4g} {unit}iB" if unit else f"{size:g} B"


def readable_rate(rate: float) -> str:
    """Bits per second in words."""
    unit = next((u for u, s in reversed(_RATES.items()) if rate >= s), None)
    return f"{rate / _RATES[unit]:.4g} {unit}bit/s" if unit else f"{rate:g} bit/s"


def _parts(name: str, text: str) -> list[str]:
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise ValueError(f"{name} must be a list like a,b, got {text!r}. Leave out empty parts.")
    return parts


def _scaled(name: str, part: str, units: dict[str, int], meant: str) -> int:
    digits, unit = (part[:-1], part[-1].upper()) if part[-1].upper() in units else (part, "")
    try:
        value = float(digits) * units.get(unit, 1)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise ValueError(f"{name} must be {meant}, got {part!r}.")
    return int(value)
