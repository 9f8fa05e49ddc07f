"""What one way to run a job is predicted to take: seconds of a step, and memory.

    step = micro batches x (compute + exposed exchanges + exposed tensor-parallel sums) x pipeline bubble + exposed sums

where compute is the roofline (:mod:`lasp.launch.plan.roofline`) or a measured speed, exchanges are the cost model's
(:mod:`lasp.cost`) over a fabric, and *exposed* is what no computation hides. An exchange of a linear layer is hidden by
dq in the backward, and by nothing in the forward, where the kernels need the entry state. Memory:
:mod:`lasp.launch.plan.memory`. Nothing here was measured.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

from lasp import cost
from lasp.cost.fabric import Fabric
from lasp.exchange import EXCHANGES, Exchange
from lasp.launch.plan.activations import Load
from lasp.launch.plan.memory import Memory, Parameters, Setup, predict_memory
from lasp.launch.plan.question import PlannedJob
from lasp.launch.plan.roofline import Work, predict_work, state_bytes
from lasp.models.config import ModelConfig
from lasp.parallel.engines.kinds import Traffic
from lasp.parallel.engines.table import engine_kind
from lasp.softmax.table import SOFTMAX_EXCHANGES


@dataclass(frozen=True)
class Candidate:
    """One way to run a job, and what is predicted of it.

    Attributes:
        tp, pp, cp, dp: the mesh.
        engine, recompute, ffn_tile: who holds what, what is made again.
        exchange, slices, softmax_exchange: of the layers; None where there is no such layer or one rank.
        step_s, compute_s, exposed_s: seconds of a step, of its computation, and of communication that nothing hides.
        tokens_per_s: per GPU.
        memory: of one rank.
        case: what its linear layers exchange.
    """

    tp: int
    pp: int
    cp: int
    dp: int
    engine: str
    recompute: bool
    ffn_tile: int | None
    exchange: str | None
    slices: int
    softmax_exchange: str | None
    step_s: float
    compute_s: float
    exposed_s: float
    tokens_per_s: float
    memory: Memory
    case: cost.Case | None


def describe(c: Candidate) -> str:
    """The candidate in a line."""
    parts = [f"tp {c.tp}, pp {c.pp}, " * (c.tp * c.pp > 1) + f"cp {c.cp}, dp {c.dp}, {c.engine}"]
    parts += ["recompute"] * c.recompute + [f"ffn_tile {c.ffn_tile}"] * (c.ffn_tile is not None)
    return ", ".join(parts)


def price(
    job: PlannedJob, mesh: tuple[int, int, int, int], engine: str, model: ModelConfig, exchange: str | None
) -> Candidate:
    """The candidate of a mesh (tp, pp, cp, dp) with an engine and an exchange of its linear layers."""
    tp, pp, cp, dp = mesh
    fragments = 2 if job.layout == "zigzag" and cp > 1 else 1
    load = Load(-(-job.seq_len // cp), job.dtype_bytes, cp_size=cp, fragments=fragments, tp_size=tp)
    if job.device.name == "cpu":
        load = dataclasses.replace(load, device="cpu")
    work = predict_work(model, load, job.seq_len, job.device, pp)
    if job.tokens_per_s is not None:
        plain = predict_work(job.model, load, job.seq_len, job.device, pp)
        factor = load.tokens / job.tokens_per_s / (tp * pp) / plain.total
        work = Work(*(factor * seconds for seconds in dataclasses.astuple(work)))
    nodes = _nodes_of_group(cp, tp, job.gpus_per_node)
    there, exposed, kinds = None, 0.0, model.layer_kinds
    if exchange is not None:
        state, transition = state_bytes(model, load)
        case = cost.Case(nodes, state, transition, fragments, value_columns=model.value_dim)
        there, back = _there_and_back(EXCHANGES[exchange], case, job.fabric)
        exposed += kinds.count("L") / pp * (there.seconds + max(0.0, back.seconds - work.dq))
        load = dataclasses.replace(load, exchange=exchange)
    softmax = None
    if cp > 1 and "S" in kinds and model.window is None:
        softmax, seconds = _softmax(model, load, nodes, job.fabric, work)
        exposed += kinds.count("S") / pp * seconds
        load = dataclasses.replace(load, softmax_exchange=softmax)
    if tp > 1:  # two sums of the residual stream per layer and direction
        exposed += 4 * len(kinds) / pp * _all_reduce(load.tokens * model.dim * load.width, tp, job, inside=True)
    micro_batches = job.batch // dp
    bubble = 1 + (pp - 1) / micro_batches
    compute = micro_batches * work.total * bubble
    exposed = micro_batches * exposed * bubble + _parameter_traffic(job, model, engine, mesh, compute)
    setup = Setup(engine, load, cp * dp, pp, micro_batches, job.offload and engine_kind(engine).native)
    step = compute + exposed
    return Candidate(
        *mesh, engine, model.recompute, model.ffn_tile, exchange, there.slices if there else 1, softmax,
        step, compute, exposed, job.batch * job.seq_len / step / job.gpus, predict_memory(model, setup),
        case if there else None,
    )  # fmt: skip


@functools.lru_cache(maxsize=256)
def _there_and_back(exchange: Exchange, case: cost.Case, fabric: Fabric) -> tuple[cost.Estimate, cost.Estimate]:
    """Forward and backward; candidates of other engines and tiles ask for the same."""
    there = cost.estimate(exchange, case, fabric)
    return there, cost.estimate(exchange, case, fabric, slices=there.slices, backward=True)


def _nodes_of_group(cp: int, tp: int, per_node: int) -> tuple[int, ...]:
    """Ranks of one cp_group on each of its nodes: neighbours share tensors first, then sequences."""
    here = max(1, min(cp, per_node // tp))
    full, rest = divmod(cp, here)
    return (here,) * full + ((rest,) if rest else ())


def _softmax(model: ModelConfig, load: Load, nodes: tuple[int, ...], fabric: Fabric, work: Work) -> tuple[str, float]:
    """The exchange of a softmax layer that exposes least, of those that its heads fit, and how much."""
    kv_heads = max(1, (model.kv_heads or model.heads) // load.tp_size)
    head, heads = model.softmax_head_dim, model.heads // load.tp_size
    kv = 2 * load.tokens * kv_heads * head * load.width
    q = load.tokens * heads * head * load.width
    found = []
    for entry in SOFTMAX_EXCHANGES.values():
        if not entry.heads_fit(heads, kv_heads, sum(nodes)):
            continue
        there, back = (cost.estimate_softmax(entry, nodes, kv, q, fabric, backward=b).seconds for b in (False, True))
        hidden = entry.hidden * work.attention
        found.append((max(0.0, there - hidden) + max(0.0, back - 2 * hidden), entry.name))
    seconds, name = min(found, key=lambda pair: pair[0])
    return name, seconds


def _all_reduce(size: float, ranks: int, job: PlannedJob, *, inside: bool) -> float:
    """Ring: twice (n - 1) / n of the bytes over the slowest link."""
    link, nics = (job.fabric.within, 1.0) if inside else (job.fabric.between, 1.0)
    if not inside:
        nics = min(1.0, job.fabric.nics_per_node / job.gpus_per_node)
    return 2 * (ranks - 1) / ranks * size / (link.bytes_per_s * nics) + 2 * (ranks - 1) * link.latency_s


def _parameter_traffic(
    job: PlannedJob, model: ModelConfig, engine: str, mesh: tuple[int, int, int, int], compute: float
) -> float:
    """Exposed seconds of the sums of gradients, and of gathering parameters where they are cut.

    One sum after the last backward is exposed whole. An engine that works block by block gathers in the forward and in
    the backward of each micro batch and sums in the backward, behind the computation of the neighbouring block.
    """
    tp, pp, cp, dp = mesh
    ranks = cp * dp
    if ranks == 1:
        return 0.0
    parameters = Parameters.of(model, tp, pp).all
    inside = job.gpus <= job.gpus_per_node
    if engine_kind(engine).traffic is Traffic.BY_BLOCK:
        micro_batches = job.batch // dp
        size = parameters * (2 * job.dtype_bytes + 4)
        seconds = micro_batches * _all_reduce(size, ranks, job, inside=inside) / 2
        return max(0.0, seconds - compute)
    return _all_reduce(4 * parameters, ranks, job, inside=inside)
