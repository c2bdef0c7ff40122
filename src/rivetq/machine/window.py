"""The jobs of one queue and priority that wait in one state, in order; only the head needs to be in memory.

Some jobs are objects of the machine ("loose": their sort keys are here), the others are in runs. Runs may overlap: a
reader of the order merges them, from the head of each. A run is loaded when its head comes up, so the memory that is
needed does not grow with the backlog.

Sort keys are ids (ready and dead jobs) or (due_ms, id) (scheduled ones).
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterator
from heapq import heappop, heappush
from itertools import pairwise
from operator import attrgetter, itemgetter
from typing import Any

from sortedcontainers import SortedList

from .run import Run

OPEN_RUNS = 2
"""Runs that still grow: new jobs have the highest ids, but copies of old jobs come in ascending order as well."""
FEW_JOBS = 64
"""Batches below this size that come out of order are not worth a run of their own."""


_low, _head = itemgetter(0), attrgetter("head")


class Window:
    """Keys in order, each at most once.

    Costs, with n loose keys and r runs: a loose key O(log n), a whole run O(r) pointers.
    """

    __slots__ = ("by_due", "by_low", "count", "loose", "opens", "runs", "span")

    def __init__(self, *, by_due: bool = False) -> None:
        self.by_due = by_due
        self.count = 0
        self.loose: SortedList[Any] = SortedList()
        self.runs: list[Run] = []  # by head
        self.by_low: list[tuple[int, Run]] = []  # the same by their lowest ids when they came or grew; if by_due only
        self.span = 0  # no run has ids further apart than this
        self.opens: list[Run] = []  # runs that take more jobs, the one with the highest end first

    def __len__(self) -> int:
        return self.count

    def add(self, key: Any) -> None:
        """Add a loose key that is not there."""
        self.loose.add(key)
        self.count += 1

    def discard(self, key: Any) -> None:
        """Remove a loose key that may be there."""
        before = len(self.loose)
        self.loose.discard(key)
        self.count -= before - len(self.loose)

    def first(self) -> Any:
        """The least key, or None. Costs O(1)."""
        runs, loose = self.runs, self.loose
        if runs and (not loose or runs[0].head < loose[0]):
            return runs[0].head
        return loose[0] if loose else None

    # Runs

    def open_for(self, key: Any) -> Run | None:
        """A run that a job with this key can be appended to; its caller calls `grown`. Costs O(OPEN_RUNS)."""
        for run in self.opens:
            if run.takes(key):
                return run
        return None

    def grown(self, run: Run, count: int) -> None:
        """`count` jobs were appended to one of the runs. Costs a bisection, if the order is by due moments."""
        self._delist(run)
        run.grown()
        self._enlist(run)
        self.count += count
        if run.high - run.low > self.span:
            self.span = run.high - run.low
        opens = self.opens
        if opens[0] is not run and opens[0].last < run.last:
            opens.sort(key=lambda each: each.last, reverse=True)

    def grown_by_one(self, run: Run, job_id: int) -> None:
        """A job was appended to an open run; for a window in order of ids."""
        run.left += 1
        run.last = run.high = job_id
        self.count += 1
        if job_id - run.low > self.span:
            self.span = job_id - run.low
        if self.opens[0] is not run:
            self.opens.sort(key=lambda each: each.last, reverse=True)

    def insert(self, run: Run, *, is_open: bool = False) -> None:
        """Add a whole run; if it is open, others may follow it. Costs a bisection and a move of up to r pointers."""
        self.runs.insert(bisect_left(self.runs, run.head, key=_head), run)
        self.count += run.left
        self.span = max(self.span, run.high - run.low)
        self._enlist(run)
        if is_open:
            # The one with the lowest end goes: what comes is usually higher.
            self.opens = sorted([run, *self.opens], key=lambda each: each.last, reverse=True)[:OPEN_RUNS]

    def remove(self, run: Run) -> None:
        """Take a whole run out."""
        self.runs.remove(run)
        self.count -= run.left
        self._delist(run)
        self._close(run)

    def _enlist(self, run: Run) -> None:
        if self.by_due:
            insort(self.by_low, (run.low, run), key=_low)

    def _delist(self, run: Run) -> None:
        """Costs a bisection: the lowest id of a run may have risen since it was listed."""
        if self.by_due:
            end = bisect_right(self.by_low, run.high, key=_low)
            at = next(i for i in range(end - 1, -1, -1) if self.by_low[i][1] is run)
            del self.by_low[at]

    def _close(self, run: Run) -> None:
        if run in self.opens:
            self.opens.remove(run)

    def popped(self, run: Run, count: int) -> None:
        """`count` jobs left this run. Put it into its new place, or remove it if it is used up."""
        self.count -= count
        runs = self.runs
        if run.left and (len(runs) == 1 or (runs[0] is run and run.head < runs[1].head)):
            return
        runs.remove(run)
        if run.left:
            runs.insert(bisect_left(runs, run.head, key=_head), run)
        else:
            self._delist(run)
            self._close(run)

    def plucked(self, run: Run, head: Any) -> None:
        """A job left this run; `head` is the run's head before that."""
        if run.left and run.head == head:
            self.count -= 1
        else:
            self.popped(run, 1)

    def find(self, job_id: int) -> tuple[Run, int] | None:
        """The run and the cell of a job. Costs `around`, and `Run.find` in each run that it tells."""
        for run in self.around(job_id, job_id):
            if (i := run.find(job_id)) >= 0:
                return run, i
        return None

    def around(self, first_id: int, last_id: int) -> list[Run]:
        """The runs that may have ids in this range. Costs two bisections, plus the runs that it returns."""
        runs = self.runs
        if not runs:
            return []
        if self.by_due:  # none is wider than `span`
            listed = self.by_low
            start = bisect_left(listed, first_id - self.span, key=_low)
            stop = bisect_left(listed, last_id + 1, key=_low)
            runs = [run for _, run in listed[start:stop]]
        else:  # in order of ids
            start = bisect_left(runs, first_id - self.span, key=_head)
            stop = bisect_left(runs, last_id + 1, key=_head)
            runs = runs[start:stop]
        return [run for run in runs if run.low <= last_id and run.high >= first_id]

    # Reading in order

    def walk(self, after: int | None = None) -> Iterator[tuple[Run | None, int, int]]:
        """Stretches in order: (run, first cell, end), or (None, first position among the loose keys, end).

        Each step costs O(log r) of the runs that overlap there; with `after` the first one costs O(r).

        Args:
            after: only ids above this one; for a window in order of ids. The window must not change meanwhile.
        """
        runs, loose = self.runs, self.loose
        active: list[tuple[Any, int, int]] = []  # heap of (key, index of the run, cell)
        coming, at = 0, 0
        if after is not None:
            at = loose.bisect_right(after)
            coming = bisect_left(runs, after + 1, key=_head)
            for index in range(coming):
                if runs[index].last > after:
                    cell = runs[index].after(after)
                    heappush(active, (runs[index].key(cell), index, cell))
        while True:
            while coming < len(runs) and (not active or runs[coming].head < active[0][0]):
                heappush(active, (runs[coming].head, coming, runs[coming].at))
                coming += 1
            key = loose[at] if at < len(loose) else None
            if not active:
                if key is not None:
                    yield None, at, len(loose)
                return
            head, index, cell = active[0]
            if key is not None and key < head:
                end = loose.bisect_left(head)
                yield None, at, end
                at = end
                continue
            heappop(active)
            limits = [limit for limit in (key, active[0][0] if active else None) if limit is not None]
            if coming < len(runs):
                limits.append(runs[coming].head)
            run = runs[index]
            columns = run.load()
            # A run that went to the shelf and came back between two steps would count its cells anew: it cannot, the
            # window does not change under a walk.
            limit = min(limits, default=None)
            end = len(columns) if limit is None or run.last < limit else run.below(limit, cell)
            end = run.hole(cell, end)
            yield run, cell, end
            end = run.job(end)
            if end < len(columns):
                heappush(active, (run.key(end), index, end))

    def check(self) -> None:
        """Assert the order, the count, and that no key is there twice."""
        self.loose._check()
        keys = list(self.loose)
        assert all(a < b for a, b in pairwise(keys)), "window: keys out of order or twice"
        assert all(a.head <= b.head for a, b in pairwise(self.runs)), "window: runs out of order"
        assert set(self.opens) <= set(self.runs), "window: an open run is not among its runs"
        assert self.count == len(keys) + sum(run.left for run in self.runs), f"window: the count {self.count} is off"
        if self.by_due:
            assert {id(run) for _, run in self.by_low} == set(map(id, self.runs)), (
                "window: other runs by their lowest id"
            )
            assert all(low <= run.low for low, run in self.by_low), "window: a run is listed behind its lowest id"
            assert all(a[0] <= b[0] for a, b in pairwise(self.by_low)), "window: runs out of order by their lowest id"
            assert all(run.high - low <= self.span for low, run in self.by_low), "window: a listed run is too wide"
        for run in self.runs:
            assert run.high - run.low <= self.span, f"window: run {run.number} is wider than {self.span}"
            assert run.by_due == self.by_due, f"window: run {run.number} is in another order"
            run.check()
