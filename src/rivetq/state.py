"""What the machine's state is made of: a job, a key, a queue, and what is saved of them. Written by apply alone."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping

import attrs

from .model import JobState, QueueConfig, RetryPolicy
from .ratelimit import TokenBucket
from .window import Window

READY, SCHEDULED, LEASED, DEAD = range(4)
STATES = (JobState.READY, JobState.SCHEDULED, JobState.LEASED, JobState.DEAD)
PRIORITIES = 10
RECORD_BYTES, JOB_BYTES, COPY_BYTES, KEY_BYTES = 112, 8, 176, 64
"""What a record, a job in it, a copied job and a key weigh in the log besides payloads, about: for the garbage ratio
only, so keys and headers of the caller are not counted."""


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
