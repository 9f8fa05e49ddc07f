import json
import os
import re
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from lasp.parallel import checkpoint as checkpoints

CONFIG = {"dim": 4, "mixer": {"heads": 2, "decay": "none"}}


def _tensors(seed):
    flat = torch.randn(30, generator=torch.Generator().manual_seed(seed))
    return {
        "model": {"a": flat[:12].view(3, 4), "b": flat[12:]},  # views of one buffer, as the engine's are
        "optimizer": {
            **{f"{kind}.a": flat[:12].view(3, 4) for kind in ("exp_avg", "exp_avg_sq")},
            **{f"{kind}.b": flat[12:] for kind in ("exp_avg", "exp_avg_sq")},
            "random_state": torch.get_rng_state(),
        },
    }


def _save(directory, step, **options):
    state = {"model": CONFIG, "data_position": 7 * step, "config": {}, "tokenizer": "bytes"}
    return checkpoints.save(directory, step, _tensors(step), state, **options)


def test_what_is_saved_comes_back(tmp_path):
    path = _save(tmp_path, 3, extras={"tokenizer.json": b"{}"})
    saved = checkpoints.load(path)
    assert saved.step == 3 and saved.state["data_position"] == 21 and saved.extras == {"tokenizer.json": b"{}"}
    for group, members in _tensors(3).items():
        assert saved.tensors[group].keys() == members.keys()
        assert all(torch.equal(saved.tensors[group][name], x) for name, x in members.items())
    assert checkpoints.find(path) == checkpoints.find(tmp_path) == path


def test_only_the_newest_are_kept(tmp_path):
    for step in (1, 2, 10, 3, 100_000_000):
        _save(tmp_path, step, keep=2)
    assert [int(p.name[5:]) for p in checkpoints.list_checkpoints(tmp_path)] == [10, 100_000_000]
    assert not list(tmp_path.glob(".tmp-*"))
    with pytest.raises(ValueError, match="keep must be at least 1"):
        _save(tmp_path, 4, keep=0)


@pytest.mark.parametrize("broken", ["save_file", "_fingerprint", "_flush_to_disk", "os.rename"])
def test_a_failed_save_leaves_the_older_checkpoint(tmp_path, monkeypatch, broken):
    good = _save(tmp_path, 1)

    def fail(*_):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(f"lasp.parallel.checkpoint.{broken}", fail)
        with pytest.raises(OSError, match="no space"):
            _save(tmp_path, 2)
    assert os.listdir(tmp_path) == [good.name]
    assert checkpoints.load_newest(tmp_path, pytest.fail).step == 1
    assert _save(tmp_path, 1) == good and checkpoints.load(good).step == 1  # the same step again replaces it


KILLED = """
import sys, time, torch
from pathlib import Path
from lasp.parallel import checkpoint
flush = checkpoint._flush_to_disk
def slow(path):
    print("writing", flush=True)
    time.sleep(60)
checkpoint._flush_to_disk = slow
checkpoint.save(Path(sys.argv[1]), 2, {"model": {"a": torch.ones(3)}}, {"model": {}})
"""


def test_a_killed_save_leaves_the_older_checkpoint(tmp_path):
    _save(tmp_path, 1)
    child = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE)
    assert child.stdout.readline() == b"writing\n"
    child.send_signal(signal.SIGKILL)
    child.wait(30)
    assert len(os.listdir(tmp_path)) == 2  # the half written one has no name that a reader looks at
    assert checkpoints.load_newest(tmp_path, pytest.fail).step == 1
    _save(tmp_path, 3)
    assert sorted(os.listdir(tmp_path)) == ["step-00000001", "step-00000003"]


def _truncate(path):
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-5])


def _flip(path):
    file = path / "optimizer.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)


def _edit_state(**changes):
    def edit(path):
        state = json.loads((path / "state.json").read_text()) | changes
        (path / "state.json").write_text(json.dumps({key: value for key, value in state.items() if value is not None}))
        _sign(path)

    return edit


