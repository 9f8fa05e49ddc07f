"""Checkpoints that several ranks write together: each its part, a failure of one is everybody's."""

import errno
import os
import tempfile
import threading
from datetime import timedelta
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from lasp.parallel.checkpoints import checkpoint as checkpoints
from lasp.parallel.checkpoints.saver import Saver
from lasp.parallel.checkpoints.tensor_files import read_whole
from lasp.parallel.mesh import Mesh

STATE = {"model": {}, "data_position": 0, "config": {}, "tokenizer": "bytes"}


def _part(rank, step, folder=None):
    """What one rank brings: tensors of its own, as an engine whose ranks hold all of them shares them out."""
    return {f"{kind}.{rank}": torch.full((rank + 1, 3), 10.0 * step + rank) for kind in ("model", *checkpoints.MOMENTS)}


def _save_twice(group, folder, background, fault):
    """Saves steps 1 and 2; ``fault(rank)`` is active in the second. What the second said, and what is newest then."""
    mesh = Mesh.build(1, 4, group)
    writers = dist.new_group(backend="gloo", timeout=timedelta(seconds=30)) if background else None
    saver = Saver(folder, mesh, background=background, group=writers)
    saver.save(1, partial(_part, mesh.rank, 1), STATE)
    saver.wait()
    message = None
    with fault(mesh.rank):
        try:
            saver.save(2, partial(_part, mesh.rank, 2), STATE)
            saver.wait()
        except (OSError, ValueError) as error:
            message = str(error)
    newest = checkpoints.load_newest(folder, lambda text: None, mesh)
    mesh.gather(None)
    return message, newest.step, sorted(os.listdir(newest.tensors)), sorted(os.listdir(folder))


def _none(rank):
    return mock.MagicMock()


def _no_write(rank):
    """The disk of rank 2 is full."""
    full = OSError(errno.ENOSPC, "No space left on device")
    where = "torch.distributed.checkpoint.HuggingFaceStorageWriter.write_data"
    return mock.patch(where, side_effect=full) if rank == 2 else mock.MagicMock()


def _no_hash(rank):
    gone = OSError(errno.EIO, "Input/output error")
    return (
        mock.patch("lasp.parallel.checkpoints.saver.fingerprint", side_effect=gone) if rank == 3 else mock.MagicMock()
    )


def _blind(rank):
    """Rank 1 is on a node that has another disk."""
    return mock.patch.object(Path, "is_dir", lambda self: False) if rank == 1 else mock.MagicMock()


FAULTS = {_none: None, _no_write: "No space left on device", _no_hash: "Input/output error", _blind: "rank(s) [1]"}


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("fault", FAULTS)
def test_all_ranks_save_or_all_say_why_not(ranks, tmp_path, fault, background):
    expected = FAULTS[fault]
    for message, newest, files, names in ranks.run(_save_twice, tmp_path, background, fault, size=4):
        assert (message is None) if expected is None else (expected in message)
        assert newest == (2 if expected is None else 1)
        assert len(files) == 4  # one for each rank
        assert all(name.startswith("step-") for name in names)
    found = read_whole(checkpoints.load_newest(tmp_path, pytest.fail).tensors)
    del found["random_state"]
    assert found.keys() == {key for rank in range(4) for key in _part(rank, 0)}
    for rank in range(4):
        assert all(torch.equal(found[key], x) for key, x in _part(rank, newest).items())


def _train_while_saving(group):
    """Collectives of the training run while the ranks write; nobody waits for the disk in ``save``."""
    mesh = Mesh.build(1, 4, group)
    writers = dist.new_group(backend="gloo", timeout=timedelta(seconds=30))
    folder = Path(mesh.on_first(tempfile.mkdtemp))
    go_on = threading.Event()
    write = Saver._write

    def slow(self, *content):
        assert go_on.wait(30)
        write(self, *content)

    with mock.patch.object(Saver, "_write", slow), Saver(folder, mesh, background=True, group=writers) as saver:
        path = saver.save(1, partial(_part, mesh.rank, 1), STATE)
        values = [mesh.sum(torch.tensor([float(step)])).item() for step in range(20)]
        assert not path.exists()
        go_on.set()
        values += [mesh.sum(torch.tensor([float(step)])).item() for step in range(20, 40)]
    return values, checkpoints.load(path).step


def test_training_goes_on_while_ranks_write(ranks):
    for values, step in ranks.run(_train_while_saving, size=4):
        assert values == [4.0 * step for step in range(40)] and step == 1
