"""Chunk tables and the per-channel scores of one chunk."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lasp.kernels.segments import SegmentTable
from lasp.kernels.torch_linear import diagonal


@settings(max_examples=40, deadline=None)
@given(lengths=st.lists(st.integers(1, 70), min_size=1, max_size=8), chunks_per_tile=st.integers(1, 5))
def test_every_token_is_in_one_chunk_of_its_own_segment(lengths, chunks_per_tile):
    ends = torch.tensor(lengths).cumsum(0).tolist()
    bounds = list(zip([0, *ends[:-1]], ends, strict=True))
    table = SegmentTable(bounds, torch.device("cpu"), chunk_size=16)
    segment_of = torch.cat([torch.full((n,), s) for s, n in enumerate(lengths)])
    seen, begun, ended = [], [], []
    for tile in table.tiles(chunks_per_tile):
        shape, tokens = tile.shape, torch.arange(tile.start, tile.stop)
        seen.append(tokens)
        begun += range(*tile.begun)
        ended += range(*tile.ended)
        slots = tokens if shape.gather is None else tokens[shape.gather]
        chunk_segments = segment_of[slots].view(shape.num_chunks, -1)
        assert (chunk_segments == (tile.first + shape.segments)[:, None]).all()
        if shape.scatter is not None:
            assert torch.equal(slots[shape.scatter], tokens)
            assert (~shape.padding).sum() == len(tokens)
    assert torch.equal(torch.cat(seen), torch.arange(ends[-1]))
    assert begun == ended == list(range(len(lengths)))


def test_interior_tiles_share_one_shape():
    table = SegmentTable([(0, 64 * 64)], torch.device("cpu"))
    tiles = table.tiles(4)
    assert len(tiles) == 16 and len({id(t.shape) for t in tiles}) == 3  # first, interior, last


@pytest.mark.parametrize("size", [4, 8, 16, 64])
@pytest.mark.parametrize("strength", [0.1, 30.0, 1000.0])
def test_per_channel_scores_and_gradients_at_any_decay(size, strength):
    q, k = (torch.randn(2, size, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    log_decay = (-strength * torch.rand(2, size, 5, dtype=torch.float64)).cumsum(-2)
    difference = log_decay[:, :, None] - log_decay[:, None]
    lower = torch.ones(size, size, dtype=torch.bool).tril()[None, :, :, None]
    decay = torch.where(lower, difference, -torch.inf).exp()
    expected = torch.einsum("bik,bjk,bijk->bij", q, k, decay)
    grad = torch.randn(2, size, size, dtype=torch.float64).tril()
    dq, dk = torch.autograd.grad(expected, (q, k), grad)
    with torch.no_grad():
        torch.testing.assert_close(diagonal.scores(q, k, log_decay), expected)
        for actual, wanted in zip(diagonal.scores_and_grads(q, k, log_decay, grad), (expected, dq, dk), strict=True):
            torch.testing.assert_close(actual, wanted)
