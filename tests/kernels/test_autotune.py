"""The table of tiles: how it is read, and how measured entries get into it."""

import importlib.util
import json

import pytest
import torch
import torch.distributed as dist

from lasp.kernels.triton_linear import tiles as triton_tiles
from lasp.kernels.triton_linear.tiles import DECAYS, DIMS, KERNELS, Entry, Tile, TileTable, entry, fit, plan, tile_table

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
ASKED = Entry(90, 64, "token", False, False)


def tune_with_fake_times(_group, path, asked, fastest):
    """Tiles of a run in which ``fastest`` wins and blocks of 128 do not compile, and how many were tried."""
    import os
    from unittest import mock

    from triton.errors import TritonError

    from lasp.kernels.triton_linear import tuning
    from lasp.kernels.triton_linear.operator import Backward, Forward

    tried = []

    def measure(run):
        tile = order[len(tried)]
        tried.append(tile)
        if tile == fastest:
            run()
        if tile.block == 32 and tile.stages == 3:
            raise TritonError("too much shared memory")
        return 1.0 if tile == fastest else 2.0

    order = list(tuning.candidates(asked)) * len(tuning.PASSES)
    with mock.patch.dict(os.environ, LASP_TILES=path, LASP_AUTOTUNE="1"):
        cpu = torch.device("cpu")
        tiles = tuning.tune(asked, cpu, (Forward, Backward), measure, heads=1, length=16, dtype=torch.float32)
        tile_table().store(asked, tiles)
        return tiles, len(tried), tile_table().tiles(asked)


@needs_triton
@pytest.mark.parametrize("decay", DECAYS)
def test_the_fastest_tile_of_each_kernel_is_stored(ranks, tmp_path, decay):
    path, fastest = tmp_path / "tiles.json", Tile(32, 8, 2)
    asked = Entry(90, 64, decay, False, False)
    found, tried, used = ranks.run(tune_with_fake_times, str(path), asked, fastest, size=1)[0]
    assert tried == 4 * 8  # four launches; blocks of 32 and 64, two numbers of warps, two of stages
    assert found == used == dict.fromkeys(KERNELS, fastest)
    assert json.loads(path.read_text()) == {str(asked): {name: [32, 8, 2] for name in KERNELS}}


def test_a_measured_entry_stands_before_the_shipped_one_and_beside_others(tmp_path, monkeypatch):
    path, other = tmp_path / "tiles.json", Entry(90, 128, "none", True, True)
    mine = dict.fromkeys(KERNELS, Tile(32, 4, 5))
    table = TileTable(path)
    table.store(ASKED, mine)
    TileTable(path).store(other, mine)
    assert set(json.loads(path.read_text())) == {str(ASKED), str(other)}
    assert TileTable(path).measured == {str(ASKED), str(other)} and not TileTable(triton_tiles.SHIPPED).measured
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


NAME = str(ASKED)


def tiles(**changes):
    return json.dumps({NAME: {name: [32, 4, 2] for name in KERNELS} | changes})


@pytest.mark.parametrize(
    "text",
    [
        "[1]",
        "{",
        json.dumps({NAME: {"o": [16, 4, 2]}}),
        json.dumps({NAME: 3}),
        tiles().replace("sm_90", "sm90"),
        tiles(o=[48, 4, 2]),
        tiles(o=[512, 4, 2]),
        tiles(o=[32, 3, 2]),
        tiles(o=[32, 4, 9]),
        tiles(o=[32, True, 2]),
        tiles(o=[32, 8.0, 2]),
        tiles(dk=[32, 8, 2]),  # dv and dk are one launch
    ],
)
def test_a_table_that_does_not_fit_is_named(tmp_path, text):
    path = tmp_path / "tiles.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"the tile table {path} must map names such as"):
        TileTable(path)


def test_a_table_that_cannot_be_read_or_written_is_named_before_anything_is_measured(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="the tile table"):
        TileTable(tmp_path)
    with pytest.raises(ValueError, match="cannot write the tile table"):
        TileTable(tmp_path / "no folder" / "tiles.json").check_writable()
    monkeypatch.setenv("LASP_TILES", str(tmp_path / "tiles.json"))
    with pytest.raises(ValueError, match="which does not exist"):
        tile_table()
    monkeypatch.setenv("LASP_AUTOTUNE", "1")
    tile_table().check_writable()


def store_many(group, path):
    for i in range(dist.get_rank(group), 36, 2):
        dim, decay, many = DIMS[i % 3], DECAYS[i % 4], i % 2 == 0
        TileTable(path).store(Entry(i, dim, decay, many, False), dict.fromkeys(KERNELS, Tile(32, 4, 2)))


def test_processes_that_measure_side_by_side_keep_each_others_entries(ranks, tmp_path):
    path = tmp_path / "tiles.json"
    ranks.run(store_many, path, size=2)
    assert len(json.loads(path.read_text())) == 36


@pytest.mark.parametrize(("arch", "kind"), [(0, 80), (80, 80), (89, 80), (90, 90), (100, 100), (103, 100), (120, 80)])
def test_a_card_takes_the_shipped_tiles_of_its_kind_or_its_own_measured_ones(tmp_path, arch, kind):
    table, own = TileTable(tmp_path / "tiles.json"), dict.fromkeys(KERNELS, Tile(16, 1, 1))
    asked = entry(arch, torch.bfloat16, 128, 128, 0, 1 << 20)
    assert table.tiles(asked) == table.tiles(Entry(kind, 128, "none", True, False))
    table.store(asked, own)
    assert table.tiles(asked) == own
    others = [Entry(a, 128, "none", True, False) for a in (80, 86, 90, 100, 121) if a != arch]
    assert arch in (80, 90, 100) or all(table.tiles(other) != own for other in others)


def test_a_switch_that_means_nothing_is_refused(monkeypatch):
    monkeypatch.setenv("LASP_AUTOTUNE", "yes")
    with pytest.raises(ValueError, match="LASP_AUTOTUNE must be 0 or 1, got 'yes'"):
        triton_tiles.autotuned()
    monkeypatch.setenv("LASP_AUTOTUNE", "1")
    assert triton_tiles.autotuned()
