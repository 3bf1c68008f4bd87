"""What each of two processes does for ``modules/test_distributed.py``.

    torchrun --standalone --nproc-per-node 2 -m support.processes OUT

Every scenario trains a small network over two processes and the naive one in one process, and
returns their differences relative to each tensor's largest value. ``OUT/RANK.json`` receives them
by scenario and mode, or the error that a scenario ended in.
"""

import copy
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel as DDP

from efficient_densenet import DenseNet, estimate, measure
from efficient_densenet.memory.events import Event, live_bytes
from efficient_densenet.memory.profiler import AllocatorRecord
from efficient_densenet.memory.running import count_bytes
from efficient_densenet.memory.shapes import tensors_of
from support.compare import randomise_
from support.layers import group_norm, squeeze, weight_norm

MODES = ("none", "norm", "bottleneck")
ROWS = (slice(0, 3), slice(3, 7))  # of seven images: the processes have batches of unlike size
SIZE = 32
SMALLEST_SCALE = 1e-2


def network(mode: str) -> DenseNet:
    """The same network for every mode and process."""
    torch.manual_seed(0)
    model = DenseNet(3, (3, 2), 6, 2, num_classes=3, recompute=mode).double()
    randomise_(model)
    return model


def network_of_any_layers(mode: str) -> DenseNet:
    """The same with layers that are not made of known units, in both blocks."""
    model = network(mode)
    for block in (model.features.denseblock1, model.features.denseblock2):
        torch.manual_seed(1)
        group_norm(block["denselayer1"])
        weight_norm(block["denselayer2"])
        squeeze(block["denselayer2"])
    return model.double()


def network_of_half_known_layers(mode: str) -> DenseNet:
    """The same with layers of which the first or the second half is not known."""
    model = network(mode)
    for block in (model.features.denseblock1, model.features.denseblock2):
        first, second = block["denselayer1"], block["denselayer2"]
        first.norm1 = nn.InstanceNorm2d(first.norm1.num_features)
        second.norm2 = nn.InstanceNorm2d(second.norm2.num_features)
    return model.double()


def batch(seed: int) -> tuple[Tensor, Tensor]:
    """Seven images, and the gradient that arrives at their logits."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(7, 3, SIZE, SIZE, dtype=torch.float64, generator=generator)
    return images, torch.randn(7, 3, dtype=torch.float64, generator=generator)


def loss(model: nn.Module, images: Tensor, upstream: Tensor) -> Tensor:
    return (model(images) * upstream).sum()


def share(data: tuple[Tensor, Tensor], rank: int | None = None) -> tuple[Tensor, Tensor]:
    """A process's rows, their gradients so large that the mean over processes is the sum."""
    rows = ROWS[dist.get_rank() if rank is None else rank]
    images, upstream = data
    return images[rows], upstream[rows] * len(ROWS)


def optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)


