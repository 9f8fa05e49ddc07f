"""What ``benchmarks/kernels.py`` times, and how: implementations of causal attention, inputs, errors, clocks.

Every implementation takes q, k, v [1, T, H, D] and g, a natural log-decay in fp32: None, [H] (fixed: a constant that
nothing differentiates), [1, T, H] or [1, T, H, D]; and returns o [1, T, H, D]. Packages that are no dependency of ours
are imported where they are used.
"""

from __future__ import annotations

import importlib
import importlib.util
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lasp import linear_attention, softmax_attention
from lasp.kernels.segments import SegmentTable
from lasp.mixer import fixed_log_decay

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


@dataclass(frozen=True)
class Inputs:
    """q, k, v, do [1, T, H, D] and g of one step."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor | None
    do: Tensor

    @staticmethod
    def draw(gate: str, heads: int, dim: int, length: int, device: torch.device, dtype: torch.dtype) -> Inputs:
        """Random tensors; decays are the slopes of Lightning Attention, or those of GLA: logsigmoid(randn) / 16."""
        shape, at = (1, length, heads, dim), {"device": device}
        q, k, v, do = (torch.randn(shape, dtype=dtype, **at) for _ in range(4))
        g = None
        if gate == "fixed":
            g = fixed_log_decay("alibi", heads, device, torch.float32)
        elif gate in ("token", "channel"):
            g = torch.nn.functional.logsigmoid(torch.randn(shape if gate == "channel" else shape[:3], **at)).div_(16)
        return Inputs(q, k, v, g, do).prepared()

    def prepared(self) -> Inputs:
        """The same with gradients asked for."""
        for x in self.leaves().values():
            x.requires_grad_()
        return self

    def leaves(self) -> dict[str, Tensor]:
        """What is differentiated: q, k, v, and g where it belongs to a token."""
        found = {"q": self.q, "k": self.k, "v": self.v}
        return found if self.g is None or self.g.dim() == 1 else found | {"g": self.g}

    def part(self, start: int, stop: int) -> Inputs:
        """The same values of the tokens [start, stop), in float64."""
        cut = [None if x is None else x.detach() for x in (self.q, self.k, self.v, self.g, self.do)]
        return Inputs(*(x if x is None else (x if x.dim() == 1 else x[:, start:stop]).double() for x in cut)).prepared()

    def forward(self, run: Implementation, gate: str) -> Tensor:
        """o."""
        return run(gate, self.q, self.k, self.v, self.g)

    def step(self, run: Implementation, gate: str) -> tuple[Tensor, ...]:
        """o and the gradients of the leaves, in their order."""
        o = self.forward(run, gate)
        return o, *torch.autograd.grad(o, list(self.leaves().values()), self.do)


@dataclass
class Check:
    """What one short step showed.

    Attributes:
        errors: relative L2 error of o, dq, dk, dv, dg against float64; of those that could be computed.
        wrong_forward, wrong_backward: why the forward, the backward must not be timed, or None.
        step_seconds: of a second forward + backward.
    """

    errors: dict[str, float]
    wrong_forward: str | None = None
    wrong_backward: str | None = None
    step_seconds: float = 0.0


def exact(gate: str, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None) -> Tensor:
    """The reference for float64 inputs: lasp's PyTorch path, for softmax its blockwise softmax attention."""
    return softmax_attention(q, k, v) if gate == SOFTMAX else linear_attention(q, k, v, g, impl="torch")[0]


def check(run: Implementation, gate: str, inputs: Inputs, wait: Callable[[], None]) -> Check:
    """Compare one step of ``run`` with :func:`exact` on the same values; ``wait`` waits for the device."""
    wide = inputs.part(0, inputs.q.shape[1])
    names = ["o", *("d" + name for name in wide.leaves())]
    want = dict(zip(names, wide.step(exact, gate), strict=True))
    found = Check({})
    o = inputs.forward(run, gate)
    found.errors["o"] = error(o, want["o"])
    found.wrong_forward = wrong(found.errors, inputs.q.dtype)
    if found.wrong_forward:
        return found
    try:
        grads = torch.autograd.grad(o, list(inputs.leaves().values()), inputs.do)
    except Exception as fault:
        found.wrong_backward = describe(fault)
        return found
    found.errors |= {name: error(x, want[name]) for name, x in zip(names[1:], grads, strict=True)}
    found.wrong_backward = wrong(found.errors, inputs.q.dtype)
    wait()
    began = time.perf_counter()
    inputs.step(run, gate)
    wait()
    found.step_seconds = time.perf_counter() - began
    return found


