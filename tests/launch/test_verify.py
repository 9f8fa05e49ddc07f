"""``lasp verify`` passes what is right and names the layer of what is planted."""

from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch
import yaml

from lasp import CPContext
from lasp.exchange import EXCHANGES
from lasp.exchange.gather import AllGather
from lasp.launch import verify as verifying
from lasp.launch.config.schema import load_config
from lasp.launch.data.token_files import list_files, read_texts, write_token_file
from lasp.launch.data.tokenizer import ByteTokenizer
from lasp.layout import SequenceLayout
from lasp.parallel.mesh import Mesh
from tests.launch.helpers import TEXTS, tiny_config

PATTERN = "SLLL"


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("verify")
    for i in range(12):
        (folder / f"{i}.txt").write_text(f"document {i}: " + "the quick brown fox jumps over the lazy dog. " * (i + 1))
    write_token_file(folder / "text", read_texts(list_files([folder], "*.txt")), ByteTokenizer())
    settings = {
        "run_dir": str(folder / "run"),
        "steps": 1,
        "cp_size": 2,
        "layout": "zigzag",
        "model": {"dim": 32, "num_layers": 4, "pattern": PATTERN, "heads": 2, "mixer": "gla"},
        "data": {"source": str(folder / "text"), "seq_len": 900, "eval_fraction": 0.2},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    return load_config(folder / "config.yaml")


class ForgetsGradients(AllGather):
    """An exchange whose backward loses what later ranks send: the classic silent fault."""

    def wait_backward(self):
        super().wait_backward()


def plant(model, fault, rank):
    """One fault in one layer."""
    if fault == "decay" and rank == 1:
        gate = model.layers[2].mixer.decay
        gate.register_forward_hook(lambda module, inputs, g: g * 1.001)
    elif fault == "position" and rank == 0:

        def shift(module, args):
            x, rotary, *rest = args
            return x, {width: tuple(t.roll(1, 0) for t in table) for width, table in rotary.items()}, *rest

        model.layers[0].mixer.register_forward_pre_hook(shift)
    elif fault == "gradient":

        def swap(module, args):
            x, rotary, cp, *rest = args
            broken = CPContext(cp.layout, cp.group)
            broken.exchange = "forgets"
            return x, rotary, broken, *rest

        model.layers[1].mixer.register_forward_pre_hook(swap)


def rank_trace(group, config, fault):
    mesh = Mesh.build(torch.distributed.get_world_size(group), 1, group)
    model = verifying.make_model(config.model, config.seed, config.torch_dtype)
    plant(model, fault, mesh.cp_rank)
    with mock.patch.dict(EXCHANGES, {"forgets": replace(EXCHANGES["all_gather"], scheme=ForgetsGradients)}):
        return verifying.trace_step(model, *verifying.first_batches(config, mesh), mesh)


def findings(ranks, config, fault, size=2, dtype="float32"):
    config = config.model_copy(update={"cp_size": size, "dtype": dtype})
    one = config.model_copy(update={"cp_size": 1})
    truth, single = (verifying.trace_config(one, d) for d in (torch.float64, config.torch_dtype))
    parts = ranks.run(rank_trace, config, fault, size=size)
    batch, _ = verifying.first_batches(one, Mesh.build())
    layout = SequenceLayout.zigzag(batch.cp.layout.cu_seqlens_global, size)
    assert layout.num_documents > 1, "the batch must be packed"
    return verifying.compare(truth, single, parts, layout)


@pytest.mark.parametrize(("size", "dtype"), [(2, "float32"), (4, "float32"), (3, "bfloat16"), (2, "float64")])
def test_a_correct_model_passes_in_every_dtype(ranks, config, size, dtype):
    found = findings(ranks, config, None, size, dtype)
    names = {f.name.split(".")[0] for f in found}
    assert names == {"output", "gradient", "parameter", "loss", "eval_loss", "grad_norm"}
    assert verifying.explain(found, PATTERN) is None, [f for f in found if f.ranks]


@pytest.mark.parametrize(("exchange", "softmax"), [("ring", "ring"), ("all_scan", "ring"), ("hierarchical", "ring")])
def test_a_correct_model_passes_with_other_exchanges(ranks, config, exchange, softmax):
    config = config.model_copy(update={"exchange": exchange, "softmax_exchange": softmax})
    assert verifying.explain(findings(ranks, config, None, 3), PATTERN) is None


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("decay", r"the output of layer 2 \(linear\) is the first that differs, on cp rank"),
        ("position", r"the output of layer 0 \(softmax\) is the first that differs, on cp rank\(s\) 0"),
        ("gradient", r"all outputs agree; the gradient (that|of).* layer 1 \(linear\)"),
    ],
)
def test_a_planted_fault_is_named_with_its_layer(ranks, config, fault, message):
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(verifying.explain(findings(ranks, config, fault), PATTERN))


def test_verify_needs_more_than_one_rank(config):
    with pytest.raises(ValueError, match=r"cp_size must be at least 2 .*got 1"):
        verifying.verify(config, 1)


def test_verify_needs_a_wire_that_does_not_round(config):
    with pytest.raises(ValueError, match=r"wire_dtype=bfloat16 rounds states on purpose.* Add wire_dtype=null"):
        verifying.verify(config.model_copy(update={"wire_dtype": "bfloat16"}), 2)


def test_the_command_reports_and_leaves_out_by_name_what_it_cannot_compare(tmp_path, capsys):
    last = int(np.random.default_rng(0).permutation(len(TEXTS))[0])  # the one that is held out
    texts = [text if n != last else "x" for n, text in enumerate(TEXTS)]
    write_token_file(tmp_path / "short", texts, ByteTokenizer())
    config = tiny_config(tmp_path, f"data.source={tmp_path}/short", "data.eval_fraction=0.01", "data.seq_len=30")
    assert verifying.verify(config.model_copy(update={"engine": "fsdp2"}), 3) == 0
    report = capsys.readouterr().out
    assert "engine=fsdp2 takes no part: the model's operators and gradients are compared" in report
    assert "the held-out sequence of 2 tokens cannot be cut over 3 ranks: its loss is not compared." in report
    assert "eval_loss" not in report and "PASS: cp = 3 equals cp = 1" in report
    assert all(f"layer {i} ({kind})" in report for i, kind in enumerate(["linear", "softmax"]))
