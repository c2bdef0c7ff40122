"""Many waiting jobs of one queue and priority, in columns: what a backlog is made of.

A job that only waits needs no object of its own. A run holds up to RUN_JOBS of them, sorted, as a few arrays: some 64
bytes a job instead of several hundred, a batch goes in with a handful of array operations, and a checkpoint writes a
run as one value. Jobs leave at the head; one that leaves becomes an `Entry`. A run that has been saved can give its
columns away and read them back from the shelf (the index) when its turn comes: then it weighs as much as one job.

Columns are shared with a checkpoint that is being written. So they are only ever appended to (behind what was taken)
or replaced; nothing is removed in place. One exception: a job's segment and offset may be overwritten in place. Either
value is valid, because both copies of the payload exist.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise
from typing import Any, Protocol

from .entry import Entry, Spec
from .queue import READY, SCHEDULED, Queue

RUN_JOBS = 1024
"""Long enough that a backlog of ten millions is ten thousand runs, short enough to be read in a moment."""

PAYLOAD_BYTES = 128
"""What a payload in memory weighs besides its bytes, about, with the cells of its job, which stay as long."""


class Shelf(Protocol):
    """Where saved runs and keys are read back from. Fails with StorageError if what it has is damaged."""

    def columns(self, number: int) -> Columns: ...
    def key(self, queue: int, text: str) -> tuple[int, int, int] | None:
        """Job id, end of the window (0: its job lives), segment."""
        ...

    def key_names(self) -> Iterable[tuple[int, str]]:
        """All of them, for checks."""
        ...

    def keys_of(self, queue: int) -> Iterable[tuple[str, int]]:
        """Text and end of the window of each key of a queue."""
        ...


class Columns:
    """The jobs of a run, one cell each in every column."""

    __slots__ = (
        "cached_bytes", "crcs", "dues", "extras", "ids", "keys", "lengths", "lsns", "offsets", "payloads", "segments",
        "sizes", "specs", "times",
    )  # fmt: skip

    def __init__(self) -> None:
        self.ids = array("Q")
        self.times = array("Q")  # enqueued_at_ms
        self.dues = array("Q")  # 0: was never delayed
        self.segments = array("I")
        self.offsets = array("Q")
        self.lengths = array("I")
        self.crcs = array("I")
        self.sizes = array("I")
        self.lsns = array("Q")
        self.specs: list[Spec] = []
        self.keys: list[str | None] | None = None  # None: no job has one
        self.payloads: list[bytes | None] | None = None
        self.cached_bytes = 0  # of payloads that are also on disk; 0 where these are all there is of them
        self.extras: dict[int, tuple[int, int, int, str | None]] | None = None
        """By id, of jobs that were delivered before: attempts, token, died_at_ms, last_error."""

    def __len__(self) -> int:
        return len(self.ids)

    def append(
        self,
        job_id: int,
        now_ms: int,
        due_ms: int,
        segment: int,
        offset: int,
        length: int,
        crc: int,
        size: int,
        lsn: int,
        spec: Spec,
        key: str | None,
        payload: bytes | None,
    ) -> None:
        """One new job."""
        if key is not None and self.keys is None:
            self.keys = [None] * len(self.ids)
        if payload is not None and self.payloads is None:
            self.payloads = [None] * len(self.ids)
        self.ids.append(job_id)
        self.times.append(now_ms)
        self.dues.append(due_ms)
        self.segments.append(segment)
        self.offsets.append(offset)
        self.lengths.append(length)
        self.crcs.append(crc)
        self.sizes.append(size)
        self.lsns.append(lsn)
        self.specs.append(spec)
        if self.keys is not None:
            self.keys.append(key)
        if self.payloads is not None:
            self.payloads.append(payload)

    def add_batch(
        self,
        first_id: int,
        lengths: Sequence[int],
        crcs: Sequence[int],
        spec: Spec,
        now_ms: int,
        due_ms: int,
        place: tuple[int, int, int],
        overhead: int,
        keys: Sequence[str | None] | None,
        payloads: Sequence[bytes] | None,
    ) -> None:
        """New jobs of one record; `place` is segment, offset of the first payload, lsn."""
        n, before = len(lengths), len(self.ids)
        segment, offset, lsn = place
        self.ids.extend(range(first_id, first_id + n))
        self.times.extend(array("Q", (now_ms,)) * n)
        self.dues.extend(array("Q", (due_ms,)) * n)
        self.segments.extend(array("I", (segment,)) * n)
        self.offsets.extend(array("Q", accumulate(lengths[:-1], initial=offset)))
        self.lengths.extend(array("I", lengths))
        self.crcs.extend(array("I", crcs) if crcs else array("I", bytes(4 * n)))
        self.sizes.extend(array("I", [length + overhead for length in lengths]))
        self.lsns.extend(array("Q", (lsn,)) * n)
        self.specs += [spec] * n
        if self.keys is not None or (keys is not None and any(key is not None for key in keys)):
            if self.keys is None:
                self.keys = [None] * before
            self.keys += keys if keys is not None else [None] * n
        if payloads is not None:
            if self.payloads is None:
                self.payloads = [None] * before
            self.payloads += payloads
        elif self.payloads is not None:
            self.payloads += [None] * n

    def add(self, entry: Entry) -> None:
        """A job that was an object."""
        self.append(
            entry.id, entry.enqueued_at_ms, entry.due_ms, entry.segment, entry.offset, entry.length, entry.crc,
            entry.size, entry.lsn, entry.spec, entry.key, entry.payload,
        )  # fmt: skip
        if entry.attempts or entry.token or entry.died_at_ms or entry.last_error is not None:
            if self.extras is None:
                self.extras = {}
            self.extras[entry.id] = (entry.attempts, entry.token, entry.died_at_ms, entry.last_error)

    def entry(self, i: int, queue: Queue, state: int) -> Entry:
        """The job in cell `i` as an object."""
        return self.entries(i, i + 1, queue, state)[0]

    def entries(self, start: int, stop: int, queue: Queue, state: int) -> list[Entry]:
        """The jobs in these cells as objects."""
        ids, specs, times, dues, lengths, crcs = self.ids, self.specs, self.times, self.dues, self.lengths, self.crcs
        segments, offsets, sizes, lsns = self.segments, self.offsets, self.sizes, self.lsns
        keys, payloads, extras = self.keys or _NOTHING, self.payloads or _NOTHING, self.extras
        found = []
        for i in range(start, stop):
            entry = Entry(
                ids[i], queue, specs[i], times[i], dues[i], keys[i], segments[i], offsets[i], lengths[i], crcs[i],
                sizes[i], lsns[i], payloads[i], state,
            )  # fmt: skip
            if extras is not None and entry.id in extras:
                entry.attempts, entry.token, entry.died_at_ms, entry.last_error = extras[entry.id]
            found.append(entry)
        return found

    def picked(self, cells: Sequence[int] | slice) -> Columns:
        """A copy with these cells, in this order."""
        found = Columns()
        for name in _ARRAYS:
            column = getattr(self, name)
            setattr(
                found,
                name,
                column[cells] if isinstance(cells, slice) else array(column.typecode, map(column.__getitem__, cells)),
            )
        # Cached payloads stay behind: a copy of them would be counted nowhere.
        for name in ("specs", "keys") if self.cached_bytes else ("specs", "keys", "payloads"):
            values = getattr(self, name)
            if values is not None:
                setattr(found, name, values[cells] if isinstance(cells, slice) else [values[i] for i in cells])
        if self.extras is not None:
            kept = {i: self.extras[i] for i in found.ids if i in self.extras}
            found.extras = kept or None
        return found

    def start_anew(self) -> None:
        """Dead letters become ready jobs, attempts from 0. For columns that are shared with no one."""
        self.dues = array("Q", bytes(8 * len(self.ids)))
        if self.extras is not None:
            self.extras = {i: (0, token, 0, error) for i, (_, token, _, error) in self.extras.items()}

    def payload_bytes(self) -> int:
        """What the payloads that are still here take in memory, about."""
        payloads = self.payloads or ()
        return sum(len(payload) + PAYLOAD_BYTES for payload in payloads if payload is not None)

    def live(self) -> dict[int, int]:
        """Bytes per segment."""
        segments = self.segments
        if not segments:
            return {}
        if segments[0] == segments[-1] and segments.count(segments[0]) == len(segments):
            return {segments[0]: sum(self.sizes)}
        found: dict[int, int] = {}
        for segment, size in zip(segments, self.sizes, strict=True):
            found[segment] = found.get(segment, 0) + size
        return found


_NOTHING: list[Any] = [None] * RUN_JOBS  # for columns that no job has
_ARRAYS = ("ids", "times", "dues", "segments", "offsets", "lengths", "crcs", "sizes", "lsns")


class Run:
    """Columns, how far they are used up, and what is known of them while they are on the shelf."""

    __slots__ = (
        "at",
        "by_due",
        "columns",
        "head",
        "high",
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
        run.left, run.head, run.last, run.low, run.high = left, head, last, low, high
        return run

    def _replace(self, columns: Columns) -> None:
        self.columns = columns
        self.at = 0
        self.left = len(columns)
        ids = columns.ids
        self.head, self.last = self.key(0), self.key(-1)
        self.low, self.high = (min(ids), max(ids)) if self.by_due else (ids[0], ids[-1])

    def load(self) -> Columns:
        """The columns, read back if they are on the shelf."""
        columns = self.columns
        if columns is None:
            assert self.shelf is not None, f"run {self.number} has neither columns nor a shelf"
            columns = self.columns = self.shelf.columns(self.number)
            assert len(columns) == self.left, f"run {self.number}: {len(columns)} jobs on the shelf, {self.left} known"
        return columns

    def peek(self) -> tuple[Columns, int]:
        """The columns and the first cell in use, for looking only: nothing stays in memory that was not there."""
        if self.columns is not None:
            return self.columns, self.at
        assert self.shelf is not None, f"run {self.number} has neither columns nor a shelf"
        return self.shelf.columns(self.number), 0

    def put_away(self, shelf: Shelf) -> None:
        """Let go of the columns: what is on the shelf is what is left here."""
        assert self.number, "a run that was never saved is put away"
        self.columns, self.shelf, self.at = None, shelf, 0

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
        return columns is not None and len(columns.ids) < RUN_JOBS and bool(first_key > self.last)

    def grown(self) -> None:
        """The columns got longer."""
        columns = self.columns
        assert columns is not None
        ids = columns.ids
        added = ids[self.at + self.left :]
        self.left = len(ids) - self.at
        if not self.by_due:
            self.last = self.high = ids[-1]
            return
        self.last = self.key(-1)
        self.high, self.low = max(self.high, ids[-1]), min(self.low, *added)

    # Shrinking

    def pop(self, count: int, state: int) -> list[Entry]:
        """The first `count` jobs, as objects in this state; they are not here any more."""
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
        self.at += count
        self.left -= count
        if self.left:
            self.head = self.key(self.at)
            if not self.by_due:
                self.low = self.head

    def pluck(self, i: int) -> Entry:
        """The job in cell `i`, as an object; it is not here any more."""
        columns = self.load()
        entry = columns.entry(i, self.queue, self.state)
        if columns.payloads is not None:
            columns.payloads[i] = None
        if i == self.at:
            self.skip(1)
        else:
            self.keep([j for j in range(self.at, len(columns)) if j != i])
        return entry

    def keep(self, cells: Sequence[int]) -> None:
        """Only these cells stay."""
        if cells:
            self._replace(self.load().picked(cells))
        else:
            self.left = 0

    def split(self, count: int) -> Run:
        """A run of the first `count` jobs, which are not here any more."""
        columns = self.load()
        part = Run(self.queue, self.priority, columns.picked(slice(self.at, self.at + count)), self.state)
        self.skip(count)
        return part

    def order_by_id(self) -> bool:
        """From an order by due moment to one by id; True if the cells changed their places."""
        assert self.by_due
        if self.head[0] == self.last[0]:  # one moment for all: in order already, and may stay on the shelf
            self.state, self.by_due = READY, False
            self.head, self.last = self.head[1], self.last[1]
            self.low, self.high = self.head, self.last
            return False
        columns = self.load()
        self.state, self.by_due = READY, False
        self._replace(columns.picked(sorted(range(self.at, len(columns)), key=columns.ids.__getitem__)))
        return True

    # Finding

    def find(self, job_id: int) -> int:
        """The cell of a job, -1 if it is not here."""
        if not self.low <= job_id <= self.high or not self.left:
            return -1
        ids = self.load().ids
        if self.by_due:
            try:
                return ids.index(job_id, self.at)
            except ValueError:
                return -1
        i = bisect_left(ids, job_id, self.at)
        return i if i < len(ids) and ids[i] == job_id else -1

    def between(self, first_id: int, last_id: int) -> Sequence[int]:
        """The ids in this range, both ends included."""
        ids = self.load().ids
        if self.by_due:
            return [i for i in ids[self.at :] if first_id <= i <= last_id]
        return ids[bisect_left(ids, first_id, self.at) : bisect_right(ids, last_id, self.at)]

    def below(self, limit: Any, start: int) -> int:
        """The first cell from `start` on whose key is not below `limit`."""
        columns = self.load()
        if not self.by_due:
            return bisect_left(columns.ids, limit, start)
        return bisect_left(range(len(columns)), limit, start, key=self.key)

    def after(self, job_id: int) -> int:
        """The first cell behind this id, of a run in order of ids."""
        return bisect_right(self.load().ids, job_id, self.at)

    def check(self) -> None:
        """Assert the order and what is known without the columns."""
        columns, at = self.peek()
        assert 0 < self.left == len(columns) - at, f"run {self.number}: {self.left} left of {len(columns)} from {at} on"
        ids = columns.ids[at:]
        keys: Iterable[Any] = zip(columns.dues[at:], ids, strict=True) if self.by_due else ids
        found = list(keys)
        assert all(a < b for a, b in pairwise(found)), f"run {self.number}: out of order"
        assert (found[0], found[-1]) == (self.head, self.last), f"run {self.number}: its ends are not as known"
        assert self.low <= min(ids), f"run {self.number}: an id below {self.low}"
        assert self.high >= max(ids), f"run {self.number}: an id above {self.high}"
        for name in (*_ARRAYS, "specs", "keys", "payloads"):
            column = getattr(columns, name)
            assert column is None or len(column) == len(columns), f"run {self.number}: column {name} is short"
