"""LinearMixer: every linear-attention family as one layer that reads its options from MixerConfig.

    q, k, v = conv(W_q x), conv(W_k x), conv(W_v x)           g = decay(x)
    S_t = exp(g_t) S_{t-1} + phi(rope(k_t)) v_t^T             o_t = scale * S_t^T phi(rope(q_t))
    y = W_o (norm(o) * act(W_g x))

The sum normaliser is a column of ones appended to v: numerator and denominator ride in one state, so that a layer
has exactly one state exchange.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lasp.convolution import short_convolution
from lasp.cp_context import CPContext
from lasp.linear import linear_attention
from lasp.models.config import ModelConfig
from lasp.models.features import feature_map, init_normal
from lasp.models.gates import GATES, DecayGate, fixed_log_decay
from lasp.models.layers import Linear, RMSNorm, Rotary, apply_rotary, low_rank
from lasp.models.outputs import OUT_GATES, OUT_NORMS
from lasp.models.sizes import LinearSizes

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
        heads: the heads that this instance computes, where a host shards them over ranks: the host owns projections
            and convolution and calls :meth:`mix`. None: all heads, from x to y.

    Raises:
        ValueError: some heads of a mixer whose output norm spans all of them.
    """

    def __init__(self, config: ModelConfig, layer: int = 0, device=None, dtype=None, *, heads: range | None = None):
        super().__init__()
        mixer, dim, projects = config.mixer, config.dim, heads is None
        self.options, self.heads = mixer, range(config.mixer_heads) if heads is None else heads
        sizes = LinearSizes.of(config)
        self.num_heads = sizes.heads
        norm = OUT_NORMS[mixer.out_norm]
        if norm is not None and norm.spans_heads and len(self.heads) < self.num_heads:
            raise ValueError(
                f"out_norm={mixer.out_norm!r} spans all {self.num_heads} heads, but this rank has {len(self.heads)} of "
                "them. Use out_norm='head_rms', or keep all heads on one rank."
            )
        self.key_dim, self.value_dim = sizes.key_dim, sizes.value_dim
        self.slope_factor = 1.0
        if mixer.per_layer_slopes:
            self.slope_factor = 1 - layer / max(config.num_layers - 1, 1) + 1e-5
        widths = [len(self.heads) * width for width in (self.key_dim, self.key_dim, self.value_dim)]
        if projects:
            self.q_proj, self.k_proj, self.v_proj = (Linear(dim, width, device, dtype) for width in widths)
            self.o_proj = Linear(widths[2], dim, device, dtype)
        if projects and mixer.conv_width:
            self.conv_weight = nn.Parameter(torch.empty(sum(widths), mixer.conv_width, device=device, dtype=dtype))
        self.feature_q, self.feature_k = (
            feature_map(mixer.feature, self.key_dim, mixer.feature_dim, device, dtype) for _ in "qk"
        )
        if mixer.gate is not None:
            self.decay = self._decay_gate(sizes.decays, dim if projects else None, device, dtype)
        if norm is not None:
            width = widths[2] if norm.spans_heads else self.value_dim
            self.out_norm = RMSNorm(width, config.norm_eps, norm.affine, device, dtype)
        if projects and mixer.out_gate != "none":
            self.out_gate = low_rank(dim, widths[2], mixer.out_gate_rank, device, dtype)

    def _decay_gate(self, decays: int, dim: int | None, device, dtype) -> DecayGate:
        """The gate of these heads, with ``decays`` each; with ``dim`` it has a projection of tokens so wide."""
        mixer, gate = self.options, GATES[self.options.gate]
        channels = decays if mixer.decay == "channel" else None
        proj = None
        if dim is not None:
            proj = low_rank(dim, len(self.heads) * decays, mixer.gate_rank, device, dtype)
        set_here = {name: getattr(mixer, name) for name in gate.options}
        options = {name: gate.options[name] if value is None else value for name, value in set_here.items()}
        return gate.module(len(self.heads), channels, proj, **options, device=device, dtype=dtype)

    def init_parameters(self, generator: torch.Generator | None = None) -> None:
        """The convolution: normal, variance 1 / width."""
        if hasattr(self, "conv_weight"):
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
        decay = self.decay.proj(x) if self.options.gate is not None else None
        gate = self.out_gate(x) if self.options.out_gate != "none" else None
        initial = None if cache is None else cache.state
        o, state = self.mix(q, k, v, decay, gate, rotary, cp, initial_state=initial, output_final_state=keep_cache)
        return self.o_proj(o), LinearCache(state, tail) if keep_cache else None

    def mix(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        decay: Tensor | None,
        gate: Tensor | None,
        rotary: Rotary,
        cp: CPContext | None = None,
        *,
        initial_state: Tensor | None = None,
        output_final_state: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """What lies between the projections: q, k [B, T, h * K] and v [B, T, h * V] to o [B, T, h * V] and the state.

        ``decay`` [B, T, h * width] and ``gate`` [B, T, h * V] are projected, not yet activated; None where the options
        have none. k and v may have fewer heads than q.
        """
        q, k = (z.unflatten(-1, (-1, self.key_dim)) for z in (q, k))
        v = v.unflatten(-1, (-1, self.value_dim))
        if self.rotary_dim is not None:
            q, k = (apply_rotary(z, *rotary[self.rotary_dim]) for z in (q, k))
        q, k = self.feature_q(q).to(v.dtype), self.feature_k(k).to(v.dtype)
        if self.options.normaliser == "sum":
            v = torch.cat([v, torch.ones_like(v[..., :1])], -1)
        o, state = linear_attention(
            q,
            k,
            v,
            self._log_decay(q, decay),
            cp=cp,
            causal=self.options.causal,
            scale=1.0 if self.options.normaliser == "sum" else self.options.scale,
            initial_state=initial_state,
            output_final_state=output_final_state,
        )
        return self._finish(o, gate), state

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

    def _log_decay(self, q: Tensor, decay: Tensor | None) -> Tensor | None:
        """g <= 0: None, [h], [B, T, h] or [B, T, h, K]; fp32, fp64 when q is."""
        if self.options.decay == "none":
            return None
        if self.options.decay == "fixed":
            dtype = torch.promote_types(q.dtype, torch.float32)
            slopes = fixed_log_decay(self.options.slopes, self.num_heads, q.device, dtype) * self.slope_factor
            return slopes[self.heads.start : self.heads.stop]
        return self.decay(decay)

    def _finish(self, o: Tensor, gate: Tensor | None) -> Tensor:
        """Divide, normalise and gate: o [B, T, h, V (+ 1)] to [B, T, h * V]."""
        if self.options.normaliser == "sum":
            numerator, denominator = o.to(torch.promote_types(o.dtype, torch.float32)).split([self.value_dim, 1], -1)
            o = (numerator / (denominator + NORMALISER_EPS)).to(o.dtype)
        norm, activated = OUT_NORMS[self.options.out_norm], OUT_GATES[self.options.out_gate]
        if norm is not None and not norm.spans_heads:
            o = self.out_norm(o)
        o = o.flatten(-2)
        if norm is not None and norm.spans_heads:
            o = self.out_norm(o)
        return o if activated is None else o * activated.activation(gate)
