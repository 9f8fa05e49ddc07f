"""Language models of linear and softmax attention layers: their options, their layers, decoding."""

from lasp.models.config import MixerConfig, ModelConfig
from lasp.models.linear_llama import LinearLlama, num_parameters

__all__ = ["LinearLlama", "MixerConfig", "ModelConfig", "num_parameters"]
