"""Copies of a block are independent; one block serves several calls and threads."""

import copy
import threading

import pytest
import torch
from torch import nn

from efficient_densenet import EfficientDenseBlock
from support.compare import assert_close, assert_efficient, assert_same_training, block_pair, image
from support.copies import pickled, saved_whole
from support.marks import both_kinds, either_mode


@either_mode
@both_kinds
def test_deepcopy_is_independent(recompute, bn_size):
    efficient, naive = block_pair(bn_size=bn_size, recompute=recompute)
    efficient(image().requires_grad_()).sum().backward()
    efficient.load_state_dict(naive.state_dict())
    duplicate = copy.deepcopy(efficient)
    with torch.no_grad():
        for parameter in efficient.parameters():
            parameter.zero_()
    assert duplicate.recompute == recompute
    assert_efficient(duplicate, image())
    assert_same_training(duplicate, naive, image())


@either_mode
@pytest.mark.parametrize("through", [pickled, saved_whole])
def test_saved_block_comes_back(recompute, through):
    efficient, naive = block_pair(recompute=recompute)
    loaded = through(efficient)
    assert type(loaded) is EfficientDenseBlock
    assert loaded.recompute == recompute
    assert_efficient(loaded, image())
    assert_same_training(loaded, naive, image())


class TwoBlocks(nn.Module):
    """Calls the given blocks one after the other on the first five channels."""

    def __init__(self, first, second):
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x):
        return self.second(self.first(x)[:, 2:7])


@either_mode
@both_kinds
def test_block_called_twice_in_one_graph_matches_naive(recompute, bn_size):
    efficient, naive = block_pair(bn_size=bn_size, recompute=recompute)
    twice = TwoBlocks(efficient, efficient), TwoBlocks(naive, naive)
    assert_same_training(*twice, image(), steps=2)


@pytest.mark.parametrize("kinds", [("norm", "norm"), ("bottleneck", "norm")], ids="-".join)
def test_concurrent_threads_get_their_own_results(kinds):
    sizes = [(5, 3), (7, 4)]
    pairs = [block_pair(6, c, 2, k, recompute=r) for (c, k), r in zip(sizes, kinds, strict=True)]
    images = [torch.randn(8, c, 16, 15, dtype=torch.float64) for c, _ in sizes]
    failures = []

    def train(pair, x):
        try:
            for _ in range(4):
                assert_same_training(*pair, x, steps=2, rtol=1e-9)
        except Exception as error:  # a thread's failure does not reach pytest by itself
            failures.append(error)

    threads = [threading.Thread(target=train, args=job) for job in zip(pairs, images, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


@either_mode
def test_one_block_may_serve_several_threads(recompute):
    efficient, naive = block_pair(6, recompute=recompute, change=nn.Module.eval)
    images = [torch.randn(4, 5, 16, 15, dtype=torch.float64) for _ in range(4)]
    expected = [naive(x) for x in images]
    outs = {}

    def serve(i):
        outs[i] = efficient(images[i])

    threads = [threading.Thread(target=serve, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(4):
        assert_close(f"output {i}", outs[i], expected[i], 1e-10)
