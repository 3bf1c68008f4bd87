"""The tables of docs/training.md: losses and accuracy beside those of the naive network."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import zip_longest

from docs.tables.markdown import MIB, Found, origin, results, table


def fashion_steps() -> str:
    found = results("fashion_steps")
    header = ("type", "network", "seeds", f"first {found['early']} steps")
    return "\n\n".join(
        [
            f"DenseNet-BC, {found['depth']} layers, k={found['growth']}, 28×28, batch "
            f"{found['batch']}, {found['steps']} steps: the largest relative difference of a "
            "step's loss from the naive network's, at learning rate "
            f"{found['early_rate']} and over the whole run (then half a cosine from "
            f"{found['peak_rate']} to 0), and the accuracy on all test images at its end, with its "
            "standard deviation over seeds.",
            table(
                (*header, f"all {found['steps']} steps", "accuracy"),
                map(_row, found["rows"]),
                left=2,
            ),
            origin("fashion_steps", found),
        ]
    )


def _row(of: Found) -> tuple[object, ...]:
    naive = of["network"] == "naive"
    differences = ("–" if naive else f"{of[name]:.1e}" for name in ("early", "whole"))
    spread = "" if of["deviation"] is None else f" ± {of['deviation']:.2%}"
    return of["dtype"], of["network"], of["seeds"], *differences, f"{of['accuracy']:.2%}{spread}"


def experiment() -> str:
    """The runs at full size, each with its command."""
    found = results("experiment")
    parts = []
    if "fashion" in found:
        ours, naive = found["fashion"]["ours"], found["fashion"]["naive"]
        parts += [
            "The recipe as it is, and the naive network over its first epochs, from the same seed:",
            table(
                ("epoch", "loss", "naive", "test accuracy", "naive", "images/s", "naive"),
                _epochs(ours["history"], naive["history"]),
            ),
            _memory(ours),
        ]
    if "depth" in found:
        of = found["depth"]
        parts += [
            f"A naive DenseNet-BC of {of['naive']['summary']['depth']} layers, and the deepest one "
            f"whose step takes no more than its {of['budget'] / MIB:,.0f} MiB, each trained for "
            "about the same time:",
            table(
                ("network", "steps' peak MiB", "minutes", "images", "train loss", "test accuracy"),
                (_trained(of[name]) for name in ("naive", "ours")),
            ),
        ]
    return "\n\n".join([*parts, origin("experiment", found)])


def _epochs(
    ours: list[dict[str, float]], naive: list[dict[str, float]]
) -> Iterator[tuple[object, ...]]:
    names = {"train_loss": ".4f", "test_accuracy": ".2%", "images_per_second": ".1f"}
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
