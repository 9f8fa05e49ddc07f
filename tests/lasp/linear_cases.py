"""Cases of linear_attention against the token-by-token reference in float64, run on every rank of a group.

The reference knows no ranks: its values are made once per input, in the test's process, and go to the ranks beside the
case (:func:`known`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache
from unittest import mock

import numpy as np
import torch

from lasp import CPContext, SequenceLayout, linear_attention
from lasp.kernels.reference import recurrence
from lasp.kernels.torch_linear import operator as chunked

PACKED = (0, 13, 13, 14, 40, 61)  # an empty document, a one-token document, cuts that no chunk or rank respects
GATES = ("none", "fixed", "token", "channel")


@dataclass(frozen=True)
class Case:
    """One call of linear_attention: everything is made from it and a seed, equally on all ranks."""

    gate: str = "none"
    layout: str = "contiguous"
    borders: tuple[int, ...] = (0, 61)
    batch: int = 1
    heads: tuple[int, int, int, int] = (2, 2, 2, 2)  # of q, k, v, g
    key_dim: int = 5
    value_dim: int = 7
    initial: bool = True
    causal: bool = True
    strength: float = 1.0
    dtype: torch.dtype = torch.float32
    fragments: tuple = ()
    impl: str = "auto"
    seed: int = 0
    exchange: str = "all_gather"
    nodes: tuple[int, ...] | None = None

    def make_layout(self, cp_size: int) -> SequenceLayout:
        if self.fragments:
            return SequenceLayout(self.borders, self.fragments)
        if self.layout != "uneven":
            return getattr(SequenceLayout, self.layout)(self.borders, cp_size)
        total = self.borders[-1]  # 2 * cp_size - 1 pieces of growing length, dealt out backwards
        count = 2 * cp_size - 1
        cuts = [total * i * (i + 1) // (count * (count + 1)) for i in range(count + 1)]
        cuts = [max(c, i) for i, c in enumerate(cuts)]
        fragments = [[] for _ in range(cp_size)]
        for i, piece in enumerate(zip(cuts[:-1], cuts[1:], strict=True)):
            fragments[(count - i) % cp_size].insert(0, piece)
        return SequenceLayout(self.borders, fragments)

    def inputs(self) -> dict[str, torch.Tensor | None]:
        """Global float64 inputs, and upstream gradients ``do``, ``ds``."""
        generator = torch.Generator().manual_seed(self.seed)
        randn = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
        hq, hk, hv, hg = self.heads
        heads, total, documents = max(self.heads), self.borders[-1], len(self.borders) - 1
        rows = documents if documents > 1 else self.batch
        shapes = {"fixed": (hg,), "token": (self.batch, total, hg), "channel": (self.batch, total, hg, self.key_dim)}
        state = (rows, heads, self.key_dim, self.value_dim)
        x = {
            "q": randn(self.batch, total, hq, self.key_dim),
            "k": randn(self.batch, total, hk, self.key_dim),
            "v": randn(self.batch, total, hv, self.value_dim),
            "g": None,
            "initial_state": randn(*state) if self.initial and self.causal else None,
        }
        if self.gate != "none":
            x["g"] = self.strength * torch.nn.functional.logsigmoid(randn(*shapes[self.gate]))
        x["do"], x["ds"] = randn(self.batch, total, heads, self.value_dim), randn(*state)
        # what fp32 sees is what the oracle sees
        return {name: None if t is None else t.to(self.dtype).double() for name, t in x.items()}

    @property
    def label(self) -> str:
        packed = "packed" if len(self.borders) > 2 else f"B={self.batch}"
        return f"{self.gate}/{self.layout}/{packed}/heads={self.heads}/causal={self.causal}"


Values = dict[str, np.ndarray]


def known(cases: Iterable[Case]) -> list[tuple[Case, Values]]:
    """Each case with what the reference makes of its input, float64."""
    anywhere = {"layout": "contiguous", "fragments": (), "impl": "auto", "exchange": "all_gather", "nodes": None}
    return [(case, _reference(replace(case, **anywhere))) for case in cases]


@cache
def _reference(case: Case) -> Values:
    return {name: t.detach().numpy() for name, t in expected(case).items()}


def expected(case: Case) -> dict[str, torch.Tensor]:
    """Outputs and all gradients by the reference, and ``terms``: the size of what cancels in the gate's gradient."""
    x = case.inputs()
    leaves = {n: t.requires_grad_() for n, t in x.items() if t is not None and n not in ("do", "ds")}
    tokens_g = x["g"]
    if case.gate == "fixed":  # per-token copies, whose sum is the gradient
        tokens_g = x["g"].expand(case.batch, case.borders[-1], -1).detach().clone().requires_grad_()
    o, final = recurrence(
        x["q"], x["k"], x["v"], tokens_g, cu_seqlens=case.borders, causal=case.causal, initial_state=x["initial_state"]
    )
    loss = (o * x["do"]).sum() + ((final * x["ds"]).sum() if case.causal else 0.0)
    loss.backward()
    out = {"o": o.detach(), **{"d" + n: t.grad for n, t in leaves.items()}}
    if case.causal:
        out["final_state"] = final.detach()
    if x["g"] is not None:  # dg sums q dq - k dk; for a fixed gate over the tokens as well
        products = [(x[n] * out["d" + n]).sum(-1).abs() for n in "qk"]
        out["terms"] = max(p.sum((0, 1)).max() if case.gate == "fixed" else p.max() for p in products) * max(case.heads)
    if case.gate == "fixed":
        out["dg"] = tokens_g.grad.sum((0, 1))
    return out


