"""Drivers of ``lasp bench`` on made-up rows, and measurements on ranks of this machine."""

import os
import signal
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner

from lasp import CPContext, SequenceLayout, linear_attention
from lasp.cost.fabric import Link
from lasp.launch.bench import exchange, layer, options, scaling, steps
from lasp.launch.bench.baselines import methods
from lasp.launch.bench.exchange import HOSTS, RANKS, RATES, SIZES, Cell, Settings, grid, summarise
from lasp.launch.bench.exchange_cell import case_of, heads_of
from lasp.launch.bench.exchange_report import markdown
from lasp.launch.bench.fabric import fit_link
from lasp.launch.bench.ranks import local_ranks
from lasp.launch.bench.results import facts, write_report
from lasp.launch.cli import cli
from lasp.launch.config.sizes import readable, readable_rate
from lasp.launch.run.failures import RankFailure
from tests.harness import assert_close
from tests.launch.helpers import tiny_config


def test_sizes_and_rates_are_read_in_their_units():
    assert options.sizes("--sizes", "256K,2m, 100") == [256 * 1024, 2 * 2**20, 100]
    assert options.rates("--rates", "400M,2G") == [4e8, 2e9]
    assert options.counts("--hosts", "2,8", 1, 8) == [2, 8]
    assert readable(2 * 2**20) == "2 MiB" and readable(100) == "100 B" and readable_rate(4e8) == "400 Mbit/s"
    for wrong in ("", "0", "-1K", "K", "nan", "1,,2", "0.3", "1e3"):
        with pytest.raises(ValueError, match="--sizes must be"):
            options.sizes("--sizes", wrong)
    with pytest.raises(ValueError, match="--rates must be bits per second, like 400M or 2G, got '2X'"):
        options.rates("--rates", "1.5G,2X")
    with pytest.raises(ValueError, match=r"--hosts must be whole numbers of 1 to 8, like 1,2, got '9'"):
        options.counts("--hosts", "9", 1, 8)
    with pytest.raises(ValueError, match=r"--methods must be among LASP-1.*, got 'LASP-3'"):
        options.names("--methods", "LASP-3", methods())


def test_the_default_sweep_has_forty_cells_of_every_shape_size_and_rate():
    cells, thinned = grid(HOSTS, RANKS, SIZES, RATES)
    assert len(cells) == 40 and len(set(cells)) == 40 and thinned == 120
    assert Cell(8, 2, 2 << 20, 4e8) in cells  # the one that the documents quote
    for shape in {(h, r) for h in HOSTS for r in RANKS}:
        own = [cell for cell in cells if (cell.hosts, cell.ranks) == shape]
        assert {cell.state_bytes for cell in own} == set(SIZES) and {cell.bits_per_s for cell in own} == set(RATES)
    assert grid((2,), (1,), (1 << 20,), (1e8, 2e8)) == ([Cell(2, 1, 1 << 20, 1e8), Cell(2, 1, 1 << 20, 2e8)], 0)
    with pytest.raises(ValueError, match=r"9 hosts x 2 ranks are 18 processes.* at most 16"):
        grid((9,), (2,), SIZES, RATES)


def test_a_state_is_made_of_whole_heads():
    case = case_of((0, 0, 1), 256 << 10, "diagonal", "zigzag")
    assert case.nodes == (2, 1) and case.fragments == 2 and case.transition_bytes == 16 * 64 * 4
    with pytest.raises(ValueError, match=r"multiple of 16K, got 10000. Choose one like 256K"):
        heads_of(10000)


def test_a_link_is_found_again_from_its_messages():
    link = Link(2e-4, 5e7)
    sizes = (1 << 10, 1 << 14, 1 << 18, 1 << 20)
    found = fit_link({size: link.seconds(size) for size in sizes})
    assert found.bytes_per_s == pytest.approx(link.bytes_per_s, rel=1e-6)
    assert found.latency_s == pytest.approx(link.seconds(sizes[0]), rel=1e-6)
    assert fit_link({1024: 1e-3, 2048: 1e-3}).bytes_per_s > 1e9  # as fast as can be told, and never below zero


def _row(cell, measured, predicted, skipped=()):
    found = {
        name: {"seconds": s, "predicted_s": p, "repeats": [s], "slices": 1, "difference": 0.0}
        for (name, s), p in zip(measured.items(), predicted, strict=True)
    }
    auto = {"chose": "ring", "slices": 1, "reason": "because"}
    return {"cell": vars(cell), "exchanges": found, "skipped": dict(skipped), "auto": auto, "fabric": {}, "points": {}}


