"""Fashion-MNIST from wherever it is on this machine, verified by checksums.

The four idx files may be plain or gzipped. A damaged or missing one raises :class:`DataError`; a
folder that holds some of them is never skipped for another.
"""

from __future__ import annotations

import gzip
import hashlib
import shutil
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
from torch import Tensor

MEAN, STD = 0.2860, 0.3530
SYSTEM_FOLDER = Path("/usr/share/datasets/fashion-mnist")
SOURCE = "https://github.com/zalandoresearch/fashion-mnist"
HOW_TO_GET = (
    "To get the data, run `make data`, or install Debian's package dataset-fashion-mnist, "
    f"or put the four files of {SOURCE} (gzipped or not) into the data folder."
)


class DataError(Exception):
    """The data are missing or damaged; the message names the file and says how to get them."""


@dataclass(frozen=True)
class IdxFile:
    """What an idx file of unsigned bytes must hold.

    Args:
        name: the file's name without ``.gz``.
        shape: the array's shape; the first number is the count of images or labels.
        sha256: hexadecimal digest of the decompressed file.
    """

    name: str
    shape: tuple[int, ...]
    sha256: str


class Manifest(NamedTuple):
    """The four files of a data set."""

    train_images: IdxFile
    train_labels: IdxFile
    test_images: IdxFile
    test_labels: IdxFile


class Images(NamedTuple):
    """The data: uint8 images ``(N, 28, 28)`` and int64 labels ``(N,)``, 0 to 9."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


FASHION_MNIST = Manifest(
    IdxFile(
        "train-images-idx3-ubyte",
        (60000, 28, 28),
        "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    ),
    IdxFile(
        "train-labels-idx1-ubyte",
        (60000,),
        "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    ),
    IdxFile(
        "t10k-images-idx3-ubyte",
        (10000, 28, 28),
        "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    ),
    IdxFile(
        "t10k-labels-idx1-ubyte",
        (10000,),
        "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    ),
)


def load(data_dir: Path, manifest: Manifest = FASHION_MNIST) -> Images:
    """Read the data from the first folder that has them, see :func:`find`.

    Raises:
        DataError: if no folder has them, or the first that has any holds a damaged or incomplete
            set.
    """
    folder = find(data_dir, manifest)
    if folder is None:
        raise DataError(
            f"no Fashion-MNIST in {str(data_dir)!r} or {str(SYSTEM_FOLDER)!r}. {HOW_TO_GET}"
        )
    arrays = [_read(_locate(folder, file), file) for file in manifest]
    train_images, train_labels, test_images, test_labels = arrays
    return Images(train_images, train_labels.long(), test_images, test_labels.long())


def find(data_dir: Path, manifest: Manifest = FASHION_MNIST) -> Path | None:
    """The first folder with any of the files: ``data_dir``, torchvision's in it, the system's."""
    for folder in (data_dir, _torchvision_folder(data_dir), SYSTEM_FOLDER):
        if any(path.exists() for file in manifest for path in _spellings(folder, file)):
            return folder
    return None


def download(data_dir: Path) -> None:
    """Let torchvision download the data into ``data_dir``.

    Raises:
        DataError: if it cannot.
    """
    from torchvision.datasets import FashionMNIST  # type: ignore[import-untyped]

    try:
        with TemporaryDirectory() as scratch:  # what is there in part would count as damaged
            FashionMNIST(scratch, download=True)
            shutil.copytree(scratch, data_dir, dirs_exist_ok=True)
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"no Fashion-MNIST in {str(data_dir)!r} or {str(SYSTEM_FOLDER)!r}, "
            f"and the download failed: {error}. {HOW_TO_GET}"
        ) from error


def _torchvision_folder(data_dir: Path) -> Path:
    return data_dir / "FashionMNIST" / "raw"


def _spellings(folder: Path, file: IdxFile) -> tuple[Path, Path]:
    return folder / file.name, folder / f"{file.name}.gz"


def _locate(folder: Path, file: IdxFile) -> Path:
    for path in _spellings(folder, file):
        if path.exists():
            return path
    raise DataError(f"{str(folder / file.name)!r} is missing, plain and gzipped. {HOW_TO_GET}")


def _read(path: Path, expected: IdxFile) -> Tensor:
    """The array of an idx file; header, shape and checksum are verified."""
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{str(path)!r} cannot be read: {error}. {HOW_TO_GET}") from error
    header = _header(expected.shape)
    found = content[: len(header)]
    if found[:4] != header[:4]:
        raise _damaged(path, f"its magic number is {found[:4].hex()}, not {header[:4].hex()}")
    if found != header:
        raise _damaged(path, f"its shape is not {expected.shape}")
    if hashlib.sha256(content).hexdigest() != expected.sha256:
        raise _damaged(path, f"its SHA-256 is not {expected.sha256} (decompressed)")
    array = torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=len(header))
    return array.reshape(expected.shape)


def _header(shape: tuple[int, ...]) -> bytes:
    """Two zero bytes, 8 for unsigned bytes, the number of dimensions, then each as big-endian."""
    return struct.pack(f">HBB{len(shape)}I", 0, 8, len(shape), *shape)


def _damaged(path: Path, reason: str) -> DataError:
    return DataError(f"{str(path)!r} is damaged: {reason}. {HOW_TO_GET}")
