"""Which exchange a layer gets: the one that its context names, in the slices that suit the fabric, or the fastest."""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

from lasp import cost
from lasp.context.chains import ChainPlan
from lasp.context.context import Context
from lasp.cost.fabric import Fabric
from lasp.exchange.base import StateExchange
from lasp.exchange.gather import AllGather
from lasp.exchange.line_scan import AllScan, LogScan, NodeScan, Ring
from lasp.kernels.state import StateMap

EXCHANGES: dict[str, type[StateExchange]] = {
    "all_gather": AllGather,
    "ring": Ring,
    "all_scan": AllScan,
    "log_scan": LogScan,
    "hierarchical": NodeScan,
}
AUTO = "auto"
SLICES = 8  # of all_scan where no fabric says better; ZeCO's figures stop to improve there


@dataclass(frozen=True)
class Setting:
    """The exchange of a layer.

    Attributes:
        exchange: one of :data:`EXCHANGES`.
        slices: pieces in which a state travels.
        reason: one sentence.
    """

    exchange: str
    slices: int
    reason: str


def new_exchange(cp: Context, plan: ChainPlan, maps: StateMap, fixed: Tensor | None) -> StateExchange:
    """The exchange of one layer whose maps are these."""
    lead = maps.state.shape[1:]  # [B, H, K, V]
    transition = maps.log_decay if maps.matrix is None else maps.matrix
    sent = 0 if transition is None or fixed is not None else transition[0].numel()
    chosen = setting(cp, lead.numel(), sent, lead[-1], maps.state.dtype)
    sliced = (chosen.slices,) if chosen.slices > 1 else ()
    return EXCHANGES[chosen.exchange](cp, plan, *sliced)


def setting(cp: Context, state: int, transition: int, value_dim: int, dtype: torch.dtype) -> Setting:
    """What a layer gets whose maps have so many numbers; equal on all ranks.

    Args:
        cp: the batch's context.
        state, transition: numbers in a state [B, H, K, V] and in a transition that must travel, of one map.
        value_dim: V.
        dtype: of the states.
    """
    if cp.fabric is None or cp.exchange not in (AUTO, "all_scan", "hierarchical"):
        slices = min(SLICES, value_dim) if cp.exchange == "all_scan" else 1
        return Setting(cp.exchange, slices, f"{cp.exchange}: as configured.")
    case = cost.Case(
        tuple(Counter(cp.nodes).values()),
        state * (cp.wire_dtype or dtype).itemsize,
        transition * dtype.itemsize,
        cp.layout.max_fragments,
        value_dim,
    )
    return _best(cp.exchange, case, cp.fabric)


@functools.lru_cache(maxsize=64)
def _best(exchange: str, case: cost.Case, fabric: Fabric) -> Setting:
    if exchange == AUTO:
        choice = cost.choose(case, fabric)
        return Setting(choice.exchange, choice.slices, choice.reason)
    slices = cost.estimate(exchange, case, fabric).slices
    return Setting(exchange, slices, f"{exchange}: as configured, in {slices} slice(s) on {fabric.name}.")
