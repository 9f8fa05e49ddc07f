"""What cannot work ends with one sentence and exit code 1."""

import errno
import re
import struct

import numpy as np
import pytest
import torch

from lasp.launch.config.schema import load_config
from lasp.launch.data.token_files import TokenFile, write_token_file
from lasp.launch.data.tokenizer import ByteTokenizer
from lasp.launch.train import train
from lasp.models.generation import _sample
from tests.launch.helpers import TEXTS, run_main, tiny_yaml, tokenizer_file


def _run(monkeypatch, capsys, *arguments):
    return run_main(monkeypatch, *arguments), capsys.readouterr().err


def test_preparation_reads_no_output_of_its_own(monkeypatch, capsys, tmp_path):
    (tmp_path / "a.txt").write_text("some text")
    assert _run(monkeypatch, capsys, "data", "prepare", tmp_path, "--output", tmp_path / "x")[0] == 0
    assert len(TokenFile(tmp_path / "x")) == 1
    code, err = _run(monkeypatch, capsys, "data", "prepare", tmp_path, "--output", tmp_path / "x")
    assert code == 1 and "x.bin is one of the inputs" in err
    arguments = ["data", "prepare", tmp_path, "--output", tmp_path / "x", "--glob", "*.txt"]
    assert _run(monkeypatch, capsys, *arguments)[0] == 0
    tokenizer, content = tokenizer_file(tmp_path), tokenizer_file(tmp_path).read_bytes()
    arguments = ["data", "prepare", tmp_path / "a.txt", "--output", tmp_path / "bpe", "--tokenizer", tokenizer]
    code, err = _run(monkeypatch, capsys, *arguments)
    assert code == 1 and "bpe.json is one of the inputs" in err and tokenizer.read_bytes() == content


@pytest.mark.parametrize("folder", ["out/", ".", ".."])
def test_the_output_of_preparation_is_no_folder(monkeypatch, capsys, tmp_path, folder):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("some text")
    code, err = _run(monkeypatch, capsys, "data", "prepare", "a.txt", "--output", folder)
    assert code == 1 and f"--output must end with the name that its files share, got the folder '{folder}'" in err
    assert "/NAME: its files are" in err or "Use NAME: its files are" in err
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    with pytest.raises(ValueError, match=r"data\.source must end with the name"):
        TokenFile(folder)


@pytest.mark.parametrize("pattern", ["", "/etc/*"])
def test_a_pattern_that_python_refuses_is_refused_by_name(monkeypatch, capsys, tmp_path, pattern):
    arguments = ["data", "prepare", tmp_path, "--output", tmp_path / "x", "--glob", pattern]
    code, err = _run(monkeypatch, capsys, *arguments)
    assert code == 1 and err.startswith("error: --glob must be a pattern below the named folders"), err


def test_what_cannot_be_written_is_one_message(monkeypatch, capsys, tmp_path):
    path = tiny_yaml(tmp_path)
    (tmp_path / "run").write_text("a file")
    code, err = _run(monkeypatch, capsys, "train", path)
    assert code == 1 and re.fullmatch(
        r"error: cannot write \S*run: File exists\. Free the disk or name a folder .*\n", err
    ), err
    (tmp_path / "a.txt").write_text("text")
    code, err = _run(monkeypatch, capsys, "data", "prepare", tmp_path / "a.txt", "--output", tmp_path / "run" / "x")
    assert code == 1 and err.startswith("error: cannot write ") and "Traceback" not in err, err


UNUSABLE = {  # a path below a regular file, and a folder where a file is wanted, or the other way round
    "run_dir={0}/file/x": "cannot write {0}/file/x: Not a directory",
    "data.source={0}/file/x": "data.source {0}/file/x: {0}/file/x.idx does not exist. Make it with",
    "data.source={0}/folder": "data.source {0}/folder: {0}/folder.idx is no file. Make it with",
    "data.tokenizer={0}/folder": "'{0}/folder' is no file. Name one that exists.",
    "checkpoint.resume={0}/file": "checkpoint {0}/file is a file; a checkpoint is a directory",
    "checkpoint.resume={0}/file/x": "checkpoint {0}/file/x does not exist. Checkpoints are in",
    "checkpoint.resume={0}/" + "x" * 300: "File name too long. Name a path that exists and can be used.",
}


@pytest.mark.parametrize("override", UNUSABLE)
def test_paths_that_cannot_be_used_are_refused_before_the_first_step(monkeypatch, capsys, tmp_path, override):
    path = tiny_yaml(tmp_path)
    (tmp_path / "file").write_text("a file")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder.idx").mkdir()
    monkeypatch.setattr("lasp.parallel.engines.base.Engine.step", pytest.fail)
    code, err = _run(monkeypatch, capsys, "train", path, override.format(tmp_path))
    assert code == 1 and UNUSABLE[override].format(tmp_path) in err and err.count("\n") == 1, err


@pytest.mark.parametrize(
    ("name", "is_folder", "reason"),
    [
        ("checkpoints", False, "File exists"),
        ("tensorboard", False, "File exists"),
        ("metrics.jsonl", True, "Is a directory"),
        ("config.yaml", True, "Is a directory"),
        (".lock", True, "Is a directory"),
    ],
)
def test_results_that_cannot_be_written_stop_a_run_before_its_first_step(
    monkeypatch, capsys, tmp_path, name, is_folder, reason
):
    (tmp_path / "run").mkdir()
    obstacle = tmp_path / "run" / name
    obstacle.mkdir() if is_folder else obstacle.write_text("")
    monkeypatch.setattr("lasp.parallel.engines.base.Engine.step", pytest.fail)
    code, err = _run(monkeypatch, capsys, "train", tiny_yaml(tmp_path), "log.tensorboard=true")
    assert code == 1 and err.startswith(f"error: cannot write {obstacle}: {reason}. Free the disk or name"), err


