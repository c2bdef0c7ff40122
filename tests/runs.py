"""Jobs in runs, for tests of these and of windows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rivetq.machine.columns import Columns
from rivetq.machine.entry import Entry, Spec
from rivetq.machine.queue import READY, SCHEDULED, Queue
from rivetq.machine.run import Run
from rivetq.model import NO_HEADERS, RetryPolicy

QUEUE = Queue(1, "mail")
SPECS = [Spec(5, None, RetryPolicy(), visibility_ms, NO_HEADERS) for visibility_ms in (None, 7)]


def job(job_id: int, due_ms: int = 0, **fields: Any) -> Entry:
    entry = Entry(job_id, QUEUE, SPECS[0], 1000 + job_id, due_ms, None)
    entry.state = SCHEDULED if due_ms else READY
    entry.segment, entry.offset, entry.length, entry.crc = 1, 100 * job_id, 10, job_id
    entry.size, entry.lsn = 90, job_id
    for name, value in fields.items():
        setattr(entry, name, value)
    return entry


def columns_of(jobs: Sequence[Entry]) -> Columns:
    columns = Columns()
    for entry in jobs:
        columns.add(entry)
    return columns


def run_of(*keys: int | tuple[int, int]) -> Run:
    """A run of jobs with these ids, or with these due moments and ids."""
    jobs = [job(key) if isinstance(key, int) else job(key[1], key[0]) for key in keys]
    run = Run(QUEUE, 5, columns_of(jobs), jobs[0].state)
    run.check()
    return run


def keys_of(run: Run) -> list[Any]:
    """Those of its jobs; the run stays as it is."""
    if run.columns is None:
        columns, at = run.peek()
        cells: Sequence[int] = range(at, len(columns))
    else:
        columns, cells = run.columns, run.cells()
    return [(columns.dues[i], columns.ids[i]) if run.by_due else columns.ids[i] for i in cells]


class Shelf:
    """What stands for an index: columns by the number of their run."""

    def __init__(self) -> None:
        self.saved: dict[int, Columns] = {}
        self.reads = 0

    def save(self, run: Run, number: int) -> None:
        run.number = number
        self.saved[number] = run.load().picked(run.cells())

    def columns(self, number: int) -> Columns:
        self.reads += 1
        return self.saved[number].picked(slice(None))

    def key(self, queue: int, text: str) -> tuple[int, int, int] | None:
        return None

    def key_names(self) -> list[tuple[int, str]]:
        return []
