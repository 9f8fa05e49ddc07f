"""How long one rank computes, by the roofline: operations over a share of a device's peak, or bytes over its rate.

    seconds = max(operations / (peak * EFFICIENCY), bytes of activations written and read / memory rate)

``EFFICIENCY`` is not measured by us: it is what the published run of 1B GLA on H100s reaches without sequence
parallelism (49 633 tokens/s per GPU, arXiv 2507.01004: 6 x 1.3e9 x 49 633 = 0.39 of 989e12). Published runs of the
1B model of LASP-2 on A100s reach 0.22. A speed that you have measured replaces all of this.
"""

from __future__ import annotations

from dataclasses import dataclass

from lasp.launch.plan.activations import Load, saved_by_block
from lasp.launch.plan.memory import block_sizes
from lasp.models.config import ModelConfig
from lasp.models.sizes import LinearSizes

EFFICIENCY = 0.39
_CHUNK = 64  # tokens whose scores a linear operator makes
_PASSES = 4  # what a block keeps is written and read in the forward, read in the backward, and its gradient written


@dataclass(frozen=True)
class Device:
    """What one rank computes with: operations per second in dense bf16 and in fp32, bytes per second of its memory."""

    name: str
    flops: float
    wide_flops: float
    bytes_per_s: float
    source: str

    def peak(self, width: int) -> float:
        """Operations per second on numbers of ``width`` bytes; fp64 is taken for fp32."""
        return self.flops if width == 2 else self.wide_flops


DEVICES = {
    device.name: device
    for device in (
        Device("h100", 989e12, 67e12, 3.35e12, "H100 SXM data sheet"),
        Device("a100", 312e12, 19.5e12, 2.0e12, "A100 80GB SXM data sheet"),
        Device("cpu", 0.2e12, 0.2e12, 40e9, "two cores with AVX-512: assumed"),
    )
}


@dataclass(frozen=True)
class Work:
    """Seconds of one micro batch on one rank.

    Attributes:
        forward, backward: of all layers and the loss; the backward with what it makes again.
        dq: of one linear layer's backward, what runs while its exchange flies.
        attention: of one softmax layer's forward.
    """

    forward: float
    backward: float
    dq: float
    attention: float

    @property
    def total(self) -> float:
        """Forward and backward."""
        return self.forward + self.backward


def operator_flops(config: ModelConfig, kind: str, seq_len: int) -> float:
    """Operations per token of one attention operator, forward: scores within chunks and states, or all earlier keys."""
    if kind == "L":
        s = LinearSizes.of(config)
        return 2 * s.heads * (_CHUNK * (s.state_dim + s.columns) + 2 * s.state_dim * s.columns)
    keys = seq_len if not config.causal else seq_len / 2
    keys = keys if config.window is None else min(config.window, keys)
    return 4 * keys * config.heads * config.softmax_head_dim


def predict_work(config: ModelConfig, load: Load, seq_len: int, device: Device, pp_size: int = 1) -> Work:
    """Seconds of a rank's share of one micro batch: its tokens, heads, hidden width and layers."""
    rate = device.peak(load.width) * EFFICIENCY * load.tp_size
    projections = sum(matrices for _, matrices in block_sizes(config))
    hidden = 3 * config.dim * config.hidden_dim * config.num_layers
    operators = sum(operator_flops(config, kind, seq_len) for kind in config.layer_kinds)
    head = 2 * config.vocab_size * config.dim
    block_forward = 2 * projections + operators
    forward = block_forward + head
    backward = 2 * forward
    if config.recompute:
        backward += block_forward
    if config.ffn_tile is not None and load.tokens > config.ffn_tile:
        backward += 2 * hidden * 2 / 3  # gate and up again
    kept = sum(
        sum(term.bytes for term in saved_by_block(config, kind, load).all) * config.layer_kinds.count(kind)
        for kind in set(config.layer_kinds)
    )
    floor = _PASSES * kept / device.bytes_per_s / 3  # a third of it in the forward
    share = load.tokens / rate / pp_size
    linear = operator_flops(config, "L", seq_len) if "L" in config.layer_kinds else 0.0
    softmax = operator_flops(config, "S", seq_len) if "S" in config.layer_kinds else 0.0
    return Work(
        max(share * forward, floor / pp_size),
        max(share * backward, 2 * floor / pp_size),
        2 / 3 * linear * load.tokens / rate,
        softmax * load.tokens / rate,
    )


def state_bytes(config: ModelConfig, load: Load) -> tuple[int, int]:
    """b and a of one linear layer: bytes of a state map and of its transition, all rows."""
    s = LinearSizes.of(config, load.tp_size)
    return (load.rows * s.state_elements * load.wide, load.rows * s.transition_elements * load.wide)


def widest_head(config: ModelConfig) -> int:
    """The larger of K and V of the linear layers; 0 without any."""
    if "L" not in config.layer_kinds:
        return 0
    sizes = LinearSizes.of(config)
    return max(sizes.state_dim, sizes.columns)
