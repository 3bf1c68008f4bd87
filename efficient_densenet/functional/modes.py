"""What the backward pass recomputes: the one table of modes, which everything else reads."""

from __future__ import annotations

from typing import Literal, NamedTuple

Recompute = Literal["none", "norm", "bottleneck"]


class Mode(NamedTuple):
    """A value of the argument ``recompute``.

    Attributes:
        name: the value itself.
        label: what tables and pictures call a network in this mode.
        colour: its colour in every picture.
        keeps: what a dense block keeps for its backward pass, in words.
        keeps_bottlenecks: whether the outputs of convolutions inside a layer are kept, so that
            none of a unit runs twice.
    """

    name: Recompute
    label: str
    colour: str
    keeps: str
    keeps_bottlenecks: bool = True


MODES: dict[str, Mode] = {
    mode.name: mode
    for mode in (
        Mode("none", "naive", "#8a94a6", "every concatenation and every normalised map"),
        Mode("norm", "norm", "#2563eb", "the features and the bottleneck maps"),
        Mode("bottleneck", "bottleneck", "#c2410c", "only the features", keeps_bottlenecks=False),
    )
}
"""Every mode by its name, from the one that keeps most to the one that keeps least."""


def check_recompute(name: str) -> None:
    """Raise ``ValueError`` unless ``name`` is a mode."""
    if name not in MODES:
        raise ValueError(f"recompute must be one of {tuple(MODES)}, got {name!r}")
