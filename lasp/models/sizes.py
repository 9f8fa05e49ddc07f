"""How wide a linear layer is, and how large what it remembers and sends."""

from __future__ import annotations

from dataclasses import dataclass

from lasp.models.config import ModelConfig
from lasp.models.features import feature_width


@dataclass(frozen=True)
class LinearSizes:
    """Widths of a linear layer on one rank, per head.

    Attributes:
        heads: H, of this rank.
        key_dim: width of a q or k head before the feature map.
        state_dim: K, its width after the map, and the rows of a state.
        value_dim: V, width of a v head.
        columns: of a state: V, and one of ones with the sum normaliser.
        decays: log-decays that each token makes: 0 without a gate, 1, or one per row of a state. So many numbers the
            gate's projection has, and so many the transition of a state map that travels.
    """

    heads: int
    key_dim: int
    state_dim: int
    value_dim: int
    columns: int
    decays: int

    @classmethod
    def of(cls, config: ModelConfig, tp_size: int = 1) -> LinearSizes:
        """Of a model whose heads ``tp_size`` ranks share."""
        mixer = config.mixer
        state_dim = feature_width(mixer.feature, config.key_dim, mixer.feature_dim)
        return cls(
            heads=config.mixer_heads // tp_size,
            key_dim=config.key_dim,
            state_dim=state_dim,
            value_dim=config.value_dim,
            columns=config.value_dim + (mixer.normaliser == "sum"),
            decays={"none": 0, "fixed": 0, "scalar": 1, "channel": state_dim}[mixer.decay],
        )

    @property
    def state_elements(self) -> int:
        """Numbers in one state of all heads."""
        return self.heads * self.state_dim * self.columns

    @property
    def transition_elements(self) -> int:
        """Numbers in the transition that travels with a state of all heads."""
        return self.heads * self.decays
