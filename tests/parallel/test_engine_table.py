"""An engine that stands in the table alone is taken by all that depends on engines."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from lasp.cost.fabric import Fabric
from lasp.launch.cli import cli
from lasp.launch.config.schema import load_config
from lasp.launch.plan.activations import Load
from lasp.launch.plan.candidates import price
from lasp.launch.plan.memory import Setup, predict_memory
from lasp.launch.plan.question import PlannedJob, device_of
from lasp.launch.plan.search import make_plan
from lasp.launch.run.backends import make_engine
from lasp.models.config import ModelConfig
from lasp.parallel.engines.build import build_engine
from lasp.parallel.engines.ddp import DataParallelEngine
from lasp.parallel.engines.kinds import EngineKind, Held, Master, Package, Traffic
from lasp.parallel.engines.table import ENGINES, as_markdown
from lasp.parallel.mesh import Mesh
from tests.launch.helpers import tiny_yaml

SCALING = Path(__file__).parent.parent.parent / "docs" / "scaling.md"
MODEL = ModelConfig.preset("linear-llama3-1b")


class MirrorEngine(DataParallelEngine):
    """An engine that no file but this one knows."""


def _in_work(counts, width, wide):
    return (Held("mirror image", counts.block * width, f"N of a block x {width}"),)


MIRROR = EngineKind(
    name="mirror",
    use="tests of the table",
    build=MirrorEngine,
    cut_parameters=True,
    cut_gradients=True,
    cut_states=True,
    master=Master.ALONE,
    in_work=_in_work,
    dtypes=("float32",),
    dtype_reason="mirrors are flat",
    proposed=True,
)


@pytest.fixture
def enter(monkeypatch):
    """Enter the kind of a test, with changes, into the table; gives it."""

    def entered(**changes):
        kind = dataclasses.replace(MIRROR, **changes)
        monkeypatch.setitem(ENGINES, kind.name, kind)
        return kind

    return entered


def _job(**options):
    wires = Fabric.of("a100-ib")
    return PlannedJob(MODEL, seq_len=2**16, gpus=16, fabric=wires, device=device_of(None, wires), **options)


def test_a_run_takes_it_and_builds_it(enter, tmp_path):
    with pytest.raises(ValueError, match=r"engine must be one of ddp, fsdp2, zero0, zero1, zero2, zero3, got 'mirror'"):
        load_config(tiny_yaml(tmp_path), ["engine=mirror"])
    enter()
    config = load_config(tiny_yaml(tmp_path), ["engine=mirror"])
    engine = make_engine(config, Mesh.build())
    assert type(engine) is MirrorEngine and engine.kind == MIRROR
    with pytest.raises(ValueError, match=r"one of ddp, .*, mirror, got 'miror'. Did you mean mirror\?"):
        load_config(tiny_yaml(tmp_path), ["engine=miror"])
    with pytest.raises(ValueError, match=r"one of ddp, .*, mirror, got 'x'. Choose one of them."):
        load_config(tiny_yaml(tmp_path), ["engine=x"])


@pytest.mark.parametrize(
    "changes, dtype, message",
    [
        ({}, "bfloat16", "engine=mirror computes in float32, got dtype=bfloat16: mirrors are flat. Use engine=ddp"),
        ({"min_ranks": 3}, "float32", "engine=mirror needs at least 3 ranks to share states over, got 1"),
        (
            {"package": Package("Glass", "no_such_package", "glass")},
            "float32",
            r"engine=mirror needs Glass: pip install 'lasp[glass]', or use engine=fsdp2",
        ),
    ],
    ids=["dtype", "ranks", "package"],
)
def test_what_it_cannot_do_is_refused(enter, tmp_path, changes, dtype, message):
    kind = enter(**changes)
    if kind.min_ranks == 1:  # known before anything starts
        with pytest.raises(ValueError, match=re.escape(message)):
            load_config(tiny_yaml(tmp_path), ["engine=mirror", f"dtype={dtype}"])
    with pytest.raises(ValueError, match=re.escape(message)):
        build_engine("mirror", torch.nn.Linear(2, 2), Mesh.build(), None, getattr(torch, dtype))


def test_the_memory_model_counts_what_it_holds(enter):
    enter()
    load, ranks, n = Load(4096, 2, cp_size=8), 8, None
    terms = {term.name: term for term in predict_memory(MODEL, Setup("mirror", load, ranks)).held}
    assert "parameters" not in terms  # the master copy is in place of them
    n = terms["master copy"].bytes * ranks / 4
    assert (terms["moments"].bytes, terms["gradients"].bytes) == (2 * n * 4 / ranks, n * 4 / ranks)
    assert terms["mirror image"].formula == "N of a block x 2"
    enter(cut_parameters=False, cut_gradients=False, cut_states=False, master=Master.IF_NARROW)
    whole = {term.name: term.bytes for term in predict_memory(MODEL, Setup("mirror", load, ranks)).held}
    sizes = (whole["parameters"], whole["master copy"], whole["moments"], whole["gradients"])
    assert sizes == (2 * n, 4 * n, 8 * n, 4 * n)


def test_the_planner_prices_it_and_proposes_it(enter):
    enter()
    asked = make_plan(_job(engine="mirror"))
    assert {c.engine for c in asked.candidates} == {"mirror"}
    leanest = min(c.memory.peak for c in asked.candidates)
    assert make_plan(_job(memory=leanest)).best.engine == "mirror"  # holds less than any other
    once, by_block = (
        price(_job(), (1, 1, 16, 1), enter(traffic=traffic).name, MODEL, "ring").exposed_s for traffic in Traffic
    )
    assert by_block < once  # hidden behind the blocks
    enter(min_ranks=32)
    with pytest.raises(ValueError, match=r"engine=mirror needs at least 32 ranks .*, got gpus = 16"):
        make_plan(_job(engine="mirror"))


def test_the_command_names_all_engines(enter):
    shown = CliRunner().invoke(cli, ["plan", "--help"]).output
    assert all(name in shown for name in ENGINES)
    enter()
    asked = ["plan", "--model", "1b-gla", "--seq-len", "4M", "--gpus", "16", "--fabric", "h100-ib", "--engine", "x"]
    error = CliRunner().invoke(cli, asked).exception
    assert f"engine must be auto or one of {', '.join(ENGINES)}, got 'x'" in str(error) and "mirror" in str(error)


def test_the_list_in_the_documents_is_the_tables(enter):
    start, end = "<!-- engines: python -m lasp.parallel.engines.table -->\n", "\n<!-- end of engines -->"
    listed = SCALING.read_text().split(start)[1].split(end)[0]
    assert listed == as_markdown(), "write the output of python -m lasp.parallel.engines.table into docs/scaling.md"
    enter()
    assert "| `mirror` | cut | cut | cut | 16 / N | tests of the table |" in as_markdown()
