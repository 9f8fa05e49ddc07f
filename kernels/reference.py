"""The token-by-token recurrence: the oracle of every test. Slow, differentiable, any float dtype, any device.

Per head, with ``S`` [K, V], one document at a time:

    identity, scalar, diagonal:  S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T
    delta rule (beta):           S_t = (I - beta_t k_t k_t^T) diag(exp(g_t)) S_{t-1} + beta_t k_t v_t^T
    dense (a, b):                S_t = (diag(exp(g_t)) + b_t a_t^T) S_{t-1} + k_t v_t^T
    output:                      o_t = scale * S_t^T q_t

The delta rule decays first, then erases (Gated DeltaNet, arXiv 2412.06464, equation 10; Kimi Linear, arXiv
2510.26692, section 3). The dense form covers DPLR families such as RWKV-7. Optimised code never imports this file.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    beta: Tensor | None = None,
    *,
    dense: tuple[Tensor, Tensor] | None = None,
    cu_seqlens: Sequence[int] | None = None,
    causal: bool = True,
    scale: float | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute linear attention one token at a time.

    Args:
        q, k: [B, T, Hq, K] and [B, T, Hk, K]; each head count divides the largest one, H.
        v: [B, T, Hv, V].
        g: log-decay, <= 0: None, [Hg], [B, T, Hg] or [B, T, Hg, K].
        beta: delta-rule step [B, T, Hb], or None.
        dense: ``(a, b)``, each [B, T, H, K]: the transition gains ``b a^T``. Excludes ``beta``.
        cu_seqlens: document borders, e.g. ``(0, 40, 232)``; None for one document per row. More than one
            document requires B = 1.
        causal: False lets every token read the sum over its whole document (then no g, beta, dense or states).
        scale: default ``K ** -0.5``.
        initial_state: [B, H, K, V], or [N, H, K, V] for N packed documents. Default zero.

    Returns:
        ``o`` [B, T, H, V] and the final states, shaped like ``initial_state``.
    """
    heads = max(x.shape[2] for x in (q, k, v, *(() if beta is None else (beta,))))
    if g is not None:
        heads = max(heads, g.shape[0] if g.dim() == 1 else g.shape[2])
    q, k, v = (_expand(x, heads, 2) for x in (q, k, v))
    batch, length, _, key_dim = q.shape
    scale = key_dim**-0.5 if scale is None else scale
    if g is None:
        g = q.new_zeros(batch, length, heads, 1)
    elif g.dim() == 1:
        g = _expand(g, heads, 0).expand(batch, length, heads).unsqueeze(-1)
    else:
        g = _expand(g if g.dim() == 4 else g.unsqueeze(-1), heads, 2)
    beta = None if beta is None else _expand(beta, heads, 2)
    borders = (0, length) if cu_seqlens is None else tuple(int(x) for x in cu_seqlens)
    packed = len(borders) > 2

    outputs, finals = [], []
    for n, (start, stop) in enumerate(zip(borders[:-1], borders[1:], strict=True)):
        state = q.new_zeros(batch, heads, key_dim, v.shape[-1])
        if initial_state is not None:
            state = initial_state[n : n + 1] if packed else initial_state
        if not causal:
            state = torch.einsum("bthk,bthv->bhkv", k[:, start:stop], v[:, start:stop])
            outputs.append(scale * torch.einsum("bthk,bhkv->bthv", q[:, start:stop], state))
            continue
        for t in range(start, stop):
            previous, state = state, g[:, t].exp().unsqueeze(-1) * state
            update = k[:, t].unsqueeze(-1) * v[:, t].unsqueeze(-2)
            if beta is not None:
                step = beta[:, t, :, None, None] * k[:, t].unsqueeze(-1)
                state = state - step * torch.einsum("bhk,bhkv->bhv", k[:, t], state).unsqueeze(-2)
                update = beta[:, t, :, None, None] * update
            if dense is not None:
                a, b = dense[0][:, t], dense[1][:, t]
                state = state + b.unsqueeze(-1) * torch.einsum("bhk,bhkv->bhv", a, previous).unsqueeze(-2)
            state = state + update
            outputs.append(scale * torch.einsum("bhk,bhkv->bhv", q[:, t], state).unsqueeze(1))
        finals.append(state)
    o = torch.cat(outputs, 1) if outputs else q.new_zeros(batch, 0, heads, v.shape[-1])
    final_state = torch.cat(finals) if finals else q.new_zeros(0, heads, key_dim, v.shape[-1])
    return o, final_state


def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens: Sequence[int] | None = None,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
) -> Tensor:
    """Softmax attention with one explicit mask: q [B, T, H, D], k and v [B, T, Hkv, D], Hkv divides H.

    Token i reads token j of its own document when ``j <= i`` (causal) and ``i - window < j`` (window).
    """
    heads, length = q.shape[2], q.shape[1]
    k, v = _expand(k, heads, 2), _expand(v, heads, 2)
    borders = (0, length) if cu_seqlens is None else tuple(int(x) for x in cu_seqlens)
    i = torch.arange(length, device=q.device)
    document = torch.bucketize(i, torch.tensor(borders[1:], device=q.device), right=True)
    mask = document[:, None] == document[None, :]
    if causal:
        mask = mask & (i[None, :] <= i[:, None])
    if window is not None:
        mask = mask & (i[None, :] > i[:, None] - window)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
    return torch.einsum("bhij,bjhd->bihd", weights, v)


def short_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    cu_seqlens: Sequence[int] | None = None,
) -> Tensor:
    """Causal depthwise convolution, ``y_t = bias + sum_w weight[:, -1 - w] x_{t-w}``, zero before each document.

    x [B, T, D], weight [D, W], bias [D]; ``activation`` None or "silu".
    """
    length, width = x.shape[1], weight.shape[1]
    borders = (0, length) if cu_seqlens is None else tuple(int(b) for b in cu_seqlens)
    y = torch.zeros_like(x)
    parts = []
    for start, stop in zip(borders[:-1], borders[1:], strict=True):
        part = torch.zeros_like(y[:, start:stop])
        for w in range(min(width, stop - start)):
            shifted = torch.nn.functional.pad(x[:, start : stop - w], (0, 0, w, 0))
            part = part + shifted * weight[:, -1 - w]
        parts.append(part)
    y = torch.cat(parts, 1) if parts else y
    y = y if bias is None else y + bias
    return torch.nn.functional.silu(y) if activation == "silu" else y


def _expand(x: Tensor, heads: int, dim: int) -> Tensor:
    """Head ``h`` of the result is head ``h // (heads // n)`` of ``x``'s ``n`` heads along ``dim``."""
    return x.repeat_interleave(heads // x.shape[dim], dim)
