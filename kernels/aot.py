"""Compile the Triton kernels without a GPU: ``python -m lasp.kernels.aot --arch 80,90,100 [--all]``.

Runs the launches of :mod:`lasp.kernels.lightning` on tensors without storage, compiles each distinct one for bf16 and
prints registers, spilled bytes per thread, shared memory and which tensor-core instructions are used. Exits non-zero
when a kernel does not compile, needs more shared memory than the architecture has, or on sm_90 spills more than its
budget. By default: on sm_90 every kernel for D = 128, elsewhere one decay; ``--all``: all head dims and decays.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lasp.kernels.segments import SegmentTable

SHARED_BYTES = {80: 166912, 90: 232448, 100: 232448}
SPILL_BYTES = {"local_states": 0, "o": 0, "dq": 0}  # on sm_90; elsewhere:
SPILL_BYTES_OTHERWISE = 64
DECAYS = ("none", "fixed", "token", "channel")
LENGTHS, HEADS = (1 << 16, 1 << 11), 16  # of both buckets of B * H * T


@dataclass(frozen=True)
class Launch:
    """One kernel with everything that decides its code.

    Attributes:
        name: of the kernel; where roles are exchanged, what it makes.
        signature: type of each argument.
        constants: arguments known when compiled.
        aligned: arguments divisible by 16.
        options: warps and stages.
    """

    kernel: object
    name: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, object], ...]
    aligned: tuple[int, ...]
    options: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Usage:
    """What a compiled kernel takes per thread and per program."""

    registers: int
    spill: int
    shared: int
    tensor_cores: str


def launches(arch: int, dim: int, decay: str, dtype: torch.dtype = torch.bfloat16) -> list[Launch]:
    """The distinct launches of a forward and a backward with entry states and exit gradients."""
    from lasp.kernels import lightning

    found: dict[Launch, None] = {}

    class Recorder:
        def _arch(self):
            return arch

        def _launch(self, kernel, programs, *args, **options):
            found[describe(kernel, args, options)] = None

    class Forward(Recorder, lightning.Forward):
        pass

    class Backward(Recorder, lightning.Backward):
        pass

    for length in LENGTHS:
        with torch.device("meta"):
            q, k, v, do = (torch.empty(1, length, HEADS, dim, dtype=dtype) for _ in range(4))
            shapes = {"fixed": (HEADS,), "token": (1, length, HEADS), "channel": (1, length, HEADS, dim)}
            g = None if decay == "none" else torch.empty(shapes[decay])
            state = torch.empty(1, 1, HEADS, dim, dim)
        inputs = q, k, v, g, SegmentTable([(0, length)], torch.device("meta")), True, 0.125
        forward = Forward(*inputs)
        forward.state_maps()
        forward.finish(state)
        needs_dg = decay in ("token", "channel")
        backward = Backward(*inputs, saved=forward.saved, entry=state, exits=state, do=do, needs_dg=needs_dg)
        backward.state_maps(local=True)
        backward.finish(state)
    return list(found)


def describe(kernel, args: tuple, options: dict) -> Launch:
    """What the just-in-time compiler would specialise this launch on."""
    launch_options = {n: options[n] for n in ("num_warps", "num_stages") if n in options}
    bound = dict(zip(kernel.arg_names, args)) | {n: x for n, x in options.items() if n not in launch_options}
    fixed = {p.name for p in kernel.params if p.do_not_specialize}
    signature, constants, aligned = [], [], []
    for i, parameter in enumerate(kernel.params):
        name, value = parameter.name, bound[parameter.name]
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1 and name not in fixed):
            signature.append((name, "constexpr"))
            constants.append((name, value))
        elif isinstance(value, Tensor):
            signature.append((name, "*" + _TYPES[value.dtype]))
            aligned.append(i)
        else:
            signature.append((name, "fp32" if isinstance(value, float) else "i32"))
            if isinstance(value, int) and value % 16 == 0 and name not in fixed:
                aligned.append(i)
    name = kernel.__name__
    if name == "mix":
        name = "dq" if bound["SWAP"] else "o"
    if name == "mix_grads":
        name = "dkdv"
    parts = signature, constants, aligned, launch_options.items()
    return Launch(kernel, name, *map(tuple, parts))


_TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int32: "i32"}


def compile_launch(launch: Launch, arch: int) -> Usage:
    """Compile for ``sm_<arch>`` and read what it takes."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    attrs = {(i,): [["tt.divisibility", 16]] for i in launch.aligned}
    source = ASTSource(launch.kernel, dict(launch.signature), dict(launch.constants), attrs)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=dict(launch.options))
    ptx = compiled.asm["ptx"]
    found = [name for name in ("wgmma", "tcgen05.mma", "mma.sync") if name in ptx]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(compiled.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        text = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.search(rf"{word}:(\d+)", text).group(1)) for word in ("REG", "STACK"))
    return Usage(registers, stack, compiled.metadata.shared, found[0].split(".")[0] if found else "-")


def faults(launch: Launch, usage: Usage, arch: int) -> list[str]:
    """Why this kernel must not ship."""
    out = []
    if usage.shared > SHARED_BYTES[arch]:
        out.append(f"shared memory {usage.shared} > {SHARED_BYTES[arch]}")
    budget = SPILL_BYTES.get(launch.name, SPILL_BYTES_OTHERWISE)
    if arch == 90 and usage.spill > budget:
        out.append(f"spill {usage.spill} B > {budget} B")
    return out


def cases(archs: list[int], everything: bool):
    """(arch, D, decays) to compile."""
    for arch in archs:
        dims = (64, 128, 256) if everything else (128,)
        for dim in dims:
            yield arch, dim, DECAYS if everything or arch == 90 else ("token",)


def main(argv: list[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--arch", default="80,90,100", help="comma-separated compute capabilities")
    parser.add_argument("--all", action="store_true", help="all head dims and decays")
    parser.add_argument("--decays", default=",".join(DECAYS), help="comma-separated, of those that would be compiled")
    parser.add_argument("--kernels", default="", help="comma-separated; default all")
    options = parser.parse_args(argv)
    bad = 0
    print("arch    D decay    kernel         C block warps stages  regs spill  shared  tensor cores")
    for arch, dim, decays in cases([int(x) for x in options.arch.split(",")], options.all):
        for decay in decays:
            if decay not in options.decays.split(","):
                continue
            for launch in launches(arch, dim, decay):
                if options.kernels and launch.name not in options.kernels.split(","):
                    continue
                constants, chosen = dict(launch.constants), dict(launch.options)
                name = launch.name + (" safe" if constants.get("SAFE") else "") + (
                    " rev" if constants.get("REV") and launch.name.endswith("states") else ""
                )  # fmt: skip
                block = constants.get("BZ", constants.get("BV", "-"))
                line = f"sm_{arch:<4} {dim:>3} {decay:8} {name:15} {constants.get('C', '-'):>2} {block:>5} "
                line += f"{chosen.get('num_warps', 4):>4} {chosen.get('num_stages', 3):>5}  "
                usage = compile_launch(launch, arch)
                wrong = faults(launch, usage, arch)
                bad += bool(wrong)
                line += f"{usage.registers:>5} {usage.spill:>5} {usage.shared:>7}  {usage.tensor_cores} "
                print(line + "; ".join(wrong), flush=True)
    print(f"{bad} kernels over their budget" if bad else "all within budget")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
