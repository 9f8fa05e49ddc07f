"""``lasp verify``: does the user's model, on a batch of the user's data, give on N ranks what it gives on one?

Three runs of one training step without its update: on one rank in float64 (the truth), on one rank in the dtype of
the run, and cut over N ranks. What is compared: the output of every layer and its gradient, token by token and rank by
rank; every parameter's summed gradient; loss, held-out loss, gradient norm. The budget of a tensor is derived from the
run on one rank: its own rounding error against the truth, times FACTOR, plus a few units in the last place. So a
correct cut passes in any dtype, and an error that is not rounding cannot hide. The report names the first layer that
differs: going up through the outputs, then down through the gradients.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lasp.launch.config.schema import MegatronConfig, RunConfig, checked
from lasp.launch.data.run_data import open_data
from lasp.launch.data.stream import DataPlan
from lasp.launch.data.tokenizer import load_tokenizer
from lasp.launch.run.backends import backend_mesh
from lasp.launch.run.rendezvous import Job, choose_device, process_group
from lasp.layout import SequenceLayout
from lasp.models.config import ModelConfig
from lasp.models.linear_llama import LinearLlama
from lasp.parallel.gpt.traces import join_traces
from lasp.parallel.mesh import Mesh
from lasp.parallel.objective import Batch, LossModel, count_labels, evaluate, reduce_gradients

FACTOR = 4.0  # how much more rounding another order of summation may cost
UNITS = 16.0  # units in the last place of a tensor's largest value that are always allowed
UNITS_FLOAT64 = 4096.0  # the same for a run in float64, which has no truth beside it
OUTPUT, GRADIENT, PARAMETER = "output", "gradient", "parameter"

Trace = dict[str, Tensor]
"""What one rank saw: ``output.I`` and ``gradient.I`` [T_local, dim] of block I (-1: the embedding), ``parameter.NAME``
(gradients summed over ranks), and the scalars ``loss``, ``eval_loss``, ``grad_norm``."""


@dataclass(frozen=True)
class Finding:
    """One comparison of a tensor. ``ranks``: the cp ranks whose part exceeds the budget; empty if all is well."""

    name: str
    error: float
    budget: float
    ranks: tuple[int, ...]


def trace_step(model: nn.Module, batch: Batch, eval_batches: list[Batch], mesh: Mesh) -> Trace:
    """One step's forward and backward on this rank, without an update, and the held-out loss."""
    trace: Trace = {}
    hooks = [
        module.register_forward_hook(_watch(trace, index))
        for index, module in enumerate([model.embed, *model.layers], -1)
    ]
    try:
        count = count_labels([batch.labels], mesh)
        loss = LossModel(model)(batch) / count
        loss.backward()
    finally:
        for hook in hooks:
            hook.remove()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    reduce_gradients(gradients.values(), mesh)
    trace |= {f"{PARAMETER}.{name}": gradient.detach() for name, gradient in gradients.items()}
    trace["loss"] = mesh.sum(loss.detach().double().reshape(1))
    trace["grad_norm"] = torch.stack([g.double().norm() for g in gradients.values()]).norm().reshape(1)
    model.zero_grad()
    if eval_batches:
        value = evaluate(LossModel(model), eval_batches, mesh)
        if value is not None:
            trace["eval_loss"] = torch.tensor([value], dtype=torch.float64)
    return {name: value.cpu().contiguous() for name, value in trace.items()}


def compare(truth: Trace, single: Trace, parts: list[Trace], layout: SequenceLayout) -> list[Finding]:
    """Every tensor of the cut run against the run on one rank, each within a budget derived from the latter.

    Args:
        truth: one rank, float64.
        single: one rank, in the dtype of the run.
        parts: one per cp rank, in rank order.
        layout: how the sequence was cut.
    """
    findings = []
    for name in _reading_order(truth):
        exact, one = truth[name].double(), single[name].double()
        largest = exact.abs().max().item()
        unit = torch.finfo(single[name].dtype).eps if "." in name else torch.finfo(torch.float32).eps
        units = UNITS if single[name].dtype != torch.float64 or "." not in name else UNITS_FLOAT64
        budget = FACTOR * (one - exact).abs().max().item() + units * unit * largest
        errors = []
        for rank, part in enumerate(parts):
            wanted = layout.shard(exact, rank, dim=0) if name.startswith((OUTPUT, GRADIENT)) else exact
            errors.append((part[name].double() - wanted).abs().nan_to_num(nan=float("inf")).max().item())
        guilty = tuple(rank for rank, error in enumerate(errors) if not error <= budget)
        findings.append(Finding(name, max(errors), budget, guilty))
    return findings


