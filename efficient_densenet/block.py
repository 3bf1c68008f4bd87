"""The dense block that keeps only its features: a drop-in for torchvision's ``_DenseBlock``."""

from __future__ import annotations

from typing import Any, Literal, get_args

from torch import Tensor

from efficient_densenet import lowering, stage
from efficient_densenet.reference import DenseBlock
from efficient_densenet.stage import Exit

Recompute = Literal["bottleneck", "norm", "none"]


class EfficientDenseBlock(DenseBlock):
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

    Raises:
        ValueError: if an argument is out of range; the message quotes it.

    What the efficient path does not support runs on the naive one; :meth:`why_reference` says why.
    """

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

    @property
    def recompute(self) -> Recompute:
        """What the backward pass recomputes: ``"bottleneck"``, ``"norm"`` or ``"none"``."""
        return self._recompute

    @recompute.setter
    def recompute(self, mode: Recompute) -> None:
        if mode not in get_args(Recompute):
            raise ValueError(f"recompute must be one of {get_args(Recompute)}, got {mode!r}")
        self._recompute = mode

    def __prepare_scriptable__(self) -> Any:
        """Called by ``torch.jit.script`` on every module of a model."""
        raise RuntimeError(
            "TorchScript cannot script what recomputes: trace or export the model, or put a "
            "reference.DenseBlock with the same state dict in the place of each dense block"
        )

    def extra_repr(self) -> str:
        return f"recompute={self.recompute!r}"

    def why_reference(self, x: Tensor) -> str | None:
        """Why ``x`` would take the naive path, or ``None`` if it takes the efficient one."""
        if self.recompute == "none":
            return 'recompute="none"'
        reason = lowering.unsupported_call(x)
        if reason:
            return reason
        layers, channels = list(self.items()), x.shape[1]
        for name, layer in layers:
            reason = stage.unsupported_layer(layer, channels)
            if reason:
                return f"{name}{reason}"
            channels += stage.convs(layer)[-1].out_channels
        return lowering.unsupported_statistics(x, stage.all_norms(self.values()))

    def forward(self, x: Tensor) -> Tensor:
        if self.why_reference(x):
            return super().forward(x)
        return self.run(x)

    def run(self, x: Tensor, exit: Exit | None = None) -> Tensor:
        """The efficient path: the features, or what ``exit`` makes of them."""
        return stage.run_layers(self.values(), x, self.recompute == "bottleneck", exit)
