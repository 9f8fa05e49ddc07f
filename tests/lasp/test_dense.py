"""A dense transition travels whole: through exchanges, initial and final states, forward and backward."""

import pytest
import torch
import torch.distributed as dist

from lasp import CPContext, SequenceLayout, linear_attention
from lasp.exchange import EXCHANGES
from lasp.kernels.reference import recurrence
from lasp.linear import run_stages
from tests.lasp import dense_operator

BORDERS = (0, 5, 5, 31, 40)  # one document is empty
PER_TOKEN = ("q", "k", "v", "g", "beta", "do")


def inputs(gate: str, borders: tuple[int, ...], initial: bool) -> dict[str, torch.Tensor | None]:
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    documents, total, heads, key_dim, value_dim = len(borders) - 1, borders[-1], 2, 4, 3
    x = {"q": draw(1, total, heads, key_dim), "k": draw(1, total, 1, key_dim), "v": draw(1, total, heads, value_dim)}
    x["k"] = torch.nn.functional.normalize(x["k"], dim=-1)
    g = {"none": None, "fixed": (heads,), "token": (1, total, heads), "channel": (1, total, heads, key_dim)}[gate]
    x["g"] = None if g is None else torch.nn.functional.logsigmoid(draw(*g))
    x["beta"] = 2 * torch.sigmoid(draw(1, total, 1))
    x["initial_state"] = draw(documents, heads, key_dim, value_dim) if initial else None
    x["do"], x["ds"] = draw(1, total, heads, value_dim), draw(documents, heads, key_dim, value_dim)
    return x


def gradients(o, final, x) -> dict[str, torch.Tensor]:
    leaves = {n: t for n, t in x.items() if n not in ("do", "ds") and t is not None}
    loss = (o * x["do"]).sum() + (final * x["ds"]).sum()
    grads = torch.autograd.grad(loss, list(leaves.values()))
    return {"o": o.detach(), "final": final.detach(), **{"d" + n: t for n, t in zip(leaves, grads, strict=True)}}


def compare(group, cases, exchange) -> list[str]:
    """What differs from the reference, on this rank."""
    size, rank, lines = dist.get_world_size(group), dist.get_rank(group), []
    for gate, kind, initial in cases:
        layout = getattr(SequenceLayout, kind)(BORDERS, size)
        nodes = [r // 2 for r in range(size)] if exchange == "hierarchical" else None
        cp = CPContext(layout, group, exchange, nodes=nodes)
        x = {n: None if t is None else t.requires_grad_() for n, t in inputs(gate, BORDERS, initial).items()}
        tokens = {n: x[n] for n in ("q", "k", "v", "g", "beta", "initial_state")}
        wanted = gradients(*recurrence(**tokens, cu_seqlens=BORDERS, scale=0.5), x)
        shared = [n for n in x if n not in PER_TOKEN or (n == "g" and gate == "fixed")]
        own = {
            n: t if t is None or n in shared else layout.shard(t.detach(), rank).requires_grad_() for n, t in x.items()
        }
        own["ds"] = x["ds"].detach() * (rank + 1) / sum(range(1, size + 1))  # shares whose sum is the gradient
        o, final = run_stages(
            dense_operator, *(own[n] for n in ("q", "k", "v", "g", "beta", "initial_state")), cp, True, 0.5, True
        )
        for name, value in gradients(o, final, own).items():
            if name[1:] in shared:
                dist.all_reduce(value, group=group)
            target = wanted[name]
            target = target if name == "final" or name[1:] in shared else layout.shard(target, rank)
            error = ((value - target).abs().max() / wanted[name].abs().max()).item()
            if not error < 1e-12:
                lines.append(f"{exchange} {gate} {kind} initial={initial} {name}: {error:.1e}")
    return lines


CASES = [
    ("none", "contiguous", True),
    ("token", "zigzag", True),
    ("channel", "zigzag", False),
    ("fixed", "contiguous", True),
]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_dense_operator_gives_what_the_reference_gives(ranks, size):
    for lines in ranks.run(compare, CASES, "all_gather", size=size):
        assert not lines, "\n".join(lines)


@pytest.mark.parametrize("exchange", [name for name in EXCHANGES if name != "all_gather"])
def test_dense_transitions_go_through_every_exchange(ranks, exchange):
    for lines in ranks.run(compare, CASES[:2], exchange, size=4):
        assert not lines, "\n".join(lines)


def test_the_public_function_refuses_beta():
    x = torch.zeros(1, 4, 1, 2)
    with pytest.raises(ValueError, match="beta \\(the delta rule\\) has no operator yet"):
        linear_attention(x, x, x, beta=torch.ones(1, 4, 1))
