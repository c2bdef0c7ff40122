"""The facade: it delegates to an engine what `requests` made of a call.

The file is long because every verb of the public interface is documented here; no verb has more than a few lines.
"""

from __future__ import annotations

import atexit
import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from types import EllipsisType, TracebackType
from typing import Any, Self

from ..clock import Clock, SystemClock
from ..engine import (
    Ack,
    Answer,
    Backup,
    Call,
    Cancel,
    Capabilities,
    Commit,
    Configure,
    Deadline,
    Engine,
    Enqueue,
    FsyncMode,
    Get,
    Grant,
    Keeping,
    Lost,
    Nack,
    Once,
    Operation,
    Outcomes,
    QueueChanges,
    QueueOf,
    Queues,
    Reject,
    Release,
    RemoveQueue,
    Stats,
)
from ..errors import LeaseLostError, UsageError
from ..histogram import Histogram
from ..model import (
    Deliveries,
    Health,
    Job,
    JobState,
    Lease,
    LeaseLike,
    QueueConfig,
    QueueStats,
    RateLimit,
    RetryPolicy,
)
from ..units import Duration, checked_int, duration_ms, quoted
from . import requests
from .arguments import checked_bool, checked_lease, checked_path, checked_payloads
from .requests import Moment, OnDuplicate
from .transaction import Transaction

MEMORY = ":memory:"
MIN_SEGMENT_BYTES = 64 * 1024
MAX_PAYLOAD_BYTES = 2**29
"""The largest `max_payload_bytes`: half of what one record can hold."""


class Waiting:
    """A lease that is waited for without a thread."""

    def __init__(self, call: Call) -> None:
        self._call = call

    def cancel(self) -> bool:
        """Stop waiting. True: no job was taken and `done` will never be called; False: it was, or is about to be."""
        told: list[bool] = []
        is_told = threading.Event()

        def tell(gone: bool) -> None:
            told.append(gone)
            is_told.set()

        self._call.cancel(tell)
        is_told.wait()
        return told[0]


