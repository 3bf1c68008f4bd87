import csv
import json
import signal
import subprocess
import sys

import pytest
import torch

pytest.importorskip("lightning")

from efficient_densenet import models
from efficient_densenet.memory.budget import BudgetExceeded
from efficient_densenet.training import plan as planner
from efficient_densenet.training import run as training
from efficient_densenet.training.config import RECIPES, ConfigError, TrainConfig
from efficient_densenet.training.work import Work
from support.commands import ENVIRONMENT
from support.images import write_data

TINY = {
    "depth": 10,
    "growth_rate": 4,
    "image_size": 8,
    "batch_size": 16,
    "epochs": 4,
    "drop_rate": 0.2,
    "seed": 3,
}

# Dies in the middle of the third epoch, as a machine would.
KILLED_RUN = """
import json, os, signal
import torch
from pathlib import Path
from support.commands import ENVIRONMENT
from support.images import write_data
from efficient_densenet.training import run as training
from efficient_densenet.training.config import TrainConfig

torch.set_num_threads({threads})
step = training.Classifier.training_step

def dying_step(self, batch, batch_idx):
    if self.current_epoch == 2 and batch_idx == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, batch, batch_idx)

training.Classifier.training_step = dying_step
folder = Path({folder!r})
config = TrainConfig.of("cifar-bc", **json.loads({options!r}))
training.run(config, folder / "killed", folder / "data", manifest=write_data(folder / "data"))
"""


def tiny(**options):
    return TrainConfig.of("cifar-bc", **(TINY | options))


def train(folder, out, resume=False, **options):
    manifest = write_data(folder / "data")
    training.run(tiny(**options), folder / out, folder / "data", resume, manifest)
    return torch.load(folder / out / "last.ckpt", weights_only=True)


