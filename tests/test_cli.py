import json
import subprocess
import sys

import pytest

from efficient_densenet.cli import main
from support.commands import error_of
from support.images import write_data


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--model resnet", ["'resnet'", "densenet121"]),
        ("--model cifar-bc --depth 42", ["42", "6 * n + 4", "nearest"]),
        ("--model cifar-bc --depth -1", ["-1", "6 * n + 4"]),
        ("--model cifar-bc --depth ten", ["'ten'", "int"]),
        ("--model cifar-bc --growth-rate 0", ["--growth-rate", "at least 1", "0"]),
        ("--depth 40", ["--depth", "cifar-bc", "'fashion'"]),
        ("--recompute all", ["'all'", "bottleneck"]),
        ("--batch-size 0", ["--batch-size", "at least 2", "0"]),
        ("--batch-size 1", ["--batch-size", "at least 2", "1"]),
        ("--image-size 28", ["--image-size", "at least 29", "28"]),
        ("--epochs 0", ["--epochs", "at least 1", "0"]),
        ("--train-size 0", ["--train-size", "at least 1", "0"]),
        ("--lr 0", ["--lr", "positive", "0"]),
        ("--lr nan", ["--lr", "positive", "nan"]),
        ("--drop-rate 1", ["--drop-rate", "below 1", "1.0"]),
        ("--seed -1", ["--seed", "at least 0", "-1"]),
        ("--devices 0", ["--devices", "at least 1", "0"]),
        ("--precision 8", ["--precision", "'8'", "bf16-mixed"]),
        ("--epoch 3", ["--epoch"]),
    ],
)
def test_bad_options_get_one_line_that_quotes_them(capsys, options, said):
    line = error_of(capsys, "train", *options.split())
    assert all(word in line for word in said), line


def test_no_command_gets_one_line(capsys):
    assert "COMMAND" in error_of(capsys)


def test_file_as_out_gets_one_line(capsys, tmp_path):
    pytest.importorskip("lightning")
    file = tmp_path / "file"
    file.touch()
    assert repr(str(file)) in error_of(capsys, "train", "--out", str(file))


def test_damaged_data_get_one_line(capsys, tmp_path):
    pytest.importorskip("lightning")
    write_data(tmp_path / "data")  # sound files, but not Fashion-MNIST
    options = ("--data-dir", str(tmp_path / "data"), "--out", str(tmp_path / "out"))
    line = error_of(capsys, "train", *options)
    assert "train-images-idx3-ubyte" in line
    assert "To get the data" in line


def test_train_runs_from_command_line(capsys, tmp_path, monkeypatch):
    training = pytest.importorskip("efficient_densenet.training.run")
    manifest = write_data(tmp_path / "data")
    monkeypatch.setattr(training.run, "__defaults__", (False, manifest))
    options = (
        "--model cifar-bc --depth 10 --growth-rate 4 --image-size 8 --batch-size 16 --epochs 1"
    )
    folders = ["--data-dir", str(tmp_path / "data"), "--out", str(tmp_path / "out")]
    assert main(["train", *options.split(), *folders]) == 0
    assert "Test accuracy" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "config.json").read_text())["depth"] == 10


def test_module_runs_as_command():
    command = [sys.executable, "-m", "efficient_densenet", "train", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "fashion" in done.stdout


def test_version_is_told(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out.startswith("efficient-densenet 0.")