def test_a_plot_that_cannot_be_written_is_a_warning(tmp_path, capsys):
    (tmp_path / "run" / "loss.png").mkdir(parents=True)
    train(load_config(tiny_yaml(tmp_path), ["steps=2"]))
    out = " ".join(capsys.readouterr().out.split())
    assert f"warning: cannot write {tmp_path}/run/loss.png: Is a directory." in out and "summary" in out


def test_the_outputs_of_preparation_are_files(monkeypatch, capsys, tmp_path):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "x.bin").mkdir()
    code, err = _run(monkeypatch, capsys, "data", "prepare", tmp_path / "a.txt", "--output", tmp_path / "x")
    assert code == 1 and "x.bin must be a file, and is a folder. Choose another name." in err, err


def test_a_full_disk_is_one_message(monkeypatch, capsys, tmp_path):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("torch.distributed.checkpoint.HuggingFaceStorageWriter.write_data", full)
    code, err = _run(monkeypatch, capsys, "train", tiny_yaml(tmp_path))
    assert code == 1 and re.search(r"^error: cannot write \S*step-00000002: No space left", err), err
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


WRONG = {
    "data=5": "data must be a mapping of keys, got 5",
    "data=foo": "data must be a mapping of keys, got 'foo'",
    "model=5 model.dim=16": "model must be a mapping of keys or a preset's name, got 5",
    "optimizer=[1] optimizer.lr=1": "optimizer must be a mapping of keys, got [1]",
    "model.preset=[1]": "preset of ModelConfig must be one of",
    "model.mixer={preset:\u00a0[a]}": "preset of MixerConfig must be one of",
    "timeout_s=1e20": "timeout_s should be less than or equal to 1000000",
    "timeout_s=0.001": "timeout_s should be greater than or equal to 1, got 0.001",
    "seed=9223372036854775808": "seed should be less than 92233720368547",
    "optimizer.lr=1e30": "optimizer.lr should be less than or equal to 1000000",
    "data.batch_size=3 dp=2": "Set data.batch_size to a multiple of 2.",
}


@pytest.mark.parametrize("overrides", WRONG)
def test_values_of_the_wrong_kind_are_refused_by_name(tmp_path, overrides):
    with pytest.raises(ValueError, match=re.escape(WRONG[overrides])):
        load_config(tiny_yaml(tmp_path), [text.replace("\u00a0", " ") for text in overrides.split(" ")])


def test_faults_of_the_file_say_where(tmp_path):
    with pytest.raises(ValueError, match="is a directory"):
        load_config(tmp_path)
    (tmp_path / "twice.yaml").write_text("steps: 1\nseed: 0\nsteps: 2\n")
    with pytest.raises(ValueError, match="'steps' is given twice, again in line 3"):
        load_config(tmp_path / "twice.yaml")


@pytest.mark.parametrize(
    ("cp_size", "message"), [("0", "cp_size must be at least 2"), ("65", "--cp 65: data.seq_len = 64 tokens cannot")]
)
def test_verify_checks_the_ranks_first(monkeypatch, capsys, tmp_path, cp_size, message):
    monkeypatch.setattr("lasp.launch.verify.trace_config", pytest.fail)
    code, err = _run(monkeypatch, capsys, "verify", tiny_yaml(tmp_path), "--cp", cp_size)
    assert code == 1 and message in err and "validation error" not in err, err


def _break_index(prefix, at, value):
    path = prefix.with_name(prefix.name + ".idx")
    content = bytearray(path.read_bytes())
    content[at : at + len(value)] = value
    path.write_bytes(content)


def test_every_entry_of_an_index_is_checked(tmp_path):
    head = struct.calcsize("<9sQBQQ")
    count = len(TEXTS)
    for name, at, value, message in (
        ("negative length", head + 4, np.int32(-1), "must not be negative"),
        ("negative offset", head + 4 * count + 8, np.int64(-8), "must not be negative"),
        ("offset in the middle", head + 4 * count + 8, np.int64(10**9), "is truncated"),
        ("document of no sequence", head + 12 * count + 8, np.int64(77), rf"must lie in \[0, {count}\].* got 0 to 77"),
    ):
        write_token_file(tmp_path / "t", TEXTS, ByteTokenizer())
        _break_index(tmp_path / "t", at, value.tobytes())
        with pytest.raises(ValueError, match=message):
            TokenFile(tmp_path / "t")
            pytest.fail(name)
    write_token_file(tmp_path / "t", TEXTS, ByteTokenizer())
    for text in ("[1]", "{"):
        (tmp_path / "t.json").write_text(text)
        with pytest.raises(ValueError, match=r"t\.json (must hold a JSON object|is not valid JSON)"):
            TokenFile(tmp_path / "t")


def test_sampling_at_any_temperature_is_finite():
    logits = torch.tensor([[1.0, 100.0, 3.0]])
    for temperature in (1e-45, 1e-320, 1e300):
        assert 0 <= _sample(logits, temperature, None).item() < 3
    assert _sample(logits, 1e-45, None).item() == 1


def test_generation_refuses_what_it_cannot_use(monkeypatch, capsys, tmp_path):
    train(load_config(tiny_yaml(tmp_path), ["steps=2"]))
    arguments = ["generate", tmp_path / "run", "--prompt", "a", "--max-new-tokens", "2"]
    code, err = _run(monkeypatch, capsys, *arguments, "--temperature", "nan")
    assert code == 1 and "temperature must be finite" in err
    code, err = _run(monkeypatch, capsys, *arguments, "--seed", 2**70)
    assert code == 2 and "--seed" in err
    assert _run(monkeypatch, capsys, *arguments, "--temperature", "1e-45")[0] == 0
