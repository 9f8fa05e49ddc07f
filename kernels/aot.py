"""Compile the Triton kernels without a GPU: ``python -m lasp.kernels.aot --arch 80,90,100 [--all] [--json FILE]``.

The operator of :mod:`lasp.kernels.triton_linear.operator` runs on tensors without storage, and its launches are
recorded. The command compiles each distinct launch for bf16 and prints its registers and spilled bytes per thread, its
shared memory, and which tensor-core instructions it uses. It exits non-zero when a kernel does not compile, needs more
shared memory than the architecture has, or on sm_90 spills more than its budget.

By default it compiles every tile for D = 128 on sm_90, and one tile of each kernel elsewhere. ``--all`` compiles every
tile. The report of a run over everything holds its :func:`fingerprint`. While that is unchanged, a new run would say
the same.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import product
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import Tensor

from lasp.kernels.segments import SegmentTable
from lasp.kernels.triton_linear.decays import Decay
from lasp.kernels.triton_linear.tiles import ARCHITECTURES, DIMS

SHARED_BYTES = {80: 101376, 90: 232448, 100: 232448}  # 80: what sm_86, sm_89 and sm_120 have, which use its tiles
SPILL_BYTES = {"local_states": 0, "o": 0, "dq": 0}  # on sm_90; elsewhere:
SPILL_BYTES_OTHERWISE = 64
# what decides the code: the decay, whether a fixed one is learned, and whether there is an order
CASES = {kind.name.lower(): kind for kind in Decay} | {"learned": Decay.FIXED, "bidirectional": Decay.NONE}
LENGTHS, HEADS = (1 << 16, 1 << 11), 16  # of both buckets of B * H * T


@dataclass(frozen=True)
class Launch:
    """One kernel with everything that decides its code.

    Attributes:
        kernel: module and name of the function.
        name: the kernel's, or for :mod:`lasp.kernels.triton_linear.output` what it makes. ``safe`` marks the kernels
            for strong decays per channel, ``rev`` the backward's sweep, ``fresh`` launches where no state enters or
            leaves.
        signature: type of each argument.
        constants: arguments known when compiled.
        aligned: positions of the arguments that are divisible by 16.
        options: warps and stages.
    """

    kernel: str
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


def launches(arch: int, dim: int, case: str, lengths: tuple[int, ...] = LENGTHS) -> list[Launch]:
    """The distinct launches of a forward and a backward in bf16.

    They are made with entry states and exit gradients, and for the first length also without them.
    """
    from lasp.kernels.triton_linear import operator as lightning

    found: dict[Launch, None] = {}

    class Recorder:
        def _arch(self):
            return arch

        def _launch(self, kernel, programs, **arguments):
            found[describe(kernel, arguments)] = None

    class Forward(Recorder, lightning.Forward):
        pass

    class Backward(Recorder, lightning.Backward):
        pass

    causal = case != "bidirectional"
    for length, entered in product(lengths, (True, False)):
        if not entered and (length != lengths[0] or not causal):
            continue
        with torch.device("meta"):
            q, k, v, do = (torch.empty(1, length, HEADS, dim, dtype=torch.bfloat16) for _ in range(4))
            shape = CASES[case].gate_shape(1, length, HEADS, dim)
            g = None if shape is None else torch.empty(shape)
            state = torch.empty(1, 1, HEADS, dim, dim)
        inputs = k, v, g, None, SegmentTable([(0, length)], torch.device("meta")), HEADS, causal, 0.125
        forward, entry = Forward(*inputs), state if entered else None
        exits = forward.state_maps(q=q)
        forward.finish(entry)
        known = {"saved": forward.saved, "kept_gates": forward.kept_gates, "entry": entry, "exits": exits}
        known |= {"needs_dg": case == "learned" or CASES[case].per_token, "needs_d_entry": False}
        backward = Backward(*inputs, q=q, do=do, **known)
        backward.state_maps(local=True)
        backward.finish(state if entered else None)
    return list(found)


def describe(kernel, arguments: dict) -> Launch:
    """What the just-in-time compiler would specialise this launch on: the kernel's arguments and launch options."""
    launch_options = {n: arguments[n] for n in ("num_warps", "num_stages") if n in arguments}
    fixed = {p.name for p in kernel.params if p.do_not_specialize}
    signature, constants, aligned = [], [], []
    for i, parameter in enumerate(kernel.params):
        name, value = parameter.name, arguments[parameter.name]
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
    name = {"mix": "dq" if arguments.get("SWAP") else "o", "mix_grads": "dkdv"}.get(kernel.__name__, kernel.__name__)
    name += " safe" * bool(arguments.get("SAFE")) + " rev" * bool(arguments.get("REV") and name.endswith("states"))
    name += " fresh" * (arguments.get("ENTERED") is False or arguments.get("LEFT") is False)
    parts = signature, constants, aligned, launch_options.items()
    return Launch(f"{kernel.fn.__module__}:{kernel.__name__}", name, *map(tuple, parts))


_TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int32: "i32"}


def compile_launch(launch: Launch, arch: int) -> Usage:
    """Compile for ``sm_<arch>`` and read what it takes."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    attrs = {(i,): [["tt.divisibility", 16]] for i in launch.aligned}
    kernel = pkgutil.resolve_name(launch.kernel)
    source = ASTSource(kernel, dict(launch.signature), dict(launch.constants), attrs)
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
    budget = SPILL_BYTES.get(launch.name.split()[0], SPILL_BYTES_OTHERWISE)
    if arch == 90 and usage.spill > budget:
        out.append(f"spill {usage.spill} B > {budget} B")
    return out


def selection(archs: list[int], cases: list[str], everything: bool) -> Iterator[tuple[int, int, str, Launch]]:
    """(arch, D, case, launch) of every tile; or of those of sm_90 at D = 128, and elsewhere of one for each kernel."""
    for arch in archs:
        seen: set[str] = set()
        few = not everything and arch != 90
        for dim in DIMS if everything else (128,):
            for case in [c for c in ("token", "channel") if c in cases] if few else cases:  # together all kernels
                for launch in launches(arch, dim, case, LENGTHS[:1] if few else LENGTHS):
                    if not few or launch.name not in seen:
                        yield arch, dim, case, launch
                    seen.add(launch.name)


def fingerprint() -> str:
    """A hash of all that decides the rows of every tile: kernels, launches, budgets and triton's version.

    A kernel's text counts without its imports, so the hash stays when a file moves.
    """
    import triton

    texts = [path.read_text() for path in Path(__file__).parent.rglob("*.py")]
    kernels = [re.sub(r"^(from|import) .*\n", "", x, flags=re.M) for x in texts if re.search(r"^@triton\.jit", x, re.M)]
    chosen = [
        (arch, dim, case, replace(launch, kernel=launch.kernel.partition(":")[2]))
        for arch, dim, case, launch in selection(list(ARCHITECTURES), list(CASES), everything=True)
    ]
    budgets = SHARED_BYTES, SPILL_BYTES, SPILL_BYTES_OTHERWISE
    return hashlib.sha256(repr((triton.__version__, sorted(kernels), chosen, budgets)).encode()).hexdigest()


def measure(arch: int, dim: int, case: str, launch: Launch) -> dict:
    """One row of the table; ``fault`` is empty where all is well."""
    constants, options = dict(launch.constants), dict(launch.options)
    row = {"arch": arch, "dim": dim, "case": case, "kernel": launch.name}
    row |= {"chunk": constants.get("C"), "block": constants.get("BZ", constants.get("BV"))}
    row |= {"warps": options.get("num_warps", 4), "stages": options.get("num_stages", 3)}
    try:
        usage = compile_launch(launch, arch)
    except Exception as error:
        return row | {"fault": f"does not compile: {error}"}
    return row | asdict(usage) | {"fault": "; ".join(faults(launch, usage, arch))}


def line(row: dict) -> str:
    """A row as text."""
    cells = (f"sm_{row['arch']}", row["dim"], row["case"], row["kernel"], row["chunk"] or "-", row["block"] or "-")
    text = "{:6} {:>3} {:13} {:21} {:>2} {:>5} ".format(*cells) + f"{row['warps']:>5} {row['stages']:>6} "
    if "registers" in row:
        text += f"{row['registers']:>4} {row['spill']:>5} {row['shared']:>7}  {row['tensor_cores']:8} "
    return text + row["fault"]


def table(rows: list[dict]) -> str:
    """The rows in Markdown, by architecture, D and kernel: registers / spilled bytes / KiB of shared memory.

    Each figure is the largest over the tiles and sweeps of a kernel; ``*`` marks where tensor cores take part.
    """
    products = ("local_states", "o", "dq", "dkdv")
    cells: dict[tuple, list[dict]] = {}
    for row in rows:
        name = row["kernel"].split()[0]
        cells.setdefault((row["arch"], row["dim"], name if name in products else "others", row["case"]), []).append(row)
    lines = [f"| architecture | D | kernel | {' | '.join(CASES)} |", "|---" * (3 + len(CASES)) + "|"]
    for arch, dim in sorted({key[:2] for key in cells}):
        for name in (*products, "others"):
            line = f"| sm_{arch} | {dim} | {name} |"
            for case in CASES:
                found = cells.get((arch, dim, name, case), [])
                largest = (
                    [max(row[part] for row in found) for part in ("registers", "spill", "shared")] if found else []
                )
                text = f"{largest[0]} / {largest[1]} / {-(-largest[2] // 1024)}" if found else "-"
                line += f" {text}{'*' * any(row['tensor_cores'] != '-' for row in found)} |"
            lines.append(line)
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--arch", default=",".join(map(str, ARCHITECTURES)), help="comma-separated")
    parser.add_argument("--all", action="store_true", help="every tile of every head dim")
    parser.add_argument("--cases", default=",".join(CASES), help="comma-separated")
    parser.add_argument("--kernels", default="", help="comma-separated names as printed; default: all")
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--table", type=Path, help="print the rows of such a file in Markdown, and compile nothing")
    options = parser.parse_args(argv)
    if options.table:
        print(table(json.loads(options.table.read_text())["rows"]))
        return 0
    archs, cases = options.arch.split(","), options.cases.split(",")
    if not set(archs) <= set(map(str, ARCHITECTURES)) or not set(cases) <= set(CASES):
        parser.error(f"--arch takes {ARCHITECTURES}, --cases {tuple(CASES)}; got {options.arch} and {options.cases}")
    import triton

    chosen = list(selection([int(x) for x in archs], cases, options.all))
    if options.kernels:
        known = {x[-1].name for x in chosen}
        wanted = set(options.kernels.split(","))
        if not wanted <= known:
            parser.error(f"--kernels takes {', '.join(sorted(known))}; got {options.kernels}")
        chosen = [x for x in chosen if x[-1].name in wanted]
    print("arch     D case          kernel                 C block warps stages regs spill  shared  tensor cores")
    rows = []
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        for row in pool.map(measure, *zip(*chosen)):
            rows.append(row)
            print(line(row), flush=True)
    if options.json:
        report = {"triton": triton.__version__, "dtype": "bfloat16", "heads": HEADS, "lengths": LENGTHS}
        if (
            options.all
            and set(archs) == set(map(str, ARCHITECTURES))
            and set(cases) == set(CASES)
            and not options.kernels
        ):
            report["fingerprint"] = fingerprint()
        options.json.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(report | {"rows": []}).removesuffix("]}")  # a line for each row
        options.json.write_text(text + "\n" + ",\n".join(map(json.dumps, rows)) + "\n]}\n")
    bad = sum(bool(row["fault"]) for row in rows)
    print(f"{bad} of {len(rows)} kernels do not fit" if bad else f"all {len(rows)} kernels within budget")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
