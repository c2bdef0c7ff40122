"""The seam between the facade and what stands behind it: operations in, answers out.

Batch-native, so that one round trip carries a whole exchange on engines that are far away. Durations cross it, never
moments: a remote engine has its own clock. Differences between engines are told by `Capabilities`, never by isinstance.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, Literal, Protocol

import attrs

from .clock import Clock
from .histogram import Histogram
from .model import Deliveries, Health, Job, JobState, Lease, QueueConfig, QueueStats, RetryPolicy, Settler

FsyncMode = Literal["always", "interval", "never"]


@attrs.frozen
class Capabilities:
    """What an engine can honestly promise."""

    durable: bool
    """A returned change survives the process."""
    shared: bool
    """Several processes may use it at once."""
    strict_order: bool
    """Priority, then id, over all consumers."""


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
    """First of the ids told in advance by one `reserve`, for just as many payloads: the commit gives these or raises.
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
    """Heartbeat. Answer: the deadline now in force, in epoch milliseconds."""

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


class Waiting(Protocol):
    """A lease that is waited for without a thread."""

    def cancel(self) -> bool:
        """Wait no more. True: nothing was taken and nobody will be told; False: it is over already."""
        ...

    def abandon(self, unwanted: Callable[[], None]) -> None:
        """`cancel` for a finalizer, which may run with any lock held: another thread does it, soon.

        Args:
            unwanted: called there if it was over already.
        """
        ...


Done = Callable[[Any, BaseException | None], None]
"""Told once: (answer, None) or (None, error), perhaps before the call returns, perhaps in a thread of the engine's. It
must not raise and must not wait."""


class Engine(Protocol):
    """What `Broker` delegates to. Every method may raise any error of the tree; all are thread-safe.

    An error tells by its `outcome` whether the change may have happened.
    """

    @property
    def capabilities(self) -> Capabilities: ...
    @property
    def clock(self) -> Clock: ...

    def commit(self, operations: Sequence[Operation]) -> list[Any]:
        """All of the operations or none, durably; one answer each."""
        ...

    def commit_soon(self, operations: Sequence[Operation], done: Done) -> None:
        """`commit` without waiting for the disk: `done` gets the answers. What it raises was not done."""
        ...

    def check(self, operation: Operation) -> list[int | None]:
        """The fence or the keys of one operation of an open transaction, as they stand now; changes nothing.

        For an `Enqueue` the answer is, per payload, the id that its key stands for, else None.
        """
        ...

    def reserve(self, count: int) -> int:
        """The first of `count` ids that no other call is ever given: one `Enqueue` may ask for them."""
        ...

    def unreserve(self, first_id: int) -> None:
        """What `reserve` told is not wanted any more; no call is ever given these ids."""
        ...

    def lease(
        self,
        queues: Sequence[str],
        max_jobs: int,
        visibility_ms: int | None,
        wait_s: float | None,
        settler: Settler,
        *,
        begun: bool = True,
        max_bytes: int | None = None,
    ) -> list[Lease]:
        """Up to `max_jobs` leases that call back `settler`; not `begun`: `begin` will tell of each.

        `max_bytes`: of their payloads together, if it is not one job alone.
        """
        ...

    def lease_soon(
        self,
        queues: Sequence[str],
        max_jobs: int,
        visibility_ms: int | None,
        settler: Settler,
        done: Done,
        *,
        begun: bool = True,
        max_bytes: int | None = None,
    ) -> Waiting:
        """`lease` without a limit of time and without blocking: `done` gets the leases."""
        ...

    def begin(self, token: int) -> None:
        """Work on a lease that was taken in advance begins. Cheap; nothing happens for any other token."""
        ...

    # Looking
    def get(self, job_id: int) -> Job | None: ...
    def jobs(
        self, queue: str, state: JobState | None, after: int, limit: int, *, payloads: bool = True
    ) -> list[Job]: ...
    def find(self, queue: str, key: str) -> int | None: ...
    def queues(self) -> list[str]: ...
    def stats(self, queue: str | None) -> QueueStats: ...
    def deliveries(self, queue: str | None) -> Deliveries: ...
    def config(self, queue: str) -> QueueConfig: ...

    def is_paused(self, queue: str) -> bool | None:
        """As of the last change that returned; None: there is no such queue. Takes no lock."""
        ...

    # Changing queues
    def configure(self, queue: str, changes: Mapping[str, Any]) -> QueueConfig: ...
    def purge(self, queue: str, state: JobState | None) -> int: ...
    def cancel(self, job_id: int) -> bool: ...
    def redrive(self, queue: str, job_ids: Sequence[int] | None, limit: int | None) -> int: ...
    def remove_queue(self, queue: str) -> bool: ...

    # Housekeeping
    def maintain(self, verb: str) -> None:
        """ "sync", "checkpoint", "compact" or "rotate"; an engine without files has nothing to do."""
        ...

    def backup(self, out: str, *, link: bool) -> Backup:
        """A copy of all at a new path, as it is at one moment. Raises UsageError if there are no files."""
        ...

    def metrics(self) -> dict[str, int]: ...
    def histograms(self) -> dict[str, Histogram]: ...

    def check_open(self) -> None:
        """Raises what every call would raise now."""
        ...

    def health(self) -> Health:
        """Never raises, whatever state it is in."""
        ...

    def close(self) -> None: ...
