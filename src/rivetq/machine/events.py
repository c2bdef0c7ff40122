"""What happened, in absolute values: the vocabulary of the log and the only way to change the machine.

The log holds outcomes, not commands. Replay is ``for event in log: apply(machine, event)``, the same function as on the
live path, so a later change to a rule cannot reinterpret an old log. Changes that the clock makes again (a delay falls
due, a key's window ends) are not events.

Every event can be applied to a state that already includes it or its successors. A checkpoint captures single jobs and
keys in slices while the log goes on; replay from its start overwrites them with the same absolute values. (It captures
jobs in runs as they were at its start, without later changes.) Events about an unknown job are skipped, but the totals
they carry are counted (docs/design.md, "Replay").

The classes are plain slotted ones, not frozen: a frozen constructor costs four times as much in the per-call path.
Treat them as values all the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import attrs

from ..model import NO_HEADERS, QueueConfig, RetryPolicy


@attrs.define
class QueueCreated:
    """A queue got its number; all other events name queues by it."""

    number: int
    name: str


@attrs.define
class QueueConfigured:
    """The whole configuration in force from here on, pause included."""

    queue: int
    config: QueueConfig


@attrs.define
class Enqueued:
    """One or more jobs with the same options, in columns. Their ids count up from `first_id`."""

    queue: int
    first_id: int
    priority: int
    due_ms: int
    """0: ready at once; otherwise the moment before which it is not leased."""
    max_attempts: int | None
    retry: RetryPolicy
    visibility_ms: int | None
    lengths: Sequence[int]
    """Bytes per payload."""
    payloads: Sequence[bytes] = ()
    """Empty when read back for a replay: the machine needs the lengths alone."""
    headers: Mapping[str, str] = NO_HEADERS
    keys: Sequence[str | None] | None = None
    """Idempotency key per job; None when there is none at all."""
    crcs: Sequence[int] = ()
    """CRC32C per payload, filled in by the codec."""
    payload_at: int = 0
    """Offset of the first payload from the start of the record's body, filled in by the codec."""


@attrs.define
class Leased:
    """Deliveries, in columns, over any number of queues."""

    ids: Sequence[int]
    tokens: Sequence[int]
    attempts: Sequence[int]
    deadlines_ms: Sequence[int]
    places: Sequence[tuple[int, int, int]] = ()
    """Where the jobs waited: (queue, priority, how many), in order of `ids`. Jobs beyond these are searched for."""


@attrs.define
class Acked:
    queue: int
    ids: Sequence[int]
    keys_until_ms: int = 0
    """Until when the keys of these jobs stand for them; 0: they are free."""


@attrs.define
class Retried:
    """A delivery ended un-acked and there is another attempt; ready at `due_ms`."""

    id: int
    due_ms: int
    error: str | None


@attrs.define
class Released:
    """A delivery was given back and its attempt refunded."""

    id: int
    due_ms: int
    attempts: int


@attrs.define
class Buried:
    """The job became a dead letter."""

    id: int
    died_at_ms: int
    error: str | None


@attrs.define
class Extended:
    id: int
    deadline_ms: int


@attrs.define
class Cancelled:
    queue: int
    id: int
    found: Any = attrs.field(default=None, eq=False, repr=False)
    """Where the decision found it, so that it is not searched for once more; not in the log."""


@attrs.define
class Purged:
    queue: int
    ids: Sequence[int]


@attrs.define
class Redriven:
    queue: int
    ids: Sequence[int]
    found: Any = attrs.field(default=None, eq=False, repr=False)
    """For a single job: as `Cancelled.found`."""


@attrs.define
class IdsReserved:
    """Callers may have been told ids below this one. After a crash none of them is given again."""

    next_id: int


@attrs.define
class Copied:
    """A whole live job, payload included, rewritten so that its old segment can go."""

    id: int
    queue: int
    state: int
    priority: int
    attempts: int
    token: int
    max_attempts: int | None
    retry: RetryPolicy
    visibility_ms: int | None
    enqueued_at_ms: int
    due_ms: int
    deadline_ms: int
    died_at_ms: int
    last_error: str | None
    headers: Mapping[str, str]
    key: str | None
    length: int
    crc: int
    payload: bytes = b""
    payload_at: int = 0


@attrs.define
class KeyCopied:
    """An idempotency key that outlives its job, rewritten so that its old segment can go."""

    queue: int
    key: str
    job_id: int
    expires_ms: int


@attrs.define
class QueueCopied:
    """All facts of a queue except its jobs and keys, rewritten so that its old segment can go."""

    number: int
    name: str
    config: QueueConfig
    enqueued: int
    acked: int
    cancelled: int
    purged: int


class Took(NamedTuple):
    """The answer of a `Take` as it is kept: which jobs, by which leases."""

    ids: Sequence[int]
    tokens: Sequence[int]


@attrs.define
class Called:
    """Says that a numbered request of a session made this record, and holds the answer."""

    session: int
    number: int
    done_below: int
    """The session has the answers of all its requests with lower numbers."""
    answer: Any
    """What the caller gets (see `rivetq.engine`); `Took` for a `Take`."""


@attrs.define
class SessionEnded:
    """No request of this session comes any more."""

    session: int


@attrs.define
class QueueRemoved:
    """A queue without jobs, configuration and keys is unknown from here on, its totals included."""

    number: int


@attrs.define
class SegmentsDropped:
    """Segments up to this id hold nothing live and may be missing from here on."""

    upto: int


Event = (
    QueueCreated
    | QueueConfigured
    | Enqueued
    | Leased
    | Acked
    | Retried
    | Released
    | Buried
    | Extended
    | Cancelled
    | Purged
    | Redriven
    | IdsReserved
    | Copied
    | KeyCopied
    | SegmentsDropped
    | QueueRemoved
    | QueueCopied
    | Called
    | SessionEnded
)
