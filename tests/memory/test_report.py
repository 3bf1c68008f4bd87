"""Reports are read by people, and by programs."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
import torch
from torch import nn

from efficient_densenet import estimate, measure, meter
from efficient_densenet.memory.report import StepReport

MIB = 2**20


def report() -> StepReport:
    layers = nn.Sequential(nn.Linear(512, 2048), nn.BatchNorm1d(2048), nn.Linear(2048, 512))
    options = {"target": (64,), "make_optimizer": torch.optim.AdamW}
    return measure(layers, torch.randn(64, 512), **options)


def test_report_prints_where_memory_is() -> None:
    made = report()
    lines = str(made).splitlines()
    assert len(lines) <= 15
    numbers = {
        match[1]: float(match[2])
        for match in (re.match(r"(\w[\w ]*?) {2,}([\d,.]+)", line) for line in lines[1:])
        if match
    }
    parts = (
        *("parameters", "buffers", "inputs and target", "optimizer state"),
        *("gradients", "kept for backward", "transient"),
    )
    assert sum(numbers[part] for part in parts) == pytest.approx(numbers["peak"], abs=0.4)
    assert numbers["peak"] == pytest.approx(made.peak.total / MIB, abs=0.05)
    assert numbers["optimizer state"] == pytest.approx(2 * numbers["parameters"], abs=0.2)
    assert numbers["kept after forward"] == pytest.approx(made.kept / MIB, abs=0.05)
    assert f"in {made.peak.phase}, at {made.peak.operator}" in str(made)
    assert numbers["seconds"] == pytest.approx(made.seconds, abs=0.001)


def test_report_is_short_where_it_is_only_named() -> None:
    made = report()
    assert len(repr(made)) < 120
    assert f"{made.peak.total / MIB:,.1f} MiB" in repr(made)


def test_report_is_table_in_notebook() -> None:
    made = report()
    html = made._repr_html_()
    assert html.count("<tr>") == len(str(made).splitlines()) - 1
    assert f">{made.peak.total / MIB:,.1f}<" in html


def test_report_goes_into_json_without_its_events() -> None:
    made = report()
    found = json.loads(json.dumps(made.to_dict()))
    assert found["peak"]["total"] == made.peak.total
    assert found["kept"] == made.kept and "events" not in found


@pytest.mark.parametrize("instrument", [meter, estimate], ids=lambda function: function.__name__)
def test_report_is_drawn(instrument, tmp_path) -> None:
    pytest.importorskip("matplotlib")
    made = instrument(nn.Linear(64, 64), (1024, 64))
    axes = made.plot()
    axes.figure.savefig(tmp_path / "step.png")
    assert (tmp_path / "step.png").read_bytes().startswith(b"\x89PNG")
    assert axes.dataLim.ymax == pytest.approx(made.peak.step / MIB)
    again = made.plot(axes, colour="#c2410c")
    assert again is axes and len(axes.collections) == 2


def test_measuring_is_silent_and_needs_no_library_for_pictures() -> None:
    program = (
        "import sys, torch; from efficient_densenet import measure;"
        "measure(torch.nn.Linear(4, 4), torch.zeros(2, 4));"
        "assert 'matplotlib' not in sys.modules and 'rich' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