def errors_at_length(gate: str, inputs: Inputs, o: Tensor, grads: tuple[Tensor, ...], tail: int) -> dict[str, float]:
    """Relative L2 errors at the cell's own length, where offsets are large; nothing for softmax.

    o everywhere, the reference going from slice to slice with its state; of ``grads`` (dq, dk, dv, ... or none) dk and
    dv of the last ``tail`` tokens, which depend on those alone.
    """
    if gate == SOFTMAX:
        return {}
    length, wide, state = o.shape[1], max(tail, (1 << 27) // o[0, 0].numel()), None  # a slice: 1 GiB in float64
    off, size = o.new_zeros((), dtype=torch.float64), o.new_zeros((), dtype=torch.float64)
    for start in range(0, length, wide):
        x = inputs.part(start, start + wide)
        with torch.no_grad():
            known = {"initial_state": state, "output_final_state": True, "impl": "torch"}
            want, state = linear_attention(x.q, x.k, x.v, x.g, **known)
            off += (o[:, start : start + wide].double() - want).square().sum()
            size += want.square().sum()
    found = {"o": (off / size).sqrt().item()}
    if grads:
        _, _, dk, dv, *_ = inputs.part(length - tail, length).step(exact, gate)
        found |= {"dk": error(grads[1][:, -tail:], dk), "dv": error(grads[2][:, -tail:], dv)}
    return found


def error(found: Tensor, want: Tensor) -> float:
    """Relative L2 error."""
    return ((found.double() - want).norm() / want.norm()).item()


def wrong(errors: dict[str, float], dtype: torch.dtype) -> str | None:
    """Which result is wrong rather than rounded: off by several times what its dtype explains."""
    limit = 0.05 if dtype.itemsize < 4 else 1e-3
    for name, off in errors.items():
        most = 4 * limit if name == "dg" else limit  # dg sums terms that cancel
        if not off <= most:  # NaN is wrong
            return f"{name} is wrong: relative L2 error {off:.2g} against float64"
    return None


def describe(fault: BaseException) -> str:
    """An exception in one line."""
    text = " ".join(str(fault).split())
    return f"{type(fault).__name__}: {text[:300]}"


class Stopwatch:
    """Marks on the device's own timeline; on a CPU, wall time."""

    def __init__(self, device: torch.device):
        self.gpu = device.type == "cuda"

    def mark(self) -> torch.cuda.Event | float:
        """Now, in the order of the work that was issued."""
        if not self.gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, began: torch.cuda.Event | float, ended: torch.cuda.Event | float) -> float:
        """Milliseconds."""
        return began.elapsed_time(ended) if self.gpu else 1e3 * (ended - began)

    def wait(self) -> None:
        """Until all that was issued is done."""
        if self.gpu:
            torch.cuda.synchronize()

    def head_start(self, seconds: float) -> None:
        """Keep the device busy for about so long, at most 20 ms, so that what follows is issued before it runs."""
        if self.gpu:
            torch.cuda._sleep(int(min(seconds, 0.02) * 2e9))  # cycles, at 2 GHz at most

    def sample(
        self, step: Callable[[int], object], seconds: float, least: int, most: int = 100
    ) -> tuple[list[float], list[float]]:
        """Milliseconds of each of ``least`` to ``most`` steps, as many as fit ``seconds``: running, and issuing it."""
        ran, issued, until = [], [], None
        for i in range(most + 2):
            if i == 2:  # two steps load code and memory
                until = time.perf_counter() + seconds
            if i >= least + 2 and time.perf_counter() >= until:
                break
            self.head_start(1.5e-3 * issued[-1] if i else 0.0)
            at, began = time.perf_counter(), self.mark()
            step(i)
            ended, issue = self.mark(), time.perf_counter() - at
            self.wait()
            ran.append(self.between(began, ended))
            issued.append(1e3 * issue)
        return ran[2:], issued[2:]


def pass_times(inputs: list[Inputs], watch: Stopwatch, least: int) -> dict[str, float]:
    """Median ms of each kernel of our forward and backward; several launches of one kernel add up.

    ``gates`` and ``dgates`` prepare decays; ``state`` and ``dstate`` sum superchunks, ``scan`` and ``dscan`` run over
    them; then ``o``, ``dq``, ``dkdv`` (dk and dv share a launch) and ``dg``.
    """
    from lasp.kernels import lightning

    marks = []

    def marked(stages: type, **names: str) -> type:
        class Marked(stages):
            def _launch(self, kernel, programs, *args, **options):
                began = watch.mark()
                super()._launch(kernel, programs, *args, **options)
                name = kernel.__name__.removesuffix("_states").removesuffix("_gates")
                marks.append((names.get(name, name), began, watch.mark()))

        return Marked

    gates, dgates = (dict.fromkeys(("token", "channel", "sum"), name) for name in ("gates", "dgates"))
    Forward = marked(lightning.Forward, local="state", scan="scan", mix="o", **gates)
    back = {"local": "dstate", "scan": "dscan", "mix": "dq", "mix_grads": "dkdv", "gate_grads": "dg"}
    Backward = marked(lightning.Backward, **back, **dgates)

    table, found = SegmentTable([(0, inputs[0].q.shape[1])], inputs[0].q.device), {}
    for i in range(least + 1):
        x = inputs[i % len(inputs)]
        shared = x.q, x.k, x.v, x.g, table, True, x.q.shape[-1] ** -0.5
        marks.clear()
        with torch.no_grad():
            watch.head_start(5e-3)
            forward = Forward(*shared)
            maps = forward.state_maps(local=True)
            forward.finish(None)
            known = {"saved": forward.saved, "entry": None, "exits": maps.state, "do": x.do}
            backward = Backward(*shared, **known, needs_dg="g" in x.leaves())
            backward.state_maps(local=True)
            backward.finish(None)
        watch.wait()
        if i:  # the first loads code and memory
            total = {}
            for name, began, ended in marks:
                total[name] = total.get(name, 0.0) + watch.between(began, ended)
            for name, ms in total.items():
                found.setdefault(name, []).append(ms)
    return {name: statistics.median(times) for name, times in found.items()}
