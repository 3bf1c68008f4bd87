"""Plans agree with measurement, searches find the edge, and bad wishes are refused."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from benchmarks import planned_peaks
from efficient_densenet import estimate, plan
from efficient_densenet.cli import main
from efficient_densenet.fit.groups import modes_of
from efficient_densenet.training.config import ConfigError, TrainConfig
from efficient_densenet.training.folder import RunFolder
from efficient_densenet.training.plan import config_within
from efficient_densenet.training.work import COMPETITORS, Work
from support.commands import ENVIRONMENT, error_of

MIB = 2**20


def cifar(depth: int, growth_rate: int, batch_size: int) -> Work:
    return Work("cifar-bc", 32, batch_size, depth, growth_rate)


NETWORKS = {
    "40 naive": (cifar(40, 12, 8), "naive"),
    "40 checkpointed": (cifar(40, 12, 8), "checkpointed"),
    "40 norm": (cifar(40, 12, 16), "norm"),
    "40 bottleneck": (cifar(40, 12, 16), "bottleneck"),
    "70 naive": (cifar(70, 12, 8), "naive"),
    "70 bottleneck": (cifar(70, 12, 4), "bottleneck"),
    "wide norm": (cifar(16, 48, 8), "norm"),
    "wide bottleneck": (cifar(10, 64, 4), "bottleneck"),
    "fashion bottleneck": (Work("fashion", 96, 16, in_channels=1), "bottleneck"),
    "fashion naive": (Work("fashion", 96, 16, in_channels=1), "naive"),
    "121 bottleneck": (Work("densenet121", 64, 4, num_classes=1000), "bottleneck"),
}


@pytest.mark.parametrize(("work", "mode"), NETWORKS.values(), ids=NETWORKS)
def test_planned_peak_equals_measured_peak(work: Work, mode: str) -> None:
    low, high = planned_peaks.BOUNDS
    assert (low, high) == (0.99, 1.03)
    assert low <= planned_peaks.ratio(work, mode)[1] <= high


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["naive", "bottleneck"])
@pytest.mark.parametrize("work", planned_peaks.NETWORKS[-3:], ids=lambda work: work.model)
def test_planned_peak_of_large_network_equals_measured_peak(work: Work, mode: str) -> None:
    low, high = planned_peaks.BOUNDS
    assert low <= planned_peaks.ratio(work, mode)[1] <= high


# Plans


@pytest.fixture(scope="module")
def batches():
    return plan("64MiB", depth=16, growth_rate=8, device="cpu")


def test_largest_batch_fits_and_next_does_not(batches) -> None:
    assert list(batches.fits) == list(COMPETITORS)
    for fit in batches.fits.values():
        assert fit.peak <= batches.budget < fit.next_peak
        assert fit.next == fit.largest + 1
    sizes = [fit.largest for fit in batches.fits.values()]
    assert sizes == sorted(sizes)
    assert sizes[-1] > 1.5 * sizes[0]


def test_deepest_network_fits_and_next_does_not() -> None:
    made = plan("24MiB", batch_size=16, growth_rate=8, image_size=16, device="cpu")
    for fit in made.fits.values():
        assert fit.peak <= made.budget < fit.next_peak
        assert fit.largest % 6 == 4 and fit.next == fit.largest + 6
    assert made["bottleneck"].largest > 3 * made["naive"].largest


@pytest.mark.slow
def test_two_gigabytes_hold_eight_times_naive_depth_and_thrice_torchvisions() -> None:
    budget = 2 << 30
    naive, checkpointed = plan(
        budget, batch_size=64, device="cpu", modes=["naive", "checkpointed"]
    ).fits.values()
    depth = max(8 * naive.largest, 3 * checkpointed.largest)
    deep = cifar(depth + -(depth - 4) % 6, 12, 64)
    assert deep.estimate("bottleneck", "cpu").peak.total <= budget


def test_reserve_is_taken_off_budget_on_gpu(batches) -> None:
    budget = batches.budget + (256 << 20)
    made = plan(budget, depth=16, growth_rate=8, device="cuda", modes=["norm"])
    assert made.reserve == 256 << 20 and batches.reserve == 0
    assert made["norm"].peak <= batches.budget < made["norm"].next_peak
    assert "cuBLAS" in made.reserve_reason and "oneDNN" in batches.reserve_reason


def test_plan_says_that_nothing_fits() -> None:
    (fit,) = plan("1MiB", depth=22, device="cpu", modes=["bottleneck"]).fits.values()
    assert (fit.largest, fit.peak, fit.next) == (0, 0, 2)
    assert fit.next_peak > MIB


def test_precision_changes_plan() -> None:
    options = {"depth": 10, "growth_rate": 4, "device": "cpu", "modes": ["naive"]}
    single, double, half = (
        plan("16MiB", precision=precision, **options)["naive"].largest
        for precision in ("32-true", "64-true", "bf16-mixed")
    )
    assert double < 0.6 * single and half > 1.1 * single


def test_search_ends_at_its_limit(monkeypatch) -> None:
    monkeypatch.setattr("efficient_densenet.training.work.BATCHES", range(2, 5))
    (fit,) = plan("1GiB", depth=10, device="cpu", modes=["norm"]).fits.values()
    assert (fit.largest, fit.next, fit.next_peak) == (4, None, None)


# Training within a budget


def test_mix_that_fits_is_chosen() -> None:
    options = {"model": "cifar-bc", "depth": 16, "growth_rate": 4, "batch_size": 8}
    work = Work("cifar-bc", 32, 8, 16, 4, in_channels=1)
    least, most = (work.estimate(mode, "cpu").peak.total for mode in ("bottleneck", "naive"))
    for budget in (least, (least + most) // 2):
        config = config_within(str(budget), options)
        assert (config.budget, config.batch_size) == (budget, 8)
        network = config.build_model()
        peak = estimate(network, work.images, target=work.labels, device="cpu", **work.step)
        assert peak.peak.total <= budget
        assert set(modes_of(network).values()) == {config.recompute, *config.mix.values()}
    with pytest.raises(ConfigError, match="budget 100KiB is too small: a batch of 8 "):
        config_within("100KiB", options)


def test_mix_that_was_chosen_before_is_taken_again(tmp_path) -> None:
    options = {"model": "cifar-bc", "depth": 10, "growth_rate": 4, "batch_size": 8}
    chosen = {"recompute": "norm", "mix": {"features.denseblock1": "none"}}
    config = config_within("1GiB", options, chosen)
    modes = modes_of(config.build_model())
    assert modes.pop("features.denseblock1") == "none" and set(modes.values()) == {"norm"}
    folder = RunFolder(tmp_path)
    assert folder.chosen() is None
    folder.open(config, resume=False)
    folder.checkpoint.touch()
    assert RunFolder(tmp_path).chosen() == chosen


def test_batch_is_chosen_where_mode_is_given() -> None:
    options = {"model": "cifar-bc", "depth": 22, "growth_rate": 8, "recompute": "norm"}
    config = config_within("32MiB", options)
    work = Work("cifar-bc", 32, config.batch_size, 22, 8, in_channels=1)
    assert work.estimate("norm", "cpu").peak.total <= 32 * MIB
    assert config.recompute == "norm" and config.batch_size > 8
    assert config_within("32MiB", {**options, "train_size": 8}).batch_size == 8
    assert config_within("1GiB", {**options, "batch_size": 5}).batch_size == 5
    with pytest.raises(ConfigError, match="budget 1MiB is too small: recompute 'norm' needs"):
        config_within("1MiB", options)


def test_budget_is_for_one_device() -> None:
    with pytest.raises(ConfigError, match="budget is for one device, got 2"):
        TrainConfig.of("fashion", budget=2**30, devices=2)


# The command


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--budget 8GBB", ["--budget", "'8GBB'", "8GiB"]),
        ("--budget 0", ["--budget", "'0'", "above 0"]),
        ("--budget 1GiB --depth 42", ["42", "6 * n + 4", "40"]),
        ("--budget 1GiB --batch-size 1", ["--batch-size", "at least 2", "1"]),
        ("--budget 1GiB --batch-size 8 --depth 40", ["--batch-size 8", "a depth"]),
        ("--budget 1GiB --batch-size 8 --model densenet121", ["--batch-size 8", "another model"]),
        ("--budget 1GiB --model densenet121 --depth 40", ["--depth", "'densenet121'"]),
        ("--budget 1GiB --model resnet", ["'resnet'", "densenet121"]),
        ("--budget 1GiB --image-size 3", ["--image-size", "at least 4", "3"]),
        ("--budget 1GiB --in-channels 0", ["--in-channels", "at least 1", "0"]),
        ("--budget 1GiB --num-classes 1", ["--num-classes", "at least 2", "1"]),
        ("--budget 1GiB --growth-rate 0", ["--growth-rate", "at least 1", "0"]),
        ("--budget 1GiB --device tpu", ["'tpu'", "cuda"]),
        ("--budget 1GiB --image-size 100000000000", ["no memory", "100000000000"]),
        ("--budget 1GiB --growth-rate 10000000000000", ["no memory", "40000000000000"]),
        ("--budget 1GiB --chart plan.jpg", ["--chart", ".png", "'plan.jpg'"]),
        ("--budget 1GiB --chart no/such/plan.png", ["--chart", "folder", "'no/such/plan.png'"]),
    ],
)
def test_bad_options_get_one_line_that_quotes_them(capsys, options, said) -> None:
    line = error_of(capsys, "plan", *options.split())
    assert all(word in line for word in said), line


@pytest.mark.parametrize(
    ("options", "said"),
    [("--budget 8GBB", ["'8GBB'", "8GiB"]), ("--budget 1MiB", ["--budget 1MiB", "too small"])],
)
def test_bad_budgets_of_run_get_one_line_that_quotes_them(capsys, options, said) -> None:
    line = error_of(capsys, "train", *options.split(), "--model", "cifar-bc", "--depth", "10")
    assert all(word in line for word in said), line


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to ask")
def test_without_gpu_budget_is_needed(capsys) -> None:
    assert "--budget must be given" in error_of(capsys, "plan")


def test_plan_prints_table_and_draws_chart(capsys, tmp_path) -> None:
    pytest.importorskip("matplotlib")
    chart = tmp_path / "plan.png"
    options = "--budget 16MiB --depth 10 --growth-rate 4 --device cpu"
    assert main(["plan", *options.split(), "--chart", str(chart)]) == 0
    table = capsys.readouterr().out
    assert all(mode in table for mode in COMPETITORS) and "Reserve" in table
    assert chart.read_bytes().startswith(b"\x89PNG")


def test_chart_that_cannot_be_written_gets_one_line(capsys, tmp_path) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "plan.png").mkdir()
    options = "--budget 16MiB --depth 10 --growth-rate 4 --device cpu --chart"
    line = error_of(capsys, "plan", *options.split(), str(tmp_path / "plan.png"))
    assert "--chart" in line and "plan.png" in line


def test_interrupted_plan_says_so_in_one_line(capsys, monkeypatch) -> None:
    def interrupted(**options) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("efficient_densenet.training.plan.plan", interrupted)
    assert main(["plan", "--budget", "16MiB"]) == 130
    assert capsys.readouterr().err == "efficient-densenet plan: interrupted\n"


def test_plan_prints_json(capsys) -> None:
    options = "--budget 16MiB --batch-size 8 --growth-rate 4 --device cuda --json"
    assert main(["plan", *options.split()]) == 1  # as nothing fits
    made = json.loads(capsys.readouterr().out)
    assert (made["budget"], made["varies"], made["work"]["batch_size"]) == (16 * MIB, "depth", 8)
    assert [fit["largest"] for fit in made["fits"].values()] == [
        0
    ] * 4  # the reserve is more than that


WITHOUT_EXTRAS = """
import sys
for name in ("rich", "matplotlib", "lightning"):
    sys.modules[name] = None
from efficient_densenet.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("options", "status", "said"),
    [
        ("--budget 16MiB", 0, "largest batch"),
        pytest.param("--budget 16KiB", 1, "none fits", marks=pytest.mark.slow),
        pytest.param("--budget 16MiB --json", 0, '"largest"', marks=pytest.mark.slow),
        ("--budget 16MiB --chart plan.png", 2, "a chart needs 'matplotlib"),
    ],
    ids=["a table", "nothing fits", "json", "a chart"],
)
def test_plan_needs_no_extra_but_for_charts(tmp_path, options, status, said) -> None:
    network = "--depth 10 --growth-rate 4 --image-size 8 --device cpu"
    command = [sys.executable, "-c", WITHOUT_EXTRAS, "plan", *network.split(), *options.split()]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=ENVIRONMENT)
    assert done.returncode == status, done.stderr
    assert said in (done.stderr if status == 2 else done.stdout)
