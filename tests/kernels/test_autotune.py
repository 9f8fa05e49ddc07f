"""The table of tiles: how it is read, and how measured entries get into it."""

import importlib.util
import json

import pytest
import torch

from lasp.kernels import triton_tiles
from lasp.kernels.triton_tiles import DECAYS, DIMS, KERNELS, Entry, Tile, TileTable, entry, fit, plan, tile_table

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
ASKED = Entry(90, 64, "token", False, False)


def tune_with_fake_times(_group, path, asked, fastest):
    """Tiles of a run in which ``fastest`` wins and blocks of 128 do not compile, and how many were tried."""
    import os
    from unittest import mock

    from triton.errors import TritonError

    from lasp.kernels import autotune

    tried = []

    def measure(run):
        tile = order[len(tried)]
        tried.append(tile)
        if tile == fastest:
            run()
        if tile.block == 32 and tile.stages == 3:
            raise TritonError("too much shared memory")
        return 1.0 if tile == fastest else 2.0

    order = list(autotune.candidates(asked)) * len(autotune.PASSES)
    with mock.patch.dict(os.environ, LASP_TILES=path):
        cpu = torch.device("cpu")
        tiles = autotune.tune(asked, cpu, measure, heads=1, length=40, dtype=torch.float32)
        tile_table().store(asked, tiles)
        return tiles, len(tried), tile_table().tiles(asked)


@needs_triton
@pytest.mark.parametrize("decay", DECAYS)
def test_the_fastest_tile_of_each_kernel_is_stored(interpreters, tmp_path, decay):
    path, fastest = tmp_path / "tiles.json", Tile(32, 8, 2)
    asked = Entry(90, 64, decay, False, False)
    found, tried, used = interpreters.run(tune_with_fake_times, str(path), asked, fastest, size=1)[0]
    assert tried == 4 * 8  # four launches; blocks of 32 and 64, two numbers of warps, two of stages
    assert found == used == dict.fromkeys(KERNELS, fastest)
    assert json.loads(path.read_text()) == {str(asked): {name: [32, 8, 2] for name in KERNELS}}


def test_a_measured_entry_stands_before_the_shipped_one_and_beside_others(tmp_path, monkeypatch):
    path, other = tmp_path / "tiles.json", Entry(90, 128, "none", True, True)
    mine = dict.fromkeys(KERNELS, Tile(32, 4, 5))
    table = TileTable(path)
    table.store(ASKED, mine)
    TileTable(path).store(other, mine)
    assert set(json.loads(path.read_text())) == {str(ASKED), str(other)} and [*tmp_path.iterdir()] == [path]
    monkeypatch.setenv("LASP_TILES", str(path))
    assert plan(90, torch.bfloat16, 64, 64, 2, 1000).tiles == mine
    assert plan(90, torch.bfloat16, 64, 64, 1, 1000).tiles == TileTable(triton_tiles.SHIPPED).tiles(
        Entry(90, 64, "fixed", False, False)
    )
    assert plan(90, torch.float32, 128, 128, 0, 1 << 20).tiles == mine
    assert plan(90, torch.float32, 128, 128, 0, 1000).tiles["o"] == Tile(16, 8, 1)


def test_every_call_has_a_shipped_entry():
    table = TileTable(triton_tiles.SHIPPED)
    for arch in (0, 75, 80, 86, 89, 90, 100, 120):
        for dim in (1, 64, 65, *DIMS):
            for decay in range(4):
                for tokens in (1, 1 << 20):
                    for dtype in (torch.bfloat16, torch.float32):
                        assert set(table.tiles(entry(arch, dtype, dim, 1, decay, tokens))) == set(KERNELS)


def test_no_block_is_wider_than_its_result():
    tiles = fit(dict.fromkeys(KERNELS, Tile(128, 8, 2)), 20, 70)
    assert {name: tile.block for name, tile in tiles.items()} == {
        "states": 128,
        "o": 128,
        "dv": 128,
        "dq": 32,
        "dk": 32,
    }


ODD_BLOCK = {name: [48, 4, 2] for name in KERNELS}
TWO_WIDTHS = {name: [32, 4, 2] for name in KERNELS} | {"dk": [32, 8, 2]}  # of one launch


@pytest.mark.parametrize(
    "text",
    ["[1]", "{", '{"x": {"o": [16, 4, 2]}}', '{"x": 3}', *(json.dumps({"x": e}) for e in (ODD_BLOCK, TWO_WIDTHS))],
)
def test_a_table_that_does_not_fit_is_named(tmp_path, text):
    path = tmp_path / "tiles.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"the tile table {path} must map each entry"):
        TileTable(path)


def test_a_switch_that_means_nothing_is_refused(monkeypatch):
    monkeypatch.setenv("LASP_AUTOTUNE", "yes")
    with pytest.raises(ValueError, match="LASP_AUTOTUNE must be 0 or 1, got 'yes'"):
        triton_tiles.autotuned()
    monkeypatch.setenv("LASP_AUTOTUNE", "1")
    assert triton_tiles.autotuned()
