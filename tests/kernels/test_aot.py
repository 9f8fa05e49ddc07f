"""The gate that compiles the Triton kernels without a GPU, and its refusals."""

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RECORD = ROOT / "benchmarks/results/aot.json"
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")


def compiled(folder: Path) -> list[dict]:
    """Rows of a run over D = 128 with every decay on Hopper, and one tile of each kernel elsewhere."""
    path = folder / "aot.json"
    command = [sys.executable, "-m", "lasp.kernels.aot", "--json", str(path)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=1700, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    report = json.loads(path.read_text())
    assert f"all {len(report['rows'])} kernels within budget" in run.stdout
    assert "fingerprint" not in report  # of every tile alone
    return report["rows"]


def known_rows(run: Callable[[], list[dict]]) -> list[dict]:
    """The recorded rows; those of a ``run`` where kernels, launches, budgets or triton are others than recorded.

    `python -m lasp.kernels.aot --all --json benchmarks/results/aot.json` records.
    """
    from lasp.kernels.aot import fingerprint

    report = json.loads(RECORD.read_text())
    return report["rows"] if report["fingerprint"] == fingerprint() else run()


def check(rows: list[dict]):
    hopper = [row for row in rows if row["arch"] == 90 and row["dim"] == 128]
    for row in hopper:
        assert row["spill"] <= (0 if row["kernel"].split()[0] in ("local_states", "o", "dq") else 64), row
        products = row["kernel"].split()[0] in ("local_states", "o", "dq", "dkdv")
        assert row["tensor_cores"] == ("wgmma" if products else "-"), row
    assert {row["case"] for row in hopper} == {"none", "fixed", "learned", "token", "channel", "bidirectional"}
    everything = {row["kernel"].split()[0] for row in hopper}
    assert {"o", "o fresh", "o safe", "o safe fresh", "local_states rev"} <= {row["kernel"] for row in hopper}
    for arch in (80, 100):
        assert {row["kernel"].split()[0] for row in rows if row["arch"] == arch} == everything


@pytest.mark.timeout(1800)
def test_every_shipped_tile_for_hopper_compiles_within_its_budget(tmp_path):
    check(known_rows(lambda: compiled(tmp_path)))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_compiled_again_every_row_is_the_recorded_one(tmp_path):
    rows, recorded = compiled(tmp_path), json.loads(RECORD.read_text())["rows"]
    check(rows)
    assert all(row in recorded for row in rows)


@pytest.mark.parametrize("change", ["a kernel", "a tile", "a launch", "a budget", "triton"])
def test_what_changes_the_code_is_compiled_again(monkeypatch, tmp_path, change):
    import triton

    from lasp.kernels import aot
    from lasp.kernels.triton_linear import operator as lightning
    from lasp.kernels.triton_linear import tiles as triton_tiles

    record = tmp_path / "aot.json"
    record.write_text(json.dumps({"fingerprint": aot.fingerprint(), "rows": "recorded"}))
    monkeypatch.setattr(sys.modules[__name__], "RECORD", record)
    assert known_rows(lambda: "compiled") == "recorded"
    if change == "a kernel":
        read = Path.read_text
        kernel = Path(sys.modules[lightning.scan_states.fn.__module__].__file__)
        other = lambda path: read(path) + "\n    pass" * (path == kernel)  # noqa: E731
        monkeypatch.setattr(Path, "read_text", other)
    elif change == "a tile":
        fitted = triton_tiles.fit
        monkeypatch.setattr(triton_tiles, "fit", lambda *args: fitted(*args) | {"o": triton_tiles.Tile(16, 1, 1)})
    elif change == "a launch":
        monkeypatch.setattr(lightning, "CHUNK_SAFE", 32)
    elif change == "a budget":
        monkeypatch.setattr(aot, "SPILL_BYTES_OTHERWISE", 63)
    else:
        monkeypatch.setattr(triton, "__version__", "3.0")
    assert known_rows(lambda: "compiled") == "compiled"


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

    report = json.loads(RECORD.read_text())
    assert not any(row["fault"] for row in report["rows"])
    assert table(report["rows"]) in (ROOT / "docs/kernels.md").read_text()
