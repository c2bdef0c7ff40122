"""What is saved of the state, and where a record is. Written by apply alone."""

from __future__ import annotations

import attrs

from ..model import QueueConfig
from .run import Run

RECORD_BYTES, JOB_BYTES, COPY_BYTES, KEY_BYTES = 112, 8, 176, 64
"""What a record, a job in it, a copied job and a key weigh in the log besides payloads, about: for the garbage ratio
only, so keys and headers of the caller are not counted."""


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
