"""Which exchange a softmax layer gets under ``auto``: the one whose messages are predicted to take least."""

from __future__ import annotations

import functools
from collections import Counter

from lasp.context.context import Context
from lasp.cost import Choice, choose_softmax
from lasp.cost.fabric import Fabric
from lasp.softmax.ulysses import heads_fit

SOFTMAX_EXCHANGES = ("all_gather", "ring", "ulysses")


def softmax_choice(
    cp: Context, batch: int, heads: tuple[int, int], widths: tuple[int, int], itemsize: int, window: int | None
) -> Choice:
    """The choice for one layer; equal on all ranks.

    With a window it is ``all_gather``, which fetches just the window; ``ulysses`` is no candidate where heads do not
    divide. The longest shard counts.

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
        return Choice("all_gather", 1, 0.0, 0.0, f"all_gather: {what}.", ())
    if cp.fabric is None:
        raise ValueError(
            "exchange='auto' chooses by the links between ranks: make the context with fabric=..., or name "
            "'all_gather', 'ring' or 'ulysses'."
        )
    nodes = tuple(Counter(cp.nodes).values())
    longest = max(cp.layout.num_tokens(rank) for rank in range(cp.cp_size))
    names = ("all_gather", "ring", *(("ulysses",) if heads_fit(*heads, cp.cp_size) else ()))
    tokens = batch * longest * itemsize
    return _best(nodes, tokens * heads[1] * sum(widths), tokens * heads[0] * widths[0], cp.fabric, names)


@functools.lru_cache(maxsize=64)
def _best(nodes: tuple[int, ...], kv_bytes: int, q_bytes: int, fabric: Fabric, candidates: tuple[str, ...]) -> Choice:
    return choose_softmax(nodes, kv_bytes, q_bytes, fabric, candidates=candidates)
