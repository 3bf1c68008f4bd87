"""What one process of several takes: a model in DistributedDataParallel, or a sharded one."""

import sys
from collections.abc import Iterator
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torchvision
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

from efficient_densenet import (
    EfficientDenseBlock,
    convert_,
    estimate,
    fit_,
    largest_batch,
    measure,
    meter,
)
from efficient_densenet.memory.events import live_bytes
from efficient_densenet.memory.profiler import AllocatorRecord
from efficient_densenet.models import densenet_cifar

pytestmark = pytest.mark.skipif(
    not dist.is_available() or sys.platform != "linux", reason="needs torch.distributed with gloo"
)

SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
SHAPE, TARGET = (4, 3, 16, 16), (4,)
EVERY_WAY = {
    "plain": {},
    "views": {"gradient_as_bucket_view": True},
    "unused": {"find_unused_parameters": True},
    "static": {"static_graph": True},
}


@pytest.fixture
def group() -> Iterator[None]:
    """This process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def network(mode: str = "bottleneck") -> nn.Module:
    return densenet_cifar(16, 24, recompute=mode)


def small_network(mode: str = "norm") -> nn.Module:
    return densenet_cifar(10, 12, recompute=mode)


def bytes_of(model: nn.Module) -> int:
    return sum(parameter.numel() * parameter.itemsize for parameter in model.parameters())


# DistributedDataParallel


@pytest.mark.parametrize("mode", ["none", "bottleneck"])
@pytest.mark.parametrize("way", EVERY_WAY)
def test_estimate_of_replica_is_measured_peak(way: str, mode: str, group: None) -> None:
    model = DDP(network(mode), **EVERY_WAY[way])
    options = {"target": TARGET, "make_optimizer": SGD}
    truth = measure(model, SHAPE, **options)
    found = estimate(model, SHAPE, **options, device="cpu")
    assert 0.99 * truth.peak.total <= found.peak.total <= 1.03 * truth.peak.total
    assert found.peak.buckets == truth.peak.buckets == bytes_of(model)
    assert found.peak == meter(model, SHAPE, **options).peak


@pytest.mark.parametrize("options", [{"autocast_dtype": torch.bfloat16}, {"accumulate": True}])
@pytest.mark.parametrize("views", [False, True], ids=["gradients", "views"])
def test_replica_may_mix_precision_and_accumulate(views: bool, options: dict, group: None) -> None:
    model = DDP(network(), gradient_as_bucket_view=views)
    truth = measure(model, SHAPE, target=TARGET, **options).peak.total
    found = estimate(model, SHAPE, target=TARGET, device="cpu", **options).peak.total
    assert 0.99 * truth <= found <= 1.03 * truth


def test_buckets_are_what_wrapper_allocates(group: None) -> None:
    model, made = network(), []
    record = AllocatorRecord(lambda: made.append(DDP(model)), torch.device("cpu"))
    buckets = estimate(made[0], SHAPE).peak.buckets
    assert live_bytes(record.events)[-1] == pytest.approx(buckets, rel=0.01)


def test_gradients_that_are_views_of_buckets_are_counted_once(group: None) -> None:
    plain, views = (
        estimate(DDP(network(), gradient_as_bucket_view=views), SHAPE, target=TARGET)
        for views in (False, True)
    )
    assert views.peak.gradients == 0 < plain.peak.gradients
    assert plain.peak.buckets == views.peak.buckets


def test_wrapper_may_be_anywhere_and_frozen_parameters_are_in_no_bucket(group: None) -> None:
    wrapped = nn.Linear(64, 64)
    wrapped.bias.requires_grad_(False)
    model = nn.Sequential(nn.Linear(64, 64), DDP(wrapped))
    for instrument in (estimate, measure, meter):
        assert instrument(model, (8, 64)).peak.buckets == 64 * 64 * 4
    assert isinstance(model[1], DDP)


def test_report_names_buckets_only_where_there_are_some(group: None) -> None:
    assert "\nbuckets" in str(estimate(DDP(network()), SHAPE))
    assert len(str(measure(DDP(network()), SHAPE)).splitlines()) <= 15
    assert "buckets  " not in str(estimate(network(), SHAPE))


def test_largest_batch_of_replica_leaves_room_for_buckets(group: None) -> None:
    alone, model = network(), DDP(network())
    options = {"target": (None,), "make_optimizer": SGD, "device": "cpu"}
    shape, room = (None, *SHAPE[1:]), 8 * bytes_of(alone)
    fit = largest_batch(model, shape, room + bytes_of(alone), **options)
    assert fit.largest == largest_batch(alone, shape, room, **options).largest > 0
    images, labels = torch.randn(SHAPE), torch.zeros(TARGET, dtype=torch.int64)
    options["target"] = labels
    assert largest_batch(model, images, room, **options, verify=True).verified


def test_replica_is_fitted_as_what_it_wraps(group: None) -> None:
    alone = small_network()
    model = DDP(small_network())
    options = {"target": TARGET, "device": "cpu"}
    budget = estimate(small_network("none"), SHAPE, **options).peak.total - 20_000
    times = fit_(alone, SHAPE, budget, **options).times
    prefixed = {tuple(f"module.{path}" for path in paths): t for paths, t in times.items()}
    mix = fit_(model, SHAPE, budget + bytes_of(alone), **options, times=prefixed)
    assert [chosen.mode for chosen in mix.chosen] == [
        chosen.mode for chosen in fit_(alone, SHAPE, budget, **options, times=times).chosen
    ]
    assert mix.peak <= budget + bytes_of(alone)


def test_wrapper_of_which_memory_is_unknown_is_refused_in_sentence(group: None) -> None:
    model = DDP(nn.Linear(4, 2))
    model.register_comm_hook(None, lambda state, bucket: bucket.buffer())
    said = "model must be in a DistributedDataParallel of which it is known what it allocates"
    for instrument in (estimate, measure, meter):
        with pytest.raises(TypeError, match=f"{said}, got one with a communication hook"):
            instrument(model, (3, 4))


# fully_shard


def sharded(
    model: nn.Module, kind: type[nn.Module] = EfficientDenseBlock, **options: object
) -> nn.Module:
    """Its first block, and then the rest."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (1,))
    fully_shard(next(m for m in model.modules() if isinstance(m, kind)), mesh=mesh)
    return fully_shard(model, mesh=mesh, **options)


