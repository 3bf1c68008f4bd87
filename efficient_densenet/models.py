"""DenseNet and its named variants, with torchvision's constructor and state-dict keys."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypedDict

from torch import Tensor, nn
from torch.nn import functional as F

from efficient_densenet.functional.modes import Recompute
from efficient_densenet.kernels.implementations import Kernels
from efficient_densenet.modules import sequence
from efficient_densenet.modules.block import EfficientDenseBlock
from efficient_densenet.modules.naive import (
    CONVS,
    MAX_POOLS,
    NORMS,
    check_dims,
    compressed,
    global_average,
)
from efficient_densenet.modules.reading import is_patched
from efficient_densenet.modules.recomputing import set_
from efficient_densenet.modules.sequence import EfficientSequential, EfficientTransition, is_naive

if TYPE_CHECKING:
    from typing_extensions import Unpack

STEMS = ("imagenet", "cifar")


class Options(TypedDict, total=False):
    """Arguments of :class:`DenseNet` that every network here takes."""

    drop_rate: float
    num_classes: int
    in_channels: int
    stem: str
    bias: bool
    dims: int
    recompute: Recompute
    kernels: Kernels


class ImageNetOptions(Options, total=False):
    """Arguments that torchvision's networks take, too."""

    bn_size: int | None
    compression: float


class DenseNet(nn.Module):
    """DenseNet whose dense blocks keep only their features for the backward pass.

    Maps images ``(N, in_channels, *spatial)`` to logits ``(N, num_classes)``: a stem, dense blocks
    with transitions between them, batch norm, ReLU, the mean over all positions, and a linear
    layer. The positional arguments (without ``memory_efficient``) and the state-dict keys are those
    of ``torchvision.models.DenseNet``. Source: Huang et al., "Densely Connected Convolutional
    Networks", CVPR 2017.

    Args:
        growth_rate: channels ``k`` that each layer adds.
        block_config: layers of each dense block.
        num_init_features: channels that the first convolution returns.
        bn_size: bottleneck width in units of ``k``; ``None`` makes basic layers
            (BN - ReLU - Conv3x3).
        drop_rate: dropout probability after each layer.
        num_classes: number of logits.
        in_channels: channels of the image.
        stem: ``"imagenet"`` (7x7 stride 2, BN, ReLU, 3x3 max-pool stride 2) or ``"cifar"`` (3x3).
        compression: a transition returns ``floor(θ * channels)`` channels for this ``θ``, above 0
            and at most 1.
        bias: whether convolutions have a bias.
        dims: spatial dimensions, 1, 2 or 3.
        recompute: the mode of all blocks, see :class:`EfficientDenseBlock`. With any mode but
            ``"none"``, stem, transitions and head keep none of their inner maps either, and the
            stem's convolution runs twice.
        kernels: the implementation that all of them use, see :class:`EfficientDenseBlock`.

    Raises:
        ValueError: if an argument of a dense block, ``stem`` or ``compression`` is out of range;
            the message quotes it.
    """

    def __init__(
        self,
        growth_rate: int = 32,
        block_config: Sequence[int] = (6, 12, 24, 16),
        num_init_features: int = 64,
        bn_size: int | None = 4,
        drop_rate: float = 0.0,
        num_classes: int = 1000,
        *,
        in_channels: int = 3,
        stem: str = "imagenet",
        compression: float = 0.5,
        bias: bool = False,
        dims: int = 2,
        recompute: Recompute = "bottleneck",
        kernels: Kernels = "auto",
    ) -> None:
        super().__init__()
        check_dims(dims)
        self.dims = dims
        self.features = EfficientSequential(_stem(stem, in_channels, num_init_features, dims, bias))
        channels = num_init_features
        for i, num_layers in enumerate(block_config, start=1):
            if i > 1:
                kept = compressed(channels, compression)
                transition = EfficientTransition(channels, kept, dims=dims, bias=bias)
                self.features.add_module(f"transition{i - 1}", transition)
                channels = kept
            block = EfficientDenseBlock(
                num_layers, channels, bn_size, growth_rate, drop_rate, dims=dims, bias=bias
            )
            self.features.add_module(f"denseblock{i}", block)
            channels += num_layers * growth_rate
        self.features.add_module("norm5", NORMS[dims](channels))
        self.classifier = nn.Linear(channels, num_classes)
        set_(self, recompute, kernels)
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
                nn.init.kaiming_normal_(module.weight)
            bias = getattr(module, "bias", None)
            if (
                isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear))
                and bias is not None
            ):
                nn.init.zeros_(bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self._pooled(x).flatten(1))

    def _pooled(self, x: Tensor) -> Tensor:
        """ReLU and global average of the features."""
        features = self.features
        plain = type(features) is EfficientSequential and not is_patched(features)
        if plain and not is_naive(features) and isinstance(x, Tensor):
            stems = features.recompute != "none"
            return sequence.run_to_average(list(features), x, self.dims, features.kernels, stems)
        return global_average(F.relu(features(x)), self.dims)


def _stem(
    name: str, in_channels: int, num_features: int, dims: int, bias: bool
) -> OrderedDict[str, nn.Module]:
    if name == "cifar":
        conv = CONVS[dims](in_channels, num_features, kernel_size=3, padding=1, bias=bias)
        return OrderedDict(conv0=conv)
    if name == "imagenet":
        return OrderedDict(
            conv0=CONVS[dims](
                in_channels, num_features, kernel_size=7, stride=2, padding=3, bias=bias
            ),
            norm0=NORMS[dims](num_features),
            relu0=nn.ReLU(inplace=True),
            pool0=MAX_POOLS[dims](kernel_size=3, stride=2, padding=1),
        )
    raise ValueError(f"stem must be one of {STEMS}, got {name!r}")