class Broker:
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
        self.path = checked_path(path)
        clock = clock or SystemClock()
        engine: Engine
        # An engine is loaded when it is opened: importing rivetq would take three times as long.
        if self.path == MEMORY:
            from ..engines.memory import MemoryEngine

            engine = MemoryEngine(clock)
        else:
            from ..engines.local import LocalEngine

            engine = LocalEngine(
                self.path,
                fsync=fsync,
                fsync_interval=interval_ms / 1000,
                segment_bytes=segment_bytes,
                release_on_open=release_on_open,
                cache_bytes=cache_bytes,
                window_jobs=window_jobs,
                clock=clock,
            )
        self._take_over(engine)

    @classmethod
    def over(cls, engine: Engine, *, path: str = "", max_payload_bytes: int = 16 * 2**20) -> Self:
        """A broker over an engine of your own, which it closes.

        Args:
            engine: see `rivetq.engine.Engine`.
            path: what `broker.path` says.
            max_payload_bytes: the largest payload, as stored.
        """
        broker = cls.__new__(cls)
        broker.path = path
        most = min(MAX_PAYLOAD_BYTES, engine.capabilities.max_payload_bytes)
        broker._max_payload_bytes = checked_int(max_payload_bytes, "max_payload_bytes", 1, most)
        broker._take_over(engine)
        return broker

    def _take_over(self, engine: Engine) -> None:
        self._engine = engine
        self._watched: dict[int, bool] = {}  # token of an entered lease -> it was settled
        self._wall_ms = None if engine.capabilities.clock == "here" else engine.clock.wall_ms
        # A program that forgets to close still leaves a checkpoint behind, so that its next opening is quick.
        atexit.register(engine.close)

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
        return self._engine.clock

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
        if (keeping := self._keeping()) is not None:
            keeping.sync()

    # Put work in

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
        operation = requests.enqueue(
            self._max_payload_bytes,
            queue,
            [payload],
            priority,
            delay,
            eta,
            headers,
            max_attempts,
            retry,
            visibility_timeout,
            keys,
            on_duplicate,
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
        operation = requests.enqueue(
            self._max_payload_bytes, queue, checked, priority, delay, eta, headers, max_attempts, retry,
            visibility_timeout, idempotency_keys, on_duplicate,
        )  # fmt: skip
        return self._commit_enqueue(operation)

    def _commit_enqueue(self, operation: Enqueue) -> list[int]:
        answers: list[Any] = self._engine.call(Commit([operation] if operation.payloads else []))
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
        request = requests.take(queue, max_jobs, visibility_timeout, wait, begun, max_bytes)
        return requests.leases_of(self._engine.call(request), self, self._wall_ms)

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
        """`lease_many` that waits for ever without blocking: for event loops, and for a wait that must end early.

        Args:
            done: called once, with the leases and None, or None and an error: perhaps before this returns, perhaps in
                a thread of the broker that all such callers share. It must neither raise nor wait for anything: put
                the leases into a queue of yours. If memory runs out in it, it is called once more.
            begun, max_bytes: as in `lease_many`.

        Returns:
            Something to `cancel()`. True: no job was taken and `done` is never called; False: it was called, or will
            be in a moment.
        """
        request = requests.take(queue, max_jobs, visibility_timeout, None, begun, max_bytes)

        def tell(grants: list[Grant] | None, error: BaseException | None) -> None:
            leases = None
            if grants is not None:
                try:
                    leases = requests.leases_of(grants, self, self._wall_ms)
                except BaseException as trouble:  # no memory, say: the waiting caller is told
                    error = trouble
            done(leases, error)

        return Waiting(self._engine.call_soon(request, tell))

    def ack(self, lease: LeaseLike) -> None:
        """Done: the job is gone for good when this returns.

        Raises:
            LeaseLostError: the lease is not the current delivery any more; nothing changed.
        """
        self._commit([requests.ack(lease)])

    def ack_many(self, leases: Iterable[LeaseLike]) -> None:
        """`ack` for many, all or nothing, one record of the log."""
        self._commit(requests.acks(leases))

    def nack(self, lease: LeaseLike, *, error: str | None = None, delay: Duration | None = None) -> None:
        """Failed: ready again after the policy's backoff (or `delay` seconds), or a dead letter at max_attempts."""
        self._commit([requests.nack(lease, error, delay)])

    def release(self, lease: LeaseLike, *, delay: Duration = 0) -> None:
        """Give the job back untouched, to its place in the queue; the attempt is not counted."""
        self._commit([requests.release(lease, delay)])

    def reject(self, lease: LeaseLike, *, error: str | None = None) -> None:
        """Make the job a dead letter now, even if attempts are left."""
        self._commit([requests.reject(lease, error)])

    def extend(self, lease: LeaseLike, seconds: Duration) -> Lease:
        """Heartbeat: the lease with deadline max(old, now + seconds). The old value still answers: same token."""
        (deadline,) = self.extend_many([lease], seconds)
        if isinstance(lease, Lease):
            return requests.extended(lease, deadline, seconds, self)
        job = self.get(lease.id)
        if job is None:
            raise LeaseLostError(
                f"job {lease.id}: lease {lease.token} ended meanwhile", job_id=lease.id, token=lease.token
            )
        return requests.lease_of(job, lease.token, deadline, seconds, self)

    def extend_many(self, leases: Iterable[LeaseLike], seconds: Duration) -> list[datetime]:
        """`extend` for many, all or nothing, one record of the log; the deadlines now in force, in their order."""
        answers = self._commit(requests.extends(leases, seconds))
        return [requests.deadline_of(answer, self._wall_ms) for answer in answers if isinstance(answer, Deadline)]

    def settle_many(self, answers: Iterable[Operation]) -> list[Lost | None]:
        """Answer many leases, each for itself, in one record of the log; what became of each, in their order.

        Args:
            answers: `Ack`, `Nack`, `Release`, `Reject` and `Extend` of `rivetq.engine`.

        Returns:
            For each None; or `Lost`, if its lease is not the current delivery any more: nothing was changed for it.
        """
        operations = requests.operations(answers, self._max_payload_bytes)
        told = self._engine.call(Commit(operations, partial=True))
        self._note_settled(operations)
        return [answer if isinstance(answer, Lost) else None for answer in told]

    def commit(self, operations: Iterable[Operation], *, once: Once | None = None) -> list[Answer]:
        """Do all of these operations of `rivetq.engine` as one record of the log, or none. Returns their answers.

        Args:
            operations: in the order in which they are decided.
            once: the number of this commit in a session of the caller. A repetition with the same number, also after a
                restart, is not done twice: it gets the answers of the first time.

        Raises:
            UsageError: an operation is malformed, or the session had the answer of this number long ago.
        """
        return self._commit(requests.operations(operations, self._max_payload_bytes), requests.once(once))

    def _commit(self, operations: Sequence[Operation], once: Once | None = None) -> list[Answer]:
        answers = self._engine.call(Commit(operations, False, once))
        if self._watched:
            self._note_settled(operations)
        return answers

    def _note_settled(self, operations: Iterable[Operation]) -> None:
        if self._watched:
            for operation in operations:
                if isinstance(operation, (Ack, Nack, Release, Reject)) and operation.token in self._watched:
                    self._watched[operation.token] = True

    def _watch_lease(self, token: int) -> None:
        """For `with lease`: remember whether the block settles it."""
        self._watched[token] = False

    def _unwatch_lease(self, token: int) -> bool:
        """Whether the lease was settled since `_watch_lease`."""
        return self._watched.pop(token, False)

    def transaction(self) -> Transaction:
        """All or nothing: ``with broker.transaction() as tx``. See `Transaction`."""
        return Transaction(self)

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
        return self._engine.call(
            requests.configure(queue, retry, rate_limit, visibility_timeout, max_jobs, idempotency_ttl)
        )

    def pause(self, queue: str) -> None:
        """Leases from the queue give nothing until `resume`; enqueue works. Kept on disk."""
        self._engine.call(Configure(requests.name_of(queue), QueueChanges(paused=True)))

    def resume(self, queue: str) -> None:
        """End a pause; nothing happens if there is none."""
        self._engine.call(Configure(requests.name_of(queue), QueueChanges(paused=False)))

    def is_paused(self, queue: str) -> bool:
        """Whether leases from the queue give nothing. Cheap enough to ask before each job: it takes no lock."""
        found = self._engine.is_paused(queue) if type(queue) is str else None
        if found is None:  # of a queue that exists the name is a good one
            requests.name_of(queue)
        return bool(found)

    def purge(self, queue: str, *, state: JobState | str | None = None) -> int:
        """Remove the ready, scheduled and dead jobs of a queue, or those of one state. Returns the number of jobs.

        Many go in parts of a thousand, each a record of its own, and other calls get their turn in between. What is
        enqueued meanwhile stays. If the process dies in the middle, the rest stays too: call it again. An error after a
        first part has the outcome "unknown".
        """
        return self._engine.call(requests.purge(queue, state))

    def cancel(self, job_id: int) -> bool:
        """Remove a ready, scheduled or dead job; False if it is leased or gone."""
        return self._engine.call(Cancel(checked_int(job_id, "job_id", 0)))

    def redrive(self, queue: str, *, job_ids: Iterable[int] | None = None, limit: int | None = None) -> int:
        """Bring dead letters back to ready, attempts from 0, lowest ids first. Returns the number of jobs.

        Many come back in parts of a thousand, as with `purge`. Named ones are checked first, all of them; those that
        another call takes before their part is done are left out.

        Args:
            job_ids: just these; None: all.
            limit: at most so many.

        Raises:
            JobNotFoundError: an id is no dead letter of this queue; nothing was changed.
        """
        return self._engine.call(requests.redrive(queue, job_ids, limit))

    def remove_queue(self, queue: str) -> bool:
        """Forget a queue in which nothing is, its totals included; False if there is none of this name.

        Raises:
            UsageError: there are jobs in it, or keys in force, or it is configured or paused; nothing was changed.
        """
        return self._engine.call(RemoveQueue(requests.name_of(queue)))

    # Looking

    def find(self, queue: str, idempotency_key: str) -> int | None:
        """The id that the key stands for now."""
        return self._engine.call(requests.find(queue, idempotency_key))

    def get(self, job_id: int) -> Job | None:
        """The job as it is now; None if it is gone."""
        return self._engine.call(Get(checked_int(job_id, "job_id", 0)))

    def queue_of(self, job_id: int) -> str | None:
        """The name of the queue that the job is in; None if it is gone. Its payload is not read."""
        return self._engine.call(QueueOf(checked_int(job_id, "job_id", 0)))

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
        return self._engine.call(requests.jobs(queue, state, after, limit, payloads))

    def dead_letters(self, queue: str, *, after: int = 0, limit: int = 100) -> list[Job]:
        """`jobs` in the state "dead"."""
        return self.jobs(queue, state=JobState.DEAD, after=after, limit=limit)

    def queues(self) -> list[str]:
        """The names of all queues, sorted."""
        return self._engine.call(Queues())

    def stats(self, queue: str | None = None) -> QueueStats:
        """Counts of one queue, or of all together; one look is one moment."""
        return self._engine.call(Stats(None if queue is None else requests.name_of(queue)))

    def deliveries(self, queue: str | None = None) -> Deliveries:
        """What became of the deliveries of one queue, or of all, since this opening."""
        return self._engine.call(Outcomes(None if queue is None else requests.name_of(queue)))

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
        path, checked = os.path.abspath(checked_path(out)), checked_bool(link, "link")
        if (keeping := self._keeping()) is None:
            raise UsageError("this queue has no files that could be copied")
        return keeping.backup(path, link=checked)

    def checkpoint(self) -> None:
        """Bring the index up to date now, so that the next opening replays little."""
        if (keeping := self._keeping()) is not None:
            keeping.checkpoint()

    def compact(self) -> None:
        """Rewrite what lives in old log segments and drop them now."""
        if (keeping := self._keeping()) is not None:
            keeping.compact()

    def rotate(self) -> None:
        """Begin a new log segment now."""
        if (keeping := self._keeping()) is not None:
            keeping.rotate()

    def metrics(self) -> dict[str, int]:
        """Counters since this opening: records, fsyncs, bytes and segments of the log, checkpoints."""
        keeping = self._keeping()
        return {"records": 0, "fsyncs": 0} if keeping is None else keeping.metrics()

    def histograms(self) -> dict[str, Histogram]:
        """Since this opening: `fsync_seconds`, and `jobs_per_fsync`, the jobs that one sync made durable.

        In memory there are none.
        """
        keeping = self._keeping()
        return {} if keeping is None else keeping.histograms()

    def _keeping(self) -> Keeping | None:
        self._engine.check_open()
        return self._engine.keeping
