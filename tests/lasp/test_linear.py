"""linear_attention on one device, where cp = 1 runs the same code path, and its refusals."""

import re
from dataclasses import replace

import pytest
import torch

from lasp import CPContext, SequenceLayout, linear_attention
from lasp.kernels.reference import recurrence
from lasp.operators import _announce, has_triton, why_not_triton
from tests.harness import assert_close
from tests.lasp.linear_cases import GATES, PACKED, Case, known, matrix, special, worst, worst_in_small_tiles


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_one_device_equals_the_reference(dtype, tolerance):
    cases = known(replace(case, dtype=dtype) for case in matrix() + special())
    count, failures = worst(None, cases, tolerance)
    assert count > 200 and not failures, "\n".join(failures)


@pytest.mark.parametrize("chunks", [1, 2, 3])
def test_states_travel_through_many_tiles(chunks):
    cases = known(replace(case, dtype=torch.float64) for case in matrix() + special())
    count, failures = worst_in_small_tiles(None, cases, 1e-12, chunks)
    assert count > 200 and not failures, "\n".join(failures)


@pytest.mark.parametrize("gate", ["fixed", "token", "channel"])
def test_nothing_is_left_of_what_came_before_a_full_reset(gate):
    q, k, v = (torch.randn(1, 200, 2, 16) for _ in range(3))
    shape = {"fixed": (2,), "token": (1, 200, 2), "channel": (1, 200, 2, 16)}[gate]
    g = torch.full(shape, -torch.inf if gate == "fixed" else -0.01)
    if gate != "fixed":
        g[:, 70] = -torch.inf
    o, final = linear_attention(q, k, v, g, output_final_state=True)
    v[:, :70] = 1e30
    again, final_again = linear_attention(q, k, v, g, output_final_state=True)
    assert torch.equal(o[:, 70:], again[:, 70:]) and torch.equal(final, final_again)


@pytest.mark.parametrize("gate", ["fixed", "token", "channel"])
def test_strong_decay_keeps_the_accuracy_of_weak_decay(gate):
    # chunks differ, so the budget is the error of the same op at weak decay, times a small factor
    case = Case(gate, borders=(0, 130, 300), key_dim=16, value_dim=16)
    weak = worst(None, known([case]), 0.0)[1]
    budget = 4 * max(float(line.rsplit(" ", 1)[1]) for line in weak)
    assert budget < 1e-5
    for strength in (10.0, 100.0, 3000.0):
        _, failures = worst(None, known([replace(case, strength=strength)]), budget)
        assert not failures, "\n".join(failures)


@pytest.mark.parametrize("gate", ["fixed", "token", "channel"])
def test_a_gate_of_minus_infinity_starts_afresh(gate):
    x = Case(gate, borders=(0, 100)).inputs()
    q, k, v, g = (x[n] for n in "qkvg")
    if gate == "fixed":
        g[0] = -torch.inf
        o, _ = linear_attention(q, k, v, g)
        assert_close("o", o[:, :, 0], recurrence(q, k, v, g)[0][:, :, 0], 1e-12)
        return
    g[:, 70] = -torch.inf
    leaf = g.clone().requires_grad_()
    o, final = linear_attention(q, k, v, leaf, output_final_state=True)
    o.sum().backward()
    alone, alone_final = recurrence(*(t[:, 70:] for t in (q, k, v, g)))
    assert_close("o", o[:, 70:], alone, 1e-12)
    assert_close("final_state", final, alone_final, 1e-12)
    assert leaf.grad.isfinite().all()


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("borders", [(0, 200), (0, 67, 200)])
def test_no_output_depends_on_a_later_token_and_all_depend_on_earlier_ones(gate, borders):
    x = Case(gate, borders=borders, strength=0.01).inputs()
    cp = CPContext.local(borders)
    run = lambda v: linear_attention(x["q"], x["k"], v, x["g"], cp=cp)[0]  # noqa: E731
    before = run(x["v"])
    for t in (0, 63, 64, 66, 67, 130, 199):
        v = x["v"].clone()
        v[:, t] += 1.0
        changed = (run(v) != before).flatten(2).any(-1)[0]
        end = next(b for b in borders if b > t)
        assert changed.tolist() == [t <= i < end for i in range(200)]


def test_bf16_inputs_cost_no_more_than_their_own_rounding():
    case = replace(Case("token", borders=PACKED), dtype=torch.bfloat16)
    x = case.inputs()
    o, _ = linear_attention(*(x[n].bfloat16() for n in "qkvg"), cp=CPContext.local(PACKED))
    exact = recurrence(*(x[n] for n in "qkvg"), cu_seqlens=PACKED)[0]
    assert o.dtype == torch.bfloat16
    rounding = (exact.bfloat16().double() - exact).abs().max()  # of storing the exact answer
    assert (o.double() - exact).abs().max() <= 1.01 * rounding + 1e-6


