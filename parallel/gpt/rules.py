"""Which models and meshes backend megatron takes: plain rules, which the planner asks too. No megatron-core here."""

from __future__ import annotations

from typing import Protocol

from lasp.models.config import ModelConfig
from lasp.models.outputs import OUT_NORMS
from lasp.parallel.gpt.weights import padded_vocab_size


class Grid(Protocol):
    """The sizes of a mesh that cut a model."""

    tp_size: int
    pp_size: int


def check_model(model: ModelConfig, mesh: Grid, virtual_stages: int | None, sequence_parallel: bool) -> None:
    """Refuse what Megatron would build otherwise than the native model, before anything is built.

    Raises:
        ValueError: naming the option, the rule and the values.
    """
    mixer = model.mixer
    if "L" in model.layer_kinds:
        widths = {"mixer.key_dim": model.key_dim, "mixer.value_dim": model.value_dim}
        if "S" in model.layer_kinds:
            widths["head_dim"] = model.softmax_head_dim
            if model.mixer_heads != model.heads:
                raise ValueError(
                    f"backend=megatron needs as many heads in linear as in softmax layers: mixer.heads = "
                    f"{model.mixer_heads}, heads = {model.heads}. Leave mixer.heads out."
                )
        if len(set(widths.values())) > 1:
            raise ValueError(
                f"backend=megatron needs heads of one width, got {widths}: Megatron has one kv_channels. Leave "
                "expand_k, expand_v, key_dim and value_dim out of the mixer."
            )
    for name in ("gate_rank", "out_gate_rank"):
        if "L" in model.layer_kinds and getattr(mixer, name) is not None:
            raise ValueError(
                f"backend=megatron has no mixer.{name}, got {getattr(mixer, name)}: decay and gate are a part of "
                "the one fused projection. Set it to null."
            )
    if model.ffn_tile is not None:
        raise ValueError(
            f"backend=megatron has no model.ffn_tile, got {model.ffn_tile}: the feed-forward layers are Megatron's. "
            "Leave it out; tp_size cuts their hidden width."
        )
    norm = OUT_NORMS[mixer.out_norm]
    if mesh.tp_size > 1 and "L" in model.layer_kinds and norm is not None and norm.spans_heads:
        raise ValueError(
            f"mixer.out_norm={mixer.out_norm} spans all heads, and tp_size = {mesh.tp_size} cuts them. Set tp_size to "
            "1, or out_norm to head_rms."
        )
    cuts = {"vocab_size (filled up)": padded_vocab_size(model), "ffn_dim": model.hidden_dim}
    cuts["heads"] = model.heads if "S" in model.layer_kinds else model.mixer_heads
    for name, value in cuts.items():
        if value % mesh.tp_size:
            raise ValueError(f"model.{name} = {value} must be a multiple of tp_size = {mesh.tp_size}. Change one.")
    groups = model.kv_heads or cuts["heads"]
    if groups % mesh.tp_size and mesh.tp_size % groups:
        raise ValueError(
            f"model.kv_heads = {groups} and tp_size = {mesh.tp_size}: one must divide the other. Change one."
        )
    stages = mesh.pp_size * (virtual_stages or 1)
    if model.num_layers % stages:
        raise ValueError(
            f"model.num_layers = {model.num_layers} must be a multiple of pp_size * megatron.virtual_stages = "
            f"{mesh.pp_size} * {virtual_stages or 1}. Change one."
        )
    if virtual_stages is not None and mesh.pp_size == 1:
        raise ValueError(f"megatron.virtual_stages = {virtual_stages} has no effect with pp_size = 1. Leave it out.")
    if sequence_parallel and mesh.tp_size == 1:
        raise ValueError("megatron.sequence_parallel has no effect with tp_size = 1. Leave it out.")
