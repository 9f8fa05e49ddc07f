"""The Triton kernels in Triton's interpreter, in fp32 (its 16-bit products are wrong), against the reference."""

import importlib.util
from dataclasses import replace

import pytest
import torch

from lasp.kernels.triton_linear import tiles as triton_tiles

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")

GATES = ("none", "fixed", "token", "channel")
PACKED = (0, 13, 14, 40, 75)  # a segment of one token, cuts that no chunk respects
TOLERANCE = {"dg": 2e-5}  # the rest: 5e-6


def check(ranks, *cases):
    from tests.kernels.lightning_cases import compare

    for case, errors in ranks.run(compare, list(cases), size=1)[0]:
        for name, error in errors.items():
            assert error <= TOLERANCE.get(name, 5e-6), f"{case} {name}: {error:.2e}"


def make(gate, **options):
    from tests.kernels.lightning_cases import Case

    return Case(gate, **options)


@pytest.mark.parametrize("states", [False, True], ids=["no states", "states"])
@pytest.mark.parametrize("borders", [(0, 75), PACKED], ids=["dense", "packed"])
@pytest.mark.parametrize("gate", GATES)
def test_outputs_states_and_gradients_equal_the_reference(ranks, gate, borders, states):
    check(ranks, make(gate, borders=borders, states=states))


@pytest.mark.parametrize("gate", GATES)
def test_heads_share_and_rows_are_documents(ranks, gate):
    """Also those of a fixed gate, where one serves two neighbours of four."""
    base = make(gate, borders=(0, 37))
    check(
        ranks,
        replace(base, heads=(4, 2, 1, 2), strength=0.1),
        replace(base, borders=(0, 20), batch=2, heads=(1, 2, 2, 1)),
    )


@pytest.mark.parametrize("gate", GATES)
def test_short_sequences_and_widths_that_are_no_power_of_two(ranks, gate):
    base = make(gate)
    check(
        ranks,
        replace(base, borders=(0, 1)),
        replace(base, borders=(0, 1, 2, 3), key_dim=5, value_dim=7),
        replace(base, borders=(0, 20), key_dim=40, value_dim=16, block=32),
    )


@pytest.mark.parametrize("gate", GATES)
def test_the_shipped_chunk(ranks, gate):
    sizes = {"key_dim": 64, "value_dim": 32, "block": 32, "chunk": 64, "superchunk": 128}
    check(ranks, make(gate, borders=(0, 150), strength=0.2, **sizes))


def test_channels_that_decay_little_and_much_side_by_side(ranks):
    for strength in (0.05, 0.5):  # one reference per chunk serves: all; some superchunks
        check(ranks, make("channel", borders=PACKED, strength=strength))


def test_every_token_reads_its_whole_document_without_an_order(ranks):
    base = make("none", causal=False, states=False, borders=PACKED)
    check(ranks, base, replace(base, borders=(0, 37), batch=2, heads=(1, 2, 1, 2)))


@pytest.mark.parametrize("gate", ["fixed", "token", "channel"])
def test_strong_decay_costs_no_more_than_in_pytorch(ranks, gate):
    from tests.kernels.lightning_cases import compare_with_torch

    cases = [make(gate, borders=(0, 45), strength=strength) for strength in (10.0, 100.0, 3000.0)]
    for case, (ours, theirs) in zip(cases, ranks.run(compare_with_torch, cases, size=1)[0]):
        for name, error in ours.items():
            assert error <= max(4 * theirs[name], 5e-6), f"{case} {name}: {error:.1e}, in PyTorch {theirs[name]:.1e}"


@pytest.mark.parametrize("gate", ["token", "channel"])
def test_a_decay_of_minus_infinity_starts_afresh(ranks, gate):
    from tests.kernels.lightning_cases import compare

    (_, errors) = ranks.run(compare, [make(gate, reset=40, states=False)], size=1)[0][0]
    assert max(e for n, e in errors.items() if n != "dg") <= 5e-6, errors


@pytest.mark.parametrize(
    ("dtype", "dim", "message"),
    [
        (torch.float64, 16, "impl='triton' takes q, k, v in bfloat16, float16 or float32, got torch.float64"),
        (torch.float32, 257, "impl='triton' takes head dims up to 256, got K = 257"),
        (torch.float32, 16, "impl='triton' takes a scale of 0 or of 1e-30 and more in size, got -1e-39"),
    ],
)
def test_what_the_kernels_cannot_serve_is_refused(ranks, dtype, dim, message):
    from tests.kernels.lightning_cases import refusal

    assert ranks.run(refusal, dtype, dim, -1e-39, size=1)[0].startswith(message)


@pytest.mark.parametrize("gate", GATES)
def test_the_backward_keeps_a_sliver_of_one_input(ranks, gate):
    from tests.kernels.lightning_cases import saved_shapes

    assert ranks.run(saved_shapes, gate, 32, size=1)[0] == [(2, 3, 16, 24)]  # a state for each superchunk
    heads, dim = 16, 128
    for length in (1 << 16, 1 << 18, 1 << 20):
        superchunk = triton_tiles.superchunk(GATES.index(gate), heads * length)
        saved = length // superchunk * heads * dim * dim * 4
        assert saved <= 0.3 * length * heads * dim * 2  # of one bf16 input


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("gate", GATES)
def test_sixteen_bits_cost_about_one_rounding(ranks, gate, dtype):
    """Each rounding to nearest costs eps / sqrt(12), and no result sees more than four independent ones."""
    from tests.kernels.lightning_cases import rounding

    # the second strength needs the slow path for channels, and weights in fp16 end at 6e-8
    for strength in (0.1, 20.0 if dtype == torch.bfloat16 else 5.0):
        case = make(gate, borders=PACKED, key_dim=32, value_dim=32, strength=strength)
        for name, error in ranks.run(rounding, case, dtype, size=1)[0].items():
            assert error <= 4**0.5 * 12**-0.5 * torch.finfo(dtype).eps, f"{case} {name}: {error:.1e}"


