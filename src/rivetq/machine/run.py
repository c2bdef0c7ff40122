"""Many waiting jobs of one queue and priority, in columns: what a backlog is made of.

A job that only waits needs no object of its own. A run holds up to RUN_JOBS of them, sorted, as a few arrays: some 64
bytes a job instead of several hundred. A batch goes in with a handful of array operations, and a checkpoint writes a
run as one value. Jobs leave at the head; one that leaves becomes an `Entry`. A saved run can let go of its columns, and
read them back from the shelf (the index) when its turn comes. Until then it takes as much memory as one job.

Columns are shared with a checkpoint that is being written. For that reason they are only appended to (behind the part
that was taken) or replaced; nothing is removed in place. One exception: a job's segment and offset may be overwritten
in place. Either value is valid, because both copies of the payload exist.

A job that leaves from the middle leaves a hole: its cell is marked, and nothing is copied. A run with more holes than
jobs is copied without them, so each job that leaves pays for two cells at most.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from .columns import ARRAYS, PAYLOAD_BYTES, RUN_JOBS, Columns, Shelf
from .entry import Entry
from .queue import READY, SCHEDULED, Queue

FEW_HOLES = 32
"""A run with so many holes more than jobs is copied without them."""


class Run:
    """Columns, how far they are used up, and the facts that are kept while they are on the shelf."""

    __slots__ = (
        "at",
        "by_due",
        "columns",
        "gone",
        "head",
        "high",
        "holes",
        "last",
        "left",
        "low",
        "number",
        "priority",
        "queue",
        "shelf",
        "state",
    )

    def __init__(self, queue: Queue, priority: int, columns: Columns, state: int) -> None:
        self.queue = queue
        self.priority = priority
        self.state = state
        self.by_due = state == SCHEDULED
        self.number = 0  # of its value on the shelf; 0: never saved
        self.columns: Columns | None = None
        self.gone: bytearray | None = None
        self.shelf: Shelf | None = None
        self._replace(columns)

    @classmethod
    def shelved(
        cls, queue: Queue, priority: int, state: int, number: int, left: int, head: Any, last: Any, low: int, high: int,
        shelf: Shelf,
    ) -> Run:  # fmt: skip
        """One whose columns are on the shelf."""
        run = cls.__new__(cls)
        run.queue, run.priority, run.state, run.number = queue, priority, state, number
        run.by_due = state == SCHEDULED
        run.columns, run.shelf, run.at = None, shelf, 0
        run.gone, run.holes = None, 0
        run.left, run.head, run.last, run.low, run.high = left, head, last, low, high
        return run

    def _replace(self, columns: Columns) -> None:
        # `gone` has 1 for each hole, and may be shorter than the columns. `holes` counts those from `at` on, which
        # is the cell of a job. In one line: an exception finds all of it done or nothing.
        self.columns, self.at, self.gone, self.holes, self.left = columns, 0, None, 0, len(columns)
        ids = columns.ids
        self.head, self.last = self.key(0), self.key(-1)
        self.low, self.high = (min(ids), max(ids)) if self.by_due else (ids[0], ids[-1])

    def load(self) -> Columns:
        """The columns, read back if they are on the shelf: that costs a read of all cells."""
        columns = self.columns
        if columns is None:
            assert self.shelf is not None, f"run {self.number} has neither columns nor a shelf"
            columns = self.columns = self.shelf.columns(self.number)
            assert len(columns) == self.left, f"run {self.number}: {len(columns)} jobs on the shelf, {self.left} known"
        return columns

    def peek(self) -> tuple[Columns, int]:
        """The columns and the first cell in use; there is no hole behind it. For looking only: nothing stays in memory
        that was not there. Costs a copy of the run if there are holes."""
        if self.gone is not None:
            self.close_holes()
        if self.columns is not None:
            return self.columns, self.at
        assert self.shelf is not None, f"run {self.number} has neither columns nor a shelf"
        return self.shelf.columns(self.number), 0

    def put_away(self, shelf: Shelf) -> None:
        """Let go of the columns. The shelf must hold exactly the jobs that are left here."""
        assert self.number, "a run that was never saved is put away"
        self.columns, self.shelf, self.at, self.gone, self.holes = None, shelf, 0, None, 0

    def key(self, i: int) -> Any:
        """The sort key of a cell: id, or due moment and id."""
        columns = self.columns
        assert columns is not None
        return (columns.dues[i], columns.ids[i]) if self.by_due else columns.ids[i]

    # Growing, at the end

    @property
    def is_full(self) -> bool:
        return self.columns is None or len(self.columns) >= RUN_JOBS

    def takes(self, first_key: Any) -> bool:
        """A job with this key may be appended."""
        columns = self.columns
        return (
            columns is not None
            and len(columns.ids) < RUN_JOBS
            and bool(first_key > self.last)
            and (self.gone is None or bool(first_key > self.key(-1)))  # the last cells may be holes
        )

    def grown(self) -> None:
        """The columns got longer."""
        columns = self.columns
        assert columns is not None
        ids = columns.ids
        added = ids[self.at + self.left + self.holes :]
        self.left = len(ids) - self.at - self.holes
        if not self.by_due:
            self.last = self.high = ids[-1]
            return
        self.last = self.key(-1)
        self.high, self.low = max(self.high, ids[-1]), min(self.low, *added)

    # Holes

    def hole(self, cell: int, end: int) -> int:
        """The first hole in these cells; `end` if there is none."""
        found = -1 if self.gone is None else self.gone.find(1, cell, end)
        return end if found < 0 else found

    def job(self, cell: int) -> int:
        """The first cell from this one on that has a job; if there is none, the end of the columns."""
        if self.gone is None or cell >= len(self.gone):
            return cell
        found = self.gone.find(0, cell)
        return len(self.gone) if found < 0 else found

    def cells(self) -> Sequence[int]:
        """Those that have a job. Costs O(cells) if there are holes, else O(1)."""
        end, gone = len(self.load()), self.gone
        if gone is None:
            return range(self.at, end)
        return [*(i for i in range(self.at, len(gone)) if not gone[i]), *range(len(gone), end)]

    def close_holes(self) -> None:
        """Copy the run without them. Costs O(cells)."""
        if self.gone is not None:
            self.keep(self.cells())

    # Shrinking

    def pop(self, count: int, state: int) -> list[Entry]:
        """The first `count` jobs, as objects in this state; they are not here any more. No hole lies among them.

        Costs O(count).
        """
        columns, at, queue = self.load(), self.at, self.queue
        entries = columns.entries(at, at + count, queue, state)
        if columns.payloads is not None:
            columns.payloads[at : at + count] = [None] * count
            if columns.cached_bytes:
                gone = [entry.length + PAYLOAD_BYTES for entry in entries if entry.payload is not None]
                columns.cached_bytes -= sum(gone)
        self.skip(count)
        return entries

    def skip(self, count: int) -> None:
        """The first `count` jobs, among which no hole lies, are not here any more; nor are the holes behind them."""
        assert self.gone is None or self.hole(self.at, self.at + count) == self.at + count, "a hole is passed over"
        self.at += count
        self.left -= count
        if self.gone is not None and self.left:
            at = self.job(self.at)
            self.holes -= at - self.at
            self.at = at
            if not self.holes:
                self.gone = None
        if self.left:
            self.head = self.key(self.at)
            if not self.by_due:
                self.low = self.head

    def pluck(self, i: int) -> Entry:
        """The job in cell `i`, as an object; it is not here any more."""
        entry = self.load().entry(i, self.queue, self.state)
        self.cut(i)
        return entry

    def cut(self, i: int) -> None:
        """The job in cell `i` is not here any more. Copies no cells, but when holes are many."""
        columns = self.load()
        assert i == self.job(i), f"run {self.number}: cell {i} is a hole"
        if columns.payloads is not None and columns.payloads[i] is not None:
            columns.payloads[i] = None
            if columns.cached_bytes:
                columns.cached_bytes -= columns.lengths[i] + PAYLOAD_BYTES
        if i == self.at:
            self.skip(1)
            return
        if self.gone is None:
            self.gone = bytearray(len(columns))
        elif i >= len(self.gone):
            self.gone.extend(bytes(len(columns) - len(self.gone)))
        self.gone[i] = 1
        self.holes += 1
        self.left -= 1
        if self.key(i) == self.last:
            self.last = self.key(self.gone.rfind(0, self.at, i))
            if not self.by_due:
                self.high = self.last
        if self.holes > self.left + FEW_HOLES:
            self.close_holes()

    def keep(self, cells: Sequence[int]) -> None:
        """Only these cells stay. Costs O(cells)."""
        if cells:
            self._replace(self.load().picked(cells))
        else:
            self.left = 0

    def split(self, count: int) -> Run:
        """A run of the first `count` jobs, which are not here any more."""
        assert self.gone is None, f"run {self.number} is split and has holes"
        columns = self.load()
        part = Run(self.queue, self.priority, columns.picked(slice(self.at, self.at + count)), self.state)
        self.skip(count)
        return part

    def order_by_id(self) -> bool:
        """Change the order from due moments to ids. Returns True if cells changed their places."""
        assert self.by_due
        self.close_holes()
        if self.head[0] == self.last[0]:  # one moment for all: in order already, and may stay on the shelf
            self.state, self.by_due = READY, False
            self.head, self.last = self.head[1], self.last[1]
            self.low, self.high = self.head, self.last
            return False
        columns = self.load()
        self.state, self.by_due = READY, False
        self._replace(columns.picked(sorted(self.cells(), key=columns.ids.__getitem__)))
        return True

    # Finding

    def find(self, job_id: int) -> int:
        """The cell of a job, -1 if it is not here.

        Costs a bisection; O(cells) if the order of ids is not that of due moments.
        """
        if not self.low <= job_id <= self.high or not self.left:
            return -1
        ids = self.load().ids
        if not self.by_due:
            i = bisect_left(ids, job_id, self.at)
            return i if i < len(ids) and ids[i] == job_id and i == self.job(i) else -1
        i = bisect_left(ids, job_id, self.at)  # of jobs with one delay the ids are in order, too
        if i < len(ids) and ids[i] == job_id and i == self.job(i):
            return i
        i = self.at - 1
        try:
            while (i := ids.index(job_id, i + 1)) != self.job(i):
                pass  # it left, and may have come again
        except ValueError:
            return -1
        return i

    def between(self, first_id: int, last_id: int) -> Sequence[int]:
        """The ids in this range, both ends included. Costs a bisection; O(cells) by due moments or with holes."""
        ids = self.load().ids
        if self.gone is not None:
            return [i for i in map(ids.__getitem__, self.cells()) if first_id <= i <= last_id]
        if self.by_due:
            return [i for i in ids[self.at :] if first_id <= i <= last_id]
        return ids[bisect_left(ids, first_id, self.at) : bisect_right(ids, last_id, self.at)]

    def below(self, limit: Any, start: int) -> int:
        """The first cell from `start` on whose key is not below `limit`; it may be a hole."""
        columns = self.load()
        if not self.by_due:
            return bisect_left(columns.ids, limit, start)
        return bisect_left(range(len(columns)), limit, start, key=self.key)

    def after(self, job_id: int) -> int:
        """The first job behind this id, of a run in order of ids."""
        return self.job(bisect_right(self.load().ids, job_id, self.at))

    def check(self) -> None:
        """Assert the order and what is known without the columns."""
        if self.columns is None:
            columns, at = self.peek()
            cells: Sequence[int] = range(at, len(columns))
        else:
            columns, at, cells = self.columns, self.at, self.cells()
        holes = len(columns) - at - len(cells)
        assert 0 < self.left == len(cells), f"run {self.number}: {self.left} left of {len(columns)} from {at} on"
        assert (self.holes, self.gone is None) == (holes, not holes), (
            f"run {self.number}: {self.holes} holes, not {holes}"
        )
        assert cells[0] == at, f"run {self.number}: it begins with a hole"
        ids = [columns.ids[i] for i in cells]
        found: list[Any] = [(columns.dues[i], columns.ids[i]) for i in cells] if self.by_due else ids
        assert all(a < b for a, b in pairwise(found)), f"run {self.number}: out of order"
        assert (found[0], found[-1]) == (self.head, self.last), f"run {self.number}: its ends are not as known"
        assert self.low <= min(ids), f"run {self.number}: an id below {self.low}"
        assert self.high >= max(ids), f"run {self.number}: an id above {self.high}"
        for name in (*ARRAYS, "specs", "keys", "payloads"):
            column = getattr(columns, name)
            assert column is None or len(column) == len(columns), f"run {self.number}: column {name} is short"
