"""Checkpoints on one process: what is saved comes back, what is damaged is found, what is killed leaves no trace."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from unittest import mock

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lasp.parallel.checkpoints import checkpoint as checkpoints
from lasp.parallel.checkpoints.saver import Saver
from lasp.parallel.checkpoints.tensor_files import read_whole
from lasp.parallel.mesh import Mesh
from tests.parallel.checkpoint_cases import CONFIG, save, tensors_of

SHARD = "shard-00001-model-00001-of-00001.safetensors"


@pytest.mark.parametrize("background", [False, True])
def test_what_is_saved_comes_back(tmp_path, background):
    path = save(tmp_path, 3, extras={"tokenizer.json": b"{}"}, background=background)
    saved = checkpoints.load(path)
    assert saved.step == 3 and saved.state["data_position"] == 21 and saved.extras == {"tokenizer.json": b"{}"}
    found = read_whole(saved.tensors)
    assert torch.equal(found.pop("random_state"), torch.get_rng_state())
    assert found.keys() == tensors_of(3).keys() and all(
        torch.equal(found[name], x) for name, x in tensors_of(3).items()
    )
    assert saved.shapes() == {"a": (3, 4), "b": (18,)}
    assert checkpoints.find(path) == checkpoints.find(tmp_path) == path


def test_a_background_save_has_the_values_of_its_step(tmp_path):
    values = tensors_of(1)
    before = {name: x.clone() for name, x in values.items()}
    state = {"model": CONFIG, "data_position": 1, "config": {}, "tokenizer": "bytes"}
    with Saver(tmp_path, Mesh.build(), background=True) as saver:
        path = saver.save(1, lambda folder: values, state)
        for x in values.values():  # training goes on
            x.zero_()
    found = read_whole(checkpoints.load(path).tensors)
    assert all(torch.equal(found[name], x) for name, x in before.items())


def test_only_the_newest_are_kept(tmp_path):
    for step in (1, 2, 10, 3, 100_000_000):
        save(tmp_path, step, keep=2)
    assert [int(p.name[5:]) for p in checkpoints.list_checkpoints(tmp_path)] == [10, 100_000_000]
    assert not list(tmp_path.glob(".tmp-*"))
    with pytest.raises(ValueError, match="keep must be at least 1"):
        save(tmp_path, 4, keep=0)


def test_a_removal_that_stops_halfway_leaves_no_checkpoint_that_looks_damaged(tmp_path):
    """Neither of one that is too old nor of one that is saved again."""

    def stops(path, **_):
        (path / "state.json").unlink()

    for steps in (1, 2, 3), (3,):
        with mock.patch("lasp.parallel.checkpoints.saver.shutil.rmtree", stops):
            for step in steps:
                save(tmp_path, step, keep=2)
        found = checkpoints.list_checkpoints(tmp_path)
        assert [checkpoints.load(path).step for path in found] == [2, 3]
        assert len(list(tmp_path.glob(".tmp-old-*"))) == 1
        save(tmp_path, 3, keep=2)  # removes what was left
        assert sorted(os.listdir(tmp_path)) == ["step-00000002", "step-00000003"]


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("broken", ["write_tensors", "fingerprint", "_flush_to_disk", "os.rename"])
def test_a_failed_save_leaves_the_older_checkpoint(tmp_path, monkeypatch, broken, background):
    good = save(tmp_path, 1)

    def fail(*_):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(f"lasp.parallel.checkpoints.saver.{broken}", fail)
        with pytest.raises(OSError, match=r"cannot write .*step-00000002.*no space"):
            save(tmp_path, 2, background=background)
    assert os.listdir(tmp_path) == [good.name]
    assert checkpoints.load_newest(tmp_path, pytest.fail).step == 1
    assert save(tmp_path, 1) == good and checkpoints.load(good).step == 1  # the same step again replaces it


SAVING = """
import os, sys, torch
from pathlib import Path
from tests.parallel.checkpoint_cases import save
torch.set_num_threads(1)
for line in sys.stdin:  # a step to begin at: a child does nothing but save
    if child := os.fork():
        os.waitpid(child, 0)
        print("ended", flush=True)
        continue
    step = int(line)
    print(os.getpid(), flush=True)
    while True:
        save(Path(sys.argv[1]), step, keep=2, background=step % 2 == 0)
        step += 1
        print(step, flush=True)