@pytest.mark.parametrize(
    ("gate", "g", "sizes"),
    [
        ("none", 0.0, (1.0, 300.0, 60.0)),  # states beyond 65504
        ("token", -1e-3, (1.0, 300.0, 60.0)),
        ("channel", -1e-3, (1.0, 300.0, 60.0)),
        ("channel", -0.2, (1.0, 300.0, 1.0)),  # k, or q, beyond it relative to the middle of a chunk
        ("channel", -0.2, (100.0, 1.0, 1.0)),
        ("channel", -0.2, (64.0, 64.0, 1.0)),
    ],
)
def test_what_leaves_the_range_of_fp16_on_the_way_serves_it(ranks, gate, g, sizes):
    from tests.kernels.lightning_cases import large_values

    for name, error in ranks.run(large_values, gate, g, sizes, size=1)[0].items():
        assert error <= 2 * torch.finfo(torch.float16).eps, f"{name}: {error:.1e}"


@pytest.mark.parametrize(("gate", "count"), [("token", 1), ("channel", 16)])
def test_growing_gates_are_counted_where_they_are_read_and_nan_goes_through(ranks, gate, count):
    from tests.kernels.lightning_cases import illegal_gates

    assert ranks.run(illegal_gates, gate, 0.5, size=1)[0] == (count, count, True)
    assert ranks.run(illegal_gates, gate, float("nan"), size=1)[0] == (0, 0, False)


@pytest.mark.parametrize("gate", GATES)
def test_another_layout_takes_the_place_of_the_first(ranks, gate):
    from tests.kernels.lightning_cases import replaced_layout

    for differences in ranks.run(replaced_layout, gate, size=1)[0]:
        assert max(differences.values()) == 0.0, differences


def test_a_layout_may_be_replaced_after_inference_and_not_before_the_backward(ranks):
    from tests.kernels.lightning_cases import replaced_too_early

    difference, message = ranks.run(replaced_too_early, size=1)[0]
    assert difference == 0.0 and message.startswith("the layout of cp was replaced between forward and backward")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestOnGPU:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
    @pytest.mark.parametrize("dim", [64, 128, 256])
    @pytest.mark.parametrize("gate", GATES)
    def test_the_shipped_tiles_round_like_their_inputs(self, gate, dim, dtype):
        from tests.kernels.lightning_cases import rounding

        for strength in (0.1, 6.0):  # the second needs the slow path for channels
            sizes = {"key_dim": dim, "value_dim": dim, "heads": (4, 2, 2, 4), "strength": strength}
            case = make(gate, borders=(0, 700, 701, 3000), **sizes)
            for name, error in rounding(None, case, dtype, "cuda", shipped=True).items():
                assert error <= 4**0.5 * 12**-0.5 * torch.finfo(dtype).eps + 5e-6, f"{case} {name}: {error:.1e}"

    @pytest.mark.parametrize("gate", GATES)
    def test_a_layer_is_captured_and_replayed_also_with_another_layout(self, gate):
        from lasp import CPContext, linear_attention

        q, k, v = (torch.randn(1, 6000, 4, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
        shapes = {"fixed": (4,), "token": (1, 6000, 4), "channel": (1, 6000, 4, 64)}
        g = [-torch.rand(shapes[gate], device="cuda")] if gate != "none" else []
        leaves = [x.requires_grad_() for x in (q, k, v, *g)]
        cp = CPContext.local((0, 2000, 5999, 6000), replaceable=True)

        def step(cp):
            o, final = linear_attention(*leaves, cp=cp, impl="triton", output_final_state=True)
            return o, final, *torch.autograd.grad(o.square().sum() + final.square().sum(), leaves)

        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            step(cp)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step(cp)
        for borders in ((0, 2000, 5999, 6000), (0, 1, 2, 6000), (0, 1999, 3999, 6000)):
            with torch.no_grad():
                q.copy_(torch.randn_like(q))
            cp.replace_layout(borders)
            graph.replay()
            torch.cuda.synchronize()
            for x, y in zip(captured, step(CPContext.local(borders)), strict=True):
                torch.testing.assert_close(x, y)

    def test_tiles_are_measured_and_written_when_asked(self, tmp_path, monkeypatch):
        import json

        from lasp import linear_attention

        path = tmp_path / "tiles.json"
        monkeypatch.setenv("LASP_TILES", str(path))
        monkeypatch.setenv("LASP_AUTOTUNE", "1")
        q, k, v = (torch.randn(1, 1000, 4, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
        linear_attention(q, k, v, impl="triton")
        assert [name.split(" ", 1)[1] for name in json.loads(path.read_text())] == ["D=64 none few"]
