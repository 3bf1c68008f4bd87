"""Random data sets in the format of Fashion-MNIST."""

from __future__ import annotations

import gzip
import hashlib
import struct
from pathlib import Path

import torch
from torch import Tensor

from efficient_densenet.training.fashion_mnist import FASHION_MNIST, IdxFile, Manifest


def idx_bytes(array: Tensor) -> bytes:
    header = struct.pack(f">HBB{array.dim()}I", 0, 8, array.dim(), *array.shape)
    return header + array.numpy().tobytes()


def write_data(
    folder: Path, train: int = 64, test: int = 32, zipped: bool = False, seed: int = 0
) -> Manifest:
    """A data set of random images whose labels show in their brightness; returns its manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    files = []
    for real, count in zip(FASHION_MNIST, (train, train, test, test), strict=True):
        if len(real.shape) == 3:
            labels = torch.randint(10, (count,), dtype=torch.uint8, generator=generator)
            noise = torch.randint(30, (count, 28, 28), dtype=torch.uint8, generator=generator)
            array = noise + 20 * labels[:, None, None]
        else:
            array = labels
        content = idx_bytes(array)
        digest = hashlib.sha256(content).hexdigest()
        files.append(IdxFile(real.name, tuple(array.shape), digest))
        if zipped:
            (folder / f"{real.name}.gz").write_bytes(gzip.compress(content))
        else:
            (folder / real.name).write_bytes(content)
    return Manifest(*files)
