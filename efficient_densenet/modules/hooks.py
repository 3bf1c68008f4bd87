"""Forward hooks inside a layer that is run twice: those that only look are called once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

Hook = Callable[..., Any]


class Hooks:
    """The forward hooks below ``module`` at this moment.

    A hook only looks if it returns nothing, and neither overwrites a tensor that it gets nor
    registers a hook on one.
    """

    def __init__(self, module: nn.Module) -> None:
        self.parts = [part for part in module.modules() if part._forward_hooks]
        self.acting: set[tuple[int, int]] = set()

    @contextmanager
    def watched(self) -> Iterator[None]:
        """A context in which every hook is called, and what it does is noted."""
        with self._replaced(lambda key, hook: self._watch(key, hook)):
            yield

    @contextmanager
    def acting_only(self) -> Iterator[None]:
        """A context in which only those are called that did more than look."""
        with self._replaced(lambda key, hook: hook if key in self.acting else None):
            yield

    def _watch(self, key: tuple[int, int], hook: Hook) -> Hook:
        def watched(module: nn.Module, *args: Any) -> Any:
            before = _marks(args)
            result = hook(module, *args)
            if result is not None or _marks(args) != before:
                self.acting.add(key)
            return result

        return watched

    @contextmanager
    def _replaced(self, change: Callable[[tuple[int, int], Hook], Hook | None]) -> Iterator[None]:
        originals = [part._forward_hooks for part in self.parts]
        try:
            for i, part in enumerate(self.parts):
                changed = ((id, change((i, id), hook)) for id, hook in originals[i].items())
                part._forward_hooks = OrderedDict((id, hook) for id, hook in changed if hook)
            yield
        finally:
            for part, hooks in zip(self.parts, originals, strict=True):
                part._forward_hooks = hooks


def _marks(args: Any) -> list[tuple[int, int]]:
    """What changes when tensors are overwritten or hooked."""
    tensors = (leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor))
    return [(t._version, len(t._backward_hooks or ())) for t in tensors]
