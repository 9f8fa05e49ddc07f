"""Generation by recurrent decoding: one prefill, then one token at a time from the cache."""

from __future__ import annotations

import torch
from torch import Tensor

from lasp.models.linear_llama import LinearLlama


@torch.no_grad()
def generate(
    model: LinearLlama,
    tokens: Tensor,
    max_new_tokens: int,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
    eos: int | None = None,
) -> Tensor:
    """Continue each row of ``tokens``.

    Args:
        model: a causal model.
        tokens: int64 [B, T], T >= 1: prompts of one length.
        max_new_tokens: at most this many are added.
        temperature: 0 takes the most likely token; above, samples from softmax(logits / temperature).
        generator: source of the samples, on the logits' device; None: torch's default.
        eos: a row that has produced this token repeats it; when all rows have, generation ends.

    Returns:
        int64 [B, T + n], n <= max_new_tokens: the prompts and what follows them.

    Raises:
        ValueError: an empty prompt, a negative count, a negative or infinite temperature, a generator without effect.
    """
    if tokens.dim() != 2 or tokens.shape[1] < 1:
        raise ValueError(f"tokens must be [B, T] with T >= 1, got shape {tuple(tokens.shape)}.")
    if max_new_tokens < 0 or temperature < 0:
        raise ValueError(
            f"max_new_tokens and temperature must not be negative, got {max_new_tokens} and {temperature}."
        )
    if not temperature < float("inf"):
        raise ValueError(f"temperature must be finite, got {temperature}. Set 0 for the likeliest token.")
    if temperature == 0 and generator is not None:
        raise ValueError("generator has no effect at temperature = 0. Leave it None, or set a temperature.")
    if max_new_tokens == 0:
        return tokens
    hidden, cache = model.prefill(tokens)
    out = [tokens]
    done = torch.zeros(tokens.shape[0], dtype=torch.bool, device=tokens.device)
    for i in range(max_new_tokens):
        if i:
            hidden, cache = model.step(out[-1], cache)
        token = _sample(model.logits(hidden[:, -1]), temperature, generator)
        if eos is not None:
            token = token.masked_fill(done, eos)
            done |= token == eos
        out.append(token.unsqueeze(1))
        if eos is not None and bool(done.all()):
            break
    return torch.cat(out, 1)


def _sample(logits: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
    """One token per row of logits [B, vocab_size]."""
    if temperature == 0:
        return logits.argmax(-1)
    below = logits.float() - logits.float().amax(-1, keepdim=True)  # 0 at the likeliest: no temperature overflows it
    weights = (below.double() / temperature).softmax(-1).float()
    return torch.multinomial(weights, 1, generator=generator).squeeze(1)