def rows(out):
    with (out / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_killed_and_resumed_run_ends_with_weights_of_uninterrupted_run(tmp_path):
    whole = train(tmp_path, "whole")
    script = KILLED_RUN.format(
        threads=torch.get_num_threads(),
        folder=str(tmp_path),
        options=json.dumps(TINY),
    )
    command = [sys.executable, "-c", script]
    killed = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    left = torch.load(tmp_path / "killed" / "last.ckpt", weights_only=True)
    assert len(left["history"]) == 2
    resumed = train(tmp_path, "killed", resume=True)

    for name, expected in whole["state_dict"].items():
        assert torch.equal(resumed["state_dict"][name], expected), name
        if expected.is_floating_point() and "norm" not in name:
            assert not torch.equal(left["state_dict"][name], expected), f"{name} did not train on"
    momentum, expected = (run["optimizer_states"][0]["state"] for run in (resumed, whole))
    for index in expected:
        assert torch.equal(
            momentum[index]["momentum_buffer"], expected[index]["momentum_buffer"]
        ), index
    untimed = [
        [{k: v for k, v in row.items() if k != "images_per_second"} for row in rows(tmp_path / out)]
        for out in ("killed", "whole")
    ]
    assert untimed[0] == untimed[1]
    assert [row["epoch"] for row in untimed[0]] == ["1", "2", "3", "4"]


def test_run_leaves_its_record_and_learns(tmp_path, capsys):
    train(tmp_path, "run", epochs=12, drop_rate=0.0)
    out = tmp_path / "run"
    assert json.loads((out / "config.json").read_text())["batch_size"] == 16
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    summary = json.loads((out / "summary.json").read_text())
    assert summary["test_accuracy"] == float(rows(out)[-1]["test_accuracy"])
    assert summary["train_accuracy"] > 0.3
    assert summary["peak_bytes"] > 0
    assert "naive network" in capsys.readouterr().out


def test_learning_rate_falls_tenfold_after_half_and_three_quarters(tmp_path):
    train(tmp_path, "run", epochs=4)
    # Each row has the rate of the step that follows the epoch.
    rates = [float(row["lr"]) for row in rows(tmp_path / "run")]
    assert rates == pytest.approx([0.1, 0.01, 0.001, 0.001])


def test_another_seed_makes_other_weights(tmp_path):
    first, again, other = (
        train(tmp_path, out, seed=seed, epochs=1)["state_dict"]["model.classifier.weight"]
        for out, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_interrupt_passes_through_lightning(tmp_path, monkeypatch):
    def interrupted(self, batch, batch_idx):
        raise KeyboardInterrupt

    monkeypatch.setattr(training.Classifier, "training_step", interrupted)
    handler = signal.getsignal(signal.SIGINT)  # Lightning leaves Ctrl-C ignored
    try:
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path, "run", epochs=1)
    finally:
        signal.signal(signal.SIGINT, handler)


def test_finished_run_is_not_overwritten(tmp_path):
    train(tmp_path, "run", epochs=1)
    with pytest.raises(ConfigError, match="holds a run: resume it"):
        train(tmp_path, "run", epochs=1)
    with pytest.raises(ConfigError, match="seed is 3 in the run to resume"):
        train(tmp_path, "run", epochs=1, seed=4, resume=True)


def test_run_is_extended_by_more_epochs_at_its_last_rate_but_not_cut_short(tmp_path):
    left = train(tmp_path, "run", epochs=2)["state_dict"]
    longer = train(tmp_path, "run", epochs=4, resume=True)["state_dict"]
    found = rows(tmp_path / "run")
    assert [row["epoch"] for row in found] == ["1", "2", "3", "4"]
    assert [float(row["lr"]) for row in found] == pytest.approx([0.01, 0.001, 0.001, 0.001])
    assert not torch.equal(left["model.classifier.weight"], longer["model.classifier.weight"])
    assert json.loads((tmp_path / "run" / "config.json").read_text())["epochs"] == 4
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["epochs"] == 4
    with pytest.raises(ConfigError, match="epochs is 4 in the run to resume"):
        train(tmp_path, "run", epochs=3, resume=True)


def spoil(path, damage):
    content = path.read_bytes()
    path.write_bytes({"cut short": content[: len(content) // 2], "garbage": b"\0garbage"}[damage])


@pytest.mark.parametrize("damage", ["cut short", "garbage"])
@pytest.mark.parametrize(
    ("name", "way_out"),
    [("last.ckpt", "remove it to start again"), ("config.json", "restore it from hparams.yaml")],
)
def test_damaged_file_is_named_with_way_out(tmp_path, name, way_out, damage):
    train(tmp_path, "run", epochs=1)
    path = tmp_path / "run" / name
    spoil(path, damage)
    with pytest.raises(ConfigError, match="is damaged") as caught:
        train(tmp_path, "run", epochs=1, resume=True)
    assert repr(str(path)) in str(caught.value) and way_out in str(caught.value)
    assert "\n" not in str(caught.value) and caught.value.argument == "out"


def test_checkpoint_of_something_else_is_named(tmp_path):
    train(tmp_path, "run", epochs=1)
    torch.save({"state_dict": {}}, tmp_path / "run" / "last.ckpt")
    with pytest.raises(ConfigError, match=r"last\.ckpt' is damaged \(it has no history, optimizer"):
        train(tmp_path, "run", epochs=1, resume=True)


@pytest.mark.parametrize("existed", [False, True], ids=["new folder", "old folder"])
@pytest.mark.parametrize(
    ("options", "error"),
    [({"train_size": 65}, ConfigError), ({"budget": 2**16}, BudgetExceeded)],
    ids=["too few images", "too little memory"],
)
def test_run_that_cannot_start_leaves_nothing(tmp_path, options, error, existed):
    write_data(tmp_path / "data")
    out = tmp_path / "runs" / "first"
    if existed:
        out.mkdir(parents=True)
        (out / "notes.txt").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(error):
        train(tmp_path, "runs/first", **options)
    assert sorted(tmp_path.rglob("*")) == before


def test_resumed_run_that_fails_keeps_what_it_had(tmp_path, monkeypatch):
    train(tmp_path, "run", epochs=1)
    before = {path: path.read_bytes() for path in (tmp_path / "run").glob("*.ckpt")}

    def failing(self, batch, batch_idx):
        raise RuntimeError("injected")

    monkeypatch.setattr(training.Classifier, "training_step", failing)
    with pytest.raises(RuntimeError, match="injected"):
        train(tmp_path, "run", epochs=2, resume=True)
    assert {path: path.read_bytes() for path in before} == before
    assert (tmp_path / "run" / "config.json").exists()


def test_checkpoint_loads_without_further_options(tmp_path):
    state = train(tmp_path, "run", epochs=1)["state_dict"]
    loaded = training.Classifier.load_from_checkpoint(tmp_path / "run" / "last.ckpt")
    assert isinstance(loaded.model, models.DenseNet)
    assert torch.equal(loaded.model.classifier.weight.cpu(), state["model.classifier.weight"].cpu())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_size": 65}, "train_size must be at most 64, got 65"),
        ({"batch_size": 65}, "batch_size makes a step of 65 images, and there are only 64"),
    ],
    ids=["train size", "batch size"],
)
def test_more_images_than_there_are_is_refused(tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        train(tmp_path, "run", **options)


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true"])
def test_other_precisions_train(tmp_path, precision):
    state = train(tmp_path, "run", precision=precision, epochs=1)["state_dict"]
    weight = state["model.classifier.weight"]
    assert weight.dtype == (torch.float64 if precision == "64-true" else torch.float32)
    assert weight.isfinite().all()


@pytest.mark.parametrize("model", RECIPES)
def test_smallest_image_is_smallest_that_model_can_read(model):
    config = TrainConfig.of(model, recompute="none", image_size=RECIPES[model].min_size)
    with torch.device("meta"):
        network = config.build_model().eval()
        assert network(torch.empty(2, 1, config.image_size, config.image_size)).shape == (2, 10)
        with pytest.raises(RuntimeError):
            network(torch.empty(2, 1, config.image_size - 1, config.image_size - 1))


def test_bottleneck_step_needs_less_than_naive_step():
    config = tiny(depth=40, batch_size=32, image_size=16)
    ours, naive = training.step_memory(config, torch.device("cpu"))
    assert naive > 2 * ours


def test_run_stays_within_budget_and_naive_run_cannot(tmp_path):
    options = TINY | {"model": "cifar-bc", "epochs": 1, "batch_size": 32, "depth": 22}
    work = Work("cifar-bc", 8, 32, 22, 4, in_channels=1, drop_rate=0.2)
    need = work.estimate("bottleneck", "cpu").peak.total
    config = planner.config_within(str(need), options)
    manifest = write_data(tmp_path / "data")
    training.run(config, tmp_path / "run", tmp_path / "data", manifest=manifest)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["budget"] == need
    naive = planner.config_within(str(need), options | {"recompute": "none"})
    assert (naive.recompute, naive.batch_size) == ("none", 32)
    with pytest.raises(BudgetExceeded, match="would be live in a budget"):
        training.run(naive, tmp_path / "naive", tmp_path / "data", manifest=manifest)


def test_budget_changes_no_weights(tmp_path):
    free = train(tmp_path, "free", epochs=1)["state_dict"]
    held = train(tmp_path, "held", epochs=1, budget=2**30)["state_dict"]
    for name, expected in free.items():
        assert torch.equal(held[name], expected), name


def test_graphs_are_refused_where_there_are_none(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="graphs needs a GPU, and there is none"):
        train(tmp_path, "run", graphs=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ConfigError, match="graphs is for a single device"):
        train(tmp_path, "run", graphs=True, devices=2)
    with pytest.raises(ConfigError, match="graphs cannot be held to --budget"):
        train(tmp_path, "run", graphs=True, budget=2**30)
    assert not (tmp_path / "run").exists()


def test_norms_learn_nothing_while_graphs_are_captured(tmp_path, monkeypatch):
    """Capturing runs the model on a batch of the run's shape; here nothing is captured."""
    seen = []

    def warm_up(model, images):
        assert model.training
        for _ in range(3):
            seen.append(model(*images).shape)

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", warm_up)
    monkeypatch.setattr(training, "check_graphs", lambda config: None)
    graphed = train(tmp_path, "graphed", epochs=1, graphs=True)["state_dict"]
    assert seen == [(16, 10)] * 3
    for name, expected in train(tmp_path, "plain", epochs=1)["state_dict"].items():
        assert torch.equal(graphed[name], expected), name
