"""What containers and objects hold: kept, and put back."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator

from efficient_densenet.convert.state.values import Nest

Contents = list[tuple[Nest, Nest]]
"""Containers, and copies of what they held."""


def contents_of(things: Iterable[Nest]) -> Contents:
    """What those of ``things`` hold that are lists, sets or dicts, or have attributes."""
    return [(inside, _copied(inside)) for thing in things for inside in _containers_in(thing)]


def put_back(contents: Contents) -> None:
    """Let containers hold what they held, if they do not."""
    for thing, held in contents:
        if _identities(thing) != _identities(held):
            thing.clear()
            thing.extend(held) if isinstance(thing, (list, deque)) else thing.update(held)


def _containers_in(thing: Nest) -> Iterator[Nest]:
    for inside in (thing, getattr(thing, "__dict__", None)):
        if isinstance(inside, (list, deque, set, dict)):
            yield inside


def _copied(container: Nest) -> Nest:
    return dict(container) if isinstance(container, dict) else [*container]


def _identities(container: Nest) -> list[int]:
    """What it holds; the things in it need not know whether they are equal."""
    items = [*container, *container.values()] if isinstance(container, dict) else container
    return [id(item) for item in items]
