import json
import shutil

import pytest

from lasp.launch.config.schema import load_config
from lasp.launch.data.stream import open_source
from lasp.launch.data.token_files import write_token_file
from lasp.launch.data.tokenizer import BYTES, ByteTokenizer, fingerprint, load_tokenizer
from lasp.launch.run.generate import load_model, sample_text
from lasp.launch.run.report import read_metrics
from lasp.launch.run.resume import check_same_tokenizer
from lasp.launch.train import train
from lasp.parallel.checkpoints import checkpoint as checkpoints
from tests.launch.helpers import TEXTS, tiny_config, tiny_yaml, tokenizer_file, train_on_ranks


class OtherTokenizer(ByteTokenizer):
    """Of equal size, with a file."""

    name = "other.json"

    def to_json(self):
        return b"{}"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Six steps on one rank, with checkpoints 2, 4 and 6."""
    config = tiny_config(tmp_path_factory.mktemp("finished"))
    train(config)
    return config


def _names(run_dir):
    return [path.name for path in checkpoints.list_checkpoints(run_dir / "checkpoints")]


def _steps(run_dir):
    return [record["step"] for record in read_metrics(run_dir)]


def test_a_damaged_newer_checkpoint_does_not_cost_the_one_just_written(tmp_path, finished, capsys):
    path, run = tiny_yaml(tmp_path), tmp_path / "run"
    shutil.copytree(finished.run_dir, run)
    (run / "checkpoints" / "step-00000006" / "state.json").write_bytes(b"")
    train(load_config(path, ["steps=5", "checkpoint.keep=1", "checkpoint.every=1"]))
    assert _names(run) == ["step-00000005"] and _names(run / "previous-1") == ["step-00000006"]
    assert _steps(run) == [1, 2, 3, 4, 5] and _steps(run / "previous-1") == [1, 2, 3, 4, 5, 6]
    assert "moved step-00000006 of later steps" in " ".join(capsys.readouterr().out.split())


def test_an_earlier_step_of_the_same_directory_moves_the_later_ones_aside(tmp_path, finished):
    path, run = tiny_yaml(tmp_path), tmp_path / "run"
    shutil.copytree(finished.run_dir, run)
    train(load_config(path, ["steps=3", f"checkpoint.resume={run}/checkpoints/step-00000002"]))
    assert _names(run) == ["step-00000002", "step-00000003"]
    assert _names(run / "previous-1") == ["step-00000004", "step-00000006"]


def test_a_checkpoint_from_elsewhere_moves_older_results_aside(tmp_path, finished):
    path, run = tiny_yaml(tmp_path), tmp_path / "run"
    train(load_config(path, ["steps=2"]))
    train(load_config(path, [f"checkpoint.resume={finished.run_dir}/checkpoints/step-00000004"]))
    assert _steps(run / "previous-1") == [1, 2] and _names(run / "previous-1") == ["step-00000002"]
    assert _steps(run) == [5, 6]


def test_a_refused_run_leaves_the_directory_as_it_was(tmp_path, finished):
    path, run = tiny_yaml(tmp_path), tmp_path / "run"
    shutil.copytree(finished.run_dir, run)
    before = (run / "config.yaml").read_text()
    for overrides in (["model.dim=32"], ["checkpoint.resume=false", "model.vocab_size=10"]):
        with pytest.raises(ValueError, match=r"is of another model|vocab_size"):
            train(load_config(path, overrides))
        assert (run / "config.yaml").read_text() == before and not list(run.glob("previous-*"))


def test_another_tokenizer_of_equal_size_is_refused(tmp_path, finished):
    write_token_file(tmp_path / "other", TEXTS, OtherTokenizer())
    with pytest.raises(ValueError, match=r"prepared with tokenizer 'other\.json' .*data\.tokenizer is 'bytes'"):
        open_source(str(tmp_path / "other"), tmp_path, ByteTokenizer())
    info = json.loads((tmp_path / "other.json").read_text())
    del info["tokenizer_sha256"]
    (tmp_path / "other.json").write_text(json.dumps(info))
    assert len(open_source(str(tmp_path / "other"), tmp_path, ByteTokenizer())) == len(TEXTS)


def test_a_checkpoint_of_another_tokenizer_is_refused(tmp_path, finished):
    saved = checkpoints.load(checkpoints.find(finished.run_dir))
    assert saved.state["tokenizer_sha256"] == BYTES == fingerprint(ByteTokenizer())
    check_same_tokenizer(saved, ByteTokenizer())
    with pytest.raises(ValueError, match=r"trained with tokenizer 'bytes' .*data\.tokenizer is 'other\.json'"):
        check_same_tokenizer(saved, OtherTokenizer())
    del saved.state["tokenizer_sha256"]
    check_same_tokenizer(saved, OtherTokenizer())


def test_a_run_with_a_tokenizer_file_is_resumed_and_generates_from_another_directory(tmp_path, monkeypatch):
    tokenizer = load_tokenizer(str(tokenizer_file(tmp_path)))
    write_token_file(tmp_path / "learn", TEXTS, tokenizer)
    monkeypatch.chdir(tmp_path)
    relative = ["run_dir=run", "data.source=learn", "data.tokenizer=bpe.json"]
    train(load_config(tiny_yaml(tmp_path), ["steps=2", *relative]))
    (elsewhere := tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(elsewhere)
    train(load_config("../run/config.yaml", ["steps=4"]))
    assert _steps(tmp_path / "run") == [1, 2, 3, 4] and not list(elsewhere.iterdir())
    for name in ("bpe.json", "learn.bin"):  # what a checkpoint needs it holds
        (tmp_path / name).unlink()
    model, own = load_model("../run")
    assert own.name == str(tmp_path / "bpe.json") and own.encode("def f") == tokenizer.encode("def f")
    assert sample_text(model, own, own.encode("def f"), 3).startswith("def f")


def test_the_cached_library_is_named_after_its_tokenizer(tmp_path, monkeypatch):
    source = tmp_path / "a.py"
    source.write_text("x = 1\n")
    monkeypatch.setattr("lasp.launch.data.stream.stdlib_files", lambda: [source])
    digest = fingerprint(OtherTokenizer())[:12]
    assert open_source("stdlib", tmp_path, OtherTokenizer()).prefix.name == f"stdlib-other-{digest}"
    assert open_source("stdlib", tmp_path, ByteTokenizer()).prefix.name == "stdlib-bytes"


def test_where_nothing_is_measured_no_loss_is_written(tmp_path, capsys):
    write_token_file(tmp_path / "mixed", [*TEXTS, *("x" for _ in range(4))], OneTokenEach())
    path = tiny_yaml(tmp_path)
    train(load_config(path, [f"data.source={tmp_path}/mixed", "steps=3"]))
    assert all("eval_loss" not in record for record in read_metrics(tmp_path / "run"))
    assert capsys.readouterr().out.count("hold no label") == 1


class OneTokenEach(ByteTokenizer):
    """Documents that would be held out have only their end."""

    def __init__(self):
        import numpy as np

        self.count, self.short = 0, set(np.random.default_rng(0).permutation(44)[:4].tolist())

    def encode(self, text):
        self.count += 1
        return [] if self.count - 1 in self.short else super().encode(text)


def test_a_step_without_a_label_is_an_error(tmp_path):
    write_token_file(tmp_path / "short", ["x"] * 400, NoToken())
    with pytest.raises(ValueError, match=r"at least one label, got 0.*join_documents=true"):
        train(load_config(tiny_yaml(tmp_path), [f"data.source={tmp_path}/short"]))
    train(load_config(tiny_yaml(tmp_path), [f"data.source={tmp_path}/short", "data.join_documents=true", "steps=2"]))


def _refusal(group, path, overrides):
    try:
        train_on_ranks(group, path, overrides)
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("override", ["cp=2", "dp=2"])
def test_a_step_without_a_label_is_an_error_on_every_rank(ranks, tmp_path, override):
    write_token_file(tmp_path / "short", ["x"] * 400, NoToken())
    for message in ranks.run(_refusal, tiny_yaml(tmp_path), [f"data.source={tmp_path}/short", override], size=2):
        assert "must hold at least one label, got 0" in message


class NoToken(ByteTokenizer):
    def encode(self, text):
        return []


def test_lines_that_are_no_records_are_skipped(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('[1]\n{"step": 1, "loss": 2.0}\n{"step"\n3\n{"step": "a"}\n')
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 2.0}]
