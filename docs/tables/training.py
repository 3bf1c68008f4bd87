"""A table of docs/training.md: losses and accuracies of short runs beside the naive network's."""

from __future__ import annotations

from docs.tables.markdown import Found, origin, results, table


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
