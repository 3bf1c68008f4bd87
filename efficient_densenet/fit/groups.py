"""Groups of modules that run together: each can be given modes, and run, by itself."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor, nn

from efficient_densenet.functional.modes import MODES, Recompute
from efficient_densenet.kernels.implementations import Kernels
from efficient_densenet.modules.block import RecomputingBlock
from efficient_densenet.modules.recomputing import Settings
from efficient_densenet.modules.sequence import (
    RecomputingSequence,
    RecomputingTransition,
    is_plain,
    read_stem,
    run,
)

Modes = tuple[Recompute, ...]
AROUND_BLOCKS: Modes = ("none", "norm")
"""Modes of what is no dense block: there ``"bottleneck"`` is ``"norm"``."""


class Form(NamedTuple):
    """What a module was called with."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool

    @classmethod
    def of(cls, x: Tensor) -> Form:
        """That of a tensor."""
        return cls(x.shape, x.stride(), x.dtype, x.requires_grad)

    def empty(self, device: torch.device) -> Tensor:
        """A tensor of this form."""
        made = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=device)
        return made.requires_grad_(self.requires_grad)


@dataclass(frozen=True)
class Group:
    """Modules that run together: a stem, a block with the transition after it, or one module.

    Attributes:
        paths: the modules whose modes decide how it runs.
        runs: the modules that run, one after the other.
        input: what the first of them is called with.
        choices: modes of ``paths``; the last ones keep least, but for rare exceptions.
        is_stem: whether it is a stem in the sequence ``paths``.
    """

    paths: tuple[str, ...]
    runs: tuple[str, ...]
    input: Form
    choices: tuple[Modes, ...]
    is_stem: bool = False

    def mix(self, modes: Modes) -> dict[str, Recompute]:
        """``modes`` by the path of their modules."""
        return dict(zip(self.paths, modes, strict=True))

    def cut_out(
        self, model: nn.Module, copied: Callable[[nn.Module], nn.Module] = copy.deepcopy
    ) -> Alone:
        """A copy that runs by itself."""
        modules = [copied(model.get_submodule(path)) for path in self.runs]
        return Alone(self, modules, _settings(model, self.paths[0]).kernels)


@dataclass(frozen=True)
class Alone:
    """A group's modules outside of their model."""

    group: Group
    modules: Sequence[nn.Module]
    kernels: Kernels

    def run(self, x: Tensor, modes: Modes) -> Tensor:
        """The group's result as the model would compute it in ``modes``."""
        if not self.group.is_stem:
            for module, mode in zip(self.modules, modes, strict=True):
                assert isinstance(module, Settings)
                module.recompute = mode
        return run(self.modules, x, self.kernels, recompute_stems=modes[0] != "none")


def modes_of(model: nn.Module) -> dict[str, Recompute]:
    """The mode of every module of ``model`` that has one, by path."""
    modules = model.named_modules()
    return {path: module.recompute for path, module in modules if isinstance(module, Settings)}


def set_modes(model: nn.Module, mix: Mapping[str, Recompute]) -> None:
    """Choose modes in ``model``, by path."""
    for path, mode in mix.items():
        _settings(model, path).recompute = mode


def find_groups(model: nn.Module, forms: dict[str, Form]) -> list[Group]:
    """The groups of ``model``; ``forms`` says what each module is called with that is called."""
    found: list[Group] = []
    for path, module in model.named_modules():
        if isinstance(module, RecomputingSequence):
            found += _in_sequence(path, module, forms)
    together = {path for group in found for path in group.paths}
    for path, module in model.named_modules():
        alone = isinstance(module, Settings) and not isinstance(module, RecomputingSequence)
        if alone and path in forms and path not in together:
            found.append(Group((path,), (path,), forms[path], _choices(module)))
    return found


def _in_sequence(
    path: str, sequence: RecomputingSequence, forms: dict[str, Form]
) -> Iterator[Group]:
    """The first stem of a sequence, and its blocks with a transition after them."""
    named = {name: child for name, child in sequence._modules.items() if child is not None}
    children = list(named.values())
    paths = [f"{path}.{name}" if path else name for name in named]
    has_stem = False
    for i, here in enumerate(paths):
        form = forms.get(here)
        if form is None:
            continue
        if not has_stem:
            stem = read_stem(children[i:], form.empty(torch.device("meta")), sequence.kernels)
            if stem is not None:
                runs = tuple(paths[i : i + stem[1]])
                choices = tuple((mode,) for mode in AROUND_BLOCKS)
                yield Group((path,), runs, form, choices, is_stem=True)
                has_stem = True
        pair = children[i : i + 2]
        if len(pair) == 2 and _may_run_together(*pair):
            both = tuple(paths[i : i + 2])
            yield Group(both, both, form, _choices(*pair))


def _may_run_together(here: nn.Module, after: nn.Module) -> bool:
    return is_plain(here, RecomputingBlock) and is_plain(after, RecomputingTransition)


def _choices(*modules: nn.Module) -> tuple[Modes, ...]:
    every = (
        tuple(mode.name for mode in MODES.values())
        if isinstance(module, RecomputingBlock)
        else AROUND_BLOCKS
        for module in modules
    )
    return tuple(product(*every))


def _settings(model: nn.Module, path: str) -> Settings:
    module = model.get_submodule(path)
    assert isinstance(module, Settings)
    return module
