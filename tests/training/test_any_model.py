"""The command plans any model that a function makes, naive and converted."""

from __future__ import annotations

import json

import pytest

from efficient_densenet.cli import main
from efficient_densenet.memory.step import estimate
from support.commands import error_of
from support.libraries import NETWORKS

MIB = 2**20

MODELS = """
import torch

def vision():
    import torchvision
    return torchvision.models.DenseNet(6, (2, 3), 8, 2, num_classes=5)

def volume():
    from monai.networks.nets import DenseNet
    return DenseNet(3, 1, 5, 8, 6, (2, 3), 2)

def image():
    from timm.models.densenet import DenseNet
    return DenseNet(6, (2, 3), 5, bn_size=2)

def text():
    return "a model"

number = 3
"""


@pytest.fixture(autouse=True)
def models(tmp_path, monkeypatch) -> None:
    (tmp_path / "their_models.py").write_text(MODELS, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.parametrize(
    ("function", "shape", "network"),
    [("image", "3,36,32", "timm"), ("volume", "1,20,17,16", "monai-3d")],
)
def test_models_of_other_libraries_are_planned(capsys, function, shape, network) -> None:
    model = NETWORKS[network].make()
    options = f"--model their_models:{function} --shape {shape} --budget 4MiB --device cpu --json"
    assert main(["plan", *options.split()]) == 0
    fits = json.loads(capsys.readouterr().out)["fits"]
    assert list(fits) == ["naive", "norm", "bottleneck"]
    assert fits["bottleneck"]["largest"] > fits["naive"]["largest"] > 0
    images = (fits["naive"]["largest"], *map(int, shape.split(",")))
    alone = estimate(model, images, device="cpu").peak.total
    assert alone < fits["naive"]["peak"] <= 4 * MIB  # with momentum


def test_status_says_that_nothing_fits(capsys) -> None:
    options = "--model their_models:vision --shape 3,64,64 --budget 100KiB --device cpu"
    assert main(["plan", *options.split()]) == 1
    assert capsys.readouterr().out.count("none fits") == 3


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            "--model their_models:number --shape 3,64,64",
            "--model 'their_models:number' is no funct",
        ),
        ("--model their_models:text --shape 3,64,64", "makes no model, but a str"),
        ("--model their_models:other --shape 3,64,64", "cannot be imported: module 'their_models'"),
        ("--model no_such_file:f --shape 3,64,64", "cannot be imported: No module named"),
        ("--model their_models:vision", "--shape must be that of one image, such as 3,224,224"),
        ("--model their_models:vision --shape 3x64", "got '3x64'"),
        ("--model their_models:vision --shape 1,64,64", "is not what their_models:vision takes"),
        ("--model their_models:vision --shape 3,64,64 --depth 10", "--depth is for models by name"),
        ("--model cifar-bc --shape 3,64,64", "--shape is for package.module:function"),
    ],
)
def test_wrong_call_gets_one_line(capsys, options, said) -> None:
    line = error_of(capsys, "plan", *options.split(), "--budget", "1MiB", "--device", "cpu")
    assert said in line
