"""Programs that no other test runs do what they say, on networks as small as they can be."""

from __future__ import annotations

import json
from functools import partial
from itertools import pairwise

import pytest
import torch
import torchvision

from benchmarks import (
    any_layer,
    compile_time,
    depth,
    experiment,
    fashion_steps,
    gradient_types,
    inference,
    plans,
    processes,
    small_maps,
)
from benchmarks.cases import BRIEF, NAIVE, block
from docs.tables import benchmarks as shown
from docs.tables import memory
from efficient_densenet import EfficientDenseBlock
from efficient_densenet.functional.modes import MODES
from efficient_densenet.memory.events import live_bytes
from efficient_densenet.training.fashion_mnist import Images
from efficient_densenet.training.work import COMPETITORS, Work


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch):
    """Runs a program, with other values of its constants, and returns what it publishes."""

    def run(program, **small) -> dict:
        found = {}

        def publish(name: str, of: dict) -> None:
            found[name] = json.loads(json.dumps(of))

        monkeypatch.setattr(program, "publish", publish)
        for name, value in small.items():
            monkeypatch.setattr(program, name, value)
        program.main()
        (of,) = found.values()
        return of

    return run


def test_depth_finds_bytes_linear_in_it_only_if_recomputed(published) -> None:
    found = published(depth, DEPTHS=range(2, 9, 2), SHAPE=(2, 8, 8, 8), GROWTH=4)
    assert found["depths"] == [2, 4, 6, 8]
    kept = {kind: of["kept"] for kind, of in found["bytes"].items()}
    two_layers = 2 * 4 * (2 * 8 * 8) * 4
    (step,) = set(rises(kept["bottleneck"]))
    assert two_layers < step < 1.1 * two_layers  # and vectors
    first, *_, last = rises(kept["naive"])
    assert first > 10 * two_layers and last > 1.3 * first
    assert all(len(of["peak"]) == 4 for of in found["bytes"].values())


def rises(values: list[int]) -> list[int]:
    return [b - a for a, b in pairwise(values)]


@pytest.fixture
def small_inference(monkeypatch: pytest.MonkeyPatch) -> None:
    small = partial(torchvision.models.DenseNet, 4, (3, 2), 8, num_classes=3)
    for name, value in {"densenet121": small, "BATCH": 2, "SIZE": 32, "ROUNDS": 2}.items():
        monkeypatch.setattr(inference, name, value)


def test_inference_is_measured_of_both_networks(small_inference) -> None:
    found = inference.measured()
    assert list(found) == ["torchvision", "converted"]
    features = 2 * (8 + 3 * 4) * 8 * 8 * 4  # of the first block, in bytes
    for of in found.values():
        assert features < of["peak"] < 10 * features
        assert of["seconds"] > 0


def test_inference_is_not_measured_of_network_that_computes_something_else(
    small_inference, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(model: torch.nn.Module, strict: bool) -> None:
        torch.nn.init.zeros_(model.classifier.weight)

    monkeypatch.setattr(inference, "convert_", spoil)
    with pytest.raises(AssertionError, match="not close"):
        inference.measured()


def test_plans_can_be_read_again(published) -> None:
    found = published(
        plans,
        plan=partial(plans.plan, modes=("naive", "bottleneck")),
        BUDGET="5MiB",
        BATCH=2,
        BUDGETS=("1MB", "2MB"),
        NETWORK={"model": "cifar-bc", "depth": 10, "image_size": 8, "device": "cpu"},
        DEEP=Work("cifar-bc", 8, 4, 10, 4),
    )
    deepest = memory.plan_of(found["deepest"]).fits
    assert 10 < deepest["naive"].largest < deepest["bottleneck"].largest
    small, large = (memory.plan_of(of).fits["naive"] for of in found["batches"])
    assert 0 < small.largest < large.largest
    assert list(found["step"]["modes"]) == list(COMPETITORS)
    for of in found["step"]["modes"].values():
        report = memory.report_of(of)
        assert max(live_bytes(report.events)) == report.peak.step > 0


def test_compiled_network_is_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    small = {"densenet121": partial(EfficientDenseBlock, 1, 3, 2, 4), "SIZE": 8, "REPEATS": 1}
    for name, value in small.items():
        monkeypatch.setattr(compile_time, name, value)
    torch._dynamo.utils.counters.clear()
    first, later = compile_time.seconds("bottleneck")
    assert first > 0 and later >= 0  # of a clock that counts hundredths
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_every_mode_is_compiled_in_process_of_its_own(published, monkeypatch) -> None:
    monkeypatch.setattr("sys.argv", ["compile_time"])
    found = published(compile_time, apart=lambda mode: (2.0, len(mode)))
    assert found["seconds"] == {mode: [2.0, len(mode)] for mode in MODES}


def test_blocks_of_any_layers_are_measured_beside_naive_ones(published) -> None:
    found = published(any_layer, SIZE=(3, 8, 2, 4), SHAPE=(2, 8, 4, 4), WARM=0, STEPS=2)
    assert [row["change"] for row in found["rows"]] == list(any_layer.CHANGES)
    for row in found["rows"]:
        assert row["kept"] < row["naive_kept"], row["change"]
        assert row["lowest"] <= row["ratio"] <= row["highest"], row["change"]


def test_gradients_of_both_types_are_near_to_float64(published) -> None:
    small = {"DEPTHS": (2,), "DRAWS": 1, "SHAPE": (2, 8, 4, 4), "CHANNELS": 8, "GROWTH": 4}
    found = published(gradient_types, **small)
    kinds = {(row["dtype"], row["positions"]) for row in found["rows"]}
    assert len(found["rows"]) == len(kinds) == 4
    for row in found["rows"]:
        assert list(row["errors"]) == ["naive", "float32", "features"]
        assert all(0 < error < 0.2 for of in row["errors"].values() for error in of), row


def test_recipes_have_same_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fashion_steps, "BATCH", 8)
    pixels = torch.randint(256, (16, 28, 28), dtype=torch.uint8)
    images = Images(pixels, torch.arange(16) % 10, pixels[:10], torch.arange(10))
    kind = fashion_steps.Kind(torch.float64, range(1), 2, 1e-9)
    compared = fashion_steps.compare(images, kind, steps=2)
    assert [of.name for of in compared] == list(fashion_steps.RECIPES)
    assert [of.failures() for of in compared] == [[]] * 4
    assert all(fashion_steps.row(of)["early"] < 1e-9 for of in compared)
    wrong = compared[-1].runs[0]._replace(losses=compared[0].runs[0].losses * 1.01)
    assert len(compared[-1]._replace(runs=[wrong]).failures()) == 1


