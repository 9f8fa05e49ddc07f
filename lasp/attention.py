"""Softmax attention over a cp_group: what it takes, and which exchange brings queries and keys together.

    all_gather   a rank gets all keys and values of its documents, some heads at a time       lasp/softmax/gather.py
    ring         shards of keys and values travel around, one computed while the next comes   lasp/softmax/ring.py
    ulysses      a rank gets all tokens of some heads, and gives the outputs back             lasp/softmax/ulysses.py

With ``window=W`` a token reads at most W - 1 older ones, so instead of the gather each fragment fetches just these
(lasp/softmax/window.py); a window under ``ulysses`` is one of the local attention. All give the same numbers.
"""

from __future__ import annotations

from torch import Tensor

from lasp.checks import check_not_empty, check_scale, check_tensors, not_one_of
from lasp.cp_context import CPContext
from lasp.exchange import AUTO
from lasp.softmax.choice import softmax_choice
from lasp.softmax.table import SOFTMAX_EXCHANGES, check_heads, check_window, softmax_names


def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cp: CPContext | None = None,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    exchange: str = "all_gather",
) -> Tensor:
    """Softmax attention over documents that may continue on other ranks; equal to the run on one device.

    Sums run in fp32 (fp64 for fp64 inputs). The files of the exchanges say which messages there are, and of what size;
    none when cp_size is 1.

    Args:
        q: [B, T_local, H, D], this rank's tokens in local order.
        k, v: [B, T_local, Hkv, D] and [B, T_local, Hkv, Dv]; Hkv divides H, head h reads ``h // (H // Hkv)``.
        cp: the batch's context; None is one device with one document per row.
        causal: token i reads ``j <= i`` of its document; False: the whole document.
        window: keep only ``i - window < j <= i``. Needs ``causal=True``, and another exchange than ``"ring"``.
        scale: default ``D ** -0.5``.
        exchange: ``"all_gather"`` (LASP-2H), ``"ring"`` (Ring Attention) or ``"ulysses"``, which needs a cp_size that
            divides H, and that divides Hkv or is a multiple of it; ``"auto"``: the one of them whose messages are
            predicted to take least on the context's fabric.

    Returns:
        [B, T_local, H, Dv] in q's dtype. Gradients have the same dtype.

    Raises:
        ValueError: shapes, dtypes, devices or head counts do not fit each other, the context or the exchange; a window
            below 1, without ``causal`` or under ``"ring"``; an unknown exchange.
    """
    _check(q, k, v, causal, window, scale, exchange)
    cp = CPContext.of(cp, q.shape[1])
    cp.check_tokens("q", q)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if exchange == AUTO:
        heads, widths = (q.shape[2], k.shape[2]), (q.shape[3], v.shape[3])
        exchange = softmax_choice(cp, q.shape[0], heads, widths, q.element_size(), window).exchange
    check_heads(exchange, q.shape[2], k.shape[2], cp.cp_size)
    return SOFTMAX_EXCHANGES[exchange].attend(q, k, v, cp, causal, window, scale)


def _check(q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int | None, scale: float | None, exchange: str):
    if exchange not in softmax_names():
        raise ValueError(f"exchange {not_one_of(softmax_names(), exchange)}")
    if window is not None:
        if isinstance(window, bool) or not isinstance(window, int) or window < 1:
            raise ValueError(f"window must be an int of at least 1 (the token itself) or None, got {window!r}.")
        if not causal:
            raise ValueError(f"window={window} needs causal=True: it keeps the newest keys. Leave window None.")
        if exchange != AUTO:
            check_window(exchange, window)
    check_scale(scale, "D ** -0.5", positive=True)
    check_tensors(q=q, k=k, v=v)
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4 or min(x.shape[2:]) < 1:
            raise ValueError(
                f"{name} must have shape [B, T_local, heads, head dim], without empty heads, got {tuple(x.shape)}. "
                "Split the projection with unflatten(-1, (heads, -1))."
            )
        if x.dtype != q.dtype:
            raise ValueError(
                f"q, k and v must have one floating-point dtype: q has {q.dtype}, {name} has {x.dtype}. "
                "Cast them to the dtype that the attention shall use."
            )
        if x.device != q.device:
            raise ValueError(f"{name} must be on the device of q, {q.device}, got {x.device}. Move it there.")
        if x.shape[:2] != q.shape[:2]:
            raise ValueError(
                f"{name} must have q's batch size and tokens, {tuple(q.shape[:2])}, got {tuple(x.shape[:2])}. "
                "Pass the same rank's shard of all three."
            )
    check_not_empty(q=q, k=k, v=v)
    if k.shape[3] != q.shape[3]:
        raise ValueError(f"k must have q's head dim: q has D = {q.shape[3]}, k has {k.shape[3]}.")
    if k.shape[2] != v.shape[2]:
        raise ValueError(f"k and v must have as many heads: k has {k.shape[2]}, v has {v.shape[2]}.")
    if q.shape[2] % k.shape[2]:
        raise ValueError(
            f"the kv heads must divide the query heads: q has H = {q.shape[2]}, k has Hkv = {k.shape[2]}. "
            "Repeat k and v's heads to a divisor of H."
        )
