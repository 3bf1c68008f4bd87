"""Tables of docs/gpu.md: how long a step would take on each card, by a model."""

from __future__ import annotations

from docs.tables.markdown import Found, origin, results, table


def time_model() -> str:
    found = results("time_model")
    naive, *ours = found["cards"][0]["seconds"]
    header = ("modelled ms", "GB/s", "TFLOP/s", "naive")
    columns = (column for mode in ours for column in (f"`{mode}`", "/ naive"))
    steps = (_step(step) for step in found["steps"] if step["mode"] != naive)
    [whole] = [step for step in found["steps"] if step["mode"] == naive][:1]
    return "\n\n".join(
        [
            table((*header, *columns, "measured"), (_card(c, naive, ours) for c in found["cards"])),
            "The same step on any card:",
            table(
                ("", "operations", "launches", "GB", "TFLOP"),
                [_step(whole | {"mode": "naive", "kernels": ""}), *steps],
                left=2,
            ),
            "Which kernels move the GB, by Triton's operations:",
            _by_kernel([step for step in found["steps"] if step["kernels"] == "triton"][1:]),
            origin("time_model", found),
            "Rates: " + "; ".join(f"{c['name']}: {c['source']}" for c in found["cards"]) + ".",
        ]
    )


def _card(card: Found, naive: str, ours: list[str]) -> list[str]:
    seconds = card["seconds"]
    cells = [card["name"], f"{card['bandwidth'] / 1e9:.0f}", f"{card['arithmetic'] / 1e12:.0f}"]
    cells.append(f"{seconds[naive] * 1e3:.1f}")
    for mode in ours:
        cells += [f"{seconds[mode] * 1e3:.1f}", f"{seconds[mode] / seconds[naive]:.2f}"]
    return [*cells, "not measured"]


def _step(step: Found) -> list[str]:
    rates = f"{step['bytes'] / 1e9:.1f}", f"{step['operations'] / 1e12:.2f}"
    return [step["mode"], step["kernels"], str(step["launches"]), *rates]


def _by_kernel(steps: list[Found]) -> str:
    """A row for each kernel that moves a percent of all bytes, and one for the others."""
    most, *_ = sorted(steps, key=lambda step: -step["bytes"])
    names = [name for name, size in most["by_kernel"].items() if size > 0.01 * most["bytes"]]
    columns = [[step["by_kernel"].get(name, 0.0) for name in names] for step in steps]
    for column, step in zip(columns, steps, strict=True):
        column.append(step["bytes"] - sum(column))
    rows = zip([*(f"`{name}`" for name in names), "others"], *columns, strict=True)
    cells = [[name, *(f"{size / 1e9:.2f}" for size in sizes)] for name, *sizes in rows]
    return table(("GB", *(step["mode"] for step in steps)), cells)
