import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lasp.kernels import softmax
from lasp.kernels.softmax import softmax_backward, softmax_forward
from tests.harness import assert_close, relative_error
from tests.kernels.softmax_cases import NAMES, TOLERANCE, actual, expected, make, packed_backward, packed_forward

SHAPES = {  # batch, tq, tk, heads, kv_heads, dim, value_dim, pieces
    "one document": (1, 37, 37, 2, 2, 8, 8, [(0, 37, 0, 37)]),
    "one token": (1, 1, 1, 1, 1, 4, 4, [(0, 1, 0, 1)]),
    "suffix, rows, gqa": (3, 13, 50, 6, 2, 5, 5, [(0, 13, 0, 50)]),
    "pieces that share keys, a gap": (1, 31, 71, 4, 1, 16, 16, [(0, 9, 3, 20), (9, 10, 20, 21), (10, 31, 3, 60)]),
    "value dim": (2, 21, 40, 4, 2, 8, 3, [(0, 21, 1, 40)]),
    # 512 + 2 queries: the last two differ in one key, the first of a block of otherwise visible keys
    "several blocks": (1, 614, 1250, 2, 1, 8, 8, [(0, 514, 0, 1114), (514, 614, 1114, 1214)]),
}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_outputs_lse_and_gradients_equal_the_oracle(shape, dtype):
    *sizes, pieces = SHAPES[shape]
    tensors = make(0, *sizes, dtype)
    options = [{"causal": True}, {"causal": False, "scale": 0.3}, {"window": 1}, {"window": 7, "scale": 0.7}]
    options += [{"window": 600}, {"window": 10**6}] if "blocks" in shape else []
    for chosen in options:
        right = expected(*tensors, pieces, **chosen)
        for impl in ("auto", "blocks"):
            found = actual(*tensors, pieces, **chosen, impl=impl)
            for name, x, y in zip(NAMES, found, right, strict=True):
                # a lone key has weight 1 whatever q is: dq and dk are zero, reached by cancelling terms of size ~1
                lone = shape == "one token" or chosen.get("window") == 1
                assert_close(f"{name} {chosen} {impl}", x, y, TOLERANCE[dtype], terms=1.0 if lone else 0.0)


def test_dtypes_and_the_shares_of_keys_add_up():
    q, k, v, do = make(1, 1, 20, 50, 4, 2, 8, 8, torch.float64)
    o, lse, dq, dk, dv = actual(q, k, v, do, [(0, 20, 0, 50)])
    early = softmax_backward(do, q, k[:, :30], v[:, :30], o, lse, [(0, 20, 0, 30)], causal=False)
    late = softmax_backward(do, q, k[:, 30:], v[:, 30:], o, lse, [(0, 20, 0, 20)])
    assert relative_error(early[0] + late[0], dq) < 1e-12
    assert relative_error(torch.cat([early[1], late[1]], 1), dk) < 1e-12
    assert relative_error(torch.cat([early[2], late[2]], 1), dv) < 1e-12
    o, lse, dq, dk, dv = actual(*make(1, 1, 20, 50, 4, 2, 8, 8, torch.bfloat16), [(0, 20, 0, 50)])
    dtypes = [x.dtype for x in (o, lse, dq, dk, dv)]
    assert dtypes == [torch.bfloat16, torch.float32, torch.bfloat16, torch.float32, torch.float32]


