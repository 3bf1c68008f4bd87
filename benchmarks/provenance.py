"""Where numbers come from: hardware, versions, commit, date."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import date
from pathlib import Path

import torch
import torchvision

from benchmarks.cases import DEVICE


def provenance() -> dict[str, str]:
    """Conditions of a run, in the order in which a reader asks for them."""
    return {
        "device": gpu() if DEVICE.type == "cuda" else cpu(),
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "python": platform.python_version(),
        "commit": commit(),
        "dtype": str(torch.get_default_dtype()).removeprefix("torch."),
        "layout": "contiguous, or channels_last (weights and input) where a row says so",
        "date": date.today().isoformat(),
    }


def cpu() -> str:
    info = Path("/proc/cpuinfo")
    names = [
        line.split(":", 1)[1].strip()
        for line in (info.read_text().splitlines() if info.exists() else [])
        if line.startswith("model name")
    ]
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores"


def gpu() -> str:
    return f"{torch.cuda.get_device_name(DEVICE)}, CUDA {torch.version.cuda}"


def commit() -> str:
    """Short hash of the checkout, with a mark if tracked files differ from it."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    answer = subprocess.run(
        command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    return answer.stdout.strip() or "unknown"
