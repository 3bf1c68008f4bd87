"""Specifications as text, for operators: those take strings, but no objects of ours.

The text is complete, so that it means the same in another process.
"""

from __future__ import annotations

import ast
from dataclasses import fields, is_dataclass
from functools import lru_cache
from typing import Any

import torch

from efficient_densenet.functional.precision import Types
from efficient_densenet.functional.spec import BlockSpec, LayerSpec, StemSpec, UnitSpec
from efficient_densenet.kernels.interface import Activation, Geometry, Pool

KINDS: dict[str, type] = {
    kind.__name__: kind
    for kind in (BlockSpec, StemSpec, LayerSpec, UnitSpec, Types, Activation, Geometry, Pool)
}


def encode(spec: BlockSpec | StemSpec) -> str:
    """``spec`` as the text of nested tuples, each with the name of its type first."""
    return repr(_plain(spec))


@lru_cache(maxsize=1024)
def decode(text: str) -> Any:
    """The inverse of :func:`encode`."""
    return _built(ast.literal_eval(text))


def _plain(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return ("dtype", str(value))
    if is_dataclass(value):
        return (type(value).__name__, *[_plain(getattr(value, f.name)) for f in fields(value)])
    if isinstance(value, tuple):
        return (type(value).__name__, *[_plain(part) for part in value])
    return value


def _built(value: Any) -> Any:
    if not isinstance(value, tuple):
        return value
    kind, *parts = value
    if kind == "dtype":
        return getattr(torch, parts[0].removeprefix("torch."))
    values = map(_built, parts)
    return tuple(values) if kind == "tuple" else KINDS[kind](*values)
