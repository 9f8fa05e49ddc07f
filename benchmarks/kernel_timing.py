"""Clocks of ``benchmarks/kernels.py``: warm steps on the device's own timeline, and our kernels one by one."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from kernel_checks import Inputs

from lasp.kernels.operator import num_heads
from lasp.kernels.segments import SegmentTable


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
    from lasp.kernels.triton_linear import operator as lightning

    marks = []

    def marked(stages: type, **names: str) -> type:
        class Marked(stages):
            def _launch(self, kernel, programs, **arguments):
                began = watch.mark()
                super()._launch(kernel, programs, **arguments)
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
        shared = x.k, x.v, x.g, None, table, num_heads(x.q, x.k, x.v, x.g), True, x.q.shape[-1] ** -0.5
        marks.clear()
        with torch.no_grad():
            watch.head_start(5e-3)
            forward = Forward(*shared)
            maps = forward.state_maps(q=x.q)
            forward.finish(None)
            known = {"saved": forward.saved, "kept_gates": forward.kept_gates, "entry": None, "exits": maps}
            known |= {"needs_dg": "g" in x.leaves(), "needs_d_entry": False}
            backward = Backward(*shared, q=x.q, do=x.do, **known)
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