def test_tf32_and_autocast_settings_of_the_caller_do_not_leak_in():
    x = Case("token", key_dim=32, value_dim=32).inputs()
    q, k, v, g = (x[n].float() for n in "qkvg")
    expected = linear_attention(q, k, v, g)[0]
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(linear_attention(q, k, v, g)[0], expected)
    finally:
        torch.set_float32_matmul_precision(before)


def test_states_hand_over_between_calls_like_one_long_call():
    x = Case("token", borders=(0, 100)).inputs()
    q, k, v, g = (x[n] for n in "qkvg")
    whole, final = linear_attention(q, k, v, g, output_final_state=True)
    first, state = linear_attention(*(t[:, :37] for t in (q, k, v, g)), output_final_state=True)
    second, last = linear_attention(*(t[:, 37:] for t in (q, k, v, g)), initial_state=state, output_final_state=True)
    assert_close("o", torch.cat([first, second], 1), whole, 1e-13)
    assert_close("final_state", last, final, 1e-13)


def test_saved_memory_is_the_inputs_and_a_sliver_of_states():
    q, k, v = (torch.randn(1, 8192, 2, 64, requires_grad=True) for _ in range(3))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        linear_attention(q, k, v, -torch.rand(1, 8192, 2))
    inputs = sum(t.numel() for t in (q, k, v)) + 8192 * 2
    assert sum(t.numel() for t in saved) <= 1.1 * inputs


def test_the_reference_implementation_is_selectable_and_agrees():
    x = Case("channel", borders=PACKED).inputs()
    cp = CPContext.local(PACKED)
    call = lambda impl: linear_attention(*(x[n] for n in "qkvg"), cp=cp, impl=impl, output_final_state=True)  # noqa: E731
    for actual, wanted in zip(call("torch"), call("reference"), strict=True):
        assert_close("o", actual, wanted, 1e-12)


def test_the_reference_implementation_takes_bf16_with_fp32_gates_and_states():
    q = torch.randn(1, 8, 2, 4).bfloat16()
    g, state = -torch.rand(1, 8, 2), torch.randn(1, 2, 4, 4)
    both = [
        linear_attention(q, q, q, g, initial_state=state, output_final_state=True, impl=i)
        for i in ("reference", "torch")
    ]
    for o, final in both:
        assert (o.dtype, final.dtype) == (torch.bfloat16, torch.float32)
    assert_close("final_state", both[1][1], both[0][1], 1e-6)


def test_an_input_changed_in_place_before_backward_is_caught():
    q, k, v = (torch.randn(1, 8, 1, 4, requires_grad=True) for _ in range(3))
    shifted = k + 0
    o, _ = linear_attention(q, shifted, v)
    shifted.detach().add_(1.0)
    shifted.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        o.sum().backward()


def test_a_caller_may_change_the_final_state_in_place():
    q, initial = torch.randn(1, 8, 2, 4, requires_grad=True), torch.randn(1, 2, 4, 4, requires_grad=True)
    grads = []
    for change in (lambda x: x * 2, lambda x: x.mul_(2)):
        o, state = linear_attention(q, q, q, initial_state=initial, output_final_state=True)
        grads.append(torch.autograd.grad(o.sum() + change(state).sum(), (q, initial)))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_auto_says_once_what_it_chose(caplog):
    _announce.cache_clear()
    q = torch.zeros(1, 4, 1, 2)
    with caplog.at_level("INFO", "lasp"):
        linear_attention(q, q, q)
        linear_attention(q, q, q)
    (record,) = caplog.records
    said = "linear_attention: impl='auto' chose 'torch' on cpu: the kernels are for CUDA devices"
    assert record.getMessage() == said


