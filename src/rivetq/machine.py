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
from collections.abc import Iterable
from typing import Any, assert_never

from .engine import Delivery
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
    Redriven,
    Released,
    Retried,
    SegmentsDropped,
)
from .model import QueueStats
from .ratelimit import TokenBucket
from .state import (
    COPY_BYTES,
    DEAD,
    JOB_BYTES,
    KEY_BYTES,
    LEASED,
    READY,
    RECORD_BYTES,
    SCHEDULED,
    STATES,
    Changes,
    Entry,
    Key,
    Place,
    Queue,
    QueueSnapshot,
    Snapshot,
    Spec,
)
from .window import Window

NEVER_MS = 2**62


class Machine:
    """All queues. Not thread-safe: the engine's lock is around every call."""

    def __init__(self, *, keep_payloads: bool = False, id_block: int = 0) -> None:
        self.jobs: dict[int, Entry] = {}
        self.queues: dict[str, Queue] = {}
        self.numbers: dict[int, Queue] = {}
        self.due = Window()  # (due_ms, id) of scheduled jobs over all queues
        self.expiring = Window()  # (expires_ms, queue number, key) of keys that outlived their job
        self.next_id = 1
        self.reserved_id = 1
        self.next_token = 1
        self.oldest_segment = 1
        self.now_ms = 0  # the latest moment that the state has seen: the time line never steps back
        self.wake_ms = NEVER_MS  # nothing happens by the clock alone before this; may be earlier than what does happen
        self.live: dict[int, int] = {}  # bytes per segment that are still needed
        self.changes: Changes | None = None if keep_payloads else Changes()
        self.woken: set[str] = set()  # queues in which something became ready since the engine last looked
        self._deadlines: list[tuple[int, int]] = []  # heap of (deadline_ms, id); stale pairs are skipped
        self._leased = 0
        self._keep_payloads = keep_payloads
        self.id_block = id_block

    def take_ids(self, count: int) -> int:
        """The first of `count` ids that nobody else gets; a reservation covers them (see plan_ids)."""
        first, self.next_id = self.next_id, self.next_id + count
        assert self.next_id <= self.reserved_id, f"ids up to {self.next_id} told, reserved are {self.reserved_id}"
        return first

    # Time

    def advance(self, now_ms: int) -> None:
        """Let the clock act: due jobs become ready, ended keys are forgotten. Not logged: the clock says it again."""
        assert now_ms >= self.now_ms, f"time line stepped back: {self.now_ms} -> {now_ms}"
        self.now_ms = now_ms
        if now_ms < self.wake_ms:
            return
        while (first := self.due.first()) is not None and first[0] <= now_ms:
            entry = self.jobs[first[1]]
            self._leave(entry)
            self._enter_ready(entry)
        while (oldest := self.expiring.first()) is not None and oldest[0] <= now_ms:
            _, number, text = oldest
            self._forget_key(self.numbers[number], text)
        self.next_wakeup_ms()

    def next_wakeup_ms(self) -> int | None:
        """When the clock acts next: a delay falls due or a lease ends."""
        first, lease, key = self.due.first(), self._first_deadline(), self.expiring.first()
        at_ms = min(NEVER_MS if first is None else int(first[0]), NEVER_MS if lease is None else lease[0])
        self.wake_ms = at_ms if key is None else min(at_ms, int(key[0]))
        return None if at_ms == NEVER_MS else at_ms

    def _expect(self, at_ms: int) -> None:
        if at_ms < self.wake_ms:
            self.wake_ms = at_ms

    def ended_leases(self, now_ms: int, limit: int) -> list[tuple[int, int]]:
        """(deadline_ms, id) of up to `limit` leases whose deadline has come, earliest first."""
        ended: dict[tuple[int, int], None] = {}  # an extend may have left the same pair twice
        while len(ended) < limit and (first := self._first_deadline()) and first[0] <= now_ms:
            ended[heapq.heappop(self._deadlines)] = None
        for pair in ended:  # nothing has happened yet: apply makes these pairs stale
            heapq.heappush(self._deadlines, pair)
        return list(ended)

    def _first_deadline(self) -> tuple[int, int] | None:
        heap = self._deadlines
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
                queue = self.numbers[event.queue]
                queue.acked += len(event.ids)
                self._remove(event.ids, now_ms)
            case Retried():
                if (entry := self._known(event.id)) is not None:
                    entry.last_error = event.error
                    self._wait(entry, event.due_ms, now_ms)
            case Released():
                if (entry := self._known(event.id)) is not None:
                    entry.attempts = event.attempts
                    self._wait(entry, event.due_ms, now_ms)
            case Buried():
                if (entry := self._known(event.id)) is not None:
                    self._leave(entry)
                    entry.last_error = event.error
                    entry.died_at_ms = event.died_at_ms
                    entry.state = DEAD
                    entry.queue.dead.add(entry.id)
            case Extended():
                if (entry := self._known(event.id)) is not None and entry.state == LEASED:
                    entry.deadline_ms = event.deadline_ms
                    self._push_deadline(entry)
            case Cancelled():
                self.numbers[event.queue].cancelled += 1
                self._remove((event.id,), now_ms)
            case Purged():
                self.numbers[event.queue].purged += len(event.ids)
                self._remove(event.ids, now_ms)
            case Redriven():
                for job_id in event.ids:
                    if (entry := self._known(job_id)) is not None:
                        entry.attempts = entry.died_at_ms = 0
                        self._wait(entry, 0, now_ms)
            case QueueCreated():
                if event.number not in self.numbers:
                    self._add_queue(Queue(event.number, event.name))
            case QueueConfigured():
                queue = self.numbers[event.queue]
                queue.configure(event.config, now_ms)
                self._wake(queue)
            case IdsReserved():
                self.reserved_id = event.next_id
            case Copied():
                self._apply_copied(event, now_ms, place)
            case KeyCopied():
                self._apply_key_copied(event, place)
            case SegmentsDropped():
                self.oldest_segment = max(self.oldest_segment, event.upto + 1)
                for segment in [s for s in self.live if s <= event.upto]:
                    del self.live[segment]
            case _:
                assert_never(event)

    def _apply_enqueued(self, event: Enqueued, now_ms: int, place: Place) -> None:
        queue = self.numbers[event.queue]
        spec = Spec(event.priority, event.max_attempts, event.retry, event.visibility_ms, event.headers)
        count = len(event.lengths)
        first_id, keys, crcs, payloads = event.first_id, event.keys, event.crcs, event.payloads
        offset = place.body_offset + event.payload_at
        overhead = RECORD_BYTES // count + JOB_BYTES
        segment, lsn, jobs = place.segment, place.lsn, self.jobs
        for i, length in enumerate(event.lengths):
            job_id = first_id + i
            entry = Entry(job_id, queue, spec, now_ms, event.due_ms, keys[i] if keys else None)
            if job_id in jobs:  # a checkpoint took the job while the log went on
                entry.indexed = jobs[job_id].indexed
                self._drop(jobs[job_id])
            entry.length = length
            if segment:
                entry.segment, entry.offset, entry.crc, entry.lsn = segment, offset, crcs[i], lsn
                entry.size = length + overhead
                offset += length
            else:
                entry.payload = payloads[i]
            jobs[job_id] = entry
            if entry.key is not None:
                self._hold_key(queue, entry.key, job_id, segment)
        ids = range(first_id, first_id + count)
        if event.due_ms > now_ms:
            for job_id in ids:
                jobs[job_id].state = SCHEDULED
            queue.scheduled.update(ids)
            self.due.update([(event.due_ms, job_id) for job_id in ids])
            self._expect(event.due_ms)
        else:
            if count == 1:
                queue.ready[event.priority].add(first_id)
            else:
                queue.ready[event.priority].update(ids)
            queue.ready_count += count
            self._wake(queue)
        if segment:
            self.live[segment] = self.live.get(segment, 0) + sum(event.lengths) + overhead * count
        if self.changes is not None:
            self.changes.jobs.update(ids)
        if queue.bucket is not None and queue.bucket.limit.on == "enqueue":
            queue.bucket.take(count, now_ms)
        queue.enqueued += count
        self.next_id = max(self.next_id, first_id + count)

    def _apply_leased(self, event: Leased, now_ms: int) -> None:
        for i, job_id in enumerate(event.ids):
            entry = self._known(job_id)
            if entry is None:
                continue
            if entry.state != LEASED:
                self._leave(entry)
                entry.state = LEASED
                entry.queue.leased.add(job_id)
                self._leased += 1
            entry.token = event.tokens[i]
            entry.attempts = event.attempts[i]
            entry.deadline_ms = event.deadlines_ms[i]
            self._push_deadline(entry)
            bucket = entry.queue.bucket
            if bucket is not None and bucket.limit.on == "lease":
                bucket.take(1, now_ms)
        self.next_token = max(self.next_token, event.tokens[-1] + 1)

    def _push_deadline(self, entry: Entry) -> None:
        heap = self._deadlines
        heapq.heappush(heap, (entry.deadline_ms, entry.id))
        self._expect(entry.deadline_ms)
        if len(heap) > 64 + 2 * self._leased:
            # Acked leases leave their pair behind; without this a fast consumer would fill memory until the deadlines.
            self._deadlines = [
                (e.deadline_ms, e.id) for q in self.queues.values() for e in map(self.jobs.__getitem__, q.leased)
            ]
            heapq.heapify(self._deadlines)

    def _apply_copied(self, event: Copied, now_ms: int, place: Place) -> None:
        old = self.jobs.get(event.id)
        if old is not None:
            self._drop(old)
        queue = self.numbers[event.queue]
        spec = Spec(event.priority, event.max_attempts, event.retry, event.visibility_ms, event.headers)
        entry = Entry(event.id, queue, spec, event.enqueued_at_ms, event.due_ms, event.key)
        entry.attempts, entry.token, entry.last_error = event.attempts, event.token, event.last_error
        entry.deadline_ms, entry.died_at_ms = event.deadline_ms, event.died_at_ms
        entry.segment, entry.offset = place.segment, place.body_offset + event.payload_at
        entry.length, entry.crc, entry.lsn = event.length, event.crc, place.lsn
        entry.size = event.length + COPY_BYTES
        entry.indexed = old is not None and old.indexed
        self.next_id = max(self.next_id, event.id + 1)
        self.next_token = max(self.next_token, event.token + 1)
        self._insert(entry, event.state, now_ms)
        if self.changes is not None:
            self.changes.jobs.add(event.id)

    def _apply_key_copied(self, event: KeyCopied, place: Place) -> None:
        queue = self.numbers[event.queue]
        key = self._hold_key(queue, event.key, event.job_id, place.segment)
        self._keep_key(queue, event.key, key, event.expires_ms)

    # State changes that several events share

    def _known(self, job_id: int) -> Entry | None:
        entry = self.jobs.get(job_id)
        if entry is not None and self.changes is not None:
            self.changes.jobs.add(job_id)
        return entry

    def _wait(self, entry: Entry, due_ms: int, now_ms: int) -> None:
        """Back to its place: ready, or scheduled until `due_ms`."""
        self._leave(entry)
        entry.due_ms = due_ms
        if due_ms > now_ms:
            entry.state = SCHEDULED
            entry.queue.scheduled.add(entry.id)
            self.due.add((due_ms, entry.id))
            self._expect(due_ms)
        else:
            self._enter_ready(entry)

    def _enter_ready(self, entry: Entry) -> None:
        entry.state = READY
        queue = entry.queue
        queue.ready[entry.spec.priority].add(entry.id)
        queue.ready_count += 1
        self._wake(queue)

    def _leave(self, entry: Entry) -> None:
        """Out of the set of its state."""
        queue = entry.queue
        state = entry.state
        if state == READY:
            queue.ready[entry.spec.priority].discard(entry.id)
            queue.ready_count -= 1
        elif state == LEASED:
            queue.leased.discard(entry.id)
            self._leased -= 1
        elif state == SCHEDULED:
            queue.scheduled.discard(entry.id)
            self.due.discard((entry.due_ms, entry.id))
        else:
            queue.dead.discard(entry.id)

    def _drop(self, entry: Entry) -> None:
        """Out of all structures but its key."""
        self._leave(entry)
        del self.jobs[entry.id]
        if entry.segment in self.live:
            self.live[entry.segment] -= entry.size

    def _remove(self, ids: Iterable[int], now_ms: int) -> None:
        """Gone for good; its key stays for the queue's window."""
        for job_id in ids:
            entry = self.jobs.get(job_id)
            if entry is None:
                continue
            self._drop(entry)
            if self.changes is not None:
                (self.changes.jobs.add if entry.indexed else self.changes.jobs.discard)(job_id)
            if entry.key is not None:
                self._end_key(entry, now_ms)

    def _insert(self, entry: Entry, state: int, now_ms: int) -> None:
        """A whole job from the index or a copy, into the structures of its state."""
        self.jobs[entry.id] = entry
        queue = entry.queue
        if entry.segment:
            self.live[entry.segment] = self.live.get(entry.segment, 0) + entry.size
        if entry.key is not None:
            self._hold_key(queue, entry.key, entry.id, entry.segment)
        if state == LEASED:
            entry.state = LEASED
            queue.leased.add(entry.id)
            self._leased += 1
            self._push_deadline(entry)
        elif state == DEAD:
            entry.state = DEAD
            queue.dead.add(entry.id)
        elif entry.due_ms > now_ms:
            entry.state = SCHEDULED
            queue.scheduled.add(entry.id)
            self.due.add((entry.due_ms, entry.id))
            self._expect(entry.due_ms)
        else:
            self._enter_ready(entry)

    def _add_queue(self, queue: Queue) -> None:
        self.queues[queue.name] = queue
        self.numbers[queue.number] = queue

    def _wake(self, queue: Queue) -> None:
        if queue.ready_count and not queue.config.paused:
            self.woken.add(queue.name)

    # Keys

    def find(self, name: str, text: str, now_ms: int) -> int | None:
        """The id that an idempotency key stands for now."""
        queue = self.queues.get(name)
        key = None if queue is None else queue.keys.get(text)
        return None if key is None or (key.expires_ms and key.expires_ms <= now_ms) else key.job_id

    def _hold_key(self, queue: Queue, text: str, job_id: int, segment: int) -> Key:
        old = queue.keys.get(text)
        key = Key(job_id, segment)
        if old is not None:
            key.indexed = old.indexed
            if old.expires_ms:
                self._forget_key(queue, text)
        queue.keys[text] = key
        return key

    def _end_key(self, entry: Entry, now_ms: int) -> None:
        """The job ended: its key stands for it until the window is over."""
        queue, text = entry.queue, entry.key
        key = queue.keys.get(text) if text is not None else None
        if text is None or key is None or key.job_id != entry.id:
            return  # a replay that met the key's next job first
        if queue.ttl_ms:
            key.segment = entry.segment
            self._keep_key(queue, text, key, now_ms + queue.ttl_ms)
        else:
            self._forget_key(queue, text)

    def _keep_key(self, queue: Queue, text: str, key: Key, expires_ms: int) -> None:
        key.expires_ms = expires_ms
        self.expiring.add((expires_ms, queue.number, text))
        self._expect(expires_ms)
        if key.segment:
            self.live[key.segment] = self.live.get(key.segment, 0) + KEY_BYTES
        if self.changes is not None:
            self.changes.keys.add((queue.number, text))

    def _forget_key(self, queue: Queue, text: str) -> None:
        key = queue.keys.pop(text)
        if key.expires_ms:
            self.expiring.discard((key.expires_ms, queue.number, text))
            if key.segment in self.live:
                self.live[key.segment] -= KEY_BYTES
        if self.changes is not None:
            (self.changes.keys.add if key.indexed else self.changes.keys.discard)((queue.number, text))

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

    def load_entries(self, entries: Iterable[tuple[Entry, int]]) -> None:
        """The jobs of the index, each with its state, by id."""
        ready: dict[Window, list[int]] = {}  # a window takes many ids at once far quicker than one by one
        for entry, state in entries:
            entry.indexed = True
            if entry.token >= self.next_token:
                self.next_token = entry.token + 1
            if state in (LEASED, DEAD) or entry.key is not None or entry.due_ms > self.now_ms:
                self._insert(entry, state, self.now_ms)
                continue
            queue, segment = entry.queue, entry.segment
            self.jobs[entry.id] = entry
            self.live[segment] = self.live.get(segment, 0) + entry.size
            ready.setdefault(queue.ready[entry.spec.priority], []).append(entry.id)
            queue.ready_count += 1
        for window, ids in ready.items():
            window.update(ids)
        for queue in self.queues.values():
            self._wake(queue)

    def load_key(self, number: int, text: str, job_id: int, expires_ms: int, segment: int) -> None:
        """A key from the index that outlived its job."""
        queue = self.numbers[number]
        if text in queue.keys:  # the job was saved before it ended, the key after: its end is in the log and comes next
            queue.keys[text].indexed = True
            return
        key = self._hold_key(queue, text, job_id, segment)
        key.indexed = True
        self._keep_key(queue, text, key, expires_ms)
        if self.changes is not None:
            self.changes.keys.discard((number, text))

    def start(self, now_ms: int, first_token: int) -> None:
        """After a recovery: told ids are not told again, tokens go on above all former ones, buckets are full."""
        self.next_id = max(self.next_id, self.reserved_id)
        self.next_token = max(self.next_token, first_token)
        for queue in self.queues.values():
            limit = queue.config.rate_limit
            queue.bucket = None if limit is None else TokenBucket(limit, now_ms)
        self.advance(now_ms)

    # Looking

    def stats(self, name: str | None, now_ms: int) -> QueueStats:
        """Counts of one queue, or of all together."""
        queues = [q for q in self.queues.values() if name is None] or [q for q in [self.queues.get(name or "")] if q]
        ages = [now_ms - at for queue in queues if (at := queue.oldest_ready_ms(self.jobs)) is not None]
        return QueueStats(
            ready=sum(q.ready_count for q in queues),
            scheduled=sum(len(q.scheduled) for q in queues),
            leased=sum(len(q.leased) for q in queues),
            dead=sum(len(q.dead) for q in queues),
            enqueued=sum(q.enqueued for q in queues),
            acked=sum(q.acked for q in queues),
            cancelled=sum(q.cancelled for q in queues),
            purged=sum(q.purged for q in queues),
            oldest_age=max(ages) / 1000 if ages else None,
        )

    def listing(self, name: str, state: int | None, after: int, limit: int) -> list[Entry]:
        """Up to `limit` jobs of a queue with ids above `after`, ascending."""
        queue = self.queues.get(name)
        if queue is None:
            return []
        wanted = range(len(STATES)) if state is None else (state,)
        found: list[Entry] = []
        for job_id in heapq.merge(*(queue.ids_after(each, after) for each in wanted)):
            if len(found) == limit:
                break
            found.append(self.jobs[job_id])
        return found

    def delivery(self, entry: Entry, payload: bytes) -> Delivery:
        """What a lease hands out for a leased job."""
        spec = entry.spec
        return Delivery(
            entry.id, entry.queue.name, payload, spec.headers, spec.priority, entry.attempts, entry.token,
            entry.deadline_ms, entry.enqueued_at_ms, spec.max_attempts, entry.last_error,
        )  # fmt: skip

    def dump(self) -> dict[str, Any]:
        """The whole state in canonical order, for comparing two machines."""
        jobs = [
            (e.id, e.queue.name, STATES[e.state].value, e.spec.priority, e.attempts, e.token, e.spec.max_attempts,
             e.spec.retry, e.spec.visibility_ms, e.enqueued_at_ms, e.due_ms if e.state == SCHEDULED else 0,
             e.deadline_ms if e.state == LEASED else 0, e.died_at_ms, e.last_error, dict(e.spec.headers), e.key,
             e.length, e.crc)
            for _, e in sorted(self.jobs.items())
        ]  # fmt: skip
        keys = sorted(
            (q.name, text, key.job_id, key.expires_ms) for q in self.queues.values() for text, key in q.keys.items()
        )
        queues = sorted(
            (q.name, q.config, q.config.paused, q.enqueued, q.acked, q.cancelled, q.purged)
            for q in self.queues.values()
        )
        return {"jobs": jobs, "keys": keys, "queues": queues}

    def check(self) -> None:
        """Assert every relation between the structures; for tests, it looks at everything."""
        self.due.check()
        self.expiring.check()
        states: dict[int, int] = {}
        for queue in self.queues.values():
            assert self.numbers[queue.number] is queue, f"queue {queue.name!r}: number {queue.number} is another's"
            for window in [*queue.ready, queue.scheduled, queue.dead]:
                window.check()
            assert queue.ready_count == sum(map(len, queue.ready)), f"queue {queue.name!r}: ready count is off"
            for state in range(len(STATES)):
                for job_id in queue.ids(state):
                    assert job_id not in states, f"job {job_id} is in two sets"
                    states[job_id] = state
                    assert self.jobs[job_id].queue is queue, f"job {job_id} is in another queue's set"
            present = sum(1 for e in self.jobs.values() if e.queue is queue)
            total = present + queue.acked + queue.cancelled + queue.purged
            assert queue.enqueued == total, f"queue {queue.name!r}: enqueued {queue.enqueued}, accounted for {total}"
            for text, key in queue.keys.items():
                job = self.jobs.get(key.job_id)
                if key.expires_ms:
                    assert job is None, f"key {text!r}: its job {key.job_id} lives and it has an end"
                else:
                    assert job is not None, f"key {text!r} stands for no living job"
                    assert job.key == text, f"key {text!r} stands for job {job.id}, which has {job.key!r}"
        assert states == {i: e.state for i, e in self.jobs.items()}, "the sets and the jobs' states differ"
        due = {(e.due_ms, e.id) for e in self.jobs.values() if e.state == SCHEDULED}
        assert due == set(self.due.after((0, 0))), "the order by due moment and the scheduled jobs differ"
        live: dict[int, int] = {}
        for e in self.jobs.values():
            live[e.segment] = live.get(e.segment, 0) + e.size
            assert e.id < self.next_id, f"job {e.id} is not below the next id {self.next_id}"
        for queue in self.queues.values():
            for key in queue.keys.values():
                if key.expires_ms:
                    live[key.segment] = live.get(key.segment, 0) + KEY_BYTES
        live.pop(0, None)
        counted = {s: n for s, n in self.live.items() if n}
        assert {s: n for s, n in live.items() if n} == counted, f"live bytes: counted {counted}, found {live}"
