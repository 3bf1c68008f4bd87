"""Which parts run, in which order and for how long: on a GPU, and in a rehearsal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from benchmarks.cases import (
    DENSENET_121,
    GRAPHS,
    NAIVE,
    NAIVE_CHANNELS_LAST,
    Case,
    Competitor,
    block,
    make_network,
)
from benchmarks.gpu import limits, parts
from benchmarks.gpu.limits import Question
from benchmarks.gpu.operations import Site, operations
from benchmarks.gpu.runner import Part
from benchmarks.provenance import Json
from efficient_densenet.training.work import Work

BF16 = torch.bfloat16
IMPLEMENTATIONS = ("eager", "triton")
NORM, BOTTLENECK = (Competitor(kind, channels_last=True) for kind in ("norm", "bottleneck"))
OURS = tuple(replace(ours, kernels=k) for ours in (NORM, BOTTLENECK) for k in IMPLEMENTATIONS)
OTHERS = (NAIVE, NAIVE_CHANNELS_LAST, Competitor("torchvision", channels_last=True))

SMALL = {"growth": 32, "features": 64}
DENSENET_201 = partial(make_network, layers=(6, 12, 48, 32), **SMALL)
DENSENET_264 = partial(make_network, layers=(6, 12, 64, 48), **SMALL)
PLAN = "plan"


@dataclass(frozen=True)
class Scale:
    """What tells a rehearsal from the real run.

    ``seconds`` are for the timing of each case; all allowances are multiplied by ``patience``.
    """

    block: tuple[int, int, int, int, int]
    networks: Json
    batches: tuple[int, ...]
    image: int
    classes: int
    judged_batch: int
    steps: int
    seconds: float
    sites: tuple[Site, ...]
    ceiling: tuple[int, int]
    works: tuple[Work, ...]
    questions: tuple[Question, ...]
    planners: int
    tests: tuple[str, ...] = ("-m", "cuda")
    ours: tuple[Competitor, ...] = OURS
    backend: str = "inductor"
    patience: float = 1.0


REAL = Scale(
    block=(12, 128, 32, 64, 28),
    networks={
        "DenseNet-121": DENSENET_121,
        "DenseNet-201": DENSENET_201,
        "DenseNet-264": DENSENET_264,
    },
    batches=(64, 256),
    image=224,
    classes=1000,
    judged_batch=8,
    steps=8,
    seconds=6.0,
    sites=(
        *(
            Site(64, size, channels, features, 128, 32, BF16)
            for size, channels, features in (
                (56, 160, 256),
                (28, 320, 512),
                (14, 640, 1024),
                (7, 768, 1024),
            )
        ),
        Site(64, 28, 320, 512, 128, 32, torch.float32),
    ),
    ceiling=(1 << 30, 8192),
    works=tuple(
        Work("densenet121", 224, 64, num_classes=1000, precision=precision)
        for precision in ("bf16-mixed", "32-true")
    ),
    questions=(
        Question(
            "largest batch of DenseNet-121, 224², in 8 GiB",
            Work("densenet121", 224, num_classes=1000),
            "batch",
            8 << 30,
        ),
        Question(
            "deepest DenseNet-BC, k=24, batch 256, 32², in 8 GiB",
            Work("cifar-bc", 32, 256, 100, 24),
            "depth",
            8 << 30,
        ),
    ),
    planners=8,
)

REHEARSAL = Scale(
    block=(1, 8, 4, 2, 4),
    networks={"tiny": partial(make_network, growth=4, layers=(1, 1), features=8)},
    batches=(2,),
    image=16,
    classes=10,
    judged_batch=2,
    steps=3,
    seconds=0.0,
    sites=(Site(2, 4, 12, 20, 8, 4, BF16), Site(2, 4, 12, 20, 8, 4, torch.float32)),
    ceiling=(1 << 12, 32),
    works=(Work("cifar-bc", 8, 4, 10, 4, precision="bf16-mixed"),),
    questions=(
        Question("largest batch", Work("cifar-bc", 8, depth=10, growth_rate=4), "batch", 200 << 10),
        Question("deepest", Work("cifar-bc", 8, 2, 10, 4), "depth", 150 << 10),
    ),
    planners=1,
    tests=("tests/test_compare.py", "-m", "not slow"),
    ours=(replace(NORM, kernels="triton"), replace(BOTTLENECK, kernels="eager")),
    backend="aot_eager",
    patience=5.0,  # a CPU may have other work
)


def programme(scale: Scale) -> list[Part]:
    """All parts in order: what matters most and takes least comes first."""
    second = _block(scale)
    first, *deeper = scale.networks
    few, *many = scale.batches
    network, bench = partial(_network, scale), partial(_bench, scale)
    headline = network(first, few, BF16)
    training = partial(
        parts.training,
        case=headline,
        competitors=(NAIVE_CHANNELS_LAST, *scale.ours),
        classes=scale.classes,
        steps=scale.steps,
    )
    singly = partial(
        operations, sites=scale.sites, implementations=IMPLEMENTATIONS, ceiling=scale.ceiling
    )
    launches = partial(
        parts.launches, case=second, competitors=(*OTHERS, *scale.ours), layers=scale.block[0]
    )
    plan = partial(limits.plans, questions=scale.questions, processes=scale.planners)
    planned = [
        Part("tests", partial(parts.tests, arguments=scale.tests), 90, leaves_traces=True),
        Part("training", training, 40),
        Part("operations", singly, 50),
        Part("memory", partial(parts.memory, works=scale.works), 50),
        bench(second, 40),
        bench(headline, 45),
        _graphed(scale, headline, 60),
        _compiled(scale, headline, 130),
        Part("launches", launches, 25),
        Part(PLAN, plan, 300, beside=True),
        *(Part(q.name, partial(limits.limit, question=q, plan=PLAN), 35) for q in scale.questions),
        bench(network(first, few, None), 45),
        *(bench(network(first, batch, BF16), 45) for batch in many),
        *(bench(network(name, few, BF16), 45) for name in deeper),
        *(bench(network(name, few, None), 45) for name in deeper),
        _compiled(scale, second, 60),
        _compiled(scale, headline, 130, graphs=True),
    ]
    return [replace(part, allowance=part.allowance * scale.patience) for part in planned]


def _block(scale: Scale) -> Case:
    case = block("second block of DenseNet-121", *scale.block, autocast=BF16)
    return replace(case, name=f"{case.name}, bf16")


def _network(scale: Scale, name: str, batch: int, autocast: torch.dtype | None) -> Case:
    label = f"{name}, batch {batch}, {scale.image}², {'bf16' if autocast else 'fp32'}"
    shape = (batch, 3, scale.image, scale.image)
    return Case(label, shape, scale.networks[name], autocast, inner=False)


def _graphed(scale: Scale, case: Case, allowance: float) -> Part:
    """Naive and ours as graphs of whole passes, beside the naive network as it is."""
    case = replace(case, name=f"{case.name}, from {GRAPHS}")
    graphed = (replace(c, graphs=True) for c in (NAIVE_CHANNELS_LAST, *_with_triton(scale)))
    part = _bench(scale, case, allowance, (NAIVE_CHANNELS_LAST, *graphed))
    return replace(part, leaves_traces=True)


def _compiled(scale: Scale, case: Case, allowance: float, graphs: bool = False) -> Part:
    """Few competitors and the compiled one, which comes last: it may be cut off.

    With ``graphs`` by the mode "reduce-overhead", ours too.
    """
    naive = replace(NAIVE_CHANNELS_LAST, compiled=True, backend=scale.backend, graphs=graphs)
    ours = _with_triton(scale)
    if graphs:
        ours = [replace(c, compiled=True, backend=scale.backend, graphs=True) for c in ours]
    how = f"torch.compile and {GRAPHS}" if graphs else "torch.compile"
    case = replace(case, name=f"{case.name}, with {how}")
    part = _bench(scale, case, allowance, (NAIVE_CHANNELS_LAST, *ours, naive))
    return replace(part, leaves_traces=True)


def _with_triton(scale: Scale) -> list[Competitor]:
    return [c for c in scale.ours if c.kernels == "triton"]


def _bench(
    scale: Scale, case: Case, allowance: float, competitors: Sequence[Competitor] = ()
) -> Part:
    run = partial(
        parts.bench,
        case=case,
        competitors=competitors or (*OTHERS, *scale.ours),
        judged_batch=scale.judged_batch,
        seconds=scale.seconds,
    )
    return Part(case.name, run, allowance)
