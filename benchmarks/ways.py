"""Ways to train a DenseNet in less memory, as changes to another library's model."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._inductor.compile_fx import compile_fx
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from efficient_densenet import convert_
from efficient_densenet.fit.groups import modes_of, set_modes
from efficient_densenet.functional.modes import MODES

BUDGETS = (0.8, 0.5, 0.2)
"""Activation memory budgets of the compiler: which part of what it would keep it may keep."""


class Way(NamedTuple):
    """A way to train.

    Attributes:
        name: of the way.
        change: makes of a library's model one that is trained in this way; ``None`` if it can't.
        channels_last: whether weights and images are in that memory format.
        parts: into how many parts the batch is split, whose gradients are added up.
        compiled: whether the model is compiled, which takes minutes.
        note: what is to be known of it.
    """

    name: str
    change: Callable[[nn.Module], nn.Module | None]
    channels_last: bool = False
    parts: int = 1
    compiled: bool = False
    note: str = ""


class Checkpointed(nn.Module):
    """Runs a module again in the backward pass."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor | list[Tensor]) -> Tensor:
        own = [*x] if isinstance(x, list) else x  # torchvision's blocks add to their list of maps
        return checkpoint(self.inner, own, use_reentrant=False)


class SavedOnCPU(nn.Module):
    """Moves to main memory whatever autograd saves."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        with save_on_cpu():
            return self.inner(x)


def with_flag(model: nn.Module) -> nn.Module | None:
    """With torchvision's ``memory_efficient=True``, which its layers look up as they run."""
    layers = [module for module in model.modules() if hasattr(module, "memory_efficient")]
    for layer in layers:
        layer.memory_efficient = True
    return model if layers else None


def checkpointed(model: nn.Module, kind: str) -> nn.Module:
    """With every module whose class has that name, as in torchvision and MONAI, checkpointed."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__ == kind:
                setattr(parent, name, Checkpointed(child))
    return model


def compiled_within(model: nn.Module, budget: float) -> nn.Module:
    """Compiled within an activation memory budget.

    The budget is no part of what a compiled model is told by from another: a backend is.
    """

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        with torch._functorch.config.patch(activation_memory_budget=budget):
            return compile_fx(graph, inputs)

    return torch.compile(model, backend=backend)


def converted(model: nn.Module, mode: str) -> nn.Module:
    """Ours, in one mode everywhere."""
    convert_(model, strict=True)
    set_modes(model, dict.fromkeys(modes_of(model), mode))
    return model


def mixed(model: nn.Module, modes: dict[str, str]) -> nn.Module:
    """Ours, in a mix of modes."""
    convert_(model, strict=True)
    set_modes(model, modes)
    return model


def as_it_is(model: nn.Module) -> nn.Module:
    return model


NAIVE = Way("naive", as_it_is)
WAYS = (
    NAIVE,
    Way("naive, channels_last", as_it_is, channels_last=True),
    Way("torchvision memory_efficient", with_flag),
    Way("checkpoint per block", partial(checkpointed, kind="_DenseBlock")),
    Way("checkpoint per layer", partial(checkpointed, kind="_DenseLayer")),
    Way("save_on_cpu", SavedOnCPU, note="on a CPU nothing moves"),
    Way("accumulation of 2 parts", as_it_is, parts=2),
    Way("naive, torch.compile", torch.compile, compiled=True),
    *(
        Way(f"torch.compile, memory budget {b}", partial(compiled_within, budget=b), compiled=True)
        for b in BUDGETS
    ),
    *(
        Way(mode.label, partial(converted, mode=name))
        for name, mode in MODES.items()
        if name != "none"
    ),
)
