"""Every page of docs/use-with runs as it is written."""

import re
import runpy

import pytest

from support.commands import ROOT
from support.libraries import torchreid_densenet

PAGES = sorted((ROOT / "docs" / "use-with").glob("*.md"))
NEEDS = {
    "timm": "timm",
    "monai": "monai",
    "torchxrayvision": "torchxrayvision",
    "segmentation-models-pytorch": "segmentation_models_pytorch",
    "pytorchcv": "pytorchcv",
}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_snippets_run(page, tmp_path):
    if page.stem in NEEDS:
        pytest.importorskip(NEEDS[page.stem])
    if page.stem == "torchreid":
        torchreid_densenet()
    snippets = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    assert snippets
    for snippet in snippets:
        script = tmp_path / "snippet.py"
        script.write_text(snippet, encoding="utf-8")
        runpy.run_path(str(script))


def test_every_library_has_page():
    names = {"torchvision", "torchreid", "tiramisu", "own-connections", *NEEDS}
    assert {page.stem for page in PAGES} == names
