"""LinearMixer: every linear-attention family as one layer that reads its options from MixerConfig.

    q, k, v = conv(W_q x), conv(W_k x), conv(W_v x)           g = decay(x)
    S_t = exp(g_t) S_{t-1} + phi(rope(k_t)) v_t^T             o_t = scale * S_t^T phi(rope(q_t))
    y = W_o (norm(o) * act(W_g x))

The sum normaliser is a column of ones appended to v: numerator and denominator ride in one state, so that a layer
has exactly one state exchange.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lasp.config import ModelConfig
from lasp.context import CPContext
from lasp.features import feature_map, feature_width, init_normal
from lasp.halo import short_convolution
from lasp.layers import Linear, RMSNorm, Rotary, apply_rotary, low_rank
from lasp.linear import linear_attention

NORMALISER_EPS = 1e-6


@dataclass(frozen=True)
class LinearCache:
    """What later tokens need: the state [B, H, K, V], and the convolution's newest inputs [B, width - 1, D]."""

    state: Tensor
    conv: Tensor | None


class LinearMixer(nn.Module):
    """One linear-attention layer.

    Args:
        config: the model; its ``mixer`` has this layer's options.
        layer: index in the model, which per-layer slopes depend on.
    """

    def __init__(self, config: ModelConfig, layer: int = 0, device=None, dtype=None):
        super().__init__()
        mixer, dim, heads = config.mixer, config.dim, config.mixer_heads
        self.options, self.heads = mixer, heads
        self.key_dim, self.value_dim = config.key_dim, config.value_dim
        self.state_dim = feature_width(mixer.feature, self.key_dim, mixer.feature_dim)
        self.slope_factor = 1.0
        if mixer.per_layer_slopes:
            self.slope_factor = 1 - layer / max(config.num_layers - 1, 1) + 1e-5
        widths = [heads * self.key_dim, heads * self.key_dim, heads * self.value_dim]
        self.q_proj, self.k_proj, self.v_proj = (Linear(dim, width, device, dtype) for width in widths)
        self.o_proj = Linear(widths[2], dim, device, dtype)
        if mixer.conv_width:
            self.conv_weight = nn.Parameter(torch.empty(sum(widths), mixer.conv_width, device=device, dtype=dtype))
        self.feature_q, self.feature_k = (
            feature_map(mixer.feature, self.key_dim, mixer.feature_dim, device, dtype) for _ in "qk"
        )
        if mixer.gate is not None:
            self.decay = DecayGate(config, self.state_dim, device, dtype)
        if mixer.out_norm != "none":
            width = self.value_dim if mixer.out_norm == "head_rms" else widths[2]
            self.out_norm = RMSNorm(width, config.norm_eps, mixer.out_norm != "srms", device, dtype)
        if mixer.out_gate != "none":
            self.out_gate = low_rank(dim, widths[2], mixer.out_gate_rank, device, dtype)

    def init_parameters(self, generator: torch.Generator | None = None) -> None:
        """The convolution: normal, variance 1 / width."""
        if self.options.conv_width:
            init_normal(self.conv_weight, self.options.conv_width**-0.5, generator)

    @property
    def rotary_dim(self) -> int | None:
        """Width of the heads that are rotated, None without rotation."""
        return self.key_dim if self.options.position == "rope" else None

    def forward(
        self,
        x: Tensor,
        rotary: Rotary,
        cp: CPContext | None = None,
        cache: LinearCache | None = None,
        keep_cache: bool = False,
    ) -> tuple[Tensor, LinearCache | None]:
        """x [B, T, dim] to y [B, T, dim], and the cache after these tokens when ``keep_cache``."""
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        tail = None
        if self.options.conv_width:
            q, k, v, tail = self._convolve(q, k, v, cp, cache, keep_cache)
        q, k = (z.unflatten(-1, (self.heads, self.key_dim)) for z in (q, k))
        v = v.unflatten(-1, (self.heads, self.value_dim))
        if self.rotary_dim is not None:
            q, k = (apply_rotary(z, *rotary[self.rotary_dim]) for z in (q, k))
        q, k = self.feature_q(q).to(v.dtype), self.feature_k(k).to(v.dtype)
        if self.options.normaliser == "sum":
            v = torch.cat([v, torch.ones_like(v[..., :1])], -1)
        o, state = linear_attention(
            q,
            k,
            v,
            self._log_decay(x),
            cp=cp,
            causal=self.options.causal,
            scale=1.0 if self.options.normaliser == "sum" else self.options.scale,
            initial_state=None if cache is None else cache.state,
            output_final_state=keep_cache,
        )
        return self.o_proj(self._finish(o, x)), LinearCache(state, tail) if keep_cache else None

    def _convolve(self, q, k, v, cp, cache, keep_cache) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """q, k and v side by side through one convolution: one halo. With a cache its inputs come first."""
        mixed = torch.cat([q, k, v], -1)
        past = self.options.conv_width - 1
        if cache is None:
            y = short_convolution(mixed, self.conv_weight, activation=self.options.conv_activation, cp=cp)
        else:
            mixed = torch.cat([cache.conv, mixed], 1)
            y = short_convolution(mixed, self.conv_weight, activation=self.options.conv_activation)[:, past:]
        tail = F.pad(mixed, (0, 0, past, 0))[:, -past:] if keep_cache else None  # zeros before the document
        return *y.split([q.shape[-1], k.shape[-1], v.shape[-1]], -1), tail

    def _log_decay(self, x: Tensor) -> Tensor | None:
        """g <= 0: None, [H], [B, T, H] or [B, T, H, K]; fp32, fp64 when x is."""
        if self.options.decay == "none":
            return None
        if self.options.decay == "fixed":
            dtype = torch.promote_types(x.dtype, torch.float32)
            slopes = fixed_log_decay(self.options.slopes, self.heads, x.device, dtype)
            return slopes * self.slope_factor
        return self.decay(x)

    def _finish(self, o: Tensor, x: Tensor) -> Tensor:
        """Divide, normalise and gate: o [B, T, H, V (+ 1)] to [B, T, H * V]."""
        if self.options.normaliser == "sum":
            numerator, denominator = o.to(torch.promote_types(o.dtype, torch.float32)).split([self.value_dim, 1], -1)
            o = (numerator / (denominator + NORMALISER_EPS)).to(o.dtype)
        if self.options.out_norm == "head_rms":
            o = self.out_norm(o)
        o = o.flatten(-2)
        if self.options.out_norm in ("full_rms", "srms"):
            o = self.out_norm(o)
        if self.options.out_gate == "none":
            return o
        gate = self.out_gate(x)
        return o * (F.silu(gate) if self.options.out_gate == "silu" else gate.sigmoid())


