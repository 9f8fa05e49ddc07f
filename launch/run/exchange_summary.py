"""What a run says of its exchanges at the start: which one each kind of layer gets, and why."""

from __future__ import annotations

import torch

from lasp.cp_context import CPContext
from lasp.exchange import AUTO, setting
from lasp.kernels.state import state_dtype
from lasp.launch.config.schema import RunConfig
from lasp.layout import SequenceLayout
from lasp.models.config import ModelConfig
from lasp.models.sizes import LinearSizes
from lasp.parallel.mesh import Mesh
from lasp.softmax.choice import softmax_choice
from lasp.softmax.table import WITH_WINDOW


def exchange_rows(config: RunConfig, mesh: Mesh) -> dict[str, str]:
    """A row per kind of layer. All ranks of the job call it: a context may ask the hosts."""
    if mesh.cp_size == 1:
        return {"exchange": "none: one rank has the whole sequence"}
    layout = getattr(SequenceLayout, config.layout)(config.data.seq_len, mesh.cp_size)
    cp, rows, kinds = mesh.cp_context(layout, config.exchange_options), {}, config.model.layer_kinds
    if "L" in kinds:
        rows["exchange"] = _linear(config.model, cp, config.torch_dtype, mesh.tp_size)
    if "S" in kinds:
        rows["softmax exchange"] = _softmax(config.model, cp, config.torch_dtype, mesh.tp_size)
    return rows


def _linear(model: ModelConfig, cp: CPContext, dtype: torch.dtype, tp_size: int) -> str:
    sizes, states = LinearSizes.of(model, tp_size), state_dtype(dtype)
    chosen = setting(cp, sizes.state_elements, sizes.transition_elements, sizes.columns, states)
    wire = (cp.wire_dtype or states).itemsize
    size = sizes.state_elements * wire + sizes.transition_elements * states.itemsize
    fabric = "" if cp.fabric else " With exchange=auto and a fabric (lasp bench fabric) it is chosen by prediction."
    return f"{chosen.reason} {size / 2**10:,.0f} KiB per layer and fragment.{fabric}"


def _softmax(model: ModelConfig, cp: CPContext, dtype: torch.dtype, tp_size: int) -> str:
    if cp.softmax_exchange == AUTO:
        heads = model.heads // tp_size, max(1, (model.kv_heads or model.heads) // tp_size)
        return softmax_choice(cp, 1, heads, (model.softmax_head_dim,) * 2, dtype.itemsize, model.window).reason
    if model.window and cp.softmax_exchange == WITH_WINDOW:
        return f"the {model.window - 1} tokens before each fragment: window = {model.window}"
    return f"{cp.softmax_exchange}: as configured."
