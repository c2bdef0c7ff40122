"""What the consumers' programs share: what they are asked for, and how they count.

Each is run twice: `python NAME.py fill VARIANT PLACE JOBS REPORT` puts in JOBS jobs whose handler does nothing but
count, and the same with `work` consumes them until a SIGTERM. PLACE is a directory, or the socket of a Redis. Peers are
imported by name, since none of them must be installed for a type checker to look at these programs.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

THREADS = 8
QUEUE = "bench"
FILL_BATCH = 1000
WARM_SHARE = 10  # one part of so many is done before the clock starts: threads come up, connections open


@dataclass(frozen=True)
class Asked:
    fill: bool
    variant: str
    place: str
    jobs: int
    report: Path


def asked() -> Asked:
    step, variant, place, jobs, report = sys.argv[1:]
    return Asked(step == "fill", variant, place, int(jobs), Path(report))


class Meter:
    """Counts in the handler and tells the time of two jobs: the one a tenth of the way, and the last.

    The report gets a line for each, with how many different jobs came until then: if some came twice, the rate would be
    none. What it costs a job is two calls of built-in functions, the same for everybody.
    """

    def __init__(self, jobs: int, report: Path) -> None:
        self._marks = {jobs // WARM_SHARE - 1, jobs - 1}
        self._report = report
        self._seen: list[int] = []
        self._count = itertools.count()  # a call of a built-in object: no two threads get the same number

    def done(self, n: int) -> None:
        self._seen.append(n)  # before it counts: who gets the last number finds all the others here
        at = next(self._count)
        if at in self._marks:
            tell(self._report, at, time.perf_counter(), len(set(self._seen)))


class SharedMeter:
    """The same for a handler in several processes of one thread each: what they count by is the end of a file.

    This costs a job two calls of the system: only for a peer that takes a hundred times longer for one.
    """

    BYTES = 4

    def __init__(self, jobs: int, report: Path) -> None:
        self._marks = {jobs // WARM_SHARE - 1, jobs - 1}
        self._report = report
        self._file: int | None = None

    def done(self, n: int) -> None:
        if self._file is None:  # opened by each process, not before a fork: only so has each a position of its own
            self._file = os.open(self._report.with_suffix(".seen"), os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        os.write(self._file, n.to_bytes(self.BYTES, "big"))
        at = os.lseek(self._file, 0, os.SEEK_CUR) // self.BYTES - 1
        if at in self._marks:
            now = time.perf_counter()  # the clock of the machine, so it may be another process that told the first
            written = os.pread(self._file, (at + 1) * self.BYTES, 0)
            seen = {written[start : start + self.BYTES] for start in range(0, len(written), self.BYTES)}
            tell(self._report, at, now, len(seen))


def tell(report: Path, at: int, seconds: float, different: int) -> None:
    with report.open("a") as lines:
        lines.write(json.dumps({"jobs": at + 1, "seconds": seconds, "different": different}) + "\n")
