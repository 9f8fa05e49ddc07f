"""Tensors of softmax attention that tests share."""

from tests.lasp.layout_cases import draw_tensors


def make(seed, batch, length, heads, kv_heads, dim, value_dim):
    """q, k, v and the upstream gradient, float64 [B, T, heads, dim]."""
    shapes = (heads, dim), (kv_heads, dim), (kv_heads, value_dim), (heads, value_dim)
    return draw_tensors(seed, *((batch, length, *shape) for shape in shapes))