def _edit_optimizer(**changes):
    def edit(path):
        tensors = _tensors(2)["optimizer"] | changes
        kept = {name: x.clone() for name, x in tensors.items() if x is not None}
        save_file(kept, path / "optimizer.safetensors")
        _sign(path)

    return edit


def _leave_out(name):
    def leave_out(path):
        (path / name).unlink()
        _sign(path)

    return leave_out


def _sign(path):
    """A manifest that is right about the files that are there."""
    manifest = json.loads((path / "manifest.json").read_text())
    files = [file for file in path.iterdir() if file.name != "manifest.json"]
    manifest["files"] = {file.name: checkpoints._fingerprint(file) for file in files}
    (path / "manifest.json").write_text(json.dumps(manifest))


PARTS = {
    "no 'data_position' in state.json": _edit_state(data_position=None),
    "no 'config' in state.json": _edit_state(config=None),
    "'tokenizer' is int, not str, in state.json": _edit_state(tokenizer=5),
    "optimizer.safetensors is missing": _leave_out("optimizer.safetensors"),
    "model.safetensors is missing": _leave_out("model.safetensors"),
    "state.json is missing.": _leave_out("state.json"),
    "no exp_avg_sq.b in optimizer.safetensors": _edit_optimizer(**{"exp_avg_sq.b": None}),
    "no random_state in optimizer.safetensors": _edit_optimizer(random_state=None),
    "exp_avg.a is (4,), not (3, 4), in optimizer.safetensors": _edit_optimizer(**{"exp_avg.a": torch.ones(4)}),
}
DAMAGES = PARTS | {
    "model.safetensors has": _truncate,
    "optimizer.safetensors does not have its hash": _flip,
    "state.json is missing": lambda path: (path / "state.json").unlink(),
    "no manifest.json": lambda path: (path / "manifest.json").unlink(),
    "manifest.json cannot be read": lambda path: (path / "manifest.json").write_text("{"),
    "format 'other'": lambda path: (path / "manifest.json").write_text(json.dumps({"format": "other", "files": {}})),
}


@pytest.mark.parametrize("message", DAMAGES)
def test_damage_is_found_and_the_one_before_is_taken_loudly(tmp_path, message):
    _save(tmp_path, 1)
    path = _save(tmp_path, 2)
    DAMAGES[message](path)
    with pytest.raises(ValueError, match=re.escape(message)):
        checkpoints.load(path)
    warnings = []
    assert checkpoints.load_newest(tmp_path, warnings.append).step == 1
    assert len(warnings) == 1 and message in warnings[0]


def test_absent_and_foreign_checkpoints_are_named(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        checkpoints.load(tmp_path / "nowhere")
    (tmp_path / "model.pt").write_bytes(b"?")
    with pytest.raises(ValueError, match="is a file"):
        checkpoints.load(tmp_path / "model.pt")
    assert checkpoints.load_newest(tmp_path / "none", pytest.fail) is None
    (path := _save(tmp_path, 1)).joinpath("model.safetensors").unlink()
    with pytest.raises(ValueError, match="none of the 1 checkpoints"):
        checkpoints.load_newest(tmp_path, lambda _: None)
    assert path.is_dir()


def test_another_model_is_refused_by_key_and_by_tensor(tmp_path):
    saved = checkpoints.load(_save(tmp_path, 1))
    shapes = {"a": (3, 4), "b": (18,)}
    checkpoints.check_same_model(saved, CONFIG, shapes)
    with pytest.raises(ValueError, match=r"model\.mixer\.decay is 'none' in the checkpoint and 'fixed' here"):
        checkpoints.check_same_model(saved, {**CONFIG, "mixer": {"heads": 2, "decay": "fixed"}}, shapes)
    with pytest.raises(ValueError, match=r"tensor a is \(3, 4\) in the checkpoint and \(4, 4\) here"):
        checkpoints.check_same_model(saved, CONFIG, {**shapes, "a": (4, 4)})


def test_the_checkpoint_just_written_is_never_deleted(tmp_path):
    for step in (6, 2, 4):
        checkpoints.save(tmp_path, step, {}, {}, keep=1)
    assert [path.name for path in checkpoints.list_checkpoints(tmp_path)] == ["step-00000004", "step-00000006"]
