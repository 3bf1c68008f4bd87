"""Draw what lives during one step, and what fits the memory of common GPUs, into docs/results/.

    python -m scripts.memory_pictures

The step is measured on this CPU, what fits is estimated from shapes. Some minutes on one core.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from benchmarks.provenance import cpu
from efficient_densenet import pictures, plan
from efficient_densenet.planner import MODES, Work
from scripts import planned_peaks

FOLDER = Path(__file__).parent.parent / "docs" / "results"
DEEP = Work("cifar-bc", 32, 64, 100, 12)
BUDGETS = ("4GB", "8GB", "12GB", "24GB", "80GB")


def main() -> int:
    FOLDER.mkdir(parents=True, exist_ok=True)
    reports = {mode: planned_peaks.measured(DEEP, mode) for mode in MODES}
    pictures.timeline(
        reports,
        f"One step of DenseNet-BC-100 (k=12), batch {DEEP.batch_size}, 32x32, float32, SGD with "
        f"momentum, measured on {cpu()}, torch {torch.__version__}",
        FOLDER / "memory-timeline.png",
    )
    plans = [
        plan(budget, model="densenet121", image_size=224, classes=1000, device="cuda")
        for budget in BUDGETS
    ]
    pictures.fits_chart(plans, FOLDER / "memory-fits.png")
    print(
        f"densenet121, 224x224, 1000 classes, largest batch, float32, SGD with momentum, "
        f"estimated with torch {torch.__version__}"
    )
    for made in plans:
        sizes = ", ".join(f"{fit.mode} {fit.largest}" for fit in made.fits)
        print(f"{made.budget / 1e9:3.0f} GB: {sizes}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
