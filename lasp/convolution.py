"""The short convolution: causal and depthwise, over documents that may continue on other ranks.

``y_t = act(bias + sum_w weight[:, -1 - w] x_{t - w})``, the operator before q, k and v in Mamba-2, Gated DeltaNet and
their relatives. The W - 1 tokens before each fragment come as halos (:mod:`lasp.halo`).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lasp import comm
from lasp.checks import check_not_empty, check_tensors
from lasp.cp_context import CPContext
from lasp.halo import HaloExchange, HaloPlan, HaloReturn, halo_plan
from lasp.kernels.state import state_dtype

ACTIVATIONS = (None, "silu")


def short_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    cp: CPContext | None = None,
) -> Tensor:
    """Causal depthwise convolution over documents that may continue on other ranks.

    Sums run in fp32 (fp64 for fp64 ``x``). With ``cp``, one all-to-all runs per direction, of W - 1 tokens per
    fragment whatever the length; none when cp_size is 1 or the layout cuts no document.

    Args:
        x: [B, T_local, D], this rank's tokens in local order.
        weight: [D, W]; ``weight[:, -1]`` multiplies the current token. The same on all ranks.
        bias: [D] or None. The same on all ranks.
        activation: None or ``"silu"``.
        cp: the batch's context; None is one device with one document per row.

    Returns:
        [B, T_local, D] in x's dtype. Gradients have their inputs' dtypes; those of ``weight`` and ``bias`` are this
        rank's share: their sum over the cp ranks is the gradient.

    Raises:
        ValueError: shapes, dtypes or devices do not fit each other or the context; unknown activation.
    """
    _check_convolution(x, weight, bias, activation)
    cp = CPContext.of(cp, x.shape[1])
    cp.check_tokens("x", x)
    return _ShortConvolution.apply(x, weight, bias, activation, cp)


class _ShortConvolution(torch.autograd.Function):
    """Every segment stands behind ``pad`` = W - 1 rows of its own, which hold its halo, or zeros before a document.

    ``padded`` [B, pad + P, D] therefore has each tap as one shifted view, for all segments at once.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, activation, cp):
        plan = halo_plan(cp, weight.shape[1] - 1)
        ctx.place = comm.place("convolution")
        exchange = HaloExchange((x,), plan, cp.group, f"{ctx.place}, forward")
        ctx.cp, ctx.plan, ctx.activation, ctx.has_bias = cp, plan, activation, bias is not None
        padded = _padded(x, exchange, plan, cp)
        ctx.save_for_backward(x, weight, bias, exchange.wait())
        y = _taps(padded, weight, bias, state_dtype(x.dtype))[:, _token_rows(cp, plan.width, x.device)]
        return (y if activation is None else torch.nn.functional.silu(y)).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight, bias, halo = ctx.saved_tensors
        cp, plan, pad = ctx.cp, ctx.plan, ctx.plan.width
        dtype, rows = state_dtype(x.dtype), _token_rows(cp, pad, x.device)
        padded = _padded(x, halo, plan, cp)
        dz = dy.new_zeros(padded.shape, dtype=dtype)  # gradient of the sums, zero at rows that are no token
        dy = dy.to(dtype)
        if ctx.activation is not None:
            dy = torch.ops.aten.silu_backward(dy, _taps(padded, weight, bias, dtype)[:, rows])
        dz[:, pad:][:, rows] = dy
        taps = weight.to(dtype).unbind(1)
        dpadded = dz * taps[-1]
        for w in range(1, pad + 1):
            dpadded[:, :-w].addcmul_(dz[:, w:], taps[-1 - w])
        slots = _halo_slots(plan, cp)
        dhalo = torch.cat([dpadded[:, :0], *(dpadded[:, a:b] for a, b in slots)], 1)
        back = HaloReturn(dhalo, plan, cp.group, f"{ctx.place}, backward")
        dweight = torch.zeros_like(weight, dtype=dtype)
        for w in range(pad + 1):  # in flight: the return of the halo's gradient
            dweight[:, -1 - w] = (dz[:, pad:] * padded[:, pad - w : padded.shape[1] - w]).sum((0, 1))
        dbias = dz.sum((0, 1)).to(bias.dtype) if ctx.has_bias else None
        dx = dpadded[:, pad:][:, rows]
        back.add_to((dx,))
        return dx.to(x.dtype), dweight.to(weight.dtype), dbias, None, None


