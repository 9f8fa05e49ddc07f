"""A run so small that it takes a second: its data, its configuration."""

import pytest
import yaml

from lasp.launch.config.schema import load_config
from lasp.launch.data.token_files import write_token_file
from lasp.launch.data.tokenizer import ByteTokenizer

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
