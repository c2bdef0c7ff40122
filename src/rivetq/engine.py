"""The seam between the facade and what stands behind it: requests in, answers out.

A request is a value, so it can be sent, recorded and repeated; its class says what the answer is. It is batch-native:
one round trip carries a whole exchange on engines that are far away. What is still to come crosses the seam as a
duration, never as a moment, since an engine elsewhere has its own clock; past moments are told by the engine's clock.
Differences between engines are told by `Capabilities`, never by isinstance.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from enum import Enum
from typing import Any, Final, Generic, Literal, NamedTuple, Protocol, TypeVar

import attrs

from .clock import Clock
from .histogram import Histogram
from .model import Deliveries, Health, Job, JobState, QueueConfig, QueueStats, RateLimit, RetryPolicy
from .units import checked_int

FsyncMode = Literal["always", "interval", "never"]
A = TypeVar("A")


@attrs.frozen
class Capabilities:
    """What an engine can honestly promise."""

    durable: bool
    """A returned change survives the process."""
    shared: bool
    """Several processes may use it at once."""
    strict_order: bool
    """Priority, then id, over all consumers."""
    atomic: Literal["all", "shard"] = "all"
    """A commit may span all queues, or those of one shard."""
    promised_ids: bool = True
    """`Reserve` tells ids in advance."""
    keeping: bool = True
    """There are files to keep: `Engine.keeping` is not None."""
    clock: Literal["here", "elsewhere"] = "here"
    """Whose time counts: this process's or the engine's own."""
    wakes: Literal["push"] | int = "push"
    """A waiting lease is woken, or looks every so many milliseconds."""
    exact_limits: bool = True
    """`max_jobs` and rate limits hold exactly, not about."""
    exact_stats: bool = True
    max_payload_bytes: int = 2**29
    max_record_bytes: int = 2**30
    """Of what one commit holds."""


# Operations: what a commit does


@attrs.define
class Enqueue:
    """Create jobs. Answer: the list of ids, for a duplicate key the first id."""

    queue: str
    payloads: Sequence[bytes]
    priority: int = 5
    delay_ms: int = 0
    eta_ms: int | None = None
    """In place of a delay: a moment of the engine's wall clock, in epoch milliseconds."""
    headers: Mapping[str, str] | None = None
    retry: RetryPolicy | None = None
    """None: the queue's policy."""
    max_attempts: int | None = None
    """None: the policy's."""
    visibility_ms: int | None = None
    keys: Sequence[str | None] | None = None
    raise_on_duplicate: bool = False
    promised: int | None = None
    """First of the ids told in advance by one `Reserve`, for just as many payloads: the commit gives these or raises.
    Made once more while the jobs are there it changes nothing."""


@attrs.define
class Ack:
    """Done. Answer: None."""

    id: int
    token: int


@attrs.define
class Nack:
    """Failed. Answer: None."""

    id: int
    token: int
    error: str | None = None
    delay_ms: int | None = None
    """None: by the job's policy."""


@attrs.define
class Release:
    """Given back, attempt refunded. Answer: None."""

    id: int
    token: int
    delay_ms: int = 0


@attrs.define
class Reject:
    """A dead letter now. Answer: None."""

    id: int
    token: int
    error: str | None = None


@attrs.define
class Extend:
    """Heartbeat. Answer: the `Deadline`."""

    id: int
    token: int
    extra_ms: int


@attrs.define
class KeyStands:
    """A transaction told a caller that this key stands for this job: so it must at the end, too. Answer: None."""

    queue: str
    key: str
    id: int


Operation = Enqueue | Ack | Nack | Release | Reject | Extend | KeyStands


class Deadline(NamedTuple):
    """Of a lease, as it is in force now."""

    at_ms: int
    """As a moment of the engine's clock."""
    remaining_ms: int
    """As of the decision."""


class Lost(NamedTuple):
    """An answer that found no lease, in a commit whose answers stand alone."""

    token: int
    why: str


Answer = list[int] | Deadline | Lost | None
"""Of one operation: the ids of an `Enqueue`, the deadline of an `Extend`, None for the others."""


# Requests


class Request(Generic[A]):
    """What is asked of an engine; `A` is the type of the answer."""

    __slots__ = ()


