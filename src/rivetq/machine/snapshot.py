"""What the machine's state is made of: a key, a queue, and what is saved of them. Written by apply alone."""

from __future__ import annotations

from collections.abc import Iterator

import attrs

from ..model import Deliveries, QueueConfig
from .entry import DEAD, LEASED, READY, SCHEDULED
from .ratelimit import TokenBucket
from .run import Run
from .window import Window

PRIORITIES = 10
NEVER_MS = 2**62
RECORD_BYTES, JOB_BYTES, COPY_BYTES, KEY_BYTES = 112, 8, 176, 64
"""What a record, a job in it, a copied job and a key weigh in the log besides payloads, about: for the garbage ratio
only, so keys and headers of the caller are not counted."""


class Queue:
    """One queue: its configuration, its jobs by state, its totals."""

    __slots__ = (
        "acked", "bucket", "buried", "cancelled", "config", "counts", "dead", "enqueued", "expired", "keyed", "leased",
        "limited", "name", "number", "purged", "ready", "released", "retried", "scheduled", "started",
        "token_at_ms", "ttl_ms", "visibility_ms",
    )  # fmt: skip

    def __init__(self, number: int, name: str) -> None:
        self.number = number
        self.name = name
        # One window per priority, made when it is first needed.
        self.ready: list[Window | None] = [None] * PRIORITIES
        self.scheduled: list[Window | None] = [None] * PRIORITIES
        self.dead: list[Window | None] = [None] * PRIORITIES
        self.leased: set[int] = set()
        self.counts = [0, 0, 0, 0]  # jobs by state
        self.enqueued = self.acked = self.cancelled = self.purged = 0
        # Tallies since the opening, no part of the state: ended deliveries by kind, refusals of the rate limit, and
        # (leased, acked) at the start.
        self.retried = self.released = self.buried = self.expired = self.limited = 0
        self.started = (0, 0)
        self.bucket: TokenBucket | None = None
        self.keyed = True  # False: it never had a key, which is known of queues that were made since the opening
        self.token_at_ms = NEVER_MS  # when those who wait for a token are woken
        self.configure(QueueConfig(), 0)

    def configure(self, config: QueueConfig, now_ms: int) -> None:
        if config.rate_limit is None:
            self.bucket = None
        elif self.bucket is None or self.bucket.limit != config.rate_limit:
            self.bucket = TokenBucket(config.rate_limit, now_ms)
            self.token_at_ms = NEVER_MS  # that of the former bucket says nothing of this one
        self.config = config
        self.visibility_ms = round(config.visibility_timeout * 1000)
        self.ttl_ms = round(config.idempotency_ttl * 1000)

    def start_tallies(self) -> None:
        """What was replayed does not count."""
        self.retried = self.released = self.buried = self.expired = self.limited = 0
        self.started = (self.counts[LEASED], self.acked)

    def deliveries(self) -> Deliveries:
        """Every delivery ended in one of these ways or is held."""
        held, acked = self.counts[LEASED] - self.started[0], self.acked - self.started[1]
        failed = self.retried + self.buried
        return Deliveries(
            leased=held + acked + failed + self.released,
            nacked=failed - self.expired,
            released=self.released,
            expired=self.expired,
            dead=self.buried,
            rate_limited=self.limited,
        )

    def occupied(self) -> int:
        """Jobs that count against max_jobs: dead letters do not."""
        counts = self.counts
        return counts[READY] + counts[SCHEDULED] + counts[LEASED]

    def window(self, state: int, priority: int) -> Window:
        """The window of a waiting state and a priority."""
        windows = self.ready if state == READY else self.scheduled if state == SCHEDULED else self.dead
        found = windows[priority]
        if found is None:
            found = windows[priority] = Window(by_due=state == SCHEDULED)
        return found

    def windows(self, state: int) -> list[Window]:
        """The windows of a waiting state that hold something."""
        windows = self.ready if state == READY else self.scheduled if state == SCHEDULED else self.dead
        return [window for window in windows if window is not None and window.count]

    def waiting(self, priority: int | None = None) -> Iterator[tuple[int, Window]]:
        """The windows that hold something, all or those of one priority, each with its state."""
        for state, windows in ((READY, self.ready), (SCHEDULED, self.scheduled), (DEAD, self.dead)):
            for window in windows if priority is None else windows[priority : priority + 1]:
                if window is not None and window.count:
                    yield state, window

    def ids(self, state: int) -> list[int]:
        """Ids in one state, ascending."""
        if state == LEASED:
            return sorted(self.leased)
        found: list[int] = []
        for window in self.windows(state):
            found += [key[1] for key in window.loose] if window.by_due else window.loose
            for run in window.runs:
                columns, at = run.peek()
                found += columns.ids[at:]
        return sorted(found)


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

    __slots__ = ("cells", "gone", "jobs", "packed", "runs")

    def __init__(self) -> None:
        self.jobs: set[int] = set()  # loose jobs
        self.runs: set[Run] = set()
        self.cells = 0  # jobs that were put into runs: what these weigh in memory
        self.packed: set[int] = set()  # loose jobs that the index knows and that were put into a run since
        self.gone: set[int] = set()  # numbers of saved runs that are used up
