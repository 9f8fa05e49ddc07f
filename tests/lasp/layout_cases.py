"""Layouts that distributed tests share, and tensors to cut by them."""

import random

import torch
from hypothesis import strategies as st

from lasp.layout import SequenceLayout

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
PACKED = (0, 5, 5, 6, 29, 41)  # an empty document, one of a single token, borders that no cut meets


def tiling(borders, size, fragments, seed):
    """Fragments of random lengths, dealt to ranks in random order."""
    rng = random.Random(seed)
    total = borders if isinstance(borders, int) else borders[-1]
    edges = [0, *sorted(rng.sample(range(1, total), fragments - 1)), total]
    owners = [*range(size), *(rng.randrange(size) for _ in range(fragments - size))]
    rng.shuffle(owners)
    pieces = list(zip(edges, edges[1:], owners, strict=False))
    rng.shuffle(pieces)
    owned = [[(a, b) for a, b, owner in pieces if owner == rank] for rank in range(size)]
    return SequenceLayout((0, total) if isinstance(borders, int) else borders, owned)


def layouts(size):
    """The layouts that every distributed test runs on."""
    return {
        "contiguous": SequenceLayout.contiguous(23, size),
        "zigzag": SequenceLayout.zigzag(37, size),
        "packed contiguous": SequenceLayout.contiguous(PACKED, size),
        "packed zigzag": SequenceLayout.zigzag(PACKED, size),
        "packed reordered": tiling(PACKED, size, 9, 1),
        "tiny fragments": tiling(27, size, 19, 2),
        "aligned documents": SequenceLayout.contiguous([0, *(7 * r + 7 for r in range(size))], size),
    }


@st.composite
def random_layouts(draw, max_size=4):
    size = draw(st.integers(1, max_size))
    total = draw(st.integers(size, 40))
    borders = (0, *sorted(draw(st.lists(st.integers(0, total), max_size=5))), total)
    fragments = draw(st.integers(size, min(total, 4 * size)))
    return tiling(borders, size, fragments, draw(st.integers(0, 10**6)))


def draw_tensors(seed, *shapes):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


@st.composite
def any_layouts(draw, max_ranks=4, max_tokens=40):
    """Any tiling of any documents: random cuts dealt to random ranks in random order."""
    total = draw(st.integers(max_ranks, max_tokens))
    borders = sorted(draw(st.lists(st.integers(0, total), max_size=6)))
    cp_size = draw(st.integers(1, max_ranks))
    count = draw(st.integers(cp_size, min(total, 2 * cp_size + 2)))
    cuts = sorted(draw(st.sets(st.integers(1, total - 1), min_size=count - 1, max_size=count - 1)))
    pieces = draw(st.permutations(list(zip([0, *cuts], [*cuts, total], strict=True))))
    owners = [*range(cp_size), *(draw(st.integers(0, cp_size - 1)) for _ in range(count - cp_size))]
    fragments = [[p for p, o in zip(pieces, owners, strict=True) if o == r] for r in range(cp_size)]
    return SequenceLayout((0, *borders, total), fragments)
