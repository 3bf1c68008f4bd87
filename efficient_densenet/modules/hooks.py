"""Hooks inside a layer that is run twice, as they were; those that only look are called once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

Hook = Callable[..., Any]
OfPart = Mapping[str, Mapping[int, Any]]
"""The hooks of a module, by the attribute that holds them and their numbers."""

FORWARD = "_forward_hooks"
# What says how a hook is called goes with it when it is removed.
KINDS = (
    FORWARD,
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


class Hooks:
    """The hooks below ``module`` at this moment: some remove themselves, or live in a context.

    A forward hook only looks if it returns nothing, and neither overwrites a tensor that it gets
    nor registers a hook on one.
    """

    def __init__(self, module: nn.Module) -> None:
        self.parts = list(module.modules())
        self.then: list[OfPart] = [
            {kind: dict(vars(part)[kind]) for kind in KINDS if vars(part).get(kind)}
            for part in self.parts
        ]
        self.acting: set[tuple[int, int]] = set()

    @contextmanager
    def watched(self) -> Iterator[None]:
        """A context in which every hook is called, and what a forward hook does is noted.

        Hooks may come and go meanwhile.
        """
        for i, part in enumerate(self.parts):
            for number, hook in self.then[i].get(FORWARD, {}).items():
                part._forward_hooks[number] = self._watch((i, number), hook)
        try:
            yield
        finally:
            for i, part in enumerate(self.parts):
                for number, hook in self.then[i].get(FORWARD, {}).items():
                    if number in part._forward_hooks:
                        part._forward_hooks[number] = hook

    @contextmanager
    def again(self) -> Iterator[None]:
        """A context with the hooks of then, of forward ones only those that did more than look."""
        replaced = []
        try:
            for i, part in enumerate(self.parts):
                for kind in KINDS:
                    now, then = vars(part).get(kind, {}), self.then[i].get(kind, {})
                    if now or then:
                        replaced.append((part, kind, now))
                        vars(part)[kind] = OrderedDict(then)
                        if kind == FORWARD:
                            self._leave_acting(i, vars(part)[kind])
            yield
        finally:
            for part, kind, now in replaced:  # to which the handles of hooks refer
                vars(part)[kind] = now

    def _leave_acting(self, i: int, hooks: OrderedDict[int, Hook]) -> None:
        for number in list(hooks):
            if (i, number) not in self.acting:
                del hooks[number]

    def _watch(self, key: tuple[int, int], hook: Hook) -> Hook:
        def watched(module: nn.Module, *args: Any) -> Any:
            before = _marks(args)
            result = hook(module, *args)
            if result is not None or _marks(args) != before:
                self.acting.add(key)
            return result

        return watched


def _marks(args: Any) -> list[tuple[int, int]]:
    """What changes when tensors are overwritten or hooked."""
    tensors = (leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor))
    return [(t._version, len(t._backward_hooks or ())) for t in tensors]
