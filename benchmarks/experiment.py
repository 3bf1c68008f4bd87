"""The training runs of docs/training.md at full size: hours, resumable, by the command itself.

    make data
    python -m benchmarks.experiment             # into docs/results/experiment_PART.json
    python -m benchmarks.experiment fashion     # one of its parts
    python -m benchmarks.experiment --minutes 5 --epochs 1    # a rehearsal

- ``fashion``: ``efficient-densenet train`` as it is, and the naive network over its first epochs.
- ``depth``: a naive DenseNet-BC of 40 layers, and the deepest one whose step takes no more memory
  than its step; each trains for the same time, however few images that is.

An interrupted part goes on after its last finished epoch. Nothing else should run.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.provenance import ROOT, Json, publish
from efficient_densenet.training.plan import TRAIN_IMAGES
from efficient_densenet.training.work import Work

RUNS = ROOT / "runs" / "experiment"
NAIVE_EPOCHS = 2
SHALLOW, GROWTH, SIZE, BATCH = 40, 12, 28, 64
PROBE = 4 * BATCH
CLI = "import sys; from efficient_densenet.cli import main; sys.exit(main())"


def fashion(epochs: int, minutes: float) -> Json:
    """The recipe in full, and the naive network until the schedule has done as much."""
    options = ["--epochs", str(epochs)]
    ours = train("fashion", options)
    naive = train("fashion-naive", [*options, "--recompute", "none"], min(NAIVE_EPOCHS, epochs))
    return {"ours": ours, "naive": naive}


def depth(epochs: int, minutes: float) -> Json:
    """A shallow naive network, and the deepest one that fits in its memory."""
    shallow = Work("cifar-bc", SIZE, BATCH, SHALLOW, GROWTH, in_channels=1)
    peak = shallow.estimate("naive", "cpu").peak.total
    deepest = shallow.greatest_depth("bottleneck", peak, "cpu").largest
    return {
        "budget": peak,
        "naive": timed("depth-naive", SHALLOW, "none", minutes),
        "ours": timed("depth-ours", deepest, "bottleneck", minutes),
    }


def timed(name: str, layers: int, recompute: str, minutes: float) -> Json:
    """A DenseNet-BC trained for about so many minutes, by what a few steps have taken."""
    options = ["--model", "cifar-bc", "--depth", str(layers), "--growth-rate", str(GROWTH)]
    options += ["--image-size", str(SIZE), "--batch-size", str(BATCH), "--recompute", recompute]
    probe = train(f"{name}-probe", [*options, "--epochs", "1", "--train-size", str(PROBE)])
    images = probe["history"][-1]["images_per_second"] * 60 * minutes
    if images >= TRAIN_IMAGES:
        options += ["--epochs", str(round(images / TRAIN_IMAGES))]
    else:
        size = max(BATCH, round(images / BATCH) * BATCH)
        options += ["--epochs", "1", "--train-size", str(size)]
    return train(name, options)


def train(name: str, options: Sequence[str], epochs: int | None = None) -> Json:
    """A run of the command, stopped after so many ``epochs`` if it would do more."""
    out = RUNS / name
    command = ["train", *options, "--out", str(out), "--resume"]
    start = time.perf_counter()
    with subprocess.Popen([sys.executable, "-c", CLI, *command], cwd=ROOT) as process:
        while process.poll() is None:
            if epochs is not None and len(history(out)) >= epochs:
                process.terminate()
            time.sleep(1)
    if not history(out) or (epochs is None and process.returncode):
        raise RuntimeError(f"{' '.join(command)} ended with status {process.returncode}")
    print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
    return {
        "command": " ".join(["efficient-densenet train", *options]),
        "history": history(out),
        "summary": _summary(out),
    }


def _summary(out: Path) -> Json | None:
    """The run in numbers, with the images of an epoch; ``None`` of one that was stopped."""
    path = out / "summary.json"
    if not path.exists():
        return None
    found = json.loads(path.read_text(encoding="utf-8"))
    batches = (found["train_size"] or TRAIN_IMAGES) // found["batch_size"]
    return {**found, "epoch_images": batches * found["batch_size"]}


def history(out: Path) -> list[dict[str, float]]:
    """What a run has written of its finished epochs."""
    path = out / "metrics.csv"
    if not path.exists():
        return []
    with path.open(encoding="utf-8") as file:
        return [{name: float(row[name]) for name in row} for row in csv.DictReader(file)]


PARTS = {"fashion": fashion, "depth": depth}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="default: all")
    parser.add_argument("--epochs", type=int, default=10, help="of fashion; default: 10")
    parser.add_argument("--minutes", type=float, default=30, help="of depth; default: 30")
    args = parser.parse_args()
    for name in args.parts or PARTS:
        publish(f"experiment_{name}", PARTS[name](args.epochs, args.minutes))
    return 0


if __name__ == "__main__":
    sys.exit(main())
