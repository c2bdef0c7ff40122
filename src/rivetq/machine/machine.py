"""The queue state and what changes it, and nothing else: no clock, no files, no threads.

*Apply* is the only writer of state and cannot fail; the live path and recovery share it. *Advance* is the part of the
rules that the clock alone decides (a delay falls due, a key's window ends); it writes no events. The decisions that
lead to events are in `decide`.

States of a job, and what moves it::

    scheduled --due--> ready --lease--> leased --ack--> gone
        ^                ^                |-- nack, release, expiry --> ready or scheduled
        |                |                `-- max_attempts, reject --> dead --redrive--> ready
        `--- enqueue with a delay         cancel and purge: ready, scheduled, dead --> gone
"""

from __future__ import annotations

import heapq
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, assert_never

import attrs

from ..model import Deliveries, QueueStats
from .entry import Entry, Spec
from .events import (
    Acked,
    Buried,
    Cancelled,
    Copied,
    Enqueued,
    Event,
    Extended,
    IdsReserved,
    KeyCopied,
    Leased,
    Purged,
    QueueConfigured,
    QueueCreated,
    QueueRemoved,
    Redriven,
    Released,
    Retried,
    SegmentsDropped,
)
from .keys import Key, Keys
from .queue import DEAD, LEASED, NEVER_MS, READY, SCHEDULED, STATES, Queue
from .ratelimit import TokenBucket
from .run import PAYLOAD_BYTES, RUN_JOBS, Columns, Run
from .snapshot import COPY_BYTES, JOB_BYTES, KEY_BYTES, RECORD_BYTES, Changes, Place, QueueSnapshot, Snapshot
from .waiting import Waiting
from .window import Window

RIPE_JOBS = 5000
"""Loose jobs that one call to `advance` moves at most, so that no caller pays for a storm; the rest is moved next."""
RUNS_AT_ONCE = 8
"""Runs that may have to be read from the index under one hold of the lock, some 300 us each."""
FEW_JOBS = 64
"""Batches below this size that come out of order are not worth a run of their own."""


