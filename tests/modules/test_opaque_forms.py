"""However a layer takes the maps before it and returns its own, it trains as in its own block."""

import pytest
import torch
from torch import nn

from efficient_densenet.modules.calls import BlockCall
from efficient_densenet.modules.opaque import Form, read_opaque
from support.compare import assert_same_training

C0, K, DEPTH = 3, 2, 4


class Layer(nn.Module):
    def __init__(self, channels, form):
        super().__init__()
        self.form = form
        self.norm, self.conv = nn.GroupNorm(1, channels), nn.Conv2d(channels, K, 3, padding=1)

    def forward(self, *args):
        maps = args[0] if self.form.takes == "list" else args
        x = torch.cat(list(maps), 1)
        new = self.conv(torch.tanh(self.norm(x)))
        if self.form.returns == "new":
            return new
        return torch.cat([new, x] if self.form.new_first else [x, new], 1)


class Block(nn.Module):
    """Naive: hands its maps to each layer in the layer's form."""

    def __init__(self, forms):
        super().__init__()
        self.layers = nn.ModuleList(Layer(C0 + i * K, form) for i, form in enumerate(forms))

    def forward(self, x):
        features = x
        for i, layer in enumerate(self.layers):
            form = layer.form
            maps = list(features.split(form.channels or (C0 + i * K,), 1))
            out = layer(maps) if form.takes == "list" else layer(*maps)
            if form.returns == "all":
                features = out
            else:
                features = torch.cat([out, features] if form.new_first else [features, out], 1)
        return features


class Recomputed(Block):
    def forward(self, x):
        layers = [
            read_opaque(layer, f"layer {i}", C0 + i * K, K, layer.form)
            for i, layer in enumerate(self.layers)
        ]
        new_first = self.layers[0].form.new_first
        return BlockCall.of(x, layers, None, "bottleneck", "auto", new_first).run()


def forms(takes, returns, newest_first, joined):
    found = []
    for i in range(DEPTH):
        older = (C0, *[K] * i)
        channels = older[::-1] if newest_first else older
        if joined and i:  # the last map, and all before it as one
            channels = (K, sum(older) - K) if newest_first else (sum(older) - K, K)
        if takes == "tensor":
            channels = (sum(older),)
        found.append(Form(takes, channels, returns, newest_first))
    return found


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("joined", [False, True], ids=["apart", "joined"])
@pytest.mark.parametrize("newest_first", [False, True], ids=["oldest-first", "newest-first"])
@pytest.mark.parametrize("returns", ["new", "all"])
@pytest.mark.parametrize("takes", ["tensor", "list", "arguments"])
def test_layer_of_form_trains_as_in_naive_block(takes, returns, newest_first, joined, layout):
    shapes = forms(takes, returns, newest_first, joined)
    recomputed, naive = Recomputed(shapes).double(), Block(shapes).double()
    recomputed.load_state_dict(naive.state_dict())
    x = torch.randn(2, C0, 5, 4, dtype=torch.float64).contiguous(memory_format=layout)
    assert_same_training(recomputed, naive, x, steps=2)
