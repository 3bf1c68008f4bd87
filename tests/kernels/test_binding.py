"""What a launch is told of its maps, and what Triton's own binder makes of it, on maps of any kind.

No kernel runs: Triton binds arguments for a GPU that is not there.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from benchmarks.kernel_builds import Build, Launch, build
from efficient_densenet.kernels.interface import Statistics
from efficient_densenet.kernels.triton import launch
from efficient_densenet.kernels.triton.elementwise import launch_rectify
from efficient_densenet.kernels.triton.launch import Matrix, matrix, shared
from efficient_densenet.kernels.triton.vectors import make_norm

SIZES = (1, 4, 16, 17, 32, 33)


def numbered(*shape: int, last: bool = True, off: int = 0) -> Tensor:
    """A map of distinct values that begins ``off`` values behind a multiple of 16 bytes."""
    strides = torch.empty(shape, device="meta")
    if last:
        strides = strides.to(memory_format=torch.channels_last)
    memory = torch.arange(off + strides.numel(), dtype=torch.float32)
    assert memory.data_ptr() % 16 == 0
    return memory.as_strided(shape, strides.stride(), off)


MAPS = {
    **{f"{c} channels": numbered(3, c, 5, 4) for c in SIZES},
    **{f"{c} planes": numbered(3, c, 5, 4, last=False) for c in SIZES},
    **{f"{c} channels of one position": numbered(3, c, 1, 1) for c in SIZES},
    **{f"one sample of {c}": numbered(1, c, 4, 4) for c in SIZES},
    **{f"off by {4 * n}": numbered(2, 16, 4, 4, off=n) for n in (1, 2, 3)},
    "prefix": numbered(2, 48, 4, 4)[:, :12],
    "of a padded row": numbered(2, 48, 4, 4)[:, 20:32],
    "cropped": numbered(2, 16, 8, 8)[:, :, 2:6, :4],
    "transposed": numbered(2, 16, 4, 8).transpose(2, 3),
    "every other sample": numbered(4, 12, 3, 3)[::2],
    "a value": torch.ones(1).expand(2, 12, 3, 3),
    "a value each sample": torch.arange(2.0).view(2, 1, 1, 1).expand(2, 12, 3, 3),
    "a value each channel": torch.arange(12.0).view(1, 12, 1, 1).expand(2, 12, 3, 3),
}
every_map = pytest.mark.parametrize("x", MAPS.values(), ids=MAPS)


def places(found: Matrix, flat: bool) -> Tensor:
    """Where a kernel reads a matrix, ``(rows, channels)``: ``tile.py`` in plain numbers."""
    m, k = torch.arange(found.rows)[:, None], torch.arange(found.channels)
    if flat:
        rows = m * found.position
    else:
        rows = m // found.positions * found.sample + m % found.positions * found.position
    return found.offset + rows + k * found.channel


@every_map
@pytest.mark.parametrize("some", [slice(0, 4), slice(4, 12), None], ids=["prefix", "part", "all"])
def test_values_lie_where_launch_is_told(x, some):
    if some and some.stop > x.shape[1]:
        pytest.skip("fewer channels")
    found = matrix(x, some)
    at = places(found, shared(found)["FLAT"])
    memory = found.data.as_strided((int(at.max()) + 1,), (1,))
    part = x if some is None else x[:, some]
    assert torch.equal(memory[at], part.movedim(1, -1).reshape(found.rows, -1))


@every_map
def test_rows_begin_and_end_where_multiple_says(x):
    for some in (None, slice(0, 4), slice(4, 9), slice(2, 4)):
        if some and some.stop > x.shape[1]:
            continue
        found = matrix(x, some)
        of = found.multiple.value
        assert of in (1, 2, 4, 8)
        if of > 1:
            assert found.channel == 1
            assert not (places(found, False)[:, 0] % of).any()
            assert found.channels % of == 0


def test_multiple_is_told_where_triton_does_not_see_it():
    """So that the test above can fail."""
    told = {name: matrix(x).multiple.value for name, x in MAPS.items()}
    assert told["4 channels"] == told["prefix"] == told["of a padded row"] == 4
    assert told["16 channels"] == told["17 channels"] == told["4 planes"] == 1


def built(x: Tensor, monkeypatch: pytest.MonkeyPatch) -> Build:
    """``rectify`` from this map into an aligned one."""
    found = []
    monkeypatch.setattr(launch, "run", lambda *args, **rest: found.append(Launch.of(*args, **rest)))
    vectors = torch.ones(2, x.shape[1])
    norm = make_norm(Statistics(*vectors), x.shape[1], None, None, 1e-5)
    launch_rectify(norm, x, torch.empty_like(x, memory_format=torch.channels_last))
    return build(found[0], 90)


@pytest.mark.parametrize("off", [0, pytest.param(2, marks=pytest.mark.slow), 3])
def test_pointer_that_is_not_aligned_is_read_value_by_value(off, monkeypatch):
    """Also where a multiple is told: the pointer's is Triton's to see. Writes are aligned."""
    x = numbered(2, 12, 16, 16, off=off)
    assert x.data_ptr() % 16 == 4 * off
    widths = built(x, monkeypatch).widths
    assert widths[16] > 0
    assert (4 in widths) == (off > 0)