def explain(findings: list[Finding], layer_kinds: str) -> str | None:
    """The first difference in the order of the computation, as a sentence; None if there is none."""
    bad = next((f for f in findings if f.ranks), None)
    if bad is None:
        return None
    kind, _, name = bad.name.partition(".")
    ranks = f"on cp rank(s) {', '.join(map(str, bad.ranks))}: error {bad.error:.3g}, budget {bad.budget:.3g}"
    if kind == OUTPUT:
        return f"the output of {_layer(int(name), layer_kinds)} is the first that differs, {ranks}."
    if kind == GRADIENT:
        above = _layer(int(name) + 1, layer_kinds)
        return f"all outputs agree; the gradient that {above} passes down is the first that differs, {ranks}."
    if kind == PARAMETER:
        owner = name.split(".")
        place = _layer(int(owner[1]), layer_kinds) if owner[0] == "layers" else owner[0]
        return f"all outputs agree; the gradient of {name} in {place} differs, {ranks}."
    return f"every layer agrees, but {bad.name} differs, {ranks}."


def verify(config: RunConfig, cp_size: int, *, say: Callable[[str], None] = print) -> int:
    """Compare one rank with the ranks of a mesh on this machine; prints the report.

    The configuration of any run will do. What it says of training, the engine first, takes no part. With
    ``backend: megatron`` the one rank still runs the native model.

    Args:
        config: its tp_size and pp_size are used, its dp_size is not.
        cp_size: ranks that share the sequence.

    Returns:
        0 if everything is within its budget, else 1.

    Raises:
        ValueError: the configuration does not fit; one rank; a wire that rounds.
        RankFailure: a rank failed.
    """
    from lasp.launch.launchers.local import run_local

    several = config.model_copy(update={"cp_size": cp_size, "dp_size": 1})
    if several.num_ranks < 2:
        raise ValueError(f"cp_size must be at least 2 to compare with one rank, got {cp_size}. Pass --cp 2.")
    if config.wire_dtype is not None:
        raise ValueError(
            f"wire_dtype={config.wire_dtype} rounds states on purpose, and verify tells rounding from faults by what "
            "one rank rounds, which sends nothing. Add wire_dtype=null: the exchange is the same."
        )
    only = {"backend": "native", "tp_size": 1, "pp_size": 1, "cp_size": 1, "dp_size": 1, "megatron": MegatronConfig()}
    one = config.model_copy(update=only)
    many = checked(several.plain(), f"--cp {cp_size}")
    with tempfile.TemporaryDirectory(prefix="lasp-verify-") as directory:
        run_local(many, many.num_ranks, "lasp.launch.verify:verify_rank", output=directory)
        ranks = [load_file(Path(directory) / f"rank-{rank}.safetensors") for rank in range(many.num_ranks)]
    parts = ranks if config.backend == "native" else _joined(ranks, many)
    truth = trace_config(one, torch.float64)
    single = trace_config(one, config.torch_dtype)
    batch, held_out = first_batches(one, Mesh.build())
    tokens = sum(held.cp.layout.total_tokens for held in held_out)
    if 0 < tokens < cp_size:
        say(f"the held-out sequence of {tokens} tokens cannot be cut over {cp_size} ranks: its loss is not compared.")
        del truth["eval_loss"]
    if config.engine != "ddp":
        say(f"engine={config.engine} takes no part: the model's operators and gradients are compared, no engine's.")
    layout = getattr(SequenceLayout, config.layout)(batch.cp.layout.cu_seqlens_global, cp_size)
    findings = compare(truth, single, parts, layout)
    say(_table(findings, layout, config.layout, config.model.layer_kinds, config.dtype))
    difference = explain(findings, config.model.layer_kinds)
    mesh = f"cp = {cp_size}"
    if many.num_ranks > cp_size:
        mesh = f"tp {config.tp_size} x pp {config.pp_size} x cp {cp_size}"
    equal = "equals cp = 1" if config.backend == "native" else "on Megatron equals the native model on one rank"
    say(f"FAIL: {difference}" if difference else f"PASS: {mesh} {equal} in every tensor.")
    return 1 if difference else 0


def verify_rank(config: RunConfig, output: str) -> None:
    """One rank of the cut run: leaves its trace in ``output``."""
    job = Job.from_environment() or Job()
    device = choose_device(config.device, job)
    timeout = timedelta(seconds=config.timeout_s)
    with process_group(job, device, timeout), backend_mesh(config, device, timeout) as mesh:
        trace = trace_config(config, config.torch_dtype, mesh)
        save_file(trace, Path(output) / f"rank-{mesh.rank}.safetensors")


def trace_config(config: RunConfig, dtype: torch.dtype, mesh: Mesh | None = None) -> Trace:
    """The trace of the model and the first batch of ``config``, computed in ``dtype``."""
    mesh = Mesh.build(device=choose_device(config.device, Job())) if mesh is None else mesh
    model = make_model(config.model, config.seed, config.torch_dtype).to(mesh.device, dtype)
    batches = first_batches(config, mesh)
    if config.backend == "native":
        return trace_step(model, *batches, mesh)
    from lasp.parallel.megatron import trace

    options = {name: getattr(config.megatron, name) for name in ("virtual_stages", "sequence_parallel")}
    return trace.trace_step(model, *batches, mesh, **options)


