import contextlib
import io
import json
import math
import os
import shutil
import signal

import pytest
import torch

from lasp.launch.config.schema import load_config
from lasp.launch.run.generate import load_model, sample_text
from lasp.launch.run.report import read_metrics
from lasp.launch.train import train
from lasp.parallel.checkpoints import checkpoint as checkpoints
from tests.launch.helpers import tiny_config, tiny_yaml, train_on_ranks

SHARD = "tensors/shard-00001-model-00001-of-00001.safetensors"
SAME = 1e-9  # in float64, whose rounding of 1e-16 six steps amplify by a thousand: float32 differs by 5e-5 of 6e-8
FIELDS = {"step", "loss", "grad_norm", "tokens_per_s", "lr", "tokens", "seconds", "labels", "peak_memory_bytes"}


def _yaml(folder):
    return tiny_yaml(folder, dtype="float64")


def _printed_on_ranks(group, path, overrides):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        train_on_ranks(group, path, overrides)
    return " ".join(out.getvalue().split())


def _losses(run_dir):
    return [record["loss"] for record in read_metrics(run_dir)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Six steps on one rank."""
    folder = tmp_path_factory.mktemp("finished")
    config = load_config(_yaml(folder))
    train(config)
    return config


def test_a_run_leaves_metrics_plot_and_checkpoints(finished):
    records = read_metrics(finished.run_dir)
    assert [r["step"] for r in records] == [1, 2, 3, 4, 5, 6]
    assert all(r.keys() >= FIELDS and math.isfinite(r["loss"]) for r in records)
    assert [r["step"] for r in records if "eval_loss" in r] == [3, 6]
    assert records[-1]["loss"] < records[0]["loss"]
    assert (finished.run_dir / "loss.png").stat().st_size > 1000
    steps = [checkpoints.load(p).step for p in checkpoints.list_checkpoints(finished.run_dir / "checkpoints")]
    assert steps == [2, 4, 6]
    state = json.loads((finished.run_dir / "checkpoints" / "step-00000004" / "state.json").read_text())
    assert state["data_position"] == 4 * 2 * 64


@pytest.mark.parametrize(
    "overrides",
    [["cp=2"], ["cp=4", "layout=zigzag"], ["cp=2", "dp=2"], ["dp=2"]],
    ids=",".join,
)
def test_the_loss_curve_is_the_same_on_every_mesh(ranks, tmp_path, finished, overrides):
    size = {"cp=2": 2, "cp=4": 4, "dp=2": 2}[overrides[0]] * (2 if "dp=2" in overrides[1:] else 1)
    ranks.run(train_on_ranks, _yaml(tmp_path), overrides, size=size)
    records, expected = read_metrics(tmp_path / "run"), read_metrics(finished.run_dir)
    for record, wanted in zip(records, expected, strict=True):
        for key in {"loss", "grad_norm", "eval_loss", "labels"} & wanted.keys():
            assert record[key] == pytest.approx(wanted[key], rel=SAME), (record["step"], key)


@pytest.mark.parametrize(
    ("overrides", "linear", "softmax"),
    [
        (["exchange=auto", "fabric=laptop", "softmax_exchange=ring"], "ms for a state of", "ring: as configured."),
        (
            ["exchange=log_scan", "softmax_exchange=ulysses", "cp=2"],
            "log_scan: as configured.",
            "ulysses: as configured.",
        ),
    ],
    ids=["auto", "named"],
)
def test_a_run_says_how_it_exchanges_and_why(ranks, tmp_path, finished, overrides, linear, softmax):
    size = 2 if "cp=2" in overrides else 4
    text, *_ = ranks.run(_printed_on_ranks, _yaml(tmp_path), ["cp=4", *overrides], size=size)
    described = text[text.index("exchange") : text.index("summary")]
    assert linear in described and f"softmax exchange {softmax}" in described, described
    if size == 4:
        assert "between 4 ranks on 1 node over laptop; next is" in described, described
    assert _losses(tmp_path / "run") == pytest.approx(_losses(finished.run_dir), rel=SAME)


@pytest.mark.parametrize("overrides", [[], ["cp=2"], ["dp=2"]], ids=["same", "cp=2", "dp=2"])
def test_a_resumed_run_continues_the_curve(ranks, tmp_path, finished, overrides):
    path = _yaml(tmp_path)
    source = finished.run_dir / "checkpoints" / "step-00000002"
    shutil.copytree(source, tmp_path / "run" / "checkpoints" / source.name)
    if overrides:
        ranks.run(train_on_ranks, path, overrides, size=2)
    else:
        train(load_config(path))
    resumed, expected = _losses(tmp_path / "run"), _losses(finished.run_dir)[2:]
    assert resumed == expected if not overrides else resumed == pytest.approx(expected, rel=SAME)


def test_a_finished_run_says_so_and_a_fresh_start_moves_it_aside(tmp_path, capsys):
    path = _yaml(tmp_path)
    train(load_config(path, ["steps=2"]))
    first = _losses(tmp_path / "run")
    train(load_config(path, ["steps=2"]))
    assert "already holds step 2 of 2" in capsys.readouterr().out
    assert _losses(tmp_path / "run") == first
    train(load_config(path, ["steps=2", "checkpoint.resume=false", "seed=1"]))
    assert _losses(tmp_path / "run") != first
    assert _losses(tmp_path / "run" / "previous-1") == first


def test_a_damaged_checkpoint_is_passed_over_loudly(tmp_path, finished, capsys):
    path = _yaml(tmp_path)
    shutil.copytree(finished.run_dir, tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "step-00000006" / SHARD).write_bytes(b"")
    train(load_config(path))
    out = " ".join(capsys.readouterr().out.split())
    assert f"step-00000006 is damaged: {SHARD} has 0 bytes" in out and "resumed at step 4 of 6" in out
    assert _losses(tmp_path / "run") == _losses(finished.run_dir)


def test_a_checkpoint_of_another_model_is_refused(tmp_path, finished):
    resume = f"checkpoint.resume={finished.run_dir}"
    with pytest.raises(ValueError, match=r"model\.dim is 16 in the checkpoint and 32 here"):
        train(load_config(_yaml(tmp_path), [resume, "model.dim=32"]))
    with pytest.raises(ValueError, match="does not exist"):
        train(load_config(_yaml(tmp_path), [f"checkpoint.resume={tmp_path}/nowhere"]))


def test_a_changed_setting_is_mentioned_on_resume(tmp_path, finished, capsys):
    train(load_config(_yaml(tmp_path), [f"checkpoint.resume={finished.run_dir}", "optimizer.lr=0.02"]))
    assert "optimizer.lr: 0.01 -> 0.02" in " ".join(capsys.readouterr().out.split())


def _poison_and_train(group, path, overrides):
    from unittest import mock

    from lasp.parallel.engines.base import ModuleEngine

    original = ModuleEngine.step

    def step(self, batches):
        if self.step_count == 3 and self.mesh.rank == 1:
            self.model.output_weight.data[:] = math.nan
        return original(self, batches)

    with mock.patch.object(ModuleEngine, "step", step):
        try:
            train_on_ranks(group, path, overrides)
        except FloatingPointError as error:
            return str(error)


def test_a_nan_stops_all_ranks_and_keeps_the_last_good_checkpoint(ranks, tmp_path):
    for message in ranks.run(_poison_and_train, _yaml(tmp_path), ["cp=2"], size=2):
        assert message.startswith("step 4: loss nan") and "rank(s) [1]" in message
        assert message.endswith("step-00000002.")
    assert checkpoints.load_newest(tmp_path / "run" / "checkpoints", pytest.fail).step == 2


def _signalled_train(group, path, overrides):
    from unittest import mock

    from lasp.launch.run.report import Report

    original = Report.step

    def step(self, record):
        original(self, record)
        if record["step"] == 3 and group.rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)  # one rank alone hears it

    with mock.patch.object(Report, "step", step):
        train_on_ranks(group, path, overrides)


def test_a_signal_saves_at_the_border_of_a_step_on_all_ranks(ranks, tmp_path, finished):
    path = _yaml(tmp_path)
    ranks.run(_signalled_train, path, ["cp=2", "checkpoint.every=100"], size=2)
    (saved,) = checkpoints.list_checkpoints(tmp_path / "run" / "checkpoints")
    assert saved.name == "step-00000003" and len(_losses(tmp_path / "run")) == 3
    ranks.run(train_on_ranks, path, ["cp=2"], size=2)
    assert _losses(tmp_path / "run") == pytest.approx(_losses(finished.run_dir), rel=SAME)


def test_generation_from_a_checkpoint_is_determined_by_its_seed(finished):
    model, tokenizer = load_model(finished.run_dir)
    prompt = tokenizer.encode("def f")
    texts = [sample_text(model, tokenizer, prompt, 20, temperature=1.0, seed=seed) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2] and texts[0].startswith("def f")
    greedy = [sample_text(model, tokenizer, prompt, 20, temperature=0.0, seed=seed) for seed in (1, 2)]
    assert greedy[0] == greedy[1]
    with pytest.raises(ValueError, match="at least one token"):
        sample_text(model, tokenizer, [], 5)


def test_bf16_follows_fp64(tmp_path, finished):
    train(tiny_config(tmp_path, "dtype=bfloat16"))
    five_units = 5 * torch.finfo(torch.bfloat16).eps / 2  # of what layers round their outputs by
    assert _losses(tmp_path / "run") == pytest.approx(_losses(finished.run_dir), rel=five_units)
    saved = checkpoints.load(checkpoints.find(tmp_path / "run"))
    assert saved.shapes() and all(saved.index[f"model.{name}"].dtype == torch.float32 for name in saved.shapes())
