"""Converts a model in place, takes it back, and says what is what: one explicit walk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal, NamedTuple

from torch import nn

from efficient_densenet.convert import libraries, recipes
from efficient_densenet.convert.classes import Converted
from efficient_densenet.convert.recipes import Recipe
from efficient_densenet.convert.report import Finding, Report
from efficient_densenet.modules.block import RecomputingBlock

FilterFn = Callable[[nn.Module, str], bool]
Mode = Literal["auto", "bottleneck", "norm"]
MODES: dict[str, Literal["bottleneck", "norm"]] = {
    "auto": "bottleneck",
    "bottleneck": "bottleneck",
    "norm": "norm",
}
FILTERED = "filter_fn leaves it out"


def convert_(
    model: nn.Module,
    *,
    filter_fn: FilterFn | None = None,
    recompute: Mode = "auto",
    strict: bool = False,
) -> Report:
    """Make the dense blocks of ``model`` recompute, in place, and report on every one.

    A converted module gets a subclass of its class; nothing else about it changes: children,
    parameters, state-dict keys, hooks and what refers to them stay, and so do copies and pickles.
    Known transitions and stems are converted with the blocks. A call that the efficient path does
    not support runs on the class's own forward function, whatever the reason;
    ``why_naive(x)`` of a converted module says it.

    Args:
        model: a model of torchvision, timm, MONAI, torchxrayvision, torchreid,
            segmentation_models_pytorch or pytorchcv, or one with blocks whose layers are in a list
            (as in the Tiramisu), or any that contains such. A single block will do.
        filter_fn: called with each recognised module and its name in ``model``; one for which it
            is false is left as it is.
        recompute: ``"bottleneck"`` keeps the features alone, ``"norm"`` the bottleneck maps too;
            ``"auto"`` is ``"bottleneck"``. A converted model may be converted again to change it.
        strict: raise unless every recognised dense block that ``filter_fn`` lets through can be
            converted. Nothing is changed then.

    Returns:
        What was replaced and what was not, with the reason; as text, a table.

    Raises:
        ValueError: if ``recompute`` is none of these, or ``strict`` finds a block left over.
    """
    if recompute not in MODES:
        raise ValueError(
            f"recompute must be one of {tuple(MODES)}, got {recompute!r}; revert_ goes back"
        )
    candidates = _walk(model, filter_fn)
    left = [c for c in candidates if c.is_left_over()]
    if strict and left:
        reasons = "; ".join(f"{c.path or 'the model'}: {c.recipe.reason}" for c in left)
        raise ValueError(f"{len(left)} dense block(s) cannot be converted: {reasons}")
    for module, _, recipe in candidates:
        if recipe.new_class is not None:
            module.__class__ = recipe.new_class
            if isinstance(module, RecomputingBlock):
                module.recompute = MODES[recompute]
    return _report(candidates)


def revert_(model: nn.Module) -> None:
    """Give every converted module of ``model`` its own class back, in place."""
    for module in model.modules():
        if isinstance(module, Converted):
            module.__class__ = module.original  # type: ignore[assignment]
            for choice in ("_recompute", "_kernels"):
                vars(module).pop(choice, None)


def explain(model: nn.Module) -> Report:
    """What of ``model`` recomputes, what could, and what cannot and why; nothing is changed."""
    return _report(_walk(model, None))


class _Candidate(NamedTuple):
    module: nn.Module
    path: str
    recipe: Recipe

    def is_left_over(self) -> bool:
        kind, reason = self.recipe.kind, self.recipe.reason
        return kind == "dense block" and reason not in (None, FILTERED, recipes.ALREADY)


def _walk(model: nn.Module, filter_fn: FilterFn | None) -> list[_Candidate]:
    """Every recognised module, in the order of ``named_modules``."""
    by_name = dict(libraries.below_called_by_name(model))
    recognised = {path: recipes.recognise(module) for path, module in model.named_modules()}
    holders = {
        path.rpartition(".")[0]
        for path, recipe in recognised.items()
        if path and recipe and recipe.kind == "dense block" and recipe.new_class
    }
    candidates = []
    for path, module in model.named_modules():
        recipe = recognised[path] or (recipes.sequence(module) if path in holders else None)
        if recipe is None:
            continue
        if recipe.new_class:
            reason = _called_by_name(path, recipe, by_name)
            if not reason and filter_fn is not None and not filter_fn(module, path):
                reason = FILTERED
            recipe = replace(recipe, new_class=None, reason=reason) if reason else recipe
        candidates.append(_Candidate(module, path, recipe))
    return candidates


def _called_by_name(path: str, recipe: Recipe, by_name: dict[str, str]) -> str | None:
    """Why a module that is never called as a whole is left, ``None`` for all others."""
    for container, network in by_name.items():
        if recipe.kind != "dense block" and f"{path}.".startswith(f"{container}."):
            return f"{network} calls its parts one by one"
    return None


def _report(candidates: list[_Candidate]) -> Report:
    return Report(
        tuple(
            Finding(
                path=path,
                kind=recipe.kind,
                class_name=type(module).__name__,
                library=recipe.library,
                converted=isinstance(module, Converted),
                reason=recipe.reason,
            )
            for module, path, recipe in candidates
        )
    )