def test_a_sweep_is_summed_up_and_what_was_not_run_is_listed(tmp_path):
    settings = Settings(exchanges=("all_gather", "ring", "auto"))
    rows = [
        _row(Cell(2, 1, 1 << 20, 1e8), {"all_gather": 4.0, "ring": 1.0, "auto": 1.1}, (3.0, 1.1, 1.1)),
        _row(Cell(4, 1, 1 << 20, 1e8), {"ring": 1.0, "auto": 1.3}, (1.5, 1.5), [("all_gather", "predicted 9 s")]),
    ]
    summary = summarise(rows)
    assert summary["model_error_median"] == pytest.approx(0.25)  # of 0.25, 0.1, 0.5
    assert summary["model_error_median_of"] == {"all_gather": pytest.approx(0.25), "ring": pytest.approx(0.3)}
    assert summary["auto_within_15_percent"] == 0.5 and summary["auto_over_best_worst"] == pytest.approx(1.3)
    assert summary["auto_speedup_over_all_gather_median"] == pytest.approx(4.0 / 1.1)
    assert summary["exchanges_skipped"] == 1 and summary["cells_run"] == 2

    text = "\n".join(markdown(rows, summary, settings, thinned=3))
    assert "- 4 x 1 x 100 Mbit/s, 1 MiB: all_gather: predicted 9 s" in text and "3 further cells" in text
    assert "| 4000.0 (3000.0) | 1000.0 (1100.0) |" in text and "25 %" in text
    paths = write_report(
        tmp_path / "new", "x", {"facts": facts("nowhere"), "rows": rows}, [text], lambda f: f.add_subplot()
    )
    assert [path.name for path in paths] == ["x.json", "x.md", "x.png"] and all(path.stat().st_size for path in paths)
    assert all(word in paths[1].read_text() for word in ("nowhere", "commit", torch.__version__, "Linux"))


def test_weak_and_strong_points_and_how_constant_memory_is():
    assert scaling.points([1, 2], [8], [16]) == [
        scaling.Point("weak", 1, 8),
        scaling.Point("weak", 2, 16),
        scaling.Point("strong", 1, 16),
        scaling.Point("strong", 2, 16),
    ]
    with pytest.raises(ValueError, match="a sequence of 4 tokens cannot be cut over 8 ranks"):
        scaling.points([1, 8], [], [4])
    about = {"kind": "weak", "step_s": 1.0, "tokens_per_s": 8.0, "parameters": 5}
    rows = [about | {"cp_size": n, "seq_len": 8 * n, "memory_bytes": m} for n, m in ((1, 100), (2, 98), (4, 101))]
    rows.append({"kind": "weak", "cp_size": 8, "seq_len": 64, "skipped": "the 1 s were over"})
    assert scaling.spread(rows[:3]) == pytest.approx(0.02)
    text = "\n".join(scaling.markdown(rows))
    assert "within 2.0 %" in text and "Not run: weak, cp 8: the 1 s were over." in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fabric", "--hosts", "2"], "--hosts has no effect without --virtual"),
        (["fabric", "--ranks", "1"], "a fabric is measured between ranks, got 1 rank"),
        (["exchange", "--ranks", "1", "--fabric", "laptop"], "exchanges are measured between ranks, got 1 rank"),
        (["layer", "--ranks", "1"], "methods are compared between ranks, got 1 rank. Start at least two: --ranks 2"),
        (["fabric", "--ranks", "17"], "1 to 16 ranks can be started on one machine, got 17"),
        (["fabric", "--virtual", "--rate", "1K"], "a link's rate must be 1e6 to 1e11 bits per second, got 1000"),
        (["exchange", "--virtual", "--fabric", "laptop"], "--fabric has no effect with --virtual"),
        (["exchange", "--sizes", "100K"], "must be a multiple of 16K"),
        (["exchange", "--exchanges", "rings"], "--exchanges must be among all_gather"),
        (["exchange", "--fabric", "h100"], "unknown fabric 'h100'"),
        (["layer", "--methods", "LASP"], "--methods must be among LASP-1"),
    ],
)
def test_bad_options_are_refused_before_anything_is_written(tmp_path, monkeypatch, arguments, message):
    def silent(commands, *_):  # no process
        return SimpleNamespace(size=len(commands), is_first=True, close=lambda: None)

    monkeypatch.setattr("lasp.launch.bench.ranks.ProcessRanks", silent)
    result = CliRunner().invoke(cli, ["bench", *arguments, "--output", str(tmp_path / "out")])
    assert isinstance(result.exception, ValueError) and message in str(result.exception), result.exception
    assert not (tmp_path / "out").exists()


