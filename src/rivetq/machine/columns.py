"""Many jobs of one queue and priority, one cell each in every column."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Any, Protocol

from .entry import Entry, Spec
from .queue import Queue

RUN_JOBS = 1024
"""Long enough that a backlog of ten millions is ten thousand runs, short enough to be read in a moment."""

PAYLOAD_BYTES = 128
"""About how much memory a payload takes beyond its bytes, including the cells of its job, which stay as long."""


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
        self.cached_bytes = 0  # of payloads that are also on disk; 0 if they are in memory only
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
        if self.extras is not None:
            self._forget_extras((job_id,))
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
        if self.extras is not None:
            self._forget_extras(range(first_id, first_id + n))
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

    def _forget_extras(self, ids: Sequence[int]) -> None:
        """Forget those of jobs that left holes. The dict is replaced, since a checkpoint may be reading the old one."""
        assert self.extras is not None, "there are extras"
        if any(job_id in self.extras for job_id in ids):
            self.extras = {job_id: extra for job_id, extra in self.extras.items() if job_id not in ids}

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
        for name in ARRAYS:
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
        """About how much memory the payloads take that are still here."""
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
ARRAYS = ("ids", "times", "dues", "segments", "offsets", "lengths", "crcs", "sizes", "lsns")
