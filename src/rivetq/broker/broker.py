"""The facade: checks arguments, fills defaults, delegates to an engine. All that users call is here."""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from types import EllipsisType, TracebackType
from typing import Any, Literal, Self

import attrs

from ..clock import Clock, SystemClock
from ..engine import (
    Ack,
    Backup,
    Capabilities,
    Engine,
    Enqueue,
    Extend,
    FsyncMode,
    KeyStands,
    Nack,
    Operation,
    Reject,
    Release,
    Waiting,
)
from ..errors import DuplicateJobError, LeaseLostError, UsageError
from ..histogram import Histogram
from ..model import (
    Deliveries,
    Health,
    Job,
    JobId,
    JobState,
    Lease,
    LeaseLike,
    QueueConfig,
    QueueStats,
    RateLimit,
    RetryPolicy,
)
from ..units import Duration, checked_int, duration_ms, moment, moment_ms, quoted
from .arguments import (
    MAX_KEY_BYTES,
    MAX_QUEUE_BYTES,
    checked_bool,
    checked_error,
    checked_headers,
    checked_lease,
    checked_leases,
    checked_path,
    checked_payloads,
    checked_queues,
    checked_state,
    checked_text,
    checked_visibility,
    encoded,
)

MEMORY = ":memory:"
MIN_SEGMENT_BYTES = 64 * 1024
MAX_PAYLOAD_BYTES = 2**29
"""The largest `max_payload_bytes`: half of what one record can hold."""

Payload = (
    bytes | bytearray | memoryview | str | int | float | bool | None | list[Any] | tuple[Any, ...] | dict[str, Any]
)
OnDuplicate = Literal["return", "raise"]
Moment = datetime | int | float


