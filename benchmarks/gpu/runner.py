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
from multiprocessing.process import BaseProcess

from benchmarks.provenance import Json

OK, FAILED, CUT_OFF, SKIPPED, NOT_REACHED = "ok", "failed", "cut off", "skipped", "not reached"
LEAST = 10.0
"""Seconds for which a part that is allowed more is still worth starting."""
DYING = 5.0
"""Seconds that a killed process may take to end; a driver can hold it for ever."""


class PartFailed(Exception):
    """A part is over and what it told stands, but something in it is wrong."""


@dataclass
class Job:
    """What a part is given, and how it tells what it has found so far.

    Attributes:
        deadline: when the part will be cut off, by :func:`time.monotonic`.
        without: what earlier tries of the part broke at, and how; to be left out.
        earlier: results of the parts before, by name.
    """

    deadline: float
    without: dict[str, str]
    earlier: Json
    pipe: Connection | None = field(default=None, repr=False)

    def left(self) -> float:
        """Seconds until the part will be cut off."""
        return self.deadline - time.monotonic()

    def tell(self, result: object, running: str | None = None) -> None:
        """Put on record all that was found so far.

        ``running`` names what comes next: should the process die of it, the part is run again
        without it.
        """
        assert self.pipe is not None
        self.pipe.send(("told", (result, running)))


@dataclass(frozen=True)
class Part:
    """Something to run: ``run`` takes a :class:`Job`, may be pickled, and returns its result.

    ``allowance`` is in seconds, for all its tries. A part that ``leaves_traces`` in its process is
    its last. One that runs ``beside`` the others has a process of its own from the start, and is
    waited for in its turn: for work that does not disturb the parts before.
    """

    name: str
    run: Callable[[Job], object]
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
    result: object = None


def run_parts(
    parts: Sequence[Part],
    end: float,
    write: Callable[[list[Record]], None],
    say: Callable[[str], None] = print,
) -> list[Record]:
    """Run ``parts`` in order until ``end``, by :func:`time.monotonic`.

    A part is cut off when its allowance or the time is over, and skipped if there is too little
    left to start it. ``write`` is called with all records whenever there is something new.
    """
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
            if part.beside:
                threads[part.name].join()
            else:
                say(f"{part.name} ...")
                carry_out(main, part, record)
    finally:
        for worker in (main, *others):
            worker.kill()
    return records


class Worker:
    """A process that runs parts until one breaks it; then there is another."""

    def __init__(self) -> None:
        self._process: BaseProcess | None = None
        self._pipe: Connection | None = None

    def carry_out(
        self,
        part: Part,
        record: Record,
        earlier: Json,
        end: float,
        note: Callable[[], None],
    ) -> None:
        """Run ``part`` before ``end``, again without what killed it, and fill in ``record``."""
        start = time.monotonic()
        if end - start < min(part.allowance, LEAST):
            record.status, record.error = SKIPPED, f"{max(end - start, 0):.0f} s are left"
            note()
            return
        job = Job(min(start + part.allowance, end), {}, earlier)
        while True:
            running = self._try(part, job, record, note)
            record.seconds = time.monotonic() - start
            if part.leaves_traces:
                self.kill()
            if running is None or running in job.without or job.left() <= 0:
                break
            job.without[running] = f"{record.status}: {(record.error or '').splitlines()[-1]}"
        note()

    def _try(self, part: Part, job: Job, record: Record, note: Callable[[], None]) -> str | None:
        """One try; returns what was running when the process broke, if the part had said so."""
        self._start()
        self._pipe.send((part.run, job))
        kind, value = "told", (None, None)
        while kind == "told":
            record.result, running = value
            note()
            try:
                in_time = self._pipe.poll(max(job.left(), 0))
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
            at = f" at {running}" if running else ""
            record.status, record.error = CUT_OFF, f"its time was over{at}"
        elif kind == "died":
            self._process.join(DYING)
            code = self._process.exitcode
            record.status, record.error = FAILED, f"the process died with exit code {code}"
        else:
            record.status, record.error = FAILED, value
        self.kill()
        return running

    def _start(self) -> None:
        if self._process is not None and self._process.is_alive():
            return
        self.kill()
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
        self._process.join(DYING)
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