def worst(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest difference, relative to the largest value of its tensor."""
    assert list(found) == list(expected)
    return max(
        ((f.double() - e.double()).abs().max() / e.abs().max().clamp(min=SMALLEST_SCALE)).item()
        for f, e in zip(found.values(), expected.values(), strict=True)
    )


def grads(model: nn.Module) -> dict[str, Tensor]:
    return {name.removeprefix("module."): p.grad for name, p in model.named_parameters()}


def states(model: nn.Module) -> dict[str, Tensor]:
    return {name.removeprefix("module."): t for name, t in model.state_dict().items()}


def by_shares(naive: nn.Module, data: list[tuple[Tensor, Tensor]]) -> None:
    """What DDP does with norms of each process's own batch, one share after the other.

    Every share starts from the buffers of the first process, which are those that remain.
    """
    models = [naive, *(copy.deepcopy(naive) for _ in ROWS[1:])]
    for rank, model in enumerate(models):
        for pair in data:
            loss(model, *share(pair, rank)).backward()
    for same in zip(*(model.parameters() for model in models), strict=True):
        same[0].grad = sum(p.grad for p in same) / len(ROWS)


def ddp_step(model: nn.Module, data: list[tuple[Tensor, Tensor]]) -> None:
    for pair in data:
        loss(model, *share(pair)).backward()


def ddp(
    mode: str,
    train: Callable = ddp_step,
    batches: int = 1,
    make: Callable[[str], DenseNet] = network,
    **options: bool,
) -> dict:
    """Two steps under DDP, norms with each process's own statistics."""
    model, naive = DDP(make(mode), **options), make("none")
    optimizers = optimizer(model), optimizer(naive)
    differences = []
    for step in range(2):
        data = [batch(10 * step + i) for i in range(batches)]
        train(model, data)
        by_shares(naive, data)
        differences.append(worst(grads(model), grads(naive)))
        for each in optimizers:
            each.step()
            each.zero_grad()
    found = states(model)
    for tensor in found.values():
        dist.broadcast(tensor, 0)
    return {"difference": max(*differences, worst(found, states(naive)))}


def no_sync(model: DDP, data: list[tuple[Tensor, Tensor]]) -> None:
    """Gradients accumulate over the batches and are exchanged with the last."""
    for i, pair in enumerate(data):
        with model.no_sync() if i + 1 < len(data) else nullcontext():
            loss(model, *share(pair)).backward()


def two_forwards(model: DDP, data: list[tuple[Tensor, Tensor]]) -> None:
    """All forward passes, then one backward pass."""
    sum(loss(model, *share(pair)) for pair in data).backward()


class Branches(nn.Module):
    """A network of which one branch is never called."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.used, self.unused = network(mode), network(mode)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


def find_unused_parameters(mode: str) -> dict:
    model, naive = DDP(Branches(mode), find_unused_parameters=True), network("none")
    data = [batch(0)]
    ddp_step(model, data)
    by_shares(naive, data)
    assert all(p.grad is None or not p.grad.any() for p in model.module.unused.parameters())
    return {"difference": worst(grads(model.module.used), grads(naive))}


def joined(
    prepare: Callable[[DenseNet], nn.Module],
    mode: str,
    steps: int = 2,
    make: Callable[[str], DenseNet] = network,
) -> dict:
    """Steps over two processes, and of one process on both their images."""
    plain, naive = make(mode), make("none")
    model = prepare(plain)
    naive.train(plain.training)
    optimizers = optimizer(model), optimizer(naive)
    outputs, differences = [], []
    for step in range(steps):
        images, upstream = batch(step)
        out = model(share((images, upstream))[0])
        (out * share((images, upstream))[1]).sum().backward()
        expected = naive(images)
        (expected * upstream).sum().backward()
        outputs.append(worst({"": out}, {"": expected[ROWS[dist.get_rank()]]}))
        differences.append(worst(full(grads(model)), grads(naive)))
        for each in optimizers:
            each.step()
            each.zero_grad()
    state = full(states(model))
    return {"difference": max(*outputs, *differences, worst(state, states(naive)))}


def full(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Sharded tensors put together."""
    return {k: t.full_tensor() if hasattr(t, "full_tensor") else t for k, t in tensors.items()}


def frozen(model: DenseNet) -> nn.Module:
    """Under DDP, in evaluation mode: every norm has its running statistics."""
    return DDP(model.eval())


def synchronised(model: DenseNet) -> nn.Module:
    """Wrapped first: DDP refuses to wrap ``nn.SyncBatchNorm`` on a CPU."""
    wrapped = DDP(model)
    nn.SyncBatchNorm.convert_sync_batchnorm(wrapped.module)
    return wrapped


def sharded(model: DenseNet) -> nn.Module:
    """FSDP2: each block, and then the rest. Norms synchronise, so that one process compares."""
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return shard_blocks(model)


def sharded_frozen(model: DenseNet) -> nn.Module:
    return shard_blocks(model.eval())


def shard_blocks(model: DenseNet) -> nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for name, child in model.features.named_children():
        if name.startswith("denseblock"):
            fully_shard(child, mesh=mesh)
    return fully_shard(model, mesh=mesh)


@contextmanager
def counted():
    """Values that each collective carries, as they are called."""
    calls: dict[str, list[int]] = {"all_gather": [], "all_reduce": []}
    originals = {name: getattr(dist, name) for name in calls}

    def counting(name: str, place: int) -> Callable:
        def call(*args, **kwargs):
            calls[name].append(args[place].numel())
            return originals[name](*args, **kwargs)

        return call

    dist.all_gather, dist.all_reduce = counting("all_gather", 1), counting("all_reduce", 0)
    try:
        yield calls
    finally:
        dist.all_gather, dist.all_reduce = originals["all_gather"], originals["all_reduce"]


def traffic(mode: str) -> dict:
    """What synchronising sends in each pass; DDP is left out."""
    model = nn.SyncBatchNorm.convert_sync_batchnorm(network(mode))
    data = share(batch(0))
    with counted() as forward:
        out = loss(model, *data)
    with counted() as backward:
        out.backward()
    return {"forward": forward, "backward": backward}


def paths(mode: str) -> dict:
    """Which path a block takes by itself, with synchronised norms, and sharded."""
    x = torch.randn(3, 6, SIZE // 4, SIZE // 4, dtype=torch.float64)
    models = network(mode), nn.SyncBatchNorm.convert_sync_batchnorm(network(mode))
    plain, synchronised = (m.features.denseblock1.why_naive(x) for m in models)
    sharded = shard_blocks(network(mode)).features.denseblock1.why_naive(x)
    return {"plain": plain, "synchronised": synchronised, "sharded": sharded}


def mixed(mode: str) -> dict:
    """Why a block with one norm of another group does not synchronise its shared statistics."""
    block = nn.SyncBatchNorm.convert_sync_batchnorm(network(mode)).features.denseblock1
    block["denselayer2"].norm1 = nn.BatchNorm2d(9).double()
    return {"reason": block.why_naive(torch.randn(3, 6, 8, 8, dtype=torch.float64))}


def wide_network(mode: str) -> DenseNet:
    """One with enough parameters that they matter beside maps of 16x16."""
    return DenseNet(24, (4, 4), 32, num_classes=10, recompute=mode)


def memory(mode: str) -> dict:
    """Bytes at the peak of this process's step, as it took and as estimated, by wrapper."""
    images, labels = torch.randn(4, 3, 64, 64), torch.arange(4)
    options = {"target": labels, "make_optimizer": partial(torch.optim.SGD, lr=0.1, momentum=0.9)}
    found = {}
    for views in (False, True):
        model = DDP(wide_network(mode), gradient_as_bucket_view=views)
        took = measure(model, images, **options).peak.total
        found[f"DDP, views {views}"] = took, estimate(model, images, **options).peak.total
    shards = {"blocks": shard_blocks, "whole": fully_shard_alone}
    synchronising = {"DDP": synchronised, "FSDP2": sharded} if mode != "none" else {}
    for name, wrap in {**shards, **synchronising}.items():
        model = wrap(wide_network(mode))
        took = peak_of(model, images, **options)
        if dist.get_rank() == 0:  # which needs no other
            found[f"{wrap.__name__}, {name}"] = took, estimate(model, images, **options).peak.total
    return found


def fully_shard_alone(model: DenseNet) -> nn.Module:
    return fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))


