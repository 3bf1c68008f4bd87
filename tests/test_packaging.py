"""What a user installs: wheel and source distribution, built and used in a fresh environment."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import torch

from support.commands import ROOT

pytestmark = pytest.mark.slow

STEP = """
import torch, efficient_densenet
block = efficient_densenet.EfficientDenseBlock(2, 4, 4, 4)
block(torch.randn(2, 4, 8, 8)).sum().backward()
print(efficient_densenet.__file__, efficient_densenet.__version__)
"""


def run(*command: object, cwd: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the source distribution of what git tracks."""
    folder = tmp_path_factory.mktemp("built")
    source = folder / "source"
    run("git", "clone", "--quiet", "--no-hardlinks", ROOT, source, cwd=folder)
    run(sys.executable, "setup.py", "-q", "sdist", "--dist-dir", folder, cwd=source)
    (sdist,) = folder.glob("*.tar.gz")
    # The wheel from the source distribution, so that nothing is missing there.
    options = ("--no-deps", "--no-build-isolation", "--quiet", "--wheel-dir", folder)
    run(sys.executable, "-m", "pip", "wheel", *options, sdist, cwd=folder)
    return folder


def test_distributions_hold_package_and_nothing_else(built: Path) -> None:
    (wheel,), (sdist,) = built.glob("*.whl"), built.glob("*.tar.gz")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"efficient_densenet"}
    modules = {
        str(path.relative_to(ROOT)) for path in (ROOT / "efficient_densenet").rglob("*.py")
    } | {"efficient_densenet/py.typed"}
    assert modules <= set(names)
    with tarfile.open(sdist) as archive:
        found = {name.split("/", 1)[-1] for name in archive.getnames()}
    assert modules | {"README.md", "setup.py", "LICENSE"} <= found


def test_description_refers_to_no_file(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    archive = zipfile.ZipFile(wheel)
    (metadata,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
    description = archive.read(metadata).decode()
    links = re.findall(r"\]\(([^)]*)\)", description)
    assert links and all(link.startswith("https://") for link in links)
    assert "![" not in description and "docs/limitations.md" in description  # named, not linked


def test_wheel_works_in_fresh_environment(built: Path, tmp_path: Path) -> None:
    (wheel,) = built.glob("*.whl")
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", wheel, cwd=tmp_path)
    (site,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    # torch and what it needs are those of this environment: they are gigabytes.
    (site / "torch.pth").write_text(f"{Path(torch.__file__).parents[1]}\n", encoding="utf-8")
    path, version = run(python, "-c", STEP, cwd=tmp_path).split()
    assert Path(path).is_relative_to(site)
    told = run(python.with_name("efficient-densenet"), "--version", cwd=tmp_path)
    assert told.split() == ["efficient-densenet", version]