class _Enqueues:
    """The enqueue verbs, shared by the broker and its transactions."""

    _max_payload_bytes: int
    _clock: Clock

    def enqueue(
        self,
        queue: str,
        payload: object,
        *,
        priority: int = 5,
        delay: Duration = 0,
        eta: Moment | None = None,
        headers: Mapping[str, str] | None = None,
        max_attempts: int | None = None,
        retry: RetryPolicy | None = None,
        visibility_timeout: Duration | None = None,
        idempotency_key: str | None = None,
        on_duplicate: OnDuplicate = "return",
    ) -> int:
        """Put a job into a queue; returns its id when it is durable. With an `idempotency_key` that is a `JobId`.

        Args:
            queue: 1 to 255 bytes of UTF-8; the queue is created if it is unknown.
            payload: bytes, bytearray and memoryview go in as they are; anything else is encoded as JSON.
            priority: 0 to 9, 9 is the most urgent.
            delay: seconds (or a timedelta) before which it is not leased.
            eta: the moment before which it is not leased: an aware datetime or epoch seconds. Not with `delay`.
            headers: str to str, handed out with the lease; 64 KiB in all at most.
            max_attempts: deliveries before it is a dead letter; None: the retry policy's.
            retry: the job's own policy; None: the queue's, as it is now.
            visibility_timeout: seconds that a lease lasts; None: the queue's, as it is at the lease.
            idempotency_key: 1 to 256 bytes of UTF-8. While it is in force a second enqueue creates nothing.
            on_duplicate: "return" the first job's id, or "raise" DuplicateJobError.

        Raises:
            UsageError: an argument is wrong.
            DuplicateJobError, QueueFullError, RateLimitedError, DiskFullError: nothing was enqueued.
        """
        keys = None if idempotency_key is None else [idempotency_key]
        operation = self._enqueue_operation(
            queue, [payload], priority, delay, eta, headers, max_attempts, retry, visibility_timeout, keys, on_duplicate
        )
        return self._commit_enqueue(operation)[0]

    def enqueue_many(
        self,
        queue: str,
        payloads: Iterable[object],
        *,
        priority: int = 5,
        delay: Duration = 0,
        eta: Moment | None = None,
        headers: Mapping[str, str] | None = None,
        max_attempts: int | None = None,
        retry: RetryPolicy | None = None,
        visibility_timeout: Duration | None = None,
        idempotency_keys: Sequence[str | None] | None = None,
        on_duplicate: OnDuplicate = "return",
    ) -> Sequence[int]:
        """Put many jobs with the same options into a queue: all or nothing, one record of the log.

        Args:
            payloads: as in `enqueue`.
            idempotency_keys: one, or None, for each payload. A key that comes twice makes one job.

        Returns:
            The ids, one for each payload in their order.
        """
        checked = checked_payloads(payloads, idempotency_keys)
        operation = self._enqueue_operation(
            queue, checked, priority, delay, eta, headers, max_attempts, retry, visibility_timeout,
            idempotency_keys, on_duplicate,
        )  # fmt: skip
        return self._commit_enqueue(operation)

    def _enqueue_operation(
        self,
        queue: str,
        payloads: list[Any],
        priority: int,
        delay: Duration,
        eta: Moment | None,
        headers: Mapping[str, str] | None,
        max_attempts: int | None,
        retry: RetryPolicy | None,
        visibility_timeout: Duration | None,
        keys: Sequence[str | None] | None,
        on_duplicate: str,
    ) -> Enqueue:
        if keys is not None:
            if len(keys) != len(payloads):
                raise UsageError(f"idempotency_keys: {len(payloads)} expected, one a payload, got {len(keys)}")
            for key in keys:
                if key is not None:
                    checked_text(key, "idempotency_key", MAX_KEY_BYTES)
        if on_duplicate not in ("return", "raise"):
            raise UsageError(f"on_duplicate: 'return' or 'raise' expected, got {quoted(on_duplicate)}")
        if retry is not None and not isinstance(retry, RetryPolicy):
            raise UsageError(f"retry: a RetryPolicy expected, got {type(retry).__name__}")
        # Most calls give neither: the hot path.
        delay_ms, eta_ms = (
            _delay_or_eta(delay, eta) if delay or eta is not None or type(delay) is not int else (0, None)
        )
        return Enqueue(
            checked_text(queue, "queue", MAX_QUEUE_BYTES),
            [self._encode(payload) for payload in payloads],
            checked_int(priority, "priority", 0, 9),
            delay_ms,
            eta_ms,
            None if headers is None else checked_headers(headers),
            retry,
            None if max_attempts is None else checked_int(max_attempts, "max_attempts", 1, 2**31 - 1),
            None if visibility_timeout is None else checked_visibility(visibility_timeout),
            keys,
            on_duplicate == "raise",
        )

    def _encode(self, payload: Any) -> bytes:
        if type(payload) is not bytes:
            payload = encoded(payload)
        if len(payload) > self._max_payload_bytes:
            raise UsageError(
                f"payload: {len(payload)} bytes, {self._max_payload_bytes} is the most; raise max_payload_bytes, or "
                f"store it elsewhere and enqueue a reference"
            )
        return bytes(payload)

    def _commit_enqueue(self, operation: Enqueue) -> list[int]:
        raise NotImplementedError  # the broker does it now, a transaction at its end


