"""An exchange that stands in its table alone is known to everything that takes exchanges."""

import dataclasses
from pathlib import Path
from unittest import mock

import pytest
import torch

from lasp import CPContext, SequenceLayout, cp_context, linear_attention, softmax_attention
from lasp.cost import Case
from lasp.cost.fabric import Fabric
from lasp.exchange import EXCHANGES, Buffers, Exchange, StateExchange, choose, estimate, names
from lasp.exchange import table as linear_table
from lasp.exchange.gather import AllGather
from lasp.launch.bench.baselines import methods
from lasp.launch.bench.exchange import Settings
from lasp.launch.config.schema import checked
from lasp.launch.plan.activations import Load, exchange_term
from lasp.launch.plan.memory import Setup, predict_memory
from lasp.launch.plan.question import PlannedJob, device_of
from lasp.launch.plan.search import make_plan
from lasp.models.config import ModelConfig
from lasp.softmax import table as softmax_table
from lasp.softmax.table import SOFTMAX_EXCHANGES

H100 = Fabric.of("h100-ib")
DOCUMENT = Path(__file__).parents[2] / "docs" / "exchanges.md"


class Fold(AllGather):
    """What a new exchange would be: here all_gather, under another name."""


def traffic(case, fabric):
    """So cheap that it is always taken."""
    found = linear_table.traffic.gather(case, fabric)
    return dataclasses.replace(found, phases=(), bytes_sent=7, all_messages=1, all_bytes=0)


FOLD = Exchange(
    name="fold",
    scheme=Fold,
    traffic=traffic,
    buffers=Buffers(5),
    steps="a test folds it",
    rounds="none",
    suits="tests",
)


@pytest.fixture
def fold(monkeypatch):
    monkeypatch.setitem(EXCHANGES, "fold", FOLD)


def run_values(**changes) -> dict:
    return {"run_dir": "runs/x", "steps": 1, "cp_size": 2, "model": "tiny", "data": {"seq_len": 64}, **changes}


def test_configurations_and_contexts_take_it(fold):
    assert names()[-2:] == ("fold", "auto")
    assert checked(run_values(exchange="fold"), "here").exchange_options.exchange == "fold"
    assert cp_context.ExchangeOptions("fold").exchange == "fold"
    with pytest.raises(
        ValueError, match=r"exchange: must be one of \(.*'fold', 'auto'\), got 'flod'. Did you mean 'fold'\?"
    ):
        checked(run_values(exchange="flod"), "here")
    with pytest.raises(ValueError, match="fabric has no effect on exchange='fold'"):
        cp_context.ExchangeOptions("fold", fabric=H100)


def test_it_is_unknown_without_its_entry():
    with pytest.raises(ValueError, match=r"must be one of .* got 'fold'"):
        checked(run_values(exchange="fold"), "here")
    with pytest.raises(ValueError, match="exchange must be one of"):
        estimate("fold", Case((2,), 1, 0), H100)


def test_the_cost_model_and_the_planner_reckon_with_it(fold):
    case = Case((8,) * 4, 2**20, 0)
    assert estimate("fold", case, H100).bytes_sent == 7
    assert choose(case, H100).exchange == "fold"
    model = ModelConfig.preset("linear-llama3-1b")
    plan = make_plan(PlannedJob(model=model, fabric=H100, device=device_of(None, H100), seq_len=2**20, gpus=16))
    assert {c.exchange for c in plan.candidates if c.cp > 1} == set(EXCHANGES)
    assert plan.best.cp == 1 or plan.best.exchange == "fold"


def test_the_memory_model_reckons_with_it(fold):
    model = dataclasses.replace(ModelConfig.preset("linear-llama3-1b"), recompute=True)
    load = Load(2**15, cp_size=4, exchange="fold")
    term = exchange_term(model, load)
    gathered = exchange_term(model, dataclasses.replace(load, exchange="all_gather"))
    assert term.formula == "5 x F (b + a)" and term.bytes == 5 / 8 * gathered.bytes  # 2 x W F (b + a), W = 4
    assert predict_memory(model, Setup("ddp", load)).peak > 0


def test_benches_and_documents_list_it(fold):
    assert "fold" in Settings().exchanges
    assert methods()["fold"].exchange == "fold" and methods()["fold"].label == "a test folds it"
    assert "| `fold` | a test folds it | none | tests |" in linear_table.document()


def outputs(group, exchange: str) -> tuple[bool, type]:
    """A layer under the new exchange and under all_gather, on a rank that has it in its table."""
    layout, made = SequenceLayout.zigzag(32, 2), []
    x = torch.randn(1, 32, 2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with mock.patch.dict(
        EXCHANGES, {"fold": dataclasses.replace(FOLD, scheme=lambda *a: made.append(Fold(*a)) or made[0])}
    ):
        contexts = [CPContext(layout, group, name) for name in (exchange, "all_gather")]
        own = layout.shard(x, contexts[0].cp_rank)
        found = [linear_attention(own, own, own, cp=cp)[0] for cp in contexts]
    return torch.equal(*found), type(made[0])


def test_layers_exchange_by_it(ranks):
    for equal, made in ranks.run(outputs, "fold", size=2):
        assert equal and issubclass(made, StateExchange) and made.__name__ == "Fold"


@pytest.mark.parametrize("table", [linear_table, softmax_table])
def test_the_documents_list_what_the_tables_hold(table):
    room = "exchange" if table is linear_table else "softmax"
    block = f"<!-- table of lasp/{room}/table.py -->\n{table.document()}\n<!-- end -->\n"
    assert block in DOCUMENT.read_text(), f"put this into docs/exchanges.md:\n{block}"


def test_the_documents_name_every_choice():
    text = DOCUMENT.read_text()
    for known, key in ((names(), "exchange"), (softmax_table.softmax_names(), "softmax_exchange")):
        listed = " | ".join(name + " (default)" * (name == "all_gather") for name in known)
        assert listed in text, f"put this beside {key} in docs/exchanges.md: {listed}"


def test_a_softmax_exchange_is_known_by_its_entry(monkeypatch):
    entry = dataclasses.replace(
        SOFTMAX_EXCHANGES["all_gather"], name="fetch", no_window="a test has none", fits=lambda h, kv, n: n < 16,
        heads_rule="takes fewer than 16 ranks, got {cp_size}", hidden=1e9,
    )  # fmt: skip
    monkeypatch.setitem(SOFTMAX_EXCHANGES, "fetch", entry)
    softmax = {"preset": "tiny", "pattern": "SLLL"}
    assert checked(run_values(softmax_exchange="fetch", model=softmax), "here").softmax_exchange == "fetch"
    with pytest.raises(ValueError, match=r"has no use for softmax_exchange='fetch': a test has none. Use"):
        checked(run_values(softmax_exchange="fetch", model=softmax | {"window": 4}), "here")
    with pytest.raises(ValueError, match=r"softmax_exchange='fetch' takes fewer than 16 ranks, got 16. Use"):
        checked(run_values(softmax_exchange="fetch", model=softmax, cp_size=16), "here")
    model, slow = dataclasses.replace(ModelConfig.preset("linear-llama3-1b"), pattern="SL"), Fabric.of("laptop")
    plan = make_plan(PlannedJob(model=model, fabric=slow, device=device_of("h100", slow), seq_len=2**20, gpus=8))
    assert "fetch" in {c.softmax_exchange for c in plan.candidates}  # all of it is hidden
    x = torch.randn(1, 8, 2, 4)
    assert torch.equal(softmax_attention(x, x, x, exchange="fetch"), softmax_attention(x, x, x))
    assert "`fetch`" in softmax_table.document()
