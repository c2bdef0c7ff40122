"""The saved part of the state, and the place of a record. Written by apply alone."""

from __future__ import annotations

from typing import Any

import attrs

from .run import Run

RECORD_BYTES, JOB_BYTES, COPY_BYTES, KEY_BYTES, QUEUE_BYTES = 112, 8, 176, 64, 400
"""About how many bytes a record, a job in it, a copied job, a key and a queue take in the log, without payloads. Only
for the garbage ratio, so the caller's keys and headers are not counted."""


@attrs.define
class Place:
    """Where a record landed. Segment 0 is no file: the memory engine."""

    segment: int = 0
    body_offset: int = 0
    lsn: int = 0


@attrs.define
class Session:
    """A caller who numbers its requests, so that a repeated one is not done twice."""

    id: int
    done_below: int = 0
    answers: dict[int, Any] = attrs.Factory(dict)
    """The answers to its requests from `done_below` on, by number."""


@attrs.define
class Snapshot:
    """State that must outlive the segments that held it. (Jobs, keys and queues are copied instead.)"""

    next_id: int
    reserved_id: int
    oldest_segment: int
    now_ms: int
    sessions: list[Session]
    """Sessions that called last are at the end."""


class Changes:
    """The changes that a checkpoint has to write. Apply fills it, the engine swaps it out."""

    __slots__ = ("cells", "gone", "jobs", "packed", "queues", "runs")

    def __init__(self) -> None:
        self.jobs: set[int] = set()  # loose jobs
        self.runs: set[Run] = set()
        self.cells = 0  # jobs that were put into runs: what these weigh in memory
        self.packed: set[int] = set()  # loose jobs that the index knows and that are in a run, or gone, since
        self.gone: set[int] = set()  # numbers of saved runs that are used up
        self.queues: set[int] = set()  # numbers of queues; those that are not there any more were removed
