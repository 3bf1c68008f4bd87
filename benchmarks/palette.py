"""One colour for each competitor in every picture; those of modes are the package's own."""

from __future__ import annotations

from benchmarks.cases import FLOOR
from efficient_densenet.functional.modes import MODES
from efficient_densenet.modules.checkpointed import CHECKPOINTED

COLOURS = {
    "naive, torch.compile": "#7c3aed",
    "torch.compile, memory budget": "#c084fc",
    **{mode.label: mode.colour for mode in (*MODES.values(), CHECKPOINTED)},
    "torchvision": CHECKPOINTED.colour,
    "checkpoint per block": "#0f766e",
    "checkpoint per layer": "#2dd4bf",
    "save_on_cpu": "#be185d",
    "accumulation": "#0369a1",
    "mix": "#15803d",
    "fit_": "#15803d",
    str(FLOOR): "#111827",
}
"""By how names start, the longer ones first."""


def colour_of(name: str) -> str:
    """The colour of a competitor, whatever is said of it after its name."""
    return next(colour for start, colour in COLOURS.items() if name.startswith(start))


def line_of(name: str) -> str:
    """How the line of a competitor is drawn: what shares a colour differs in that."""
    if "torch.compile" in name:
        return ":"
    return "--" if "channels_last" in name else "-"
