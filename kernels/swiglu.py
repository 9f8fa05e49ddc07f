"""SwiGLU over tiles of tokens: memory that does not grow with tokens times the hidden width.

    y = (silu(x W_gate^T) * (x W_up^T)) W_down^T

No token's result depends on another token, so the layer may run over one tile of tokens at a time: only one tile's
hidden activations [tile, hidden] exist at once. The backward visits the tiles again, makes each tile's hidden
activations a second time, and sums the gradients of the weights in fp32 (fp64 for fp64). The forward keeps x and the
weights, instead of four tensors [tokens, hidden]. In return two of its three products are done twice: eleven in all
instead of nine. This is the tiled MLP of ALST (arXiv 2506.13996), as one autograd function.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear, silu

from lasp.kernels.state import state_dtype


def tiled_swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, tile: int) -> Tensor:
    """``(silu(x gate^T) * (x up^T)) down^T``.

    Args:
        x: [..., dim].
        gate, up: [hidden, dim]; down: [dim, hidden].
        tile: tokens (rows of x) whose hidden activations exist at a time, at least 1.

    Returns:
        [..., dim] in x's dtype, under autocast in autocast's; its gradients have the dtypes of the inputs.
    """
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:  # which autocast leaves alone
        x, gate, up, down = (z.to(torch.get_autocast_dtype(kind)) for z in (x, gate, up, down))
    return _TiledSwiGLU.apply(x, gate, up, down, tile)


class _TiledSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, gate, up, down, tile):
        ctx.save_for_backward(x, gate, up, down)
        ctx.tile = tile
        rows = x.reshape(-1, x.shape[-1])
        y = rows.new_empty(rows.shape[0], down.shape[0])
        with torch.autocast(x.device.type, enabled=False):
            for part, out in zip(rows.split(tile), y.split(tile), strict=True):
                hidden = silu(linear(part, gate), inplace=True).mul_(linear(part, up))
                torch.mm(hidden, down.T, out=out)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, gate, up, down = ctx.saved_tensors
        rows, d_rows = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
        dx = torch.empty_like(rows) if ctx.needs_input_grad[0] else None
        sums = [
            torch.zeros(w.shape, dtype=state_dtype(w.dtype), device=w.device) if needed else None
            for w, needed in zip((gate, up, down), ctx.needs_input_grad[1:4], strict=True)
        ]
        with torch.autocast(x.device.type, enabled=False):
            for start in range(0, rows.shape[0], ctx.tile):
                part, d_part = (z[start : start + ctx.tile] for z in (rows, d_rows))
                z, u = linear(part, gate), linear(part, up)
                activated, d_hidden = silu(z), d_part @ down
                _add_product(sums[2], d_part, activated * u)
                d_u = activated.mul_(d_hidden)
                d_z = torch.ops.aten.silu_backward(d_hidden.mul_(u), z)
                _add_product(sums[0], d_z, part)
                _add_product(sums[1], d_u, part)
                if dx is not None:
                    torch.addmm(d_z @ gate, d_u, up, out=dx[start : start + ctx.tile])
        weights = (None if s is None else s.to(w.dtype) for s, w in zip(sums, (gate, up, down), strict=True))
        return None if dx is None else dx.view(x.shape), *weights, None


def _add_product(total: Tensor | None, a: Tensor, b: Tensor) -> None:
    """``total += a^T b`` with sums in the dtype of ``total``; nothing if that is None."""
    if total is None:
        return
    if a.is_cuda and a.dtype == torch.bfloat16:  # with out_dtype nothing rounds the product to bf16
        total += torch.mm(a.T, b, out_dtype=total.dtype)
    else:
        total.addmm_(a.T.to(total.dtype), b.to(total.dtype))
