"""Every way to train three networks: peak memory and time of a whole training step.

    python -m benchmarks.alternatives               # into docs/results/alternatives.json
    python -m benchmarks.alternatives --rounds 9    # more interleaved rounds
    python -m benchmarks.alternatives --all         # compiled everywhere: an hour more

Some 25 minutes on two idle CPU cores, most of them the compiler's. A way is timed only if loss and
gradients are the naive network's; what else is wrong with it is noted. What is done for a network
is written at once; what a run of the same commit has done is not done again.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from benchmarks.cases import DEVICE
from benchmarks.instruments import SHARP, check, interleaved, one_line, recorded
from benchmarks.provenance import Json, publish, read, resumed
from benchmarks.ways import NAIVE, WAYS, Way, mixed
from efficient_densenet.memory.batch import make_batch
from efficient_densenet.memory.running import RunningStep

ROUNDS = 5
CLASSES = 10
SLOPE = 1e-2
"""Relative error allowed in the slope of the loss of a network with dropout, in float64.

Other masks make it tens of percent; where a rectifier opens between the ends it is some 0.1%."""
COARSE = {"loss": 1e-4, "gradient": 3e-2}
"""Relative error allowed in float32, where a rectifier may open in one network and not in the
other."""

make_optimizer = partial(torch.optim.SGD, lr=0.01, momentum=0.9)


class Network(NamedTuple):
    """A library's network, the shape of its images, and who is compiled unless all are."""

    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    compiled: tuple[str, ...] = ()


def densenet_bc_250() -> nn.Module:
    """torchvision's DenseNet with the stem for images of 32²."""
    model = torchvision.models.DenseNet(12, (41, 41, 41), 24, num_classes=CLASSES)
    model.features.conv0 = nn.Conv2d(3, 24, 3, padding=1, bias=False)
    for name in ("norm0", "relu0", "pool0"):
        setattr(model.features, name, nn.Identity())
    return model


def monai() -> nn.Module:
    from monai.networks.nets import DenseNet121

    return DenseNet121(3, 1, CLASSES)


COMPILED = tuple(way.name for way in WAYS if way.compiled)
NETWORKS = (
    Network(
        "DenseNet-121, batch 8, 224²",
        partial(torchvision.models.densenet121, num_classes=CLASSES),
        (8, 3, 224, 224),
        COMPILED,
    ),
    Network("DenseNet-BC-250, k=12, batch 8, 32²", densenet_bc_250, (8, 3, 32, 32)),
    Network(
        "MONAI's DenseNet-121 in 3-D, batch 2, 64³",
        monai,
        (2, 1, 64, 64, 64),
        ("naive, torch.compile",),
    ),
)