def _named(
    name: str,
    growth_rate: int,
    block_config: Sequence[int],
    num_init_features: int,
    options: ImageNetOptions,
) -> DenseNet:
    """A network of torchvision's; its builder's other arguments are refused, with the way out."""
    given: dict[str, object] = {**options}
    if options.pop("weights", None) is not None:  # type: ignore[typeddict-item]
        raise TypeError(
            f"{name} downloads no weights: build it without, then "
            f"model.load_state_dict(torchvision.models.{name}(weights=...).state_dict())"
        )
    if "memory_efficient" in given:
        raise TypeError(
            f'memory_efficient={given["memory_efficient"]!r}: say recompute="norm" or '
            '"bottleneck", which keep less, or "none"'
        )
    return DenseNet(growth_rate, block_config, num_init_features, **options)


def densenet121(**options: Unpack[ImageNetOptions]) -> DenseNet:
    """DenseNet-121 (k=32, blocks of 6, 12, 24, 16 layers); options as for :class:`DenseNet`.

    Raises:
        TypeError: if ``weights`` or ``memory_efficient`` is given; the message says what to do.
    """
    return _named("densenet121", 32, (6, 12, 24, 16), 64, options)


def densenet161(**options: Unpack[ImageNetOptions]) -> DenseNet:
    """DenseNet-161 (k=48, blocks of 6, 12, 36, 24 layers); options as for :class:`DenseNet`.

    Raises:
        TypeError: if ``weights`` or ``memory_efficient`` is given; the message says what to do.
    """
    return _named("densenet161", 48, (6, 12, 36, 24), 96, options)


def densenet169(**options: Unpack[ImageNetOptions]) -> DenseNet:
    """DenseNet-169 (k=32, blocks of 6, 12, 32, 32 layers); options as for :class:`DenseNet`.

    Raises:
        TypeError: if ``weights`` or ``memory_efficient`` is given; the message says what to do.
    """
    return _named("densenet169", 32, (6, 12, 32, 32), 64, options)


def densenet201(**options: Unpack[ImageNetOptions]) -> DenseNet:
    """DenseNet-201 (k=32, blocks of 6, 12, 48, 32 layers); options as for :class:`DenseNet`.

    Raises:
        TypeError: if ``weights`` or ``memory_efficient`` is given; the message says what to do.
    """
    return _named("densenet201", 32, (6, 12, 48, 32), 64, options)


def densenet264(**options: Unpack[ImageNetOptions]) -> DenseNet:
    """DenseNet-264 (k=32, blocks of 6, 12, 64, 48 layers); options as for :class:`DenseNet`.

    Raises:
        TypeError: if ``weights`` or ``memory_efficient`` is given; the message says what to do.
    """
    return _named("densenet264", 32, (6, 12, 64, 48), 64, options)


def densenet_cifar(
    depth: int,
    growth_rate: int,
    bottleneck: bool = True,
    compression: float = 0.5,
    **options: Unpack[Options],
) -> DenseNet:
    """DenseNet of the paper's CIFAR experiments: three blocks of ``n`` layers, for 32x32 images.

    With ``bottleneck`` and ``compression < 1`` (DenseNet-BC) the first convolution returns ``2k``
    channels, otherwise 16. Options as for :class:`DenseNet`; ``num_classes`` is 10 by default.
    Source: Huang et al., "Densely Connected Convolutional Networks", CVPR 2017, section 4.

    Args:
        depth: convolutions and linear layers of the network: ``6 * n + 4`` with ``bottleneck``,
            ``3 * n + 4`` without.
        growth_rate: channels ``k`` that each layer adds.
        bottleneck: whether layers have a 1x1 convolution of ``4k`` channels before the 3x3 one.
        compression: as for :class:`DenseNet`.

    Raises:
        ValueError: if no such network has ``depth`` layers; the message names the nearest depth.
    """
    step = 6 if bottleneck else 3
    layers, remainder = divmod(depth - 4, step)
    if layers < 1 or remainder:
        nearest = max(round((depth - 4) / step), 1) * step + 4
        raise ValueError(
            f"depth must be {step} * n + 4 for a whole n >= 1, got {depth!r}; "
            f"the nearest is {nearest}"
        )
    init = 2 * growth_rate if bottleneck and compression < 1.0 else 16
    given: Options = {"num_classes": 10, "stem": "cifar", **options}
    return DenseNet(
        growth_rate,
        (layers,) * 3,
        init,
        4 if bottleneck else None,
        compression=compression,
        **given,
    )


def fashion_densenet(**options: Unpack[Options]) -> DenseNet:
    """The small network for 1-channel images: four blocks of 4 basic layers, k=32, with biases.

    758,226 parameters. The maps of an image have 64 channels after the stem, and 192, 224, 240 and
    248 after the blocks. Options as for :class:`DenseNet`; ``num_classes`` is 10 by default.
    Source: Zhang et al., "Dive into Deep Learning", section on DenseNet.
    """
    given: Options = {"num_classes": 10, "in_channels": 1, "bias": True, **options}
    return DenseNet(32, (4, 4, 4, 4), 64, None, **given)
