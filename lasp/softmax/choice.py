"""Which exchange a softmax layer gets under ``auto``: the one whose messages are predicted to take least."""

from __future__ import annotations

import functools
from collections import Counter

from lasp.context.context import Context
from lasp.cost import Choice, choose_softmax
from lasp.cost.fabric import Fabric
from lasp.softmax.table import SOFTMAX_EXCHANGES, WITH_WINDOW, SoftmaxExchange


def softmax_choice(
    cp: Context, batch: int, heads: tuple[int, int], widths: tuple[int, int], itemsize: int, window: int | None
) -> Choice:
    """The choice for one layer; equal on all ranks.

    With a window it is ``all_gather``, which fetches just the window; an exchange is no candidate where the heads do
    not fit it. The longest shard counts.

    Args:
        cp: the batch's context.
        batch: B.
        heads: H and Hkv.
        widths: D and Dv.
        itemsize: bytes of an element of q, k and v.
        window: as in :func:`lasp.softmax_attention`.

    Raises:
        ValueError: the context has no fabric.
    """
    if cp.cp_size == 1 or window is not None:
        what = "one rank exchanges nothing" if cp.cp_size == 1 else f"fetches just the window of {window}"
        return Choice(WITH_WINDOW, 1, 0.0, 0.0, f"{WITH_WINDOW}: {what}.", ())
    if cp.fabric is None:
        raise ValueError(
            "exchange='auto' chooses by the links between ranks: make the context with fabric=..., or name one of "
            f"{tuple(SOFTMAX_EXCHANGES)}."
        )
    nodes = tuple(Counter(cp.nodes).values())
    longest = max(cp.layout.num_tokens(rank) for rank in range(cp.cp_size))
    among = tuple(e for e in SOFTMAX_EXCHANGES.values() if e.heads_fit(*heads, cp.cp_size))
    tokens = batch * longest * itemsize
    return _best(among, nodes, tokens * heads[1] * sum(widths), tokens * heads[0] * widths[0], cp.fabric)


@functools.lru_cache(maxsize=64)
def _best(
    among: tuple[SoftmaxExchange, ...], nodes: tuple[int, ...], kv_bytes: int, q_bytes: int, fabric: Fabric
) -> Choice:
    return choose_softmax(among, nodes, kv_bytes, q_bytes, fabric)
