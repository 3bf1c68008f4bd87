"""The convolutions of a model and nothing else: a floor under the time of any way to train it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class ConvolutionsAlone:
    """Every convolution of ``model`` on ``x``, forward and backward, each on random values.

    With the channels last, in the layout that is fastest on a CPU and on a GPU.
    """

    def __init__(self, model: nn.Module, x: Tensor) -> None:
        self._calls: list[tuple[_ConvNd, Tensor, Tensor]] = []
        hooks = [
            module.register_forward_hook(self._record)
            for module in model.modules()
            if isinstance(module, CONVOLUTIONS)
        ]
        with torch.no_grad():
            model(x)
        for hook in hooks:
            hook.remove()

    def _record(self, module: _ConvNd, args: tuple[Tensor], output: Tensor) -> None:
        read, written = (
            torch.randn_like(t).to(memory_format=torch.channels_last) for t in (args[0], output)
        )
        self._calls.append((module, read, written))

    def step(self) -> None:
        """Forward in order, backward in reverse order."""
        for module, read, _ in self._calls:
            _convolve(module, read)
        for i, (module, read, grad) in enumerate(reversed(self._calls)):
            first = i == len(self._calls) - 1 and read.shape[1] <= 3  # an image wants no gradient
            _convolve_backward(module, read, grad, not first)

    def clear(self) -> None:
        """Nothing is left over from a step."""


def _convolve(conv: _ConvNd, x: Tensor) -> None:
    torch.convolution(
        x,
        conv.weight.detach(),
        conv.bias if conv.bias is None else conv.bias.detach(),
        conv.stride,
        conv.padding,
        conv.dilation,
        False,
        [0] * len(conv.stride),
        conv.groups,
    )


def _convolve_backward(conv: _ConvNd, x: Tensor, grad: Tensor, needs_x: bool) -> None:
    torch.ops.aten.convolution_backward(
        grad,
        x,
        conv.weight.detach(),
        [conv.out_channels],
        conv.stride,
        conv.padding,
        conv.dilation,
        False,
        [0] * len(conv.stride),
        conv.groups,
        [needs_x, True, conv.bias is not None],
    )