class DecayGate(nn.Module):
    """Log-decay from the token: [B, T, H] for decay="scalar", [B, T, H, K] for "channel". Always <= 0.

    The projection runs in the model's dtype, everything after it in fp32 (fp64 for fp64).
    """

    def __init__(self, config: ModelConfig, state_dim: int, device=None, dtype=None):
        super().__init__()
        self.options, self.heads = config.mixer, config.mixer_heads
        self.width = state_dim if self.options.decay == "channel" else 1
        out = self.heads * self.width
        self.proj = low_rank(config.dim, out, self.options.gate_rank, device, dtype)
        self.bias = nn.Parameter(torch.empty(out, device=device, dtype=dtype))
        if self.options.gate == "mamba":
            self.A_log = nn.Parameter(torch.empty(self.heads, device=device, dtype=dtype))

    def init_parameters(self, generator: torch.Generator | None = None) -> None:
        """logsigmoid: c = 0. mamba: A uniform in [1, 16], softplus(c) log-uniform in [1e-3, 0.1] (arXiv 2405.21060)."""
        if self.bias.is_meta:
            return
        with torch.no_grad():
            if self.options.gate == "logsigmoid":
                self.bias.zero_()
                return
            device = "cpu" if generator is None else generator.device
            step = torch.rand(self.bias.shape, generator=generator, device=device, dtype=torch.float32)
            step = torch.exp(step * math.log(100) + math.log(1e-3))
            self.bias.copy_(step + torch.log(-torch.expm1(-step)))  # the inverse of softplus
            rate = torch.rand(self.A_log.shape, generator=generator, device=device, dtype=torch.float32)
            self.A_log.copy_(torch.log(1 + 15 * rate))

    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        z = (self.proj(x).to(dtype) + self.bias.to(dtype)).unflatten(-1, (self.heads, self.width))
        if self.options.gate == "logsigmoid":
            g = F.logsigmoid(z) / (self.options.gate_tau or 16.0)
        else:
            g = -self.A_log.to(dtype).exp()[:, None] * F.softplus(z)
        return g if self.options.decay == "channel" else g.squeeze(-1)


def fixed_log_decay(slopes: str, heads: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """g [H] of every head: ``alibi`` -2^(-8(h+1)/H), ``retnet`` log(1 - 2^(-5-h))."""
    h = torch.arange(heads, device=device, dtype=dtype)
    return -torch.exp2(-8 * (h + 1) / heads) if slopes == "alibi" else torch.log1p(-torch.exp2(-5 - h))
