import re

import pytest

from lasp.launch.config.schema import RunConfig, load_config
from tests.launch.helpers import tiny_config, tiny_yaml


def test_overrides_and_aliases_win_over_the_file(tmp_path):
    path = tiny_yaml(tmp_path)
    config = load_config(path, ["cp=2", "optimizer.lr=1e-3", "model.mixer.heads=1", "data.batch_size=3"])
    assert (config.cp_size, config.optimizer.lr, config.data.batch_size) == (2, 1e-3, 3)
    assert config.model.mixer.decay == "channel" and config.model.mixer.heads == 1  # gla, with one field on top
    assert load_config(path, ["cp_size=2", "model.norm_eps=1e-6"]).model.norm_eps == 1e-6


def test_ranks_follow_from_the_sizes(tmp_path):
    megatron = ["backend=megatron", "tp=2", "pp=3", "cp=4"]
    assert tiny_config(tmp_path).num_ranks == 1
    assert tiny_config(tmp_path, "cp=4", "dp=2").num_ranks == 8
    assert (open_dp := tiny_config(tmp_path, *megatron)).num_ranks == open_dp.ranks_per_sequence == 24
    assert tiny_config(tmp_path, *megatron, "dp=2").num_ranks == 48


def test_a_configuration_survives_json(tmp_path):
    config = load_config(tiny_yaml(tmp_path), ["model.mixer=lightning"])
    assert RunConfig.model_validate(config.plain()) == config


def test_the_vocabulary_is_the_tokenizers_unless_it_is_set(tmp_path):
    assert load_config(tiny_yaml(tmp_path)).model.vocab_size == 257
    assert load_config(tiny_yaml(tmp_path), ["model.vocab_size=300"]).model.vocab_size == 300
    assert load_config(tiny_yaml(tmp_path), ["model=tiny"]).model.vocab_size == 257


WRONG = {
    "optimizer.lrr=1": "override 'optimizer.lrr=1': unknown key optimizer.lrr. Did you mean optimizer.lr?",
    "model.dimm=3": "Did you mean model.dim?",
    "model.mixer.head=3": "unknown key model.mixer.head. Did you mean model.mixer.heads?",
    "stepz=3": "unknown key stepz. Did you mean steps? Keys at the top: run_dir,",
    "steps=abc": "steps should be a valid integer",
    "steps=true": "steps should be a valid integer, got True.",
    "steps=0": "steps should be greater than or equal to 1, got 0",
    "optimizer.lr=-1": "optimizer.lr should be greater than 0, got -1",
    "data.seq_len='16'": "data.seq_len should be a valid integer, got '16'. Leave out the quotes.",
    "steps='6'": "steps should be a valid integer, got '6'. Leave out the quotes.",
    "eval.every='2'": "eval.every should be a valid integer, got '2'. Leave out the quotes.",
    "log.tensorboard='true'": "log.tensorboard should be a valid boolean, got 'true'. Leave out the quotes.",
    "checkpoint.keep=2.0": "checkpoint.keep should be a valid integer, got 2.0.",
    "optimizer.betas=[0.9, '0.95']": "optimizer.betas.1 should be a valid number, got '0.95'. Leave out the quotes.",
    "optimizer.lr='1e-3'": "optimizer.lr should be a valid number, got '1e-3'. Leave out the quotes.",
    "model.dim='16'": "dim must be int, got '16'",
    "data.source=5": "data.source should be a valid string, got 5.",
    "run_dir=5": "run_dir: must be the path of a folder, got 5. Use one like runs/NAME.",
    "checkpoint.resume=5": "checkpoint.resume: must be true, false or the path of a checkpoint, got 5. Set one of",
    "seed=2001-99-99": "override 'seed=2001-99-99' is not valid YAML: month must be in 1..12. Mend what it names.",
    "dtype=float16": "dtype should be 'float32', 'bfloat16' or 'float64', got 'float16'",
    "model.dim=wide": "dim must be int, got 'wide'",
    "model.heads=3": "heads must divide dim",
    "cp_size.x=3": "cp_size holds one value and no keys below it",
    "lr": "must have the form key=value",
    "cp=65": "data.seq_len = 64 tokens cannot be cut over cp_size = 65 ranks",
    "dp=3": "data.batch_size = 2 sequences per step must be a multiple of dp_size = 3",
    "optimizer.warmup_steps=7": "must not exceed steps = 6",
    "optimizer.min_lr=1": "optimizer.min_lr = 1.0 must not exceed optimizer.lr",
    "model.mixer={decay: none, causal: false}": "is an encoder",
    "data.tokenizer=absent.json": "'absent.json' is no file",
    "backend=other": "backend should be 'native' or 'megatron', got 'other'",
    "megatron.virtual_stages=1": "megatron.virtual_stages should be greater than or equal to 2, got 1",
    "megatron.distributed_optimizer=false": "has no effect with backend=native: set backend=megatron",
    "ray.num_workers=2": "ray: num_workers=2 has no effect with launcher=local: set launcher=ray, or leave ray out",
    "ray.address=ray://head:10001": "ray.address: must be auto or the HOST:PORT of a cluster's head, got 'ray://head",
    "ray.max_failures=-2": "ray.max_failures should be greater than or equal to -1, got -2",
    "ray.gpus_per_worker=2": "ray.gpus_per_worker should be less than or equal to 1, got 2",
    "tp=2": "tp_size=2 has no effect with backend=native: set backend=megatron, or leave tp_size out",
    "pp=2": "pp_size=2 has no effect with backend=native: set backend=megatron, or leave pp_size out",
    "exchange=gossip": "exchange: must be one of ('all_gather', 'ring', 'all_scan', 'log_scan', 'hierarchical', ",
    "exchange=rings": "got 'rings'. Did you mean 'ring'?",
    "exchange=3": "exchange should be a valid string, got 3",
    "exchange=auto": "exchange='auto' chooses by the links between ranks: fabric must name a preset, h100-ib, a100-ib",
    "fabric=laptop": "fabric has no effect on exchange='all_gather'; leave it None",
    "wire_dtype=float16": "wire_dtype should be 'bfloat16', got 'float16'",
}
EXCHANGES = {
    "exchange=ring model.pattern=S": "exchange=ring has no effect on model.pattern=S: it has no linear layer",
    "wire_dtype=bfloat16 model.pattern=S": "wire_dtype=bfloat16 has no effect on model.pattern=S",
    "softmax_exchange=ring model.pattern=L": "softmax_exchange=ring has no effect on model.pattern=L",
    "softmax_exchange=ring model.window=4": "model.window=4 has no use for softmax_exchange='ring'",
    "softmax_exchange=ulysses cp=4": "Use softmax_exchange='all_gather' or 'ring', which cut no heads",
    "exchange=auto fabric=pigeon": "unknown fabric 'pigeon': the presets are h100-ib, a100-ib",
    "exchange=auto fabric=links.json": "fabric file links.json does not exist. `lasp bench fabric` measures one",
}


