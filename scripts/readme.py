"""The table of the README, from the published results of the benchmark suite.

pytest benchmarks/ --benchmark-only --publish   # writes docs/results/steps.json
python -m scripts.readme                        # puts its table into README.md
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import Any

from scripts import marked

ROOT = Path(__file__).parent.parent
CASES = {"DenseNet-121": "DenseNet-121, batch 8, 224²", "deep": "48 layers, k=12, batch 8, 32²"}
ROWS = {
    "naive": "naive",
    "naive, channels_last": "naive, channels_last",
    "naive, torch.compile": "naive, `torch.compile`",
    "torchvision memory_efficient": "torchvision, `memory_efficient=True`",
    "norm": '**ours, `recompute="norm"`**',
    "bottleneck": '**ours, `recompute="bottleneck"`**',
}
MIB = 2**20


def table(results: dict[str, Any]) -> str:
    """Peak memory and time of one training step, for each of :data:`CASES`."""
    found = {
        (name, row["competitor"]): row
        for name in CASES
        for row in results["rows"]
        if row["case"].startswith(name)
    }
    head = [f"{label}: peak MiB | ms" for label in CASES.values()]
    lines = ["| | " + " | ".join(head) + " |", "|---|" + "---:|---:|" * len(CASES)]
    for competitor, label in ROWS.items():
        cells = [_cells(found[name, competitor]) for name in CASES]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + f"\n\n{_conditions(results['conditions'])}"


def _cells(row: dict[str, Any]) -> str:
    if row["failure"]:
        return f"{row['failure']} | "
    return f"{row['peak_bytes'] / MIB:,.0f} | {median(row['seconds']) * 1e3:.0f}"


def _conditions(conditions: dict[str, str]) -> str:
    return (
        f"One step, forward and backward, {conditions['dtype']}, on a CPU "
        f"({conditions['device']}, {conditions['threads']} threads, torch {conditions['torch']}, "
        f"{conditions['date']}, commit {conditions['commit']}); medians of interleaved runs; bytes "
        "above parameters and input, from the allocator. **CUDA: not measured.** All rows, spreads "
        "and conditions: [docs/results/steps.md](docs/results/steps.md)."
    )


if __name__ == "__main__":
    published = json.loads((ROOT / "docs" / "results" / "steps.json").read_text(encoding="utf-8"))
    marked.write(ROOT / "README.md", "results", table(published))
