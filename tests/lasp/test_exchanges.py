"""Every exchange gives the outputs, final states and gradients of all_gather, over gloo ranks, with fewer messages."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from lasp.exchange import EXCHANGES
from tests.harness import RankPool
from tests.lasp.linear_cases import PACKED, Case, expected, matrix, results, special, worst

OTHERS = tuple(name for name in EXCHANGES if name != "all_gather")
NODES = {1: (0,), 2: (0, 1), 3: (0, 0, 1), 4: (0, 0, 0, 1), 5: (0, 1, 1, 1, 2), 6: (0, 0, 0, 0, 1, 1)}
NODES |= {7: (0, 0, 0, 1, 1, 2, 2), 8: (0, 0, 0, 1, 1, 1, 2, 2)}


@pytest.fixture(scope="module")
def eight():
    pool = RankPool(8)
    yield pool
    pool.close()


def apart(group, cases, names, tolerance):
    """How many values were compared with all_gather's, and one line for each that is further off than ``tolerance``."""
    count, lines = 0, []
    nodes = NODES[dist.get_world_size(group)]
    for case in cases:
        gathered, oracle = results(group, case), expected(case)
        for name in names:
            found = results(group, replace(case, exchange=name, nodes=nodes if name == "hierarchical" else None))
            assert found.keys() == gathered.keys()
            for key, value in found.items():
                count += 1
                scale = max(oracle[key].abs().max().item(), oracle["terms"].item() if key == "dg" else 0.0, 1e-30)
                error = (value - gathered[key]).abs().max().item() / scale if value.numel() else 0.0
                if not error <= tolerance:
                    lines.append(f"{name} {case.label} {key}: {error:.2e}")
    return count, lines


@pytest.mark.parametrize("size", [1, 2, 3, 5, 6, 7, 8])
def test_all_give_what_all_gather_gives(eight, size):
    cases = [
        Case("token", "zigzag", borders=PACKED),
        Case("channel", "contiguous", batch=2),
        Case("fixed", "uneven", borders=PACKED),
        Case("none", "zigzag", causal=False, borders=PACKED),
    ]
    for count, lines in eight.run(apart, cases, OTHERS, 1e-6, size=size):
        assert count > 80 and not lines, "\n".join(lines)


@pytest.mark.parametrize("name", OTHERS)
def test_every_gate_and_layout(ranks, name):
    cases = [c for c in matrix() + special() if c.borders[-1] < 900]
    for count, lines in ranks.run(apart, cases, (name,), 1e-6, size=4):
        assert count > 150 and not lines, "\n".join(lines)


@pytest.mark.parametrize("name", OTHERS)
def test_float64_is_exact_to_rounding(ranks, name):
    cases = [Case("channel", "uneven", borders=PACKED), Case("fixed", "zigzag"), Case("none", causal=False)]
    cases = [replace(c, dtype=torch.float64, exchange=name) for c in cases]
    for _, failures in ranks.run(worst, cases, 1e-12, size=3):
        assert not failures, "\n".join(failures)
