"""Estimates of one training step in many mixes of modes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from efficient_densenet.fit.groups import Form, Group, find_groups, modes_of, set_modes
from efficient_densenet.fit.timeline import Timeline
from efficient_densenet.functional.modes import Recompute
from efficient_densenet.memory.batch import Tree, tensors_in
from efficient_densenet.memory.hollow import copy_hollow
from efficient_densenet.memory.step import estimate

Mix = Mapping[str, Recompute]
"""The mode of each module that has one, by path."""


class Estimates:
    """Timelines of a step by mix; each is estimated once.

    Args:
        model: left untouched.
        inputs: arguments of the model, as for :func:`estimate`.
        options: other arguments of :func:`estimate`.

    Attributes:
        hollow: a copy of the model without values, in some mix.
    """

    def __init__(self, model: nn.Module, inputs: tuple[Tree, ...], options: dict[str, Any]) -> None:
        self.hollow = copy_hollow(model, torch.device("meta"))
        self._inputs, self._options = inputs, options
        self._known: dict[tuple[tuple[str, Recompute], ...], Timeline] = {}

    def timeline(self, mix: Mix) -> Timeline:
        """That of the step in ``mix``."""
        key = tuple(sorted(mix.items()))
        if key not in self._known:
            set_modes(self.hollow, mix)
            self._known[key] = Timeline.of(estimate(self.hollow, *self._inputs, **self._options))
        return self._known[key]

    def find_groups(self) -> list[Group]:
        """What has a choice, and is used in the step."""
        set_modes(self.hollow, dict.fromkeys(modes_of(self.hollow), "none"))
        watched = copy_hollow(self.hollow, torch.device("meta"))
        forms: dict[str, Form] = {}
        for path, module in watched.named_modules():
            module.register_forward_pre_hook(_noting(forms, path))
        estimate(watched, *self._inputs, **self._options)
        return find_groups(self.hollow, forms)


def _noting(forms: dict[str, Form], path: str) -> Callable[[nn.Module, tuple[object, ...]], None]:
    def note(module: nn.Module, inputs: tuple[object, ...]) -> None:
        tensors = tensors_in(inputs)
        if tensors:
            forms.setdefault(path, Form.of(tensors[0]))

    return note
