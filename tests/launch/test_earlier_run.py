"""A run folder that an earlier version wrote: the run goes on as if it had not been stopped."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "data" / "earlier_run"
# Eight float64 steps of a small model; another processor adds in another order, 1e-16 a sum, and Adam amplifies it.
# The same processor gives the same bits.
TOLERANCE = 1e-11


def metrics(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_of_an_earlier_version_goes_on(tmp_path):
    run = tmp_path / "run"
    shutil.copytree(FOLDER / "run", run)
    command = [sys.executable, "-m", "lasp.launch.cli", "train", str(run / "config.yaml")]
    command += [f"run_dir={run}", f"data.source={FOLDER / 'data' / 'text'}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert "resumed at step 4 of 8" in done.stdout
    found, expected = metrics(run / "metrics.jsonl"), metrics(FOLDER / "uninterrupted.jsonl")
    assert [record["step"] for record in found] == list(range(1, 9))
    for own, old in zip(found, expected, strict=True):
        assert (own["tokens"], own["labels"], own["lr"]) == (old["tokens"], old["labels"], old["lr"])
        for key in {"loss", "grad_norm", "eval_loss"} & {*old}:
            assert own[key] == pytest.approx(old[key], rel=TOLERANCE), (own["step"], key)
