"""Parts that behave and parts that do not, for the tests of the runner; they import no torch."""

import os
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.gpu.runner import Job, PartFailed


def fine(job: Job) -> str:
    return "found"


def numbers(job: Job) -> int:
    return os.getpid()


def breaks(job: Job) -> None:
    raise ValueError("no such thing")


def finds_fault(job: Job) -> None:
    job.tell("half of it")
    raise PartFailed("the other half is wrong")


def hangs(job: Job) -> None:
    job.tell("half of it", running="the other half")
    time.sleep(600)


def hangs_with_a_child(job: Job, note: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    note.write_text(str(child.pid), encoding="utf-8")
    time.sleep(600)


def dies_of_one(job: Job) -> list[str]:
    found: list[str] = []
    for name in ("first", "deadly", "last"):
        if name in job.without:
            found.append(f"{name}: {job.without[name]}")
            continue
        job.tell(found, running=name)
        if name == "deadly":
            os._exit(3)
        found.append(name)
    return found


def always_dies(job: Job) -> None:
    job.tell("little", running="all of it")
    os._exit(3)


def dies_after_its_end(job: Job) -> str:
    import threading

    threading.Timer(0.1, os._exit, [3]).start()
    return "found"


def waits_for_a_file(job: Job, note: Path) -> str:
    while not note.exists():
        time.sleep(0.01)
    return "it came"


def makes_a_file(job: Job, note: Path) -> None:
    note.touch()


def reads_earlier(job: Job) -> dict:
    return job.earlier


def tells_time_left(job: Job) -> float:
    return job.left()
