"""The ledger of docs/derivation.md: what each part of DenseNet-121 keeps, and what lives."""

from __future__ import annotations

from collections.abc import Sequence

from docs.tables.markdown import MIB, origin, results, table

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
