"""What the wires between ranks can do: two kinds of link, and what an exchange costs before its first byte.

A fabric has two levels. ``within`` joins two ranks of one node (NVLink, shared memory); ``between`` is one network
interface of a node, one direction. A message of n bytes over a link takes ``latency_s + n / bytes_per_s`` (the
alpha-beta model; Hockney, Parallel Computing 20(3), 1994). ``lasp bench fabric`` measures one and saves it as JSON;
:data:`PRESETS` has some by name. :mod:`lasp.cost` turns a fabric into the time of an exchange.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True)
class Link:
    """One direction of one link.

    Attributes:
        latency_s: seconds from posting an empty message until it is received and its receiver can post the next.
        bytes_per_s: what the link carries beyond that.

    Raises:
        ValueError: a value is no finite number above 0.
    """

    latency_s: float
    bytes_per_s: float

    def __post_init__(self):
        for field in ("latency_s", "bytes_per_s"):
            _check_number(f"link {field}", getattr(self, field))

    def seconds(self, message_bytes: float) -> float:
        """Seconds of one message."""
        return self.latency_s + message_bytes / self.bytes_per_s


@dataclass(frozen=True)
class Fabric:
    """The links of a cluster, as one exchange of one layer meets them.

    Attributes:
        name: what plans and reports call it.
        within: between two ranks of a node.
        between: one network interface of a node, one direction.
        nics_per_node: interfaces that the ranks of a node share; a message uses one.
        overhead_s: seconds of every exchange beside its messages: packing, launches, waits.
        source: where the numbers come from.
        message_s, byte_s: processor seconds of one message and of one byte, where the ranks of all nodes share the
            processors of one machine (a laptop, a virtual cluster): the messages of the whole group cost them one
            after the other. 0 on a real cluster.

    Raises:
        ValueError: a value that cannot be.
    """

    name: str
    within: Link
    between: Link
    nics_per_node: int
    overhead_s: float
    source: str
    message_s: float = 0.0
    byte_s: float = 0.0

    def __post_init__(self):
        for field in ("name", "source"):
            value = getattr(self, field)
            if not isinstance(value, str) or not value:
                raise ValueError(f"fabric {field} must be a text that is not empty, got {value!r}.")
        for field in ("within", "between"):
            if not isinstance(getattr(self, field), Link):
                raise ValueError(f"fabric {self.name}: {field} must be a Link, got {getattr(self, field)!r}.")
        if type(self.nics_per_node) is not int or self.nics_per_node < 1:
            raise ValueError(f"fabric {self.name}: nics_per_node must be an integer >= 1, got {self.nics_per_node!r}.")
        for field in ("overhead_s", "message_s", "byte_s"):
            _check_number(f"fabric {self.name}: {field}", getattr(self, field), zero=True)

    @classmethod
    def preset(cls, name: str) -> Fabric:
        """The fabric of this name.

        Raises:
            ValueError: there is none; the message lists those there are.
        """
        if name not in PRESETS:
            close = difflib.get_close_matches(str(name), PRESETS, 1)
            meant = f" Did you mean {close[0]!r}?" if close else ""
            raise ValueError(
                f"unknown fabric {name!r}: the presets are {', '.join(PRESETS)}.{meant} "
                "Or measure yours: `lasp bench fabric` writes a file to name here."
            )
        return PRESETS[name]

    @classmethod
    def load(cls, path: str | Path) -> Fabric:
        """Read a file that :meth:`save` or ``lasp bench fabric`` wrote.

        Raises:
            ValueError: no such file, no JSON, a measurement is missing, unknown or cannot be.
        """
        path = Path(path)
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            reason = "does not exist" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
            raise ValueError(f"fabric file {path} {reason}. `lasp bench fabric` measures one and writes it.") from error
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"fabric file {path} is no JSON: {error}. `lasp bench fabric` writes a new one."
            ) from error
        values = _checked_keys(path, "", cls, values)
        for level in ("within", "between"):
            values[level] = _checked_keys(path, f"{level}.", Link, values[level])
        try:
            links = {level: Link(**values.pop(level)) for level in ("within", "between")}
            return cls(**values, **links)
        except ValueError as error:
            raise ValueError(f"fabric file {path}: {error}") from error

    def save(self, path: str | Path) -> None:
        """Write what :meth:`load` reads."""
        Path(path).write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def of(cls, fabric: str | Path | Fabric) -> Fabric:
        """``fabric`` itself, the preset of this name, or the file at this path (what ends in .json or has a slash).

        Raises:
            ValueError: as :meth:`preset` and :meth:`load`, or ``fabric`` is something else.
        """
        if isinstance(fabric, Fabric):
            return fabric
        if not isinstance(fabric, (str, Path)):
            raise ValueError(
                f"fabric must be a preset's name, the path of a file or a Fabric, got {fabric!r}. "
                f"The presets are {', '.join(PRESETS)}."
            )
        if isinstance(fabric, Path) or fabric.endswith(".json") or "/" in fabric:
            return cls.load(fabric)
        return cls.preset(fabric)


def _check_number(name: str, value: Any, *, zero: bool = False) -> None:
    try:
        number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an int that no float holds
        number = False
    if not number or value < 0 or (value == 0 and not zero):
        rule = "a finite number >= 0" if zero else "a finite number above 0"
        raise ValueError(f"{name} must be {rule}, got {value!r}. `lasp bench fabric` measures it.")


def _checked_keys(path: Path, prefix: str, cls: type, values: Any) -> dict[str, Any]:
    """``values`` if its keys are the fields of ``cls``: all without a default, none beside."""
    if not isinstance(values, Mapping):
        raise ValueError(
            f"fabric file {path}: {prefix.rstrip('.') or 'the file'} must be an object of measurements, got {values!r}."
        )
    fields = dataclasses.fields(cls)
    missing = [prefix + f.name for f in fields if f.default is dataclasses.MISSING and f.name not in values]
    if missing:
        raise ValueError(
            f"fabric file {path} lacks the measurement {', '.join(missing)}. Measure again with `lasp bench fabric`, "
            "or add it to the file."
        )
    unknown = [prefix + key for key in values if key not in {f.name for f in fields}]
    if unknown:
        raise ValueError(
            f"fabric file {path} has unknown keys: {', '.join(unknown)}. Known are "
            f"{', '.join(prefix + f.name for f in fields)}."
        )
    return dict(values)


PRESETS: Mapping[str, Fabric] = MappingProxyType(
    {
        fabric.name: fabric
        for fabric in (
            Fabric(
                name="h100-ib",
                within=Link(6.15e-6, 61.6e9),
                between=Link(5.66e-6, 50e9),
                nics_per_node=8,
                overhead_s=85.4e-6,
                source="8 H100 per node, NVLink 4, one 400 Gbit/s InfiniBand interface per GPU. Interface: data sheet. "
                "Latencies, NVLink's effective rate (data sheet: 450 GB/s) and overhead: fitted to ZeCO's published "
                "collectives on 8, 32 and 128 GPUs (arXiv 2507.01004) by benchmarks/published.py",
            ),
            Fabric(
                name="a100-ib",
                within=Link(6.15e-6, 41.1e9),
                between=Link(5.66e-6, 25e9),
                nics_per_node=8,
                overhead_s=85.4e-6,
                source="8 A100 per node, NVLink 3, one 200 Gbit/s InfiniBand interface per GPU. Interface: data sheet. "
                "The rest: h100-ib's, NVLink's rate by the data sheets' ratio of 600 to 900; not measured",
            ),
            Fabric(
                name="ethernet-25g",
                within=Link(20e-6, 12e9),
                between=Link(50e-6, 3.1e9),
                nics_per_node=1,
                overhead_s=200e-6,
                source="One 25 Gbit/s interface per node: data sheet. PCIe inside a node, TCP latencies, overhead: "
                "assumed, not measured",
            ),
            Fabric(
                name="laptop",
                within=Link(100e-6, 1e9),
                between=Link(100e-6, 1e9),
                nics_per_node=1,
                overhead_s=300e-6,
                source="gloo over loopback sockets: assumed, not measured",
            ),
        )
    }
)