@attrs.frozen
class Once:
    """The number of a request in a session. Made again with it, a request that was done gets its first answer.

    The answer is in the record of what was done, so it is remembered across the end of the process. What changed
    nothing, an error included, is not: it is decided anew.
    """

    session: int
    """A random number of 64 bits."""
    number: int
    """From 1; each request of a session has its own."""
    done_below: int = 0
    """The session has the answers of all its requests with lower numbers: they are forgotten. At most `number`."""

    def __attrs_post_init__(self) -> None:
        checked_int(self.session, "session", 0, 2**64 - 1)
        checked_int(self.number, "number", 1, 2**64 - 1)
        checked_int(self.done_below, "done_below", 0, self.number)


@attrs.define
class Commit(Request[list[Answer]]):
    """All of the operations or none, durably; one answer each."""

    operations: Sequence[Operation]
    partial: bool = False
    """Each operation stands alone, in one record: the answer of one whose lease was lost is `Lost`. For answers to
    leases only."""
    once: Once | None = None


@attrs.define
class Reserve(Request[int]):
    """The first of `count` ids for a queue, which no other call is ever given: one `Enqueue` may ask for them."""

    queue: str
    count: int


@attrs.define
class Unreserve(Request[None]):
    """What `Reserve` told is not wanted any more; no call is ever given these ids."""

    first_id: int


@attrs.define
class Check(Request[list[list[int | None]]]):
    """The fences and keys of some operations of an open transaction, as they stand now; changes nothing.

    Answer: for an `Enqueue`, per key the id that it stands for, else None; an empty list for the others. Advisory: all
    of it is looked at again by the commit.
    """

    operations: Sequence[Operation]


class Grant(NamedTuple):
    """A job that was leased."""

    id: int
    queue: str
    payload: bytes
    headers: Mapping[str, str]
    priority: int
    attempt: int
    token: int
    deadline_ms: int
    """As a moment of the engine's clock: for a facade that lives by the same one."""
    remaining_ms: int
    """Until the deadline, as of the answer: for any other."""
    granted_ms: int
    """From the lease to the deadline."""
    enqueued_at_ms: int
    max_attempts: int | None
    last_error: str | None


@attrs.define
class Take(Request[list[Grant]]):
    """Lease up to `max_jobs` jobs of the first of these queues that have any, most urgent first."""

    queues: Sequence[str]
    max_jobs: int
    """A large lease may be taken in parts, in the order of the queue as it is by then; with `once` it is one part."""
    visibility_ms: int | None = None
    """None: the job's own, else the queue's."""
    wait_ms: int | None = 0
    """For a first job; None: until there is one, or the call is cancelled."""
    begun: bool = True
    """False: `Engine.begin` will tell of each."""
    max_bytes: int | None = None
    """Of their payloads together, if it is not one job alone."""
    once: Once | None = None
    """Made again, it gets the same leases: those that are still in force."""


class Exchanged(NamedTuple):
    answers: list[Answer]
    grants: list[Grant]


@attrs.define
class Exchange(Request[Exchanged]):
    """A commit, then a lease, in one trip. An error of the lease alone loses no answer: then there are no grants."""

    commit: Commit
    take: Take


@attrs.define
class Get(Request[Job | None]):
    job_id: int


@attrs.define
class QueueOf(Request[str | None]):
    """The name of the queue of a job; None: the job is gone."""

    job_id: int


@attrs.define
class Jobs(Request[list[Job]]):
    """Jobs of a queue by id."""

    queue: str
    state: JobState | None = None
    after: int = 0
    """Ids above this one; with `newest` below it, 0: from the newest."""
    limit: int = 100
    payloads: bool = True
    """False: none is read, and b"" stands in place of each."""
    newest: bool = False
    """Descending, from the newest."""
    max_bytes: int | None = None
    """Of their payloads together: the answer is shorter then, but has one job at least."""


@attrs.define
class Find(Request[int | None]):
    """The id that a key stands for."""

    queue: str
    key: str


@attrs.define
class Queues(Request[list[str]]):
    """All names, sorted."""


@attrs.define
class Stats(Request[QueueStats]):
    queue: str | None = None
    """None: of all together."""


@attrs.define
class Outcomes(Request[Deliveries]):
    """What became of deliveries since the engine was opened."""

    queue: str | None = None


class Unset(Enum):
    """In place of what is not changed."""

    UNSET = "unset"