@pytest.mark.parametrize("window", [None, 9])
def test_sixteen_bit_inputs_err_like_pytorch_does(window):
    tensors = make(2, 1, 100, 100, 4, 2, 16, 16, torch.bfloat16)
    right = expected(*tensors, [(0, 100, 0, 100)], window=window)
    q, k, v = (x.detach().clone().requires_grad_() for x in tensors[:3])
    age = torch.arange(100)[:, None] - torch.arange(100)
    seen = (age >= 0) & (age < (window or 100))
    theirs = torch.nn.functional.scaled_dot_product_attention(
        *(x.repeat_interleave(4 // x.shape[2], 2).transpose(1, 2) for x in (q, k, v)), attn_mask=seen
    ).transpose(1, 2)
    baseline = (theirs, *torch.autograd.grad(theirs, (q, k, v), tensors[3]))
    o, _, *gradients = actual(*tensors, [(0, 100, 0, 100)], window=window)
    for name, x, y, z in zip(("o", "dq", "dk", "dv"), (o, *gradients), (right[0], *right[2:]), baseline, strict=True):
        assert relative_error(x, y) <= 3 * relative_error(z.detach(), y) + 1e-3, name


def test_the_callers_precision_settings_do_not_apply():
    tensors = make(3, 1, 33, 33, 2, 1, 8, 8, torch.float32)
    want = actual(*tensors, [(0, 33, 0, 33)], window=5)
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = actual(*tensors, [(0, 33, 0, 33)], window=5)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(precision)
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


class LargestTensor(TorchDispatchMode):
    """Elements of the largest storage that any op inside returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
        return out


@pytest.mark.parametrize("options", [{}, {"causal": False}, {"window": 64}, {"impl": "blocks"}], ids=str)
def test_no_tensor_grows_with_the_square_of_the_length(options):
    length, heads, dim = 4096, 2, 4
    tensors = make(4, 1, length, length, heads, 1, dim, dim, torch.float32)
    with LargestTensor() as largest:
        actual(*tensors, [(0, length, 0, length)], **options)
    assert largest.elements <= max(length * heads * dim, 512 * 512 * heads) < length**2 / 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"impl": "triton"}, "impl must be one of .*got 'triton'"),
        ({"impl": "flash_cuda"}, "impl='flash_cuda' cannot serve q .* on cpu .*Use 'auto'"),
        ({"impl": "flash_cpu", "window": 3}, "impl='flash_cpu' cannot serve .*window=3"),
    ],
)
def test_an_impl_that_cannot_serve_is_refused(options, message):
    q, k, v, _ = make(5, 1, 4, 4, 1, 1, 4, 4, torch.float32)
    with pytest.raises(ValueError, match=message):
        softmax_forward(q, k, v, [(0, 4, 0, 4)], **options)


PACKED = [(0, 90, 5, 200), (90, 91, 200, 201), (91, 200, 201, 310), (200, 333, 201, 400)]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("options", [{}, {"causal": False}, {"window": 70}, {"window": 1}], ids=str)
def test_the_packing_for_the_gpu_op(options, batch, monkeypatch):
    monkeypatch.setattr(softmax, "_cuda_serves", lambda q, v: True)
    tensors = make(6, batch, 333, 410, 6, 2, 8, 8, torch.float64)
    calls = []
    for name, stand_in in (("forward", packed_forward), ("backward", packed_backward)):

        def recorded(*args, stand_in=stand_in, **kwargs):
            calls.append(stand_in)
            return stand_in(*args, **kwargs)

        monkeypatch.setattr(torch.ops.aten, f"_flash_attention_{name}", recorded)
    found = actual(*tensors, PACKED, impl="flash_cuda", **options)
    assert len(calls) == 2 * (2 if batch == 1 else 4)  # the first three pieces lie one behind the other
    for name, x, y in zip(NAMES, found, expected(*tensors, PACKED, **options), strict=True):
        assert_close(name, x, y, 1e-12, terms=1.0)


gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


class TestOnGPU:
    pytestmark = gpu

    @pytest.mark.parametrize("batch", [1, 3])
    @pytest.mark.parametrize("options", [{}, {"causal": False}, {"window": 70}, {"window": 1}], ids=str)
    def test_sixteen_bit(self, options, batch):
        tensors = make(6, batch, 333, 410, 6, 2, 64, 64, torch.bfloat16, "cuda")
        right = expected(*tensors, PACKED, **options)
        for impl in ("flash_cuda", "blocks"):
            found = actual(*tensors, PACKED, **options, impl=impl)
            for name, x, y in zip(NAMES, found, right, strict=True):
                assert_close(f"{name} {impl}", x.cpu(), y, 2e-2, terms=1.0)

    @pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
    def test_full_precision(self, dtype):
        pieces = [(0, 90, 5, 200), (90, 333, 5, 400)]
        for options in ({}, {"causal": False}, {"window": 70}):
            tensors = make(7, 2, 333, 410, 6, 2, 20, 12, dtype, "cuda")
            right = expected(*tensors, pieces, **options)
            for name, x, y in zip(NAMES, actual(*tensors, pieces, **options), right, strict=True):
                assert_close(name, x.cpu(), y, TOLERANCE[dtype], terms=1.0)
