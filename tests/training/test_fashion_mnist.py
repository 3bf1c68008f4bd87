import gzip
from functools import partial
from pathlib import Path

import pytest
import torch

from efficient_densenet.training import fashion_mnist
from efficient_densenet.training.fashion_mnist import FASHION_MNIST, DataError, load
from support.images import write_data


@pytest.fixture(autouse=True)
def no_system_folder(monkeypatch, tmp_path):
    monkeypatch.setattr(fashion_mnist, "SYSTEM_FOLDER", tmp_path / "system")


@pytest.mark.parametrize("zipped", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize("below", [".", "FashionMNIST/raw"], ids=["flat", "torchvision"])
def test_data_are_read_from_given_folder(tmp_path, zipped, below):
    manifest = write_data(tmp_path / below, zipped=zipped)
    data = load(tmp_path, manifest)
    assert data.train_images.shape == (64, 28, 28)
    assert data.train_images.dtype == torch.uint8
    assert data.test_labels.dtype == torch.int64
    brightness = data.test_images.float().mean((1, 2))
    assert torch.equal(((brightness - 14.5) / 20).round().long(), data.test_labels)


def test_given_folder_goes_before_system_folder(tmp_path):
    write_data(fashion_mnist.SYSTEM_FOLDER, seed=1)
    manifest = write_data(tmp_path, seed=2)
    load(tmp_path, manifest)


def test_system_folder_serves_where_given_one_is_empty(tmp_path):
    manifest = write_data(fashion_mnist.SYSTEM_FOLDER, zipped=True)
    assert len(load(tmp_path / "none", manifest).test_images) == 32


def test_no_data_anywhere_says_how_to_get_them(tmp_path):
    with pytest.raises(DataError, match="dataset-fashion-mnist") as caught:
        load(tmp_path / "nowhere")
    assert "nowhere" in str(caught.value)
    assert "\n" not in str(caught.value)


def flip_last_bit(content):
    return content[:-1] + bytes([content[-1] ^ 1])


DAMAGE = {
    "flipped bit": (flip_last_bit, "SHA-256"),
    "cut short": (lambda content: content[:-5], "SHA-256"),
    "too long": (lambda content: content + b"\0", "SHA-256"),
    "empty": (lambda content: b"", "magic number"),
    "another format": (lambda content: b"\x89PNG" + content[4:], "magic number is 89504e47"),
    "another count": (lambda content: content[:7] + b"\x01" + content[8:], "shape is not"),
}


@pytest.mark.parametrize("name", [file.name for file in FASHION_MNIST])
@pytest.mark.parametrize(("spoil", "reason"), DAMAGE.values(), ids=DAMAGE.keys())
def test_damaged_file_is_named_with_its_damage(tmp_path, name, spoil, reason):
    manifest = write_data(tmp_path)
    write_data(fashion_mnist.SYSTEM_FOLDER)  # sound, but not to be fallen back on
    (tmp_path / name).write_bytes(spoil((tmp_path / name).read_bytes()))
    with pytest.raises(DataError, match=reason) as caught:
        load(tmp_path, manifest)
    assert str(tmp_path / name) in str(caught.value)
    assert "To get the data" in str(caught.value)


@pytest.mark.parametrize(
    "content", [b"no gzip", gzip.compress(bytes(1000))[:-12]], ids=["no gzip", "cut short"]
)
def test_damaged_gz_is_named(tmp_path, content):
    manifest = write_data(tmp_path, zipped=True)
    path = tmp_path / "t10k-labels-idx1-ubyte.gz"
    path.write_bytes(content)
    with pytest.raises(DataError, match="cannot be read") as caught:
        load(tmp_path, manifest)
    assert str(path) in str(caught.value)


def test_missing_file_is_named_even_if_another_folder_has_it(tmp_path):
    manifest = write_data(tmp_path)
    write_data(fashion_mnist.SYSTEM_FOLDER)
    (tmp_path / "train-labels-idx1-ubyte").unlink()
    with pytest.raises(DataError, match="train-labels-idx1-ubyte' is missing"):
        load(tmp_path, manifest)


def test_failed_download_becomes_one_clear_line(tmp_path, monkeypatch):
    import torchvision.datasets

    def refuse(*args, **options):
        raise OSError("no route to host")

    monkeypatch.setattr(torchvision.datasets, "FashionMNIST", refuse)
    with pytest.raises(DataError, match=r"no route to host.*To get the data"):
        fashion_mnist.download(tmp_path)


def test_broken_download_leaves_nothing_and_whole_one_everything(tmp_path, monkeypatch):
    import torchvision.datasets

    def fetch(root, download, fails):
        write_data(Path(root) / "FashionMNIST" / "raw")
        if fails:
            raise RuntimeError("connection lost")

    for fails in (True, False):
        monkeypatch.setattr(torchvision.datasets, "FashionMNIST", partial(fetch, fails=fails))
        try:
            fashion_mnist.download(tmp_path / "data")
        except DataError as error:
            assert "connection lost" in str(error)
        assert (tmp_path / "data").exists() != fails
    assert fashion_mnist.find(tmp_path / "data") == tmp_path / "data" / "FashionMNIST" / "raw"


def test_real_data_have_stated_mean_and_deviation():
    folder = fashion_mnist.find(Path("data"))
    if folder is None:
        pytest.skip("no Fashion-MNIST here; `make data` gets it")
    pixels = load(folder).train_images.double() / 255
    assert pixels.mean().item() == pytest.approx(fashion_mnist.MEAN, abs=1e-4)
    assert pixels.std().item() == pytest.approx(fashion_mnist.STD, abs=1e-4)