"""


def _kill_while_saving(folder, moments):
    """A process that does nothing but save is killed after each of these seconds; its newest checkpoint stays good."""
    last = 0
    parent = subprocess.Popen(
        [sys.executable, "-c", SAVING, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    for moment in moments:
        parent.stdin.write(f"{last + 1}\n")
        parent.stdin.flush()
        child = int(parent.stdout.readline())
        assert parent.stdout.readline() == f"{last + 2}\n"
        time.sleep(moment)
        os.kill(child, signal.SIGKILL)
        done = list(iter(parent.stdout.readline, "ended\n"))
        finished = int(done[-1]) - 1 if done else last + 1
        found = checkpoints.load_newest(folder, pytest.fail)  # no damaged one has a checkpoint's name
        assert finished <= found.step <= finished + 1
        tensors = read_whole(found.tensors)
        assert all(torch.equal(tensors[name], x) for name, x in tensors_of(found.step).items())
        last = found.step
        leftovers = [path for path in folder.iterdir() if not path.name.startswith("step-")]
        assert len(leftovers) <= 2  # one that was being written, one that was being deleted
    parent.communicate(timeout=30)
    save(folder, last + 1, keep=2)
    assert all(path.name.startswith("step-") for path in folder.iterdir())


def test_a_kill_at_any_moment_leaves_the_newest_good_checkpoint(tmp_path):
    _kill_while_saving(tmp_path, [0.0, 0.013, 0.04])


@pytest.mark.slow
def test_fifty_kills_at_random_moments(tmp_path):
    draw = random.Random(5)
    _kill_while_saving(tmp_path, [draw.uniform(0, 0.1) for _ in range(50)])


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 256 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(folder)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a small disk: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_loses_no_checkpoint(small_disk):
    step = 1
    with pytest.raises(OSError, match=r"cannot write .*step-\d+.*No space left on device"):
        for step in range(1, 50):
            save(small_disk, step)
    assert step > 3
    assert checkpoints.load_newest(small_disk, pytest.fail).step == step - 1
    assert len(checkpoints.list_checkpoints(small_disk)) == step - 1 == len(list(small_disk.iterdir()))


def _truncate(path):
    file = path / "tensors" / SHARD
    file.write_bytes(file.read_bytes()[:-5])


def _flip(path):
    file = path / "tensors" / SHARD
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)


def _edit_state(**changes):
    def edit(path):
        state = json.loads((path / "state.json").read_text()) | changes
        (path / "state.json").write_text(json.dumps({key: value for key, value in state.items() if value is not None}))
        _sign(path)

    return edit


def _edit_tensors(**changes):
    """Other tensors in place of these, none for None; each piece still said to be the first of its tensor."""

    def edit(path):
        file = path / "tensors" / SHARD
        with safe_open(file, "pt") as reader:
            header = reader.metadata()
        changed = {name.replace("__", "."): x for name, x in changes.items()}
        kept = {name: x for name, x in {**load_file(file), **changed}.items() if x is not None}
        places = {name: {"saved_offsets": [0] * x.dim()} for name, x in kept.items()}
        save_file(kept, file, {**header, "DCP_SHARDING_INFO": json.dumps(places)})
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
    files = [file for file in path.rglob("*") if file.is_file() and file.name != "manifest.json"]
    manifest["files"] = {file.relative_to(path).as_posix(): checkpoints.fingerprint(file) for file in files}
    (path / "manifest.json").write_text(json.dumps(manifest))


PARTS = {
    "no 'data_position' in state.json": _edit_state(data_position=None),
    "no 'config' in state.json": _edit_state(config=None),
    "'tokenizer' is int, not str, in state.json": _edit_state(tokenizer=5),
    "no parameter in tensors": _leave_out(f"tensors/{SHARD}"),
    "state.json is missing.": _leave_out("state.json"),
    "no exp_avg_sq.b in tensors": _edit_tensors(exp_avg_sq__b=None),
    "no random_state in tensors": _edit_tensors(random_state=None),
    "exp_avg.a is (4,), not (3, 4), in tensors": _edit_tensors(exp_avg__a=torch.ones(4)),
    "cannot be read": lambda path: ((path / "tensors" / SHARD).write_bytes(b"nothing"), _sign(path)),
}
DAMAGES = PARTS | {
    f"tensors/{SHARD} has": _truncate,
    f"tensors/{SHARD} does not have its hash": _flip,
    f"tensors/{SHARD} is missing": lambda path: (path / "tensors" / SHARD).unlink(),
    "state.json is missing": lambda path: (path / "state.json").unlink(),
    "no manifest.json": lambda path: (path / "manifest.json").unlink(),
    "manifest.json cannot be read": lambda path: (path / "manifest.json").write_text("{"),
    "format 'other'": lambda path: (path / "manifest.json").write_text(json.dumps({"format": "other", "files": {}})),
}


@pytest.mark.parametrize("message", DAMAGES)
def test_damage_is_found_and_the_one_before_is_taken_loudly(tmp_path, message):
    save(tmp_path, 1)
    path = save(tmp_path, 2)
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
    (path := save(tmp_path, 1)).joinpath("state.json").unlink()
    with pytest.raises(ValueError, match="none of the 1 checkpoints"):
        checkpoints.load_newest(tmp_path, lambda _: None)
    assert path.is_dir()


def test_another_model_is_refused_by_key_and_by_tensor(tmp_path):
    saved = checkpoints.load(save(tmp_path, 1))
    shapes = {"a": (3, 4), "b": (18,)}
    checkpoints.check_same_model(saved, CONFIG, shapes)
    with pytest.raises(ValueError, match=r"model\.mixer\.decay is 'none' in the checkpoint and 'fixed' here"):
        checkpoints.check_same_model(saved, {**CONFIG, "mixer": {"heads": 2, "decay": "fixed"}}, shapes)
    with pytest.raises(ValueError, match=r"tensor a is \(3, 4\) in the checkpoint and \(4, 4\) here"):
        checkpoints.check_same_model(saved, CONFIG, {**shapes, "a": (4, 4)})


def test_the_checkpoint_just_written_is_never_deleted(tmp_path):
    for step in (6, 2, 4):
        save(tmp_path, step, keep=1)
    assert [path.name for path in checkpoints.list_checkpoints(tmp_path)] == ["step-00000004", "step-00000006"]