def _padded(x: Tensor, halo: HaloExchange | Tensor, plan: HaloPlan, cp: CPContext) -> Tensor:
    """x with ``plan.width`` rows before each segment: [B, T_local + segments * width, D]."""
    padded = x.new_zeros(x.shape[0], x.shape[1] + len(cp.segments) * plan.width, x.shape[2])
    padded[:, plan.width :][:, _token_rows(cp, plan.width, x.device)] = x
    halo = halo.wait() if isinstance(halo, HaloExchange) else halo  # the copy above ran while it was in flight
    lengths = [b - a for a, b in _halo_slots(plan, cp)]
    for (a, b), part in zip(_halo_slots(plan, cp), halo.split(lengths, 1), strict=True):
        padded[:, a:b] = part
    return padded


def _taps(padded: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The sums at every row of ``padded`` after the first W - 1, in ``dtype``: [B, P, D]."""
    pad, taps = weight.shape[1] - 1, weight.to(dtype).unbind(1)
    z = padded[:, pad:].to(dtype) * taps[-1]
    for w in range(1, pad + 1):
        z.addcmul_(padded[:, pad - w : padded.shape[1] - w], taps[-1 - w])
    return z if bias is None else z.add_(bias)


def _token_rows(cp: CPContext, pad: int, device: torch.device) -> slice | Tensor:
    """Rows of the local tokens in a padded buffer, counted after the first ``pad``: a slice, or int64 [T_local]."""
    if pad == 0 or len(cp.segments) == 1:
        return slice(0, cp.num_tokens)

    def make() -> Tensor:
        lengths = torch.tensor([len(s) for s in cp.segments], pin_memory=device.type == "cuda")
        lengths = lengths.to(device, non_blocking=True)
        skipped = torch.arange(len(cp.segments), device=device) * pad
        skipped = skipped.repeat_interleave(lengths, output_size=cp.num_tokens)
        return skipped + torch.arange(cp.num_tokens, device=device)

    return cp.plan(("token_rows", pad, device), make)


def _halo_slots(plan: HaloPlan, cp: CPContext) -> list[tuple[int, int]]:
    """Row range of each halo in a padded buffer."""
    starts = [(s.start + i * plan.width, n) for i, (s, n) in enumerate(zip(cp.segments, plan.lengths, strict=True))]
    return [(start + plan.width - n, start + plan.width) for start, n in starts if n]


def _check_convolution(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {ACTIVATIONS}, got {activation!r}.")
    check_tensors(optional=("bias",), x=x, weight=weight, bias=bias)
    if x.dim() != 3:
        raise ValueError(
            f"x must have shape [B, T_local, D], got {tuple(x.shape)}. Flatten heads into D before the convolution."
        )
    check_not_empty(x=x)
    if weight.dim() != 2 or weight.shape[0] != x.shape[2] or weight.shape[1] < 1:
        raise ValueError(
            f"weight must have shape [D, W] with D = {x.shape[2]} channels as in x {tuple(x.shape)} and W >= 1 taps, "
            f"got {tuple(weight.shape)}. A Conv1d weight [D, 1, W] needs squeeze(1)."
        )
    if bias is not None and bias.shape != (x.shape[2],):
        raise ValueError(
            f"bias must have shape [D] with D = {x.shape[2]} as in x {tuple(x.shape)}, got {tuple(bias.shape)}."
        )
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(
                f"{name} must be on the device of x, {x.device}, got {tensor.device}. Move it with .to(x.device)."
            )
