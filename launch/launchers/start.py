"""Who does the work of a command: this process, or ranks that it starts."""

from __future__ import annotations

import pkgutil
from collections.abc import Sequence

from lasp.launch.config.schema import RunConfig
from lasp.launch.run.rendezvous import Job

WORK = {"train": "lasp.launch.train:train", "doctor": "lasp.launch.doctor.examine:examine"}  # on every rank


def start(command: str, config: RunConfig, arguments: Sequence[str]) -> None:
    """Run a command on all ranks; returns when those that this process answers for have succeeded.

    A process that somebody has started as a rank is one. Otherwise this one starts this node's ranks with
    ``launcher=torchrun``, several of this machine where the sizes ask for them, and is the only rank else.

    Args:
        command: ``train`` or ``doctor``.
        arguments: of the command: CONFIG and overrides.

    Raises:
        ValueError: the configuration does not fit. RankFailure: a rank that was started here failed.
    """
    alone = Job.from_environment() is None
    if alone and config.launcher == "torchrun":
        from lasp.launch.launchers.torchrun import run_node

        run_node(config, arguments, command)
    elif alone and config.num_ranks > 1:
        from lasp.launch.launchers.local import run_local

        run_local(config, config.num_ranks, WORK[command])
    else:
        pkgutil.resolve_name(WORK[command])(config)
