"""Every page of docs/examples runs as it is written."""

import re
import subprocess
import sys

import pytest

from support.commands import ENVIRONMENT, ROOT

PAGES = sorted((ROOT / "docs" / "examples").glob("*.md"))
NEEDS = {"chest-x-rays": "torchxrayvision", "monai-3d": "monai", "timm": "timm"}


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_example_runs_and_its_losses_are_finite(page, tmp_path):
    if page.stem in NEEDS:
        pytest.importorskip(NEEDS[page.stem])
    [code] = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    script = tmp_path / "example.py"
    script.write_text(code, encoding="utf-8")
    run = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert len(re.findall(r"loss \d+\.\d+", run.stdout)) == 2
