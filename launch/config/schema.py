"""The one typed schema of a run: what a YAML file may say, what the command line may override.

    config = load_config("configs/quickstart.yaml", ["cp_size=2", "optimizer.lr=1e-3", "model.mixer=gla"])

Everything is checked once, here, before anything starts: unknown keys, types, ranges, values that
contradict one another, parts that are named but not built. Sizes that depend on the data or on the number
of ranks are checked where these are known, in :mod:`lasp.launch.data.stream` and :mod:`lasp.parallel.mesh`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, model_validator

from lasp.checks import not_one_of
from lasp.cost.fabric import PRESETS, Fabric
from lasp.cp_context import ExchangeOptions
from lasp.exchange import names as exchange_names
from lasp.launch.config.keys import check_keys, nest
from lasp.launch.config.sections import (
    CheckpointConfig,
    Count,
    DataConfig,
    EvalConfig,
    LogConfig,
    MegatronConfig,
    OptimizerConfig,
    Positive,
    RayConfig,
    Section,
    TorchrunConfig,
)
from lasp.launch.config.yaml_text import parse_yaml
from lasp.launch.data.token_files import STDLIB
from lasp.launch.data.tokenizer import BYTES, load_tokenizer
from lasp.models.config import ModelConfig
from lasp.parallel.engines.table import native_engine
from lasp.parallel.file_errors import reading
from lasp.softmax.table import SOFTMAX_EXCHANGES, check_heads, check_window, softmax_names

MAX_TIMEOUT_S = 1e6  # beyond it a clock overflows
MIN_TIMEOUT_S = 1.0  # processes of one job start further apart than less
ALIASES = {"cp": "cp_size", "dp": "dp_size", "tp": "tp_size", "pp": "pp_size"}


def _path_of_a_run(value: Any) -> Path:
    if not isinstance(value, (str, Path)) or not str(value):
        raise ValueError(f"must be the path of a folder, got {value!r}. Use one like runs/NAME.")
    return Path(value)


def _exchange(value: str) -> str:
    if value not in exchange_names():
        raise ValueError(not_one_of(exchange_names(), value))
    return value


def _softmax_exchange(value: str) -> str:
    if value not in softmax_names():
        raise ValueError(not_one_of(softmax_names(), value))
    return value


class RunConfig(Section):
    """A run. Top-level keys of the YAML file.

    Attributes:
        steps: optimizer steps.
        dtype: what the model computes in; master weights are fp32 (fp64 with float64).
        cp_size, dp_size: ranks per sequence, sequences in flight; dp_size null: from the number of ranks, 1 if
            local.
        tp_size, pp_size: tensor- and pipeline-parallel ranks, of backend megatron.
        engine: who holds parameters, gradients and states: a name in :mod:`lasp.parallel.engines.table`.
        backend: ``native``, or ``megatron``: the same model on megatron-core, on CUDA devices.
        offload_activations: keep what a forward pass saves for its backward in host memory.
        device: ``auto`` takes CUDA where every local rank gets a device of its own, else the CPU.
        layout: how a sequence is cut.
        exchange: how the states of linear layers travel; ``auto``: as is predicted to be fastest on ``fabric``.
        softmax_exchange: how keys and values of softmax layers without a window travel.
        fabric: the links between ranks, for ``auto`` and where states travel in slices (``all_scan``,
            ``hierarchical``): a preset's name, or a file of ``lasp bench fabric``.
        wire_dtype: ``bfloat16`` halves the states on the wire, and rounds them.
        timeout_s: how long a rank waits for another one, at the start and in a collective.
        model: fields of ModelConfig, or ``preset`` with fields on top; vocab_size defaults to the tokenizer's.
    """

    run_dir: Annotated[Path, BeforeValidator(_path_of_a_run)]
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    steps: Count
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    cp_size: Count = 1
    dp_size: Count | None = None
    tp_size: Count = 1
    pp_size: Count = 1
    backend: Literal["native", "megatron"] = "native"
    engine: str = "ddp"
    offload_activations: bool = False
    launcher: Literal["local", "torchrun", "ray"] = "local"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    layout: Literal["contiguous", "zigzag"] = "contiguous"
    exchange: Annotated[str, AfterValidator(_exchange)] = "all_gather"
    softmax_exchange: Annotated[str, AfterValidator(_softmax_exchange)] = "all_gather"
    fabric: str | None = None
    wire_dtype: Literal["bfloat16"] | None = None
    timeout_s: Annotated[Positive, Field(ge=MIN_TIMEOUT_S, le=MAX_TIMEOUT_S)] = 600.0
    model: Annotated[ModelConfig, BeforeValidator(ModelConfig.from_dict)]
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: EvalConfig = EvalConfig()
    log: LogConfig = LogConfig()
    megatron: MegatronConfig = MegatronConfig()
    torchrun: TorchrunConfig = TorchrunConfig()
    ray: RayConfig = RayConfig()

    @model_validator(mode="before")
    @classmethod
    def _vocabulary_from_tokenizer(cls, values: Any) -> Any:
        model = values.get("model") if isinstance(values, dict) else None
        if isinstance(model, str):
            model = {"preset": model}
        if isinstance(model, Mapping) and "vocab_size" not in model:
            data = values.get("data") or {}
            name = data.get("tokenizer", BYTES) if isinstance(data, Mapping) else getattr(data, "tokenizer", BYTES)
            values = {**values, "model": {**model, "vocab_size": load_tokenizer(str(name)).vocab_size}}
        return values

    @model_validator(mode="after")
    def _check(self) -> RunConfig:
        native_engine(self.engine).check_available(self.dtype)
        if self.backend == "native":
            for key, only in (("tp_size", 1), ("pp_size", 1), ("megatron", MegatronConfig())):
                if getattr(self, key) != only:
                    raise ValueError(
                        f"{key}={getattr(self, key)} has no effect with backend=native: set backend=megatron, or leave "
                        f"{key} out."
                    )
        elif self.offload_activations:
            raise ValueError(
                "offload_activations=true has no effect with backend=megatron: leave it out, or set backend=native."
            )
        elif self.engine != "ddp":
            raise ValueError(
                f"engine={self.engine} has no effect with backend=megatron: leave engine out; Megatron's optimizer is "
                f"set by megatron.distributed_optimizer = {self.megatron.distributed_optimizer}."
            )
        if self.launcher != "torchrun" and self.torchrun != TorchrunConfig():
            changed = ", ".join(
                f"{key}={value}" for key, value in self.torchrun.model_dump(exclude_defaults=True).items()
            )
            raise ValueError(
                f"torchrun: {changed} has no effect with launcher={self.launcher}: set launcher=torchrun, or leave "
                "torchrun out."
            )
        self._check_ray()
        self._check_exchange()
        if not self.model.causal:
            raise ValueError(
                "model.mixer.causal=false is an encoder; this objective predicts the next token. "
                "Set model.mixer.causal=true."
            )
        if self.data.seq_len < self.cp_size:
            raise ValueError(
                f"data.seq_len = {self.data.seq_len} tokens cannot be cut over cp_size = {self.cp_size} ranks: "
                "each needs at least one. Use longer sequences or fewer ranks."
            )
        if self.optimizer.warmup_steps > self.steps:
            raise ValueError(
                f"optimizer.warmup_steps = {self.optimizer.warmup_steps} must not exceed steps = {self.steps}. "
                "Shorten the warmup or raise steps."
            )
        if self.optimizer.min_lr > self.optimizer.lr:
            raise ValueError(
                f"optimizer.min_lr = {self.optimizer.min_lr} must not exceed optimizer.lr = {self.optimizer.lr}. "
                "Lower the one or raise the other."
            )
        if self.data.batch_size % (self.dp_size or 1):
            raise ValueError(
                f"data.batch_size = {self.data.batch_size} sequences per step must be a multiple of dp_size = "
                f"{self.dp_size}. Set data.batch_size to a multiple of {self.dp_size}."
            )
        return self

    def _check_ray(self) -> None:
        ray = self.ray
        if self.launcher != "ray":
            if ray != RayConfig():
                changed = ", ".join(f"{key}={value}" for key, value in ray.model_dump(exclude_defaults=True).items())
                raise ValueError(
                    f"ray: {changed} has no effect with launcher={self.launcher}: set launcher=ray, or leave ray out."
                )
            return
        if ray.num_workers is not None:
            unit = self.ranks_per_sequence
            if self.dp_size is not None and ray.num_workers != unit * self.dp_size:
                raise ValueError(
                    f"ray.num_workers = {ray.num_workers} must equal tp_size x pp_size x cp_size x dp_size = "
                    f"{unit * self.dp_size}. Leave one of ray.num_workers and dp_size out."
                )
            if ray.num_workers % unit or self.data.batch_size % (ray.num_workers // unit):
                raise ValueError(
                    f"ray.num_workers = {ray.num_workers} must be tp_size x pp_size x cp_size = {unit} times a divisor "
                    f"of data.batch_size = {self.data.batch_size}. Leave it out: then as many as fit are started."
                )
        if ray.gpus_per_worker is not None and (self.device, ray.gpus_per_worker) in (("cpu", 1), ("cuda", 0)):
            raise ValueError(
                f"ray.gpus_per_worker = {ray.gpus_per_worker} does not go with device={self.device}. Leave it out."
            )

    def _check_exchange(self) -> None:
        kinds = self.model.layer_kinds
        for key, kind, name in (("exchange", "L", "linear"), ("softmax_exchange", "S", "softmax")):
            if getattr(self, key) != "all_gather" and kind not in kinds:
                raise ValueError(
                    f"{key}={getattr(self, key)} has no effect on model.pattern={self.model.pattern}: it has no {name} "
                    f"layer. Leave {key} out."
                )
        if self.wire_dtype and "L" not in kinds:
            raise ValueError(
                f"wire_dtype={self.wire_dtype} has no effect on model.pattern={self.model.pattern}: it has no linear "
                "layer. Leave it out."
            )
        if self.softmax_exchange in SOFTMAX_EXCHANGES:
            check_window(self.softmax_exchange, self.model.window, "softmax_exchange", "model.window")
            heads = self.model.heads // self.tp_size
            kv_heads = (self.model.kv_heads or self.model.heads) // self.tp_size
            check_heads(self.softmax_exchange, heads, kv_heads, self.cp_size, "softmax_exchange")
        _ = self.exchange_options  # a fabric that cannot be found, or has no effect

    @property
    def exchange_options(self) -> ExchangeOptions:
        """How the layers exchange."""
        fabric = None if self.fabric is None else Fabric.of(self.fabric)
        dtype = None if self.wire_dtype is None else getattr(torch, self.wire_dtype)
        return ExchangeOptions(self.exchange, self.softmax_exchange, fabric, dtype)

    @property
    def ranks_per_sequence(self) -> int:
        """Ranks that hold one copy of the model and work on the same sequences: tp x pp x cp."""
        return self.tp_size * self.pp_size * self.cp_size

    @property
    def num_ranks(self) -> int:
        """Ranks that the sizes ask for; where dp_size is left open, those of one sequence."""
        return self.ranks_per_sequence * (self.dp_size or 1)

    @property
    def torch_dtype(self) -> torch.dtype:
        """``dtype`` as torch knows it."""
        return getattr(torch, self.dtype)

    def plain(self) -> dict[str, Any]:
        """Every value as JSON and YAML know it; :meth:`model_validate` takes it back."""
        return self.model_dump(mode="json")

    def portable(self) -> dict[str, Any]:
        """:meth:`plain` with absolute paths: what a run stores means the same in any working directory."""
        values = self.plain()
        data, checkpoint = values["data"], values["checkpoint"]
        values["run_dir"] = os.path.abspath(values["run_dir"])
        if self.fabric is not None and self.fabric not in PRESETS:
            values["fabric"] = os.path.abspath(self.fabric)
        for key, word in (("source", STDLIB), ("tokenizer", BYTES)):
            data[key] = data[key] if data[key] == word else os.path.abspath(data[key])
        if isinstance(checkpoint["resume"], str):
            checkpoint["resume"] = os.path.abspath(checkpoint["resume"])
        return values


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> RunConfig:
    """A YAML file with ``key=value`` overrides on top; keys are dotted, values are YAML.

    Raises:
        ValueError: naming the file or override, the key, the rule and the value.
        OSError: the file cannot be read.
    """
    with reading(path):
        if Path(path).is_dir():
            raise ValueError(f"configuration {path} is a directory. Name a YAML file, like {path}/config.yaml.")
        if not Path(path).exists():
            raise ValueError(f"configuration {path} does not exist. Name a YAML file, like configs/quickstart.yaml.")
        text = Path(path).read_text(encoding="utf-8")
    values = parse_yaml(text, str(path))
    if not isinstance(values, dict):
        raise ValueError(
            f"{path} must hold a mapping of keys, got {type(values).__name__}. Write lines like `steps: 100`."
        )
    check_keys(values, str(path), RunConfig)
    for text in overrides:
        _apply_override(values, text)
    return checked(values, f"{path} with {', '.join(overrides)}" if overrides else str(path))


def checked(values: Mapping[str, Any], source: str) -> RunConfig:
    """The configuration that plain values make.

    Raises:
        ValueError: naming the source, each key, its rule and its value.
    """
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        lines = [_describe(problem) for problem in error.errors()]
        raise ValueError(f"{source}: " + "\n  ".join(lines)) from error


def _apply_override(values: dict[str, Any], text: str) -> None:
    """Set one dotted key. A named preset on the way becomes a mapping, so that its fields can be set."""
    key, equals, value_text = text.partition("=")
    if not equals or not key:
        raise ValueError(f"override {text!r} must have the form key=value, like optimizer.lr=1e-3.")
    value = parse_yaml(value_text, f"override {text!r}")
    *sections, last = ALIASES.get(key, key).split(".")
    check_keys(nest([*sections, last], value), f"override {text!r}", RunConfig)
    at = values
    for section in sections:
        inner = at.get(section)
        at[section] = {"preset": inner} if isinstance(inner, str) else dict(inner or {})
        at = at[section]
    at[last] = value


def _describe(problem: Mapping[str, Any]) -> str:
    """One pydantic problem as key, rule and value."""
    key = ".".join(str(part) for part in problem["loc"])
    message = problem["msg"].removeprefix("Value error, ").removeprefix("Input ")
    if problem["type"] == "missing":
        return f"{key} is required. Set {key}."
    if problem["type"] == "value_error":
        return f"{key}: {message}" if key else message
    value = problem["input"]
    quoted = isinstance(value, str) and problem["type"] in ("int_type", "float_type", "bool_type")
    remedy = " Leave out the quotes." if quoted and re.fullmatch(r"[-+.\deE]+|true|false", value) else ""
    return f"{key} {message}, got {value!r}.{remedy}"
