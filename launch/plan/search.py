"""The planner: which mesh, engine, exchange and recomputation for a model, a length and a number of GPUs.

Every way to cut the job is a candidate, priced in :mod:`lasp.launch.plan.candidates`; the fastest one whose memory fits
is recommended. Tensor- and pipeline-parallel ranks are Megatron's, so they follow its rules (docs/megatron.md).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil

from lasp.exchange import EXCHANGES
from lasp.launch.plan.candidates import Candidate, describe, price
from lasp.launch.plan.question import PlannedJob
from lasp.models.config import ModelConfig
from lasp.parallel.engines.kinds import EngineKind
from lasp.parallel.engines.table import ENGINES, engine_kind
from lasp.parallel.gpt.rules import check_model

FFN_TILE = 8192  # tokens; proposed where a rank has more
_MOST_GPUS = 2**12  # that are tried when nothing fits


@dataclass(frozen=True)
class Plan:
    """All candidates, fastest first, and the recommended one: None where none fits."""

    job: PlannedJob
    candidates: tuple[Candidate, ...]
    best: Candidate | None
    refused: tuple[str, ...]

    def fits(self, candidate: Candidate) -> bool:
        """Whether its peak is within the memory of a GPU."""
        return candidate.memory.peak <= self.job.memory


def make_plan(job: PlannedJob) -> Plan:
    """Every candidate, priced.

    Raises:
        ValueError: there is none: no mesh divides, or none is allowed; or none fits, naming the nearest.
    """
    if job.engine != "auto":
        _check_engine(job, engine_kind(job.engine))
    refused: dict[str, list[str]] = {}
    candidates = [c for mesh in _meshes(job, refused) for c in _of_mesh(job, *mesh)]
    if not candidates:
        raise ValueError(
            f"no mesh fits gpus = {job.gpus}, batch = {job.batch} and the model. {' '.join(_listed(refused))} "
            "Change gpus or batch."
        )
    candidates.sort(key=lambda c: (-c.tokens_per_s, c.memory.peak))
    fitting = [c for c in candidates if c.memory.peak <= job.memory]
    best = fitting[0] if fitting else None
    return Plan(job, tuple(candidates), best, _listed(refused))


def _check_engine(job: PlannedJob, kind: EngineKind) -> None:
    if job.gpus < kind.min_ranks:
        raise ValueError(
            f"engine={kind.name} needs at least {kind.min_ranks} ranks to share states over, got gpus = {job.gpus}. "
            "Use ddp, or leave --engine out."
        )
    if not kind.native and job.device.name == "cpu":
        raise ValueError(f"engine={kind.name} needs CUDA devices, got device cpu. Use another engine, or --device.")


def nothing_fits(plan: Plan) -> str:
    """Why, the nearest candidate, and what it would take."""
    job, nearest = plan.job, min(plan.candidates, key=lambda c: c.memory.peak)
    largest = max(nearest.memory.terms, key=lambda term: term.bytes)
    more = _enough_gpus(job)
    remedy = f"{more} GPUs would do" if more else f"More of this size, up to {_MOST_GPUS}, would not do"
    return (
        f"nothing fits: {job.seq_len} tokens x {job.batch} on {job.gpus} GPUs of {job.memory / 1e9:g} GB. Nearest: "
        f"{describe(nearest)} with a predicted peak of {nearest.memory.peak / 1e9:.1f} GB, most of it {largest.name} "
        f"({largest.bytes / 1e9:.1f} GB). {remedy}, or "
        f"--memory {ceil(nearest.memory.peak / 1e9)}GB. --explain shows why."
    )


def _enough_gpus(job: PlannedJob) -> int | None:
    """The least power-of-two multiple of the GPUs on which something fits."""
    gpus = 2 * job.gpus
    while gpus <= min(_MOST_GPUS, job.seq_len * job.batch):
        if gpus <= job.gpus_per_node or gpus % job.gpus_per_node == 0:
            try:
                plan = make_plan(dataclasses.replace(job, gpus=gpus))
            except ValueError:
                return None
            if plan.best is not None:
                return gpus
        gpus *= 2
    return None


def _meshes(job: PlannedJob, refused: dict[str, list[str]]) -> Iterator[tuple[int, int, int, int]]:
    """(tp, pp, cp, dp) whose product is the GPUs; tp stays in a node, dp divides the batch."""
    for tp in _divisors(min(job.gpus, job.gpus_per_node)):
        for pp in _divisors(job.model.num_layers):
            if job.gpus % (tp * pp):
                continue
            if tp * pp > 1:
                if job.device.name == "cpu":
                    refused.setdefault("backend=megatron needs CUDA devices.", []).append(f"{tp} x {pp}")
                    continue
                if job.engine != "auto" and engine_kind(job.engine).native:
                    continue
                try:
                    check_model(_without_tile(job.model), _Sizes(tp, pp), None, False)
                except ValueError as error:
                    refused.setdefault(str(error), []).append(f"{tp} x {pp}")
                    continue
                if pp > 1 and pp > job.batch:
                    refused.setdefault(f"pp needs as many sequences in flight, got batch = {job.batch}.", []).append(
                        f"{tp} x {pp}"
                    )
                    continue
            rest = job.gpus // (tp * pp)
            meshes = [(tp, pp, rest // dp, dp) for dp in _divisors(rest) if job.batch % dp == 0]
            yield from (mesh for mesh in meshes if mesh[2] <= job.seq_len)
            if not any(mesh[2] <= job.seq_len for mesh in meshes):
                refused.setdefault(f"cp would be above seq-len = {job.seq_len}.", []).append(f"{tp} x {pp}")


def _listed(refused: dict[str, list[str]]) -> tuple[str, ...]:
    return tuple(f"tp x pp = {', '.join(dict.fromkeys(sizes))}: {why}" for why, sizes in refused.items())


@dataclass(frozen=True)
class _Sizes:
    tp_size: int
    pp_size: int


def _without_tile(model: ModelConfig) -> ModelConfig:
    return dataclasses.replace(model, ffn_tile=None)


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _of_mesh(job: PlannedJob, tp: int, pp: int, cp: int, dp: int) -> Iterator[Candidate]:
    """With and without recomputation, each with the fastest engine and tile that fits, else the leanest."""
    tokens = -(-job.seq_len // cp)
    engines = _engines(job, cut=tp * pp > 1, ranks=cp * dp)
    tiles = [None] if tokens <= FFN_TILE or not all(kind.native for kind in engines) else [None, FFN_TILE]
    exchanges = EXCHANGES if cp > 1 and "L" in job.model.layer_kinds else (None,)
    for recompute, exchange in itertools.product((False, True), exchanges):
        models = [dataclasses.replace(job.model, recompute=recompute, ffn_tile=tile) for tile in tiles]
        found = [price(job, (tp, pp, cp, dp), kind.name, model, exchange) for kind in engines for model in models]
        fitting = [c for c in found if c.memory.peak <= job.memory]
        if found:
            yield max(fitting, key=lambda c: c.tokens_per_s) if fitting else min(found, key=lambda c: c.memory.peak)


def _engines(job: PlannedJob, *, cut: bool, ranks: int) -> list[EngineKind]:
    """What the job asks for, or all that are proposed for models that are cut over tp and pp, or not."""
    if job.engine == "auto":
        kinds = [kind for kind in ENGINES.values() if kind.proposed and kind.native is not cut]
    else:
        kinds = [engine_kind(job.engine)]
    return [kind for kind in kinds if ranks >= kind.min_ranks]