def test_scaling_in_a_job_is_refused(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    result = CliRunner().invoke(cli, ["bench", "scaling", "configs/quickstart.yaml"])
    assert "starts its ranks itself" in str(result.exception)


def _baseline(group, name, length, heads):
    """Largest relative error of outputs and gradients against one device."""
    size, rank = torch.distributed.get_world_size(group), torch.distributed.get_rank(group)
    layout = SequenceLayout.contiguous(length * size, size)
    random = torch.Generator().manual_seed(0)
    whole = [torch.randn(2, length * size, heads, d, generator=random) for d in (8, 8, 8, 8)]
    expected = [x.clone().requires_grad_() for x in whole[:3]]
    o = linear_attention(*expected)[0]
    grads = torch.autograd.grad(o, expected, whole[3])

    own = [layout.shard(x, rank).clone().requires_grad_() for x in whole[:3]]
    mine = methods()[name](*own, CPContext(layout, group))
    got = torch.autograd.grad(mine, own, layout.shard(whole[3], rank))
    for label, a, b in zip(("o", "dq", "dk", "dv"), (mine, *got), (o, *grads), strict=True):
        assert_close(f"{name} {label}", a, layout.shard(b, rank), 2e-5)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_baselines_compute_linear_attention(ranks, size):
    ranks.run(_baseline, "Ring Attention", 7, 3, size=size)
    ranks.run(_baseline, "Ulysses", 7, 2 * size, size=size)


def test_ulysses_refuses_heads_that_do_not_divide(ranks):
    outcomes = ranks.outcomes(_baseline, "Ulysses", 4, 3, size=2)
    assert all(not ok and "3 heads, 2 ranks. Use a multiple of 2 heads" in text for ok, text in outcomes), outcomes


def _die(mesh):
    if mesh.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    mesh.any(False)


def _refuse(mesh):
    raise ValueError(f"rank {mesh.rank} refuses")


def test_ranks_of_this_machine_measure_layers_and_steps_and_their_errors_are_told(tmp_path):
    with local_ranks(2, device="cpu", timeout_s=60) as ranks:
        names = ("LASP-1", "LASP-2", "auto", "Ulysses", "Ring Attention")
        rows = layer.compare(ranks, names, tokens=64, heads=3, dim=16, repeats=2, fabric=None)
        skipped = {row["method"]: row["skipped"] for row in rows if "skipped" in row}
        assert skipped == {
            "auto": "it chooses by a fabric, and none was given",
            "Ulysses": "2 ranks do not divide 3 heads",
        }
        run = [row for row in rows if "seconds" in row]
        assert all(len(row["repeats"]) == 2 and row["error"] < 1e-5 and row["silent_s"] > 0 for row in run)
        assert "2 ranks do not divide 3 heads" in "\n".join(layer.markdown(rows, ranks=2, tokens=64, heads=3, dim=16))

        only = layer.compare(ranks, ("Ulysses",), tokens=64, heads=3, dim=16, repeats=2, fabric=None)
        assert [row["skipped"] for row in only] == ["2 ranks do not divide 3 heads"]

        config = tiny_config(tmp_path, "cp_size=2", "data.batch_size=1")
        row = steps.measure(ranks, config, repeats=2)
        assert row["ranks"] == 2 and row["tokens_per_rank"] == 32 and row["tokens_per_s"] > 0
        assert len(row["memory_bytes_of_each"]) == 2 and row["memory_bytes"] > 0 and 4 < row["loss"] < 8

        with pytest.raises(RankFailure, match="rank 1"):
            ranks.ask(f"{__name__}:_die")
    with local_ranks(1, device="cpu", timeout_s=60) as ranks, pytest.raises(ValueError, match=r"^rank 0 refuses$"):
        ranks.ask(f"{__name__}:_refuse")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_memory_of_a_rank_does_not_depend_on_the_ranks(tmp_path):
    config = tiny_config(tmp_path, "model.dim=64", "model.pattern=L", "model.num_layers=4", "model.recompute=true")
    rows = scaling.sweep(config, scaling.points([1, 2, 4, 8], [16384], []), repeats=2, limit_s=600, say=print)
    assert scaling.spread(rows) <= 0.03, scaling.markdown(rows)


def test_the_limit_of_a_sweep_leaves_cells_out_and_says_so():
    rows = exchange.virtual_sweep([Cell(2, 1, 1 << 20, 1e8)], Settings(limit_s=-1.0), print)
    assert rows[0]["exchanges"] == {} and set(rows[0]["skipped"].values()) == {"the sweep's -1 s were over"}
