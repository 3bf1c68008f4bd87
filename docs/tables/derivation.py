"""Tables of docs/derivation.md: what DenseNet-121 keeps, and how exact summed gradients are."""

from __future__ import annotations

from collections.abc import Sequence

from docs.tables.markdown import MIB, Found, origin, results, table

ITEMSIZE = 4  # float32


def ledger() -> str:
    found = results("ledger")
    parts, live = found["parts"], found["live"]
    total = [sum(column) for column in zip(*parts.values(), strict=True)]
    ratios = [f"{formula / alive:.3f}" for formula, alive in zip(total, live, strict=True)]
    rows = [
        *((name, *_mib(values)) for name, values in parts.items()),
        ("**sum of the formulas**", *_mib(total)),
        (f"live after the forward pass (batch {found['batch']}, shapes alone)", *_mib(live)),
        ("formulas / live", *ratios),
    ]
    size = found["size"]
    return "\n\n".join(
        [
            f"DenseNet-121, {size}×{size}, float32: MiB kept per image, by part.",
            table(("part", *found["schemes"]), rows),
            origin("ledger", found),
        ]
    )


def _mib(values: Sequence[float]) -> list[str]:
    return [f"{value * ITEMSIZE / MIB:.2f}" for value in values]


def gradients() -> str:
    found = results("gradient_types")
    block = found["block"]
    header = ("type", "layers", "positions", *(f"{of}: {by}" for of in OF for by in BUFFERS))
    return "\n\n".join(
        [
            table(header, map(_errors, found["rows"]), left=3),
            "Error of the input's gradient and of all parameters' (root of the mean square of each "
            f"one's), relative to float64, of a block with {block['channels']} channels and a "
            f"growth rate of {block['growth']} on {tuple(block['shape'])}: medians of "
            f"{block['draws']} draws. "
            "*ratio*: buffer in 16 bits / in float32. *positions*: whether the gradient from "
            "outside differs between positions, or is alike as a global average leaves it. "
            f"{origin('gradient_types', found)}",
        ]
    )


OF = ("input", "parameters")
BUFFERS = ("naive", "float32", "16 bits", "ratio")


def _errors(row: Found) -> list[str]:
    cells = [row["dtype"], str(row["layers"]), row["positions"]]
    for naive, wide, narrow in zip(*row["errors"].values(), strict=True):
        cells += [*(f"{error:.4f}" for error in (naive, wide, narrow)), f"{narrow / wide:.3f}"]
    return cells