class Broker(_Enqueues):
    """A durable job queue in a directory, owned by this process. Thread-safe.

    >>> with Broker(":memory:") as broker:
    ...     _ = broker.enqueue("mail", {"to": "ada@example.org"})
    ...     with broker.lease("mail") as lease:
    ...         print(lease.json())
    {'to': 'ada@example.org'}

    Args:
        path: the directory; created if missing. ":memory:" is the same machine without files, for tests.
        fsync: "always": a call that changes something returns when it is on disk (a `lease` when it is written).
            "interval": every `fsync_interval` seconds. "never": when the system likes. In every mode the bytes have
            been handed to the operating system when a call returns: a process that dies loses nothing, what the two
            relaxed modes risk is a power cut.
        fsync_interval: seconds, above 0.
        segment_bytes: size of a log file, at least 64 KiB. A larger record gets a segment of its own.
        release_on_open: end the leases of the former owner: a first attempt is ready at once, later ones after their
            backoff, dead at max_attempts, with error "owner gone". False: they keep their deadlines.
        max_payload_bytes: the largest payload, as stored.
        cache_bytes: memory for payloads of waiting jobs; what is not there is read from the log.
        window_jobs: waiting jobs that may have changed in memory before a checkpoint is due, about 64 bytes each. The
            rest of the backlog is in the index and takes no memory (docs/tuning.md).
        clock: where time comes from; `rivetq.testing.ManualClock` in tests.

    Raises:
        BrokerLockedError: another live broker has the directory.
        CorruptLogError, FormatError: the log cannot be read; nothing in the directory was changed.
        StorageError: the path cannot be used.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        fsync: FsyncMode = "always",
        fsync_interval: Duration = 0.1,
        segment_bytes: int = 64 * 2**20,
        release_on_open: bool = True,
        max_payload_bytes: int = 16 * 2**20,
        cache_bytes: int = 64 * 2**20,
        window_jobs: int = 200_000,
        clock: Clock | None = None,
    ) -> None:
        if fsync not in ("always", "interval", "never"):
            raise UsageError(f"fsync: 'always', 'interval' or 'never' expected, got {quoted(fsync)}")
        checked_bool(release_on_open, "release_on_open")
        interval_ms = duration_ms(fsync_interval, "fsync_interval")
        if not interval_ms:
            raise UsageError("fsync_interval: above 0 expected; for a sync in every call use fsync='always'")
        if clock is not None and not (hasattr(clock, "boot_ms") and hasattr(clock, "wall_ms")):
            raise UsageError(f"clock: an object with boot_ms() and wall_ms() expected, got {type(clock).__name__}")
        checked_int(segment_bytes, "segment_bytes", MIN_SEGMENT_BYTES, 2**40)
        checked_int(cache_bytes, "cache_bytes", 0, 2**50)
        checked_int(window_jobs, "window_jobs", 1024, 2**50)
        self._max_payload_bytes = checked_int(max_payload_bytes, "max_payload_bytes", 1, MAX_PAYLOAD_BYTES)
        self._clock = clock or SystemClock()
        self._watched: dict[int, bool] = {}  # token of an entered lease -> it was settled
        self.path = checked_path(path)
        self._engine: Engine
        # An engine is loaded when it is opened: importing rivetq would take three times as long.
        if self.path == MEMORY:
            from ..engines.memory import MemoryEngine

            self._engine = MemoryEngine(self._clock)
        else:
            from ..engines.local import LocalEngine

            self._engine = LocalEngine(
                self.path,
                fsync=fsync,
                fsync_interval=interval_ms / 1000,
                segment_bytes=segment_bytes,
                release_on_open=release_on_open,
                cache_bytes=cache_bytes,
                window_jobs=window_jobs,
                clock=self._clock,
            )
        # A program that forgets to close still leaves a checkpoint behind, so that its next opening is quick.
        atexit.register(self._engine.close)

    def __repr__(self) -> str:
        return f"Broker({self.path!r})"

    def __enter__(self) -> Self:
        self._engine.check_open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def clock(self) -> Clock:
        """The clock that this broker lives by."""
        return self._clock

    @property
    def capabilities(self) -> Capabilities:
        """What the engine behind it promises."""
        return self._engine.capabilities

    def close(self) -> None:
        """Stop the threads, checkpoint, free the directory. May be repeated; never raises.

        Waiting leases end with BrokerClosedError, as does every later call. In a forked child it does nothing.
        """
        self._engine.close()
        atexit.unregister(self._engine.close)

    def sync(self) -> None:
        """Return once everything so far is on disk, in every fsync mode."""
        self._engine.maintain("sync")

    # Put work in: enqueue and enqueue_many are above

    def _commit_enqueue(self, operation: Enqueue) -> list[int]:
        answers = self._engine.commit([operation] if operation.payloads else [])
        return answers[0] if answers else []

    # Take work out

    def lease(
        self, queue: str | Sequence[str], *, visibility_timeout: Duration | None = None, wait: Duration | None = 0
    ) -> Lease | None:
        """The most urgent ready job, yours alone until the lease's deadline; None if there is none.

        Args:
            queue: a name, or several in order of preference.
            visibility_timeout: seconds until the deadline; None: the job's own, else the queue's (30).
            wait: seconds to block for a first job; None: for ever. Real time, also on a manual clock.
        """
        leases = self.lease_many(queue, 1, visibility_timeout=visibility_timeout, wait=wait)
        return leases[0] if leases else None

    def lease_many(
        self,
        queue: str | Sequence[str],
        max_jobs: int,
        *,
        visibility_timeout: Duration | None = None,
        wait: Duration | None = 0,
        begun: bool = True,
        max_bytes: int | None = None,
    ) -> list[Lease]:
        """Up to `max_jobs` leases, most urgent first; blocks for the first one only. See `lease`.

        Args:
            begun: False: the jobs are leased in advance, and `begin` will be called for each whose work begins. If the
                process dies before, the next opening gives that job back with its attempt refunded.
            max_bytes: of their payloads together, so that a batch has a bound in memory; one job is leased in
                any case. None: no limit.
        """
        return self._engine.lease(
            checked_queues(queue),
            checked_int(max_jobs, "max_jobs", 1),
            None if visibility_timeout is None else checked_visibility(visibility_timeout),
            None if wait is None else duration_ms(wait, "wait") / 1000,
            self,
            begun=checked_bool(begun, "begun"),
            max_bytes=None if max_bytes is None else checked_int(max_bytes, "max_bytes", 1),
        )

    def begin(self, lease: LeaseLike) -> None:
        """Work on a lease that was taken with ``begun=False`` begins now. For any other lease nothing happens.

        It takes less than a microsecond: a store into a page that outlives the process. A power cut may lose it; then
        the job counts as it stood in the page on disk, begun or not.
        """
        self._engine.begin(lease.token if type(lease) is Lease else checked_lease(lease)[1])

    def lease_soon(
        self,
        queue: str | Sequence[str],
        max_jobs: int,
        done: Callable[[list[Lease] | None, BaseException | None], None],
        *,
        visibility_timeout: Duration | None = None,
        begun: bool = True,
        max_bytes: int | None = None,
    ) -> Waiting:
        """`lease_many` that waits for ever and blocks nobody: for event loops, and for a wait that must end early.

        Args:
            done: called once, with the leases and None, or None and an error: perhaps before this returns, perhaps in
                a thread of the broker's, which everybody who waits like this shares. So it must not raise and must not
                wait for anything: put the leases into a queue of yours.
            begun, max_bytes: as in `lease_many`.

        Returns:
            Something to `cancel()`. True: no job was taken and `done` is never called; False: it was called, or will
            be in a moment.
        """
        return self._engine.lease_soon(
            checked_queues(queue),
            checked_int(max_jobs, "max_jobs", 1),
            None if visibility_timeout is None else checked_visibility(visibility_timeout),
            self,
            done,
            begun=checked_bool(begun, "begun"),
            max_bytes=None if max_bytes is None else checked_int(max_bytes, "max_bytes", 1),
        )

    def ack(self, lease: LeaseLike) -> None:
        """Done: the job is gone for good when this returns.

        Raises:
            LeaseLostError: the lease is not the current delivery any more; nothing changed.
        """
        self._answer([Ack(*checked_lease(lease))])

    def ack_many(self, leases: Iterable[LeaseLike]) -> None:
        """`ack` for many, all or nothing, one record of the log."""
        self._answer([Ack(*checked_lease(lease)) for lease in checked_leases(leases)])

    def nack(self, lease: LeaseLike, *, error: str | None = None, delay: Duration | None = None) -> None:
        """Failed: ready again after the policy's backoff (or `delay` seconds), or a dead letter at max_attempts."""
        self._answer([_nack(lease, error, delay)])

    def release(self, lease: LeaseLike, *, delay: Duration = 0) -> None:
        """Give the job back untouched, to its place in the queue; the attempt is not counted."""
        self._answer([Release(*checked_lease(lease), duration_ms(delay, "delay"))])

    def reject(self, lease: LeaseLike, *, error: str | None = None) -> None:
        """Make the job a dead letter now, whatever attempts are left."""
        self._answer([Reject(*checked_lease(lease), checked_error(error))])

    def extend(self, lease: LeaseLike, seconds: Duration) -> Lease:
        """Heartbeat: the lease with deadline max(old, now + seconds). The old value still answers: same token."""
        job_id, token = checked_lease(lease)
        extra_ms = duration_ms(seconds, "seconds")
        deadline_ms: int = self._engine.commit([Extend(job_id, token, extra_ms)])[0]
        if isinstance(lease, Lease):
            return attrs.evolve(lease, deadline=moment(deadline_ms), granted=extra_ms / 1000, broker=self)
        job = self._engine.get(job_id)
        if job is None:
            raise LeaseLostError(f"job {job_id}: lease {token} ended meanwhile", job_id=job_id, token=token)
        return Lease(
            id=job.id,
            queue=job.queue,
            payload=job.payload,
            headers=job.headers,
            priority=job.priority,
            attempt=job.attempts,
            token=token,
            deadline=moment(deadline_ms),
            granted=extra_ms / 1000,
            enqueued_at=job.enqueued_at,
            max_attempts=job.max_attempts,
            last_error=job.last_error,
            broker=self,
        )

    def extend_many(self, leases: Iterable[LeaseLike], seconds: Duration) -> list[datetime]:
        """`extend` for many, all or nothing, one record of the log; the deadlines now in force, in their order."""
        extra_ms = duration_ms(seconds, "seconds")
        operations = [Extend(*checked_lease(lease), extra_ms) for lease in checked_leases(leases)]
        return [moment(deadline_ms) for deadline_ms in self._engine.commit(operations)]

    def _answer(self, operations: Sequence[Operation]) -> None:
        self._engine.commit(operations)
        self._note_settled(operations)

    def _note_settled(self, operations: Iterable[Operation]) -> None:
        if self._watched:
            for operation in operations:
                if isinstance(operation, (Ack, Nack, Release, Reject)) and operation.token in self._watched:
                    self._watched[operation.token] = True

    def watch_lease(self, token: int) -> None:
        """For `with lease`: remember whether the block settles it."""
        self._watched[token] = False

    def unwatch_lease(self, token: int) -> bool:
        """Whether the lease was settled since `watch_lease`."""
        return self._watched.pop(token, False)

    def transaction(self) -> Transaction:
        """All or nothing: ``with broker.transaction() as tx``. See `Transaction`."""
        return Transaction(self, self._engine)

    # Queues

    def configure_queue(
        self,
        queue: str,
        *,
        retry: RetryPolicy | EllipsisType = ...,
        rate_limit: RateLimit | EllipsisType | None = ...,
        visibility_timeout: Duration | EllipsisType = ...,
        max_jobs: int | EllipsisType | None = ...,
        idempotency_ttl: Duration | EllipsisType = ...,
    ) -> QueueConfig:
        """Change a queue's configuration, durably; what is not given stays. Returns the one in force.

        Args:
            retry: for jobs enqueued from now on that bring none of their own.
            rate_limit: a RateLimit; None: none.
            visibility_timeout: seconds that leases last unless the call or the job says otherwise.
            max_jobs: the most ready, scheduled and leased jobs; None: no limit.
            idempotency_ttl: seconds that a key outlives its job; 0: ends with it.
        """
        checked_text(queue, "queue", MAX_QUEUE_BYTES)
        changes: dict[str, Any] = {}
        if retry is not ...:
            if not isinstance(retry, RetryPolicy):
                raise UsageError(f"retry: a RetryPolicy expected, got {type(retry).__name__}")
            changes["retry"] = retry
        if rate_limit is not ...:
            if rate_limit is not None and not isinstance(rate_limit, RateLimit):
                raise UsageError(f"rate_limit: a RateLimit or None expected, got {type(rate_limit).__name__}")
            changes["rate_limit"] = rate_limit
        if visibility_timeout is not ...:
            changes["visibility_timeout"] = checked_visibility(visibility_timeout) / 1000
        if max_jobs is not ...:
            changes["max_jobs"] = None if max_jobs is None else checked_int(max_jobs, "max_jobs", 1, 2**63 - 1)
        if idempotency_ttl is not ...:
            changes["idempotency_ttl"] = duration_ms(idempotency_ttl, "idempotency_ttl") / 1000
        return self._engine.configure(queue, changes) if changes else self._engine.config(queue)

    def pause(self, queue: str) -> None:
        """Leases from the queue give nothing until `resume`; enqueue works. Kept on disk."""
        self._engine.configure(checked_text(queue, "queue", MAX_QUEUE_BYTES), {"paused": True})

    def resume(self, queue: str) -> None:
        """End a pause; nothing happens if there is none."""
        if self._engine.config(checked_text(queue, "queue", MAX_QUEUE_BYTES)).paused:
            self._engine.configure(queue, {"paused": False})

    def is_paused(self, queue: str) -> bool:
        """Whether leases from the queue give nothing. Cheap enough to ask before each job: it takes no lock."""
        found = self._engine.is_paused(queue) if type(queue) is str else None
        if found is None:  # of a queue that exists the name is a good one
            checked_text(queue, "queue", MAX_QUEUE_BYTES)
        return bool(found)

    def purge(self, queue: str, *, state: JobState | str | None = None) -> int:
        """Remove the ready, scheduled and dead jobs of a queue, or those of one state; how many it were.

        Many go in parts of a thousand, each a record of its own, and other calls get their turn in between. What is
        enqueued meanwhile stays. If the process dies in the middle, the rest stays too: call it again. An error after a
        first part has the outcome "unknown".
        """
        checked = checked_state(state)
        if checked is JobState.LEASED:
            raise UsageError("purge: leased jobs stay; wait for their answers or their deadline")
        return self._engine.purge(checked_text(queue, "queue", MAX_QUEUE_BYTES), checked)

    def cancel(self, job_id: int) -> bool:
        """Remove a ready, scheduled or dead job; False if it is leased or gone."""
        return self._engine.cancel(checked_int(job_id, "job_id", 0))

    def redrive(self, queue: str, *, job_ids: Iterable[int] | None = None, limit: int | None = None) -> int:
        """Bring dead letters back to ready, attempts from 0, lowest ids first; how many it were.

        Many come back in parts of a thousand, as with `purge`. Named ones are checked first, all of them; those that
        another call takes before their part is done are left out.

        Args:
            job_ids: just these; None: all.
            limit: at most so many.

        Raises:
            JobNotFoundError: an id is no dead letter of this queue; nothing was changed.
        """
        checked_text(queue, "queue", MAX_QUEUE_BYTES)
        ids: list[int] | None = None
        if job_ids is not None:
            if isinstance(job_ids, (str, bytes, bytearray)) or not isinstance(job_ids, Iterable):
                raise UsageError(f"job_ids: a sequence of ids expected, got {type(job_ids).__name__}")
            ids = [checked_int(job_id, "job_ids", 0) for job_id in job_ids]
        return self._engine.redrive(queue, ids, None if limit is None else checked_int(limit, "limit", 0))

    def remove_queue(self, queue: str) -> bool:
        """Forget a queue in which nothing is, its totals included; False if there is none of this name.

        Raises:
            UsageError: there are jobs in it, or keys in force, or it is configured or paused; nothing was changed.
        """
        return self._engine.remove_queue(checked_text(queue, "queue", MAX_QUEUE_BYTES))

    # Looking

    def find(self, queue: str, idempotency_key: str) -> int | None:
        """The id that the key stands for now."""
        checked_text(queue, "queue", MAX_QUEUE_BYTES)
        return self._engine.find(queue, checked_text(idempotency_key, "idempotency_key", MAX_KEY_BYTES))

    def get(self, job_id: int) -> Job | None:
        """The job as it is now; None if it is gone."""
        return self._engine.get(checked_int(job_id, "job_id", 0))

    def jobs(
        self,
        queue: str,
        *,
        state: JobState | str | None = None,
        after: int = 0,
        limit: int = 100,
        payloads: bool = True,
    ) -> list[Job]:
        """Jobs of a queue by id: up to `limit` (1 to 10,000) with ids above `after`; page with the last id.

        Without `payloads` none is read, and b"" stands in the place of each: a page of large ones takes much memory.

        More than a thousand, or the scheduled ones of very many, are read in parts: each job is shown as it was at some
        moment of the call, and one that was there all the time is there once.
        """
        return self._engine.jobs(
            checked_text(queue, "queue", MAX_QUEUE_BYTES),
            checked_state(state),
            checked_int(after, "after", 0),
            checked_int(limit, "limit", 1, 10_000),
            payloads=checked_bool(payloads, "payloads"),
        )

    def dead_letters(self, queue: str, *, after: int = 0, limit: int = 100) -> list[Job]:
        """`jobs` in the state "dead"."""
        return self.jobs(queue, state=JobState.DEAD, after=after, limit=limit)

    def queues(self) -> list[str]:
        """The names of all queues, sorted."""
        return self._engine.queues()

    def stats(self, queue: str | None = None) -> QueueStats:
        """Counts of one queue, or of all together; one look is one moment."""
        return self._engine.stats(None if queue is None else checked_text(queue, "queue", MAX_QUEUE_BYTES))

    def deliveries(self, queue: str | None = None) -> Deliveries:
        """What became of the deliveries of one queue, or of all, since this opening."""
        return self._engine.deliveries(None if queue is None else checked_text(queue, "queue", MAX_QUEUE_BYTES))

    def health(self) -> Health:
        """Whether it serves, why not, and what may soon be short. Never raises; works on a closed broker too."""
        return self._engine.health()

    # Housekeeping: the broker does all of this by itself

    def backup(self, out: str | os.PathLike[str], *, link: bool = True) -> Backup:
        """Copy the directory to `out` while everything goes on, and read the copy back.

        The copy is the state after one record, and holds all that was answered before this call. Opened by a broker of
        its own it goes on from there; its index is rebuilt then.

        Args:
            out: a path at which there is nothing, or an empty directory. It appears when the copy is complete.
            link: log files that do not change any more are linked, where the file system can: quick, and no space is
                taken; but a bad block is one for both. False: all is copied.

        Returns:
            What is in it: records, jobs, segments, bytes.

        Raises:
            StorageError: there is something at `out`, or it cannot be written.
            CorruptLogError: the log of this broker is damaged.
            UsageError: the queue is in memory.
        """
        return self._engine.backup(os.path.abspath(checked_path(out)), link=checked_bool(link, "link"))

    def checkpoint(self) -> None:
        """Bring the index up to date now, so that the next opening replays little."""
        self._engine.maintain("checkpoint")

    def compact(self) -> None:
        """Rewrite what lives in old log segments and drop them now."""
        self._engine.maintain("compact")

    def rotate(self) -> None:
        """Begin a new log segment now."""
        self._engine.maintain("rotate")

    def metrics(self) -> dict[str, int]:
        """Counters since this opening: records, fsyncs, bytes and segments of the log, checkpoints."""
        return self._engine.metrics()

    def histograms(self) -> dict[str, Histogram]:
        """Since this opening: `fsync_seconds`, and `jobs_per_fsync`, the jobs that one sync made durable.

        In memory there are none.
        """
        return self._engine.histograms()