def _joined(ranks: list[Trace], config: RunConfig) -> list[Trace]:
    """One trace per cp rank from those of all ranks of a Megatron mesh."""
    sequence_parallel = config.megatron.sequence_parallel
    return join_traces(ranks, config.model, config.tp_size, config.cp_size, sequence_parallel=sequence_parallel)


def make_model(config: ModelConfig, seed: int, dtype: torch.dtype) -> LinearLlama:
    """The untrained model of a run, its values rounded to ``dtype`` as the run rounds them."""
    return LinearLlama(config, generator=torch.Generator().manual_seed(seed)).to(dtype)


def first_batches(config: RunConfig, mesh: Mesh) -> tuple[Batch, list[Batch]]:
    """The first training sequence of the run and one held-out sequence, as this rank sees them."""
    found = open_data(
        config.data.source,
        config.run_dir / "data",
        load_tokenizer(config.data.tokenizer),
        DataPlan(config.data.seq_len, 1, config.layout, config.exchange_options, config.data.join_documents),
        mesh,
        eval_fraction=config.data.eval_fraction,
        eval_sequences=1,
        seed=config.seed,
        vocab_size=config.model.vocab_size,
    )
    return found.step_batches(0, mesh)[0], found.eval_batches


def _watch(trace: Trace, index: int):
    """A forward hook that keeps a block's output and, later, the gradient that arrives at it."""

    def keep(_module: nn.Module, _inputs: object, output: Tensor | tuple) -> None:
        x = output[0] if isinstance(output, tuple) else output
        if not x.requires_grad:  # evaluation
            return
        trace[f"{OUTPUT}.{index}"] = x.detach().flatten(0, -2)
        x.register_hook(lambda grad: trace.__setitem__(f"{GRADIENT}.{index}", grad.detach().flatten(0, -2)))

    return keep


def _reading_order(trace: Trace) -> list[str]:
    """Outputs upwards; then downwards each gradient, before it the parameters of the block that passed it on."""
    blocks = sorted(int(name.split(".")[1]) for name in trace if name.startswith(OUTPUT))
    parameters = [name for name in trace if name.startswith(PARAMETER)]
    of_block = lambda i: [n for n in parameters if n.startswith(f"{PARAMETER}.layers.{i}.")]  # noqa: E731
    placed = {name for i in blocks for name in of_block(i)}
    order = [f"{OUTPUT}.{i}" for i in blocks]
    order += [n for n in parameters if n not in placed and "embed" not in n]
    for i in reversed(blocks):
        order += [f"{GRADIENT}.{i}", *of_block(i)]
    order += [n for n in parameters if n not in placed and "embed" in n]
    return [*order, *(n for n in ("loss", "eval_loss", "grad_norm") if n in trace)]


def _layer(index: int, layer_kinds: str) -> str:
    if index < 0:
        return "the embedding"
    if index >= len(layer_kinds):
        return "the head"
    return f"layer {index} ({'linear' if layer_kinds[index] == 'L' else 'softmax'})"


def _table(findings: list[Finding], layout: SequenceLayout, layout_name: str, layer_kinds: str, dtype: str) -> str:
    """One line per layer, the parameters, and the scalars: error over budget."""
    documents, total = layout.num_documents, layout.total_tokens
    lines = [
        f"{total:,} tokens in {documents} document(s), {layout_name} over {layout.cp_size} ranks, {dtype}; "
        "error / budget (above 1: not rounding)"
    ]
    ratio = {f.name: f.error / f.budget if f.budget else float(f.error > 0) for f in findings}
    show = lambda name: f"{ratio[name]:8.3f}" if name in ratio else "       -"  # noqa: E731
    lines.append(f"{'':24}{'output':>8} {'gradient':>8} {'parameters':>10}")
    for index in range(-1, len(layer_kinds)):
        own = [r for n, r in ratio.items() if n.startswith(f"{PARAMETER}.layers.{index}.")]
        own = f"{max(own):10.3f}" if own else ""
        name = _layer(index, layer_kinds)
        lines.append(f"{name:24}{show(f'{OUTPUT}.{index}')} {show(f'{GRADIENT}.{index}')} {own}")
    rest = [r for n, r in ratio.items() if n.startswith(PARAMETER) and ".layers." not in n]
    lines.append(f"{'other parameters':24}{'':18}{max(rest):10.3f}")
    lines += [f"{name:24}{show(name)}" for name in ("loss", "eval_loss", "grad_norm") if name in ratio]
    return "\n".join(lines)
