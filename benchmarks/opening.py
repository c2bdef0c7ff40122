"""Opening a directory with many waiting jobs: how long it takes, and how much memory the process has afterwards.

Run as a program, it is the process that is measured: `python opening.py rivetq|sqlite DIR` prints one line of JSON.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from cases import ENQUEUE_BATCH, PAYLOADS, Contestant, OnRivetQ, OnSqlite

INDEX = "index"  # inside a broker's directory: a cache, which an opening rebuilds from the log if it is gone


class Opening(NamedTuple):
    """`open_ms` is the constructor alone; `first_lease_ms` counts from before it until a job is in hand."""

    open_ms: float
    first_lease_ms: float
    anon_before_kb: int
    anon_kb: int


def fill(directory: Path, jobs: int) -> None:
    """The same jobs for both, then a clean close."""
    for kind in ("rivetq", "sqlite"):
        contestant = contestant_of(kind, directory, durable=False)
        for _ in range(jobs // ENQUEUE_BATCH):
            contestant.enqueue_many(PAYLOADS)
        contestant.close()


def measure(kind: str, directory: Path) -> Opening:
    """Open in a process of its own, take one job, close again."""
    command = [sys.executable, __file__, kind, str(directory)]
    return Opening(**json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout))


def delete_index(directory: Path) -> None:
    shutil.rmtree(directory / "rivetq" / INDEX)


def contestant_of(kind: str, directory: Path, *, durable: bool) -> Contestant:
    return (OnRivetQ if kind == "rivetq" else OnSqlite)(directory, durable=durable)


def anon_kb() -> int:
    """Memory of this process that no file backs (so without the pages of a mapped index); 0 where nobody tells."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon:")), 0)


def main(kind: str, directory: Path) -> None:
    before_kb, started = anon_kb(), time.perf_counter()
    contestant = contestant_of(kind, directory, durable=True)
    opened = time.perf_counter()
    deliveries = contestant.lease(1)
    leased = time.perf_counter()
    opening = Opening((opened - started) * 1000, (leased - started) * 1000, before_kb, anon_kb())
    contestant.ack(deliveries)
    contestant.close()
    print(json.dumps(opening._asdict()))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
