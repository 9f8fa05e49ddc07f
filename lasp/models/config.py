"""What a model is: the options of a linear-attention layer and the shape of the model around it.

A layer family (GLA, retention, Based, ...) is one setting of :class:`MixerConfig`, never a class of its own;
the settings with names are in :mod:`lasp.models.presets`. Both classes are frozen dataclasses that check themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from lasp.models.config_fields import check_entry, check_positive, check_types, merge_fields, refuse
from lasp.models.features import FEATURES
from lasp.models.gates import GATES, SLOPES
from lasp.models.outputs import OUT_GATES, OUT_NORMS
from lasp.models.presets import MIXER_PRESETS, MODEL_PRESETS


@dataclass(frozen=True)
class MixerConfig:
    """One linear-attention layer: feature map x decay x normaliser x convolution x output norm and gate.

    Attributes:
        heads: heads of q, k and v; None: the model's.
        key_dim, value_dim: width of a q/k head before the feature map, and of a v head. None: from the model's
            width, ``expand_k * dim / heads`` and ``expand_v * dim / heads``.
        expand_k, expand_v: used where ``key_dim`` / ``value_dim`` is None; refused beside them.
        feature: map on q and k, apart for each, an entry of :data:`lasp.models.features.FEATURES`.
        feature_dim: output width of ``hadamard``, None: key_dim. The other maps fix their own width.
        decay: ``none``; ``fixed`` per head (``slopes``); ``scalar`` per token and head, ``channel`` per token,
            head and key channel (``gate``).
        slopes: ``alibi``: g_h = -2^(-8(h+1)/H); ``retnet``: g_h = log(1 - 2^(-5-h)).
        per_layer_slopes: multiply g of layer l of L by 1 - l/(L-1) + 1e-5 (TransNormerLLM, arXiv 2307.14995).
        gate: how the log-decay follows from Wx + c, an entry of :data:`lasp.models.gates.GATES`.
        gate_tau: temperature of ``logsigmoid``; None: 16.
        gate_rank: W = W2 W1 through this width; None: full.
        normaliser: ``sum`` divides by the sum of the weights, scale-free; needs a non-negative kernel.
        scale: factor on the output; None: (feature width) ** -0.5.
        conv_width: causal depthwise convolution over q, k and v; 0: none.
        conv_activation: after the convolution.
        out_norm: ``head_rms`` RMSNorm per head; ``full_rms`` over all heads; ``srms`` that, without weight.
        out_gate: output times act(Wx), after the norm.
        out_gate_rank: W = W2 W1 through this width; None: full.
        position: ``rope`` rotates q and k before the feature map, by the position in the document.
        causal: False lets every token read its whole document (no decay).

    Raises:
        ValueError: a value of the wrong type or range; an option without effect beside the others.
    """

    heads: int | None = None
    key_dim: int | None = None
    value_dim: int | None = None
    expand_k: float = 1.0
    expand_v: float = 1.0
    feature: str = "identity"
    feature_dim: int | None = None
    decay: Literal["none", "fixed", "scalar", "channel"] = "none"
    slopes: str | None = None
    per_layer_slopes: bool = False
    gate: str | None = None
    gate_tau: float | None = None
    gate_rank: int | None = None
    normaliser: Literal["none", "sum"] = "none"
    scale: float | None = None
    conv_width: int = 0
    conv_activation: Literal["silu"] | None = None
    out_norm: str = "head_rms"
    out_gate: str = "none"
    out_gate_rank: int | None = None
    position: Literal["none", "rope"] = "none"
    causal: bool = True

    def __post_init__(self):
        check_types(self)
        tables = {"feature": FEATURES, "slopes": SLOPES, "gate": GATES, "out_norm": OUT_NORMS, "out_gate": OUT_GATES}
        for name, table in tables.items():
            check_entry(self, name, table)
        check_positive(
            self,
            "heads",
            "key_dim",
            "value_dim",
            "expand_k",
            "expand_v",
            "feature_dim",
            "gate_tau",
            "gate_rank",
        )
        check_positive(self, "scale", "out_gate_rank")
        refuse(self, "expand_k", 1.0, self.key_dim is not None, "key_dim sets the width")
        refuse(self, "expand_v", 1.0, self.value_dim is not None, "value_dim sets the width")
        free = [name for name, feature in FEATURES.items() if feature.width is None]
        refuse(self, "feature_dim", None, self.feature not in free, f"only feature={_either(free)} reads it")
        refuse(self, "slopes", None, self.decay != "fixed", f"decay={self.decay!r} has no fixed slopes")
        refuse(self, "per_layer_slopes", False, self.decay != "fixed", f"decay={self.decay!r} has no slopes")
        gated = self.decay in ("scalar", "channel")
        refuse(self, "gate", None, not gated, f"decay={self.decay!r} has no gate")
        refuse(self, "gate_rank", None, not gated, f"decay={self.decay!r} has no gate")
        for name in sorted({name for gate in GATES.values() for name in gate.options}):
            readers = [other for other, gate in GATES.items() if name in gate.options]
            refuse(self, name, None, self.gate not in readers, f"only gate={_either(readers)} reads it")
        refuse(self, "scale", None, self.normaliser == "sum", "normaliser='sum' cancels it")
        refuse(self, "conv_activation", None, self.conv_width == 0, "conv_width=0 is no convolution")
        refuse(self, "out_gate_rank", None, self.out_gate == "none", "out_gate='none' has no gate")
        if self.decay == "fixed" and self.slopes is None:
            raise ValueError(f"slopes must be one of {list(SLOPES)} when decay='fixed', got None. Set one.")
        if gated and self.gate is None:
            raise ValueError(f"gate must be one of {list(GATES)} when decay={self.decay!r}, got None. Set one.")
        if self.conv_width < 0 or self.conv_width == 1:
            raise ValueError(f"conv_width must be 0 (none) or at least 2, got {self.conv_width}.")
        if self.normaliser == "sum" and not FEATURES[self.feature].non_negative:
            non_negative = [name for name, feature in FEATURES.items() if feature.non_negative]
            raise ValueError(
                f"normaliser='sum' divides by a sum of weights, so feature must be one of {non_negative}, "
                f"got {self.feature!r}. Choose one of them, or normaliser='none' with out_norm='head_rms'."
            )
        if not self.causal and self.decay != "none":
            raise ValueError(
                f"causal=False needs decay='none', got {self.decay!r}: bidirectional decay is not supported."
            )

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> MixerConfig:
        """A named family, with ``overrides`` on top: ``MixerConfig.preset("gla", heads=4)``."""
        return cls.from_dict({"preset": name, **overrides})

    @classmethod
    def from_dict(cls, data: Mapping[str, Any] | str | MixerConfig) -> MixerConfig:
        """From a preset's name, or a mapping of fields with an optional ``preset`` below them; fields win.

        Raises:
            ValueError: an unknown preset or field.
        """
        if isinstance(data, MixerConfig):
            return data
        return cls(
            **merge_fields(
                cls,
                {"preset": data} if isinstance(data, str) else data,
                MIXER_PRESETS,
                instead=(("key_dim", "expand_k"), ("value_dim", "expand_v")),
            )
        )


def _either(names: list[str]) -> str:
    return " or ".join(map(repr, names))


@dataclass(frozen=True)
class ModelConfig:
    """A decoder, or with ``mixer.causal=False`` an encoder: embedding, pre-norm blocks, final norm, output head.

    Attributes:
        vocab_size, dim, num_layers: of the embedding, the residual stream, and the blocks.
        pattern: the kinds of layers, ``L`` linear and ``S`` softmax, repeated to ``num_layers``: ``"LLLS"``.
        heads: query heads; must divide ``dim`` where ``head_dim`` is None.
        kv_heads: key and value heads of the softmax layers; None: ``heads``. Divides ``heads``.
        head_dim: width of a softmax head; None: ``dim / heads``.
        ffn_dim: hidden width of SwiGLU; None: 8/3 dim, rounded up to a multiple of 64.
        ffn_tile: tokens whose hidden activations of SwiGLU exist at a time, in forward and backward; None: all. Same
            values; a fifth more work in SwiGLU and memory that does not grow with tokens times ``ffn_dim``.
        mixer: the linear layers.
        window: softmax layers read this many newest keys; None: all.
        rope_theta: base of the rotary embedding.
        norm_eps: in every RMSNorm.
        tie_embeddings: the output head is the embedding.
        recompute: recompute each block's activations in the backward pass instead of keeping them.

    Raises:
        ValueError: a value of the wrong type or range; widths that do not divide; an option without effect.
    """

    vocab_size: int
    dim: int
    num_layers: int
    pattern: str = "L"
    heads: int = 4
    kv_heads: int | None = None
    head_dim: int | None = None
    ffn_dim: int | None = None
    ffn_tile: int | None = None
    mixer: MixerConfig = field(default_factory=lambda: MixerConfig.preset("basic"))
    window: int | None = None
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    tie_embeddings: bool = True
    recompute: bool = False

    def __post_init__(self):
        check_types(self)
        check_positive(self, "vocab_size", "dim", "num_layers", "heads", "kv_heads", "head_dim", "ffn_dim")
        check_positive(self, "ffn_tile", "window", "rope_theta", "norm_eps")
        if not self.pattern or set(self.pattern) - {"L", "S"}:
            raise ValueError(f"pattern must be made of L (linear) and S (softmax), like 'LLLS', got {self.pattern!r}.")
        if len(self.pattern) > self.num_layers:
            raise ValueError(
                f"pattern must not be longer than num_layers = {self.num_layers}, got {self.pattern!r}: "
                f"{len(self.pattern)} layers. Shorten it or add layers."
            )
        softmax, linear = "S" in self.pattern, "L" in self.pattern
        refuse(self, "window", None, not softmax, f"pattern={self.pattern!r} has no softmax layer")
        refuse(self, "kv_heads", None, not softmax, f"pattern={self.pattern!r} has no softmax layer")
        refuse(self, "head_dim", None, not softmax, f"pattern={self.pattern!r} has no softmax layer")
        if softmax:
            self._check_softmax()
        if linear:
            self._check_linear()

    def _check_softmax(self) -> None:
        if self.head_dim is None and self.dim % self.heads:
            raise ValueError(
                f"heads must divide dim where head_dim is None: dim = {self.dim}, heads = {self.heads}. "
                "Set head_dim, or a count that divides."
            )
        if self.heads % (self.kv_heads or self.heads):
            raise ValueError(f"kv_heads must divide heads = {self.heads}, got {self.kv_heads}.")
        if self.softmax_head_dim % 2:
            raise ValueError(
                f"a softmax head must have an even width for the rotary embedding, got {self.softmax_head_dim}. "
                "Set an even head_dim."
            )
        if self.window is not None and not self.mixer.causal:
            raise ValueError(
                f"window needs a causal model, got window = {self.window} with mixer.causal = False. "
                "Set window to None."
            )

    def _check_linear(self) -> None:
        heads = self.mixer_heads
        for name, width, expand in (
            ("key_dim", self.mixer.key_dim, self.mixer.expand_k),
            ("value_dim", self.mixer.value_dim, self.mixer.expand_v),
        ):
            if width is None and (expand * self.dim) % heads:
                raise ValueError(
                    f"the heads of the mixer must divide expand_{name[0]} * dim = {expand} * {self.dim}, got "
                    f"{heads} heads. Set mixer.{name}, or a count that divides."
                )
        if self.mixer.position == "rope" and self.key_dim % 2:
            raise ValueError(f"mixer.position='rope' needs an even key_dim, got {self.key_dim}. Set mixer.key_dim.")

    @property
    def layer_kinds(self) -> str:
        """One character per layer: the pattern, repeated to ``num_layers``."""
        return (self.pattern * self.num_layers)[: self.num_layers]

    @property
    def causal(self) -> bool:
        """Whether every layer reads only earlier tokens: ``mixer.causal``."""
        return self.mixer.causal

    @property
    def softmax_head_dim(self) -> int:
        """Width of a softmax head."""
        return self.head_dim or self.dim // self.heads

    @property
    def hidden_dim(self) -> int:
        """Hidden width of SwiGLU."""
        return self.ffn_dim or -(-8 * self.dim // (3 * 64)) * 64

    @property
    def mixer_heads(self) -> int:
        """Heads of a linear layer."""
        return self.mixer.heads or self.heads

    @property
    def key_dim(self) -> int:
        """K before the feature map: width of a q or k head of a linear layer."""
        return self.mixer.key_dim or int(self.mixer.expand_k * self.dim) // self.mixer_heads

    @property
    def value_dim(self) -> int:
        """V: width of a v head of a linear layer."""
        return self.mixer.value_dim or int(self.mixer.expand_v * self.dim) // self.mixer_heads

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> ModelConfig:
        """A named model, with ``overrides`` on top: ``ModelConfig.preset("tiny", mixer="gla")``."""
        return cls.from_dict({"preset": name, **overrides})

    @classmethod
    def from_dict(cls, data: Mapping[str, Any] | str | ModelConfig) -> ModelConfig:
        """From a preset's name, or a mapping of fields with an optional ``preset`` below them; fields win.

        ``mixer`` may be a name or a mapping too: ``{"preset": "tiny", "mixer": {"preset": "gla", "heads": 2}}``.
        It replaces the mixer of the preset.

        Raises:
            ValueError: an unknown preset or field, or a missing one.
        """
        if isinstance(data, ModelConfig):
            return data
        fields = merge_fields(cls, {"preset": data} if isinstance(data, str) else data, MODEL_PRESETS)
        if "mixer" in fields:
            fields["mixer"] = MixerConfig.from_dict(fields["mixer"])
        missing = [name for name in ("vocab_size", "dim", "num_layers") if name not in fields]
        if missing:
            raise ValueError(f"ModelConfig needs {', '.join(missing)}. Set them, or name a preset.")
        return cls(**fields)