def peak_of(model: nn.Module, images: Tensor, target: Tensor, make_optimizer: Callable) -> int:
    """Bytes at the peak of this process's step of the model itself, by the allocator's account."""
    stepping = make_optimizer(model.parameters())

    def step() -> None:
        output = nn.functional.cross_entropy(model(images), target)
        output.backward()
        stepping.step()

    for _ in range(2):
        step()
        stepping.zero_grad()
    record = AllocatorRecord(step, images.device)
    grads = local(parameter.grad for parameter in model.parameters())
    state = tensors_of(value for of in stepping.state.values() for value in of.values())
    held = local([*model.parameters(), *model.buffers(), images, target, *state])
    buckets = count_bytes(model.parameters()) if isinstance(model, DDP) else 0
    return count_bytes(held) + buckets + max(live_bytes(with_unseen_deaths(record, grads)))


def local(tensors: Iterable[Tensor]) -> list[Tensor]:
    """What this process has of ``tensors``."""
    return [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors]


def with_unseen_deaths(record: AllocatorRecord, grads: list[Tensor]) -> list[Event]:
    """The events of a step that leaves nothing but ``grads``.

    What a thread of gloo frees the profiler does not see. Such a storage dies as it is born: it is
    what a collective sums in.
    """
    left = Counter()
    for event in record.events:
        left[event.storage] += event.size
    unseen = set(+left) - record.storages_of(grads)
    events = []
    for event in record.events:
        events.append(event)
        if event.storage in unseen:
            events.append(replace(event, size=-event.size))
    return events


SCENARIOS: dict[str, Callable[[str], dict]] = {
    "paths": paths,
    "ddp": ddp,
    "static_graph": lambda mode: ddp(mode, static_graph=True),
    "find_unused_parameters": find_unused_parameters,
    "no_sync": lambda mode: ddp(mode, no_sync, batches=2),
    "two forwards": lambda mode: ddp(mode, two_forwards, batches=2, broadcast_buffers=False),
    "two forwards, buffers broadcast": lambda mode: ddp(mode, two_forwards, batches=2),
    "any layers": lambda mode: ddp(mode, make=network_of_any_layers),
    "any layers, two forwards": lambda mode: ddp(
        mode, two_forwards, batches=2, make=network_of_any_layers
    ),
    "any layers, FSDP2": lambda mode: joined(sharded_frozen, mode, make=network_of_any_layers),
    "frozen norms": lambda mode: joined(frozen, mode),
    "SyncBatchNorm": lambda mode: joined(synchronised, mode),
    "half-known layers, SyncBatchNorm": lambda mode: joined(
        synchronised, mode, make=network_of_half_known_layers
    ),
    "traffic": traffic,
    "mixed groups": mixed,
    "FSDP2": lambda mode: joined(sharded_frozen, mode),
    "FSDP2 with SyncBatchNorm": lambda mode: joined(sharded, mode),
    "memory": memory,
}


def main(out: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    results: dict[str, dict[str, dict]] = {}
    for name, scenario in SCENARIOS.items():
        for mode in MODES:
            try:
                found = scenario(mode)
            except Exception as error:
                found = {"error": f"{type(error).__name__}: {error}"}
            results.setdefault(name, {})[mode] = found
    (out / f"{os.environ['RANK']}.json").write_text(json.dumps(results, indent=1))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