def test_sharded_model_is_estimated_again_after_training_and_left_untouched(group: None) -> None:
    model = sharded(network())
    options = {"target": TARGET, "device": "cpu"}
    before = estimate(model, SHAPE, **options).peak
    names, values = list(model.state_dict()), [*model.parameters()]
    images = torch.randn(SHAPE)
    nn.functional.cross_entropy(model(images), torch.zeros(TARGET, dtype=torch.int64)).backward()
    assert estimate(model, SHAPE, **options).peak == before
    assert list(model.state_dict()) == names
    assert all(a is b for a, b in zip(values, model.parameters(), strict=True))


def test_sharded_model_has_its_largest_batch_and_its_mix(group: None) -> None:
    model = sharded(small_network())
    options = {"target": TARGET, "device": "cpu"}
    peak = estimate(model, SHAPE, **options).peak.total
    shape = (None, *SHAPE[1:])
    assert largest_batch(model, shape, peak, target=(None,), device="cpu").largest == SHAPE[0]
    mix = fit_(model, SHAPE, peak - 1, **options)
    assert mix.clock == "modelled" and mix.peak < peak
    assert {chosen.mode for chosen in mix.chosen} != {"norm"}


@pytest.mark.filterwarnings("ignore:.* is naive, since")
def test_converted_blocks_that_are_sharded_are_estimated_as_naive_as_they_are(group: None) -> None:
    from support.processes import peak_of

    plain = torchvision.models.DenseNet(12, (3, 3), 16, num_classes=5)
    convert_(plain, strict=True)
    model = sharded(plain, kind=type(plain.features.denseblock1))
    images, target = torch.randn(4, 3, 64, 64), torch.arange(4)
    took = peak_of(model, images, target, SGD)
    found = estimate(model, images, target=target, make_optimizer=SGD, device="cpu").peak.total
    assert 0.99 * took <= found <= 1.03 * took


def test_gathered_parameters_are_transient(group: None) -> None:
    model = network()
    plain = estimate(model, SHAPE, target=TARGET, device="cpu").peak
    found = estimate(sharded(model), SHAPE, target=TARGET, device="cpu").peak
    assert found.parameters == plain.parameters
    assert found.total > plain.total


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"mp_policy": {"param_dtype": torch.bfloat16}},
            "got a mixed-precision policy: give it as it was before fully_shard",
        ),
        ({"offload_policy": {"pin_memory": False}}, "got parameters that are offloaded"),
    ],
    ids=["precision", "offload"],
)
def test_shards_of_which_memory_is_unknown_are_refused_in_sentence(
    options: dict, said: str, group: None
) -> None:
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy

    makers = {"mp_policy": MixedPrecisionPolicy, "offload_policy": CPUOffloadPolicy}
    model = sharded(network(), **{name: makers[name](**of) for name, of in options.items()})
    with pytest.raises(TypeError, match=f"model must have shards of which it is known .* {said}"):
        estimate(model, SHAPE)


@pytest.mark.parametrize("instrument", [measure, meter], ids=lambda f: f.__name__)
def test_sharded_model_cannot_be_copied_to_run(instrument, group: None) -> None:
    with pytest.raises(TypeError, match="got one after fully_shard, which only estimate takes"):
        instrument(sharded(network()), SHAPE)
