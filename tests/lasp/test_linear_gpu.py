"""The matrices of linear_attention on CUDA: one device, and NCCL over every visible GPU. ``make test-gpu``."""

from dataclasses import replace

import pytest
import torch

from lasp import CPContext, linear_attention
from lasp.kernels.reference import recurrence
from tests.harness import RankPool
from tests.lasp.linear_cases import Case, known, matrix, special, worst

num_gpus = torch.cuda.device_count()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(num_gpus == 0, reason="no CUDA device is visible")]
LONG = [Case(g, borders=(0, 1000, 5000), key_dim=64, value_dim=64) for g in ("none", "fixed", "token", "channel")]


@pytest.mark.parametrize(
    ("impl", "dtype", "tolerance"),
    [("torch", torch.float32, 1e-5), ("torch", torch.float64, 1e-12), ("triton", torch.float32, 1e-5)],
)
def test_one_device_equals_the_reference(impl, dtype, tolerance):
    cases = known(replace(case, dtype=dtype, impl=impl) for case in matrix() + special() + LONG[:2])
    _, failures = worst(None, cases, tolerance, "cuda")
    assert not failures, "\n".join(failures)


@pytest.mark.skipif(num_gpus < 2, reason=f"NCCL over ranks needs two GPUs, {num_gpus} visible")
def test_nccl_over_every_gpu_equals_the_reference():
    pool = RankPool(num_gpus, "nccl")
    try:
        for size in range(2, num_gpus + 1):
            for _, failures in pool.run(worst, known(matrix() + special()), 1e-5, "cuda", size=size, timeout_s=600):
                assert not failures, "\n".join(failures)
    finally:
        pool.close()


@pytest.mark.parametrize("gate", ["none", "fixed", "token", "channel"])
def test_torch_in_bf16_costs_no_more_than_its_own_rounding(gate):
    x = Case(gate, borders=(0, 700), key_dim=64, value_dim=64, dtype=torch.bfloat16).inputs()
    inputs = [None if x[n] is None else x[n].to("cuda", torch.bfloat16) for n in "qkvg"]
    exact = recurrence(*(x[n] for n in "qkvg"))[0]
    o, _ = linear_attention(*inputs, impl="torch")  # the kernels round their operands: tests/kernels
    rounding = (exact.bfloat16().double() - exact).abs().max()
    assert (o.cpu().double() - exact).abs().max() <= 1.01 * rounding + 1e-6


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_forward_and_backward_do_not_wait_for_the_device(impl):
    q, k, v = (torch.randn(1, 4096, 2, 64, device="cuda", requires_grad=True) for _ in range(3))
    g = -torch.rand(1, 4096, 2, device="cuda")
    cp = CPContext.local(4096)  # made once per batch; its tables are copied at the first layer
    step = lambda: linear_attention(q, k, v, g, cp=cp, impl=impl)[0].sum().backward()  # noqa: E731
    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
