"""The dense block that keeps only its features: a drop-in for torchvision's ``_DenseBlock``."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from efficient_densenet.autograd import Statistics, dense_block
from efficient_densenet.reference import BasicLayer, BottleneckLayer, DenseBlock
from efficient_densenet.spec import BlockSpec, ConvSpec, LayerSpec, UnitSpec, UnitTensors

Recompute = Literal["bottleneck", "norm", "none"]

NORM_TYPES = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
CONV_TYPES = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


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

    def extra_repr(self) -> str:
        return f"recompute={self.recompute!r}"

    def why_reference(self, x: Tensor) -> str | None:
        """Why ``x`` would take the naive path, or ``None`` if it takes the efficient one."""
        if self.recompute == "none":
            return 'recompute="none"'
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch.jit.is_scripting():
            return "the block is being compiled, exported or traced"
        if nn_module._has_any_global_hook():
            return "there are global module hooks"
        if x.numel() <= x.shape[1] and any(
            _uses_batch_statistics(norm) for layer in self.values() for norm in _norms(layer)
        ):
            return "there is at most one value per channel to take batch statistics of"
        channels = x.shape[1]
        for name, layer in self.items():
            reason = _unsupported_layer(layer, channels)
            if reason:
                return f"{name}{reason}"
            channels += _convs(layer)[-1].out_channels
        return None

    def forward(self, x: Tensor) -> Tensor:
        if self.why_reference(x):
            return super().forward(x)
        out, features, bottlenecks = dense_block(x, self._spec(x), self._units())
        count = x.numel() // x.shape[1]
        for layer, bottleneck in zip(self.values(), bottlenecks, strict=True):
            norms = _norms(layer)
            _update_running_statistics(norms[0], features, count)
            if len(norms) == 2:
                _update_running_statistics(norms[1], bottleneck, count)
        return out

    def _units(self) -> list[UnitTensors]:
        return [
            _unit_tensors(norm, conv)
            for layer in self.values()
            for norm, conv in zip(_norms(layer), _convs(layer), strict=True)
        ]

    def _spec(self, x: Tensor) -> BlockSpec:
        layers = tuple(_layer_spec(layer) for layer in self.values())
        compute_dtype = x.dtype
        if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
            compute_dtype = torch.get_autocast_dtype(x.device.type)
        return BlockSpec(
            layers=layers,
            exit=None,
            input_channels=x.shape[1],
            recompute_bottleneck=self.recompute == "bottleneck",
            compute_dtype=compute_dtype,
            features_dtype=torch.promote_types(x.dtype, compute_dtype),
        )


def _norms(layer: Any) -> list[Any]:
    return [layer.norm1, layer.norm2] if isinstance(layer, BottleneckLayer) else [layer.norm1]


def _convs(layer: Any) -> list[Any]:
    return [layer.conv1, layer.conv2] if isinstance(layer, BottleneckLayer) else [layer.conv1]


def _unsupported_layer(layer: nn.Module, channels: int) -> str | None:
    """What about a dense layer the efficient path does not know, as the end of a sentence."""
    if type(layer) not in (BottleneckLayer, BasicLayer):
        return f" is a {type(layer).__name__}"
    if _is_patched(layer):
        return " has hooks or a forward of its own"
    for name, child in layer.named_children():
        if type(child) not in (*NORM_TYPES, *CONV_TYPES, nn.ReLU):
            return f".{name} is a {type(child).__name__}"
        if _is_patched(child):
            return f".{name} has hooks or a forward of its own"
        if type(child) in CONV_TYPES and not _keeps_size(child):
            return f".{name} has a stride, padding or padding mode that changes the map's size"
    expected = _norms(layer)[0].num_features
    if expected != channels:
        return f".norm1 expects {expected} channels and gets {channels}"
    return None


def _is_patched(module: nn.Module) -> bool:
    return bool(
        "forward" in vars(module)
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def _keeps_size(conv: Any) -> bool:
    reach = tuple(d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True))
    return (
        conv.padding_mode == "zeros"
        and not isinstance(conv.padding, str)
        and all(stride == 1 for stride in conv.stride)
        and tuple(2 * p for p in conv.padding) == reach
    )


def _uses_batch_statistics(norm: Any) -> bool:
    return norm.training or norm.running_mean is None


def _layer_spec(layer: Any) -> LayerSpec:
    convs = _convs(layer)
    units = tuple(
        UnitSpec(
            norm.eps,
            _uses_batch_statistics(norm),
            ConvSpec(conv.padding, conv.dilation, conv.groups),
        )
        for norm, conv in zip(_norms(layer), convs, strict=True)
    )
    return LayerSpec(
        units=units,
        channels=layer.norm1.num_features,
        width=convs[0].out_channels,
        growth=convs[-1].out_channels,
        drop_rate=layer.drop_rate if layer.training else 0.0,
    )


def _unit_tensors(norm: Any, conv: Any) -> UnitTensors:
    running_mean = running_var = None
    if not _uses_batch_statistics(norm):
        # Copies: the buffers may be written between forward and backward (DDP broadcasts them).
        running_mean, running_var = norm.running_mean.clone(), norm.running_var.clone()
    return UnitTensors(norm.weight, norm.bias, running_mean, running_var, conv.weight, conv.bias)


@torch.no_grad()
def _update_running_statistics(norm: Any, batch: Statistics | None, count: int) -> None:
    """What ``nn.BatchNorm`` does to its buffers in training, with ``count`` values per channel."""
    if not (norm.training and norm.track_running_stats) or norm.running_mean is None:
        return
    assert batch is not None
    momentum = norm.momentum
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if momentum is None:
            momentum = 1.0 / float(norm.num_batches_tracked)
    mean, var = batch.first(norm.num_features)
    unbiased = var * (count / (count - 1))
    for running, new in ((norm.running_mean, mean), (norm.running_var, unbiased)):
        if running.dtype == new.dtype:
            running.lerp_(new, momentum)
        else:
            running.copy_(torch.lerp(running.to(new.dtype), new, momentum))
