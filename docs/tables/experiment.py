"""The runs of docs/training.md at full size: tables, and the curves of the recipe."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path

from matplotlib.figure import Figure

from docs.tables.markdown import MIB, Found, conditions, origin, results, table
from efficient_densenet.functional.modes import MODES


def recipe() -> str:
    """The recipe as it is, and the naive network over its first epochs."""
    found = results("experiment_fashion")
    ours, naive = found["ours"], found["naive"]
    header = ("epoch", "training loss", "naive", "test accuracy", "naive", "images/s", "naive")
    return "\n\n".join(
        [
            "![training loss and test accuracy by epoch](results/experiment.png)",
            table(header, _epochs(ours["history"], naive["history"])),
            _memory(ours),
            origin("experiment fashion", found),
        ]
    )


def depth() -> str:
    """A shallow naive network, and the deepest one that fits in its memory."""
    found = results("experiment_depth")
    header = ("network", "steps' peak MiB", "minutes", "images", "train loss", "test accuracy")
    rows = (_trained(found[name]) for name in ("naive", "ours"))
    return "\n\n".join([table(header, rows), origin("experiment depth", found)])


def _epochs(
    ours: list[dict[str, float]], naive: list[dict[str, float]]
) -> Iterator[tuple[object, ...]]:
    names = {"train_loss": ".4f", "test_accuracy": ".2%", "images_per_second": ".0f"}
    for rows in zip_longest(ours, naive):
        pairs = (format(row[n], f) if row else "" for n, f in names.items() for row in rows)
        yield int(rows[0]["epoch"]), *pairs


def _memory(run: Found) -> str:
    of = run["summary"]
    minutes = sum(of["epoch_images"] / row["images_per_second"] for row in run["history"]) / 60
    return (
        f"`{run['command']}`: {minutes:,.0f} minutes of training, "
        f"{of['test_accuracy']:.2%} of the test images at the end. "
        f"A step takes {of['peak_bytes'] / MIB:,.0f} MiB, the naive one "
        f"{of['naive_peak_bytes_estimated'] / MIB:,.0f} (estimated)."
    )


def _trained(run: Found) -> tuple[object, ...]:
    of, last = run["summary"], run["history"][-1]
    images = of["epoch_images"] * len(run["history"])
    return (
        f"`{of['recompute']}`, {of['depth']} layers",
        f"{of['peak_bytes'] / MIB:,.0f}",
        f"{images / of['images_per_second'] / 60:.0f}",
        f"{images:,}",
        f"{last['train_loss']:.3f}",
        f"{of['test_accuracy']:.2%}",
    )


def picture(path: Path) -> None:
    """Training loss and test accuracy of the recipe, and of the naive network so far as it ran."""
    found = results("experiment_fashion")
    runs = {"bottleneck": found["ours"], "none": found["naive"]}
    figure = Figure(figsize=(10, 4), layout="constrained")
    panels = figure.subplots(1, 2)
    titles = {"train_loss": "Training loss, nats", "test_accuracy": "Test accuracy, %"}
    for axes, (name, title) in zip(panels, titles.items(), strict=True):
        scale = 100 if name == "test_accuracy" else 1
        for mode, run in runs.items():
            epochs = [row["epoch"] for row in run["history"]]
            values = [scale * row[name] for row in run["history"]]
            marker = "o" if mode == "none" else "."
            axes.plot(
                epochs, values, marker, ls="-", color=MODES[mode].colour, label=MODES[mode].label
            )
        axes.set(title=title, xlabel="epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
    panels[0].set_ylim(bottom=0)
    panels[0].legend(frameon=False)
    figure.suptitle(f"{runs['bottleneck']['command']}\n{conditions(found)}", fontsize="medium")
    figure.savefig(path, dpi=120)
