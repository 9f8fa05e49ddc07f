"""A run so small that it takes a second: its data, its configuration; and how a test starts it, in which process."""

import contextlib
import multiprocessing
import os
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
import yaml

from lasp.launch.cli import main
from lasp.launch.config.schema import load_config
from lasp.launch.data.token_files import write_token_file
from lasp.launch.data.tokenizer import ByteTokenizer
from lasp.launch.run.report import read_metrics
from lasp.launch.train import train_on_mesh
from lasp.parallel.mesh import Mesh

COMMAND = [sys.executable, "-m", "lasp.launch.cli"]

TEXTS = [f"def f{n}(x):\n    return x + {n}\n" * (1 + n % 5) for n in range(40)]


def tiny_yaml(folder, **changes):
    """Path of a YAML file for a two-layer hybrid model on a prepared file of TEXTS."""
    if not (folder / "text.idx").exists():
        write_token_file(folder / "text", TEXTS, ByteTokenizer())
    values = {
        "run_dir": str(folder / "run"),
        "steps": 6,
        "device": "cpu",
        "timeout_s": 60,
        "model": {"dim": 16, "num_layers": 2, "pattern": "LS", "heads": 2, "mixer": "gla"},
        "data": {"source": str(folder / "text"), "seq_len": 64, "batch_size": 2, "eval_fraction": 0.1},
        "optimizer": {"lr": 0.01, "warmup_steps": 2},
        "eval": {"every": 3, "sequences": 3},
        "checkpoint": {"every": 2, "keep": 3},
        "log": {"every_s": 0, "tensorboard": False, "sample_tokens": 8},
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(values | changes))
    return path


def tiny_config(folder, *overrides):
    return load_config(tiny_yaml(folder), list(overrides))


def tokenizer_file(folder):
    """Path of a small byte-level BPE tokenizer, trained on TEXTS."""
    tokenizers = pytest.importorskip("tokenizers")
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token=None, byte_fallback=False))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS, trainer)
    path = folder / "bpe.json"
    backend.save(str(path))
    return path


def train_on_ranks(group, path, overrides):
    """``train``, on ranks of a pool."""
    config = load_config(path, overrides)
    train_on_mesh(config, Mesh.build(config.cp_size, config.dp_size, group))


def run_main(monkeypatch, *arguments):
    """Exit code of ``lasp ARGUMENTS`` in this process."""
    monkeypatch.setattr(sys, "argv", ["lasp", *map(str, arguments)])
    try:
        main()
    except SystemExit as stopped:
        return stopped.code
    return 0


@contextlib.contextmanager
def forked(work, output, **environment):
    """A process, forked from this one, that runs ``work()`` while the block runs: it need not import torch again.

    What it prints goes to the file ``output``. ``work`` must not use autograd, which does not survive a fork.
    """

    def run():
        with open(output, "w") as file:
            for stream in (1, 2):
                os.dup2(file.fileno(), stream)
        sys.stdout, sys.stderr = (os.fdopen(stream, "w", buffering=1, closefd=False) for stream in (1, 2))
        os.environ |= environment
        tempfile.tempdir = None  # as the environment says now
        work()

    Path(output).touch()
    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()


def forked_main(arguments, output, **environment):
    """:func:`forked` ``lasp ARGUMENTS``."""

    def work():
        sys.argv = ["lasp", *map(str, arguments)]
        main()

    return forked(work, output, **environment)


def last_step(run_dir):
    """The newest step of a run's metrics, 0 before there is one."""
    return max((record["step"] for record in read_metrics(run_dir)), default=0)


def wait_until(condition, process, output, limit_s=100.0):
    """Return when ``condition()`` holds; a :func:`forked` process that ends before fails the test with its output."""
    deadline = time.monotonic() + limit_s
    while not condition():
        assert process.is_alive() and time.monotonic() < deadline, Path(output).read_text()
        time.sleep(0.02)


@contextlib.contextmanager
def once(condition, act, limit_s=200.0):
    """Beside the block, in a thread: ``act()`` as soon as ``condition()`` holds, and nothing once the block is left."""
    left = threading.Event()

    def watch():
        deadline = time.monotonic() + limit_s
        while not left.wait(0.05) and time.monotonic() < deadline:
            if condition():
                return act()

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        left.set()
        thread.join()
