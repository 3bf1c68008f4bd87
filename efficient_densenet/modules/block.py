"""The dense block that keeps only its features: a drop-in for torchvision's ``_DenseBlock``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from efficient_densenet.functional.modes import Recompute, check_recompute
from efficient_densenet.kernels.implementations import Kernels
from efficient_densenet.modules import calls as stage
from efficient_densenet.modules import reading as lowering
from efficient_densenet.modules.calls import Exit
from efficient_densenet.modules.naive import BasicLayer, BottleneckLayer, DenseBlock
from efficient_densenet.modules.parts import (
    BASIC,
    BOTTLENECK,
    Anatomy,
    Layer,
    read_layer,
    unsupported_layer,
)


class RecomputingBlock(stage.ChoosesKernels):
    """What makes a dense block recompute: a base in front of the class whose forward is naive.

    A call that the efficient path does not support runs on the class behind; :meth:`why_naive`
    says why. The layers are read at every call, each by the anatomy of its class.
    """

    layer_classes: ClassVar[Sequence[tuple[type[nn.Module], Anatomy]]]
    """The layers that are known, by their forward function: a subclass may not have its own."""

    @property
    def recompute(self) -> Recompute:
        """What the backward pass recomputes: ``"bottleneck"``, ``"norm"`` or ``"none"``."""
        return self._recompute

    @recompute.setter
    def recompute(self, mode: Recompute) -> None:
        check_recompute(mode)
        self._recompute = mode

    def __prepare_scriptable__(self) -> Any:
        """Called by ``torch.jit.script`` on every module of a model."""
        raise RuntimeError(
            "TorchScript cannot script what recomputes: trace or export the model, or put a "
            "naive.DenseBlock with the same state dict in the place of each dense block"
        )

    def extra_repr(self) -> str:
        return ", ".join(filter(None, [super().extra_repr(), f"recompute={self.recompute!r}"]))

    def dense_layers(self) -> list[tuple[str, nn.Module]]:
        """The block's layers in the order of their use, each with its path in the block."""
        return [(name, layer) for name, layer in self._modules.items() if layer is not None]

    def anatomy_of(self, layer: nn.Module) -> Anatomy | None:
        """Where the parts of a layer are, ``None`` if its forward function is not known."""
        for known, anatomy in self.layer_classes:
            if isinstance(layer, known) and type(layer).forward is known.forward:
                return anatomy
        return None

    def why_naive(self, x: Tensor) -> str | None:
        """Why ``x`` would take the naive path, or ``None`` if it takes the efficient one."""
        if self.recompute == "none":
            return 'recompute="none"'
        reason = lowering.unsupported_call(x) or self.unsupported(x.shape[1])
        return reason or lowering.unsupported_statistics(x, stage.all_norms(self.read_layers()))

    def unsupported(self, channels: int | None = None) -> str | None:
        """What about its layers the efficient path does not know, if ``channels`` enter."""
        for name, layer in self.dense_layers():
            anatomy = self.anatomy_of(layer)
            if anatomy is None:
                return f"{name} is a {type(layer).__name__}"
            reason = unsupported_layer(layer, anatomy, channels)
            if reason:
                return f"{name}{reason}"
            units = read_layer(layer, anatomy).units
            channels = units[0].norm.num_features + units[-1].conv.out_channels
        return None

    def read_layers(self) -> list[Layer]:
        """The modules of every layer, of which nothing is unsupported."""
        pairs = ((layer, self.anatomy_of(layer)) for _, layer in self.dense_layers())
        return [read_layer(layer, anatomy) for layer, anatomy in pairs if anatomy]

    def forward(self, x: Tensor) -> Tensor:
        if self.why_naive(x):
            return super().forward(x)
        return self.run(x)

    def run(self, x: Tensor, exit: Exit | None = None) -> Tensor:
        """The efficient path: the features, or what ``exit`` makes of them."""
        return stage.run_layers(self.read_layers(), x, self.recompute, exit, self.kernels)


class EfficientDenseBlock(RecomputingBlock, DenseBlock):
    """Dense block that keeps ``k`` channels per layer instead of ``2c + 2b``, and trains the same.

    Maps ``(N, num_input_features, *spatial)`` to
    ``(N, num_input_features + num_layers * growth_rate, *spatial)``, in the input's memory format.
    Parameters, state-dict keys, outputs, gradients and running statistics are those of
    torchvision's ``_DenseBlock``; only dropout draws other masks (from a seed of torch's default
    generator).

    Args:
        num_layers: layers ``L`` of the block.
        num_input_features: channels ``c0`` that enter.
        bn_size: bottleneck width in units of ``growth_rate``; ``None`` makes basic layers.
        growth_rate: channels ``k`` that each layer adds.
        drop_rate: dropout probability after each layer.
        recompute: ``"bottleneck"`` keeps the features only and computes normalised maps and the 1x1
            convolutions again in the backward pass; ``"norm"`` (Pleiss et al., 2017) keeps the
            bottleneck maps too and convolves nothing twice; ``"none"`` is the naive block. May be
            changed at any time.
        dims: spatial dimensions, 1, 2 or 3.
        bias: whether convolutions have a bias.
        kernels: the implementation to run on, ``"triton"`` (for CUDA) or ``"eager"`` (PyTorch's
            operators); where it cannot run, the next slower one does, and :meth:`why_kernels` says
            why. ``"auto"`` is what the environment variable ``EFFICIENT_DENSENET_KERNELS`` says, or
            the fastest one.

    Raises:
        ValueError: if an argument is out of range; the message quotes it.

    What the efficient path does not support runs on the naive one; :meth:`why_naive` says why.
    """

    layer_classes = ((BottleneckLayer, BOTTLENECK), (BasicLayer, BASIC))

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
