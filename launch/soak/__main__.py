"""Does a job survive? A real job whose ranks are killed at random, many times; its curve must be as if they were not.

    python -m lasp.launch.soak CONFIG [KEY=VALUE]... --launcher torchrun --kills 20 --nodes 2

Nodes are simulated on this machine: one torchrun agent each, or one Ray node each beside a head. A kill -9 takes a
rank, or with several nodes now and then a whole node, which comes back after the others have gone on without it (under
Ray a rank is killed then, since Ray takes nodes back at a restart). Every step is compared with an uninterrupted run:
equal bits while all steps so far ran on as many ranks, a relative 1e-5 from the first step on that did not. Training
amplifies rounding, so the latter wants dtype=float64 and a model that learns gently, as configs/soak.yaml has.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import click

from lasp.launch.config.schema import load_config
from lasp.launch.run.report import METRICS, read_metrics
from lasp.launch.soak.jobs import RayJob, RunningJob, TorchrunJob

TOLERANCE = 1e-5  # between steps on different numbers of ranks
_LIMIT_S = 600.0  # for a job to start, to go on after a kill, to end
_NODE_SHARE = 0.25  # of the kills, where there are several nodes


@dataclass
class Tally:
    """What happened. ``failures``: sentences; none means that the job survived."""

    kills_of_ranks: int = 0
    kills_of_nodes: int = 0
    recoveries: int = 0
    steps: int = 0
    equal_bits: int = 0
    within_tolerance: int = 0
    largest_difference: float = 0.0
    failures: list[str] = field(default_factory=list)


class Curve:
    """The curve of a run in progress."""

    def __init__(self, run_dir: Path):
        self._run_dir = run_dir

    def records(self) -> dict[int, dict[str, Any]]:
        """By step."""
        return {record["step"]: record for record in read_metrics(self._run_dir)}

    def last(self) -> dict[str, Any]:
        """The newest record; step 0 on no ranks before there is one."""
        records = read_metrics(self._run_dir)
        return records[-1] if records else {"step": 0, "ranks": 0}

    def has(self, step: int) -> bool:
        """Whether the run has come to ``step``."""
        return self.last()["step"] >= step

    def written_at(self) -> int:
        """When the newest record was written, in nanoseconds."""
        try:
            return (self._run_dir / METRICS).stat().st_mtime_ns
        except FileNotFoundError:
            return 0


def torment(
    job: RunningJob, curve: Curve, kills: int, full: Sequence[int], spread: int, chance: random.Random, tally: Tally
) -> None:
    """Kill ``kills`` times, wait each time until the job goes on.

    Args:
        full: ranks of each node when all is well.
        spread: most steps between a recovery and the next kill.

    Raises:
        TimeoutError: it does not go on. RuntimeError: it has ended.
    """
    _await_recovery(job, curve, full, set(), 0)
    for kill in range(kills):
        target = curve.last()["step"] + chance.randint(1, spread)
        _await(partial(curve.has, target), job, f"step {target}")
        nodes = job.nodes()
        everyone = {pid for ranks in nodes for pid in ranks}
        now = time.time_ns()
        whole = len(nodes) > 1 and (chance.random() < _NODE_SHARE or (kill == kills - 1 and not tally.kills_of_nodes))
        if whole:
            victim = chance.randrange(len(nodes))
            click.echo(f"kill {kill + 1}/{kills}: node {victim} after step {curve.last()['step']}")
            job.kill_node(victim)
            tally.kills_of_nodes += 1
            rest = [0 if node == victim else ranks for node, ranks in enumerate(full)]
            _await_recovery(job, curve, rest, everyone, now)
            everyone, now = {pid for ranks in job.nodes() for pid in ranks}, time.time_ns()
            job.start_node(victim)
            if not job.takes_back:
                os.kill(chance.choice(sorted(everyone)), signal.SIGKILL)
                tally.kills_of_ranks += 1
        else:
            victim = chance.choice(sorted(everyone))
            click.echo(f"kill {kill + 1}/{kills}: a rank after step {curve.last()['step']}")
            with contextlib.suppress(ProcessLookupError):
                os.kill(victim, signal.SIGKILL)
            tally.kills_of_ranks += 1
        _await_recovery(job, curve, full, everyone, now)
        tally.recoveries += 1


def _await_recovery(job: RunningJob, curve: Curve, wanted: Sequence[int], old: set[int], since: int) -> None:
    """Return when each node has the wanted number of new ranks and they have made a step."""

    def fresh() -> bool:
        nodes = job.nodes()
        new = [len(set(ranks) - old) for ranks in nodes] == list(wanted) == [len(ranks) for ranks in nodes]
        return new and curve.written_at() > since and curve.last().get("ranks") == sum(wanted) and stepped()

    started: list[int] = []

    def stepped() -> bool:
        """A record that was written after the new ranks were first seen: the older ranks are gone by then."""
        started.append(curve.written_at())
        return started[-1] > started[0]

    _await(fresh, job, f"a step on {sum(wanted)} ranks")


def _await(condition: Callable[[], bool], job: RunningJob, what: str) -> None:
    deadline = time.monotonic() + _LIMIT_S
    while not condition():
        codes = job.exit_codes()
        if all(code is not None for code in codes) or any(code not in (None, 0, -signal.SIGKILL) for code in codes):
            raise RuntimeError(f"the job ended with exit codes {codes} before {what}. Raise steps= if these are 0.")
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} did not come within {_LIMIT_S:g} s")
        time.sleep(0.02)


def compare(expected: dict[int, dict], actual: dict[int, dict], ranks: int, tally: Tally) -> None:
    """Every step of a tormented run against the uninterrupted one, into ``tally``.

    Args:
        ranks: of the uninterrupted run.
    """
    tally.steps = len(actual)
    if list(actual) != list(expected):
        missing = sorted({*expected} ^ {*actual})
        tally.failures.append(f"the curves hold different steps: {missing[:8]} are in one of them only")
    changed = False
    for step in (step for step in expected if step in actual):
        changed = changed or actual[step].get("ranks") != ranks
        for key in ("loss", "grad_norm"):
            want, got = expected[step][key], actual[step][key]
            gap = abs(got - want) / max(abs(want), 1e-12)
            tally.largest_difference = max(tally.largest_difference, gap)
            if not (got == want or (changed and gap <= TOLERANCE)):
                rule = f"within {TOLERANCE:g}" if changed else "equal to the last bit"
                tally.failures.append(f"step {step}: {key} {got!r}, uninterrupted {want!r}; must be {rule}")
        tally.within_tolerance += changed
        tally.equal_bits += not changed


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("config")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--launcher", type=click.Choice(["torchrun", "ray"]), default="torchrun", show_default=True)
@click.option("--kills", type=click.IntRange(1), default=20, show_default=True)
@click.option("--nodes", type=click.IntRange(1), default=1, show_default=True, help="Simulated on this machine.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the kills.")
def main(config: str, overrides: tuple[str, ...], launcher: str, kills: int, nodes: int, seed: int) -> None:
    """Train as CONFIG says, uninterrupted and again with ranks killed at random; exit 1 unless the curves agree."""
    own = [*overrides, "log.sample_tokens=0", "checkpoint.resume=true"]
    base = load_config(config, own)
    calm, killed = base.run_dir / "uninterrupted", base.run_dir / "killed"
    for folder in (calm, killed):
        if folder.exists():
            raise click.ClickException(f"{folder} exists. Remove it, or choose another run_dir=.")
    ranks = base.num_ranks
    full = [ranks // nodes] * nodes
    if ranks % nodes:
        raise click.ClickException(f"{ranks} ranks cannot be spread over {nodes} nodes. Change the sizes.")

    click.echo(f"an uninterrupted run on {ranks} ranks, in {calm}")
    quiet = ["log.every_s=1000", "log.tensorboard=false"]
    command = [sys.executable, "-m", "lasp.launch.cli", "train", config, *own, *quiet, "launcher=local"]
    subprocess.run([*command, f"run_dir={calm}"], check=True, stdout=subprocess.DEVNULL)

    spread = 2 * (base.checkpoint.every or 4)  # so that some kills follow a new checkpoint, some do not
    tally, log = Tally(), base.run_dir / "killed.log"
    more = [*own, *quiet, f"run_dir={killed}", f"launcher={launcher}", "dp_size=null"]  # it follows from the nodes
    if launcher == "torchrun":
        more += [f"torchrun.nodes={f'1:{nodes}' if nodes > 1 else 1}", f"torchrun.ranks_per_node={full[0]}"]
        more += [f"torchrun.max_restarts={4 * kills + 8}", f"torchrun.job_id=soak-{os.getpid()}"]
    else:
        more += ["ray.max_failures=-1"]
    killed_config, curve = load_config(config, more), Curve(killed)
    try:
        if launcher == "torchrun":
            job = TorchrunJob(killed_config, [config, *more], log)
        else:
            job = RayJob([config, *more], nodes, full[0], log)
        with contextlib.closing(job):
            torment(job, curve, kills, full, spread, random.Random(seed), tally)
            click.echo("no more kills; waiting for the end")
            _await_end(job)
    except (RuntimeError, TimeoutError) as error:
        tally.failures.append(f"{error}; see {log}")
    compare(Curve(calm).records(), curve.records(), ranks, tally)
    sys.exit(report(tally))


def _await_end(job: RunningJob) -> None:
    deadline = time.monotonic() + _LIMIT_S
    while any(code is None for code in job.exit_codes()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"the job did not end within {_LIMIT_S:g} s")
        time.sleep(0.1)
    if any(job.exit_codes()):
        raise RuntimeError(f"the job ended with exit codes {job.exit_codes()}")


def report(tally: Tally) -> int:
    """Print the counts; 0 if nothing failed, else 1."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="soak", title_justify="left", show_header=False, box=None)
    rows = {
        "ranks killed": tally.kills_of_ranks,
        "nodes killed": tally.kills_of_nodes,
        "went on": tally.recoveries,
        "steps": tally.steps,
        "equal to the last bit": tally.equal_bits,
        f"after a change of ranks, within {TOLERANCE:g}": tally.within_tolerance,
        "largest relative difference": f"{tally.largest_difference:.2e}",
        "failures": len(tally.failures),
    }
    for name, value in rows.items():
        table.add_row(name, str(value))
    console = Console(highlight=False, soft_wrap=True)
    console.print(table)
    for failure in tally.failures[:20]:
        console.print(f"FAIL: {failure}", markup=False)
    return 1 if tally.failures else 0


if __name__ == "__main__":
    main()
