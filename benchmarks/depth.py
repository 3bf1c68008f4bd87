"""Memory of a training step of ever deeper dense blocks.

python -m benchmarks.depth    # into docs/results/depth.json
"""

from __future__ import annotations

import torch

from benchmarks.cases import DEVICE, KINDS, Competitor, Kind, make_block
from benchmarks.instruments import recorded
from benchmarks.provenance import Json, publish
from efficient_densenet.memory.batch import make_batch
from efficient_densenet.memory.report import StepReport
from efficient_densenet.memory.running import RunningStep

DEPTHS = range(12, 97, 12)
SHAPE = (8, 24, 32, 32)
GROWTH = 12


def measured(kind: Kind, layers: int) -> StepReport:
    with DEVICE:
        model, x = make_block(kind, layers, SHAPE[1], GROWTH), torch.randn(SHAPE)
    return recorded(RunningStep(model, make_batch((x,), None, DEVICE, x.dtype), None, None))


def found() -> Json:
    bytes_of = {}
    for kind in KINDS:
        reports = [measured(kind, layers) for layers in DEPTHS]
        bytes_of[str(Competitor(kind))] = {
            "kept": [report.kept for report in reports],
            "peak": [report.peak.step for report in reports],
        }
    return {"shape": SHAPE, "growth": GROWTH, "depths": list(DEPTHS), "bytes": bytes_of}


def main() -> None:
    publish("depth", found())


if __name__ == "__main__":
    main()
