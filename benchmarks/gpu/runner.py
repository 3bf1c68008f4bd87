"""Runs parts one after the other, each within its time, and loses nothing of what they found.

The parts run in a process of their own. One that fails, hangs or takes the device down with it
costs that process and no other part. Nothing here knows what the parts do.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

OK, FAILED, CUT_OFF, SKIPPED, NOT_REACHED = "ok", "failed", "cut off", "skipped", "not reached"


class PartFailed(Exception):
    """A part is over and what it told stands, but something in it is wrong."""


@dataclass
class Job:
    """What a part is given, and how it tells what it has found so far.

    Attributes:
        without: what earlier tries of the part broke at, and how; to be left out.
        earlier: results of the parts before, by name.
    """

    without: dict[str, str]
    earlier: dict[str, Any]
    pipe: Connection | None = field(default=None, repr=False)

    def tell(self, result: Any, running: str | None = None) -> None:
        """Put on record all that was found so far.

        ``running`` names what comes next: should the process break at it, the part is run again
        without it.
        """
        assert self.pipe is not None
        self.pipe.send(("told", (result, running)))


@dataclass(frozen=True)
class Part:
    """Something to run: ``run`` takes a :class:`Job`, may be pickled, and returns its result.

    ``allowance`` is in seconds. A part that ``leaves_traces`` in its process is its last. One that
    runs ``beside`` the others has a process of its own from the start, and is waited for in its
    turn: for work that does not disturb the parts before.
    """

    name: str
    run: Callable[[Job], Any]
    allowance: float
    leaves_traces: bool = False
    beside: bool = False


@dataclass
class Record:
    """What became of a part; ``seconds`` are all it took, tries that broke included."""

    name: str
    allowance: float
    status: str = NOT_REACHED
    seconds: float = 0.0
    error: str | None = None
    result: Any = None


def run_parts(
    parts: Sequence[Part],
    seconds: float,
    write: Callable[[list[Record]], None],
    say: Callable[[str], None] = print,
) -> list[Record]:
    """Run ``parts`` in order within ``seconds`` together.

    A part that might take longer than what is left is skipped, and one that takes longer than its
    allowance is cut off. ``write`` is called with all records whenever there is something new.
    """
    end = time.monotonic() + seconds
    records = [Record(part.name, part.allowance) for part in parts]
    lock = threading.Lock()

    def note() -> None:
        with lock:
            write(records)

    def carry_out(worker: Worker, part: Part, record: Record) -> None:
        earlier = {other.name: other.result for other in records}
        worker.carry_out(part, record, earlier, end, note)
        say(f"{part.name}: {record.status} ({record.seconds:.1f} s)")
        if record.error:
            say(record.error)

    main, others, threads = Worker(), [], {}
    try:
        for part, record in zip(parts, records, strict=True):
            if part.beside:
                others.append(Worker())
                arguments = (others[-1], part, record)
                threads[part.name] = threading.Thread(target=carry_out, args=arguments)
                threads[part.name].start()
        for part, record in zip(parts, records, strict=True):
            say(f"{part.name} ...")
            if part.beside:
                threads[part.name].join()
            else:
                carry_out(main, part, record)
    finally:
        for worker in (main, *others):
            worker.kill()
    return records


class Worker:
    """A process that runs parts until one breaks it; then there is another."""

    def __init__(self) -> None:
        self._process: Any = None
        self._pipe: Any = None

    def carry_out(
        self,
        part: Part,
        record: Record,
        earlier: dict[str, Any],
        end: float,
        note: Callable[[], None],
    ) -> None:
        """Run ``part`` before ``end``, again without what it broke at, and fill in ``record``."""
        without: dict[str, str] = {}
        while True:
            left = end - time.monotonic()
            if left < part.allowance:
                if not without:
                    record.status = SKIPPED
                    record.error = f"may take {part.allowance:.0f} s, and {left:.0f} s are left"
                break
            start = time.monotonic()
            running = self._try(part, Job(without, earlier), record, note)
            record.seconds += time.monotonic() - start
            if part.leaves_traces:
                self.kill()
            if running is None or running in without:
                break
            without[running] = f"{record.status}: {(record.error or '').splitlines()[-1]}"
        note()

    def _try(self, part: Part, job: Job, record: Record, note: Callable[[], None]) -> str | None:
        """One try; returns what was running when the process broke, if the part had said so."""
        self._start()
        self._pipe.send((part.run, job))
        end = time.monotonic() + part.allowance
        kind, value = "told", (None, None)
        while kind == "told":
            record.result, running = value
            note()
            try:
                in_time = self._pipe.poll(max(end - time.monotonic(), 0))
                kind, value = self._pipe.recv() if in_time else ("late", None)
            except (EOFError, ConnectionResetError):
                kind, value = "died", None
        if kind == "done":
            record.status, record.error, record.result = OK, None, value
            return None
        if kind == "wrong":
            record.status, record.error = FAILED, value
            return None
        if kind == "late":
            record.status, record.error = CUT_OFF, f"took longer than {part.allowance:.0f} s"
        elif kind == "died":
            self._process.join()
            code = self._process.exitcode
            record.status, record.error = FAILED, f"the process died with exit code {code}"
        else:
            record.status, record.error = FAILED, value
        self.kill()
        return running

    def _start(self) -> None:
        if self._process is not None:
            return
        context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,))
        self._process.start()
        theirs.close()

    def kill(self) -> None:
        """End the process and all that it has started."""
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()  # it may not have made its group yet
        self._process.join()
        self._pipe.close()
        self._process = self._pipe = None


def _serve(pipe: Connection) -> None:
    os.setpgrp()
    while True:
        try:
            run, job = pipe.recv()
        except EOFError:
            return
        job.pipe = pipe
        try:
            pipe.send(("done", run(job)))
        except PartFailed as error:
            pipe.send(("wrong", str(error)))
        except BaseException:
            pipe.send(("failed", traceback.format_exc()))
