"""The table of engines: what each needs, holds and sends. Everything that depends on an engine asks here.

The configuration, ``build_engine``, the planner, the memory model, the command line and the list in docs/scaling.md
read it. It imports no torch: an engine's own file is imported when one is built.

    python -m lasp.parallel.engines.table      prints the list of docs/scaling.md
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from lasp.parallel.engines.kinds import EngineKind, Held, Master, Package, ParameterCounts, Traffic
from lasp.parallel.engines.zero_sizes import BUCKET_ELEMENTS, LIVE_ELEMENTS


def _ddp(*args: Any) -> Any:
    from lasp.parallel.engines.ddp import DataParallelEngine

    return DataParallelEngine(*args)


def _fsdp2(*args: Any) -> Any:
    from lasp.parallel.engines.fsdp import ShardedEngine

    return ShardedEngine(*args)


def _zero(kind: EngineKind, *args: Any) -> Any:
    from lasp.parallel.engines.zero import ZeroEngine

    return ZeroEngine(kind, *args, stage=int(kind.name.removeprefix("zero")))


def _blocks(counts: ParameterCounts, width: int, wide: int) -> Iterable[Held]:
    return (
        Held("gathered: embedding and head", counts.root * width, f"N outside of blocks x {width}"),
        Held("gathered: a block and the next", 2 * counts.block * width, f"2 x N of a block x {width}"),
        Held("gradients of a block, being summed", counts.block * (width + wide), f"N of a block x ({width} + {wide})"),
    )


def _bucket(counts: ParameterCounts, width: int, wide: int) -> Iterable[Held]:
    size = min(counts.all, BUCKET_ELEMENTS) * wide
    return (Held("bucket of gradients", size, f"{BUCKET_ELEMENTS} x {wide} at most"),)


def _bucket_and_gathered(counts: ParameterCounts, width: int, wide: int) -> Iterable[Held]:
    live = min(counts.all, LIVE_ELEMENTS) * width
    return (*_bucket(counts, width, wide), Held("gathered", live, f"{LIVE_ELEMENTS} x {width} at most"))


_DEEPSPEED: dict[str, Any] = {
    "build": _zero,
    "min_ranks": 2,
    "package": Package("DeepSpeed", "deepspeed", "deepspeed"),
    "dtypes": ("float32", "bfloat16"),
    "dtype_reason": "DeepSpeed's master copy is float32",
}

ENGINES: dict[str, EngineKind] = {
    kind.name: kind
    for kind in (
        EngineKind(
            name="ddp",
            use="models that fit: least traffic, one sum per step",
            build=_ddp,
            master=Master.IF_NARROW,
            proposed=True,
        ),
        EngineKind(
            name="fsdp2",
            use="models that do not; the default choice on many GPUs",
            build=_fsdp2,
            cut_parameters=True,
            cut_gradients=True,
            cut_states=True,
            master=Master.ALONE,
            in_work=_blocks,
            gathers_parameters=True,
            traffic=Traffic.BY_BLOCK,
            min_ranks=2,
            proposed=True,
        ),
        EngineKind(name="zero0", use="only to compare DeepSpeed with `ddp`", **_DEEPSPEED),
        EngineKind(name="zero1", use="states do not fit, traffic is dear", cut_states=True, **_DEEPSPEED),
        EngineKind(
            name="zero2",
            use="the same, and gradients do not fit",
            cut_gradients=True,
            cut_states=True,
            in_work=_bucket,
            **_DEEPSPEED,
        ),
        EngineKind(
            name="zero3",
            use="DeepSpeed shops; otherwise `fsdp2`",
            cut_parameters=True,
            cut_gradients=True,
            cut_states=True,
            in_work=_bucket_and_gathered,
            gathers_parameters=True,
            traffic=Traffic.BY_BLOCK,
            **_DEEPSPEED,
        ),
        EngineKind(
            name="megatron",
            use="models that need tensor or pipeline parallel ranks",
            build=None,
            cut_states=True,
            proposed=True,
        ),
    )
}


def engine_kind(name: str) -> EngineKind:
    """The engine of this name, for the planner and the memory model: ``megatron`` too.

    Raises:
        ValueError: there is none.
    """
    return _find(name, ENGINES)


def native_engine(name: str) -> EngineKind:
    """The engine of this name that ``engine=`` takes.

    Raises:
        ValueError: there is none.
    """
    return _find(name, {name: kind for name, kind in ENGINES.items() if kind.native})


def _find(name: str, kinds: dict[str, EngineKind]) -> EngineKind:
    if name not in kinds:
        close = difflib.get_close_matches(name, kinds, n=1)
        remedy = f"Did you mean {close[0]}?" if close else "Choose one of them."
        raise ValueError(f"engine must be one of {', '.join(kinds)}, got {name!r}. {remedy}")
    return kinds[name]


def as_markdown() -> str:
    """The engines that ``engine=`` takes, as the list in docs/scaling.md has them."""
    rows = [
        "| engine | parameters | gradients | optimizer states | bytes per parameter, bf16, N ranks | use it |",
        "|---|---|---|---|---|---|",
    ]
    for kind in ENGINES.values():
        if kind.native:
            parts = ("cut" if cut else "whole" for cut in (kind.cut_parameters, kind.cut_gradients, kind.cut_states))
            rows.append(f"| `{kind.name}` | {' | '.join(parts)} | {_bytes(kind)} | {kind.use} |")
    return "\n".join(rows)


def _bytes(kind: EngineKind) -> str:
    """Of a parameter in bf16: itself 2, the fp32 sum of its gradient 4, fp32 master copy and two moments 12."""
    sizes = {2: kind.cut_parameters, 4: kind.cut_gradients, 12: kind.cut_states}
    if kind.master is Master.ALONE:
        del sizes[2]
    terms = [str(size) for size, cut in sizes.items() if not cut]
    if shared := sum(size for size, cut in sizes.items() if cut):
        terms.append(f"{shared} / N")
    return " + ".join(terms) + ", and the blocks in work" * kind.gathers_parameters


if __name__ == "__main__":
    print(as_markdown())
