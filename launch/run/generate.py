"""Text from a trained model: recurrent decoding from a checkpoint or from the model in memory."""

from __future__ import annotations

from pathlib import Path

import torch

from lasp.launch.data.tokenizer import Tokenizer, load_tokenizer
from lasp.models.config import ModelConfig
from lasp.models.generation import generate
from lasp.models.linear_llama import LinearLlama
from lasp.parallel.checkpoints import checkpoint as checkpoints
from lasp.parallel.checkpoints.native_weights import model_tensors


def load_model(path: str | Path) -> tuple[LinearLlama, Tokenizer]:
    """The model and the tokenizer of a checkpoint, or of the newest one of a run directory, on the CPU.

    Raises:
        ValueError: no checkpoint there, or a damaged one.
    """
    saved = checkpoints.load(checkpoints.find(Path(path)))
    model = LinearLlama(ModelConfig.from_dict(saved.state["model"]), device="meta")
    model.load_state_dict(model_tensors(saved), assign=True)
    return model, load_tokenizer(saved.state["tokenizer"], saved.extras.get("tokenizer.json"))


def sample_text(
    model: LinearLlama,
    tokenizer: Tokenizer,
    prompt: list[int],
    max_new_tokens: int,
    *,
    temperature: float = 0.8,
    seed: int = 0,
) -> str:
    """The prompt and what the model writes after it, up to the end of its document.

    Args:
        temperature: 0 takes the likeliest token each time.
        seed: the same seed gives the same text.
    """
    if not prompt:
        raise ValueError("the prompt must hold at least one token, got none. Give some text to go on from.")
    device = model.output_weight.device
    generator = torch.Generator(device).manual_seed(seed) if temperature > 0 else None
    tokens = torch.tensor([prompt], device=device)
    was_training = model.training
    model.eval()
    tokens = generate(model, tokens, max_new_tokens, temperature, generator, eos=tokenizer.eos)
    model.train(was_training)
    return tokenizer.decode(tokens[0].tolist())
