"""Which tile a product runs with, on a GPU that is not there: its times are made up."""

import json

import pytest
import torch

pytest.importorskip("triton")
from efficient_densenet.kernels.triton import tiles as tiling
from efficient_densenet.kernels.triton.launch import Matrix
from efficient_densenet.kernels.triton.tiles import Tile, fastest, preferred

FIRST, SECOND, THIRD = (Tile(size, 64, 32, 8, 3) for size in (64, 128, 256))
TILES = (FIRST, SECOND, THIRD)


class Map:
    """What is asked of a map that is on a GPU."""

    is_cuda, device, dtype = True, torch.device("cuda:0"), torch.bfloat16

    def get_device(self):
        return -1  # there is none to switch to


@pytest.fixture(autouse=True)
def gpu(monkeypatch, tmp_path):
    """Its launches take as long as their tile is high; ``measured`` are the tiles that were timed.

    Tiles are kept in a folder of the test's own.
    """
    measured = []

    def milliseconds(launch):
        measured.append(launch())
        return 300.0 - measured[-1].m

    monkeypatch.setattr(tiling, "milliseconds", milliseconds)
    monkeypatch.setattr(tiling, "store", lambda: tmp_path / "folder" / "tiles.json")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    torch.use_deterministic_algorithms(False)
    forget()
    yield measured
    forget()


def forget():
    """As in a new process."""
    tiling._found.clear()
    tiling.kept.cache_clear()


def choose(samples=4, channels=32):
    x = Matrix(Map(), 0, channels * 49, 1, channels, samples, channels, 49, 1)
    return fastest(TILES, x, ("product",), lambda tile: tile)


def test_each_size_is_measured_once(gpu):
    assert [choose(), choose()] == [THIRD, THIRD]
    assert len(gpu) == 3
    choose(samples=5)
    choose(channels=33)
    assert len(gpu) == 9


def test_another_tile_must_gain_enough():
    assert preferred(TILES, [1.0, 0.96, 0.99]) == FIRST
    assert preferred(TILES, [1.0, 0.96, 0.94]) == THIRD
    assert preferred(TILES, [float("inf"), 2.0, 3.0]) == SECOND


def test_tiles_are_kept_between_runs(gpu, tmp_path):
    choose()
    forget()
    assert choose() == THIRD
    assert len(gpu) == 3
    assert json.loads((tmp_path / "folder" / "tiles.json").read_text()).popitem()[1] == [*THIRD]


@pytest.mark.parametrize("content", ["", "[]", '{"x": 3}', '{"x": [1]}', "null"])
def test_damaged_file_is_as_none(gpu, tmp_path, content):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "tiles.json").write_text(content)
    assert choose() == THIRD


def test_kept_tile_that_is_no_longer_there_is_measured_again(gpu, tmp_path):
    choose()
    file = tmp_path / "folder" / "tiles.json"
    file.write_text(file.read_text().replace("256", "512"))
    forget()
    assert choose() == THIRD
    assert len(gpu) == 6


def test_folder_that_cannot_be_written_is_no_error(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setattr(tiling, "store", lambda: tmp_path / "file" / "tiles.json")
    assert choose() == THIRD


def test_nothing_is_measured_while_a_graph_is_captured(gpu, monkeypatch):
    choose()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert choose() == THIRD  # known before
    assert choose(samples=5) == FIRST
    assert len(gpu) == 3


def test_deterministic_mode_takes_first_tile(gpu):
    """Also if another one was found to be faster before."""
    choose()
    torch.use_deterministic_algorithms(True)
    assert choose() == FIRST
    assert len(gpu) == 3
