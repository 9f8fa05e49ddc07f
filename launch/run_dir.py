"""What a run finds in its directory: results that it continues stay, all others are moved aside.

run_dir/config.yaml, checkpoints/, metrics.jsonl, tensorboard/      of the run that is going on
run_dir/previous-N/                                                 what it did not continue
"""

from __future__ import annotations

import shutil
from pathlib import Path

import yaml

from lasp.launch.report import METRICS
from lasp.launch.schema import RunConfig
from lasp.parallel import checkpoint as checkpoints
from lasp.parallel.files import writing

_RESULTS = ("checkpoints", METRICS, "tensorboard")


def claim(config: RunConfig, continued: checkpoints.Checkpoint | None) -> list[str]:
    """Make the directory this run's: call it when nothing can refuse the run any more.

    Args:
        continued: the checkpoint that the run goes on from. One of another directory starts over here, like
            none with ``checkpoint.resume=false``: older results are moved aside. With one of this directory
            only the checkpoints of later steps are, so that the newest is always the continued one.

    Returns:
        what the user should know.
    """
    run_dir = config.run_dir
    with writing(run_dir):
        run_dir.mkdir(parents=True, exist_ok=True)
        own = run_dir / "checkpoints"
        notes = []
        if continued is not None and continued.path.parent.resolve() == own.resolve():
            later = [path for path in checkpoints.list_checkpoints(own) if checkpoints.step_of(path) > continued.step]
            if later:
                aside = _new_folder(run_dir)
                (aside / "checkpoints").mkdir()
                for path in later:
                    path.rename(aside / "checkpoints" / path.name)
                if (run_dir / METRICS).is_file():
                    shutil.copy(run_dir / METRICS, aside)
                names = ", ".join(path.name for path in later)
                notes.append(f"this run goes on from step {continued.step}; moved {names} of later steps to {aside}.")
        elif continued is not None or config.checkpoint.resume is False:
            old = [run_dir / name for name in _RESULTS if (run_dir / name).exists()]
            if old:
                aside = _new_folder(run_dir)
                for path in old:
                    path.rename(aside / path.name)
                notes.append(f"moved the older results of {run_dir} to {aside}.")
        (run_dir / "config.yaml").write_text(yaml.safe_dump(config.plain(), sort_keys=False))
    return notes


def _new_folder(run_dir: Path) -> Path:
    """The next ``previous-N``."""
    taken = [int(path.name[9:]) for path in run_dir.glob("previous-*") if path.name[9:].isdigit()]
    folder = run_dir / f"previous-{1 + max(taken, default=0)}"
    folder.mkdir()
    return folder
