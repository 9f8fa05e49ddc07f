"""LinearLlama: a Llama whose layers are linear attention, softmax attention, or a pattern of both.

One model for one device and for a context-parallel group: the only difference is the CPContext that the attention
operators receive. Positions come from it too, so a token's rotation does not depend on who owns the token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lasp import comm
from lasp.cp_context import CPContext
from lasp.models.config import ModelConfig
from lasp.models.features import init_normal
from lasp.models.layers import Embedding, Linear, RMSNorm, Rotary, SoftmaxCache, SoftmaxMixer, SwiGLU, rotary_angles
from lasp.models.linear_mixer import LinearCache, LinearMixer
from lasp.models.recompute import recompute

EMBEDDING_STD = 0.02


@dataclass(frozen=True)
class ModelCache:
    """State of recurrent decoding.

    Attributes:
        layers: one cache per block.
        position: tokens read so far; the position of the next one.
    """

    layers: tuple[LinearCache | SoftmaxCache, ...]
    position: int


class Block(nn.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ModelConfig, layer: int, device=None, dtype=None):
        super().__init__()
        self.mixer_norm = RMSNorm(config.dim, config.norm_eps, device=device, dtype=dtype)
        if config.layer_kinds[layer] == "L":
            self.mixer = LinearMixer(config, layer, device, dtype)
        else:
            self.mixer = SoftmaxMixer(config, device, dtype)
        self.mlp_norm = RMSNorm(config.dim, config.norm_eps, device=device, dtype=dtype)
        self.mlp = SwiGLU(config.dim, config.hidden_dim, device, dtype, tile=config.ffn_tile)

    def forward(self, x: Tensor, rotary: Rotary, cp=None, cache=None, keep_cache: bool = False):
        """x [B, T, dim] to (x [B, T, dim], cache | None)."""
        y, cache = self.mixer(self.mixer_norm(x), rotary, cp, cache, keep_cache)
        x = x + y
        return x + self.mlp(self.mlp_norm(x)), cache


class LinearLlama(nn.Module):
    """The language model without its loss: tokens to hidden states; :meth:`logits` and ``output_weight`` do the rest.

    Args:
        config: see :class:`~lasp.models.config.ModelConfig`.
        generator: source of the initial values; the same seed gives the same model on every rank and for every
            cp_size. None: torch's default generator.
        device, dtype: of the parameters. On ``meta`` nothing is filled: call :meth:`reset_parameters` later.
    """

    def __init__(self, config: ModelConfig, *, generator: torch.Generator | None = None, device=None, dtype=None):
        super().__init__()
        self.config = config
        self.embed = Embedding(config.vocab_size, config.dim, device=device, dtype=dtype)
        self.layers = nn.ModuleList(Block(config, i, device, dtype) for i in range(config.num_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps, device=device, dtype=dtype)
        self.head = None if config.tie_embeddings else Linear(config.dim, config.vocab_size, device, dtype)
        self.reset_parameters(generator)

    @property
    def output_weight(self) -> Tensor:
        """[vocab_size, dim], the output head: the embedding when tied."""
        return self.embed.weight if self.head is None else self.head.weight

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Fill every parameter: projections N(0, 1 / fan_in), those into the residual stream over 2 num_layers."""
        residual = (2 * self.config.num_layers) ** -0.5
        for name, module in self.named_modules():
            if isinstance(module, nn.Embedding) or module is self.head:
                init_normal(module.weight, EMBEDDING_STD, generator)
            elif isinstance(module, nn.Linear):
                into_stream = name.endswith(("o_proj", "down_proj"))
                init_normal(module.weight, module.in_features**-0.5 * (residual if into_stream else 1.0), generator)
            elif hasattr(module, "init_parameters"):
                module.init_parameters(generator)

    def forward(self, tokens: Tensor, cp: CPContext | None = None) -> Tensor:
        """Hidden states after the final norm.

        Args:
            tokens: int64 [B, T_local], this rank's tokens; B = 1 when ``cp`` packs documents.
            cp: layout and group; None: one device, one document per row.

        Returns:
            [B, T_local, dim] in the parameters' dtype.

        Raises:
            ValueError: ``tokens`` is not a two-dimensional int64 tensor, or does not hold the tokens of ``cp``.
        """
        x, rotary = self._embed(tokens, cp, 0)
        for layer in range(len(self.layers)):
            x = self._run_block(layer, x, rotary, cp)
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [..., dim] to logits [..., vocab_size]. For long sequences use a chunked loss instead."""
        return F.linear(hidden, self.output_weight)

    def prefill(self, tokens: Tensor, cp: CPContext | None = None) -> tuple[Tensor, ModelCache]:
        """:meth:`forward`, and the cache from which :meth:`step` continues.

        Over more than one rank, every rank gets the same cache, for models whose whole memory is the recurrent state.

        Args:
            tokens: int64 [B, T_local].
            cp: one document; over several ranks only without softmax layers and convolutions.

        Returns:
            hidden [B, T_local, dim] and the cache.

        Raises:
            ValueError: as :meth:`forward`; the model is not causal; ``cp`` packs documents, or cuts the keys or
                convolution inputs that the cache needs.
        """
        self._check_decodable(cp)
        hidden, layers = self._extend(tokens, cp, (None,) * len(self.layers), 0)
        position = tokens.shape[1] if cp is None else cp.layout.total_tokens
        return hidden, ModelCache(layers, position)

    def step(self, tokens: Tensor, cache: ModelCache) -> tuple[Tensor, ModelCache]:
        """The next token, or several, of every row: equal to :meth:`forward` over all tokens so far.

        Args:
            tokens: int64 [B, T], T >= 1.
            cache: from :meth:`prefill` or an earlier step; left as it is.

        Returns:
            hidden [B, T, dim] and the cache after these tokens.
        """
        hidden, layers = self._extend(tokens, None, cache.layers, cache.position)
        return hidden, ModelCache(layers, cache.position + tokens.shape[1])

    def _extend(self, tokens, cp, caches, position: int) -> tuple[Tensor, tuple]:
        x, rotary = self._embed(tokens, cp, position)
        kept = []
        for layer, (block, cache) in enumerate(zip(self.layers, caches, strict=True)):
            with comm.scope(f"layer {layer}"):
                x, cache = block(x, rotary, cp, cache, keep_cache=True)
            kept.append(cache)
        return self.norm(x), tuple(kept)

    def _run_block(self, layer: int, x: Tensor, rotary: Rotary, cp: CPContext | None) -> Tensor:
        """One block of the training pass; with ``config.recompute`` its activations are made again in backward."""

        def run(x: Tensor) -> Tensor:
            with comm.scope(f"layer {layer}"):
                return self.layers[layer](x, rotary, cp)[0]

        if self.config.recompute and torch.is_grad_enabled():
            return recompute(run, x, cp=cp)
        return run(x)

    def _embed(self, tokens: Tensor, cp: CPContext | None, position: int) -> tuple[Tensor, Rotary]:
        """Embedded tokens, and cos and sin for each width of rotated heads."""
        if tokens.dim() != 2 or tokens.dtype != torch.int64:
            raise ValueError(f"tokens must be int64 [B, T], got {tokens.dtype} of shape {tuple(tokens.shape)}.")
        if cp is not None:
            cp.check_tokens("tokens", tokens)
        x = self.embed(tokens)
        widths = {block.mixer.rotary_dim for block in self.layers} - {None}
        if not widths:
            return x, {}
        if cp is None:
            positions = torch.arange(position, position + tokens.shape[1], device=tokens.device)
        else:
            positions = cp.position_ids.to(tokens.device)
        dtype = torch.promote_types(x.dtype, torch.float32)
        theta = self.config.rope_theta
        return x, {width: rotary_angles(positions, width, theta, dtype) for width in sorted(widths)}

    def _check_decodable(self, cp: CPContext | None) -> None:
        if not self.config.causal:
            raise ValueError("prefill needs a causal model, got mixer.causal = False. Use forward.")
        if cp is None:
            return
        if cp.layout.num_documents > 1:
            raise ValueError(
                f"prefill needs one document, got cp with {cp.layout.num_documents}. Prefill each alone, or as a "
                "batch of rows."
            )
        if cp.cp_size > 1 and ("S" in self.config.layer_kinds or self.config.mixer.conv_width):
            raise ValueError(
                f"prefill over cp_size = {cp.cp_size} ranks needs a model of linear layers without convolution, got "
                f"pattern = {self.config.pattern!r}, conv_width = {self.config.mixer.conv_width}: their caches are "
                "not gathered. Prefill on one device."
            )


def num_parameters(config: ModelConfig) -> int:
    """Parameters of the model, a tied head counted once. Builds the model without storage."""
    return sum(p.numel() for p in LinearLlama(config, device="meta").parameters())