class Transaction(_Enqueues):
    """Any mix of enqueues and answers over any queues, as one record of the log: all of it or nothing.

    Arguments and fences are checked at the call; fences, keys, max_jobs and rates again at the end of the block, which
    is where everything happens. A key that stood for a job at the call must stand for it at the end, too
    (`JobNotFoundError`), and one that an ack of the block ends is free in the block. On an exception nothing happened.
    Other threads are not blocked meanwhile; use a transaction from one thread.
    """

    def __init__(self, broker: Broker, engine: Engine) -> None:
        self._broker = broker
        self._engine = engine
        self._max_payload_bytes = broker._max_payload_bytes
        self._clock = broker._clock
        self._operations: list[Operation] = []
        self._settled: set[int] = set()
        self._acked: set[int] = set()
        self._keys: dict[tuple[str, str], int] = {}
        self._open = False
        self._used = False

    def __enter__(self) -> Self:
        if self._used:
            raise UsageError("a transaction is used once; call broker.transaction() for another")
        self._open = self._used = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if operations := self._end(error):
            try:
                self._broker._answer(operations)
            except Exception:
                self._give_up()
                raise

    def _end(self, error: BaseException | None) -> list[Operation]:
        """The block is over: what is to be committed now. If that fails, `_give_up` comes next."""
        self._open = False
        if error is None:
            return self._operations
        self._give_up()
        return []

    def _give_up(self) -> None:
        """The ids that were told are wanted no more."""
        for operation in self._operations:
            if isinstance(operation, Enqueue) and operation.promised is not None:
                self._engine.unreserve(operation.promised)

    def ack(self, lease: LeaseLike) -> None:
        """See `Broker.ack`."""
        self._add([Ack(*checked_lease(lease))])

    def ack_many(self, leases: Iterable[LeaseLike]) -> None:
        """See `Broker.ack_many`."""
        self._add([Ack(*checked_lease(lease)) for lease in checked_leases(leases)])

    def nack(self, lease: LeaseLike, *, error: str | None = None, delay: Duration | None = None) -> None:
        """See `Broker.nack`."""
        self._add([_nack(lease, error, delay)])

    def release(self, lease: LeaseLike, *, delay: Duration = 0) -> None:
        """See `Broker.release`."""
        self._add([Release(*checked_lease(lease), duration_ms(delay, "delay"))])

    def reject(self, lease: LeaseLike, *, error: str | None = None) -> None:
        """See `Broker.reject`."""
        self._add([Reject(*checked_lease(lease), checked_error(error))])

    def _add(self, answers: Sequence[Ack | Nack | Release | Reject]) -> None:
        self._check_open()
        settled = set(self._settled)
        for answer in answers:
            self._engine.check(answer)
            if answer.id in settled:
                raise LeaseLostError(
                    f"job {answer.id}: lease {answer.token} is settled already in this transaction",
                    job_id=answer.id,
                    token=answer.token,
                )
            settled.add(answer.id)
            if isinstance(answer, Ack):
                self._acked.add(answer.id)
        self._settled = settled
        self._operations += answers

    def _commit_enqueue(self, operation: Enqueue) -> list[int]:
        """Ids are told now; the jobs exist when the block ends."""
        self._check_open()
        queue, keys = operation.queue, operation.keys
        if not operation.payloads:
            return []
        if keys is None:
            return self._promise(operation)
        standing = self._engine.check(operation)
        answer: list[int | None] = [None] * len(keys)
        fresh: list[int] = []
        first_at: dict[str, int] = {}
        for i, key in enumerate(keys):
            known = None if key is None else self._keys.get((queue, key)) or standing[i]
            if known is not None and known in self._acked and not self._engine.config(queue).idempotency_ttl:
                known = None  # it ends with the ack that comes before
            if key is not None and operation.raise_on_duplicate and (known is not None or key in first_at):
                raise DuplicateJobError(
                    f"queue {queue!r}: idempotency key {key!r} stands for a job already; nothing was enqueued",
                    job_id=known or 0,
                    queue=queue,
                    key=key,
                    state=None if known is None or (job := self._engine.get(known)) is None else job.state,
                )
            if known is not None:
                answer[i] = JobId(known)
                if key is not None and (queue, key) not in self._keys:
                    self._operations.append(KeyStands(queue, key, known))
            elif key is None or key not in first_at:
                fresh.append(i)
                if key is not None:
                    first_at[key] = i
        if fresh:
            part = attrs.evolve(
                operation, payloads=[operation.payloads[i] for i in fresh], keys=[keys[i] for i in fresh]
            )
            for i, job_id in zip(fresh, self._promise(part), strict=True):
                answer[i] = JobId(job_id, created=True)
                if (key := keys[i]) is not None:
                    self._keys[queue, key] = job_id
        return [JobId(self._keys[queue, keys[i] or ""]) if job is None else job for i, job in enumerate(answer)]

    def _promise(self, operation: Enqueue) -> list[int]:
        count = len(operation.payloads)
        first = operation.promised = self._engine.reserve(count)
        self._operations.append(operation)
        return list(range(first, first + count))

    def _check_open(self) -> None:
        if not self._open:
            raise UsageError("the transaction is not open; its methods work inside its `with` block only")


def _delay_or_eta(delay: Duration, eta: Moment | None) -> tuple[int, int | None]:
    """Milliseconds of a delay, or none and the moment."""
    delay_ms = 0 if delay == 0 and type(delay) is int else duration_ms(delay, "delay")
    if eta is None:
        return delay_ms, None
    if delay_ms:
        raise UsageError("delay and eta exclude each other; give one of them")
    return 0, moment_ms(eta, "eta")


def _nack(lease: LeaseLike, error: str | None, delay: Duration | None) -> Nack:
    delay_ms = None if delay is None else duration_ms(delay, "delay")
    return Nack(*checked_lease(lease), checked_error(error), delay_ms)
