"""The Triton kernels in Triton's interpreter, in fp32 (its 16-bit products are wrong), against the reference."""

import importlib.util
from dataclasses import replace
from unittest import mock

import pytest
import torch

from lasp.kernels import triton_tiles

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")

GATES = ("none", "fixed", "token", "channel")
PACKED = (0, 13, 14, 40, 75)  # a segment of one token, cuts that no chunk respects
TOLERANCE = {"dg": 2e-5}  # the rest: 5e-6


def check(interpreters, *cases):
    from tests.kernels.lightning_cases import compare

    for case, errors in interpreters.run(compare, list(cases), size=1)[0]:
        for name, error in errors.items():
            assert error <= TOLERANCE.get(name, 5e-6), f"{case} {name}: {error:.2e}"


def make(gate, **options):
    from tests.kernels.lightning_cases import Case

    return Case(gate, **options)


@pytest.mark.parametrize("states", [False, True], ids=["no states", "states"])
@pytest.mark.parametrize("borders", [(0, 75), PACKED], ids=["dense", "packed"])
@pytest.mark.parametrize("gate", GATES)
def test_outputs_states_and_gradients_equal_the_reference(interpreters, gate, borders, states):
    check(interpreters, make(gate, borders=borders, states=states))


@pytest.mark.parametrize("gate", GATES)
def test_heads_share_and_rows_are_documents(interpreters, gate):
    base = make(gate, borders=(0, 37), batch=2)
    check(interpreters, replace(base, heads=(4, 2, 1, 4)), replace(base, heads=(1, 2, 2, 1)))


@pytest.mark.parametrize("gate", GATES)
def test_short_sequences_and_widths_that_are_no_power_of_two(interpreters, gate):
    base = make(gate, heads=(1, 1, 1, 1))
    check(
        interpreters,
        replace(base, borders=(0, 1)),
        replace(base, borders=(0, 1, 2, 3), key_dim=5, value_dim=7),
        replace(base, borders=(0, 20), key_dim=40, value_dim=16, block=32),
    )


@pytest.mark.parametrize("gate", GATES)
def test_the_shipped_chunk(interpreters, gate):
    sizes = {"key_dim": 64, "value_dim": 32, "block": 32, "chunk": 64, "superchunk": 128}
    check(interpreters, make(gate, borders=(0, 150), heads=(1, 1, 1, 1), strength=0.2, **sizes))


def test_channels_that_decay_little_and_much_side_by_side(interpreters):
    for strength in (0.05, 0.5):  # one reference per chunk serves: all; some superchunks
        check(interpreters, make("channel", borders=PACKED, strength=strength))


def test_every_token_reads_its_whole_document_without_an_order(interpreters):
    base = make("none", causal=False, states=False, borders=PACKED)
    check(interpreters, base, replace(base, borders=(0, 37), batch=2, heads=(1, 2, 1, 2)))


@pytest.mark.parametrize("gate", ["fixed", "token", "channel"])
def test_strong_decay_costs_no_more_than_in_pytorch(interpreters, gate):
    from tests.kernels.lightning_cases import compare_with_torch

    cases = [make(gate, strength=strength) for strength in (10.0, 100.0, 3000.0)]
    for case, (ours, theirs) in zip(cases, interpreters.run(compare_with_torch, cases, size=1)[0]):
        for name, error in ours.items():
            assert error <= max(4 * theirs[name], 5e-6), f"{case} {name}: {error:.1e}, in PyTorch {theirs[name]:.1e}"


@pytest.mark.parametrize("gate", ["token", "channel"])
def test_a_decay_of_minus_infinity_starts_afresh(interpreters, gate):
    from tests.kernels.lightning_cases import compare

    (_, errors) = interpreters.run(compare, [make(gate, reset=40, states=False)], size=1)[0][0]
    assert max(e for n, e in errors.items() if n != "dg") <= 5e-6, errors


@pytest.mark.parametrize(
    ("dtype", "dim", "message"),
    [
        (torch.float64, 16, "impl='triton' takes q, k, v in bfloat16, float16 or float32, got torch.float64"),
        (torch.float32, 257, "impl='triton' takes head dims up to 256, got K = 257"),
    ],
)
def test_what_the_kernels_cannot_serve_is_refused(interpreters, dtype, dim, message):
    from tests.kernels.lightning_cases import refusal

    assert interpreters.run(refusal, dtype, dim, size=1)[0].startswith(message)


@pytest.mark.parametrize("gate", GATES)
def test_the_backward_keeps_a_sliver_of_one_input(interpreters, gate):
    from tests.kernels.lightning_cases import saved_shapes

    assert interpreters.run(saved_shapes, gate, 32, size=1)[0] == [(2, 3, 16, 24)]  # a state for each superchunk
    heads, dim = 16, 128
    for length in (1 << 16, 1 << 18, 1 << 20):
        superchunk = triton_tiles.superchunk(GATES.index(gate), heads * length)
        saved = length // superchunk * heads * dim * dim * 4
        assert saved <= 0.3 * length * heads * dim * 2  # of one bf16 input


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestOnGPU:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
    @pytest.mark.parametrize("dim", [64, 128, 256])
    @pytest.mark.parametrize("gate", GATES)
    def test_the_shipped_tiles_round_like_their_inputs(self, gate, dim, dtype):
        from lasp.kernels import chunked
        from tests.kernels.lightning_cases import actual

        eps = torch.finfo(dtype).eps
        for strength in (0.1, 2.0):  # the second needs the slow path for channels
            sizes = {"key_dim": dim, "value_dim": dim, "heads": (4, 2, 2, 4), "strength": strength}
            case = make(gate, borders=(0, 700, 701, 3000), **sizes)
            found = actual(case, None, dtype, "cuda", shipped=True)
            rounded = {n: t.to(dtype).double() if n in ("q", "k", "v", "do") else t for n, t in case.inputs().items()}
            with mock.patch.object(type(case), "inputs", lambda _, x=rounded: dict(x)):
                exact = actual(case, chunked, torch.float64, "cuda")
            for name, want in exact.items():
                if want is not None:
                    error = (found[name].double() - want).norm() / want.norm()
                    assert error <= (eps if name != "dg" else 4 * eps) + 1e-5, f"{case} {name}: {error:.1e}"

    def test_a_layer_is_captured_and_replayed(self):
        from lasp import linear_attention

        q, k, v = (torch.randn(1, 1000, 4, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
        g = torch.nn.functional.logsigmoid(torch.randn(1, 1000, 4, device="cuda"))
        leaves = [x.requires_grad_() for x in (q, k, v, g)]

        def step():
            o, _ = linear_attention(*leaves, impl="triton")
            return o, *torch.autograd.grad(o.square().sum(), leaves)

        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        for _ in range(2):
            with torch.no_grad():
                q.copy_(torch.randn_like(q))
            graph.replay()
            torch.cuda.synchronize()
            for x, y in zip(captured, step(), strict=True):
                torch.testing.assert_close(x, y)
