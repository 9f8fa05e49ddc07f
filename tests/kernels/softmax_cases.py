"""Softmax attention over pieces of keys: inputs, the oracle, and stand-ins for PyTorch's packed GPU op."""

import math

import torch

from lasp.kernels import reference
from lasp.kernels.softmax import softmax_backward, softmax_forward

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


def make(seed, batch, tq, tk, heads, kv_heads, dim, value_dim, dtype, device="cpu"):
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, tq, heads, dim, generator=g, dtype=torch.float64)
    k = torch.randn(batch, tk, kv_heads, dim, generator=g, dtype=torch.float64)
    v = torch.randn(batch, tk, kv_heads, value_dim, generator=g, dtype=torch.float64)
    do = torch.randn(batch, tq, heads, value_dim, generator=g, dtype=torch.float64)
    return [x.to(device, dtype) for x in (q, k, v, do)]


def expected(q, k, v, do, pieces, causal=True, window=None, scale=None):
    """Outputs, lse and gradients in float64: the oracle's query rows, prefixed by zero queries to align the end."""
    q, k, v, do = (x.detach().double().cpu() for x in (q, k, v, do))
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    outputs, lses = [], []
    ratio = q.shape[2] // k.shape[2]
    for a, b, lo, hi in pieces:
        keys, values = k[:, lo:hi], v[:, lo:hi]
        n, m = b - a, hi - lo
        if causal:
            padded = torch.cat([q.new_zeros(q.shape[0], m - n, *q.shape[2:]), q[:, a:b]], 1)
            o = reference.softmax_attention(padded, keys, values, causal=True, window=window, scale=scale)[:, m - n :]
        else:
            scores = torch.einsum("bihd,bjhd->bhij", q[:, a:b], keys.repeat_interleave(ratio, 2))
            weights = (scores * (q.shape[-1] ** -0.5 if scale is None else scale)).softmax(-1)
            o = torch.einsum("bhij,bjhd->bihd", weights, values.repeat_interleave(ratio, 2))
        outputs.append(o)
        scores = torch.einsum("bihd,bjhd->bhij", q[:, a:b], keys.repeat_interleave(ratio, 2))
        scores = scores * (q.shape[-1] ** -0.5 if scale is None else scale)
        age = torch.arange(m - n, m)[:, None] - torch.arange(m)
        hidden = torch.zeros(n, m, dtype=torch.bool)
        hidden = hidden | (age < 0) if causal else hidden
        hidden = hidden | (age >= window) if window else hidden
        lses.append(scores.masked_fill(hidden, -math.inf).logsumexp(-1))
    o = torch.cat(outputs, 1)
    gradients = torch.autograd.grad(o, (q, k, v), do)
    return o.detach(), torch.cat(lses, 2).detach(), *gradients


def actual(q, k, v, do, pieces, **options):
    o, lse = softmax_forward(q, k, v, pieces, **options)
    return o, lse, *softmax_backward(do, q, k, v, o, lse, pieces, **options)


NAMES = ("o", "lse", "dq", "dk", "dv")


def packed_forward(q, k, v, borders_q, borders_k, max_q, max_k, dropout, causal, debug, *, scale, **window):
    """What PyTorch documents of its packed GPU op: q [total, H, D], lse [H, total]; masks aligned at the end."""
    assert (dropout, debug, borders_q.dtype, borders_k.dtype) == (0.0, False, torch.int32, torch.int32)
    pieces = packed_pieces(borders_q, borders_k, max_q, max_k)
    o, lse = softmax_forward(q[None], k[None], v[None], pieces, **packed_options(causal, scale, window))
    return o[0], lse[0], None, None, None


def packed_backward(do, q, k, v, o, lse, borders_q, borders_k, max_q, max_k, dropout, causal, *rest, scale, **window):
    assert lse.is_contiguous() and lse.shape == (q.shape[1], q.shape[0])
    pieces = packed_pieces(borders_q, borders_k, max_q, max_k)
    args = [x[None] for x in (do, q, k, v, o, lse)]
    gradients = softmax_backward(*args, pieces, **packed_options(causal, scale, window))
    return [x[0].to(q.dtype) for x in gradients]


def packed_pieces(borders_q, borders_k, max_q, max_k):
    q, k = borders_q.tolist(), borders_k.tolist()
    assert (max_q, max_k) == tuple(max(b - a for a, b in zip(x, x[1:], strict=False)) for x in (q, k))
    return list(zip(q, q[1:], k, k[1:], strict=False))


def packed_options(causal, scale, window):
    options = {"causal": causal, "scale": scale, "impl": "blocks"}
    return options | ({"window": window["window_size_left"] + 1} if window else {})
