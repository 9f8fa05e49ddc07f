"""The gate that compiles the Triton kernels without a GPU, and its refusals."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")


@pytest.mark.timeout(600)
def test_every_shipped_tile_for_hopper_compiles_within_its_budget(tmp_path):
    """D = 128 with every decay, and one tile of each kernel for the other architectures."""
    path = tmp_path / "aot.json"
    command = [sys.executable, "-m", "lasp.kernels.aot", "--json", str(path)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=580, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    rows = json.loads(path.read_text())["rows"]
    hopper = [row for row in rows if row["arch"] == 90]
    assert f"all {len(rows)} kernels within budget" in run.stdout
    for row in hopper:
        assert row["spill"] <= (0 if row["kernel"].split()[0] in ("local_states", "o", "dq") else 64), row
        products = row["kernel"].split()[0] in ("local_states", "o", "dq", "dkdv")
        assert row["tensor_cores"] == ("wgmma" if products else "-"), row
    assert {row["case"] for row in hopper} == {"none", "fixed", "learned", "token", "channel", "bidirectional"}
    everything = {row["kernel"].split()[0] for row in hopper}
    assert {"o", "o fresh", "o safe", "o safe fresh", "local_states rev"} <= {row["kernel"] for row in hopper}
    for arch in (80, 100):
        assert {row["kernel"].split()[0] for row in rows if row["arch"] == arch} == everything


def test_what_exceeds_its_budget_is_a_fault():
    from lasp.kernels.aot import SHARED_BYTES, Launch, Usage, faults, line

    launch = Launch("", "o", (), (), (), ())
    assert faults(launch, Usage(255, 0, SHARED_BYTES[90], "wgmma"), 90) == []
    assert faults(launch, Usage(255, 8, 0, "wgmma"), 90) == ["spill 8 B > 0 B"]
    assert faults(Launch("", "dkdv", (), (), (), ()), Usage(255, 64, 0, "wgmma"), 90) == []
    assert faults(Launch("", "dkdv", (), (), (), ()), Usage(255, 72, 0, "wgmma"), 90) == ["spill 72 B > 64 B"]
    assert faults(launch, Usage(255, 8, SHARED_BYTES[80] + 1, "mma"), 80) == ["shared memory 101377 > 101376"]
    row = {"arch": 90, "dim": 128, "case": "none", "kernel": "o", "chunk": 64, "block": 64, "warps": 4, "stages": 2}
    assert line(row | {"fault": "does not compile: why"}).endswith("does not compile: why")


def test_a_fault_ends_with_an_error(monkeypatch, capsys):
    from lasp.kernels import aot

    class InThisProcess:
        """Stands for the pool of processes, which would not see the smaller budget."""

        def __init__(self, *_):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        map = staticmethod(map)

    monkeypatch.setattr(aot, "ProcessPoolExecutor", InThisProcess)
    monkeypatch.setattr(aot, "SHARED_BYTES", {90: 1})
    assert aot.main(["--arch", "90", "--cases", "token", "--kernels", "token_gates"]) == 1
    assert "1 of 1 kernels do not fit" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["--arch", "70"], ["--cases", "scalar"], ["--arch", "sm_90"]])
def test_unknown_selections_are_refused(arguments, capsys):
    from lasp.kernels import aot

    with pytest.raises(SystemExit) as refused:
        aot.main(arguments)
    assert refused.value.code == 2 and "--arch takes (80, 90, 100), --cases ('none'" in capsys.readouterr().err


def test_unknown_kernels_are_refused(capsys):
    from lasp.kernels import aot

    with pytest.raises(SystemExit) as refused:
        aot.main(["--arch", "90", "--cases", "none", "--kernels", "nosuch"])
    assert refused.value.code == 2 and "--kernels takes dkdv, dkdv fresh, dq" in capsys.readouterr().err


def test_the_table_in_the_docs_is_that_of_the_recorded_run():
    from lasp.kernels.aot import table

    report = json.loads((ROOT / "benchmarks/results/aot.json").read_text())
    assert not any(row["fault"] for row in report["rows"])
    assert table(report["rows"]) in (ROOT / "docs/kernels.md").read_text()
