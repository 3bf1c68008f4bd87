"""The README's table of libraries and capabilities, from the outcomes of the tests behind it.

python -m scripts.use_with  # runs the tests that are marked with a capability
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from scripts import marked

ROOT = Path(__file__).parent.parent
TESTS = ("tests/convert", "tests/functional/test_inference.py")
PAGES = {
    "torchvision": "torchvision",
    "timm": "timm",
    "MONAI": "monai",
    "torchxrayvision": "torchxrayvision",
    "torchreid": "torchreid",
    "segmentation_models_pytorch": "segmentation-models-pytorch",
    "pytorchcv": "pytorchcv",
    "Tiramisu-style": "tiramisu",
}
"""The rows, and the page of docs/use-with and, mostly, the package of each."""

Outcomes = dict[tuple[str, str], list[str]]


def outcomes(report: Path) -> Outcomes:
    """What became of the tests of each library and capability, from pytest's XML."""
    found: Outcomes = defaultdict(list)
    for case in ElementTree.parse(report).iter("testcase"):
        properties = {p.get("name"): p.get("value") for p in case.iter("property")}
        if properties.get("capability"):
            states = {child.tag for child in case} & {"failure", "error", "skipped"}
            state = states.pop() if states else "passed"
            found[properties["library"], properties["capability"]].append(state)
    return found


def cell(states: list[str]) -> str:
    """How many tests stand behind a cell; what did not run is no capability."""
    if not states or set(states) == {"skipped"}:
        return "not tested"
    if set(states) <= {"passed", "skipped"}:
        return f"yes ({states.count('passed')})"
    return "**fails**"


def table(found: Outcomes) -> str:
    """A row for each library, a column for each capability, the number of tests in brackets."""
    capabilities = list(dict.fromkeys(capability for _, capability in found))
    lines = [
        "| | version | " + " | ".join(capabilities) + " |",
        "|---|---|" + "---|" * len(capabilities),
    ]
    for library, page in PAGES.items():
        cells = [cell(found[library, capability]) for capability in capabilities]
        link = f"[{library}](docs/use-with/{page}.md)"
        lines.append(f"| {link} | {_version(page)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "–"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        xml = Path(folder) / "outcomes.xml"
        command = [sys.executable, "-m", "pytest", "-q", *TESTS, f"--junitxml={xml}"]
        subprocess.run(command, cwd=ROOT, check=False)
        marked.write(ROOT / "README.md", "use-with", table(outcomes(xml)))
