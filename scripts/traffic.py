"""What moves through memory: the model of a dense layer, and what operators really read and write.

python -m scripts.traffic            # print the tables
python -m scripts.traffic --write    # put them into docs/benchmarks.md
"""

from __future__ import annotations

from pathlib import Path

import torch

from benchmarks.traffic import KINDS, MODEL, PASSES, Block, Widths, counted, modelled
from scripts import marked

DOCUMENT = Path(__file__).parent.parent / "docs" / "benchmarks.md"
BLOCK = Block(layers=12, channels=24, growth=12, batch=15, size=31)


def markdown() -> str:
    version = torch.__version__.split("+")[0]
    return "\n".join(
        [
            "| | pass | by all operators | of whole maps |",
            "|---|---|---|---|",
            *(
                f"| {kind} | {which} | {_terms(cost.all)} | {_terms(cost.whole)} |"
                for (kind, which), cost in MODEL.items()
            ),
            "",
            f"The same for a block of {BLOCK.layers} layers, c0={BLOCK.channels}, "
            f"k={BLOCK.growth}, batch {BLOCK.batch}, {BLOCK.size}², float32, slabs of one sample, "
            "in MiB: modelled, counted from the operators' arguments and results, and their ratio.",
            "",
            "| | pass | all: model | counted | ratio | whole: model | counted | ratio |",
            "|---|---|---:|---:|---:|---:|---:|---:|",
            *(_row(kind, which) for kind in KINDS for which in PASSES),
            "",
            f"Made by `python -m scripts.traffic --write` with torch {version}.",
        ]
    )


def _terms(widths: Widths) -> str:
    return f"{widths.wide} c + {widths.bottleneck} b + {widths.new} k"


def _row(kind: str, which: str) -> str:
    pairs = zip(modelled(kind, which, BLOCK), counted(kind, BLOCK)[which], strict=True)
    cells = (f"{a / 2**20:.1f} | {b / 2**20:.1f} | {a / b:.3f}" for a, b in pairs)
    return f"| {kind} | {which} | " + " | ".join(cells) + " |"


if __name__ == "__main__":
    marked.command(__doc__, DOCUMENT, "traffic", markdown)
