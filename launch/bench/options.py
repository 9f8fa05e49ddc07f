"""Lists in the benchmarks' options: counts, sizes like 256K, rates like 400M, names."""

from __future__ import annotations

from collections.abc import Collection

from lasp.launch.config.sizes import parse_rate, parse_size


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
    return [parse_size(part, name) for part in _parts(name, text)]


def rates(name: str, text: str) -> list[float]:
    """``100M,2G`` as bits per second (K = 1000).

    Raises:
        ValueError: what is no rate above 0.
    """
    return [parse_rate(part, name) for part in _parts(name, text)]


def names(name: str, text: str, known: Collection[str]) -> list[str]:
    """``ring,all_scan`` as a list; each once.

    Raises:
        ValueError: an unknown name.
    """
    found = list(dict.fromkeys(_parts(name, text)))
    if unknown := [part for part in found if part not in known]:
        raise ValueError(f"{name} must be among {', '.join(known)}, got {unknown[0]!r}. Choose some of them.")
    return found


def _parts(name: str, text: str) -> list[str]:
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise ValueError(f"{name} must be a list like a,b, got {text!r}. Leave out empty parts.")
    return parts