@pytest.mark.parametrize(
    ("capability", "dtype", "dims", "why"),
    [
        ((9, 0), torch.bfloat16, (128, 256), "^$"),
        ((8, 0), torch.float32, (1, 16), "^$"),
        ((7, 5), torch.float16, (128, 128), "Tesla T4 has no compute capability 8.0"),
        (
            (9, 0),
            torch.float64,
            (64, 64),
            "the kernels take q, k, v in bfloat16, float16 or float32, got torch.float64",
        ),
        ((9, 0), torch.bfloat16, (64, 257), "the kernels take head dims up to 256, got V = 257"),
    ],
)
def test_auto_takes_the_kernels_wherever_they_serve_on_cuda(monkeypatch, capability, dtype, dims, why):
    if not has_triton():
        pytest.skip("needs triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    assert re.search(why, why_not_triton.__wrapped__(torch.device("cuda"), dtype, *dims))


def test_auto_does_without_triton_where_it_is_not_installed(monkeypatch):
    monkeypatch.setattr("lasp.operators.has_triton", lambda: False)
    assert "not installed" in why_not_triton.__wrapped__(torch.device("cuda"), torch.bfloat16, 64, 64)


def bad(**changes):
    x = {"q": torch.zeros(1, 8, 2, 4), "k": torch.zeros(1, 8, 2, 4), "v": torch.zeros(1, 8, 2, 6)}
    return linear_attention(**{**x, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.zeros(8, 2, 4)}, r"q must be \[B, T, H, D\], got shape \(8, 2, 4\)"),
        ({"k": torch.zeros(1, 8, 2, 5)}, r"q and k must have the same head dim K: 4 and 5"),
        ({"k": torch.zeros(1, 7, 2, 4)}, r"k must hold the 8 tokens of cp rank 0.*got 7"),
        ({"k": torch.zeros(2, 8, 2, 4)}, r"k must have q's batch size 1, got 2"),
        ({"v": torch.zeros(1, 8, 2, 6, dtype=torch.float64)}, r"v must have q's dtype and device.*float64"),
        ({"q": torch.zeros(1, 8, 2, 4, dtype=torch.int64)}, r"q must be a tensor of a floating dtype, got torch.int64"),
        ({"v": torch.zeros(1, 8, 3, 6)}, r"head count of q must divide the largest one: 2 does not divide 3"),
        ({"g": torch.zeros(1, 8, 2) + 0.5}, r"log-decay, <= 0 everywhere, got a maximum of 0\.5"),
        ({"g": torch.zeros(8, 2)}, r"g must be \[H\], \[B, T, H\] or \[B, T, H, K\]"),
        ({"g": torch.zeros(1, 8, 2, 6)}, r"g must be \[H\], \[B, T, H\] or \[B, T, H, K\]"),
        ({"g": torch.zeros(1, 8, 2), "causal": False}, r"causal=False takes no g"),
        ({"initial_state": torch.zeros(1, 2, 4, 6), "causal": False}, r"causal=False has no running state"),
        ({"output_final_state": True, "causal": False}, r"causal=False has no running state"),
        ({"initial_state": torch.zeros(1, 2, 6, 4)}, r"initial_state must be \(1, 2, 4, 6\).*got \(1, 2, 6, 4\)"),
        ({"beta": torch.zeros(1, 8, 2)}, r"beta .* has no operator yet"),
        ({"q": None}, r"q must be a tensor of a floating dtype, got NoneType"),
        ({"g": [0.0, 0.0]}, r"g must be a tensor of a floating dtype, got list"),
        ({"v": torch.zeros(1, 8, 2, 0)}, r"v must have no empty dimension, got shape \(1, 8, 2, 0\)"),
        ({"v": torch.zeros(1, 8, 2, 6, dtype=torch.float8_e5m2)}, r"got torch.float8_e5m2. Pass float64, float32, bf"),
        ({"scale": float("nan")}, r"scale must be a finite number or None, got nan"),
        ({"scale": True}, r"scale must be a finite number or None, got True"),
        ({"cp": SequenceLayout.contiguous(8, 1)}, r"cp must be a CPContext or None, got SequenceLayout"),
        ({"impl": "cuda"}, r"impl must be one of .*got 'cuda'"),
        ({"cp": CPContext.local((0, 3, 9))}, r"q must hold the 9 tokens of cp rank 0.*got 8"),
    ],
)  # fmt: skip
def test_bad_input_names_the_argument_the_rule_and_the_values(changes, message):
    with pytest.raises(ValueError, match=message):
        bad(**changes)


def test_packed_documents_need_one_row():
    q = torch.zeros(2, 8, 1, 4)
    with pytest.raises(ValueError, match=r"B = 1 when the layout packs more than one document: B = 2, 2 documents"):
        linear_attention(q, q, q, cp=CPContext.local((0, 3, 8)))


def test_any_tiling_of_one_rank_is_followed():
    fragments = [((40, 61), (0, 17), (17, 40))]
    case = Case("channel", borders=PACKED)
    layout = SequenceLayout(PACKED, fragments)
    x = case.inputs()
    local = [layout.shard(x[n], 0) for n in "qkvg"]
    o, _ = linear_attention(*local, cp=CPContext.local(layout))
    assert_close("o", layout.unshard([o]), recurrence(*(x[n] for n in "qkvg"), cu_seqlens=PACKED)[0], 1e-12)
