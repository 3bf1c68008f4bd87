"""Records a forward pass as a graph of ATen operations, on a copy of the module without values.

What is recorded holds for every shape and type: whatever Python asks of a map is noted.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import combinations

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import _disable_current_modes

from efficient_densenet.convert.recording.arguments import own_class, stand_ins
from efficient_densenet.convert.recording.graph import Note, Recording
from efficient_densenet.convert.recording.outside import put_back_outside
from efficient_densenet.convert.recording.questions import told_to
from efficient_densenet.convert.recording.tracer import Tracer
from efficient_densenet.convert.recording.twin import (
    Unrecordable,
    plain_attributes,
    tensors_in,
    told,
    twin_of,
    untouched_random_numbers,
)
from efficient_densenet.convert.state.values import Nest

MOST_QUESTIONS = 3
"""Of how many all combinations of answers are tried."""


def record(
    module: nn.Module,
    args: Sequence[Nest],
    kwargs: Mapping[str, Nest] | None = None,
    *,
    training: bool | None = None,
) -> Recording:
    """What ``module(*args, **kwargs)`` does, without doing it.

    Tensors among the arguments give their shapes and types; no value is read, nothing is changed.
    ``training`` is the mode of the module and all in it, ``None`` the one that each is in. A
    forward pass that fails on stand-ins is recorded up to there.

    Raises:
        Unrecordable: if it does not even start, or leaves traces.
    """
    recording, answered = _recorded(module, args, kwargs or {}, training)

    def outline(contrary: frozenset[str] = frozenset(), made: type[Tensor] | None = None) -> Nest:
        try:
            return _recorded(module, args, kwargs or {}, training, contrary, made)[0].outline()
        except Unrecordable as reason:
            return str(reason)

    first, few = recording.outline(), len(answered) <= MOST_QUESTIONS
    outlines = {others: outline(others) for others in _subsets(answered)} if few else {}
    outlines[frozenset()] = first
    for question, notes in answered.items():
        if not few or any(outlines[o] != outlines[o - {question}] for o in outlines):
            recording.notes += notes
    for own in dict.fromkeys(filter(None, map(own_class, tensors_in((args, kwargs))))):
        # It says itself, when it runs, what its operations make.
        if any(outline(made=made) != first for made in (Tensor, own)):
            text = f"does something else with a {own.__name__}"
            recording.notes.append(Note(text, recording.root))
    return recording


def _subsets(names: Collection[str]) -> Iterator[frozenset[str]]:
    """All subsets of names but the empty one."""
    for number in range(1, len(names) + 1):
        yield from map(frozenset, combinations(names, number))


def _recorded(
    module: nn.Module,
    args: Sequence[Nest],
    kwargs: Mapping[str, Nest],
    training: bool | None,
    contrary: frozenset[str] = frozenset(),
    made: type[Tensor] | None = None,
) -> tuple[Recording, dict[str, list[Note]]]:
    """A recording, and by their names the questions that had two answers.

    To those that are ``contrary`` the answer is the other one. Arguments are of their own classes
    if ``made`` is given, the class of what operations make.
    """
    with ExitStack() as stack:
        stack.enter_context(_disable_current_modes())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor))
        twin = twin_of(module)
        if training is not None:
            _set_mode(twin.module, training)
        before = plain_attributes(twin.module)
        outside = stack.enter_context(put_back_outside(twin.module))
        stack.enter_context(untouched_random_numbers())
        tracer = Tracer(twin.paths, contrary, made or Tensor)
        stack.enter_context(told_to(tracer, twin.module))
        stack.enter_context(torch._C.DisableTorchFunctionSubclass())
        given = stand_ins((tuple(args), {**kwargs}), as_own=made is not None)
        recording = tracer.run(twin.module, *given)
        recording.patched = twin.patched
    after = plain_attributes(twin.module)
    for path in dict.fromkeys((*before, *after)):
        was, now = before.get(path, {}), after.get(path, {})
        for name in dict.fromkeys((*was, *now)):
            if name not in was or name not in now or was[name] != now[name]:
                call = recording.last_call(path)
                changed = f"{path}.{name}" if path else name
                recording.notes.append(Note("changes {} when it runs", call, changed))
    for path, name in outside:
        recording.notes.append(Note("changes {} when it runs", recording.last_call(path), name))
    return recording, tracer.answered


def _set_mode(module: nn.Module, training: bool) -> None:
    try:
        module.train(training)
    except Exception as error:
        raise Unrecordable(f"Its mode cannot be changed ({told(error)}).") from error
