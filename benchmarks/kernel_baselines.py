"""Implementations of causal attention that ``benchmarks/kernels.py`` compares: ours, and bindings of other packages.

Every implementation takes q, k, v [1, T, H, D] and g, a natural log-decay in fp32: None, [H] (fixed: a constant that
nothing differentiates), [1, T, H] or [1, T, H, D]; and returns o [1, T, H, D]. Packages that are no dependency of ours
are imported where they are used.
"""

from __future__ import annotations

import importlib
import importlib.util
import shutil
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from lasp import linear_attention

GATES = ("none", "fixed", "token", "channel")
SOFTMAX = "softmax"  # the gate of an implementation that has none of these


class Implementation:
    """One way to compute o.

    Attributes:
        gates: which it serves.
        growth: its time grows with T to this power.
        guest: whether it is somebody else's: where it cannot run there is no baseline.
    """

    gates: tuple[str, ...] = GATES
    growth = 1
    guest = False

    def obstacle(self, device: torch.device) -> str | None:
        """Why it cannot run on this device at all, or None."""

    def fresh(self) -> None:
        """Forget what was tuned or compiled for other shapes."""

    def note(self) -> str | None:
        """What a reader of its times should know."""

    def __call__(self, gate: str, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None) -> Tensor:
        raise NotImplementedError


class Lasp(Implementation):
    """``lasp.linear_attention``."""

    def __init__(self, impl: str):
        self.impl = impl

    def obstacle(self, device: torch.device) -> str | None:
        missing = self.impl == "triton" and importlib.util.find_spec("triton") is None
        return "triton is not installed" if missing else None

    def __call__(self, gate, q, k, v, g):
        return linear_attention(q, k, v, g, impl=self.impl)[0]


class Compiled(Lasp):
    """``lasp.linear_attention`` under ``torch.compile``, compiled for each shape."""

    def __init__(self):
        super().__init__("torch")
        self.compiled: Callable | None = None

    def obstacle(self, device: torch.device) -> str | None:
        if device.type == "cuda":
            return None if importlib.util.find_spec("triton") else "torch.compile needs triton"
        return None if shutil.which("c++") or shutil.which("g++") else "torch.compile needs a C++ compiler on a CPU"

    def fresh(self) -> None:
        from torch._dynamo.utils import counters

        torch._dynamo.reset()
        counters.clear()
        self.compiled = torch.compile(super().__call__, dynamic=False)

    def note(self) -> str:
        from torch._dynamo.utils import counters

        return f"{counters['stats']['unique_graphs']} graphs, {sum(counters['graph_break'].values())} graph breaks"

    def __call__(self, gate, q, k, v, g):
        return self.compiled(gate, q, k, v, g)


class Fla(Implementation):
    """flash-linear-attention: ``<kind>_simple_gla``, per channel ``<kind>_gla``.

    Fixed decays are its ``g_gamma``; ``chunk_lightning_attn`` is the same call after making its own slopes.
    """

    guest = True

    def __init__(self, kind: str):
        self.kind = kind

    def obstacle(self, device: torch.device) -> str | None:
        if device.type != "cuda":
            return "fla needs a CUDA device"
        try:
            importlib.import_module("fla.ops.simple_gla")
        except Exception as error:  # not installed, or not made for this torch or triton
            return f"fla cannot be imported: {describe(error)}"
        return None

    def fresh(self) -> None:
        """Its autotuner's keys hold no T: without this, the first length would choose the tiles of all."""
        from triton.runtime.autotuner import Autotuner

        for name, module in list(sys.modules.items()):
            if name.startswith("fla.ops."):
                for kernel in list(vars(module).values()):
                    while kernel is not None and not isinstance(kernel, type):
                        if isinstance(kernel, Autotuner):
                            kernel.cache.clear()
                        kernel = getattr(kernel, "fn", None)

    def __call__(self, gate, q, k, v, g):
        family = "gla" if gate == "channel" else "simple_gla"
        function = getattr(importlib.import_module(f"fla.ops.{family}"), f"{self.kind}_{family}")
        name = {"fixed": "g_gamma", "token": "g", "channel": "gk" if self.kind == "fused_recurrent" else "g"}.get(gate)
        return function(q=q, k=k, v=v, **({name: g} if name else {}))[0]


class Softmax(Implementation):
    """FlashAttention in PyTorch: the yardstick of softmax attention. On a CPU, its default backend."""

    gates = (SOFTMAX,)
    growth = 2
    guest = True

    def __call__(self, gate, q, k, v, g):
        from torch.nn.attention import SDPBackend, sdpa_kernel

        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        run = torch.nn.functional.scaled_dot_product_attention
        if not q.is_cuda:
            return run(q, k, v, is_causal=True).transpose(1, 2)
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return run(q, k, v, is_causal=True).transpose(1, 2)


def implementations() -> dict[str, Implementation]:
    """Every implementation by name, the most telling comparison first."""
    return {
        "triton": Lasp("triton"),
        "fla_chunk": Fla("chunk"),
        "sdpa_flash": Softmax(),
        "torch": Lasp("torch"),
        "fla_fused_chunk": Fla("fused_chunk"),
        "torch_compile": Compiled(),
        "fla_recurrent": Fla("fused_recurrent"),
    }


def describe(fault: BaseException) -> str:
    """An exception in one line."""
    text = " ".join(str(fault).split())
    return f"{type(fault).__name__}: {text[:300]}"
