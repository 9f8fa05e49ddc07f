"""The sections of a run's YAML file: types, ranges and defaults of their keys."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from lasp.launch.data.token_files import STDLIB
from lasp.launch.data.tokenizer import BYTES


def _yes_no_or_path(value: Any) -> bool | str:
    if not isinstance(value, (bool, str)) or value == "":
        raise ValueError(f"must be true, false or the path of a checkpoint, got {value!r}. Set one of them.")
    return value


def _nodes(value: Any) -> int | str:
    """A number of nodes, or the fewest and the most as MIN:MAX."""
    low, colon, high = str(value).partition(":")
    whole = isinstance(value, (int, str)) and not isinstance(value, bool)
    if not whole or not low.isdecimal() or (colon and not high.isdecimal()) or not 1 <= int(low) <= int(high or low):
        raise ValueError(
            f"must be a number of nodes, or the fewest and the most as MIN:MAX, got {value!r}. Set 2, or 1:2 for a job "
            "that goes on when a node is lost."
        )
    return int(low) if not colon or int(low) == int(high) else f"{int(low)}:{int(high)}"


def _endpoint(value: Any) -> str | None:
    host, _, port = value.rpartition(":") if isinstance(value, str) else ("", "", "")
    if value is not None and not (host and port.isdecimal() and 0 < int(port) < 65536):
        raise ValueError(
            f"must be HOST:PORT of the first node, got {value!r}. Set a host that all nodes can reach and a free port "
            "below 65536, like node1:29400."
        )
    return value


def _ray_address(value: Any) -> str | None:
    host, colon, port = value.rpartition(":") if isinstance(value, str) else ("", "", "")
    plain = bool(host and colon and "/" not in host and port.isdecimal() and 0 < int(port) < 65536)
    if value is not None and value != "auto" and not plain:
        raise ValueError(
            f"must be auto or the HOST:PORT of a cluster's head, got {value!r}. Run the command on a machine of the "
            "cluster and use auto, or leave it out: a Ray on this machine is started for the run."
        )
    return value


def _name(value: Any) -> Any:
    """YAML reads a job's number as an int."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


