"""The libraries whose modules are known: classes by name, and the parts of each.

No library is imported: a class is known if it, or a base of it, has a name in a table, and an
object of it if its forward function is that class's. So the library is there if its class is.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, field

from torch import nn

from efficient_densenet.modules.parts import (
    ACTIVATION,
    BOTTLENECK,
    CONV,
    DROPOUT,
    NORM,
    NORM_ACT,
    POOL,
    SEQUENTIAL,
    TRANSITION,
    Found,
    Kind,
    Structure,
)
from efficient_densenet.modules.reading import Unsupported, check_plain


def class_name(cls: type) -> str:
    """The name by which the tables know a class."""
    return f"{cls.__module__}.{cls.__qualname__}"


def known_class(cls: type, names: Container[str]) -> type[nn.Module] | None:
    """The class, or the base of it, that ``names`` holds."""
    return next((base for base in cls.__mro__ if class_name(base) in names), None)


def _read_pre_conv(module: nn.Module, path: str, found: Found) -> None:
    """pytorchcv's norm, activation and convolution in one module, if it uses all three."""
    if class_name(type(module)) != "pytorchcv.models.common.conv.PreConvBlock":
        raise Unsupported(path, f"is a {type(module).__name__}")
    check_plain(module, path)
    if (module.normalize, module.activate, module.return_preact) != (True, True, False):
        raise Unsupported(path, "leaves out or returns a part of norm, activation, convolution")


PRE_CONV = Kind(_read_pre_conv, holds_parts=True)


@dataclass(frozen=True)
class Library:
    """The classes of a library by name: dense blocks, and the structure of all else."""

    name: str
    layers: Mapping[str, Structure]
    blocks: tuple[str, ...] = ()
    transitions: Mapping[str, Structure] = field(default_factory=dict)
    stems: Mapping[str, Structure] = field(default_factory=dict)


def _like_torchvision(name: str, module: str) -> Library:
    """A library with torchvision's names."""
    return Library(
        name,
        layers={f"{module}._DenseLayer": BOTTLENECK},
        blocks=(f"{module}._DenseBlock",),
        transitions={f"{module}._Transition": TRANSITION},
    )


def _inside(container: str, structure: Structure) -> dict[str, Kind]:
    return {f"{container}.{path}": kind for path, kind in structure.parts.items()}


TIMM = "timm.models.densenet"
MONAI = "monai.networks.nets.densenet"
PYTORCHCV = "pytorchcv.models"
PRE_CONV_PARTS = Structure({"bn": NORM, "activ": ACTIVATION, "conv": CONV})

LIBRARIES = (
    _like_torchvision("torchvision", "torchvision.models.densenet"),
    _like_torchvision("torchxrayvision", "torchxrayvision.models"),
    _like_torchvision("torchreid", "torchreid.models.densenet"),
    _like_torchvision("torchreid", "torchreid.reid.models.densenet"),
    Library(
        "timm",
        layers={
            f"{TIMM}.DenseLayer": Structure(
                {"norm1": NORM_ACT, "conv1": CONV, "norm2": NORM_ACT, "conv2": CONV},
                drop_rate="drop_rate",
            )
        },
        blocks=(f"{TIMM}.DenseBlock",),
        transitions={
            f"{TIMM}.DenseTransition": Structure({"norm": NORM_ACT, "conv": CONV, "pool": POOL})
        },
    ),
    Library(
        "MONAI",
        layers={
            f"{MONAI}._DenseLayer": Structure(
                {
                    "layers": SEQUENTIAL,
                    **_inside("layers", BOTTLENECK),
                    "layers.dropout": DROPOUT,
                }
            )
        },
        blocks=(f"{MONAI}._DenseBlock",),
        transitions={f"{MONAI}._Transition": TRANSITION},
    ),
    Library(
        "pytorchcv",
        layers={
            f"{PYTORCHCV}.densenet.DenseUnit": Structure(
                {
                    "conv1": PRE_CONV,
                    **_inside("conv1", PRE_CONV_PARTS),
                    "conv2": PRE_CONV,
                    **_inside("conv2", PRE_CONV_PARTS),
                    "dropout": DROPOUT,
                }
            ),
            f"{PYTORCHCV}.densenet_cifar.DenseSimpleUnit": Structure(
                {"conv": PRE_CONV, **_inside("conv", PRE_CONV_PARTS), "dropout": DROPOUT}
            ),
        },
        transitions={
            f"{PYTORCHCV}.densenet.TransitionBlock": Structure(
                {"conv": PRE_CONV, **_inside("conv", PRE_CONV_PARTS), "pool": POOL}
            )
        },
        stems={
            f"{PYTORCHCV}.preresnet.PreResInitBlock": Structure(
                {"conv": CONV, "bn": NORM, "activ": ACTIVATION, "pool": POOL}
            )
        },
    ),
)

CALLED_BY_NAME = ("segmentation_models_pytorch.encoders.densenet.DenseNetEncoder",)
"""Networks that call the parts of their ``features`` one by one."""


def _merged(field_name: str) -> dict[str, Structure]:
    """One of the tables, of all libraries together."""
    return {
        name: structure
        for library in LIBRARIES
        for name, structure in getattr(library, field_name).items()
    }


LAYERS, TRANSITIONS, STEMS = _merged("layers"), _merged("transitions"), _merged("stems")
BLOCKS = {name for library in LIBRARIES for name in library.blocks}
OWNERS = {
    name: library.name
    for library in LIBRARIES
    for name in (*library.layers, *library.blocks, *library.transitions, *library.stems)
}


def below_called_by_name(model: nn.Module) -> Iterator[tuple[str, str]]:
    """The path of each container whose parts are called one by one, and the class that does it."""
    for path, module in model.named_modules():
        if known_class(type(module), CALLED_BY_NAME):
            prefix = f"{path}." if path else ""
            yield f"{prefix}features", type(module).__name__
