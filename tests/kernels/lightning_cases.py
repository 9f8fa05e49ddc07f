"""Cases of the Triton kernels, run in a process whose Triton interprets: against the reference in float64."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from unittest import mock

import torch

from lasp.kernels.operator import num_heads
from lasp.kernels.reference import recurrence
from lasp.kernels.segments import SegmentTable
from lasp.kernels.state import StateMap
from lasp.kernels.torch_linear import operator as chunked
from lasp.kernels.triton_linear import tiles as triton_tiles
from lasp.kernels.triton_linear.tiles import KERNELS, Plan, Tile
from tests.kernels.bf16_interpreter import bf16_rounds_as_on_a_gpu


def small_plan(superchunk: int = 32):
    """Chunks of 16 tokens and few of them in a superchunk: short sequences have many, as long ones do."""
    plan = Plan(16, superchunk, dict.fromkeys(KERNELS, Tile(16, 4, 2)))
    return mock.patch.object(triton_tiles, "plan", lambda *_: plan)


@dataclass(frozen=True)
class Case:
    """One forward and backward; every segment is a document of its own, its entry state the initial state."""

    gate: str
    borders: tuple[int, ...] = (0, 75)
    batch: int = 1
    heads: tuple[int, int, int, int] = (1, 1, 1, 1)  # of q, k, v, g
    key_dim: int = 16
    value_dim: int = 24
    states: bool = True
    causal: bool = True
    strength: float = 1.0
    reset: int | None = None  # token with a decay of -inf
    chunk: int = 16
    superchunk: int = 32
    block: int = 16

    def inputs(self) -> dict[str, torch.Tensor | None]:
        generator = torch.Generator().manual_seed(0)
        randn = lambda *shape: torch.randn(*shape, generator=generator).double()  # noqa: E731
        hq, hk, hv, hg = self.heads
        heads, total, segments = max(self.heads), self.borders[-1], len(self.borders) - 1
        gates = {"fixed": (hg,), "token": (self.batch, total, hg), "channel": (self.batch, total, hg, self.key_dim)}
        state = (segments, self.batch, heads, self.key_dim, self.value_dim)
        x = {
            "q": randn(self.batch, total, hq, self.key_dim),
            "k": randn(self.batch, total, hk, self.key_dim),
            "v": randn(self.batch, total, hv, self.value_dim),
            "g": None,
            "do": randn(self.batch, total, heads, self.value_dim),
            "entry": randn(*state) if self.states else None,
            "d_exit": randn(*state) if self.states else None,
        }
        if self.gate != "none":
            x["g"] = (self.strength * torch.nn.functional.logsigmoid(randn(*gates[self.gate]))).float().double()
            if self.reset is not None:
                x["g"][:, self.reset] = -torch.inf
        return x


def expected(case: Case) -> dict[str, torch.Tensor]:
    """Outputs, states and gradients by the token-by-token reference."""
    x = case.inputs()
    segments = len(case.borders) - 1
    by_row = (lambda t: t.squeeze(1)) if segments > 1 else (lambda t: t.squeeze(0))
    leaves = {n: x[n].requires_grad_() for n in ("q", "k", "v", "g", "entry") if x[n] is not None}
    initial = None if x["entry"] is None else by_row(x["entry"])
    o, final = recurrence(
        *(x[n] for n in "qkvg"), cu_seqlens=case.borders, causal=case.causal, initial_state=initial
    )  # fmt: skip
    loss = (o * x["do"]).sum()
    if x["d_exit"] is not None:
        loss = loss + (final * by_row(x["d_exit"])).sum()
    loss.backward()
    out = {"o": o.detach(), **{"d" + n: t.grad for n, t in leaves.items()}}
    if case.causal:
        out["exits"] = final.detach().view(segments, case.batch, *final.shape[1:])
    # dg sums q dq - k dk, at strong decay nearly equal; for a fixed gate over the tokens as well, and to one value
    if x["g"] is not None and (case.strength > 1.0 or case.gate == "fixed"):
        products = [(x[n] * out["d" + n]).detach().sum(-1).abs() for n in "qk"]
        out["terms"] = max(p.sum((0, 1)).max() if case.gate == "fixed" else p.max() for p in products)
    return out


def actual(
    case: Case, operator=None, dtype: torch.dtype = torch.float32, device: str = "cpu", shipped: bool = False
) -> dict[str, torch.Tensor]:
    """The same by the stages of ``operator``: a module with Forward and Backward; ``shipped``: with its own tiles."""
    from lasp.kernels.triton_linear import operator as lightning

    operator = lightning if operator is None else operator
    states = dtype if dtype == torch.float64 else torch.float32
    x = {
        n: None if t is None else t.to(device, states if n in ("entry", "d_exit", "g") else dtype)
        for n, t in case.inputs().items()
    }
    table = SegmentTable(list(zip(case.borders, case.borders[1:])), torch.device(device))
    q, k, v, g = (x[n] for n in "qkvg")
    arguments = k, v, g, None, table, num_heads(q, k, v, g), case.causal, case.key_dim**-0.5
    tiles = {kernel: Tile(case.block, 4, 2) for kernel in KERNELS}
    plan = triton_tiles.plan if shipped else lambda *_: Plan(case.chunk, case.superchunk, tiles)
    with mock.patch.object(triton_tiles, "plan", plan):
        forward = operator.Forward(*arguments)
        maps = forward.state_maps()
        forward.local(q, None)
        entry = x["entry"] if case.causal else maps.state
        o, exits = forward.finish(entry)
        known = {"saved": forward.saved, "kept_gates": forward.kept_gates, "entry": entry, "needs_dg": True}
        after = StateMap(exits, maps.log_decay, maps.matrix)
        backward = operator.Backward(*arguments, q=q, do=x["do"], exits=after, needs_d_entry=True, **known)
        grads = backward.state_maps()
        backward.local()
        found = backward.finish(x["d_exit"] if case.causal else grads)
    return {"o": o, "exits": exits, "dq": found.dq, "dk": found.dk, "dv": found.dv, "dg": found.dg} | {
        "dentry": found.d_entry
    }


def errors(case: Case, operator=None, dtype: torch.dtype = torch.float32) -> dict[str, float]:
    """Largest error over the largest reference value; for dg over what cancels in it where much does, if larger."""
    want, found = expected(case), actual(case, operator, dtype)
    terms = want.pop("terms", torch.zeros(()))
    result = {}
    for name, target in want.items():
        value = found[name]
        assert value.shape == target.shape, f"{case} {name}: {tuple(value.shape)} is not {tuple(target.shape)}"
        assert value.dtype == dtype, f"{case} {name}: {value.dtype}"
        assert value.isfinite().all(), f"{case} {name}: not finite"
        scale = max(target.abs().max().item(), terms.item() if name == "dg" else 0.0, 1e-30)
        result[name] = (value.double() - target).abs().max().item() / scale
    return result


def compare(_group, cases: list[Case]) -> list[tuple[Case, dict[str, float]]]:
    """Errors of the Triton kernels for each case."""
    return [(case, errors(case)) for case in cases]


def compare_with_torch(_group, cases: list[Case]) -> list[tuple[dict[str, float], dict[str, float]]]:
    """Errors of the Triton kernels and of the PyTorch operator, both in fp32."""
    return [(errors(case), errors(case, chunked)) for case in cases]


def refusal(_group, dtype: torch.dtype, dim: int, scale: float) -> str:
    """The message of the ValueError that these inputs cause."""
    from lasp.kernels.triton_linear import operator as lightning

    x = torch.zeros(1, 4, 1, dim, dtype=dtype)
    try:
        lightning.Forward(x, x, None, None, SegmentTable([(0, 4)], x.device), 1, True, scale)
    except ValueError as error:
        return str(error)
    return ""


def saved_shapes(_group, gate: str, superchunk: int) -> list[tuple[int, ...]]:
    """Shapes that the forward keeps beside its inputs for 70 tokens, 2 heads, K = 16, V = 24."""
    from lasp.kernels.triton_linear import operator as lightning

    x = Case(gate, borders=(0, 70), heads=(2, 2, 2, 2)).inputs()
    q, k, v, g = (None if x[n] is None else x[n].float() for n in "qkvg")
    with small_plan(superchunk):
        forward = lightning.Forward(k, v, g, None, SegmentTable([(0, 70)], q.device), 2, True, 1.0)
        forward.state_maps(q=q)
        forward.finish(None)
    assert all(t.dtype == torch.float32 for t in forward.saved) and forward.kept_gates is None
    return [tuple(t.shape) for t in forward.saved]


def rounding(_group, case: Case, dtype: torch.dtype, device: str = "cpu", shipped: bool = False) -> dict[str, float]:
    """Relative L2 errors in a 16-bit dtype, against float64 on inputs that are rounded to it.

    dg is a sum of terms q dq and -k dk that cancel, so its error is relative to what as many independent errors add up
    to, if that is larger.
    """
    x = case.inputs()
    rounded = {n: t.to(dtype).double() if n in ("q", "k", "v", "do") else t for n, t in x.items()}
    with mock.patch.object(Case, "inputs", lambda _: dict(rounded)):
        exact = actual(case, chunked, torch.float64, device)
        with contextlib.nullcontext() if device == "cuda" else bf16_rounds_as_on_a_gpu():
            found = actual(case, None, dtype, device, shipped)
    sizes = {n: want.norm() for n, want in exact.items() if want is not None}
    if "dg" in sizes:
        first = torch.tensor(case.borders[:-1]).repeat_interleave(torch.tensor(case.borders).diff())
        earlier = 1.0 + torch.arange(case.borders[-1]) - first  # tokens whose dg a term belongs to
        weight = (earlier if case.gate == "fixed" else earlier.sqrt()).view(-1, 1, 1).to(device)
        terms = [(weight * rounded[n].to(device) * exact["d" + n]).norm() for n in "qk"]
        sizes["dg"] = max(sizes["dg"], *terms)
    return {n: ((found[n].double() - exact[n]).norm() / size).item() for n, size in sizes.items()}


def large_values(_group, gate: str, decay: float, sizes: tuple[float, float, float]) -> dict[str, float]:
    """Relative errors in fp16 where states, scores or weighted inputs exceed what fp16 holds and results do not."""
    from lasp import linear_attention

    torch.manual_seed(0)
    draw = (lambda *shape: torch.rand(*shape)) if sizes[2] > 1 else torch.randn
    q, k, v = ((draw(1, 150, 1, 16) * size).half().requires_grad_() for size in sizes)
    shapes = {"none": None, "token": (1, 150, 1), "channel": (1, 150, 1, 16)}
    g = None if gate == "none" else torch.full(shapes[gate], decay)
    do, scale = torch.randn(1, 150, 1, 16).half() * 1e-2, 1e-3
    o, _ = linear_attention(q, k, v, g, scale=scale, impl="triton")
    found = o, *torch.autograd.grad(o, (q, k, v), do)
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    want, _ = recurrence(*wide, None if g is None else g.double(), scale=scale)
    exact = want, *torch.autograd.grad(want, wide, do.double())
    return {n: ((x.double() - y).norm() / y.norm()).item() for n, x, y in zip(("o", "dq", "dk", "dv"), found, exact)}


def illegal_gates(_group, gate: str, value: float) -> tuple[int, int, bool]:
    """How many growing gates the kernels count: in all, and in the third superchunk of head 1; is o finite."""
    from lasp.kernels.triton_linear import operator as lightning

    x = Case(gate, heads=(2, 2, 2, 2)).inputs()
    q, k, v, g = (x[n].float() for n in "qkvg")
    g[:, 70, 1] = value
    with small_plan():
        forward = lightning.Forward(k, v, g, None, SegmentTable([(0, 75)], q.device), 2, True, 1.0)
        forward.state_maps(q=q)
        finite = forward.finish(None)[0].isfinite().all().item()
    return forward.illegal.sum().item(), forward.illegal[0, 1, 2].item(), finite


def replaced_too_early(_group) -> tuple[float, str]:
    """Difference after a first use in inference mode; the error of a backward whose layout is gone."""
    from lasp import CPContext, linear_attention

    x = torch.randn(1, 75, 1, 8).requires_grad_()
    cp = CPContext.local((0, 25, 75), replaceable=True)
    with small_plan():
        with torch.inference_mode():
            linear_attention(x, x, x, cp=cp, impl="triton", output_final_state=True)
        cp.replace_layout((0, 50, 75))
        o, _ = linear_attention(x, x, x, cp=cp, impl="triton")
        fresh, _ = linear_attention(x, x, x, cp=CPContext.local((0, 50, 75)), impl="triton")
        cp.replace_layout((0, 1, 75))
        try:
            o.sum().backward()
        except ValueError as error:
            return (o - fresh).abs().max().item(), str(error)
    return float("nan"), "no error"


def replaced_layout(_group, gate: str) -> list[dict[str, float]]:
    """Differences between a context whose layout was replaced and one made for it, for two layouts."""
    from lasp import CPContext, linear_attention

    generator = torch.Generator().manual_seed(0)
    shapes = {"fixed": (1,), "token": (1, 60, 1), "channel": (1, 60, 1, 8)}
    g = None if gate == "none" else -torch.rand(shapes[gate], generator=generator)
    q, k, v = (torch.randn(1, 60, 1, 8, generator=generator).requires_grad_() for _ in range(3))
    initial = torch.randn(3, 1, 8, 8, generator=generator)

    def run(cp):
        states = {"initial_state": initial, "output_final_state": True}
        o, final = linear_attention(q, k, v, g, cp=cp, impl="triton", **states)
        grads = torch.autograd.grad(o.square().sum() + final.square().sum(), [q, k, v])
        return {"o": o, "final": final, **dict(zip(("dq", "dk", "dv"), grads, strict=True))}

    cp, found = CPContext.local((0, 30, 58, 60), replaceable=True), []
    with small_plan():
        with torch.no_grad():
            linear_attention(q, k, v, g, cp=cp, impl="triton", output_final_state=True)
        places = {id(t): t.data_ptr() for t in _device_tables(cp)}
        for borders in ((0, 1, 2, 60), (0, 29, 58, 60)):
            cp.replace_layout(borders)
            assert {id(t): t.data_ptr() for t in _device_tables(cp)} == places
            ours, fresh = run(cp), run(CPContext.local(borders))
            found.append({n: (ours[n] - fresh[n]).abs().max().item() for n in fresh})
    return found


def _device_tables(cp) -> list[torch.Tensor]:
    """What a captured graph would read of the layout."""
    table = cp.segment_table(torch.device("cpu"))
    kept = [t for x in table.kept.values() for t in (x.pieces, x.segments, x.lengths)]
    return kept + [t for (_, dtype, _), t in cp.tables.numbers.items() if dtype == torch.float64]
