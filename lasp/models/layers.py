"""The parts around linear attention: RMSNorm, SwiGLU, the rotary embedding, and softmax attention with a cache."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lasp.attention import softmax_attention
from lasp.cp_context import CPContext
from lasp.kernels.swiglu import tiled_swiglu
from lasp.models.config import ModelConfig

# cos and sin, each [T, 1, D / 2], per head width D
Rotary = Mapping[int, tuple[Tensor, Tensor]]


class Linear(nn.Linear):
    """A projection without bias. Made without values: the model fills all parameters from one generator."""

    def __init__(self, d_in: int, d_out: int, device=None, dtype=None):
        super().__init__(d_in, d_out, bias=False, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Nothing: see :meth:`lasp.models.linear_llama.LinearLlama.reset_parameters`."""


class Embedding(nn.Embedding):
    """A table of token vectors, made without values like :class:`Linear`."""

    def reset_parameters(self) -> None:
        """Nothing: see :meth:`lasp.models.linear_llama.LinearLlama.reset_parameters`."""


def low_rank(d_in: int, d_out: int, rank: int | None, device=None, dtype=None) -> nn.Module:
    """W, or W2 W1 through ``rank``."""
    if rank is None:
        return Linear(d_in, d_out, device, dtype)
    return nn.Sequential(Linear(d_in, rank, device, dtype), Linear(rank, d_out, device, dtype))


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension; the mean is taken in fp32 (fp64 for fp64).

    Args:
        dim: width of the last dimension.
        eps: added to the mean square.
        affine: whether there is a weight [dim].
    """

    def __init__(self, dim: int, eps: float, affine: bool = True, device=None, dtype=None):
        super().__init__()
        self.dim, self.eps = dim, eps
        weight = nn.Parameter(torch.empty(dim, device=device, dtype=dtype)) if affine else None
        self.register_parameter("weight", weight)

    def init_parameters(self, generator: torch.Generator | None = None) -> None:
        """Ones."""
        if self.weight is not None:
            nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        weight = None if self.weight is None else self.weight.to(x.dtype)
        return F.rms_norm(x, (self.dim,), weight, self.eps)


class SwiGLU(nn.Module):
    """W_down (silu(W_gate x) * W_up x); with ``tile`` over so many tokens at a time (:mod:`lasp.kernels.swiglu`)."""

    def __init__(self, dim: int, hidden_dim: int, device=None, dtype=None, *, tile: int | None = None):
        super().__init__()
        self.tile = tile
        self.gate_proj = Linear(dim, hidden_dim, device, dtype)
        self.up_proj = Linear(dim, hidden_dim, device, dtype)
        self.down_proj = Linear(hidden_dim, dim, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        if self.tile is None or x.shape[:-1].numel() <= self.tile:
            return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return tiled_swiglu(x, self.gate_proj.weight, self.up_proj.weight, self.down_proj.weight, self.tile)


def rotary_frequencies(dim: int, theta: float, device: torch.device) -> Tensor:
    """Angle per position of each pair of dimensions, fp64 [dim / 2]: ``theta ** (-2i / dim)``."""
    return theta ** -(torch.arange(0, dim, 2, device=device, dtype=torch.float64) / dim)


def rotary_angles(position_ids: Tensor, dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of position times frequency, each [T, 1, dim / 2] in ``dtype``.

    Args:
        position_ids: int64 [T], position in the document.
        dim: width of a head, even.
        theta: base of the frequencies ``theta ** (-2i / dim)``.
        dtype: of the result. Angles are fp64: at position 10^6 an fp32 angle is off by 0.06.
    """
    angles = position_ids.double()[:, None] * rotary_frequencies(dim, theta, position_ids.device)
    return angles.cos().to(dtype).unsqueeze(1), angles.sin().to(dtype).unsqueeze(1)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [B, T, H, D], half-split as in Llama: dimension i turns with dimension i + D/2. In cos's dtype."""
    a, b = x.to(cos.dtype).chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


@dataclass(frozen=True)
class SoftmaxCache:
    """Keys (rotated) and values [B, T, H, D] that later tokens may read: all, or the newest ``window - 1``."""

    k: Tensor
    v: Tensor


class SoftmaxMixer(nn.Module):
    """Softmax attention with grouped queries, rotary embedding and an optional window (arXiv 2502.07563, LASP-2H)."""

    def __init__(self, config: ModelConfig, device=None, dtype=None):
        super().__init__()
        self.heads, self.kv_heads = config.heads, config.kv_heads or config.heads
        self.head_dim, self.window, self.causal = config.softmax_head_dim, config.window, config.causal
        self.q_proj = Linear(config.dim, self.heads * self.head_dim, device, dtype)
        self.k_proj = Linear(config.dim, self.kv_heads * self.head_dim, device, dtype)
        self.v_proj = Linear(config.dim, self.kv_heads * self.head_dim, device, dtype)
        self.o_proj = Linear(self.heads * self.head_dim, config.dim, device, dtype)

    @property
    def rotary_dim(self) -> int:
        """Width of the heads that are rotated."""
        return self.head_dim

    def forward(
        self,
        x: Tensor,
        rotary: Rotary,
        cp: CPContext | None = None,
        cache: SoftmaxCache | None = None,
        keep_cache: bool = False,
    ) -> tuple[Tensor, SoftmaxCache | None]:
        """x [B, T, dim] to y [B, T, dim], and the cache after these tokens when ``keep_cache``."""
        q = self.q_proj(x).unflatten(-1, (self.heads, self.head_dim))
        k = self.k_proj(x).unflatten(-1, (self.kv_heads, self.head_dim))
        v = self.v_proj(x).unflatten(-1, (self.kv_heads, self.head_dim))
        q, k = (apply_rotary(z, *rotary[self.head_dim]) for z in (q, k))
        if cache is None:
            exchange = "all_gather" if cp is None else cp.softmax_exchange
            o = softmax_attention(q, k, v, cp=cp, causal=self.causal, window=self.window, exchange=exchange)
        else:
            k, v = torch.cat([cache.k, k], 1), torch.cat([cache.v, v], 1)
            o = self._attend_cached(q, k, v)
        return self.o_proj(o.flatten(-2)), self._cache(k, v) if keep_cache else None

    def _attend_cached(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The queries are the newest of the keys: query i of n has m - n + i keys before it, m in all."""
        key = torch.arange(k.shape[1], device=q.device)
        query = key[k.shape[1] - q.shape[1] :, None]
        mask = key <= query
        if self.window is not None:
            mask = mask & (key > query - self.window)
        q, k, v = (z.transpose(1, 2) for z in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).transpose(1, 2)

    def _cache(self, k: Tensor, v: Tensor) -> SoftmaxCache:
        start = 0 if self.window is None else max(0, k.shape[1] - self.window + 1)
        return SoftmaxCache(k[:, start:], v[:, start:])
