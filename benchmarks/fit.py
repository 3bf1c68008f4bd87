"""Peak against time of mixes of modes, at five budgets between the least and the naive network's.

    python -m benchmarks.fit                # into docs/results/fit.json; most of an hour, idle
    python -m benchmarks.fit --rounds 5     # fewer interleaved rounds

For each network ``fit_`` times its modules once and chooses a mix for every budget. Then whole
training steps of all mixes, of the uniform modes and of the checkpointed network are timed in
interleaved rounds, and their peaks measured. What is done for a network is written at once; what a
run of the same commit has done is not done again. Exit status 1 if a mix does not fit its budget.
"""

from __future__ import annotations

import argparse
import copy
import gc
import random
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.provenance import Json, publish, resumed
from efficient_densenet import convert_, densenet121, densenet_cifar, fit_, measure
from efficient_densenet.fit.groups import modes_of, set_modes
from efficient_densenet.functional.modes import MODES
from efficient_densenet.modules.checkpointed import CHECKPOINTED, checkpointed_

BUDGETS = 5
ROUNDS = 9
CLASSES = 10

make_optimizer = partial(torch.optim.SGD, lr=0.1, momentum=0.9)


class Network(NamedTuple):
    """What is trained.

    Attributes:
        name: of the network, with its batch.
        make: the network, in any mix.
        shape: of the images.
        checkpointed: makes of it what torchvision's ``memory_efficient=True`` is; ``None`` if
            there is no such thing.
    """

    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    checkpointed: Callable[[nn.Module], nn.Module] | None = checkpointed_


def monai() -> nn.Module:
    from monai.networks.nets import DenseNet121

    model = DenseNet121(3, 1, CLASSES)
    convert_(model, strict=True)
    return model


NETWORKS = (
    Network(
        "DenseNet-121, batch 8, 224²", partial(densenet121, num_classes=CLASSES), (8, 3, 224, 224)
    ),
    Network(
        "DenseNet-BC-250, k=12, batch 8, 32²", partial(densenet_cifar, 250, 12), (8, 3, 32, 32)
    ),
    Network("MONAI's DenseNet-121 in 3-D, batch 2, 64³", monai, (2, 1, 64, 64, 64), None),
)


class Candidate(NamedTuple):
    """A model in a mix of modes, and its optimizer."""

    name: str
    budget: int | None
    model: nn.Module
    optimizer: torch.optim.Optimizer
    mix: dict[str, str]

    def step(self, images: Tensor, labels: Tensor) -> float:
        """Seconds of one training step."""
        set_modes(self.model, self.mix)
        self.optimizer.zero_grad()
        start = time.perf_counter()
        F.cross_entropy(self.model(images), labels).backward()
        self.optimizer.step()
        return time.perf_counter() - start


def examine(network: Network, rounds: int, budgets: int = BUDGETS) -> Json:
    """Peak and time of every candidate of a network."""
    images = torch.randn(network.shape)
    labels = torch.arange(len(images)) % CLASSES
    candidates = _candidates(network, images, labels, budgets)
    peaks = {c.name: _peak(c, images, labels) for c in candidates}
    seconds = _interleaved(candidates, images, labels, rounds)
    return {
        "name": network.name,
        "candidates": [
            {
                "name": c.name,
                "budget": c.budget,
                "modes": c.mix,
                "peak": peaks[c.name],
                "seconds": seconds[c.name],
            }
            for c in candidates
        ],
    }


def _candidates(
    network: Network, images: Tensor, labels: Tensor, budgets: int
) -> Sequence[Candidate]:
    model = network.make()
    optimizer = make_optimizer(model.parameters())
    made = []
    for mode in MODES.values():
        set_modes(model, dict.fromkeys(modes_of(model), mode.name))
        made.append(Candidate(mode.label, None, model, optimizer, dict(modes_of(model))))
    if network.checkpointed is not None:
        set_modes(model, made[0].mix)
        other = network.checkpointed(copy.deepcopy(model))
        mine = make_optimizer(other.parameters())
        made.append(Candidate(CHECKPOINTED.label, None, other, mine, dict(modes_of(other))))
    fit = partial(fit_, model, images, target=labels, make_optimizer=make_optimizer, device="cpu")
    first = fit("1TiB")
    # An estimate may be some bytes below what is measured.
    least, most = first.least * 101 // 100, first.uniform["none"].peak * 101 // 100
    for i in range(budgets):
        budget = least + (most - least) * i // (budgets - 1)
        fit(budget, times=first.times)
        name = f"mix {i + 1}"
        made.append(Candidate(name, budget, model, optimizer, dict(modes_of(model))))
    return made


def _peak(candidate: Candidate, images: Tensor, labels: Tensor) -> int:
    set_modes(candidate.model, candidate.mix)
    candidate.optimizer.zero_grad()
    options = {"target": labels, "make_optimizer": make_optimizer}
    return measure(candidate.model, images, **options).peak.total


def _interleaved(
    candidates: Sequence[Candidate], images: Tensor, labels: Tensor, rounds: int
) -> dict[str, list[float]]:
    """Seconds of steps in rounds that each run everybody once, in an order of their own."""
    taken: dict[str, list[float]] = {candidate.name: [] for candidate in candidates}
    order, shuffle = list(candidates), random.Random(0).shuffle
    for count in range(rounds + 1):
        shuffle(order)
        for candidate in order:
            gc.collect()
            seconds = candidate.step(images, labels)
            if count:  # the first ones are cold
                taken[candidate.name].append(seconds)
    return taken


def right(found: Json) -> bool:
    """Whether every mix was within its budget when it was measured."""
    budgets = [c for c in found["candidates"] if c["budget"] is not None]
    return all(c["peak"] <= c["budget"] for c in budgets)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"default: {ROUNDS}")
    rounds = parser.parse_args().rounds
    done = resumed("fit")
    for network in NETWORKS:
        if network.name not in done:
            done[network.name] = examine(network, rounds)
            publish("fit", {"networks": list(done.values())})
    return 0 if all(map(right, done.values())) else 1


if __name__ == "__main__":
    sys.exit(main())
