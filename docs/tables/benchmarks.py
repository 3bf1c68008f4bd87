"""Tables of docs/benchmarks.md: times by process, traffic, layers of any kind, choices on a CPU."""

from __future__ import annotations

from statistics import median

from docs.tables.markdown import MIB, Found, origin, results, table


def traffic() -> str:
    """What moves through memory: the model of a dense layer, and what operators read and write."""
    found = results("traffic")
    block, columns = found["block"], ("all: model", "counted", "ratio")
    maps = (
        (row["kind"], row["pass"], *(_terms(*row["maps"][which]) for which in ("all", "whole")))
        for row in found["rows"]
    )
    return "\n\n".join(
        [
            table(("", "pass", "by all operators", "of whole maps"), maps, left=4),
            f"The same for a block of {block['layers']} layers, c0={block['channels']}, "
            f"k={block['growth']}, batch {block['batch']}, {block['size']}², float32, slabs of one "
            "sample, in MiB: modelled, counted from the operators' arguments and results, and "
            "their ratio.",
            table(
                ("", "pass", *columns, columns[0].replace("all", "whole"), *columns[1:]),
                map(_bytes, found["rows"]),
                left=2,
            ),
            origin("traffic", found),
        ]
    )


def _terms(wide: float, bottleneck: float, new: float) -> str:
    return f"{wide} c + {bottleneck} b + {new} k"


def _bytes(row: Found) -> list[str]:
    cells = [row["kind"], row["pass"]]
    for model, count in zip(row["modelled"], row["counted"], strict=True):
        cells += [f"{model / MIB:.1f}", f"{count / MIB:.1f}", f"{model / count:.3f}"]
    return cells


def processes() -> str:
    """Times of the suite's cases beside the naive step's, over several processes."""
    return processes_of(results("processes"))


def processes_avx2() -> str:
    """The same on a CPU that is told to use no more than AVX2."""
    return processes_of(results("processes_avx2"))


def processes_of(found: Found) -> str:
    """The same of what the program found."""
    competitors, cells = _by_case(found)
    rows = ((case, *of) for case, of in cells.items())
    return "\n\n".join([table(("/ naive", *competitors), rows), origin("processes", found)])


def small_maps() -> str:
    """Times of steps on small maps beside the naive step's."""
    found = results("small_maps")
    competitors, cells = _by_case(found)
    naive = found["naive_seconds"]
    rows = ((case, f"{naive[case] * 1e3:.0f}", *of) for case, of in cells.items())
    names = [name.removesuffix(", channels_last") for name in competitors]
    header = ("channels_last, one thread", "naive ms", *names)
    return "\n\n".join([table(header, rows), origin("small_maps", found)])


def _by_case(found: Found) -> tuple[list[str], dict[str, list[str]]]:
    """Competitors, and for each case a cell for each: median and range of their ratios."""
    competitors = list(dict.fromkeys(row["competitor"] for row in found["rows"]))
    cells: dict[str, list[str]] = {}
    for row in found["rows"]:
        some = row["ratios"]
        text = f"{median(some):.2f} ({min(some):.2f}–{max(some):.2f})"
        cells.setdefault(row["case"], []).append(text)
    return competitors, cells


def any_layer() -> str:
    """Blocks whose layers run twice, beside naive ones."""
    found = results("any_layer")
    layers, channels, _, growth = found["layers"]
    batch, _, size, _ = found["shape"]
    header = ("layers with", "naive ms", "ms", "ratio (range)", "kept / naive", "peak / naive")
    rows = (
        (
            *(of["change"], f"{of['naive_seconds'] * 1e3:.0f}", f"{of['seconds'] * 1e3:.0f}"),
            f"{of['ratio']:.2f} ({of['lowest']:.2f}–{of['highest']:.2f})",
            *(f"{of[name] / of[f'naive_{name}']:.2f}" for name in ("kept", "peak")),
        )
        for of in found["rows"]
    )
    return "\n\n".join(
        [
            f"{layers} layers, c0={channels}, k={growth}, batch {batch}, {size}², float32; steps "
            "of both blocks alternate.",
            table(header, rows),
            origin("any_layer", found),
        ]
    )


def choices() -> str:
    """What the CPU path does, in bold, beside other ways to do the same."""
    found = results("choices")
    rows = []
    for choice in found["choices"]:
        chosen, taken = choice["chosen"], choice["milliseconds"]
        for i, (name, ms) in enumerate(taken.items()):
            what = choice["question"] if i == 0 else ""
            how = f"**{name}**" if name == chosen else name
            rows.append((what, how, f"{ms:.2f}", f"{ms / taken[chosen]:.2f}"))
    return "\n\n".join(
        [
            table(("what", "how", "ms", "/ chosen"), rows, left=2),
            f"Batch {found['batch']}, maps of {found['size']}², float32, medians of "
            f"{found['rounds']} interleaved rounds. {origin('choices', found)}",
        ]
    )
