"""The dense block that keeps only its features: a drop-in for torchvision's ``_DenseBlock``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import ClassVar, NoReturn

from torch import Tensor, nn

from efficient_densenet.functional.modes import Recompute
from efficient_densenet.kernels.implementations import Kernels
from efficient_densenet.modules.calls import BlockCall
from efficient_densenet.modules.naive import BasicLayer, BottleneckLayer, DenseBlock
from efficient_densenet.modules.opaque import COPIED, Form, read_opaque
from efficient_densenet.modules.parts import BASIC, BOTTLENECK, Structure, read_layer
from efficient_densenet.modules.reading import (
    Layer,
    Misfit,
    Unsupported,
    check_plain,
    is_patched,
)
from efficient_densenet.modules.recomputing import Recomputing, check_is_map

Forward = Callable[..., Tensor]


class RecomputingBlock(Recomputing):
    """Base of dense blocks that recompute, in front of the class whose forward is naive.

    The layers are read once a call.
    """

    def __prepare_scriptable__(self) -> NoReturn:
        """Called by ``torch.jit.script`` on every module of a model."""
        raise RuntimeError(
            "TorchScript cannot script what recomputes: trace or export the model, or put a "
            "naive.DenseBlock with the same state dict in the place of each dense block"
        )

    def extra_repr(self) -> str:
        return ", ".join(filter(None, [super().extra_repr(), f"recompute={self.recompute!r}"]))


class EfficientDenseBlock(RecomputingBlock, DenseBlock):
    """Dense block that keeps only its features for the backward pass, and computes the rest again.

    Maps ``(N, num_input_features, *spatial)`` to
    ``(N, num_input_features + num_layers * growth_rate, *spatial)``, in the input's memory format.
    Equals, with its gradients, ::

        for layer in block.values():  # BN - ReLU - Conv1x1 - BN - ReLU - Conv3x3 - Dropout
            x = torch.cat([x, layer(x)], 1)
        return x

    For a layer that reads ``c`` channels, and has ``b = bn_size * k`` channels between its
    convolutions, it keeps ``k`` channels where the naive block keeps ``2c + 2b``. Parameters,
    state-dict keys, outputs, gradients and running statistics are those of torchvision's
    ``_DenseBlock``; only dropout draws other masks (from a seed of torch's default generator).

    Args:
        num_layers: layers ``L`` of the block.
        num_input_features: channels ``c0`` that enter.
        bn_size: bottleneck width in units of ``growth_rate``; ``None`` makes basic layers
            (BN - ReLU - Conv3x3).
        growth_rate: channels ``k`` that each layer adds.
        drop_rate: dropout probability after each layer.
        recompute: ``"bottleneck"`` keeps only the features; normalised maps and 1x1 convolutions
            are computed again in the backward pass. ``"norm"`` (Pleiss et al., 2017) keeps the
            bottleneck maps too, and runs no convolution twice. ``"none"`` is the naive block. May
            be changed at any time.
        dims: spatial dimensions, 1, 2 or 3.
        bias: whether convolutions have a bias.
        kernels: the first implementation to try. ``"triton"``: kernels for NVIDIA GPUs, for ReLU
            only. ``"whole"``: PyTorch's operators on whole maps, for maps of up to 2 MiB on a CPU.
            ``"eager"``: PyTorch's operators on some samples at a time, for everything. One that
            cannot run the input leaves it to the next in this order; :meth:`why_kernels` says which
            one runs, and why. ``"auto"`` is the value of the environment variable
            ``EFFICIENT_DENSENET_KERNELS``, or the fastest one that can run the input.

    Raises:
        ValueError: if an argument is out of range; the message quotes it.

    A call that the efficient path does not support runs on the naive one, with a warning;
    :meth:`why_naive` says why. Source: Huang et al., "Densely Connected Convolutional Networks",
    CVPR 2017.
    """

    structures: ClassVar[Mapping[Forward, Structure]] = {
        BottleneckLayer.forward: BOTTLENECK,
        BasicLayer.forward: BASIC,
    }
    """What a layer is made of, by its forward function: a subclass may not have its own."""

    def __init__(
        self,
        num_layers: int,
        num_input_features: int,
        bn_size: int | None,
        growth_rate: int,
        drop_rate: float = 0.0,
        *,
        recompute: Recompute = "bottleneck",
        dims: int = 2,
        bias: bool = False,
        kernels: Kernels = "auto",
    ) -> None:
        super().__init__(
            num_layers,
            num_input_features,
            bn_size,
            growth_rate,
            drop_rate,
            dims=dims,
            bias=bias,
        )
        self.recompute = recompute
        self.kernels = kernels

    def _recomputing_read(self, x: Tensor) -> BlockCall:
        check_is_map(x)
        layers = self.read_layers(x.shape[1])
        return BlockCall.of(x, layers, None, self.recompute, self.kernels)

    def read_layers(self, channels: int) -> list[Layer]:
        """Every layer; ``channels`` enter the block."""
        layers: list[Layer] = []
        for path, module in self.items():
            try:
                layer = self.read_known(path, module, channels)
            except Misfit:
                raise
            except Unsupported:
                growths = [layer.spec.growth for layer in layers]
                form = Form("list", (channels - sum(growths), *growths))
                if type(module).forward in self.structures and not is_patched(module):
                    form = COPIED  # it copies what it takes, and one tensor is copied faster
                layer = read_opaque(module, path, channels, self.growth_rate, form)
            channels = layer.spec.channels + layer.spec.growth
            layers.append(layer)
        return layers

    def read_known(self, path: str, module: nn.Module, channels: int) -> Layer:
        """A layer by its parts, of which some may be anything."""
        structure = self._structure(path, module)
        check_plain(module, path)
        children = structure.children(module, path)
        dropout = structure.dropout(module)
        return read_layer(module, path, children, channels, self.growth_rate, dropout, COPIED)

    def _structure(self, path: str, module: nn.Module) -> Structure:
        structure = self.structures.get(type(module).forward)
        if structure is None:
            raise Unsupported(path, f"is a {type(module).__name__}, whose forward is not known")
        return structure

    def why_run_again(self) -> Iterator[str]:
        """Why the backward pass runs layers of it again, or parts of them: a reason for each."""
        for path, module in self.items():
            try:
                self._structure(path, module).read(module, path)
            except Unsupported as reason:
                yield str(reason)
