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
        path: of the module.
        mode: that it was given.
        kept: bytes that it keeps more than in the mode that keeps least, together with what runs
            with it; only the first of those has them, and ``seconds``.
        seconds: of its forward and backward pass.
    """

    path: str
    mode: str
    kept: int
    seconds: float


class Uniform(NamedTuple):
    """A model whose modules are all in one mode: estimated peak, and seconds of its modules.

    They are infinite where a module in this mode fits in no mix, and was not timed.
    """

    peak: int
    seconds: float


@dataclass(frozen=True, repr=False)
class Mix:
    """A mode for each module, so that a step fits a budget and takes least time.

    ``print`` shows it as a table.

    Attributes:
        room: bytes of the budget that a step may use.
        peak: bytes at the largest moment, estimated.
        least: bytes that the step needs in any mix.
        chosen: the modules that have a mode, in the order of the forward pass.
        uniform: by mode, the same model with that mode everywhere.
        times: seconds of every choice: for another call's ``times``.
        clock: ``"measured"``, ``"modelled"`` or ``"given"``: where the times come from.
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
        """Time of all modules that have a mode."""
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
        """All but the times, in bytes and seconds, fit for JSON."""
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
