"""How a forward function wires its children: asked by giving it children that only take notes.

For classes that no library has. The function runs on a shallow copy, in training and in evaluation,
and the notes must agree with what is expected bit for bit.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class _Note(nn.Module):
    """Remembers what it was given, and returns something new."""

    def forward(self, x: Any) -> Tensor:
        self.seen = x if isinstance(x, Tensor) else torch.cat(list(x), 1)
        self.given = torch.randn(2, 3, *self.seen.shape[2:])
        return self.given


def runs_in_order(module: nn.Module) -> bool:
    """Whether each child of a sequence reads what the one before returned, and that is all."""
    if type(module).forward is nn.Sequential.forward:
        return True
    for training in (True, False):
        notes = {name: _Note() for name in module._modules}
        x = torch.randn(2, 2, 4, 4)
        out = _asked(module, notes, training, x)
        for note in notes.values():
            if not hasattr(note, "seen") or note.seen is not x:
                return False
            x = note.given
        if out is not x:
            return False
    return True


def returned_maps(block: nn.Module, container: str) -> str | None:
    """What a block whose layers are in ``container`` returns, if it connects them densely.

    ``"features"``: the concatenation of the input and all new maps; ``"new"``: of the new ones.
    ``None`` if any layer reads anything but the concatenation of all maps before it.
    """
    answers = set()
    for training in (True, False):
        notes = [_Note() for _ in getattr(block, container)]
        x = torch.randn(2, 5, 4, 4)
        out = _asked(block, {container: nn.ModuleList(notes)}, training, x)
        maps = [x]
        for note in notes:
            if not hasattr(note, "seen") or not _equal(note.seen, maps):
                return None
            maps.append(note.given)
        answers.add("features" if _equal(out, maps) else "new" if _equal(out, maps[1:]) else None)
    return answers.pop() if len(answers) == 1 else None


def _equal(found: Any, maps: Sequence[Tensor]) -> bool:
    return isinstance(found, Tensor) and torch.equal(found, torch.cat(list(maps), 1))


def _asked(module: nn.Module, notes: dict[str, Any], training: bool, x: Tensor) -> Any:
    """The result of the forward function with other children, ``None`` if it fails on them."""
    twin = copy.copy(module)
    vars(twin).update(_modules=dict(notes), training=training)
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            return type(module).forward(twin, x)
    except Exception:
        return None
