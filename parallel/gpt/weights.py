"""The weights of a LinearLlama under Megatron's names and in its fused layouts, and back.

Megatron's are those of its local layers at tensor-parallel size 1. Per layer:

    linear_qkv   per query group [q of its heads | k | v | per head: decay, output gate], rows of one matrix
    linear_fc1   [gate | up]
    mixer        what lies between the projections; its convolution is cut into q, k and v

Both directions only reorder rows, so that they serve gradients and optimizer moments as well. Megatron's vocabulary is
filled up with rows of zeros to a multiple that tensor parallelism can cut; whoever builds the model hides their logits.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from lasp.models.config import ModelConfig
from lasp.models.sizes import LinearSizes

_WHOLE = {  # outside the layers
    "embed.weight": "embedding.word_embeddings.weight",
    "norm.weight": "decoder.final_layernorm.weight",
    "head.weight": "output_layer.weight",
}
_ALIKE = {  # in a layer, with the same values
    "mixer_norm.weight": "input_layernorm.weight",
    "mixer.o_proj.weight": "self_attention.linear_proj.weight",
    "mlp_norm.weight": "pre_mlp_layernorm.weight",
    "mlp.down_proj.weight": "mlp.linear_fc2.weight",
}
_VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")
VOCAB_MULTIPLE = 128  # the same at every tensor-parallel size, so that checkpoints fit all
_QKV, _FC1 = "self_attention.linear_qkv.weight", "mlp.linear_fc1.weight"
_CORE = "self_attention.core_attention.mixer."
_CONV, _CONV_PARTS = "mixer.conv_weight", ("conv_q", "conv_k", "conv_v")
_FUSED_NORMS = {  # TransformerEngine's layers own the norm before them
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}


def padded_vocab_size(config: ModelConfig) -> int:
    """Rows of Megatron's embedding and output layer."""
    return -(-config.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def canonical_name(name: str) -> str:
    """A parameter's name in Megatron's local layers, for one of a TransformerEngine layer."""
    for theirs, ours in _FUSED_NORMS.items():
        if name.endswith(theirs):
            return name.removesuffix(theirs) + ours
    return name


def to_megatron(native: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Native names and shapes to Megatron's; with a tied head the embedding is its ``output_layer`` too."""
    found = {theirs: native[ours] for ours, theirs in _WHOLE.items() if ours in native}
    if config.tie_embeddings:
        found["output_layer.weight"] = native["embed.weight"]
    missing = padded_vocab_size(config) - config.vocab_size
    found |= {name: F.pad(found[name], (0, 0, 0, missing)) for name in _VOCABULARY}
    for i, kind in enumerate(config.layer_kinds):
        prefix = f"layers.{i}."
        own = {name.removeprefix(prefix): x for name, x in native.items() if name.startswith(prefix)}
        layer = {theirs: own[ours] for ours, theirs in _ALIKE.items()}
        layer[_FC1] = torch.cat([own["mlp.gate_proj.weight"], own["mlp.up_proj.weight"]])
        names, sizes = _qkv_parts(config, kind)
        groups = [own[name].unflatten(0, (-1, rows)) for name, rows in zip(names, sizes, strict=True)]
        layer[_QKV] = _fuse(groups, _groups(config, kind))
        layer |= {_CORE + name.removeprefix("mixer."): x for name, x in own.items() if _is_core(name, kind)}
        if _CONV in own:
            parts = own[_CONV].split(_conv_sizes(config))
            layer |= {_CORE + name: x for name, x in zip(_CONV_PARTS, parts, strict=True)}
        found |= {f"decoder.layers.{i}.{name}": x for name, x in layer.items()}
    return found


def to_native(whole: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Megatron's names and shapes to the native ones; what is given for a tied head is not needed."""
    whole = {canonical_name(name): x for name, x in whole.items()}
    rows = {name: slice(config.vocab_size) for name in _VOCABULARY}
    found = {ours: whole[theirs][rows.get(theirs, slice(None))] for ours, theirs in _WHOLE.items() if theirs in whole}
    if config.tie_embeddings:
        found.pop("head.weight", None)
    for i, kind in enumerate(config.layer_kinds):
        prefix = f"decoder.layers.{i}."
        own = {name.removeprefix(prefix): x for name, x in whole.items() if name.startswith(prefix)}
        layer = {ours: own[theirs] for ours, theirs in _ALIKE.items()}
        layer["mlp.gate_proj.weight"], layer["mlp.up_proj.weight"] = own[_FC1].chunk(2)
        names, sizes = _qkv_parts(config, kind)
        parts = _split(own[_QKV], sizes, _groups(config, kind), config, kind)
        layer |= {name: x.flatten(0, 1) for name, x in zip(names, parts, strict=True)}
        core = {name.removeprefix(_CORE): x for name, x in own.items() if name.startswith(_CORE)}
        if _CONV_PARTS[0] in core:
            layer[_CONV] = torch.cat([core.pop(name) for name in _CONV_PARTS])
        layer |= {f"mixer.{name}": x for name, x in core.items()}
        found |= {f"layers.{i}.{name}": x for name, x in layer.items()}
    return found


def cut(name: str, whole: Tensor, dim: int | None, rank: int, size: int) -> Tensor:
    """The part of tensor-parallel rank ``rank`` of ``size``; ``dim`` None: it is replicated."""
    if dim is None or size == 1:
        return whole
    if name.endswith(_FC1):  # every rank has rows of gate and of up
        return torch.cat([half.chunk(size)[rank] for half in whole.chunk(2)])
    return whole.chunk(size, dim)[rank]


def join(name: str, parts: list[Tensor], dim: int | None) -> Tensor:
    """The whole of what :func:`cut` gave to each rank, in rank order."""
    if dim is None or len(parts) == 1:
        return parts[0]
    if name.endswith(_FC1):
        return torch.cat([torch.cat(half) for half in zip(*(part.chunk(2) for part in parts), strict=True)])
    return torch.cat(parts, dim)


def _heads(config: ModelConfig, kind: str) -> int:
    return config.mixer_heads if kind == "L" else config.heads


def _groups(config: ModelConfig, kind: str) -> int:
    """Key and value heads of a layer."""
    return config.mixer_heads if kind == "L" else config.kv_heads or config.heads


def _qkv_parts(config: ModelConfig, kind: str) -> tuple[list[str], list[int]]:
    """Native parameters fused into linear_qkv, and the rows of one head of each."""
    if kind == "S":
        return [f"mixer.{x}_proj.weight" for x in "qkv"], [config.softmax_head_dim] * 3
    layer, names = LinearSizes.of(config), [f"mixer.{x}_proj.weight" for x in "qkv"]
    sizes = [layer.key_dim, layer.key_dim, layer.value_dim]
    if layer.decays:
        names.append("mixer.decay.proj.weight")
        sizes.append(layer.decays)
    if config.mixer.out_gate != "none":
        names.append("mixer.out_gate.weight")
        sizes.append(layer.value_dim)
    return names, sizes


def _fuse(parts: list[Tensor], groups: int) -> Tensor:
    """[heads or groups, rows, dim] each to the rows of linear_qkv."""
    q, k, v, *tails = parts
    by_group = [q.unflatten(0, (groups, -1)).flatten(1, 2), k, v]
    if tails:  # per head: decay, then gate
        by_group.append(torch.cat(tails, 1).unflatten(0, (groups, -1)).flatten(1, 2))
    return torch.cat(by_group, 1).flatten(0, 1)


def _split(fused: Tensor, sizes: list[int], groups: int, config: ModelConfig, kind: str) -> list[Tensor]:
    """The rows of linear_qkv to [heads or groups, rows, dim] of each part."""
    share = _heads(config, kind) // groups
    tail = sum(sizes[3:])
    q, k, v, tails = fused.unflatten(0, (groups, -1)).split([share * sizes[0], *sizes[1:3], share * tail], 1)
    by_head = [x.unflatten(1, (share, -1)).flatten(0, 1) for x in ((q, tails) if tail else (q,))]
    return [by_head[0], k, v, *(by_head[1].split(sizes[3:], 1) if tail else ())]


def _is_core(name: str, kind: str) -> bool:
    """Whether a parameter of a layer lies between its projections."""
    projected = ("mixer.decay.proj.", "mixer.out_gate.", "mixer.conv_weight", *(f"mixer.{x}_proj." for x in "qkvo"))
    return kind == "L" and name.startswith("mixer.") and not name.startswith(projected)


def _conv_sizes(config: ModelConfig) -> list[int]:
    return [config.mixer_heads * width for width in (config.key_dim, config.key_dim, config.value_dim)]