class Machine:
    """All queues. Not thread-safe: the engine's lock is around every call.

    Args:
        keep_payloads: nothing is on a disk: payloads stay here, and no changes are noted for a checkpoint.
        cache_bytes: memory for payloads of waiting jobs, if there is a disk to read the others from.
        id_block: ids that are written down as told at a time; 0: none need be.
    """

    def __init__(self, *, keep_payloads: bool = False, cache_bytes: int = 0, id_block: int = 0) -> None:
        self.jobs: dict[int, Entry] = {}  # the loose ones: leased, come back, or otherwise not in a run
        self.queues: dict[str, Queue] = {}
        self.numbers: dict[int, Queue] = {}
        self.waiting: dict[int, Waiting] = {}  # by the numbers of the queues
        self.keys = Keys()
        self.next_id = 1
        self.reserved_id = 1
        self.next_token = 1
        self.next_run = 1
        self.next_queue = 1
        self.oldest_segment = 1
        self.now_ms = 0  # the latest moment that the state has seen: the time line never steps back
        self.wake_ms = NEVER_MS  # nothing happens by the clock alone before this; may be earlier than what does happen
        self.live: dict[int, int] = {}  # bytes of living jobs per segment; see `live_bytes`
        self.changes: Changes | None = None if keep_payloads else Changes()
        self.woken: set[str] = set()  # queues in which something became ready since the engine last looked
        self._due: list[tuple[int, int, int]] = []  # heap of (due_ms, queue number, priority); stale ones are skipped
        self._due_limit = FEW_JOBS  # above it the stale ones are dropped
        self._tokens: list[tuple[int, int]] = []  # heap of (moment of a token, queue number); stale ones are skipped
        self._deadlines: list[tuple[int, int]] = []  # heap of (deadline_ms, id); stale pairs are skipped
        self._leased = 0
        self._keep_payloads = keep_payloads
        self._cache_bytes = cache_bytes
        self._cached_bytes = 0
        self._cached: deque[Columns] = deque()  # those with payloads, oldest first
        self.id_block = id_block
        self.grain_ms = 0
        """Of the clock that moments come from, which rounds them down: a job is due so much later, and no delay is too
        short."""
        self.ahead_ms: Callable[[int], int] | None = None
        """How far the wall clock is ahead of the time line, which has come to this moment: for an `eta_ms` alone, and
        no part of the state. None: they show the same."""
        self.unbegun: set[int] = set()
        """Tokens of a former owner's leases that were taken in advance and never begun: their attempts do not count."""
        self.promised: dict[int, int] = {}  # ids that were told in advance and have no job yet: first id -> how many

    def take_ids(self, count: int) -> int:
        """The first of `count` ids that nobody else gets; a reservation covers them (see decide.ids)."""
        first, self.next_id = self.next_id, self.next_id + count
        assert self.next_id <= self.reserved_id, f"ids up to {self.next_id} told, reserved are {self.reserved_id}"
        self.promised[first] = count
        return first

    # Time

    def advance(self, now_ms: int) -> None:
        """Let the clock act: due jobs become ready, ended keys are forgotten. Not logged: the clock says it again.

        A storm is taken in parts: then `wake_ms` stays at or below `now_ms`, and the next call goes on.
        """
        assert now_ms >= self.now_ms, f"time line stepped back: {self.now_ms} -> {now_ms}"
        self.now_ms = now_ms
        if now_ms < self.wake_ms:
            return
        room = RIPE_JOBS
        due, due_upto_ms = self._due, now_ms - self.grain_ms
        while due and due[0][0] <= due_upto_ms and room > 0:
            _, number, priority = heapq.heappop(due)
            if (queue := self.numbers.get(number)) is not None:
                room -= self._ripen(queue, priority, due_upto_ms, room)
        while self._tokens and self._tokens[0][0] <= now_ms:
            at_ms, number = heapq.heappop(self._tokens)
            queue = self.numbers.get(number)
            if queue is not None and queue.token_at_ms == at_ms:
                queue.token_at_ms = NEVER_MS
                self._wake(queue)
        while room > 0 and (end := self.keys.first_end()) is not None and end[0] <= now_ms:
            self.keys.forget(*end[1:])
            room -= 1
        self.next_wakeup_ms()

    def _ripen(self, queue: Queue, priority: int, now_ms: int, room: int) -> int:
        """Make the due jobs of one window ready; whole runs at a time where that goes. How many single ones moved."""
        window = self.waiting[queue.number].scheduled[priority]
        if window is None:
            return 0
        ready = self.waiting[queue.number].window(READY, priority)
        moved = before = window.count
        while window.runs and window.runs[0].head[0] <= now_ms:  # in any order: all of them go
            run = window.runs[0]
            if run.last[0] > now_ms:
                count = run.below((now_ms + 1, 0), run.at) - run.at
                part = run.split(count)
                window.popped(run, count)
                self._touch(run)
                run = part
                self._touch(part, part.left)
            else:
                window.remove(run)
            if run.order_by_id():
                self._touch(run)
            ready.insert(run)
        loose = window.loose
        keys = list(loose.islice(0, min(room, loose.bisect_left((now_ms + 1, 0)))))
        for key in keys:
            entry = self.jobs[key[1]]
            entry.state = READY
            ready.add(entry.id)
        del loose[: len(keys)]
        window.count -= len(keys)
        moved = before - window.count
        queue.counts[SCHEDULED] -= moved
        queue.counts[READY] += moved
        self._wake(queue)
        if (first := window.first()) is not None:
            heapq.heappush(self._due, (first[0], queue.number, priority))
        return len(keys)

    def next_wakeup_ms(self) -> int | None:
        """When the clock acts next: a delay falls due or a lease ends."""
        lease = self._first_deadline()
        at_ms = min(self._first_due_ms(), self._first_token_ms(), NEVER_MS if lease is None else lease[0])
        end = self.keys.first_end()
        self.wake_ms = at_ms if end is None else min(at_ms, end[0])
        return None if at_ms == NEVER_MS else at_ms

    def _first_due_ms(self) -> int:
        due = self._due
        while due:
            due_ms, number, priority = due[0]
            queue = self.numbers.get(number)
            window = None if queue is None else self.waiting[queue.number].scheduled[priority]
            first = None if window is None else window.first()
            if first is not None and first[0] == due_ms:
                return due_ms + self.grain_ms
            if first is not None and first[0] > due_ms:
                heapq.heapreplace(due, (first[0], number, priority))
            else:
                heapq.heappop(due)
        return NEVER_MS

    def _first_token_ms(self) -> int:
        tokens = self._tokens
        while tokens:
            at_ms, number = tokens[0]
            queue = self.numbers.get(number)
            if queue is not None and queue.token_at_ms == at_ms:
                return at_ms
            heapq.heappop(tokens)
        return NEVER_MS

    def expect_token(self, queue: Queue, now_ms: int) -> None:
        """A lessee waits for the rate limit of a queue: its next token is a moment at which the clock acts."""
        bucket = queue.bucket
        if bucket is not None and bucket.limit.on == "lease":
            at_ms = bucket.ready_at_ms(1, now_ms)
            if at_ms < queue.token_at_ms:
                queue.token_at_ms = at_ms
                heapq.heappush(self._tokens, (at_ms, queue.number))
                self._expect(at_ms)

    def _expect(self, at_ms: int) -> None:
        if at_ms < self.wake_ms:
            self.wake_ms = at_ms

    def _expect_due(self, window: Window, key: tuple[int, int], queue: Queue, priority: int) -> None:
        """A scheduled job was added."""
        if window.first() == key:
            heapq.heappush(self._due, (key[0], queue.number, priority))
            self._expect(key[0] + self.grain_ms)
            if len(self._due) > self._due_limit:
                self._trim_due()

    def _trim_due(self) -> None:
        """Jobs that were cancelled leave their moment behind; without this they would fill memory until it comes."""
        self._due = [
            (window.first()[0], queue.number, priority)
            for queue in self.queues.values()
            for priority, window in enumerate(self.waiting[queue.number].scheduled)
            if window is not None and window.count
        ]
        heapq.heapify(self._due)
        self._due_limit = FEW_JOBS + 2 * len(self._due)

    def ended_leases(self, now_ms: int, limit: int) -> list[tuple[int, int]]:
        """(deadline_ms, id) of up to `limit` leases whose deadline has come, earliest first."""
        if self._first_deadline() is None:
            return []
        ended: dict[tuple[int, int], None] = {}  # an extend may have left the same pair twice
        # In the order of the heap without changing it: nothing has happened yet, apply makes these pairs stale.
        heap, jobs = self._deadlines, self.jobs
        coming = [(heap[0], 0)]
        while coming and len(ended) < limit and coming[0][0][0] <= now_ms:
            pair, at = heapq.heappop(coming)
            entry = jobs.get(pair[1])
            if entry is not None and entry.state == LEASED and entry.deadline_ms == pair[0]:
                ended[pair] = None
            for child in (2 * at + 1, 2 * at + 2):
                if child < len(heap):
                    heapq.heappush(coming, (heap[child], child))
        return list(ended)

    def _first_deadline(self) -> tuple[int, int] | None:
        heap = self._deadlines
        if not self._leased:
            heap.clear()  # at once: after a storm that is a hundred thousand of them
        while heap:
            deadline_ms, job_id = heap[0]
            entry = self.jobs.get(job_id)
            if entry is not None and entry.state == LEASED and entry.deadline_ms == deadline_ms:
                return heap[0]
            heapq.heappop(heap)
        return None

    # Apply

    def apply(self, event: Event, now_ms: int, place: Place) -> None:
        """Make it so. Cannot fail; tolerates events that the state already includes (see events)."""
        match event:
            case Enqueued():
                self._apply_enqueued(event, now_ms, place)
            case Leased():
                self._apply_leased(event, now_ms)
            case Acked():
                self.numbers[event.queue].acked += len(event.ids)
                self._remove(event.ids, now_ms)
            case Retried():
                if (entry := self._known(event.id)) is not None:
                    entry.last_error = event.error
                    entry.queue.retried += 1
                    self._wait(entry, event.due_ms, now_ms)
            case Released():
                if (entry := self._known(event.id)) is not None:
                    entry.queue.released += 1
                    entry.attempts = event.attempts
                    self._wait(entry, event.due_ms, now_ms)
            case Buried():
                if (entry := self._known(event.id)) is not None:
                    self._leave(entry)
                    entry.queue.buried += 1
                    entry.last_error = event.error
                    entry.died_at_ms = event.died_at_ms
                    self._enter(entry, DEAD)
            case Extended():
                if (entry := self._known(event.id)) is not None and entry.state == LEASED:
                    entry.deadline_ms = event.deadline_ms
                    self._push_deadline(entry)
            case Cancelled():
                queue = self.numbers[event.queue]
                queue.cancelled += 1
                if self._loosen(event.id, (queue,)) is not None:
                    self._remove((event.id,))
            case Purged():
                queue = self.numbers[event.queue]
                queue.purged += len(event.ids)
                self._apply_purged(queue, event.ids)
            case Redriven():
                self._apply_redriven(event.ids, now_ms)
            case QueueCreated():
                if event.number not in self.numbers:
                    self._add_queue(Queue(event.number, event.name))
                    self.numbers[event.number].keyed = False
            case QueueRemoved():
                gone = self.numbers.get(event.number)
                if gone is not None and not any(gone.counts):  # in a salvaged log it may still hold something
                    del self.numbers[event.number], self.waiting[event.number], self.queues[gone.name]
                    self.woken.discard(gone.name)
            case QueueConfigured():
                queue = self.numbers[event.queue]
                queue.configure(event.config, now_ms)
                self._wake(queue)
            case IdsReserved():
                self.reserved_id = event.next_id
            case Copied():
                self._apply_copied(event, now_ms, place)
            case KeyCopied():
                self._hold_key(event.queue, event.key, Key(event.job_id, place.segment, event.expires_ms))
            case SegmentsDropped():
                self.oldest_segment = max(self.oldest_segment, event.upto + 1)
                for segment in [s for s in self.live if s <= event.upto]:
                    del self.live[segment]
                self.keys.drop_segments(event.upto)
            case _:
                assert_never(event)

    def _apply_enqueued(self, event: Enqueued, now_ms: int, place: Place) -> None:
        queue = self.numbers[event.queue]
        count, first_id, lengths = len(event.lengths), event.first_id, event.lengths
        if count == 1 and first_id >= self.next_id and event.keys is None and event.due_ms <= now_ms:
            window = self.waiting[queue.number].ready[event.priority]
            if window is not None and (run := window.open_for(first_id)) is not None:
                self._enqueue_next(event, queue, window, run, now_ms, place)
                return
        state = SCHEDULED if event.due_ms > now_ms else READY
        window = self.waiting[queue.number].window(state, event.priority)
        overhead = RECORD_BYTES // count + JOB_BYTES
        offset, segment = place.body_offset + event.payload_at, place.segment
        keep = self._keep_payloads or (self._cache_bytes > 0 and bool(event.payloads))
        if first_id < self.next_id:
            self.promised.pop(first_id, None)
            for job_id in range(first_id, first_id + count):
                if (known := self._known(job_id)) is not None:  # a checkpoint took the job while the log went on
                    if known.indexed and self.changes is not None:
                        self.changes.packed.add(job_id)
                    self._drop(known)
        if event.keys is not None:
            for job_id, text in enumerate(event.keys, first_id):
                if text is not None:
                    self._hold_key(event.queue, text, Key(job_id, segment))
        at = 0
        while at < count:
            job_id = first_id + at
            run = window.open_for((event.due_ms, job_id) if window.by_due else job_id)
            if run is None and count - at < FEW_JOBS and len(window.opens) > 1 and not window.opens[0].is_full:
                self._enqueue_loose(event, at, queue, now_ms, place, overhead)
                break
            columns = Columns() if run is None else run.load()
            stop = min(count, at + RUN_JOBS - len(columns))
            part = slice(at, stop)
            whole = stop - at == count
            columns.add_batch(
                job_id,
                lengths if whole else lengths[part],
                event.crcs if whole else event.crcs[part],
                self._spec(event, columns),
                now_ms,
                event.due_ms,
                (segment, offset, place.lsn),
                overhead,
                None if event.keys is None else event.keys[part],
                (event.payloads if whole else event.payloads[part]) if keep else None,
            )
            if not whole:
                offset += sum(lengths[part])
            if run is None:
                run = Run(queue, event.priority, columns, state)
                window.insert(run, is_open=True)
                if window.by_due:
                    self._expect_due(window, run.head, queue, event.priority)
            else:
                window.grown(run, stop - at)
            if keep and not self._keep_payloads:
                self._cache(columns, sum(lengths[part]) + PAYLOAD_BYTES * (stop - at))
            self._touch(run, stop - at)
            at = stop
        size = sum(lengths) + overhead * count if count > 1 else lengths[0] + overhead
        if segment:
            self.live[segment] = self.live.get(segment, 0) + size
        if not self._keep_payloads and self._cached_bytes > self._cache_bytes:
            self._trim_cache()
        queue.counts[state] += count
        if state == READY:
            self._wake(queue)
        if queue.bucket is not None and queue.bucket.limit.on == "enqueue":
            queue.bucket.take(count, now_ms)
        queue.enqueued += count
        if first_id + count > self.next_id:
            self.next_id = first_id + count

    def _enqueue_next(self, event: Enqueued, queue: Queue, window: Window, run: Run, now_ms: int, place: Place) -> None:
        """One ready job without a key behind those of an open run: what most calls do."""
        columns, payloads, length = run.load(), event.payloads, event.lengths[0]
        payload = payloads[0] if payloads and (self._keep_payloads or self._cache_bytes) else None
        size, segment = length + RECORD_BYTES + JOB_BYTES, place.segment
        columns.append(
            event.first_id, now_ms, event.due_ms, segment, place.body_offset + event.payload_at, length,
            event.crcs[0] if event.crcs else 0, size, place.lsn, self._spec(event, columns), None, payload,
        )  # fmt: skip
        window.grown_by_one(run, event.first_id)
        changes = self.changes
        if changes is not None:
            changes.cells += 1
            changes.runs.add(run)
            self.live[segment] = self.live.get(segment, 0) + size
            if payload is not None:
                self._cache(columns, length + PAYLOAD_BYTES)
                if self._cached_bytes > self._cache_bytes:
                    self._trim_cache()
        queue.counts[READY] += 1
        queue.enqueued += 1
        self.next_id = event.first_id + 1
        if not queue.config.paused:
            self.woken.add(queue.name)
        if queue.bucket is not None and queue.bucket.limit.on == "enqueue":
            queue.bucket.take(1, now_ms)

    @staticmethod
    def _spec(event: Enqueued, columns: Columns) -> Spec:
        """What the jobs of the event share; the one object of the jobs before them if that is the same."""
        last = columns.specs[-1] if columns.specs else None
        if (
            last is not None
            and last.retry is event.retry
            and last.max_attempts == event.max_attempts
            and last.visibility_ms == event.visibility_ms
            and (last.headers is event.headers or last.headers == event.headers)
        ):
            return last
        return Spec(event.priority, event.max_attempts, event.retry, event.visibility_ms, event.headers)

    def _enqueue_loose(self, event: Enqueued, at: int, queue: Queue, now_ms: int, place: Place, overhead: int) -> None:
        """Jobs whose ids were told long before (by transactions): they find their place among the others."""
        spec = Spec(event.priority, event.max_attempts, event.retry, event.visibility_ms, event.headers)
        offset = place.body_offset + event.payload_at + sum(event.lengths[:at])
        for i in range(at, len(event.lengths)):
            length = event.lengths[i]
            key = None if event.keys is None else event.keys[i]
            entry = Entry(
                event.first_id + i, queue, spec, now_ms, event.due_ms, key, place.segment, offset, length,
                event.crcs[i] if event.crcs else 0, length + overhead, place.lsn,
                event.payloads[i] if self._keep_payloads else None, SCHEDULED if event.due_ms > now_ms else READY,
            )  # fmt: skip
            offset += length
            self.jobs[entry.id] = entry
            self._note(entry)
            self._line_up(entry)

    def _cache(self, columns: Columns, size: int) -> None:
        columns.cached_bytes += size
        self._cached_bytes += size
        if not self._cached or self._cached[-1] is not columns:
            self._cached.append(columns)

    def _trim_cache(self) -> None:
        """Count anew what is cached, and let go of the oldest until there is room again for some time."""
        sizes = [(columns, columns.cached_bytes) for columns in dict.fromkeys(self._cached)]
        self._cached = deque(columns for columns, size in sizes if size)
        left = sum(size for _, size in sizes)
        for columns, size in sizes:
            if left <= self._cache_bytes // 4 * 3:
                break
            if size:
                columns.payloads, columns.cached_bytes = None, 0
                self._cached.popleft()
                left -= size
        self._cached_bytes = left

    def _apply_leased(self, event: Leased, now_ms: int) -> None:
        entries: list[Entry | None] = []
        ids = event.ids
        for number, priority, count in event.places:
            at = len(entries)
            self._lease_from(self.numbers[number], priority, ids[at : at + count], entries)
        entries += [self._loosen(job_id, self.queues.values()) for job_id in ids[len(entries) :]]
        deadlines = self._deadlines
        least_ms = NEVER_MS
        for entry, token, attempts, deadline_ms in zip(
            entries, event.tokens, event.attempts, event.deadlines_ms, strict=True
        ):
            if entry is None:
                continue
            queue, job_id = entry.queue, entry.id
            if entry.state != LEASED:
                self._leave(entry)
                entry.state = LEASED
                queue.counts[LEASED] += 1
                queue.leased.add(job_id)
                self._leased += 1
            entry.token = token
            entry.attempts = attempts
            entry.deadline_ms = deadline_ms
            heapq.heappush(deadlines, (deadline_ms, job_id))
            if deadline_ms < least_ms:
                least_ms = deadline_ms
            if queue.bucket is not None and queue.bucket.limit.on == "lease":
                queue.bucket.take(1, now_ms)
        if self.changes is not None:
            self.changes.jobs.update(ids if None not in entries else [entry.id for entry in entries if entry])
        self._expect(least_ms)
        self._trim_deadlines()
        self.next_token = max(self.next_token, event.tokens[-1] + 1)

    def _lease_from(self, queue: Queue, priority: int, ids: Sequence[int], entries: list[Entry | None]) -> None:
        """Add the jobs of these ids to `entries`; those in a run become objects. Usually they are the head of one."""
        window = self.waiting[queue.number].window(READY, priority)
        jobs, at, n = self.jobs, 0, len(ids)
        while at < n:
            job_id = ids[at]
            entry = jobs.get(job_id)
            if entry is not None:
                entries.append(entry)
                at += 1
                continue
            run = window.runs[0] if window.runs else None
            if run is None or run.head != job_id:
                entries.append(self._loosen(job_id, (queue,)))
                at += 1
                continue
            column, first = run.load().ids, run.at
            count = min(n - at, run.left)
            if count > 1 and column[first : first + count] != array("Q", ids[at : at + count]):
                count = next(i for i in range(1, n - at + 1) if i == count or column[first + i] != ids[at + i])
            popped = run.pop(count, LEASED)
            window.popped(run, count)
            self._touch(run)
            for entry in popped:
                jobs[entry.id] = entry
            queue.leased.update(column[first : first + count])
            queue.counts[READY] -= count
            queue.counts[LEASED] += count
            self._leased += count
            entries += popped
            at += count

    def _push_deadline(self, entry: Entry) -> None:
        heapq.heappush(self._deadlines, (entry.deadline_ms, entry.id))
        self._expect(entry.deadline_ms)
        self._trim_deadlines()

    def _trim_deadlines(self) -> None:
        if len(self._deadlines) > 64 + 2 * self._leased:
            # Acked leases leave their pair behind; without this a fast consumer would fill memory until the deadlines.
            self._deadlines = [
                (e.deadline_ms, e.id) for q in self.queues.values() for e in map(self.jobs.__getitem__, q.leased)
            ]
            heapq.heapify(self._deadlines)

    def _apply_purged(self, queue: Queue, ids: Sequence[int]) -> None:
        self._remove([i for i in ids if i in self.jobs])
        if len(ids) == 1:
            if self._loosen(ids[0], (queue,)) is not None:
                self._remove(ids)
            return
        for state, window in list(self.waiting[queue.number].each()):
            for _, gone in self._extract(window, ids):
                queue.counts[state] -= len(gone)
                for segment, size in gone.live().items():
                    if segment in self.live:
                        self.live[segment] -= size
                for i, text in enumerate(gone.keys or ()):
                    if text is not None:
                        self._free_key(queue, text, gone.ids[i])

    def _extract(self, window: Window, ids: Sequence[int]) -> Iterator[tuple[Run, Columns]]:
        """Take the jobs of these ids out of the runs of a window: each run, and what left it."""
        wanted = set(ids)
        low, high = min(ids), max(ids)
        for run in [run for run in window.runs if run.low <= high and run.high >= low]:
            columns, at = run.peek()
            here = wanted.intersection(columns.ids[at:])
            if not here:
                continue
            cells = range(at, len(columns))
            gone = columns.picked([i for i in cells if columns.ids[i] in here])
            window.remove(run)
            run.keep([i for i in cells if columns.ids[i] not in here])
            if run.left:
                window.insert(run)
            self._touch(run)
            yield run, gone

    def _apply_redriven(self, ids: Sequence[int], now_ms: int) -> None:
        """All of them are dead letters of one queue, which the event does not name: those with such ids are few."""
        for job_id in ids:
            if (entry := self._known(job_id)) is not None:
                self._revive(entry, now_ms)
        left = [i for i in ids if i not in self.jobs]
        if not left:
            return
        low, high = min(left), max(left)
        for queue in list(self.queues.values()):
            for window in self.waiting[queue.number].windows(DEAD):
                if not window.around(low, high):
                    continue
                if len(left) < FEW_JOBS:
                    for job_id in left:
                        if (entry := self._loosen(job_id, (queue,), DEAD)) is not None:
                            self._revive(entry, now_ms)
                    break
                for run, columns in self._extract(window, left):
                    columns.start_anew()
                    again = Run(queue, run.priority, columns, READY)
                    self.waiting[queue.number].window(READY, run.priority).insert(again)
                    self._touch(again, again.left)
                    queue.counts[DEAD] -= again.left
                    queue.counts[READY] += again.left
            self._wake(queue)

    def _revive(self, entry: Entry, now_ms: int) -> None:
        entry.attempts = entry.died_at_ms = 0
        self._wait(entry, 0, now_ms)

    def _apply_copied(self, event: Copied, now_ms: int, place: Place) -> None:
        queue = self.numbers[event.queue]
        size = event.length + COPY_BYTES
        old = self.jobs.get(event.id)
        self.next_id = max(self.next_id, event.id + 1)
        self.next_token = max(self.next_token, event.token + 1)
        found = self._locate(event.id, (queue,), priority=event.priority) if old is None else None
        if found is not None:  # it goes on waiting where it is; only its place in the log is new
            _, _, run, i = found
            columns = run.load()
            segment = columns.segments[i]
            if segment in self.live:
                self.live[segment] -= columns.sizes[i]
            columns.segments[i], columns.offsets[i] = place.segment, place.body_offset + event.payload_at
            columns.sizes[i], columns.lsns[i] = size, place.lsn
            self.live[place.segment] = self.live.get(place.segment, 0) + size
            self._touch(run)
            return
        if old is not None:
            self._drop(old)
        spec = Spec(event.priority, event.max_attempts, event.retry, event.visibility_ms, event.headers)
        offset = place.body_offset + event.payload_at
        entry = Entry(
            event.id, queue, spec, event.enqueued_at_ms, event.due_ms, event.key, place.segment, offset, event.length,
            event.crc, size, place.lsn,
        )  # fmt: skip
        entry.attempts, entry.token, entry.last_error = event.attempts, event.token, event.last_error
        entry.deadline_ms, entry.died_at_ms = event.deadline_ms, event.died_at_ms
        entry.indexed = old is not None and old.indexed
        if old is None and event.key is not None:
            self._hold_key(event.queue, event.key, Key(event.id, place.segment))
        self._insert(entry, event.state, now_ms)

    # State changes that several events share

    def _known(self, job_id: int) -> Entry | None:
        """A loose job, which is about to change. What ends a delivery speaks of leased jobs, and these are loose."""
        entry = self.jobs.get(job_id)
        if entry is not None:
            self._note(entry)
        return entry

    def _note(self, entry: Entry) -> None:
        if self.changes is not None:
            self.changes.jobs.add(entry.id)

    def _touch(self, run: Run, new: int = 0) -> None:
        """A run changed (it got so many new jobs), or was used up."""
        changes = self.changes
        if changes is None:
            return
        changes.cells += new
        if run.left:
            changes.runs.add(run)
        else:
            changes.runs.discard(run)
            if run.number:
                changes.gone.add(run.number)

    def _locate(
        self, job_id: int, queues: Iterable[Queue], state: int | None = None, priority: int | None = None
    ) -> tuple[int, Window, Run, int] | None:
        """State, window, run and cell of a job that is in a run of one of these queues."""
        for queue in queues:
            for each, window in self.waiting[queue.number].each(priority):
                if window.runs and (state is None or state == each) and (found := window.find(job_id)) is not None:
                    return each, window, *found
        return None

    def _loosen(self, job_id: int, queues: Iterable[Queue], state: int | None = None) -> Entry | None:
        """A job as an object, taken out of its run if it is in one; it is about to change."""
        entry = self._known(job_id)
        if entry is not None:
            return entry
        found = self._locate(job_id, queues, state)
        if found is None:
            return None
        _, window, run, i = found
        window.remove(run)
        entry = run.pluck(i)
        if run.left:
            window.insert(run)
        self._touch(run)
        self.jobs[job_id] = entry
        window.add((entry.due_ms, job_id) if window.by_due else job_id)
        self._note(entry)
        return entry

    def look(self, job_id: int, number: int = 0, priority: int | None = None) -> Entry | None:
        """A job, wherever it is, for looking only. Queue and priority make it quicker, if they are known."""
        entry = self.jobs.get(job_id)
        if entry is not None:
            return entry
        queues = self._numbered(number) if number else self.queues.values()
        found = self._locate(job_id, queues, priority=priority)
        if found is None:
            return None
        state, _, run, i = found
        return run.load().entry(i, run.queue, state)

    def alive(self, number: int, priority: int, first_id: int, last_id: int) -> set[int]:
        """Which jobs of a queue and priority with ids in this range there still are."""
        found = {i for i in range(first_id, last_id + 1) if i in self.jobs}
        for queue in self._numbered(number):
            for _, window in self.waiting[queue.number].each(priority):
                for run in window.around(first_id, last_id):
                    found.update(run.between(first_id, last_id))
        return found

    def _numbered(self, number: int) -> tuple[Queue, ...]:
        """The queue of a number, unless it was removed."""
        queue = self.numbers.get(number)
        return () if queue is None else (queue,)

    def _wait(self, entry: Entry, due_ms: int, now_ms: int) -> None:
        """Back to its place: ready, or scheduled until `due_ms`."""
        self._leave(entry)
        entry.due_ms = due_ms
        self._enter(entry, SCHEDULED if due_ms > now_ms else READY)

    def _enter(self, entry: Entry, state: int) -> None:
        """Into the set of its state; not for a lease."""
        entry.state = state
        entry.queue.counts[state] += 1
        self._line_up(entry)
        if state == READY:
            self._wake(entry.queue)

    def _line_up(self, entry: Entry) -> None:
        queue, priority = entry.queue, entry.spec.priority
        window = self.waiting[queue.number].window(entry.state, priority)
        if window.by_due:
            key = (entry.due_ms, entry.id)
            window.add(key)
            self._expect_due(window, key, queue, priority)
        else:
            window.add(entry.id)

    def _leave(self, entry: Entry) -> None:
        """Out of the set of its state."""
        queue = entry.queue
        state = entry.state
        queue.counts[state] -= 1
        if state == LEASED:
            queue.leased.discard(entry.id)
            self._leased -= 1
        else:
            self.waiting[queue.number].window(state, entry.spec.priority).discard(
                (entry.due_ms, entry.id) if state == SCHEDULED else entry.id
            )

    def _drop(self, entry: Entry) -> None:
        """Out of all structures but its key."""
        self._leave(entry)
        del self.jobs[entry.id]
        if entry.segment in self.live:
            self.live[entry.segment] -= entry.size

    def _remove(self, ids: Iterable[int], acked_ms: int | None = None) -> None:
        """Loose jobs are gone for good. Their keys stay for the queue's window if they were acked, else they go."""
        changed = set[int]() if self.changes is None else self.changes.jobs
        live, jobs = self.live, self.jobs
        for job_id in ids:
            entry = jobs.pop(job_id, None)
            if entry is None:
                continue
            if entry.state == LEASED:  # as it is after nearly every delivery
                queue = entry.queue
                queue.counts[LEASED] -= 1
                queue.leased.discard(job_id)
                self._leased -= 1
            else:
                self._leave(entry)
            if entry.segment in live:
                live[entry.segment] -= entry.size
            if entry.indexed or (self.changes is not None and job_id in self.changes.packed):
                changed.add(job_id)
            else:
                changed.discard(job_id)
            if entry.key is None:
                continue
            if acked_ms is None:
                self._free_key(entry.queue, entry.key, job_id)
            else:
                self._end_key(entry.queue, entry.key, job_id, entry.segment, acked_ms)

    def _insert(self, entry: Entry, state: int, now_ms: int) -> None:
        """A whole job from the index or a copy, into the structures of its state."""
        if entry.segment:
            self.live[entry.segment] = self.live.get(entry.segment, 0) + entry.size
        if state == LEASED:
            self.jobs[entry.id] = entry
            entry.state = LEASED
            entry.queue.counts[LEASED] += 1
            entry.queue.leased.add(entry.id)
            self._leased += 1
            self._note(entry)
            self._push_deadline(entry)
            return
        if state != DEAD:
            state = SCHEDULED if entry.due_ms > now_ms else READY
        window = self.waiting[entry.queue.number].window(state, entry.spec.priority)
        key = (entry.due_ms, entry.id) if window.by_due else entry.id
        run = None if entry.indexed else window.open_for(key)
        if entry.indexed or (run is None and len(window.opens) > 1 and not window.opens[0].is_full):
            self.jobs[entry.id] = entry
            self._note(entry)
            self._enter(entry, state)
            return
        # Copies come in ascending order too: many of them, when the log is all there is, become runs again.
        entry.queue.counts[state] += 1
        if run is None:
            columns = Columns()
            columns.add(entry)
            run = Run(entry.queue, entry.spec.priority, columns, state)
            window.insert(run, is_open=True)
            if window.by_due:
                self._expect_due(window, run.head, entry.queue, entry.spec.priority)
        else:
            run.load().add(entry)
            window.grown(run, 1)
        self._touch(run, 1)
        if state == READY:
            self._wake(entry.queue)

    def _add_queue(self, queue: Queue) -> None:
        self.queues[queue.name] = queue
        self.numbers[queue.number] = queue
        self.waiting[queue.number] = Waiting()
        self.next_queue = max(self.next_queue, queue.number + 1)

    def _wake(self, queue: Queue) -> None:
        if queue.counts[READY] and not queue.config.paused:
            self.woken.add(queue.name)

    # Keys

    def find(self, name: str, text: str, now_ms: int) -> int | None:
        """The id that an idempotency key stands for now."""
        queue = self.queues.get(name)
        key = None if queue is None else self.keys.get(queue.number, text)
        return None if key is None or (key.expires_ms and key.expires_ms <= now_ms) else key.job_id

    def _hold_key(self, number: int, text: str, key: Key) -> None:
        self.keys.hold(number, text, key)
        if (queue := self.numbers.get(number)) is not None:
            queue.keyed = True
        if key.expires_ms:
            self._expect(key.expires_ms)

    def _end_key(self, queue: Queue, text: str, job_id: int, segment: int, now_ms: int) -> None:
        """The job ended: its key stands for it until the window is over."""
        key = self.keys.get(queue.number, text)
        if key is None or key.job_id != job_id:
            return  # a replay that met the key's next job first
        if queue.ttl_ms:
            self._hold_key(queue.number, text, Key(job_id, segment, now_ms + queue.ttl_ms))
        else:
            self.keys.forget(queue.number, text)

    def _free_key(self, queue: Queue, text: str, job_id: int) -> None:
        """The job was cancelled or purged. Its work was not done, so a second enqueue makes a job."""
        key = self.keys.get(queue.number, text)
        if key is not None and key.job_id == job_id:
            self.keys.forget(queue.number, text)

    def thaw_keys(self) -> None:
        """See `Keys.thaw`."""
        self.keys.thaw()
        self.next_wakeup_ms()

    # Memory

    def crowded(self, limit: int) -> list[tuple[int, Window]]:
        """Windows with loose jobs to put into runs, each with its state, if there are more than `limit` in all."""
        if len(self.jobs) - self._leased <= limit:
            return []
        return [
            (state, window)
            for queue in self.queues.values()
            for state, window in self.waiting[queue.number].each()
            if len(window.loose) > FEW_JOBS
        ]

    def pack(self, state: int, window: Window, count: int) -> bool:
        """Put the last `count` loose jobs of a window into a run, all but the head; False if there are no more."""
        count = min(count, RUN_JOBS, len(window.loose) - FEW_JOBS)
        if count <= 0:
            return False
        columns, changes = Columns(), self.changes
        for key in window.loose[-count:]:
            entry = self.jobs.pop(key[1] if window.by_due else key)
            columns.add(entry)
            if changes is not None:
                if entry.indexed:
                    changes.packed.add(entry.id)
                (changes.jobs.add if entry.id in changes.packed else changes.jobs.discard)(entry.id)
        del window.loose[-count:]
        window.count -= count
        run = Run(entry.queue, entry.spec.priority, columns, state)
        window.insert(run)
        self._touch(run, count)
        return True

    # Loading and saving

    def snapshot(self) -> Snapshot:
        """What a segment's header and the index carry besides the jobs."""
        queues = [
            QueueSnapshot(q.number, q.name, q.config, q.enqueued, q.acked, q.cancelled, q.purged)
            for q in self.numbers.values()
        ]
        return Snapshot(self.next_id, self.reserved_id, self.oldest_segment, self.now_ms, queues)

    def load(self, snapshot: Snapshot) -> None:
        """Start from a snapshot; the machine is empty."""
        assert not self.queues, "a snapshot is loaded into an empty machine"
        self.next_id = snapshot.next_id
        self.reserved_id = snapshot.reserved_id
        self.oldest_segment = snapshot.oldest_segment
        self.now_ms = snapshot.now_ms
        for saved in snapshot.queues:
            queue = Queue(saved.number, saved.name)
            queue.configure(saved.config, snapshot.now_ms)
            queue.enqueued, queue.acked = saved.enqueued, saved.acked
            queue.cancelled, queue.purged = saved.cancelled, saved.purged
            self._add_queue(queue)

    def load_entry(self, entry: Entry, state: int) -> None:
        """A loose job of the index."""
        entry.indexed = True
        self.next_token = max(self.next_token, entry.token + 1)
        self._insert(entry, state, self.now_ms)
        if self.changes is not None:
            self.changes.jobs.discard(entry.id)

    def load_run(self, run: Run, live: Iterable[tuple[int, int]]) -> None:
        """A run of the index, its columns still there; `live`: bytes per segment."""
        self.next_run = max(self.next_run, run.number + 1)
        run.queue.counts[run.state] += run.left
        window = self.waiting[run.queue.number].window(run.state, run.priority)
        window.insert(run)
        if window.by_due:
            self._expect_due(window, run.head, run.queue, run.priority)
        for segment, size in live:
            self.live[segment] = self.live.get(segment, 0) + size
        if run.state == READY:
            self._wake(run.queue)

    def start(self, now_ms: int, first_token: int) -> None:
        """After a recovery: told ids are not told again, tokens go on above all former ones, buckets are full."""
        self.next_id = max(self.next_id, self.reserved_id)
        self.next_token = max(self.next_token, first_token)
        for queue in self.queues.values():
            limit = queue.config.rate_limit
            queue.bucket = None if limit is None else TokenBucket(limit, now_ms)
            queue.start_tallies()
        self.advance(now_ms)

    # Looking

    def live_bytes(self) -> dict[int, int]:
        """What is still needed of each segment."""
        live = dict(self.live)
        for segment, count in self.keys.counts.items():
            live[segment] = live.get(segment, 0) + KEY_BYTES * count
        return live

    def head(self, window: Window, count: int) -> tuple[list[int], list[int], list[int | None]]:
        """The first jobs of a window: ids, attempts so far, visibility timeouts of their own."""
        ids: list[int] = []
        attempts: list[int] = []
        visibilities: list[int | None] = []
        if count == 1 and window.runs and not window.loose:  # most calls ask for this
            first = window.runs[0]
            columns, i = first.load(), first.at
            job_id, extras = columns.ids[i], columns.extras
            before = extras[job_id][0] if extras is not None and job_id in extras else 0
            return [job_id], [before], [columns.specs[i].visibility_ms]
        for run, start, stop in window.walk():
            room = count - len(ids)
            stop = min(stop, start + room)
            if run is None:
                for entry in map(self.jobs.__getitem__, window.loose[start:stop]):
                    ids.append(entry.id)
                    attempts.append(entry.attempts)
                    visibilities.append(entry.spec.visibility_ms)
            else:
                columns = run.load()
                here, extras = columns.ids[start:stop], columns.extras
                ids += here
                attempts += [0] * len(here) if extras is None else [extras[i][0] if i in extras else 0 for i in here]
                visibilities += [spec.visibility_ms for spec in columns.specs[start:stop]]
            if len(ids) == count:
                break
        return ids, attempts, visibilities

    def within(self, window: Window, count: int, max_bytes: int) -> tuple[int, int]:
        """How many of the first `count` jobs of a window have payloads of `max_bytes` together, and of how many."""
        found = size = 0
        for run, start, stop in window.walk():
            stop = min(stop, start + count - found)
            lengths: Iterable[int]
            if run is None:
                lengths = [self.jobs[i].length for i in window.loose[start:stop]]
            else:
                lengths = run.load().lengths[start:stop]
            for length in lengths:
                if size + length > max_bytes:
                    return found, size
                size += length
                found += 1
            if found == count:
                break
        return found, size

    def some_ids(self, queue: Queue, states: Sequence[int], below_id: int, count: int) -> list[int]:
        """Up to `count` ids below `below_id` of jobs that wait in one of these states; none if there are none.

        Not the lowest ones, but those that lie together: a few runs are read, however many there are.
        """
        ids: list[int] = []
        runs_read = 0
        windows = [window for state, window in self.waiting[queue.number].each() if state in states]
        for window in windows:
            for run in window.runs:
                if run.low >= below_id:
                    continue
                columns, at = run.peek()
                ids += [i for i in columns.ids[at:] if i < below_id][: count - len(ids)]
                runs_read += 1
                if ids and (len(ids) == count or runs_read >= RUNS_AT_ONCE):
                    return sorted(ids)
        for window in windows:
            for key in window.loose:
                job_id = key[1] if window.by_due else key
                if len(ids) == count:
                    return sorted(ids)
                if job_id < below_id:
                    ids.append(job_id)
        return sorted(ids)

    @staticmethod
    def ids_in(runs: Iterable[Run], after: int, below: int) -> list[tuple[int, Run]]:
        """Ids between these two of jobs in these runs, each with its run; one that was used up meanwhile has none."""
        found: list[tuple[int, Run]] = []
        for run in runs:
            if run.left and run.high > after and run.low < below:
                columns, at = run.peek()
                found += [(i, run) for i in columns.ids[at:] if after < i < below]
        return found

    def listed(self, name: str, run: Run | None, ids: Sequence[int]) -> Iterator[Entry]:
        """The jobs of these ids, for looking only, which were in this run or loose a moment ago."""
        queue, wanted = self.queues.get(name), set(ids)
        if queue is None:
            return
        if run is not None and run.left:
            columns, at = run.peek()
            for i in range(at, len(columns)):
                if columns.ids[i] in wanted:
                    wanted.remove(columns.ids[i])
                    yield columns.entry(i, queue, run.state)
        for job_id in wanted:
            if (entry := self.look(job_id, queue.number)) is not None:
                yield entry

    def tally_expired(self, events: Sequence[Event]) -> None:
        """These retries and deaths, just applied, were not an answer's. What never began has not expired."""
        for event in events:
            if isinstance(event, Released):
                continue
            assert isinstance(event, Retried | Buried), event
            self.jobs[event.id].queue.expired += 1  # it was leased a moment ago, so it is loose

    def deliveries(self, name: str | None) -> Deliveries:
        """What became of the deliveries of one queue, or of all together."""
        each = [attrs.astuple(queue.deliveries()) for queue in self._named(name)]
        return Deliveries(*map(sum, zip(*each, strict=True))) if each else Deliveries()

    def _named(self, name: str | None) -> list[Queue]:
        """One queue, if there is such a one, or all."""
        if name is None:
            return list(self.queues.values())
        return [self.queues[name]] if name in self.queues else []

    def stats(self, name: str | None, now_ms: int) -> QueueStats:
        """Counts of one queue, or of all together."""
        queues = self._named(name)
        ages = [now_ms - at for queue in queues if (at := self._oldest_ready_ms(queue)) is not None]
        ready, scheduled, leased, dead = (sum(q.counts[state] for q in queues) for state in range(len(STATES)))
        return QueueStats(
            ready=ready,
            scheduled=scheduled,
            leased=leased,
            dead=dead,
            enqueued=sum(q.enqueued for q in queues),
            acked=sum(q.acked for q in queues),
            cancelled=sum(q.cancelled for q in queues),
            purged=sum(q.purged for q in queues),
            oldest_age=max(ages) / 1000 if ages else None,
        )

    def _oldest_ready_ms(self, queue: Queue) -> int | None:
        firsts: list[int] = []
        for window in self.waiting[queue.number].windows(READY):
            run, start, _ = next(window.walk())
            firsts.append(self.jobs[window.loose[start]].enqueued_at_ms if run is None else run.load().times[start])
        return min(firsts, default=None)

    def listing(self, name: str, state: int | None, after: int, limit: int, *, by_due: bool = True) -> list[Entry]:
        """Up to `limit` jobs of a queue with ids above `after`, ascending; the scheduled ones only if `by_due`."""
        queue = self.queues.get(name)
        if queue is None:
            return []
        found: list[Entry] = []
        if state is None or state == LEASED:
            ids = heapq.nsmallest(limit, (i for i in queue.leased if i > after))
            found += map(self.jobs.__getitem__, ids)
        for each, window in self.waiting[queue.number].each():
            if state in (None, each) and (by_due or not window.by_due):
                cells = self._by_due(window, after, limit) if window.by_due else window.walk(after)
                found += self._stretch(queue, each, window, cells, limit)
        found.sort(key=lambda entry: entry.id)
        return found[:limit]

    def _stretch(
        self, queue: Queue, state: int, window: Window, cells: Iterable[tuple[Run | None, int, int]], limit: int
    ) -> list[Entry]:
        found: list[Entry] = []
        for run, start, stop in cells:
            stop = min(stop, start + limit - len(found))
            if run is None:
                keys = window.loose[start:stop]
                found += [self.jobs[key[1] if window.by_due else key] for key in keys]
            else:
                columns = run.load()
                found += columns.entries(start, stop, queue, state)
            if len(found) == limit:
                break
        return found

    @staticmethod
    def _by_due(window: Window, after: int, limit: int) -> list[tuple[Run | None, int, int]]:
        """The jobs with the least ids above `after` of a window in order of due moments: it looks at all of them."""
        found: list[tuple[int, Run | None, int]] = []
        for run in window.runs:
            if run.high > after and (not found or len(found) < limit or run.low < found[-1][0]):
                columns, at = run.peek()
                found += [(i, run, cell) for cell, i in enumerate(columns.ids[at:], at) if i > after]
                found = heapq.nsmallest(limit, found, key=lambda each: each[0])
        found += [(key[1], None, at) for at, key in enumerate(window.loose) if key[1] > after]
        return [(run, cell, cell + 1) for _, run, cell in heapq.nsmallest(limit, found, key=lambda each: each[0])]

    def everything(self) -> Iterator[Entry]:
        """All jobs, in no order; for dumps and checks."""
        yield from list(self.jobs.values())
        for queue in self.queues.values():
            for state, window in self.waiting[queue.number].each():
                for run in window.runs:
                    columns, at = run.peek()
                    yield from columns.entries(at, len(columns), queue, state)

    def dump(self) -> dict[str, Any]:
        """The whole state in canonical order, for comparing two machines."""
        jobs = [facts(e) for e in sorted(self.everything(), key=lambda entry: entry.id)]
        keys = sorted(
            (self.numbers[number].name, text, key.job_id, key.expires_ms)
            for (number, text), key in self.keys.all().items()
            if not key.expires_ms or key.expires_ms > self.now_ms
        )
        queues = sorted(
            (q.name, q.config, q.config.paused, q.enqueued, q.acked, q.cancelled, q.purged)
            for q in self.queues.values()
        )
        return {"jobs": jobs, "keys": keys, "queues": queues}

    def check(self) -> None:
        """Assert every relation between the structures; for tests, it looks at everything."""
        jobs = {entry.id: entry for entry in self.everything()}
        present: dict[int, list[int]] = {number: [0, 0, 0, 0] for number in self.numbers}
        total = 0
        for entry in self.everything():
            total += 1
            present[entry.queue.number][entry.state] += 1
            assert entry.id < self.next_id, f"job {entry.id} is not below the next id {self.next_id}"
        assert total == len(jobs), "a job is in two places"
        loose: dict[int, int] = {}
        first_due = NEVER_MS
        for queue in self.queues.values():
            assert self.numbers[queue.number] is queue, f"queue {queue.name!r}: number {queue.number} is another's"
            assert queue.counts == present[queue.number], f"queue {queue.name!r}: counts {queue.counts} are off"
            assert queue.counts[LEASED] == len(queue.leased), f"queue {queue.name!r}: leased count is off"
            ended = queue.acked + queue.cancelled + queue.purged
            accounted = sum(queue.counts) + ended
            assert queue.enqueued == accounted, f"queue {queue.name!r}: {queue.enqueued} in, {accounted} accounted for"
            loose.update(dict.fromkeys(queue.leased, LEASED))
            waiting = self.waiting[queue.number]
            for state, windows in ((READY, waiting.ready), (SCHEDULED, waiting.scheduled), (DEAD, waiting.dead)):
                for priority, window in enumerate(windows):
                    if window is None:
                        continue
                    window.check()
                    for key in window.loose:
                        entry = self.jobs[key[1] if window.by_due else key]
                        assert entry.id not in loose, f"job {entry.id} is in two sets"
                        loose[entry.id] = state
                        assert (entry.queue, entry.spec.priority) == (queue, priority), f"job {entry.id} is misplaced"
                        assert not window.by_due or key[0] == entry.due_ms, f"job {entry.id} is due at another moment"
                    if state == SCHEDULED and window.count:
                        first_due = min(first_due, window.first()[0])
                        waits = {(number, each) for _, number, each in self._due}
                        assert (queue.number, priority) in waits, f"queue {queue.name!r}: nobody waits for its due jobs"
        assert loose == {i: e.state for i, e in self.jobs.items()}, "the sets and the jobs' states differ"
        assert not self._due or self._due[0][0] <= first_due, "a due moment would be missed"
        live: dict[int, int] = {}
        for entry in jobs.values():
            live[entry.segment] = live.get(entry.segment, 0) + entry.size
        counts: dict[int, int] = {}
        for (number, text), key in self.keys.all().items():
            job = jobs.get(key.job_id)
            if key.expires_ms:
                assert job is None, f"key {text!r}: its job {key.job_id} lives and it has an end"
                if key.expires_ms <= self.now_ms and key.segment < self.oldest_segment:
                    continue  # over, and still on the shelf when its segment went: it weighs nothing any more
                counts[key.segment] = counts.get(key.segment, 0) + 1
            else:
                assert job is not None, f"key {text!r} stands for no living job"
                assert job.key == text, f"key {text!r} stands for job {job.id}, which has {job.key!r}"
                assert job.queue.number == number, f"key {text!r} stands for a job of another queue"
        for kept in (live, counts):
            kept.pop(0, None)
        counted = {s: n for s, n in self.live.items() if n and s}
        assert {s: n for s, n in live.items() if n} == counted, f"live bytes: counted {counted}, found {live}"
        counted = {s: n for s, n in self.keys.counts.items() if n and s}
        assert counts == counted, f"keys per segment: counted {counted}, found {counts}"


def facts(e: Entry) -> tuple[Any, ...]:
    """All that makes a job what it is, besides its place in the log; for comparing."""
    return (
        e.id, e.queue.name, STATES[e.state].value, e.spec.priority, e.attempts, e.token, e.spec.max_attempts,
        e.spec.retry, e.spec.visibility_ms, e.enqueued_at_ms, e.due_ms if e.state == SCHEDULED else 0,
        e.deadline_ms if e.state == LEASED else 0, e.died_at_ms, e.last_error, dict(e.spec.headers), e.key,
        e.length, e.crc,
    )  # fmt: skip