class Candidate:
    """A network that is trained in one way."""

    def __init__(self, way: Way, model: nn.Module, images: Tensor) -> None:
        layouts = {4: torch.channels_last, 5: torch.channels_last_3d}
        layout = layouts[images.dim()] if way.channels_last else torch.contiguous_format
        self.model = model.to(images.dtype, memory_format=layout)
        self.images = images.to(memory_format=layout)
        self.labels = torch.arange(len(images)) % CLASSES
        self.parts = way.parts
        self.optimizer = make_optimizer(self.model.parameters())

    def backward(self) -> float:
        """Add the gradients of the mean loss to those that are there."""
        total = 0.0
        for part in zip(self.images.chunk(self.parts), self.labels.chunk(self.parts), strict=True):
            images, labels = part
            loss = F.cross_entropy(self.model(images), labels) / self.parts
            loss.backward()
            total += loss.item()
        return total

    def step(self) -> None:
        self.backward()
        self.optimizer.step()

    def clear(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def results(self) -> dict[str, Tensor]:
        """Loss and gradient of all parameters; the optimizer makes no step."""
        self.clear()
        loss = self.backward()
        gradient = torch.cat([p.grad.flatten() for p in self.model.parameters()])
        self.clear()
        return {"loss": torch.tensor(loss), "gradient": gradient}

    def counted(self) -> int:
        """How many batches the norms have counted."""
        names = dict(self.model.named_buffers())
        return max(int(b) for name, b in names.items() if name.endswith("num_batches_tracked"))

    def peak(self) -> int:
        """Bytes at the peak of a step, all of them."""
        images, labels = (t.chunk(self.parts)[0] for t in (self.images, self.labels))
        batch = make_batch((images,), labels, DEVICE, images.dtype)
        step = RunningStep(self.model, batch, None, None, accumulate=self.parts > 1)
        step.optimizer = self.optimizer
        waiting = (self.parts - 1) * images.nbytes
        return recorded(step).peak.total + waiting


class Bench:
    """All ways to train one network, side by side."""

    def __init__(self, network: Network, slopes: dict[str, str | None]) -> None:
        torch.compiler.reset()
        self._network, self._slopes = network, slopes
        torch.manual_seed(0)
        self._images = torch.randn(network.shape)
        self._small = self._images[:2].double()
        self._truth = self._candidate(NAIVE, self._small).results()
        self._coarse_truth = self._candidate(NAIVE, self._images).results()

    def run(self, ways: list[Way], rounds: int) -> list[Json]:
        """A row for each way that the network can be trained in."""
        rows: dict[str, Json] = {}
        right: dict[str, Candidate] = {}
        for way in ways:
            print(f"  {way.name}", flush=True)
            notes = [way.note] if way.note else []
            row: Json = {
                "name": way.name,
                "failure": None,
                "notes": notes,
                "exact": way.parts == 1,
                "peak": 0,
                "seconds": [],
            }
            try:
                candidate = self._candidate(way, self._images)
                if candidate is None:
                    continue
                row["failure"] = self._judge(way, candidate, row)
                if row["failure"] is None:
                    row["peak"] = candidate.peak()
                    right[way.name] = candidate
            except Exception as error:
                traceback.print_exc()
                row["failure"] = one_line(error)
            rows[way.name] = row
        for name, seconds in interleaved(right, rounds).items():
            rows[name]["seconds"] = seconds
        return list(rows.values())

    def _candidate(self, way: Way, images: Tensor) -> Candidate | None:
        torch.manual_seed(0)
        changed = way.change(self._network.make())
        return None if changed is None else Candidate(way, changed, images)

    def _judge(self, way: Way, candidate: Candidate, row: Json) -> str | None:
        """What is wrong with loss or gradients; what else is worth knowing goes into the row."""
        start = time.perf_counter()
        found = candidate.results()
        if way.compiled:
            row["notes"].append(f"first step {time.perf_counter() - start:.0f} s")
        if candidate.counted() > way.parts:
            row["notes"].append("updates running statistics twice a step")
        if self._slopes.get(way.name):
            row["notes"].append(self._slopes[way.name])
        if way.parts > 1:
            difference = (found["gradient"] - self._coarse_truth["gradient"]).norm()
            part = difference / self._coarse_truth["gradient"].norm()
            row["notes"].append(
                f"another computation: batch statistics of {len(self._images) // way.parts} of "
                f"{len(self._images)} samples, gradient {part:.0%} away"
            )
            return None
        wrong = check(found, self._coarse_truth, COARSE)
        if wrong or way.compiled:  # in float64 it would be compiled once more
            return wrong
        small = self._candidate(way, self._small)
        return check(small.results(), self._truth, SHARP)


def slope_error(way: Way) -> str | None:
    """What is wrong with the gradient of a small network with dropout, or ``None``.

    The slope of the loss along a random direction, with the same seed at both ends, is the
    gradient's product with it, whatever a way's random numbers are.
    """
    torch.manual_seed(0)
    small = torchvision.models.DenseNet(8, (3,), 16, num_classes=CLASSES, drop_rate=0.3)
    model = way.change(small)
    if model is None:
        return None
    candidate = Candidate(way, model, torch.randn(4, 3, 32, 32, dtype=torch.float64))
    parameters = list(candidate.model.parameters())
    direction = [torch.randn_like(p) for p in parameters]

    def loss_at(distance: float) -> float:
        with torch.no_grad():
            torch._foreach_add_(parameters, direction, alpha=distance)
        torch.manual_seed(1)
        candidate.clear()
        loss = candidate.backward()
        with torch.no_grad():
            torch._foreach_sub_(parameters, direction, alpha=distance)
        return loss

    loss_at(0.0)
    slope = sum(float((p.grad * d).sum()) for p, d in zip(parameters, direction, strict=True))
    expected = (loss_at(1e-6) - loss_at(-1e-6)) / 2e-6
    error = abs(slope / expected - 1)
    return f"WRONG with dropout: slope {error:.0%} off" if error > SLOPE else None


def slopes_of(ways: Sequence[Way]) -> dict[str, str | None]:
    """What :func:`slope_error` says of each; of a mix nothing, whose modes are tried alone.

    A mix names the blocks of its network, which the small one lacks.
    """
    return {way.name: slope_error(way) for way in ways if way in WAYS}


def ways_of(network: Network, all_compiled: bool) -> Iterator[Way]:
    """What is tried with a network: the ways, and the mixes that ``fit_`` chose for it."""
    for way in WAYS:
        if not way.compiled or all_compiled or way.name in network.compiled:
            yield way
    for known in read("fit").get("networks", ()):
        if known["name"] == network.name:
            for mix in known["candidates"]:
                if mix["budget"] is not None:
                    yield Way(f"fit_, {mix['name']}", partial(mixed, modes=mix["modes"]))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"default: {ROUNDS}")
    parser.add_argument("--all", action="store_true", help="compile wherever it can be done")
    args = parser.parse_args()
    done = resumed("alternatives")
    slopes: dict[str, str | None] = {}
    # Compiled code of an earlier run would hide what compiling takes.
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        for network in NETWORKS:
            if network.name in done:
                continue
            ways = list(ways_of(network, args.all))
            print(network.name, flush=True)
            slopes |= slopes_of([way for way in ways if way.name not in slopes])
            rows = Bench(network, slopes).run(ways, args.rounds)
            done[network.name] = {"name": network.name, "shape": network.shape, "rows": rows}
            publish("alternatives", {"rounds": args.rounds, "networks": list(done.values())})
    failures = [row for of in done.values() for row in of["rows"] if row["failure"]]
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
