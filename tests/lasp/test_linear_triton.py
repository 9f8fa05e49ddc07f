"""linear_attention(impl="triton") over a cp_group, in Triton's interpreter, and its refusals."""

import importlib.util
from dataclasses import replace

import pytest
import torch

from lasp import linear_attention
from tests.lasp.linear_cases import GATES, PACKED, Case, known, worst

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("gate", GATES)
def test_the_kernels_serve_a_cut_sequence(ranks, gate, size):
    base = Case(gate, "zigzag", borders=PACKED, impl="triton", heads=(1, 1, 1, 1))
    cases = [base, replace(base, layout="contiguous", borders=(0, 61), heads=(2, 1, 2, 1))]
    if gate == "none":
        cases.append(replace(base, causal=False))
    for count, failures in ranks.run(worst, known(cases), 1e-5, size=size):
        assert count >= 14 and not failures, "\n".join(failures)


@pytest.mark.parametrize("gate", GATES)
def test_segments_that_states_enter_and_segments_that_begin_alternate(ranks, gate):
    """Ten documents of two halves on two ranks: five runs, one more than are computed during the exchange."""
    halves = [(5 * i, 5 * i + 5) for i in range(20)]
    fragments = tuple(tuple(h for i, h in enumerate(halves) if (i + i // 2) % 2 == rank) for rank in range(2))
    for borders in (tuple(range(0, 101, 10)), (0, 10, 20, 100))[: 2 if gate == "token" else 1]:
        case = Case(gate, borders=borders, fragments=fragments, impl="triton", heads=(1, 1, 1, 1), initial=False)
        for count, failures in ranks.run(worst, known([case]), 1e-5, size=2):
            assert count and not failures, "\n".join(failures)


def test_tensors_elsewhere_are_refused():
    x = torch.zeros(1, 4, 1, 8)
    with pytest.raises(ValueError, match="impl='triton' needs tensors on a CUDA device, got q on cpu"):
        linear_attention(x, x, x, impl="triton")
