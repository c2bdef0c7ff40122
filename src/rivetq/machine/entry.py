"""One live job as an object: it is leased, came back, or was just looked at. Written by apply alone.

Jobs that only wait have no object: see `run`.
"""

from __future__ import annotations

from collections.abc import Mapping

from ..model import RetryPolicy
from .queue import READY, Queue


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
        self,
        job_id: int,
        queue: Queue,
        spec: Spec,
        enqueued_at_ms: int,
        due_ms: int,
        key: str | None,
        segment: int = 0,
        offset: int = 0,
        length: int = 0,
        crc: int = 0,
        size: int = 0,
        lsn: int = 0,
        payload: bytes | None = None,
        state: int = READY,
    ) -> None:
        self.id = job_id
        self.queue = queue
        self.spec = spec
        self.state = state
        self.attempts = 0
        self.token = 0
        self.enqueued_at_ms = enqueued_at_ms
        self.due_ms = due_ms
        self.deadline_ms = 0
        self.died_at_ms = 0
        self.last_error: str | None = None
        self.key = key
        # Where the payload is. The machine carries these for the engine. It sums `size`, the job's bytes in the log,
        # per segment.
        self.segment = segment
        self.offset = offset
        self.length = length
        self.crc = crc
        self.size = size
        self.lsn = lsn
        self.payload = payload
        self.indexed = False
