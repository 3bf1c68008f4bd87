"""The order of imports of docs/architecture.md holds, and the checks of it can fail."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from support.architecture import (
    BELOW,
    circles,
    crowded_root,
    files_of,
    going_up,
    imported_tests,
    long_files,
    optional_elsewhere,
)
from support.commands import ENVIRONMENT, ROOT

PACKAGE, TESTS = ROOT / "efficient_densenet", ROOT / "tests"
Check = Callable[[Path], list[str]]
RULES = (going_up, circles, optional_elsewhere, crowded_root, long_files)


@pytest.mark.parametrize("check", RULES)
def test_package_keeps_rule(check: Check) -> None:
    assert check(PACKAGE) == []


def test_no_test_imports_test() -> None:
    assert imported_tests(TESTS) == []


def test_every_folder_has_its_place_in_order() -> None:
    files = files_of(PACKAGE)
    assert {f"{name}.".split(".")[1] for name in files} == {name.split(".")[0] for name in BELOW}
    rooms = [f"{PACKAGE.name}.{name}" for name in BELOW if "." in name]
    assert all(files[room].name == "__init__.py" for room in rooms)


def test_package_needs_no_optional_package() -> None:
    code = "import sys, efficient_densenet; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, check=True
    )
    assert not {"lightning", "matplotlib", "rich"} & set(done.stdout.split())


IMPORT = "from package.functional.spec import Spec\n"
FAULTS: dict[str, tuple[Check, dict[str, str], str]] = {
    "kernels read functional": (
        going_up,
        {"kernels/eager.py": IMPORT},
        "package.kernels.eager, line 1: package.functional.spec Spec",
    ),
    "inside a function": (
        going_up,
        {"kernels/eager.py": f"def late():\n    {IMPORT}"},
        "package.kernels.eager, line 2: package.functional.spec Spec",
    ),
    "relative": (
        going_up,
        {"kernels/triton/launch.py": "from ...functional import spec\n"},
        "package.kernels.triton.launch, line 1: package.functional spec",
    ),
    "whole package": (
        going_up,
        {"modules/block.py": "import package\n"},
        "package.modules.block, line 1: package",
    ),
    "memory reads kernels": (
        going_up,
        {"memory/meter.py": "from package.kernels import eager\n", "kernels/eager.py": ""},
        "package.memory.meter, line 1: package.kernels eager",
    ),
    "models read functional": (
        going_up,
        {"models.py": IMPORT},
        "package.models, line 1: package.functional.spec Spec",
    ),
    "training reads passes": (
        going_up,
        {"training/run.py": "from package.functional.forward import run\n"},
        "package.training.run, line 1: package.functional.forward run",
    ),
    "room reads higher room": (
        going_up,
        {"convert/state/values.py": "from package.convert.recording import graph\n"},
        "package.convert.state.values, line 1: package.convert.recording graph",
    ),
    "room reads what is around it": (
        going_up,
        {"convert/recognition/dense.py": "from package.convert.fronts import recognised\n"},
        "package.convert.recognition.dense, line 1: package.convert.fronts recognised",
    ),
    "package reads command": (
        going_up,
        {"__init__.py": "from package import cli\n", "cli.py": ""},
        "package, line 1: package cli",
    ),
    "circle": (
        circles,
        {
            "kernels/a.py": "from package.kernels import b\n",
            "kernels/b.py": "def late():\n    from package.kernels.a import c\n",
        },
        "package.kernels.a → package.kernels.b → package.kernels.a",
    ),
    "circle through folder": (
        circles,
        {
            "kernels/__init__.py": "from .a import b\n",
            "kernels/a.py": "from . import c\n",
        },
        "package.kernels → package.kernels.a → package.kernels",
    ),
    "triton": (
        optional_elsewhere,
        {"kernels/eager.py": "import triton.language as tl\n"},
        "package.kernels.eager, line 1: triton.language",
    ),
    "lightning": (
        optional_elsewhere,
        {"training/plan.py": "def late():\n    from lightning.pytorch import loggers\n"},
        "package.training.plan, line 2: lightning.pytorch loggers",
    ),
    "crowded root": (crowded_root, {f"{i}.py": "" for i in range(7)}, "6.py"),
    "long file": (long_files, {"kernels/a.py": "x = 1\n" * 351}, "package.kernels.a: 351 lines"),
    "test reads test": (
        imported_tests,
        {"memory/test_step.py": "", "modules/test_block.py": "from memory.test_step import x\n"},
        "package.modules.test_block, line 1: memory.test_step x",
    ),
    "support reads conftest": (
        imported_tests,
        {"conftest.py": "", "support/compare.py": "def late():\n    import conftest\n"},
        "package.support.compare, line 2: conftest",
    ),
}


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root


@pytest.mark.parametrize(("check", "files", "fault"), FAULTS.values(), ids=FAULTS)
def test_fault_is_found(tmp_path: Path, check: Check, files: dict[str, str], fault: str) -> None:
    assert fault in check(write(tmp_path / "package", files))


ORDERLY = {
    "kernels/layout.py": "import torch\n",
    "kernels/triton/launch.py": "import triton\nfrom package.kernels.layout import is_hollow\n",
    "functional/spec.py": "from package.kernels import layout\n",
    "modules/block.py": "from package.functional import spec\nfrom package.kernels import layout\n",
    "convert/__init__.py": "from package.convert.classes import convert_\n",
    "convert/classes.py": "from package.convert.recording import graph\n",
    "convert/recording/graph.py": "from package.convert.state.values import Nest\n",
    "convert/state/values.py": "from package.modules.block import Block\n",
    "memory/step.py": "from ..kernels.layout import is_hollow\n",
    "models.py": "from package.modules import block\n",
    "training/run.py": "import lightning\nfrom .. import models\nfrom package.memory import step\n",
    "cli.py": "from package.training import run\n",
    "__main__.py": "from package.cli import main\n",
    "__init__.py": "from package.convert import convert_\nfrom package.models import DenseNet\n",
}


@pytest.mark.parametrize("check", [*RULES, imported_tests])
def test_orderly_package_has_no_fault(tmp_path: Path, check: Check) -> None:
    assert check(write(tmp_path / "package", ORDERLY)) == []
