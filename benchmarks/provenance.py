"""Where numbers come from: hardware, versions, commit, date; and where they go: docs/results."""

from __future__ import annotations

import json
import os
import platform
import re
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

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"
LIMITS = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA")
"""Variables by which a CPU's instructions are used only in part: PyTorch's own, and oneDNN's."""


def publish(name: str, found: Json, folder: Path = RESULTS) -> None:
    """Write what ``benchmarks/NAME.py`` found, with its conditions, to ``NAME.json`` in ``folder``.

    ``make docs`` then writes the pages and pictures that show it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(as_json({"conditions": provenance(), **found}), encoding="utf-8")
    print(f"written: {path}")


def read(name: str) -> Json:
    """What ``benchmarks/NAME.py`` published, empty if it has not."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def resumed(name: str) -> dict[str, Json]:
    """The networks, by name, that a run of the program at this commit has done already."""
    found = read(name)
    if not found or found["conditions"]["commit"] != commit():
        return {}
    return {network["name"]: network for network in found["networks"]}


def as_json(found: Json) -> str:
    """JSON in which each list of numbers is one line."""
    text = json.dumps(found, indent=1, ensure_ascii=False)
    return re.sub(r"\[[-+.,e\d\s]*\]", lambda m: " ".join(m[0].split()), text) + "\n"


def provenance() -> dict[str, str]:
    """Conditions of a run, in the order in which a reader asks for them."""
    return {
        "device": torch.cuda.get_device_name() if DEVICE.type == "cuda" else cpu(),
        "instruction set": _instruction_set(),
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


def limits() -> list[str]:
    """What the environment says of :data:`LIMITS`."""
    return [f"{name}={os.environ[name]}" for name in LIMITS if name in os.environ]


def with_instruction_set(name: str) -> str:
    """The name of results that are published beside those of the whole CPU, if it is limited."""
    return f"{name}_{torch.backends.cpu.get_cpu_capability().lower()}" if limits() else name


def _instruction_set() -> str:
    used = torch.backends.cpu.get_cpu_capability()
    return f"{used} by {' '.join(limits())}" if limits() else used


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


def commit(checkout: Path = ROOT) -> str:
    """Short hash of a checkout, with ``-dirty`` if tracked files but results differ from it."""
    short = _answer(["git", "rev-parse", "--short", "HEAD"], folder=checkout)
    command = ["git", "diff", "--name-only", "HEAD", "--", ":/", ":!/docs/results"]
    changes = _answer(command, "", checkout)
    return f"{short}-dirty" if changes else short


def _answer(command: list[str], silent: str = "unknown", folder: Path = ROOT) -> str:
    """The first line that a program prints; ``silent`` if there is none."""
    try:
        answer = subprocess.run(
            command,
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
            timeout=20,
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return (answer.stdout.strip().splitlines() or [silent])[0]
