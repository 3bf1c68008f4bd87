"""The memory of one training step, as a table, a dictionary or a picture."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from html import escape
from typing import TYPE_CHECKING

from efficient_densenet.memory.events import Event, Peak, live_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MIB = 2**20
NARROW = 25.0
"""Percent of a picture's width below which the name of a phase is written upwards."""


@dataclass(frozen=True, repr=False)
class StepReport:
    """Memory of one training step. ``print`` shows it as a table.

    Attributes:
        source: what counted: an allocator, or the live-storage meter.
        device: where the step ran, or whose allocator was modelled.
        kept: bytes that the forward pass leaves for the backward pass, the output included, but
            neither parameters, buffers, inputs nor optimizer state.
        peak: bytes that are alive at the peak, by kind: a
            :class:`~efficient_densenet.memory.events.Peak`.
        events: every allocation and release of a storage, in order.
        seconds: duration of one step, without instruments; ``None`` if it was not timed.
        allocated: bytes at the allocator's peak, everything on the device included; only on CUDA.
        requested: the same before the allocator rounds sizes up; only on CUDA.
    """

    source: str
    device: str
    kept: int
    peak: Peak
    events: Sequence[Event]
    seconds: float | None = None
    allocated: int | None = None
    requested: int | None = None

    def __repr__(self) -> str:
        return (
            f"<StepReport: peak {self.peak.total / MIB:,.1f} MiB, kept {self.kept / MIB:,.1f} MiB, "
            f"{self.source}, {self.device}>"
        )

    def __str__(self) -> str:
        lines = [f"{name:<22}{value:>12}  {note}".rstrip() for name, value, note in self._rows()]
        return "\n".join([f"Training step, MiB ({self._origin()})", *lines])

    def _repr_html_(self) -> str:
        cells = (
            "".join(
                f"<td style='text-align:{side}'>{escape(cell)}</td>"
                for side, cell in zip(("left", "right", "left"), row, strict=True)
            )
            for row in self._rows()
        )
        rows = "".join(f"<tr>{row}</tr>" for row in cells)
        caption = f"<caption>Training step, MiB ({escape(self._origin())})</caption>"
        return f"<table>{caption}{rows}</table>"

    def to_dict(self) -> dict[str, object]:
        """Everything except the events, in bytes and seconds; can be written as JSON."""
        return {
            "source": self.source,
            "device": self.device,
            "kept": self.kept,
            "peak": asdict(self.peak) | {"step": self.peak.step, "total": self.peak.total},
            "seconds": self.seconds,
            "allocated": self.allocated,
            "requested": self.requested,
        }

    def plot(self, axes: Axes | None = None, *, colour: str = "#2563eb") -> Axes:
        """Draw the live bytes after every allocation and release, with the phases of the step.

        The dotted line is what is kept for the backward pass. Needs matplotlib.

        Args:
            axes: where to draw; by default on a new figure.
            colour: colour of the area.
        """
        if axes is None:
            from matplotlib.figure import Figure

            axes = Figure(figsize=(6, 4), layout="constrained").subplots()
        live = [size / MIB for size in live_bytes(self.events)]
        part = [100 * i / len(live) for i in range(len(live))]
        axes.fill_between(part, live, step="post", color=colour, linewidth=0)
        axes.axhline(self.kept / MIB, color="black", linewidth=0.8, linestyle=":")
        end = 0.0
        for name, count in Counter(event.phase for event in self.events).items():
            start, end = end, end + 100 * count / len(live)
            axes.axvline(end, color="black", linewidth=1)
            axes.annotate(
                name,
                ((start + end) / 2, 0.99),
                xycoords=("data", "axes fraction"),
                va="top",
                ha="center",
                rotation=90 if end - start < NARROW else 0,
            )
        axes.set_title(
            f"kept {self.kept / MIB:,.0f}, peak {self.peak.step / MIB:,.0f} MiB",
            loc="left",
            fontsize="medium",
        )
        axes.set(
            xlabel="% of the step's allocations and releases",
            ylabel="live above parameters and batch, MiB",
            xlim=(0, 100),
            xticks=(0, 50, 100),
            ylim=(0, 1.15 * max(live)),  # room for the names of the phases
        )
        return axes

    def _origin(self) -> str:
        return f"{self.source}, {self.device}"

    def _rows(self) -> list[tuple[str, str, str]]:
        peak = self.peak
        parts = [
            ("parameters", peak.parameters, ""),
            ("buffers", peak.buffers, ""),
            ("inputs and target", peak.inputs, ""),
            ("optimizer state", peak.optimizer, ""),
            ("gradients", peak.gradients, ""),
            ("kept for backward", peak.activations, ""),
            ("transient", peak.transient, ""),
            ("peak", peak.total, f"in {peak.phase}, at {peak.operator}"),
            ("kept after forward", self.kept, ""),
        ]
        if peak.buckets:
            parts.insert(4, ("buckets", peak.buckets, "in which DDP exchanges gradients"))
        if self.allocated is not None:
            parts.append(("allocator's peak", self.allocated, ""))
        rows = [(name, f"{size / MIB:,.1f}", note) for name, size, note in parts]
        if self.seconds is not None:
            rows.append(("seconds", f"{self.seconds:,.3f}", ""))
        return rows
