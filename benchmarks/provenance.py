"""Where numbers come from: hardware, versions, commit, date."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import date
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torchvision

from benchmarks.cases import DEVICE

Json = dict[str, Any]
"""An object in a JSON file."""


def provenance() -> dict[str, str]:
    """Conditions of a run, in the order in which a reader asks for them."""
    return {
        "device": torch.cuda.get_device_name() if DEVICE.type == "cuda" else cpu(),
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "python": platform.python_version(),
        "commit": commit(),
        "dtype": str(torch.get_default_dtype()).removeprefix("torch."),
        "layout": "contiguous, or channels_last (weights and input) where a row says so",
        "date": date.today().isoformat(),
        **(cuda() if DEVICE.type == "cuda" else {}),
    }


def cpu() -> str:
    info = Path("/proc/cpuinfo")
    names = [
        line.split(":", 1)[1].strip()
        for line in (info.read_text().splitlines() if info.exists() else [])
        if line.startswith("model name")
    ]
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores"


def cuda() -> dict[str, str]:
    """What else decides the numbers of a GPU."""
    memory = torch.cuda.get_device_properties(DEVICE).total_memory
    convolutions, products = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    return {
        "GPU memory": f"{memory / 2**30:.1f} GiB",
        "driver": _answer(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]),
        "CUDA": str(torch.version.cuda),
        "cuDNN": str(torch.backends.cudnn.version()),
        "triton": version("triton") if find_spec("triton") else "none",
        "TF32 in fp32": f"convolutions {convolutions}, products {products}",
    }


def commit() -> str:
    """Short hash of the checkout, with a mark if tracked files differ from it."""
    return _answer(["git", "describe", "--always", "--dirty", "--exclude=*"])


def _answer(command: list[str]) -> str:
    """The first line that a program prints."""
    try:
        answer = subprocess.run(
            command,
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=False,
            timeout=20,
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return (answer.stdout.strip().splitlines() or ["unknown"])[0]
