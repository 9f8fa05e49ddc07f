"""Fabrics: presets, files and back, and everything that is refused, in words."""

import dataclasses
import json

import pytest

from lasp.cost.fabric import PRESETS, Fabric, Link


def values():
    return {
        "name": "rack",
        "within": {"latency_s": 1e-6, "bytes_per_s": 1e9},
        "between": {"latency_s": 2e-6, "bytes_per_s": 2e9},
        "nics_per_node": 2,
        "overhead_s": 0.0,
        "source": "measured",
    }


@pytest.fixture
def written(tmp_path):
    def write(change=lambda values: None):
        told = values()
        change(told)
        path = tmp_path / "rack.json"
        path.write_text(json.dumps(told))
        return path

    return write


def test_a_message_takes_latency_and_bytes():
    assert Link(1e-6, 1e9).seconds(5000) == pytest.approx(6e-6)


@pytest.mark.parametrize("name", ["h100-ib", "a100-ib", "ethernet-25g", "laptop"])
def test_presets_say_where_they_come_from(name):
    fabric = Fabric.of(name)
    assert fabric is PRESETS[name] is Fabric.preset(name) and fabric.name == name
    assert any(word in fabric.source for word in ("fitted", "not measured"))


def test_a_saved_fabric_is_the_same(tmp_path):
    path = tmp_path / "mine.json"
    fabric = dataclasses.replace(Fabric.preset("laptop"), name="mine", message_s=2e-5, byte_s=1e-9)
    fabric.save(path)
    assert Fabric.load(path) == Fabric.of(path) == Fabric.of(str(path)) == Fabric.of(fabric) == fabric


def test_a_file_needs_no_more_than_the_measurements(written):
    fabric = Fabric.of(written())
    assert (fabric.between.bytes_per_s, fabric.message_s, fabric.byte_s) == (2e9, 0.0, 0.0)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda v: v.pop("overhead_s"), r"lacks the measurement overhead_s\. Measure again with `lasp bench fabric`"),
        (lambda v: v["between"].pop("latency_s"), r"lacks the measurement between\.latency_s"),
        (lambda v: v.update(speed=1), r"has unknown keys: speed\. Known are name, within"),
        (lambda v: v["within"].update(rate=1), r"has unknown keys: within\.rate\. Known are within\.latency_s"),
        (lambda v: v.update(within=3), r"within must be an object of measurements, got 3"),
        (
            lambda v: v["within"].update(latency_s=0),
            r"rack\.json: link latency_s must be a finite number above 0, got 0",
        ),
        (
            lambda v: v["between"].update(bytes_per_s=-1.0),
            r"link bytes_per_s must be a finite number above 0, got -1\.0",
        ),
        (lambda v: v["between"].update(bytes_per_s="fast"), r"bytes_per_s must be a finite number above 0, got 'fast'"),
        (lambda v: v["between"].update(bytes_per_s=float("nan")), r"must be a finite number above 0, got nan"),
        (lambda v: v["between"].update(bytes_per_s=10**400), r"must be a finite number above 0, got 1000"),
        (lambda v: v.update(overhead_s=-1e-6), r"overhead_s must be a finite number >= 0, got -1e-06"),
        (lambda v: v.update(message_s=True), r"message_s must be a finite number >= 0, got True"),
        (lambda v: v.update(nics_per_node=0), r"nics_per_node must be an integer >= 1, got 0"),
        (lambda v: v.update(nics_per_node=1.5), r"nics_per_node must be an integer >= 1, got 1\.5"),
        (lambda v: v.update(name=""), r"fabric name must be a text that is not empty, got ''"),
    ],
)
def test_files_that_are_refused(written, change, message):
    with pytest.raises(ValueError, match=message):
        Fabric.load(written(change))


def test_what_is_no_fabric_is_refused(tmp_path):
    with pytest.raises(
        ValueError,
        match=r"unknown fabric 'h100': the presets are h100-ib, a100-ib, ethernet-25g, laptop\. Did you mean "
        r"'h100-ib'\? Or measure yours: `lasp bench fabric` writes",
    ):
        Fabric.of("h100")
    with pytest.raises(ValueError, match=r"absent\.json does not exist\. `lasp bench fabric` measures one"):
        Fabric.of(str(tmp_path / "absent.json"))
    with pytest.raises(ValueError, match=r"cannot be read \(Is a directory\)"):
        Fabric.load(tmp_path)
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    with pytest.raises(ValueError, match=r"broken\.json is no JSON: .*`lasp bench fabric` writes a new one"):
        Fabric.of(broken)
    broken.write_text("[" * 10**5)
    with pytest.raises(ValueError, match=r"broken\.json is no JSON: maximum recursion depth exceeded"):
        Fabric.of(broken)
    broken.write_text("[]")
    with pytest.raises(ValueError, match=r"the file must be an object of measurements, got \[\]"):
        Fabric.of(broken)
    with pytest.raises(ValueError, match=r"must be a preset's name, the path of a file or a Fabric, got None"):
        Fabric.of(None)
    with pytest.raises(ValueError, match=r"fabric x: within must be a Link, got 1"):
        Fabric("x", 1, Link(1, 1), 1, 0.0, "y")