Count = Annotated[int, Field(ge=1)]
Name = Annotated[str, Field(pattern=r"^[\w.:-]+$")]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
MAX_LR = 1e6  # beyond it a float32 step overflows
Beta = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """Keys that are all known, values of the right type, nothing changed afterwards."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())


class DataConfig(Section):
    """What to learn from.

    Attributes:
        source: ``stdlib`` (the running interpreter's standard library) or the prefix of a prepared .bin/.idx
            pair.
        tokenizer: ``bytes`` or a Hugging Face tokenizers JSON file.
        seq_len: tokens of one packed sequence, over all cp ranks.
        batch_size: sequences per optimizer step, over all ranks; above dp_size they are accumulated.
        eval_fraction: share of the documents that is held out.
        join_documents: treat each sequence as one document, whatever it was packed from.
    """

    source: str = STDLIB
    tokenizer: str = BYTES
    seq_len: Annotated[int, Field(ge=2)] = 16384
    batch_size: Count = 1
    eval_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.02
    join_documents: bool = False


class OptimizerConfig(Section):
    """AdamW, linear warmup, cosine decay from ``lr`` to ``min_lr``. ``clip``: largest gradient norm, or null."""

    lr: Annotated[Positive, Field(le=MAX_LR)] = 3e-3
    min_lr: NonNegative = 0.0
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    betas: Annotated[tuple[Beta, Beta], Field(strict=False)] = (0.9, 0.95)  # YAML has lists, no tuples
    eps: Positive = 1e-8
    weight_decay: NonNegative = 0.1
    clip: Positive | None = 1.0


class CheckpointConfig(Section):
    """Checkpoints in ``run_dir/checkpoints``.

    Attributes:
        every: steps between two; null: only at the end.
        keep: how many to keep; null: all.
        background: write while training goes on, from a copy in host memory.
        resume: true: continue from the newest good one; false: start over (older results are moved aside);
            or the path of a checkpoint to continue from.
    """

    every: Count | None = None
    keep: Count | None = 2
    background: bool = True
    resume: Annotated[bool | str, BeforeValidator(_yes_no_or_path)] = True


class EvalConfig(Section):
    """Held-out loss every so many steps (null: only at the end), over at most ``sequences`` sequences."""

    every: Count | None = None
    sequences: Count = 4


class MegatronConfig(Section):
    """Options of ``backend: megatron``.

    Attributes:
        virtual_stages: model chunks per pipeline stage (the interleaved schedule); null: one.
        sequence_parallel: norms on 1 / tp_size of the tokens.
        distributed_optimizer: optimizer states cut over dp x cp.
    """

    virtual_stages: Annotated[int, Field(ge=2)] | None = None
    sequence_parallel: bool = False
    distributed_optimizer: bool = True


class TorchrunConfig(Section):
    """Options of ``launcher: torchrun``.

    Attributes:
        nodes: how many run this job, or MIN:MAX: fewer than MAX go on when one is lost.
        ranks_per_node: null: those that the sizes ask for, over the nodes.
        endpoint: HOST:PORT of the first node, which all nodes can reach; null: this machine's loopback, for one node.
        max_restarts: how often the ranks are started again, from the last checkpoint, after one has failed.
        is_host: whether this node is the endpoint's; null: torchrun compares host names and addresses.
        local_addr: the name or address at which the others reach this node; null: its host name.
        interface: the network interface of Gloo and NCCL, like eth0; null: they choose.
        job_id: equal on all nodes, different from other jobs at the same endpoint; null: Slurm's, or of run_dir.
    """

    nodes: Annotated[int | str, BeforeValidator(_nodes)] = 1
    ranks_per_node: Count | None = None
    endpoint: Annotated[str | None, BeforeValidator(_endpoint)] = None
    max_restarts: Annotated[int, Field(ge=0)] = 3
    is_host: bool | None = None
    local_addr: Name | None = None
    interface: Name | None = None
    job_id: Annotated[Name | None, BeforeValidator(_name)] = None

    @property
    def node_range(self) -> tuple[int, int]:
        """The fewest and the most nodes."""
        low, _, high = str(self.nodes).partition(":")
        return int(low), int(high or low)


class RayConfig(Section):
    """Options of ``launcher: ray``.

    Attributes:
        address: null: start a Ray on this machine for the run; ``auto`` or ``HOST:PORT``: join a cluster that this
            machine is part of.
        num_workers: ranks to start with; null: those of the mesh sizes, with dp_size null as many as fit.
        cpus_per_worker: CPUs that a rank reserves, and its threads.
        gpus_per_worker: GPUs that a rank reserves; null: one where a node has GPUs and device is not cpu.
        max_failures: restarts after a rank or node was lost; -1: no limit.
        wait_s: how long to wait for the resources of the ranks, at the start and at a restart.
        bind: address of this machine on which the job's store listens; null: the loopback address where all nodes
            are on this machine, else the address that the cluster knows this machine by.
    """

    address: Annotated[str | None, BeforeValidator(_ray_address)] = None
    num_workers: Count | None = None
    cpus_per_worker: Count = 1
    gpus_per_worker: Annotated[int, Field(ge=0, le=1)] | None = None
    max_failures: Annotated[int, Field(ge=-1)] = 3
    wait_s: Annotated[Positive, Field(le=1e6)] = 600.0
    bind: Annotated[str, Field(min_length=1)] | None = None


class LogConfig(Section):
    """What a run leaves to read.

    Attributes:
        every_s: seconds between two lines where no terminal shows a progress bar.
        tensorboard: write event files.
        sample_tokens: length of the text that the trained model writes at the end; 0: none.
    """

    every_s: NonNegative = 5.0
    tensorboard: bool = True
    sample_tokens: Annotated[int, Field(ge=0)] = 200
