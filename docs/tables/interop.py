"""Tables of docs/interop.md: what `torch.compile` takes."""

from __future__ import annotations

from docs.tables.markdown import origin, results, table


def compile_time() -> str:
    found = results("compile_time")
    rows = (
        (f'`recompute="{mode}"`', f"{first:.0f}", f"{later * 1e3:.0f}")
        for mode, (first, later) in found["seconds"].items()
    )
    header = ("", "first step, s", f"a later step (the least of {found['repeats']}), ms")
    return "\n\n".join(
        [
            f"CPU time of DenseNet-121, batch {found['batch']}, {found['size']}², by Inductor "
            "without caches.",
            table(header, rows),
            origin("compile_time", found),
        ]
    )
