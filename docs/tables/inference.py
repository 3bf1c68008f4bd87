"""docs/results/inference.md: evaluation without gradients, before and after `convert_`."""

from __future__ import annotations

from docs.tables.markdown import MIB, origin, results, table


def page() -> str:
    found = results("inference")
    base = found["models"]["torchvision"]
    rows = (
        (
            *(name, f"{of['seconds'] * 1e3:.0f}", f"{of['seconds'] / base['seconds']:.2f}"),
            *(f"{of['peak'] / MIB:.0f}", f"{of['peak'] / base['peak']:.2f}"),
        )
        for name, of in found["models"].items()
    )
    return "\n\n".join(
        [
            "# Inference",
            f"DenseNet-121 in evaluation mode without gradients, batch {found['batch']}, "
            f"{found['size']}², float32: torchvision's network, and the same one after `convert_`. "
            f"Medians of {found['rounds']} interleaved forward passes; bytes above parameters and "
            "input, from the allocator.",
            table(("", "ms", "ratio", "peak MiB", "ratio"), rows),
            origin("inference", found),
        ]
    )
