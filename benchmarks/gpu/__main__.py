"""Run every part on the GPU, and write what was found and pictures of it.

    python -m benchmarks.gpu                # a GPU, nine minutes, docs/results/gpu.{json,md}, PNGs
    python -m benchmarks.gpu --rehearse     # the same parts on tiny shapes, on any machine's CPU

The JSON is written whenever there is something new: what was found stays if the run is killed.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path

from benchmarks.provenance import Json

BEGUN = time.monotonic()
ROOT = Path(__file__).parents[2]
RESULTS, REHEARSED = ROOT / "docs" / "results", ROOT / "runs" / "rehearsal"
SECONDS = 8.4 * 60
"""For all parts together; the rest of nine minutes is for the report."""


def main(arguments: list[str] | None = None) -> int:
    args = _parser().parse_args(arguments)
    os.environ.pop("EFFICIENT_DENSENET_KERNELS", None)  # every competitor names its own
    os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # the profiler would tell of every start
    if args.rehearse:  # before anything imports torch or Triton
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        os.environ["TRITON_INTERPRET"] = "1"
    from benchmarks.cases import DEVICE
    from benchmarks.gpu import report
    from benchmarks.gpu.programme import REAL, REHEARSAL, programme
    from benchmarks.gpu.runner import OK, Record, run_parts
    from benchmarks.provenance import provenance

    if DEVICE.type != "cuda" and not args.rehearse:
        print("there is no CUDA device here; --rehearse runs tiny shapes on a CPU", file=sys.stderr)
        return 2
    parts = programme(REHEARSAL if args.rehearse else REAL)
    if unknown := set(args.only or ()) - {part.name for part in parts}:
        names = "\n".join(part.name for part in parts)
        print(f"there is no part {unknown.pop()!r}, but\n{names}", file=sys.stderr)
        return 2
    conditions = provenance() | ({"commit": args.commit} if args.commit else {})
    del conditions["dtype"], conditions["layout"]  # every case has its own
    out = args.out or (REHEARSED if args.rehearse else RESULTS)
    out.mkdir(parents=True, exist_ok=True)
    source = out / report.json_name(args.rehearse)

    def write(records: list[Record]) -> None:
        found = {
            "rehearsal": args.rehearse,
            "conditions": conditions,
            "parts": [asdict(record) for record in records],
        }
        _replace(source, found)

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the parts' processes end too
    wanted = [part for part in parts if not args.only or part.name in args.only]
    records = run_parts(wanted, BEGUN + args.seconds, write)
    report.write(source)
    print(f"written to {out}")
    return 0 if all(record.status == OK for record in records) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes on the CPU")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for all parts together")
    parser.add_argument("--only", nargs="+", metavar="PART", help="parts by name")
    parser.add_argument("--out", type=Path, help="folder of the results")
    parser.add_argument("--commit", help="of this copy, where it is no checkout")
    return parser


def _replace(path: Path, content: Json) -> None:
    """Write JSON so that there is a whole file at any time."""
    fresh = path.with_suffix(".tmp")
    fresh.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    fresh.replace(path)


if __name__ == "__main__":
    sys.exit(main())
