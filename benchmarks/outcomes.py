"""What the marked tests found: which path each clause takes in each mode, what each library can do.

    python -m benchmarks.outcomes    # into docs/results/outcomes.json; minutes on two cores

Runs the tests that are marked with a clause (of the matrix in docs/interop.md) or with a capability
(of the README's table of libraries), and keeps what became of each.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from benchmarks.provenance import ROOT, Json, publish

PACKAGES = (
    *("torchvision", "timm", "monai", "torchxrayvision", "torchreid"),
    *("segmentation-models-pytorch", "pytorchcv"),
)
MARKS = ("clause", "capability")


def outcomes(report: ElementTree.Element) -> list[Json]:
    """Of all marked tests: their properties, and their ``result``, in the order of a JUnit report.

    A test that did not come so far has no ``path`` among its properties.
    """
    found = []
    for case in report.iter("testcase"):
        properties = {p.attrib["name"]: p.attrib["value"] for p in case.iter("property")}
        if not properties.keys().isdisjoint(MARKS):
            children = {child.tag for child in case}
            failed = "failed" if children & {"failure", "error"} else "passed"
            found.append({**properties, "result": "not run" if "skipped" in children else failed})
    return found


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "outcomes.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-m", " or ".join(MARKS)]
        subprocess.run([*command, f"--junitxml={path}"], cwd=ROOT, check=False)
        found = outcomes(ElementTree.parse(path).getroot())
    versions = {package: installed(package) for package in PACKAGES}
    publish("outcomes", {"versions": versions, "tests": found})


if __name__ == "__main__":
    main()
