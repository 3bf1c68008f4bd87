"""Generated pages, tables and pictures are what `make docs` makes of the committed results."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.provenance import RESULTS, as_json, commit
from docs.tables import files, markdown, memory, stale, steps
from docs.tables.__main__ import PICTURES, pages
from efficient_densenet.training.work import COMPETITORS
from support.commands import ROOT

MIB = 2**20


def test_pages_on_disk_are_what_results_say() -> None:
    made = dict(pages())
    differing = [path for path in made if (ROOT / path).read_text(encoding="utf-8") != made[path]]
    assert differing == [], "run `make docs`"


@pytest.mark.parametrize(("path", "draw"), PICTURES.items())
def test_picture_on_disk_is_what_results_say(
    path: str, draw: Callable[[Path], None], tmp_path: Path
) -> None:
    once, twice = tmp_path / "once.png", tmp_path / "twice.png"
    try:
        draw(once)
    except FileNotFoundError:
        pytest.skip("its results are not there")
    draw(twice)
    assert once.read_bytes() == twice.read_bytes()
    on_disk = (ROOT / path).read_bytes()
    version = f"Matplotlib version{importlib.metadata.version('matplotlib')}".encode()
    if version not in on_disk:
        pytest.skip("drawn by another matplotlib")
    assert on_disk == once.read_bytes(), "run `make docs`"


def test_generated_folder_holds_nothing_else() -> None:
    generated = {
        *dict(pages()),
        *PICTURES,
        *(f"docs/results/{name}.json" for name in stale.DEPENDS),
    }
    present = {path.relative_to(ROOT).as_posix() for path in RESULTS.iterdir()}
    assert present <= generated


def test_block_is_replaced_alone() -> None:
    page = "before\n<!-- a:begin -->\nold\n<!-- a:end -->\nafter"
    made = markdown.with_block(page, "a", r"new \1")
    assert made == "before\n<!-- a:begin -->\nnew \\1\n<!-- a:end -->\nafter"
    assert markdown.with_block(made, "a", r"new \1") == made


@pytest.mark.parametrize("page", ["", "<!-- a:begin --><!-- a:end -->" * 2])
def test_block_without_its_marks_is_refused(page: str) -> None:
    with pytest.raises(ValueError, match="'a'"):
        markdown.with_block(page, "a", "new")


def test_numbers_of_list_share_line() -> None:
    assert as_json({"a": [1, -2.5, 1e-9], "b": ["[1,\n 2]"]}).splitlines() == [
        "{",
        ' "a": [ 1, -2.5, 1e-09 ],',
        ' "b": [',
        '  "[1,\\n 2]"',
        " ]",
        "}",
    ]


def test_planned_peaks_show_every_network_and_worst_ratios() -> None:
    networks = [
        network("cifar-bc", 32, 16, 1.01, depth=40, growth_rate=12),
        network("fashion", 96, 8, 0.995, in_channels=1),
    ]
    conditions = {"device": "a machine", "threads": "1", "torch": "3", "commit": "c", "date": "d"}
    table = memory.planned_table({"networks": networks, "conditions": conditions})
    assert "| cifar-bc-40, k=12 | 32²×3 | 16 | 100.0 (1.010) |" in table
    assert "| fashion | 96²×1 | 8 | 100.0 (0.995) |" in table
    assert "between 0.995 and 1.010" in table
    assert "a machine, 1 thread, torch 3, commit c, d" in table


def network(model: str, image_size: int, batch_size: int, ratio: float, **work: int) -> dict:
    work = {"model": model, "image_size": image_size, "batch_size": batch_size, **work}
    return {"work": work, "peaks": dict.fromkeys(COMPETITORS, (100 * MIB, ratio))}


def test_files_are_told_by_their_docstrings(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text('"""What ``it``\ndoes | not.\n\nMore."""\n', encoding="utf-8")
    assert files.summary(path) == "What `it` does \\| not."
    path.write_text("x = 1\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"module\.py"):
        files.summary(path)


@pytest.mark.parametrize(
    ("measured_at", "why"),
    [
        ("HEAD", None),
        ("HEAD-dirty", "changes that were not committed"),
        ("0" * 40, "does not have"),
    ],
)
def test_result_is_stale_with_its_commit(
    measured_at: str, why: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if commit().endswith("-dirty") and why is None:
        pytest.skip("files differ from the commit")
    monkeypatch.setattr(stale, "results", lambda name: {"conditions": {"commit": measured_at}})
    lines = [line for line in stale.stale() if not line.startswith("missing")]
    assert bool(lines) == bool(why)
    assert all(why is not None and why in line for line in lines)


def test_result_is_stale_once_file_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    changed = "efficient_densenet/kernels/eager.py"
    answer = type("Answer", (), {"returncode": 0, "stdout": f"{changed}\n"})
    monkeypatch.setattr(stale.subprocess, "run", lambda command, **options: answer)
    [line] = [line for line in stale.stale() if "choices" in line]
    assert line.endswith(f": {changed} changed")


def test_what_measures_imports_nothing_that_writes_pages() -> None:
    programs = (ROOT / "benchmarks").rglob("*.py")
    assert not [path for path in programs if "docs.tables" in path.read_text(encoding="utf-8")]


def test_readme_shows_every_instruction_set() -> None:
    """Times of both runs side by side; the bytes and rows are the first one's."""

    def run(instructions: str, norm: float) -> dict:
        seconds = {"naive": 1.0, "norm": norm, "bottleneck": 1.5}
        rows = [
            {"case": f"{case}, a batch", "competitor": name, "failure": "", "peak_bytes": MIB}
            | {"seconds": [taken] * 3}
            for case in steps.CASES
            for name, taken in seconds.items()
        ]
        conditions = {"device": "a CPU", "threads": "2", "torch": "2.14.1", "commit": "abc"}
        conditions |= {"instruction set": instructions, "date": "2026-01-01"}
        return {"conditions": conditions, "rows": rows}

    text = steps.readme_of([run("AVX512", 0.5), run("AVX2 by LIMIT=avx2", 0.75)])
    assert "on a CPU with AVX512 or AVX2" in text
    assert '`recompute="norm"`** | 1 | 500 | 750 | 1 | 500 | 750 |' in text
    assert "0.50 or 0.75" in text
    assert "AVX2 by LIMIT=avx2" in text
    assert "Not measured: GPUs." in text
