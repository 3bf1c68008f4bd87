"""Programs of a launch: in any order, on whatever memory held before, each in its own places."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from efficient_densenet import DenseNet
from efficient_densenet.kernels.triton import launch
from efficient_densenet.kernels.workspace import Workspace
from support.compare import gradients

KERNELS = {
    *("append", "fold_moments", "product", "weight_gradient", "input_gradient", "collect"),
    *("rectify", "rectify_backward", "pool", "pool_backward", "correct", "drop"),
}


@pytest.fixture(autouse=True)
def of_several_tiles(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if device == "cuda":
        pytest.skip("a GPU does not tell which program runs when, and writes where")
    monkeypatch.setattr(launch, "TILE_VALUES", 512)


@triton.jit
def overlapping(x):
    """Every program writes its number into one place."""
    tl.store(x, tl.program_id(0).to(tl.float32))


def step() -> list[Tensor]:
    """Results of a network's step, in which every kernel is launched."""
    torch.manual_seed(0)
    sizes = {"growth_rate": 4, "block_config": (1, 1), "num_init_features": 8, "bn_size": 4}
    network = DenseNet(**sizes, num_classes=3, stem="cifar", drop_rate=0.2)
    x = torch.randn(2, 3, 12, 12, requires_grad=True)
    out = network(x)
    out.square().sum().backward()
    return [out, *gradients(network, x).values()]


@pytest.fixture
def expected() -> list[Tensor]:
    return known()


@cache
def known() -> list[Tensor]:
    return step()


@contextmanager
def ordered(order: Callable[[int], list[int]]) -> Iterator[None]:
    """Programs of each launch run in this order, given how many they are."""
    builder = triton.runtime.interpreter.InterpreterBuilder
    set_place = builder.set_grid_idx

    def set_other(self: object, *place: int) -> None:
        number = np.ravel_multi_index(place, self.grid_dim)
        other = np.unravel_index(order(int(np.prod(self.grid_dim)))[number], self.grid_dim)
        set_place(self, *map(int, other))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "set_grid_idx", set_other)
        yield


def backwards(count: int) -> list[int]:
    return list(range(count))[::-1]


@cache
def shuffled(count: int) -> list[int]:
    return random.Random(count).sample(range(count), count)


ORDERS = {"backwards": backwards, "shuffled": shuffled}
every_order = pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)


@every_order
def test_order_of_programs_changes_no_bit(order, expected):
    with ordered(order):
        found = step()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@every_order
def test_order_is_seen_where_programs_overlap(order):
    last = torch.zeros(1)
    with ordered(order):
        launch.run(overlapping, (5,), last)
    assert last.item() == order(5)[-1] != 4


def test_what_scratch_held_changes_no_bit(expected, monkeypatch):
    """Sums of tiles and slabs lie where NaN was."""
    vectors, scratch, poisoned = Workspace.vectors, Workspace.scratch, []

    def poison(memory: Tensor) -> Tensor:
        poisoned.append(memory.dim())
        return memory.fill_(torch.nan)

    monkeypatch.setattr(Workspace, "vectors", lambda *args: poison(vectors(*args)))
    monkeypatch.setattr(Workspace, "scratch", lambda *args: poison(scratch(*args)))
    found = step()
    assert set(poisoned) == {1, 4}
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@contextmanager
def noted_places() -> Iterator[list[tuple[str, list[np.ndarray]]]]:
    """For each launch its kernel, and the addresses that each of its programs writes."""
    builder = triton.runtime.interpreter.InterpreterBuilder
    store, run, launches = builder.create_masked_store, launch.run, []

    def noting(self: object, place: object, value: object, mask: object, *rest: object) -> object:
        programs = launches[-1][1]
        programs.setdefault(self.grid_idx, []).append(place.data[mask.data])
        return store(self, place, value, mask, *rest)

    def running(kernel: object, *args: object, **constants: object) -> None:
        launches.append((kernel.__name__, {}))
        run(kernel, *args, **constants)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "create_masked_store", noting)
        patch.setattr(launch, "run", running)
        yield launches


def overlap(programs: dict[tuple[int, ...], list[np.ndarray]]) -> int:
    """How many places more than one program writes."""
    places = [np.unique(np.concatenate([a.ravel() for a in own])) for own in programs.values()]
    return sum(map(len, places)) - len(np.unique(np.concatenate(places)))


def test_no_two_programs_write_one_place():
    with noted_places() as launches:
        step()
    assert {name for name, programs in launches if len(programs) > 1} >= KERNELS
    assert {name: overlap(programs) for name, programs in launches if overlap(programs)} == {}


def test_two_programs_that_write_one_place_are_found():
    with noted_places() as launches:
        launch.run(overlapping, (3,), torch.zeros(1))
    assert overlap(launches[0][1]) == 2