PER_TOKEN = {"q", "k", "v", "do"}


def _per_token(case: Case) -> set[str]:
    return PER_TOKEN | ({"g"} if case.gate in ("token", "channel") else set())


def results(group, case: Case, device: str = "cpu") -> dict[str, torch.Tensor]:
    """This rank's part of every output and gradient in float64; shares of replicated values are summed."""
    size = torch.distributed.get_world_size(group) if group is not None else 1
    layout = case.make_layout(size)
    local_cp = CPContext.local(layout) if group is None else None
    cp = local_cp or CPContext(layout, group, case.exchange, nodes=case.nodes)
    x, local = case.inputs(), {}
    for name, t in x.items():
        if t is not None:
            t = layout.shard(t, cp.cp_rank) if name in _per_token(case) else t
            dtype = case.dtype if name != "ds" else torch.promote_types(case.dtype, torch.float32)
            local[name] = t.to(device, dtype).requires_grad_(name not in ("do", "ds"))
    states = local.get("initial_state")
    o, final = linear_attention(
        local["q"], local["k"], local["v"], local.get("g"), cp=cp, causal=case.causal, initial_state=states,
        output_final_state=case.causal, impl=case.impl,
    )  # fmt: skip
    assert o.dtype == case.dtype
    loss = (o * local["do"]).sum()
    if case.causal:
        loss = loss + (final * local["ds"]).sum() * (cp.cp_rank + 1) / sum(range(1, size + 1))  # uneven shares
    loss.backward()
    actual = {"o": o, **{"d" + n: t.grad for n, t in local.items() if t.requires_grad}}
    if case.causal:
        actual["final_state"] = final
    for name, value in actual.items():
        value = value.detach().double()  # on the device still: shares are summed there
        shared = name in ("dg", "dinitial_state") and name[1:] not in _per_token(case)
        if shared and group is not None and size > 1:
            torch.distributed.all_reduce(value, group=group)
        actual[name] = value.cpu()
    return actual


def errors(group, case: Case, want: Values, device: str = "cpu") -> dict[str, float]:
    """Relative error of this rank's part of every output and gradient."""
    size = torch.distributed.get_world_size(group) if group is not None else 1
    rank = torch.distributed.get_rank(group) if group is not None else 0
    layout, result = case.make_layout(size), {}
    for name, value in results(group, case, device).items():
        target = torch.from_numpy(want[name])
        if name[1:] in _per_token(case) or name == "o":
            target = layout.shard(target, rank)
        assert value.shape == target.shape, f"{case.label} {name}: {tuple(value.shape)} is not {tuple(target.shape)}"
        difference = (value - target).abs()
        result[name] = (difference.max().item() if value.numel() else 0.0) / scale(name, want)
        assert not difference.isnan().any(), f"{case.label} {name}: NaN"
    return result


def scale(name: str, want: Values) -> float:
    """What an error of this value is relative to: its largest entry, for dg what cancels in it if that is larger."""
    return max(np.abs(want[name]).max(), want["terms"] if name == "dg" else 0.0, 1e-30)


def worst(group, cases: list[tuple[Case, Values]], tolerance: float, device: str = "cpu") -> tuple[int, list[str]]:
    """How many values were compared, and one line for each that is off by more than ``tolerance``."""
    count, lines = 0, []
    for case, want in cases:
        for name, error in errors(group, case, want, device).items():
            count += 1
            if not error <= tolerance:
                lines.append(f"{case.label} {name}: {error:.2e}")
    return count, lines


def worst_in_small_tiles(group, cases, tolerance: float, chunks: int) -> tuple[int, list[str]]:
    """:func:`worst` with so few chunks per tile that short sequences have many tiles, as long ones do."""
    with mock.patch.object(chunked, "_TILE_CHUNKS", (chunks, chunks)):
        return worst(group, cases, tolerance)


def matrix(gates=GATES, layouts=("contiguous", "zigzag", "uneven")) -> list[Case]:
    """Every gate x every layout x {packed, unpacked with B > 1}."""
    cases = []
    for gate in gates:
        for layout in layouts:
            cases.append(Case(gate, layout, borders=PACKED))
            cases.append(Case(gate, layout, batch=2))
    return cases


def special() -> list[Case]:
    """Grouped heads, no states, bidirectional, one token per rank, many chunks."""
    base = Case("token", "zigzag", borders=PACKED)
    return [
        replace(base, heads=(4, 2, 1, 4)),
        replace(base, heads=(1, 1, 4, 2), gate="channel"),
        replace(base, heads=(2, 4, 2, 1), gate="fixed", batch=2, borders=(0, 61)),
        replace(base, heads=(1, 4, 2, 2), gate="fixed"),
        replace(base, initial=False),
        Case("none", "contiguous", borders=PACKED, causal=False),
        Case("none", "uneven", batch=2, causal=False, heads=(4, 2, 2, 4)),
        Case("none", "zigzag", borders=(0, 30, 61), causal=False),
        Case("channel", "contiguous", borders=(0, 4)),
        Case("token", "zigzag", borders=(0, 211, 211, 997), heads=(1, 1, 1, 1), key_dim=16, value_dim=8),
        Case("channel", "contiguous", borders=(0, 997), heads=(1, 1, 1, 1), key_dim=16, value_dim=8),
    ]
