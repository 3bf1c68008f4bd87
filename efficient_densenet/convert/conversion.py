"""Converts a model in place, reverts it, and explains what recomputes and what does not."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from efficient_densenet.convert.converted import (
    Converted,
    check_convertible,
    converted_class,
    is_derived,
)
from efficient_densenet.convert.fronts import DenseFront, NormFront, SequenceFront
from efficient_densenet.convert.kept_bytes import kept_bytes
from efficient_densenet.convert.layers import run_again
from efficient_densenet.convert.recognition.match import DenseMatch, match_norm
from efficient_densenet.convert.recording.inputs import input_for
from efficient_densenet.convert.recording.record import record
from efficient_densenet.convert.recording.twin import Unrecordable
from efficient_densenet.convert.report import Finding, Report
from efficient_densenet.convert.state.values import CHOICES, Nest, class_of, set_class
from efficient_densenet.convert.survey import Found, Survey
from efficient_densenet.modules.block import EfficientDenseBlock
from efficient_densenet.modules.reading import CONVS, NORMS, POOLS, Unsupported
from efficient_densenet.modules.recomputing import Settings
from efficient_densenet.modules.sequence import RecomputingSequence, iterates_plainly

FilterFn = Callable[[nn.Module, str], bool]
Recomputes = Literal["bottleneck", "norm"]
FILTERED = "filter_fn leaves it out"
IN_PARTS = "its parts are called one by one"


def convert_(
    model: nn.Module,
    *,
    filter_fn: FilterFn | None = None,
    recompute: Recomputes = "bottleneck",
    strict: bool = False,
) -> Report:
    """Make the dense blocks of ``model`` recompute, in place, and report on every one.

    Outputs, gradients and running statistics stay the same up to rounding; only dropout draws other
    masks. Blocks, transitions and stems are recognised by what they compute, whatever their classes
    are: the model's forward pass is recorded on tensors without values, and changes nothing in it.

    A converted module gets a subclass of its class. Nothing else about it changes: children,
    parameters, state-dict keys, hooks and references to them stay, and it can be copied and
    pickled. Every call checks whether the module has changed since. A call that the efficient path
    does not support runs the class's own forward function; a warning says why, and
    ``module.why_naive(x)`` says it beforehand.

    Args:
        model: any model, or a single block.
        filter_fn: called with each recognised module and its name in ``model``; a module for which
            it returns false is left as it is.
        recompute: ``"bottleneck"`` keeps only the features, ``"norm"`` the bottleneck maps too. To
            change it, convert the model again.
        strict: if the model has no dense block, or one that ``filter_fn`` accepts and that would
            not recompute, change nothing and raise an error.

    Returns:
        What was converted and what was not, with the reason; as text, a table.

    Raises:
        ValueError: if ``recompute`` is none of these, or because of ``strict``; the message then
            names each block and the reason.
    """
    if recompute not in get_args(Recomputes):
        raise ValueError(
            f"recompute must be one of {get_args(Recomputes)}, got {recompute!r}; revert_ goes back"
        )
    candidates = _candidates(model, filter_fn)
    if strict:
        _check_none_is_left(candidates)
    for candidate in candidates:
        candidate.convert_(recompute)
    return _report(candidates)


def _check_none_is_left(candidates: list[_Candidate]) -> None:
    blocks = [c for c in candidates if c.kind == "dense block"]
    left = [c for c in blocks if c.reason not in (None, FILTERED)]
    if left:
        reasons = "; ".join(f"{c.path or 'the model'}: {c.reason}" for c in left)
        raise ValueError(f"{len(left)} dense block(s) cannot be converted: {reasons}")
    if not blocks:
        raise ValueError("no dense block was recognised")


def revert_(model: nn.Module) -> None:
    """Give every converted module of ``model`` its own class back, in place.

    The model then runs its own forward functions again. Parameters and buffers stay as they are.

    Raises:
        ValueError: if a class was derived from that of a converted module since, as ``fully_shard``
            does; nothing is changed then.
    """
    for path, module in model.named_modules():
        if is_derived(cls := type(module)):
            raise ValueError(
                f"{path or 'the model'} is a {cls.__name__}, a class derived from that of a "
                "converted module: revert the model before that is made"
            )
    for module in model.modules():
        if isinstance(module, Converted):
            set_class(module, module._recomputing_original)
            for choice in CHOICES:
                vars(module).pop(choice, None)


def explain(model: nn.Module, *inputs: Any) -> Report:
    """Which modules of ``model`` recompute, which could, and which cannot and why.

    Nothing is changed.

    Args:
        model: any module, converted or not.
        inputs: arguments of a call. With them the answers are for maps of the sizes that this call
            would have, and the report says how many bytes each module keeps for the backward pass.
            Only their shapes and types are used: nothing is computed.

    Returns:
        A finding for each recognised module; as text, a table.
    """
    candidates = _candidates(model, None, inputs or None)
    return _report(candidates, measured=bool(inputs))


@dataclass(frozen=True)
class _Candidate:
    """A module that was recognised, what it would become, or why it would not."""

    module: nn.Module
    path: str
    found: Found
    reason: str | None
    is_native: bool
    is_wanted: bool

    @property
    def kind(self) -> str:
        return self.found.front._recomputing_kind

    def convert_(self, recompute: Recomputes) -> None:
        if self.is_native or not self.is_wanted:
            return
        if not is_derived(type(self.module)):
            set_class(self.module, converted_class(class_of(self.module), self.found.front))
        self.found.teach(self.module)
        if isinstance(self.module, Settings):
            vars(self.module)["_recomputing_mode"] = recompute

    def finding(self, naive: int | None, kept: int | None) -> Finding:
        again: Iterable[str] = ()
        if isinstance(self.module, EfficientDenseBlock):
            again = self.module.why_run_again()
        elif isinstance(self.found.match, DenseMatch):
            again = run_again(self.module, self.found.match)
        return Finding(
            path=self.path,
            kind=self.kind,
            class_name=type(self.module).__name__,
            converted=self.is_native or isinstance(self.module, Converted),
            reason=self.reason,
            run_again=tuple(again),
            naive_bytes=naive,
            kept_bytes=naive if self.reason else kept,
        )


def _candidates(
    model: nn.Module, filter_fn: FilterFn | None, inputs: tuple[Nest, ...] | None = None
) -> list[_Candidate]:
    """Every recognised module, in the order of ``named_modules``."""
    survey = Survey(model, inputs)
    modules = dict(model.named_modules())
    found = _convertible(modules, survey.found)
    found |= _convertible(modules, _sequences(modules, found))
    candidates = []
    for path, module in modules.items():
        if path in found:
            candidates.append(_candidate(module, path, found[path], survey, filter_fn))
    return candidates


def _convertible(modules: dict[str, nn.Module], found: dict[str, Found]) -> dict[str, Found]:
    """What was found, without what no converted class can stand for."""
    checked = {}
    for path, what in found.items():
        module = modules[path]
        try:
            if what.match is not None and not _is_native(module):
                check_convertible(module, what.front)
        except Unsupported as reason:
            what = replace(what, match=None, reason=reason.with_traceback(None))
        checked[path] = what
    return checked


def _is_native(module: nn.Module) -> bool:
    return isinstance(module, Settings) and not isinstance(module, Converted)


def _sequences(modules: dict[str, nn.Module], blocks: dict[str, Found]) -> dict[str, Found]:
    """The sequences that hold dense blocks, and norms in their stems that only they would see."""
    found: dict[str, Found] = {}
    for path, what in blocks.items():
        holder = path.rpartition(".")[0]
        is_block = path and what.front is DenseFront and what.match is not None
        if is_block and holder not in blocks and holder not in found:
            module = modules[holder]
            native = isinstance(module, RecomputingSequence) and not isinstance(module, Converted)
            is_sequence = class_of(module).forward is nn.Sequential.forward
            if native or (is_sequence and iterates_plainly(module)):
                found[holder] = Found(SequenceFront, SequenceFront)
                found |= {f"{holder}.{name}": norm for name, norm in _norm_of_stem(module)}
    return found


def _norm_of_stem(sequence: nn.Module) -> Iterator[tuple[str, Found]]:
    """The second child if it is a norm with an activation, between convolution and pooling."""
    children = [(name, child) for name, child in sequence._modules.items() if child is not None]
    if len(children) > 2:
        (_, conv), (name, norm), (_, pool) = children[:3]
        is_other_norm = isinstance(norm, _BatchNorm) and type(norm) not in NORMS
        if type(conv) in CONVS and is_other_norm and type(pool) in POOLS:
            with suppress(Unsupported, Unrecordable):
                recording = record(norm, (x := input_for(norm),))
                yield name, Found(NormFront, match_norm(recording, recording.root), (x,))


def _candidate(
    module: nn.Module, path: str, found: Found, survey: Survey, filter_fn: FilterFn | None
) -> _Candidate:
    is_converted, is_native = isinstance(module, Converted), _is_native(module)
    if path in survey.in_parts:
        return _Candidate(module, path, found, IN_PARTS, is_native, False)
    reason, is_wanted = found.why_naive(module), found.match is not None
    if is_wanted and not is_native and filter_fn is not None and not filter_fn(module, path):
        reason, is_wanted = reason if is_converted else FILTERED, False
    return _Candidate(module, path, found, reason, is_native, is_wanted)


def _report(candidates: list[_Candidate], measured: bool = False) -> Report:
    found = {candidate.path: candidate.found for candidate in candidates}
    findings = []
    for candidate in candidates:
        sizes = kept_bytes(candidate.module, candidate.path, found) if measured else (None, None)
        findings.append(candidate.finding(*sizes))
    return Report(tuple(findings))