UNSET: Final = Unset.UNSET


@attrs.define(kw_only=True)
class QueueChanges:
    """What of a queue's configuration is to change."""

    retry: RetryPolicy | Unset = UNSET
    rate_limit: RateLimit | Unset | None = UNSET
    visibility_timeout: float | Unset = UNSET
    max_jobs: int | Unset | None = UNSET
    idempotency_ttl: float | Unset = UNSET
    paused: bool | Unset = UNSET


@attrs.define
class Configure(Request[QueueConfig]):
    """Change a queue's configuration, and answer the one in force. Without changes it only answers."""

    queue: str
    changes: QueueChanges = attrs.Factory(QueueChanges)
    once: Once | None = None


@attrs.define
class Purge(Request[int]):
    """Remove jobs that wait; how many. Of over a thousand, made again after a crash, it counts those that were left."""

    queue: str
    state: JobState | None = None
    once: Once | None = None


@attrs.define
class Cancel(Request[bool]):
    """Remove a job that waits; False: there is none of this id."""

    job_id: int
    once: Once | None = None


@attrs.define
class Redrive(Request[int]):
    """Bring dead letters back; how many. Of over a thousand, made again after a crash, it counts those that were
    left."""

    queue: str
    job_ids: Sequence[int] | None = None
    limit: int | None = None
    once: Once | None = None


@attrs.define
class RemoveQueue(Request[bool]):
    queue: str
    once: Once | None = None


@attrs.define
class EndSession(Request[None]):
    """No request of this session comes any more: its answers are forgotten."""

    session: int


@attrs.frozen(kw_only=True)
class Backup:
    """A copy that was taken and read back."""

    path: str
    records: int
    """The number of the last record: the copy is the state after that one."""
    as_of: datetime
    """The moment of that record."""
    jobs: int
    """Waiting, leased and dead ones."""
    segments: int
    linked: int
    """How many of the segments share their bytes with the original; the others were copied."""
    bytes: int


class Call(Protocol):
    """A request that was left with an engine."""

    def cancel(self, done: Callable[[bool], None]) -> None:
        """Want no answer any more. `done` gets True: nothing was done, and none comes; False: one came, or will."""
        ...

    def abandon(self, unwanted: Callable[[], None]) -> None:
        """`cancel` for a finalizer, which may run with any lock held: another thread does it, soon.

        Args:
            unwanted: called there if it was over already.
        """
        ...


Done = Callable[[Any, BaseException | None], None]
"""Told once: (answer, None) or (None, error), perhaps before the call returns, perhaps in a thread of the engine's. It
must not raise and must not wait. If memory runs out meanwhile, it is told once more; the first telling counts."""


class Keeping(Protocol):
    """The files of an engine, which it keeps in order by itself; here that is asked for."""

    def sync(self) -> None:
        """Return once everything so far is on disk."""
        ...

    def checkpoint(self) -> None: ...
    def compact(self) -> None: ...
    def rotate(self) -> None: ...

    def backup(self, out: str, *, link: bool) -> Backup:
        """A copy of all at a new path, as it is at one moment."""
        ...

    def metrics(self) -> dict[str, int]: ...
    def histograms(self) -> dict[str, Histogram]: ...


class Engine(Protocol):
    """What `Broker` delegates to. Every method may raise any error of the tree; all are thread-safe.

    An error tells by its `outcome` whether the change may have happened.
    """

    @property
    def capabilities(self) -> Capabilities: ...
    @property
    def clock(self) -> Clock: ...
    @property
    def keeping(self) -> Keeping | None: ...

    def call(self, request: Request[A]) -> A:
        """Do it, and return the answer when it is as durable as promised."""
        ...

    def call_soon(self, request: Request[A], done: Done) -> Call:
        """`call` without blocking: `done` gets the answer. What this raises was not done."""
        ...

    def begin(self, token: int) -> None:
        """Work on a lease that was taken in advance begins. Cheap; nothing happens for any other token."""
        ...

    def is_paused(self, queue: str) -> bool | None:
        """As of the last change that returned; None: there is no such queue. Cheap: takes no lock."""
        ...

    def check_open(self) -> None:
        """Raises what every call would raise now."""
        ...

    def health(self) -> Health:
        """Never raises, in any state."""
        ...

    def close(self) -> None: ...
