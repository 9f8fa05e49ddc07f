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
from lasp.exchange.table import AUTO, EXCHANGES, Exchange
from lasp.kernels.state import StateMap


@dataclass(frozen=True)
class Setting:
    """The exchange of a layer.

    Attributes:
        exchange: name of an entry of :data:`lasp.exchange.EXCHANGES`.
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
    return EXCHANGES[chosen.exchange].scheme(cp, plan, *sliced)


def setting(cp: Context, state: int, transition: int, value_dim: int, dtype: torch.dtype) -> Setting:
    """What a layer gets whose maps have so many numbers; equal on all ranks.

    Args:
        cp: the batch's context.
        state, transition: numbers in a state [B, H, K, V] and in a transition that must travel, of one map.
        value_dim: V.
        dtype: of the states.
    """
    if cp.exchange == AUTO:
        among = tuple(EXCHANGES.values())
    else:
        among = (EXCHANGES[cp.exchange],)
        if cp.fabric is None or not among[0].takes_fabric:
            return Setting(cp.exchange, min(among[0].slices, value_dim), f"{cp.exchange}: as configured.")
    case = cost.Case(
        tuple(Counter(cp.nodes).values()),
        state * (cp.wire_dtype or dtype).itemsize,
        transition * dtype.itemsize,
        cp.layout.max_fragments,
        value_dim,
    )
    return _best(among, case, cp.fabric)


@functools.lru_cache(maxsize=64)
def _best(among: tuple[Exchange, ...], case: cost.Case, fabric: Fabric) -> Setting:
    if len(among) > 1:
        choice = cost.choose(among, case, fabric)
        return Setting(choice.exchange, choice.slices, choice.reason)
    (taken,) = among
    slices = cost.estimate(taken, case, fabric).slices
    return Setting(taken.name, slices, f"{taken.name}: as configured, in {slices} slice(s) on {fabric.name}.")
