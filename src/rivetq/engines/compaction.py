"""Compaction: choose the segments to drop, and copy what lives in them to the tail first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

from ..clock import Clock
from ..errors import StorageError
from ..machine import look, saving
from ..machine.entry import Entry
from ..machine.events import Copied, Enqueued, Event, KeyCopied, SegmentsDropped
from ..machine.machine import Machine
from ..storage.codec import decode_record
from ..storage.header import corrupt
from ..storage.segment import Record, Scan, read_header
from .checkpoint import CheckpointingEngine

MANY_SEGMENTS, SMALL_SEGMENT_BYTES = 16, 2**20
"""Every opening begins a segment. Above this number, plus one for each so many bytes of log, small segments are swept
up although there is little to gain."""
SWEEP_BYTES, SWEEP_BYTES_MOST = 2**20, 16 * 2**20
"""Bytes of log that an opening sweeps up: for each MANY_SEGMENTS that there are, and at most. A program that opens,
makes one call and closes gives the keeper no turn."""
COPY_JOBS, COPY_BYTES = 32, 256 * 1024
"""Jobs and payload bytes per record of a compaction."""
COPY_QUEUES = 64
"""Queues per record of a compaction."""
FEW_QUEUES = 0.125
"""If only queues live in a segment, and their share is no more than this, it counts as empty."""
WORTH_COPYING = 0.75
"""A compaction on demand leaves a segment alone if its share of live bytes is larger than this."""


class CompactingEngine(CheckpointingEngine):
    """Frees the disk space of jobs that are gone."""

    def __init__(self, machine: Machine, clock: Clock, now_ms: int, boot_ms: int, **checkpointing: Any) -> None:
        self._short_of_space = False  # the keeper met a full disk
        self._copied_bytes = 0
        super().__init__(machine, clock, now_ms, boot_ms, **checkpointing)

    # What is worth it

    def _garbage_upto(self) -> int:
        """The last segment that is worth dropping now, 0 if none: oldest first, until half of the log is live.

        A segment in which nothing is live but a few queues is dropped; only these queues are copied. Fewer bytes are
        rewritten than reclaimed, so the write amplification is below 2.
        """
        with self._lock:
            sizes, live = dict(self._log.sizes), look.live_bytes(self._machine)
            queues = look.queue_bytes(self._machine)
        headers = self._snapshot_bytes * len(sizes)  # they come again with every segment: no garbage
        slack = 0 if self._short_of_space else self._segment_bytes  # on a full disk every byte counts
        total, limit = sum(sizes.values()), 2 * (sum(live.values()) + sum(queues.values())) + headers + slack
        upto = 0
        if total > slack:
            for segment in sorted(sizes)[:-1]:
                here = queues.get(segment, 0)
                if total <= limit and (live.get(segment, 0) or here > FEW_QUEUES * sizes[segment]):
                    break
                total -= sizes[segment] - live.get(segment, 0) - here
                upto = segment
        return upto or self._small_upto(sizes, max(self._segment_bytes, sizes[min(sizes)]))

    def _small_upto(self, sizes: dict[int, int], room: int) -> int:
        """If many segments hold little: the last of the oldest ones that have no more than `room` bytes, 0 if none.

        A large segment that lies before them has to be copied first, one at a time. For that reason the allowed number
        grows with the bytes of the log: sweeping begins when it is worth that, and ends when the small ones are one.
        """
        small = min(SMALL_SEGMENT_BYTES, self._segment_bytes // 4)
        upto = 0
        if len(sizes) > MANY_SEGMENTS + sum(sizes.values()) // small:
            for segment in sorted(sizes)[:-1]:
                room -= sizes[segment]
                if room < 0:
                    break
                upto = segment
        return upto

    def _copyable_upto(self) -> int:
        """On demand: the last segment with a fair share of garbage. All segments before it must go first."""
        with self._lock:
            sizes, live = dict(self._log.sizes), look.live_bytes(self._machine)
            queues = look.queue_bytes(self._machine)
        needed = {s: live.get(s, 0) + queues.get(s, 0) for s in sizes}
        return max((s for s in sorted(sizes)[:-1] if needed[s] <= WORTH_COPYING * sizes[s]), default=0)

    # At an opening

    def _sweep(self) -> None:
        """At an opening: if many segments hold little, put what lives in the oldest of them into the new one.

        The more there are, the more it may copy. That bounds both their number and the average cost of an opening.
        Damage is left for the keeper to meet: an opening that has changed something is not refused because of it.
        """
        sizes = dict(self._log.sizes)
        upto = self._small_upto(sizes, min(SWEEP_BYTES_MOST, SWEEP_BYTES * len(sizes) // MANY_SEGMENTS))
        if upto and all(map(self._is_whole, (s for s in sizes if s <= upto))):
            with self._keeper_lock:
                self._compact(upto)

    def _is_whole(self, segment: int) -> bool:
        """All records of a sealed segment can be read."""
        try:
            file, upto_lsn = self._log.open_segment(segment), self._last_lsn_in(segment)
            scan = Scan(file.read_all(), read_header(file))
            for _ in scan.records(upto_lsn):
                pass
        except (StorageError, OSError):
            return False
        return scan.next_lsn > upto_lsn

    def _last_lsn_in(self, segment: int) -> int:
        """The last lsn in a sealed segment."""
        return read_header(self._log.open_segment(segment + 1)).first_lsn - 1

    # Copying

    def _compact(self, upto: int) -> None:
        """Copy what lives in the segments up to this one, then drop them. Caller holds _keeper_lock."""
        if not upto:
            return
        assert upto < max(self._log.sizes), f"segment {upto} is to be dropped and is the tail"
        self._flush()  # the successor's header must be in its file
        for segment in [s for s in sorted(self._log.sizes) if s <= upto]:
            self._copy_segment(segment)
            if self._is_due():
                self._checkpoint()  # so that memory stays bounded
            else:
                self._put_away_all()
        self._copy_queues(upto)
        self._checkpoint()  # which syncs the copies; the index now points at them
        self._change(lambda now_ms: ([SegmentsDropped(upto)], None), sync=False)
        self._sync_all()
        with self._lock:
            self._check()
        with self._or_fail():
            self._log.drop(upto)

    def _copy_queues(self, upto: int) -> None:
        """Rewrite at the tail the queues whose last copy is in these segments."""
        machine = self._machine

        def plan(part: Sequence[int], now_ms: int) -> tuple[list[Event], None]:
            queues = (machine.numbers.get(number) for number in part)
            return [saving.queue_copied(queue) for queue in queues if queue and 0 < queue.segment <= upto], None

        with self._lock:
            numbers = [queue.number for queue in machine.numbers.values() if 0 < queue.segment <= upto]
        for start in range(0, len(numbers), COPY_QUEUES):
            part = numbers[start : start + COPY_QUEUES]
            self._change(partial(plan, part), keep_reserve=True, sync=False)
            self._rest()

    def _copy_segment(self, segment: int) -> None:
        with self._lock:
            if not look.live_bytes(self._machine).get(segment, 0):
                return
        batch: list[_Live] = []
        size = 0
        with self._reading():
            for item in self._contents(segment):
                batch.append(item)
                size += len(item.payload)
                if len(batch) == COPY_JOBS or size >= COPY_BYTES:
                    self._copy(segment, batch)
                    batch, size = [], 0
            if batch:
                self._copy(segment, batch)

    def _copy(self, segment: int, batch: list[_Live]) -> None:
        """Rewrite at the tail those of the batch that still live in this segment."""

        def plan(now_ms: int) -> tuple[list[Event], None]:
            events = [event for item in batch for event in self._copies(segment, item)]
            return events, None

        self._change(plan, keep_reserve=True, sync=False)
        self._copied_bytes += sum(len(item.payload) for item in batch)

    def _copies(self, segment: int, item: _Live) -> Iterator[Event]:
        # Caller holds self._lock.
        entry = look.job(self._machine, item.job_id, item.queue, item.priority)
        if entry is not None and entry.segment == segment:
            yield copied(entry, item.payload)
        elif item.key is not None:
            key = self._machine.keys.get(item.queue, item.key)
            is_in_force = key is not None and key.expires_ms > self._machine.now_ms
            if key is not None and is_in_force and key.segment == segment and key.job_id == item.job_id:
                yield KeyCopied(item.queue, item.key, key.job_id, key.expires_ms)

    def _contents(self, segment: int) -> Iterator[_Live]:
        """The jobs and keys that were written in a sealed segment; CorruptLogError if it cannot be read whole."""
        file, upto_lsn = self._log.open_segment(segment), self._last_lsn_in(segment)
        scan = Scan(file.read_all(), read_header(file))
        for record in scan.records(upto_lsn):
            yield from self._live_in(record)
            self._rest()
        if scan.next_lsn <= upto_lsn:
            raise corrupt(file.path, scan.end_in_file, f"record {scan.next_lsn} cannot be read")

    def _live_in(self, record: Record) -> Iterator[_Live]:
        _, events = decode_record(record.body)
        for event in events:
            if isinstance(event, Enqueued):
                first_id, at = event.first_id, event.payload_at
                with self._lock:
                    alive = look.alive(
                        self._machine, event.queue, event.priority, first_id, first_id + len(event.lengths) - 1
                    )
                for i, length in enumerate(event.lengths):
                    key = event.keys[i] if event.keys is not None else None
                    if first_id + i in alive or key is not None:
                        payload = record.body[at : at + length]
                        yield _Live(first_id + i, event.queue, event.priority, key, payload)
                    at += length
            elif isinstance(event, Copied):
                payload = record.body[event.payload_at : event.payload_at + event.length]
                yield _Live(event.id, event.queue, event.priority, event.key, payload)
            elif isinstance(event, KeyCopied):
                yield _Live(event.job_id, event.queue, 0, event.key, b"")


class _Live(NamedTuple):
    """A job or key written in a segment that may live there still."""

    job_id: int
    queue: int
    priority: int
    key: str | None
    payload: bytes


def copied(entry: Entry, payload: bytes) -> Copied:
    """The `Copied` event for a job: its full state and payload."""
    spec = entry.spec
    return Copied(
        entry.id, entry.queue.number, entry.state, spec.priority, entry.attempts, entry.token, spec.max_attempts,
        spec.retry, spec.visibility_ms, entry.enqueued_at_ms, entry.due_ms, entry.deadline_ms, entry.died_at_ms,
        entry.last_error, spec.headers, entry.key, entry.length, entry.crc, payload,
    )  # fmt: skip
