"""What was chosen for a budget, and how it is shown."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from typing import NamedTuple

from efficient_densenet.fit.times import Times
from efficient_densenet.memory.sizes import format_size

MIB = 2**20
MOST_ROWS = 10


class Chosen(NamedTuple):
    """A module and its mode.

    Attributes:
        path: the module's name in the model.
        mode: the value that its ``recompute`` was given.
        kept: bytes that it keeps above what it would keep in the mode that keeps least.
        seconds: duration of its forward and backward pass.

    Modules that run together, such as a block and the transition that reads it, have one ``kept``
    and one ``seconds`` for all of them. The first one has these values; those of the others are 0.
    """

    path: str
    mode: str
    kept: int
    seconds: float


class Uniform(NamedTuple):
    """A model whose modules are all in one mode.

    Attributes:
        peak: estimated bytes at the peak of a step.
        seconds: duration of the modules' forward and backward passes; infinite if one of them fits
            in no mix in this mode, and so was not timed.
    """

    peak: int
    seconds: float


@dataclass(frozen=True, repr=False)
class Mix:
    """A mode for each module: the fastest mix of modes whose step fits a budget.

    ``print`` shows it as a table.

    Attributes:
        room: bytes that a step may use: the budget without the device's reserve.
        peak: estimated bytes at the peak of a step.
        least: estimated bytes at the peak in the mix that needs least.
        chosen: the modules that have a mode, in the order of the forward pass, each as a
            :class:`Chosen`.
        uniform: for each mode, the same model with that mode everywhere, as a :class:`Uniform`.
        times: seconds of every choice, to be passed to another call as ``times``.
        clock: where the times come from: ``"measured"``, ``"modelled"`` or ``"given"``.
    """

    room: int
    peak: int
    least: int
    chosen: tuple[Chosen, ...]
    uniform: Mapping[str, Uniform]
    times: Times
    clock: str

    @property
    def seconds(self) -> float:
        """Seconds that all modules with a mode take, forward and backward."""
        return sum(part.seconds for part in self.chosen)

    def __repr__(self) -> str:
        return (
            f"<Mix: peak {format_size(self.peak)} of {format_size(self.room)}, "
            f"{len(self.chosen)} modules, {self.seconds:.3g} s>"
        )

    def __str__(self) -> str:
        rows = self._rows()
        first, second = (max(len(row[i]) for row in rows) for i in (0, 1))
        return "\n".join(
            f"{name:<{first}}  {mode:<{second}}  {size:>12}  {time:>9}".rstrip()
            for name, mode, size, time in rows
        )

    def _repr_html_(self) -> str:
        cells = ("".join(f"<td>{escape(cell)}</td>" for cell in row) for row in self._rows())
        return "<table>" + "".join(f"<tr>{row}</tr>" for row in cells) + "</table>"

    def to_dict(self) -> dict[str, object]:
        """Everything except the times, in bytes and seconds; can be written as JSON."""
        return {
            "room": self.room,
            "peak": self.peak,
            "least": self.least,
            "seconds": self.seconds,
            "clock": self.clock,
            "chosen": [part._asdict() for part in self.chosen],
            "uniform": {
                mode: {"peak": each.peak, "seconds": _finite(each.seconds)}
                for mode, each in self.uniform.items()
            },
        }

    def _rows(self) -> list[tuple[str, str, str, str]]:
        rows = [("module", "mode", "keeps more", "time")]
        rows += [_row(*part) for part in self.chosen[:MOST_ROWS]]
        rest = self.chosen[MOST_ROWS:]
        if rest:
            kept, seconds = sum(p.kept for p in rest), sum(p.seconds for p in rest)
            rows.append(_row(f"{len(rest)} more", "", kept, seconds))
        rows.append(("together", self.clock, *_sizes(self.peak, self.seconds)))
        rows += [("everywhere", mode, *_sizes(*each)) for mode, each in self.uniform.items()]
        rows.append(("budget", "", format_size(self.room), ""))
        return rows


def _row(path: str, mode: str, kept: int, seconds: float) -> tuple[str, str, str, str]:
    return path, mode, *(_sizes(kept, seconds) if kept or seconds else ("", ""))


def _sizes(size: int, seconds: float) -> tuple[str, str]:
    finite = _finite(seconds)
    return format_size(size), "not timed" if finite is None else f"{1000 * finite:,.1f} ms"


def _finite(seconds: float) -> float | None:
    return seconds if math.isfinite(seconds) else None
