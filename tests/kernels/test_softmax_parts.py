import pytest
import torch

from lasp.kernels import softmax
from lasp.kernels.softmax import softmax_backward, softmax_forward
from lasp.kernels.softmax_parts import add_gradients, add_keys
from tests.harness import assert_close, relative_error
from tests.kernels.softmax_cases import NAMES, TOLERANCE, expected, make, packed_backward, packed_forward

SQUARES = [(0, 20, 0, 20), (20, 41, 20, 41), (41, 50, 41, 50)]  # two halves of a document, and another one
RECTANGLES = [(20, 41, 7, 20), (20, 41, 0, 5), (20, 30, 5, 7), (30, 41, 5, 7)]
WHOLE = [(0, 41, 0, 41), (41, 50, 41, 50)]


def in_parts(q, k, v, do, impl, causal=True):
    """Squares first, then rectangles one shard after the other, as on a ring."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    rectangles = RECTANGLES if causal else [*RECTANGLES, (0, 20, 20, 41)]
    options = {"scale": 0.4, "impl": impl}
    o, lse = softmax_forward(q, k, v, SQUARES, causal=causal, out_dtype=dtype, **options)
    for piece in rectangles:
        add_keys(o, lse, q, k, v, [piece], **options)
    assert o.dtype == lse.dtype == dtype
    row = do, q, k, v, o.to(q.dtype), lse
    gradients = softmax_backward(*row, SQUARES, causal=causal, out_dtype=dtype, **options)
    add_gradients(*gradients, *row, rectangles[::-1], **options)
    assert all(x.dtype == dtype for x in gradients)
    return o, lse, *gradients


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("impl", ["auto", "blocks", "flash_cuda"])
def test_parts_of_the_keys_add_up_to_all_of_them(impl, causal, monkeypatch):
    if impl == "flash_cuda":
        monkeypatch.setattr(softmax, "_cuda_serves", lambda q, v: True)
        monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", packed_forward)
        monkeypatch.setattr(torch.ops.aten, "_flash_attention_backward", packed_backward)
    for dtype, tolerance in TOLERANCE.items():
        for dims in ((8, 8), (8, 3)):
            tensors = make(0, 2, 50, 50, 6, 2, *dims, dtype)
            right = expected(*tensors, WHOLE, causal=causal, scale=0.4)
            for name, x, y in zip(NAMES, in_parts(*tensors, impl, causal), right, strict=True):
                assert_close(f"{name}, {dtype}, {dims}", x, y, tolerance)


@pytest.mark.parametrize("impl", ["auto", "blocks"])
def test_sixteen_bit_parts_err_like_the_whole(impl):
    tensors = make(1, 2, 50, 50, 6, 2, 8, 8, torch.bfloat16)
    right = expected(*tensors, WHOLE, scale=0.4)
    o, lse = softmax_forward(*tensors[:3], WHOLE, scale=0.4, impl=impl)
    whole = o, lse, *softmax_backward(tensors[3], *tensors[:3], o, lse, WHOLE, scale=0.4, impl=impl)
    for name, x, y, z in zip(NAMES, in_parts(*tensors, impl), right, whole, strict=True):
        assert relative_error(x, y) <= 1.5 * relative_error(z, y) + 1e-3, name