@pytest.mark.parametrize("overrides", EXCHANGES)
def test_exchanges_that_cannot_serve_are_refused_with_the_alternatives(tmp_path, overrides):
    with pytest.raises(ValueError, match=re.escape(EXCHANGES[overrides])):
        load_config(tiny_yaml(tmp_path), overrides.split())


@pytest.mark.parametrize("override", WRONG)
def test_what_cannot_be_meant_is_refused_by_name(tmp_path, override):
    with pytest.raises(ValueError, match=re.escape(WRONG[override])):
        load_config(tiny_yaml(tmp_path), [override])


def test_faults_of_the_file_name_the_file(tmp_path):
    with pytest.raises(ValueError, match=r"tiny\.yaml: unknown key checkpoints\. Did you mean checkpoint\?"):
        load_config(tiny_yaml(tmp_path, checkpoints={"every": 1}))
    path = tmp_path / "broken.yaml"
    for text, message in (
        ("a: [", "is not valid YAML"),
        ("- 1", "must hold a mapping"),
        ("steps: 1\nsteps: 2", "key 'steps' is given twice"),
        ("steps: 1\nmodel: tiny", "run_dir is required"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            load_config(path)
    with pytest.raises(ValueError, match=r"does not exist\. Name a YAML file"):
        load_config(tmp_path / "none.yaml")
    path.write_bytes(b"steps: \xff")
    with pytest.raises(OSError, match=r"cannot read .*broken\.yaml: it is not UTF-8 text\. Name a file"):
        load_config(path)
    with pytest.raises(OSError, match=r"cannot read .*: File name too long\. Name a file"):
        load_config(tmp_path / ("x" * 300))


def test_a_merged_mapping_may_be_overridden(tmp_path):
    path = tiny_yaml(tmp_path)
    text = path.read_text().replace("eval:\n", "eval:\n  <<: {every: 9, sequences: 9}\n", 1)
    path.write_text(text)
    assert "<<" in text and load_config(path).eval.every == 3


def test_what_a_run_stores_means_the_same_in_any_directory(tmp_path, monkeypatch):
    path = tiny_yaml(tmp_path)
    monkeypatch.chdir(tmp_path)
    stored = load_config(path, ["run_dir=run", "data.source=text", "checkpoint.resume=run"]).portable()
    assert stored["run_dir"] == stored["checkpoint"]["resume"] == str(tmp_path / "run")
    assert stored["data"]["source"] == str(tmp_path / "text") and stored["data"]["tokenizer"] == "bytes"
    stored = load_config(path, ["data.source=stdlib", "checkpoint.resume=false"]).portable()
    assert stored["data"]["source"] == "stdlib" and stored["checkpoint"]["resume"] is False
