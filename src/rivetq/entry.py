"""One live job as an object: what is leased, came back or was just looked at. Written by apply alone.

Jobs that only wait have no object: see `run`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from .model import JobState, RetryPolicy

if TYPE_CHECKING:
    from .state import Queue

READY, SCHEDULED, LEASED, DEAD = range(4)
STATES = (JobState.READY, JobState.SCHEDULED, JobState.LEASED, JobState.DEAD)


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

    def lies(self, segment: int, offset: int, length: int, crc: int, size: int, lsn: int) -> None:
        """Where its payload is in the log; `size` is what the job weighs there."""
        self.segment, self.offset, self.length, self.crc, self.size, self.lsn = segment, offset, length, crc, size, lsn
