"""A queue without its jobs, and the states of jobs. Written by apply alone."""

from __future__ import annotations

from ..model import Deliveries, JobState, QueueConfig
from .ratelimit import TokenBucket

READY, SCHEDULED, LEASED, DEAD = range(4)
STATES = (JobState.READY, JobState.SCHEDULED, JobState.LEASED, JobState.DEAD)
PRIORITIES = 10
NEVER_MS = 2**62


class Queue:
    """One queue: its configuration, how many jobs are in each state, its totals. Which wait where: see `waiting`."""

    __slots__ = (
        "acked", "bucket", "buried", "cancelled", "config", "counts", "delivered", "enqueued", "expired", "keyed",
        "leased", "limited", "name", "number", "purged", "released", "retried", "segment", "token_at_ms", "ttl_ms",
        "visibility_ms",
    )  # fmt: skip

    def __init__(self, number: int, name: str) -> None:
        self.number = number
        self.name = name  # "": not known yet, in a replay that has not come to it
        self.segment = 0  # where all of it was written last
        self.leased: set[int] = set()
        self.counts = [0, 0, 0, 0]  # jobs by state
        self.enqueued = self.acked = self.cancelled = self.purged = 0
        # Tallies since the opening, no part of the state: deliveries, their ends by kind, refusals of the rate limit.
        self.delivered = self.retried = self.released = self.buried = self.expired = self.limited = 0
        self.bucket: TokenBucket | None = None
        self.keyed = True  # False: it never had a key, which is only known if it was made since the opening
        self.token_at_ms = NEVER_MS  # when lessees that wait for a token are woken
        self.configure(QueueConfig(), 0)

    def configure(self, config: QueueConfig, now_ms: int) -> None:
        if config.rate_limit is None:
            self.bucket = None
        elif self.bucket is None or self.bucket.limit != config.rate_limit:
            self.bucket = TokenBucket(config.rate_limit, now_ms)
            self.token_at_ms = NEVER_MS  # the old bucket's moment does not apply to the new bucket
        self.config = config
        self.visibility_ms = round(config.visibility_timeout * 1000)
        self.ttl_ms = round(config.idempotency_ttl * 1000)

    def start_tallies(self) -> None:
        """What was replayed does not count."""
        self.delivered = self.retried = self.released = self.buried = self.expired = self.limited = 0

    def deliveries(self) -> Deliveries:
        """What became of the deliveries since the opening."""
        failed = self.retried + self.buried
        return Deliveries(
            leased=self.delivered,
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
