"""Checkpoints to and from one safetensors file: training goes on from there as if nothing had happened."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from lasp.launch.config.schema import load_config
from lasp.launch.convert import from_file, to_file
from lasp.launch.data.token_files import write_token_file
from lasp.launch.data.tokenizer import load_tokenizer
from lasp.launch.run.generate import load_model
from lasp.launch.run.report import read_metrics
from lasp.launch.train import train
from lasp.parallel.checkpoints import checkpoint as checkpoints
from lasp.parallel.checkpoints.tensor_files import read_whole
from tests.launch.helpers import TEXTS, tiny_yaml, tokenizer_file


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Six steps with a tokenizer of its own."""
    folder = tmp_path_factory.mktemp("finished")
    path = tiny_yaml(folder)
    tokenizer = str(tokenizer_file(folder))
    write_token_file(folder / "words", TEXTS, load_tokenizer(tokenizer))
    tokens = [f"data.tokenizer={tokenizer}", f"data.source={folder / 'words'}", "data.eval_fraction=0"]
    config = load_config(path, [*tokens, "steps=4"])
    train(config)
    return path, tokens, config.run_dir


def _losses(run_dir, first):
    return [record["loss"] for record in read_metrics(run_dir) if record["step"] >= first]


def test_a_file_and_back_goes_on_bitwise(finished, tmp_path):
    path, tokens, run = finished
    step = checkpoints.list_checkpoints(run / "checkpoints")[0]  # of step 2
    to_file(step, tmp_path / "all.safetensors")
    copy = from_file(tmp_path / "all.safetensors", tmp_path / "again")
    before, after = checkpoints.load(step), checkpoints.load(copy)
    assert after.state == before.state and after.extras == before.extras and after.step == 2
    one, other = read_whole(before.tensors), read_whole(after.tensors)
    assert one.keys() == other.keys() and all(torch.equal(other[name], x) for name, x in one.items())
    train(load_config(path, [*tokens, "steps=4", f"run_dir={tmp_path / 'again'}"]))
    assert _losses(tmp_path / "again", 3) == _losses(run, 3)


def test_weights_alone_begin_a_run(finished, tmp_path):
    path, tokens, run = finished
    file = tmp_path / "weights.safetensors"
    to_file(run, file, weights_only=True)
    weights = load_file(file)
    assert weights.keys() == dict(load_model(run)[0].named_parameters()).keys()
    copy = checkpoints.load(from_file(file, tmp_path / "again"))
    assert copy.step == 0 and copy.state["data_position"] == 0
    read = read_whole(copy.tensors)
    assert all(torch.equal(read[f"model.{name}"], x) for name, x in weights.items())
    assert all(not read[f"{kind}.{name}"].any() for kind in ("exp_avg", "exp_avg_sq") for name in weights)
    train(load_config(path, [*tokens, "steps=2", f"run_dir={tmp_path / 'again'}"]))
    assert _losses(tmp_path / "again", 1)[0] < _losses(run, 1)[0] - 0.1  # it begins where the other ended

    save_file(weights, tmp_path / "foreign.safetensors")
    with pytest.raises(ValueError, match=r"does not say which model it is of.*--config"):
        from_file(tmp_path / "foreign.safetensors", tmp_path / "third")
    config = load_config(path, tokens)
    copy = checkpoints.load(from_file(tmp_path / "foreign.safetensors", tmp_path / "third", config))
    assert copy.state["model"]["dim"] == 16 and "tokenizer.json" in copy.extras


def test_what_cannot_be_converted_is_refused(finished, tmp_path):
    path, tokens, run = finished
    file = tmp_path / "weights.safetensors"
    to_file(run, file, weights_only=True)
    with pytest.raises(ValueError, match=r"exists\. Name a new file"):
        to_file(run, file)
    with pytest.raises(ValueError, match="has checkpoints already, up to step-00000004"):
        from_file(file, run)
    other = load_config(path, [*tokens, "model.dim=32"])
    with pytest.raises(ValueError, match=r"does not fit the model: embed.weight is \(300, 16\), not \(300, 32\)"):
        from_file(file, tmp_path / "other", other)
    (tmp_path / "text.safetensors").write_text("no tensors")
    with pytest.raises(ValueError, match="is not a safetensors file"):
        from_file(tmp_path / "text.safetensors", tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_configuration_beside_a_whole_file_keeps_its_step(finished, tmp_path):
    path, tokens, run = finished
    config = load_config(path, tokens)
    to_file(run, tmp_path / "all.safetensors")
    old = checkpoints.load(checkpoints.find(run))
    new = checkpoints.load(from_file(tmp_path / "all.safetensors", tmp_path / "again", config))
    assert (new.step, new.state["data_position"]) == (old.step, old.state["data_position"])
