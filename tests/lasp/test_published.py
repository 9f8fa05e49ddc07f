"""benchmarks/published.py: its fit, the preset made from it, and that what is stored and documented is what it says."""

import importlib
import json
from pathlib import Path

import pytest

from lasp.cost.fabric import Fabric

ROOT = Path(__file__).parents[2]
MACHINE = ("commit", "python", "numpy")


@pytest.fixture(scope="module")
def bench():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        yield importlib.import_module("published"), importlib.import_module("published_report")


@pytest.fixture(scope="module")
def result(bench):
    return bench[0].reproduce()


@pytest.fixture(scope="module")
def stored():
    return json.loads((ROOT / "benchmarks/results/published.json").read_text())


def leaves(value, path=""):
    if isinstance(value, (dict, list)):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(inner, f"{path}/{key}")
    else:
        yield path, value


def test_stored_numbers_are_those_of_this_model(result, stored):
    mine = {k: v for k, v in leaves(result) if k.strip("/") not in MACHINE}
    theirs = {k: v for k, v in leaves(stored) if k.strip("/") not in MACHINE}
    assert mine.keys() == theirs.keys()
    for path, value in mine.items():
        expected = pytest.approx(theirs[path], rel=1e-3, abs=1e-4) if isinstance(value, float) else theirs[path]
        assert value == expected, path


def test_the_document_shows_the_stored_numbers(bench, stored):
    text = (ROOT / "docs/prediction.md").read_text()
    for name, table in bench[1].tables(stored).items():
        assert f"<!-- table {name} -->\n{table}\n<!-- end -->" in text, name
    for image in ("published_exchange", "published_throughput", "predicted_share"):
        assert f"(images/{image}.png)" in text and (ROOT / f"docs/images/{image}.png").exists()


@pytest.mark.parametrize("name, key", [("h100-ib", "fabric"), ("a100-ib", "a100")])
def test_presets_are_the_fit(bench, result, name, key):
    rounded = bench[0].describe(Fabric.preset(name))
    assert rounded == pytest.approx(result[key], rel=2e-3)


def test_half_of_the_figures_are_held_out(bench, result):
    for table, gpus in bench[0].FITTED.items():
        assert {row["gpus"] for row in result[table] if row["use"] == "fitted"} == set(gpus)
        held_out = [row for row in result[table] if row["use"] == "held out"]
        assert 2 * len(held_out) >= len(result[table])


def test_a_fit_finds_what_made_the_figures(bench):
    published = bench[0]
    seen = lambda p: published.np.log(p[0] + p[1] * published.np.arange(1, 6))  # noqa: E731
    found = published.least_squares(lambda p: seen(p) - seen((3.0, 0.5)), (1.0, 1.0))
    assert found == pytest.approx((3.0, 0.5), rel=1e-6)


def test_a_document_without_a_place_for_a_table_is_refused(bench, stored, tmp_path):
    (tmp_path / "x.md").write_text("nothing\n")
    with pytest.raises(ValueError, match=r"x\.md has no place for a table: add the lines <!-- table fabric -->"):
        bench[1].write_tables(stored, tmp_path / "x.md")
