"""Run every part on the GPU, and write what was found and pictures of it.

    python -m benchmarks.gpu                # a GPU, nine minutes, docs/results/gpu.{json,md}, PNGs
    python -m benchmarks.gpu --rehearse     # the same parts on tiny shapes, on any machine

The JSON is written whenever there is something new: what was found stays if the run is killed.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS, REHEARSED = ROOT / "docs" / "results", ROOT / "runs" / "rehearsal"
SECONDS = 8.5 * 60


def main(arguments: list[str] | None = None) -> int:
    args = _parser().parse_args(arguments)
    os.environ.pop("EFFICIENT_DENSENET_KERNELS", None)  # every competitor names its own
    if args.rehearse:
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton
    from benchmarks.cases import DEVICE
    from benchmarks.gpu import report
    from benchmarks.gpu.programme import REAL, REHEARSAL, programme
    from benchmarks.gpu.runner import OK, Record, run_parts
    from benchmarks.provenance import provenance

    if DEVICE.type != "cuda" and not args.rehearse:
        print("there is no CUDA device here; --rehearse runs tiny shapes on a CPU", file=sys.stderr)
        return 2
    scale = REHEARSAL if args.rehearse else REAL
    parts = [p for p in programme(scale) if not args.only or p.name in args.only]
    conditions = provenance() | ({"commit": args.commit} if args.commit else {})
    del conditions["dtype"], conditions["layout"]  # every case has its own
    out = args.out or (REHEARSED if args.rehearse else RESULTS)
    out.mkdir(parents=True, exist_ok=True)

    def write(records: list[Record]) -> None:
        found = {
            "rehearsal": args.rehearse,
            "conditions": conditions,
            "parts": [asdict(record) for record in records],
        }
        _replace(out / report.JSON, found)

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the parts' process ends too
    records = run_parts(parts, args.seconds, write)
    report.write(out / report.JSON)
    print(f"written to {out}")
    return 0 if all(record.status == OK for record in records) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes, Triton interpreted")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for all parts together")
    parser.add_argument("--only", nargs="+", metavar="PART", help="parts by name")
    parser.add_argument("--out", type=Path, help="folder of the results")
    parser.add_argument("--commit", help="of this copy, where it is no checkout")
    return parser


def _replace(path: Path, content: dict[str, Any]) -> None:
    """Write JSON so that there is a whole file at any time."""
    fresh = path.with_suffix(".tmp")
    fresh.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    fresh.replace(path)


if __name__ == "__main__":
    sys.exit(main())