def test_deepest_network_within_shallow_ones_memory_is_trained_as_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trained = {}

    def train(name: str, options: list[str]) -> dict:
        trained[name] = options
        return {"history": [{"images_per_second": 1.6 if "naive" in name else 5000.0}]}

    small = {"SHALLOW": 16, "GROWTH": 4, "SIZE": 8, "BATCH": 4, "train": train}
    for name, value in small.items():
        monkeypatch.setattr(experiment, name, value)
    found = experiment.depth(epochs=0, minutes=1)
    assert trained["depth-naive"][-4:] == ["--epochs", "1", "--train-size", "96"]
    assert trained["depth-ours"][-2:] == ["--epochs", "5"]
    layers = int(trained["depth-ours"][trained["depth-ours"].index("--depth") + 1])
    work = Work("cifar-bc", 8, 4, layers, 4, in_channels=1)
    assert layers > 16 and work.estimate("bottleneck", "cpu").peak.total <= found["budget"]


def test_kernels_move_at_least_their_maps_and_builds_are_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("triton")
    from benchmarks import kernels

    monkeypatch.setattr(kernels, "TARGETS", (90,))
    found = {launch.title: launch for launch in kernels.launches(torch.bfloat16)}
    assert {launch.name for launch in found.values()} == kernels.WRITES.keys()
    moved = {title: kernels.moved(launch) for title, launch in found.items()}
    assert all(read > 0 and written > 0 for read, written in moved.values()), moved
    samples, side, channels, *_ = kernels.LAYER
    assert moved["product"][0] > 2 * samples * side**2 * channels
    z = 2 * samples * side**2 * kernels.LAYER[3]
    assert moved["product, activated too"][1] == 2 * z < 2 * moved["product"][1]  # statistics
    assert moved["rectify_backward, sums alone"][1] < z / 10
    assert moved["rectify_backward, the whole gradient"][1] == z
    row = json.loads(json.dumps(kernels.row(found["fold_moments"])))
    assert row["builds"].keys() == {"sm_90"} and row["builds"]["sm_90"]["registers"] > 0


@pytest.mark.slow
def test_checkouts_are_compared_in_processes_of_their_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("triton")
    from benchmarks import host_time

    found = {}
    small = {"PROCESSES": 1, "REPEATS": 1, "publish": lambda name, of: found.update(of)}
    for name, value in small.items():
        monkeypatch.setattr(host_time, name, value)
    assert host_time.main(["--against", str(host_time.ROOT)]) == 0
    on_cpu, absent = found["rows"]
    assert on_cpu["this"][0]["seconds"] > 0
    (mine,), (theirs,) = absent["this"], absent["the other"]
    assert mine["launches"] == theirs["launches"] > 100
    assert mine["calls"] == theirs["calls"] > 100


def test_processes_are_compared_by_their_own_naive_step() -> None:
    small = block("small", 2, 8, 4, 2, 8)
    (found,) = processes.times([small], 1).values()
    assert set(found) == set(map(str, BRIEF)) and min(found.values()) > 0
    runs = [{"small": {str(NAIVE): naive, "norm": 2.0}} for naive in (1.0, 2.0, 4.0)]
    rows = processes.ratios(runs)
    assert rows == [{"case": "small", "competitor": "norm", "ratios": [2.0, 1.0, 0.5]}]
    conditions = {"device": "a", "threads": "1", "torch": "3", "commit": "c", "date": "d"}
    text = shown.processes_of({"rows": rows, "conditions": conditions})
    assert "| small | 1.00 (0.50–2.00) |" in text


def test_small_maps_are_compared_with_naive_step_in_channels_last(
    published, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    monkeypatch.setattr(processes, "in_processes", lambda program: [small_maps.times()])
    found = published(small_maps, CASES=(block("small", 2, 8, 4, 2, 8),), STEPS=1)
    (naive,) = found["naive_seconds"].values()
    assert 0 < naive < 1
    assert [row["competitor"] for row in found["rows"]] == [
        f"{kind}, channels_last" for kind in ("torchvision memory_efficient", "norm", "bottleneck")
    ]
    assert all(len(row["ratios"]) == 1 for row in found["rows"])
