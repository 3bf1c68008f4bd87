"""What a run leaves to look at: curves as PNG, and a summary."""

from __future__ import annotations

import json
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from statistics import harmonic_mean
from typing import TypedDict

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.console import Console
from rich.table import Table

from efficient_densenet.training.config import TrainConfig

TRAIN_COLOUR, TEST_COLOUR, GRID_COLOUR = "#8a94a6", "#c2410c", "#e5e7eb"

History = list[dict[str, float]]


class Summary(TypedDict):
    """A run in numbers, with their conditions; accuracies are between 0 and 1.

    ``images_per_second`` counts training only, over all epochs; accuracies are of the last epoch,
    the training one as its steps computed it; memory is that of one training step, in bytes.
    """

    model: str
    depth: int | None
    growth_rate: int | None
    recompute: str
    parameters: int
    batch_size: int
    image_size: int
    epochs: int
    train_size: int | None
    train_accuracy: float
    test_accuracy: float
    images_per_second: float
    peak_bytes: int
    naive_peak_bytes_estimated: int
    precision: str
    hardware: str
    torch: str
    lightning: str
    efficient_densenet: str
    date: str


def plot(history: History, path: Path) -> None:
    """Draw error and loss against epochs, for training and test images, as PNG.

    Args:
        history: one row for each epoch, with ``epoch``, ``{train,test}_accuracy`` (0 to 1) and
            ``{train,test}_loss``.
        path: the file to write.
    """
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    _curves(left, history, "accuracy", scale=100)
    left.set_title("Accuracy, %", loc="left")
    _curves(right, history, "loss")
    right.set_title("Cross-entropy, nats", loc="left")
    figure.savefig(path, dpi=150)


def _curves(axes: Axes, history: History, quantity: str, scale: float = 1) -> None:
    epochs = [row["epoch"] for row in history]
    for split, colour in (("train", TRAIN_COLOUR), ("test", TEST_COLOUR)):
        values = [scale * row[f"{split}_{quantity}"] for row in history]
        axes.plot(epochs, values, color=colour, marker="o", markersize=4, clip_on=False, zorder=3)
        axes.annotate(
            f"{split} {values[-1]:.3g}",
            (epochs[-1], values[-1]),
            xytext=(8, 0),
            textcoords="offset points",
            color=colour,
            va="center",
        )
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y", color=GRID_COLOUR)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(length=0)


def summarise(
    config: TrainConfig,
    history: History,
    peak_bytes: int,
    naive_peak_bytes: int,
    device: torch.device,
) -> Summary:
    """The run in numbers."""
    last = history[-1]
    return {
        "model": config.model,
        "depth": config.depth,
        "growth_rate": config.growth_rate,
        "recompute": "mixed" if config.mix else config.recompute,
        "parameters": sum(p.numel() for p in config.build_model().parameters()),
        "batch_size": config.batch_size,
        "image_size": config.image_size,
        "epochs": int(last["epoch"]),
        "train_size": config.train_size,
        "train_accuracy": last["train_accuracy"],
        "test_accuracy": last["test_accuracy"],
        "images_per_second": harmonic_mean([row["images_per_second"] for row in history]),
        "peak_bytes": peak_bytes,
        "naive_peak_bytes_estimated": naive_peak_bytes,
        "precision": config.precision,
        "hardware": _hardware(device),
        "torch": torch.__version__,
        "lightning": version("lightning"),
        "efficient_densenet": version("efficient_densenet"),
        "date": datetime.now(timezone.utc).date().isoformat(),
    }


def write(summary: Summary, path: Path) -> None:
    """Write the summary as JSON."""
    path.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")


def show(summary: Summary) -> None:
    """Print the summary as a table."""
    table = Table(title=_title(summary), show_header=False, title_justify="left")
    table.add_column()
    table.add_column(justify="right")
    for name, value in _rows(summary):
        table.add_row(name, value)
    Console().print(table)


def _title(summary: Summary) -> str:
    shape = f"-{summary['depth']}, k={summary['growth_rate']}" if summary["depth"] else ""
    name = f"{summary['model']}{shape}"
    return f"{name}, {summary['parameters']:,} parameters, recompute={summary['recompute']!r}"


def _rows(summary: Summary) -> list[tuple[str, str]]:
    ours, naive = summary["peak_bytes"], summary["naive_peak_bytes_estimated"]
    step = f"batch {summary['batch_size']}, {summary['image_size']}x{summary['image_size']}"
    return [
        ("Test accuracy", f"{summary['test_accuracy']:.2%}"),
        ("Training accuracy, last epoch", f"{summary['train_accuracy']:.2%}"),
        ("Training speed", f"{summary['images_per_second']:.1f} images/s"),
        (f"Peak memory of a training step ({step})", _mebibytes(ours)),
        ("The naive network in the same step (estimated)", _mebibytes(naive)),
        ("Naive / this run", f"{naive / ours:.1f} x"),
        ("Hardware", summary["hardware"]),
        ("torch", summary["torch"]),
    ]


def _mebibytes(count: int) -> str:
    return f"{count / 2**20:,.0f} MiB"


def _hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"
