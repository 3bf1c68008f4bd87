"""What PyTorch is made to do otherwise while a forward pass is recorded."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils.checkpoint import CheckpointFunction

ONE_AT_A_TIME = threading.RLock()
"""Held while something is replaced."""
NOTHING = object()


@contextmanager
def plain_checkpoints(note: Callable[[], None]) -> Iterator[None]:
    """A context in which a reentrant checkpoint runs its function as if there were none.

    Otherwise autograd sees none of its operations, and nothing tells which of them it would not see
    without the checkpoint either. ``note`` is called for each in this thread.
    """
    thread = threading.get_ident()

    def apply(function: Callable[..., Any], preserve: bool, *args: Any) -> Any:
        if threading.get_ident() == thread:
            note()
        return function(*args)

    with ONE_AT_A_TIME, _replaced(CheckpointFunction, "apply", staticmethod(apply)):
        yield


@contextmanager
def _replaced(owner: Any, name: str, value: object) -> Iterator[None]:
    before = vars(owner).get(name, NOTHING)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before is NOTHING:
            delattr(owner, name)
        else:
            setattr(owner, name, before)
