"""Recognises dense blocks, transitions and stems, and says how each would be converted."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import nn

from efficient_densenet.convert import libraries, wiring
from efficient_densenet.convert.classes import LAYERS, Converted, LayerClass, converted_class
from efficient_densenet.modules.block import RecomputingBlock
from efficient_densenet.modules.reading import CONVS, NORMS, Unsupported, check_plain
from efficient_densenet.modules.sequence import RecomputingSequence, RecomputingTransition

OWN_FORWARD = "{} has a forward function of its own"
EFFICIENT = (RecomputingBlock, RecomputingTransition, RecomputingSequence)


@dataclass(frozen=True)
class Recipe:
    """What a module is, and the class it would get; or the reason why it gets none."""

    kind: str
    library: str
    new_class: type[Any] | None = None
    reason: str | None = None


def recognise(module: nn.Module) -> Recipe | None:
    """The recipe of a dense block, a transition or a stem, ``None`` for all else."""
    for recognised in (_efficient, _block, _stage, _list_block, _transition, _stem):
        recipe = recognised(module)
        if recipe:
            return recipe
    return None


def sequence(module: nn.Module) -> Recipe | None:
    """The recipe of a sequence that holds dense blocks."""
    cls = _class_of(module)
    if cls.forward is not nn.Sequential.forward or "forward" in vars(module):
        return None
    return Recipe("sequence", "torch", converted_class(cls, "sequence", ()))


def _efficient(module: nn.Module) -> Recipe | None:
    if isinstance(module, EFFICIENT) and not isinstance(module, Converted):
        kind = {RecomputingBlock: "dense block", RecomputingTransition: "transition"}
        name = next((name for base, name in kind.items() if isinstance(module, base)), "sequence")
        return Recipe(name, "efficient_densenet", reason=ALREADY)
    return None


ALREADY = "is efficient by itself"


def _block(module: nn.Module) -> Recipe | None:
    cls = _class_of(module)
    known = libraries.known_class(cls, libraries.BLOCKS)
    if known is None:
        return None
    library = libraries.OWNERS[libraries.class_name(known)]
    if cls.forward is not known.forward:
        return Recipe("dense block", library, reason=OWN_FORWARD.format(cls.__name__))
    return _read_block(module, library, "block", list(module._modules.items()))


def _stage(module: nn.Module) -> Recipe | None:
    """pytorchcv has no block: it is the run of units in a stage, after a transition or none."""
    cls, children = _class_of(module), list(module._modules.items())
    known = [libraries.known_class(type(child), libraries.LAYERS) for _, child in children]
    if cls.forward is not nn.Sequential.forward or not known or known[-1] is None:
        return None
    first = children[0][1]
    starts = known[0] is None and libraries.known_class(type(first), libraries.TRANSITIONS)
    library = libraries.OWNERS[libraries.class_name(known[-1])]
    return _read_block(module, library, "stage", children[1:] if starts else children)


def _read_block(
    module: nn.Module, library: str, role: str, children: list[tuple[str, Any]]
) -> Recipe:
    layers: dict[LayerClass, None] = {}
    for name, child in children:
        known = libraries.known_class(type(child), libraries.LAYERS)
        if known is None:
            reason = f"{name} is a {type(child).__name__}"
            return Recipe("dense block", library, reason=reason)
        if type(child).forward is not known.forward:
            reason = f"{name}: " + OWN_FORWARD.format(type(child).__name__)
            return Recipe("dense block", library, reason=reason)
        layers[known, ()] = None
    return _examined(module, "dense block", library, role, tuple(layers))


def _list_block(module: nn.Module) -> Recipe | None:
    """A block of no library, as the Tiramisu's: a list of sequences that grow by their output."""
    layers = module._modules.get(LAYERS)
    if type(layers) is not nn.ModuleList or len(module._modules) != 1 or len(layers) < 2:
        return None
    parts = [_parts_of_sequence(layer) for layer in layers]
    known = {(type(layer), part): None for layer, part in zip(layers, parts, strict=True) if part}
    if None in parts or not _grow(list(layers)):
        return None
    returned = wiring.returned_maps(module, LAYERS)
    if returned is None:
        reason = OWN_FORWARD.format(_class_of(module).__name__) + ", which does not connect densely"
        return Recipe("dense block", "none", reason=reason)
    for layer in layers:
        if not wiring.runs_in_order(layer):
            return Recipe("dense block", "none", reason=OWN_FORWARD.format(type(layer).__name__))
    role = "list" if returned == "features" else "new"
    return _examined(module, "dense block", "none", role, tuple(known))


def _parts_of_sequence(layer: nn.Module) -> tuple[tuple[str, str], ...] | None:
    """Names and roles of the children of a sequence that is a dense layer."""
    if not isinstance(layer, nn.Sequential):
        return None
    types: dict[str, tuple[type[nn.Module], ...]] = {
        "norm": tuple(NORMS),
        "relu": (nn.ReLU,),
        "conv": tuple(CONVS),
    }
    roles = []
    for name, part in layer._modules.items():
        role = next((role for role, known in types.items() if isinstance(part, known)), None)
        if role is None and isinstance(part, nn.modules.dropout._DropoutNd):
            role = "dropout"
        if role is None:
            return None
        roles.append((name, role))
    unit = ["norm", "relu", "conv"]
    found = [role for _, role in roles]
    return (
        tuple(roles)
        if found in (u + d for u in (unit, unit * 2) for d in ([], ["dropout"]))
        else None
    )


def _grow(layers: list[Any]) -> bool:
    """Whether each layer reads as many channels more as the one before it made."""
    ends = []
    for layer in layers:
        parts = list(layer)
        last: Any = next(part for part in reversed(parts) if isinstance(part, tuple(CONVS)))
        ends.append((parts[0].num_features, last.out_channels))
    return all(reads + makes == after for (reads, makes), (after, _) in pairwise(ends))


def _transition(module: nn.Module) -> Recipe | None:
    return _by_structure(module, "transition", libraries.TRANSITIONS)


def _stem(module: nn.Module) -> Recipe | None:
    return _by_structure(module, "stem", libraries.STEMS)


def _by_structure(module: nn.Module, role: str, structures: dict[str, Any]) -> Recipe | None:
    cls = _class_of(module)
    known = libraries.known_class(cls, structures)
    if known is None:
        return None
    library = libraries.OWNERS[libraries.class_name(known)]
    if cls.forward is not known.forward:
        return Recipe(role, library, reason=OWN_FORWARD.format(cls.__name__))
    return _examined(module, role, library, role)


def _examined(
    module: nn.Module, kind: str, library: str, role: str, layers: tuple[LayerClass, ...] = ()
) -> Recipe:
    """The recipe, after the new class has looked at the module as it is."""
    new_class = converted_class(_class_of(module), role, layers)
    twin: Any = copy.copy(module)
    twin.__class__ = new_class
    try:
        check_plain(module, "it")
        if kind == "dense block":
            twin.read_layers(None)
        elif kind == "transition":
            twin.read_unit()
        else:
            twin.read_parts()
    except Unsupported as reason:
        return Recipe(kind, library, reason=str(reason))
    return Recipe(kind, library, new_class)


def _class_of(module: nn.Module) -> Any:
    """The class that a module has, or had before it was converted."""
    return module.original if isinstance(module, Converted) else type(module)
