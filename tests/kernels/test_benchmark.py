"""benchmarks/kernels.py: its dry run end to end, its byte model, and what it does when time or a cell runs out."""

import importlib
import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "kernels.py"
FACTS = ("device", "driver", "cuda", "torch", "triton", "fla", "commit", "source")  # what a report says of its machine


@pytest.fixture(scope="module")
def bench():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPT.parent))
        spec = importlib.util.spec_from_file_location("kernel_benchmark", SCRIPT)
        module = importlib.util.module_from_spec(spec)
        patch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        yield module


@pytest.fixture
def kernel_report(bench):
    return importlib.import_module("kernel_report")


@pytest.fixture(scope="module")
def dry(tmp_path_factory):
    """The one run of the script itself, of few cells: its report, its tables, what it printed."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs triton")
    folder = tmp_path_factory.mktemp("benchmark")
    command = [sys.executable, SCRIPT, "--dry", "--gates", "token", "--heads", "1", "--lengths", "32"]
    command += ["--implementations", "triton,torch,sdpa_flash,fla_chunk"]
    command += ["--json", folder / "report.json", "--markdown", folder / "report.md"]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}  # tiny tensors; threads that share cores wait for each other
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False, env=one_thread)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "report.json", (folder / "report.md").read_text(), done.stdout


def test_a_dry_run_has_every_cell_with_times_or_a_reason(dry):
    report = json.loads(dry[0].read_text())
    rows = {row["implementation"]: row for row in report["rows"]}
    assert len(report["rows"]) == 4 and report["dry"] is True
    assert set(rows) == {"triton", "torch", "sdpa_flash", "fla_chunk"}
    for name, row in rows.items():
        assert (row["heads"], row["dim"], row["length"]) == (1, 16, 32)
        assert row["gate"] == ("softmax" if name == "sdpa_flash" else "token")
        if name == "fla_chunk":
            assert row["reason"] == "no baseline: fla needs a CUDA device" and "forward_ms" not in row
            continue
        assert row["status"] == "measured" and row["reason"] is None, row
        assert all(0 < row[time] < math.inf for time in ("forward_ms", "forward_backward_ms", "host_ms"))
        assert set(row["errors"]) == {"o", "dq", "dk", "dv"} | ({"dg"} if row["gate"] == "token" else set())
        assert all(0 < error < 1e-5 for error in row["errors"].values()), row
    passes = {"gates", "state", "scan", "o", "dgates", "dstate", "dscan", "dq", "dkdv", "dg"}
    assert set(rows["triton"]["passes"]) == passes


def test_a_dry_run_says_that_its_times_mean_nothing_and_makes_tables(bench, dry, capsys):
    path, tables, printed = dry
    assert "times mean nothing" in tables and "times mean nothing" in printed.splitlines()[0]
    lines = tables.splitlines()
    assert sum(line.startswith("| 1 | 16 | token | 32 | triton |") for line in lines) == 1
    assert sum(line.startswith("| 1 | 16 | softmax | 32 | sdpa_flash |") for line in lines) == 1
    assert "- no baseline: fla needs a CUDA device: fla_chunk token H=1 D=16 T=32" in lines
    bench.main(["--show", str(path)])
    assert capsys.readouterr().out == tables


def test_a_resumed_run_keeps_its_rows_and_refuses_those_of_other_code(bench, dry, tmp_path, monkeypatch):
    before, copy = json.loads(dry[0].read_text()), tmp_path / "report.json"
    copy.write_text(json.dumps(before))
    for name in ("TRITON_INTERPRET", "FLA_CACHE_RESULTS"):
        monkeypatch.setenv(name, "0")  # a dry run sets them for its process
    monkeypatch.setattr(bench, "machine", lambda device: {name: before[name] for name in FACTS})
    options = ["--dry", "--resume", "--json", str(copy), "--gates", "token,fixed", "--implementations", "triton"]
    options += ["--heads", "1", "--lengths", "32", "--budget-seconds", "0"]
    bench.main(options)
    after = json.loads(copy.read_text())["rows"]
    assert all(row in after for row in before["rows"])
    (new,) = (row for row in after if row not in before["rows"])
    assert (new["gate"], new["status"]) == ("fixed", "not reached")

    copy.write_text(json.dumps(before | {"source": "other"}))
    with pytest.raises(SystemExit, match=f"source other is not {before['source']}"):
        bench.main(options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dry", "--gates", "none,tokens"], "unknown name 'tokens'; choose from none, fixed, token, channel"),
        (["--dry", "--implementations", "flash"], "unknown name 'flash'; choose from triton, fla_chunk"),
        (["--dry", "--lengths", "0"], "sizes must be positive"),
        (["--dry", "--resume"], "--resume needs --json"),
    ],
)
def test_what_it_does_not_know_is_refused(bench, capsys, options, message):
    with pytest.raises(SystemExit) as stop:
        bench.arguments(options)
    assert stop.value.code != 0 and message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
def test_without_a_device_it_names_the_dry_run(bench, capsys):
    with pytest.raises(SystemExit) as stop:
        bench.arguments([])
    assert stop.value.code != 0 and "--dry" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("gate", "length", "forward", "backward"),  # in X, one bf16 tensor; states of L tokens are 256 / L X each
    [
        ("none", 1 << 20, 6 + 4 / 16, 12 + 5 / 16),  # L = 4096
        ("none", 1 << 14, 6 + 4 / 4, 12 + 5 / 4),  # L = 1024
        ("token", 1 << 14, 6 + 4 / 4 + 2 / 64, 12 + 7 / 4 + 4 / 64),  # g is 1 / 64 X; two more touches for dg
        ("channel", 1 << 14, 6 + 4 / 4 + 2 * 2, 12 + 7 / 4 + 4 * 2),  # g is 2 X
    ],
)
def test_minimal_bytes_are_six_and_twelve_tensors_and_states_and_gates(bench, gate, length, forward, backward):
    x = 2 * length * 16 * 128
    fewest, both = bench.minimal_bytes(bench.Cell("triton", gate, 16, 128, length), itemsize=2)
    assert fewest == forward * x and both == (forward + backward) * x


def test_a_fixed_decay_costs_its_own_few_bytes(bench):
    none, fixed = (sum(bench.pass_bytes(gate, 16, 128, 1 << 20).values()) for gate in ("none", "fixed"))
    assert fixed - none == 5 * 4 * 16


def test_the_most_telling_cells_come_first_and_none_twice(bench, kernel_report):
    known = bench.implementations()
    cells = bench.order(known, bench.GATES, bench.HEADS, bench.DIMS, bench.LENGTHS)
    assert len(cells) == len(set(cells)) == (6 * 4 + 1) * 2 * 3 * 5
    main = 3 * 4 + 1  # three implementations of four gates, and softmax
    for i, length in enumerate((1 << 14, 1 << 16, 1 << 20)):
        part = cells[i * main : (i + 1) * main]
        assert {(c.heads, c.dim, c.length) for c in part} == {(16, 128, length)}
        assert {c.implementation for c in part} == set(kernel_report.MAIN)
    assert cells[0] == bench.Cell("triton", "none", 16, 128, 1 << 14)
    assert {c.implementation for c in cells[3 * main : 3 * main + 12]} == set(known) - set(kernel_report.MAIN)


def test_the_budget_stops_the_run_between_cells(bench):
    cells = bench.order(["torch"], bench.GATES, [2], [16], [64])
    now, stored = [100.0], []

    def measure(cell):
        now[0] += 10.0
        return {"gate": cell.gate, "status": "measured"}

    bench.run_all(cells, measure, stored.append, 25.0, lambda: now[0])
    assert [row["gate"] for row in stored] == ["none", "fixed", "token"]


def test_a_lost_device_stops_the_run_after_its_row(bench):
    cells, stored = bench.order(["torch"], bench.GATES, [2], [16], [64]), []
    status = {"fixed": bench.DEVICE_LOST}
    bench.run_all(
        cells, lambda c: {"gate": c.gate, "status": status.get(c.gate, "measured")}, stored.append, math.inf
    )  # fmt: skip
    assert [row["gate"] for row in stored] == ["none", "fixed"]


def _scaled_grad(x, factor):
    return factor * x - (factor - 1) * x.detach()


class TestACell:
    @pytest.fixture(autouse=True)
    def one_thread(self):
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(threads)

    def measure(self, bench, run, *, max_seconds=1e3, guest=False, length=64):
        from kernel_baselines import Lasp

        class Fake(Lasp):
            def __call__(self, gate, q, k, v, g):
                return run(super().__call__, gate, q, k, v, g)

        at = bench.Bench(torch.device("cpu"), 0.0, max_seconds, True)
        at.known["torch"] = Fake("torch")
        at.known["torch"].guest = guest
        return at.measure(bench.Cell("torch", "token", 2, 16, length))

    def test_that_fails_is_recorded_with_its_message(self, bench):
        def fail(*_):
            raise RuntimeError("out of\n  something")

        row = self.measure(bench, fail)
        assert (row["status"], row["reason"]) == ("failed", "RuntimeError: out of something")
        row = self.measure(bench, fail, guest=True)
        assert (row["status"], row["reason"]) == ("no baseline", "no baseline: RuntimeError: out of something")

    def test_with_a_wrong_output_is_not_timed(self, bench):
        row = self.measure(bench, lambda right, gate, *x: 1.5 * right(gate, *x))
        assert row["status"] == "failed" and row["reason"].startswith("o is wrong: relative L2 error 0.5")
        assert "forward_ms" not in row

    @pytest.mark.parametrize("wrong", ["o", "dk"])
    def test_that_is_wrong_only_at_its_own_length_is_not_timed(self, bench, wrong):
        def late(right, gate, q, k, v, g):
            if q.shape[1] == 64:
                return right(gate, q, k, v, g)
            ends = torch.ones(q.shape[1], 1, 1)
            ends[-1] = 3.0
            return right(gate, q, k, v, g) * ends if wrong == "o" else right(gate, q, _scaled_grad(k, ends), v, g)

        row = self.measure(bench, late, length=192)
        assert row["status"] == "failed" and row["reason"].startswith(f"at 192 tokens {wrong} is wrong")
        assert max(row["errors"].values()) < 1e-5 and "forward_ms" not in row

    def test_that_is_right_has_its_errors_at_its_own_length(self, bench):
        row = self.measure(bench, lambda right, gate, *x: right(gate, *x), length=192)
        assert row["status"] == "measured" and set(row["errors_at_length"]) == {"o", "dk", "dv"}
        assert max(row["errors_at_length"].values()) < 1e-5

    def test_with_a_wrong_gradient_has_the_time_of_its_forward_only(self, bench):
        def wrong_dk(right, gate, q, k, v, g):
            return right(gate, q, _scaled_grad(k, 2.0), v, g)

        row = self.measure(bench, wrong_dk, guest=True)
        assert row["reason"].startswith("no baseline: dk is wrong: relative L2 error 1 ")
        assert row["forward_ms"] > 0 and "forward_backward_ms" not in row
        assert row["errors"]["dq"] < 1e-5 < row["errors"]["dk"]

    def test_that_cannot_run_backward_has_the_time_of_its_forward_only(self, bench):
        class Refuses(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return x.clone()

            @staticmethod
            def backward(ctx, dx):
                raise RuntimeError("upgrade")

        row = self.measure(bench, lambda right, gate, *x: Refuses.apply(right(gate, *x)), guest=True)
        assert row["reason"] == "no baseline: RuntimeError: upgrade" and row["forward_ms"] > 0
        assert "forward_backward_ms" not in row and set(row["errors"]) == {"o"}

    def test_that_would_take_too_long_is_skipped(self, bench):
        row = self.measure(bench, lambda right, gate, *x: right(gate, *x), max_seconds=1e-6)
        assert row["status"] == "skipped" and row["reason"].startswith("predicted to take")
        assert set(row["errors"]) == {"o", "dq", "dk", "dv", "dg"}


def test_predictions_stand_under_the_passes_that_they_are_about(bench):
    passes = {name: {"ms": 1.0} for name in ("state", "scan", "o", "dstate", "dscan", "dq", "dkdv")}
    facts = dict.fromkeys((*FACTS, "dtype"), "x")
    cells = [bench.Cell("triton", gate, 16, 128, t) for gate in ("fixed", "token") for t in (1 << 16, 1 << 20)]
    rows = [bench.asdict(cell) | {"status": "measured", "reason": None, "passes": passes} for cell in cells]
    report = facts | {"copy": 4e12, "dry": False, "predicted": {"source": "roofline model"}, "rows": rows}
    lines = bench.markdown(report).splitlines()
    assert "mean nothing" not in "".join(lines) and "Our passes, ms; predicted: roofline model." in lines
    assert [line for line in lines if "predicted |" in line] == [
        "| 16 | 128 | fixed | 1,048,576, predicted | - | 2.7 | 5.1 | 2.7 | 5.1 | 8.7 | - | - |"
    ]
    assert "| 16 | 128 | token | 1,048,576 | - | 2.000 | 1.000 | 2.000 | 1.000 | 1.000 | - | - |" in lines
