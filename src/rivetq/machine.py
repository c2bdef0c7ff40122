"""The queue rules, and nothing else: no clock, no files, no threads.

*Decide* (the `plan_*` methods) looks at the state and `now_ms`, changes nothing, and returns events or raises.
*Apply* is the only writer of state and cannot fail; the live path and recovery share it. *Advance* is the part of the
rules that the clock alone decides (a delay falls due, a key's window ends); it writes no events.

States of a job, and what moves it::

    scheduled --due--> ready --lease--> leased --ack--> gone
        ^                ^                |-- nack, release, expiry --> ready or scheduled
        |                |                `-- max_attempts, reject --> dead --redrive--> ready
        `--- enqueue with a delay         cancel and purge: ready, scheduled, dead --> gone

A caller's mistakes raise from the error tree; assertions are for mistakes of our own.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, assert_never

import attrs

from .backoff import retry_delay_ms
from .engine import Ack, Delivery, Enqueue, Extend, Nack, Operation, Reject, Release
from .errors import DuplicateJobError, JobNotFoundError, LeaseLostError, QueueFullError, RateLimitedError, UsageError
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
from .model import JobState, QueueConfig, QueueStats, RetryPolicy
from .ratelimit import TokenBucket
from .window import Window

READY, SCHEDULED, LEASED, DEAD = range(4)
STATES = (JobState.READY, JobState.SCHEDULED, JobState.LEASED, JobState.DEAD)
PRIORITIES = 10
EXPIRY_BATCH = 1000
"""Leases that end in one record, so that a storm of expiries does not become one giant record."""
RECORD_BYTES, JOB_BYTES, COPY_BYTES, KEY_BYTES = 112, 8, 176, 64
"""What a record, a job in it, a copied job and a key weigh in the log besides payloads, about: for the garbage ratio
only, so keys and headers of the caller are not counted."""
LEASE_EXPIRED = "lease expired"
OWNER_GONE = "owner gone"


class Spec:
    """What all jobs of one enqueue share; never changes."""

    __slots__ = ("headers", "max_attempts", "priority", "retry", "visibility_ms")

    def __init__(
        self,
        priority: int,
        max_attempts: int | None,
        retry: RetryPolicy,
        visibility_ms: int | None,
        headers: Mapping[str, str],
    ) -> None:
        self.priority = priority
        self.max_attempts = max_attempts
        self.retry = retry
        self.visibility_ms = visibility_ms
        self.headers = headers


class Entry:
    """One live job. Written by apply alone."""

    __slots__ = (
        "attempts", "crc", "deadline_ms", "died_at_ms", "due_ms", "enqueued_at_ms", "id", "indexed", "key",
        "last_error", "length", "lsn", "offset", "payload", "queue", "segment", "size", "spec", "state", "token",
    )  # fmt: skip

    def __init__(
        self, job_id: int, queue: Queue, spec: Spec, enqueued_at_ms: int, due_ms: int, key: str | None
    ) -> None:
        self.id = job_id
        self.queue = queue
        self.spec = spec
        self.state = READY
        self.attempts = 0
        self.token = 0
        self.enqueued_at_ms = enqueued_at_ms
        self.due_ms = due_ms
        self.deadline_ms = 0
        self.died_at_ms = 0
        self.last_error: str | None = None
        self.key = key
        # Where the payload is. The machine carries these for the engine and sums `size` per segment.
        self.segment = 0
        self.offset = 0
        self.length = 0
        self.crc = 0
        self.size = 0
        self.lsn = 0
        self.payload: bytes | None = None
        self.indexed = False


class Key:
    """An idempotency key in force: `expires_ms` 0 while its job lives."""

    __slots__ = ("expires_ms", "indexed", "job_id", "segment")

    def __init__(self, job_id: int, segment: int) -> None:
        self.job_id = job_id
        self.segment = segment
        self.expires_ms = 0
        self.indexed = False


class Queue:
    """One queue: its configuration, its jobs by state, its totals."""

    __slots__ = (
        "acked", "bucket", "cancelled", "config", "dead", "enqueued", "keys", "leased", "name", "number", "purged",
        "ready", "ready_count", "scheduled", "ttl_ms", "visibility_ms",
    )  # fmt: skip

    def __init__(self, number: int, name: str) -> None:
        self.number = number
        self.name = name
        self.ready = [Window() for _ in range(PRIORITIES)]  # ids, one window per priority
        self.ready_count = 0
        self.scheduled = Window()  # ids; the order by due moment is the machine's, over all queues
        self.leased: set[int] = set()
        self.dead = Window()  # ids
        self.keys: dict[str, Key] = {}
        self.enqueued = self.acked = self.cancelled = self.purged = 0
        self.bucket: TokenBucket | None = None
        self.configure(QueueConfig(), 0)

    def configure(self, config: QueueConfig, now_ms: int) -> None:
        if config.rate_limit is None:
            self.bucket = None
        elif self.bucket is None or self.bucket.limit != config.rate_limit:
            self.bucket = TokenBucket(config.rate_limit, now_ms)
        self.config = config
        self.visibility_ms = round(config.visibility_timeout * 1000)
        self.ttl_ms = round(config.idempotency_ttl * 1000)

    def occupied(self) -> int:
        """Jobs that count against max_jobs: dead letters do not."""
        return self.ready_count + len(self.scheduled) + len(self.leased)

    def ids(self, state: int) -> list[int]:
        """Ids in one state, ascending."""
        if state == READY:
            return sorted(i for window in self.ready for i in window.after(0))
        if state == LEASED:
            return sorted(self.leased)
        return list((self.scheduled if state == SCHEDULED else self.dead).after(0))

    def ids_after(self, state: int, after: int) -> Iterable[int]:
        """Ids in one state above `after`, ascending, lazily."""
        if state == READY:
            return heapq.merge(*(window.after(after) for window in self.ready if len(window)))
        if state == LEASED:
            return sorted(i for i in self.leased if i > after)
        return (self.scheduled if state == SCHEDULED else self.dead).after(after)

    def oldest_ready_ms(self, jobs: Mapping[int, Entry]) -> int | None:
        firsts = [window.first() for window in self.ready if len(window)]
        return min((jobs[i].enqueued_at_ms for i in firsts), default=None)


@attrs.define
class Place:
    """Where a record landed. Segment 0 is no file: the memory engine."""

    segment: int = 0
    body_offset: int = 0
    lsn: int = 0


@attrs.define
class QueueSnapshot:
    number: int
    name: str
    config: QueueConfig
    enqueued: int
    acked: int
    cancelled: int
    purged: int


@attrs.define
class Snapshot:
    """What must outlive the segments that held it: counters, configurations, the time line."""

    next_id: int
    reserved_id: int
    oldest_segment: int
    now_ms: int
    queues: list[QueueSnapshot]


class Changes:
    """What a checkpoint has to write: filled by apply, swapped out by the engine."""

    __slots__ = ("jobs", "keys")

    def __init__(self) -> None:
        self.jobs: set[int] = set()
        self.keys: set[tuple[int, str]] = set()


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
        self.live: dict[int, int] = {}  # bytes per segment that are still needed
        self.changes: Changes | None = None if keep_payloads else Changes()
        self.woken: set[str] = set()  # queues in which something became ready since the engine last looked
        self._deadlines: list[tuple[int, int]] = []  # heap of (deadline_ms, id); stale pairs are skipped
        self._leased = 0
        self._keep_payloads = keep_payloads
        self.id_block = id_block

    # Decide

    def plan(self, operations: Sequence[Operation], now_ms: int) -> tuple[list[Event], list[Any]]:
        """Events and answers of a commit: all of the operations or an error."""
        plan = _Plan(self, now_ms)
        answers = [plan.decide(operation) for operation in operations]
        plan.check_limits()
        return plan.events, answers

    def check_operation(self, operation: Operation, now_ms: int) -> list[int | None]:
        """The fence or the keys of one operation, as they stand now."""
        if not isinstance(operation, Enqueue):
            self.held(operation.id, operation.token, now_ms)
            return []
        return [(key and self.find(operation.queue, key, now_ms)) or None for key in operation.keys or ()]

    def held(self, job_id: int, token: int, now_ms: int) -> Entry:
        """The job of a lease that is still in force, else `LeaseLostError`."""
        entry = self.jobs.get(job_id)
        if entry is not None and entry.state == LEASED and entry.token == token and entry.deadline_ms > now_ms:
            return entry
        if entry is None:
            why = "the job was settled already, or removed"
        elif entry.token != token:
            why = "the job was delivered again" if entry.token > token else "no such delivery was made"
        elif entry.state == LEASED:
            why = f"it expired {now_ms - entry.deadline_ms} ms ago"
        else:
            why = f"it ended before: {entry.last_error or 'given back'}"
        raise LeaseLostError(
            f"job {job_id}: lease {token} was lost ({why}); the job may run again elsewhere, so discard this result",
            job_id=job_id,
            token=token,
        )

    def plan_lease(
        self, names: Sequence[str], max_jobs: int, visibility_ms: int | None, now_ms: int
    ) -> tuple[Leased | None, int | None]:
        """The most urgent jobs of the queues in the order given, and when a rate limit allows the next one if none."""
        entries: list[Entry] = []
        retry_at_ms: int | None = None
        for name in names:
            queue = self.queues.get(name)
            if queue is None or queue.config.paused or not queue.ready_count:
                continue
            room = max_jobs - len(entries)
            bucket = queue.bucket
            if bucket is not None and bucket.limit.on == "lease":
                allowed = bucket.available(now_ms)
                if not allowed:
                    at_ms = bucket.ready_at_ms(1, now_ms)
                    retry_at_ms = at_ms if retry_at_ms is None else min(retry_at_ms, at_ms)
                room = min(room, allowed)
            for window in reversed(queue.ready):
                if room <= 0:
                    break
                if len(window):
                    picked = window.head(room)
                    room -= len(picked)
                    entries += [self.jobs[i] for i in picked]
            if len(entries) == max_jobs:
                break
        if not entries:
            return None, retry_at_ms
        deadlines = [now_ms + self._visibility(entry, visibility_ms) for entry in entries]
        first = self.next_token
        return (
            Leased(
                [entry.id for entry in entries],
                list(range(first, first + len(entries))),
                [entry.attempts + 1 for entry in entries],
                deadlines,
            ),
            None,
        )

    @staticmethod
    def _visibility(entry: Entry, visibility_ms: int | None) -> int:
        if visibility_ms is not None:
            return visibility_ms
        own = entry.spec.visibility_ms
        return entry.queue.visibility_ms if own is None else own

    def plan_expiry(self, now_ms: int) -> list[Event]:
        """The ends of up to EXPIRY_BATCH leases whose deadline has come, each as a nack at its deadline."""
        due: list[tuple[int, int]] = []
        while len(due) < EXPIRY_BATCH and (first := self._first_deadline()) and first[0] <= now_ms:
            due.append(heapq.heappop(self._deadlines))
        for pair in due:  # nothing has happened yet: apply makes these pairs stale
            heapq.heappush(self._deadlines, pair)
        # An extend to the very same deadline leaves a second pair of it: one end per job.
        return [self.failed(self.jobs[i], LEASE_EXPIRED, at_ms) for at_ms, i in dict.fromkeys(due)]

    def plan_owner_gone(self, now_ms: int) -> list[Event]:
        """The ends of all leases, for an opening: a first attempt is ready at once, later ones wait by policy.

        A poison job that takes its process with it would otherwise be leased again and again beside the same
        neighbours.
        """
        held = sorted(i for queue in self.queues.values() for i in queue.leased)
        return [self.failed(self.jobs[i], OWNER_GONE, now_ms, first_at_once=True) for i in held]

    def failed(
        self,
        entry: Entry,
        error: str | None,
        from_ms: int,
        delay_ms: int | None = None,
        *,
        first_at_once: bool = False,
    ) -> Retried | Buried:
        """The end of a delivery without an ack: a retry counted from `from_ms`, or a dead letter."""
        spec = entry.spec
        if spec.max_attempts is not None and entry.attempts >= spec.max_attempts:
            return Buried(entry.id, from_ms, error)
        if first_at_once and entry.attempts == 1:
            delay_ms = 0
        if delay_ms is None:
            delay_ms = retry_delay_ms(spec.retry, entry.attempts)
        return Retried(entry.id, from_ms + delay_ms, error)

    def plan_purge(self, name: str, state: int | None) -> Purged | None:
        """Removal of the ready, scheduled and dead jobs, or of one of these states."""
        queue = self.queues.get(name)
        if queue is None:
            return None
        wanted = (READY, SCHEDULED, DEAD) if state is None else (state,)
        ids = sorted(i for each in wanted for i in queue.ids(each))
        return Purged(queue.number, ids) if ids else None

    def plan_cancel(self, job_id: int) -> Cancelled | None:
        entry = self.jobs.get(job_id)
        return None if entry is None or entry.state == LEASED else Cancelled(entry.queue.number, job_id)

    def plan_redrive(self, name: str, job_ids: Sequence[int] | None, limit: int | None) -> Redriven | None:
        """Dead letters to bring back, lowest ids first."""
        queue = self.queues.get(name)
        if job_ids is None:
            ids = [] if queue is None else queue.dead.head(len(queue.dead) if limit is None else limit)
        else:
            ids = sorted(set(job_ids))
            for job_id in ids:
                entry = self.jobs.get(job_id)
                if entry is None or entry.queue is not queue or entry.state != DEAD:
                    raise JobNotFoundError(
                        f"redrive: job {job_id} is no dead letter of queue {name!r}; nothing was changed", job_id=job_id
                    )
            ids = ids[:limit]
        return Redriven(ids) if ids else None

    def plan_configure(self, name: str, changes: Mapping[str, Any]) -> list[Event]:
        """The whole new configuration of a queue, which is created if it is unknown."""
        queue = self.queues.get(name)
        events: list[Event] = []
        if queue is None:
            number = len(self.numbers) + 1
            events.append(QueueCreated(number, name))
            config = QueueConfig()
        else:
            number, config = queue.number, queue.config
        changed = attrs.evolve(config, **changes)
        if (changed, changed.paused) != (config, config.paused):
            events.append(QueueConfigured(number, changed))
        return events

    def plan_ids(self, count: int, block: int) -> IdsReserved | None:
        """The reservation to write down before the next `count` ids may be told; None if one covers them."""
        upto = self.next_id + count
        return IdsReserved(upto + block) if upto > self.reserved_id else None

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
        while (first := self.due.first()) is not None and first[0] <= now_ms:
            entry = self.jobs[first[1]]
            self._leave(entry)
            self._enter_ready(entry)
        while (oldest := self.expiring.first()) is not None and oldest[0] <= now_ms:
            _, number, text = oldest
            self._forget_key(self.numbers[number], text)

    def next_wakeup_ms(self) -> int | None:
        """When the clock acts next: a delay falls due or a lease ends."""
        first = self.due.first()
        lease = self._first_deadline()
        if lease is None:
            return None if first is None else int(first[0])
        return lease[0] if first is None else min(int(first[0]), lease[0])

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
            if job_id in jobs:  # a checkpoint took the job while the log went on
                self._drop(jobs[job_id])
            entry = Entry(job_id, queue, spec, now_ms, event.due_ms, keys[i] if keys else None)
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

    def load_entry(self, entry: Entry, state: int) -> None:
        """A job from the index."""
        entry.indexed = True
        self.next_token = max(self.next_token, entry.token + 1)
        self._insert(entry, state, self.now_ms)

    def load_key(self, number: int, text: str, job_id: int, expires_ms: int, segment: int) -> None:
        """A key from the index that outlived its job."""
        queue = self.numbers[number]
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
        queues = sorted((q.name, q.config, q.config.paused, q.enqueued, q.acked, q.cancelled, q.purged) for q in self.queues.values())
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


class _Plan:
    """The decisions of one commit, each seeing those before it; the machine stays as it is."""

    __slots__ = ("_created", "_events", "_keys", "_live", "_machine", "_new", "_next_id", "_now_ms", "_settled")

    def __init__(self, machine: Machine, now_ms: int) -> None:
        self._machine = machine
        self._now_ms = now_ms
        self._events: list[Event] = []
        self._settled: set[int] = set()
        self._keys: dict[tuple[str, str], int] = {}
        self._live: dict[str, int] = {}  # change of the occupied places per queue
        self._new: dict[str, int] = {}  # new jobs per queue
        self._created: dict[str, int] = {}  # numbers of queues that this commit creates
        self._next_id = machine.next_id

    @property
    def events(self) -> list[Event]:
        return self._events

    def decide(self, operation: Operation) -> Any:
        match operation:
            case Enqueue():
                return self._enqueue(operation)
            case Ack():
                entry = self._settle(operation)
                last = self._events[-1] if self._events else None
                if isinstance(last, Acked) and last.queue == entry.queue.number:
                    assert isinstance(last.ids, list)
                    last.ids.append(entry.id)
                else:
                    self._events.append(Acked(entry.queue.number, [entry.id]))
                self._count(self._live, entry.queue.name, -1)
            case Nack():
                entry = self._settle(operation)
                event = self._machine.failed(entry, operation.error, self._now_ms, operation.delay_ms)
                if isinstance(event, Buried):
                    self._count(self._live, entry.queue.name, -1)
                self._events.append(event)
            case Release():
                entry = self._settle(operation)
                self._events.append(Released(entry.id, self._now_ms + operation.delay_ms, entry.attempts - 1))
            case Reject():
                entry = self._settle(operation)
                self._events.append(Buried(entry.id, self._now_ms, operation.error))
                self._count(self._live, entry.queue.name, -1)
            case Extend():
                entry = self._held(operation)
                deadline_ms = max(entry.deadline_ms, self._now_ms + operation.extra_ms)
                if deadline_ms > entry.deadline_ms:
                    self._events.append(Extended(entry.id, deadline_ms))
                return deadline_ms
            case _:
                assert_never(operation)
        return None

    def check_limits(self) -> None:
        """max_jobs and enqueue rates, at the end: an ack in the same commit makes room for a job before it."""
        for name, count in self._new.items():
            queue = self._machine.queues.get(name)
            if queue is None:
                continue
            limit = queue.config.max_jobs
            if limit is not None and queue.occupied() + self._live[name] > limit:
                raise QueueFullError(
                    f"queue {name!r} is full: {queue.occupied()} of max_jobs={limit} places are taken and {count} "
                    f"more asked for; nothing was enqueued, try again after some jobs are done",
                    queue=name,
                    max_jobs=limit,
                )
            bucket = queue.bucket
            if bucket is None or bucket.limit.on != "enqueue":
                continue
            if count > bucket.limit.burst:
                raise UsageError(
                    f"queue {name!r}: {count} jobs at once can never pass its rate limit with "
                    f"burst={bucket.limit.burst}; split the batch"
                )
            if count > bucket.available(self._now_ms):
                retry_after = (bucket.ready_at_ms(count, self._now_ms) - self._now_ms) / 1000
                raise RateLimitedError(
                    f"queue {name!r} is over its rate of {bucket.limit.per_second:g} jobs a second; nothing was "
                    f"enqueued, try again in {retry_after:.3f} s",
                    queue=name,
                    retry_after=retry_after,
                )

    def _enqueue(self, operation: Enqueue) -> list[int]:
        name, payloads, keys = operation.queue, operation.payloads, operation.keys
        answer: list[int | None] = [None] * len(payloads)
        fresh = range(len(payloads)) if keys is None else self._fresh(operation, answer)
        count = len(fresh)
        if not count:
            return [i for i in answer if i is not None]
        machine = self._machine
        if operation.promised is not None:
            first_id = operation.promised
        else:
            first_id = self._next_id
            self._next_id += count
            if machine.id_block and (reserved := machine.plan_ids(self._next_id - machine.next_id, machine.id_block)):
                self._events.append(reserved)
        queue = machine.queues.get(name)
        number = self._number(name) if queue is None else queue.number
        retry = operation.retry or (queue.config.retry if queue is not None else _DEFAULT_RETRY)
        max_attempts = retry.max_attempts if operation.max_attempts is None else operation.max_attempts
        if count != len(payloads):
            payloads = [payloads[i] for i in fresh]
        self._events.append(
            Enqueued(
                number,
                first_id,
                operation.priority,
                self._now_ms + operation.delay_ms if operation.delay_ms else 0,
                max_attempts,
                retry,
                operation.visibility_ms,
                list(map(len, payloads)),
                payloads,
                operation.headers or {},
                [keys[i] for i in fresh] if keys is not None else None,
            )
        )
        self._count(self._live, name, count)
        self._count(self._new, name, count)
        if keys is None:
            return list(range(first_id, first_id + count))
        for job_id, i in enumerate(fresh, first_id):
            answer[i] = job_id
            if (key := keys[i]) is not None:
                self._keys[name, key] = job_id
        return [self._keys[name, keys[i] or ""] if job is None else job for i, job in enumerate(answer)]

    def _fresh(self, operation: Enqueue, answer: list[int | None]) -> list[int]:
        """Positions of the payloads that make new jobs; ids of the duplicates go into `answer`.

        A key that comes twice in one batch makes one job; its later positions stay None until that has its id.
        """
        name, keys = operation.queue, operation.keys
        assert keys is not None
        fresh: list[int] = []
        seen: set[str] = set()
        for i, key in enumerate(keys):
            known = None
            if key is not None:
                known = self._keys.get((name, key)) or self._machine.find(name, key, self._now_ms)
                if known is not None and (operation.raise_on_duplicate or operation.promised is not None):
                    raise DuplicateJobError(
                        f"queue {name!r}: idempotency key {key!r} stands for job {known}; nothing was enqueued",
                        job_id=known,
                        queue=name,
                        key=key,
                    )
            if known is not None:
                answer[i] = known
            elif key is None or key not in seen:
                fresh.append(i)
                if key is not None:
                    seen.add(key)
            elif operation.raise_on_duplicate:
                raise DuplicateJobError(
                    f"queue {name!r}: idempotency key {key!r} comes twice in one batch; nothing was enqueued",
                    job_id=self._next_id + fresh.index(keys.index(key)),
                    queue=name,
                    key=key,
                )
        return fresh

    def _number(self, name: str) -> int:
        """The number of a queue that does not exist yet."""
        if name not in self._created:
            self._created[name] = len(self._machine.numbers) + len(self._created) + 1
            self._events.append(QueueCreated(self._created[name], name))
        return self._created[name]

    def _held(self, operation: Ack | Nack | Release | Reject | Extend) -> Entry:
        if operation.id in self._settled:
            raise LeaseLostError(
                f"job {operation.id}: lease {operation.token} is settled twice in one call; nothing was changed",
                job_id=operation.id,
                token=operation.token,
            )
        return self._machine.held(operation.id, operation.token, self._now_ms)

    def _settle(self, operation: Ack | Nack | Release | Reject) -> Entry:
        entry = self._held(operation)
        self._settled.add(operation.id)
        return entry

    @staticmethod
    def _count(counter: dict[str, int], name: str, change: int) -> None:
        counter[name] = counter.get(name, 0) + change


_DEFAULT_RETRY = RetryPolicy()
