"""The job that a handler runs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

from rivetq import Broker, Lease, Transaction, UsageError


class HasBroker(Protocol):
    """What a job is finished in: an app."""

    @property
    def broker(self) -> Broker: ...


class CurrentJob:
    """The job that a handler is running, and whether it should end early. See `current_job`."""

    def __init__(
        self, lease: Lease, task: str, app: HasBroker, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> None:
        self.lease = lease
        self.task = task
        """Name of the task."""
        self.args = args
        self.kwargs: Mapping[str, Any] = {} if kwargs is None else kwargs
        self._app = app
        self.finished = False
        """It was acked, by `finish`."""
        self.finishing = False  # the commit of that is under way: it may still fail
        self._waiting: tuple[Callable[[], object], ...] = ()  # told when it is over
        self.stopping = False
        """The worker is shutting down: a handler that can end soon, or raise `Snooze`, should."""
        self.reason: str | None = None
        """Why it was cancelled."""
        self._is_cancelled = False
        self._cancelled: threading.Event | None = None  # made for the first who waits: most jobs need none

    @property
    def id(self) -> int:
        return self.lease.id

    @property
    def queue(self) -> str:
        return self.lease.queue

    @property
    def attempt(self) -> int:
        """1 is the first delivery."""
        return self.lease.attempt

    @property
    def max_attempts(self) -> int | None:
        """None: no end."""
        return self.lease.max_attempts

    @property
    def headers(self) -> Mapping[str, str]:
        return self.lease.headers

    @property
    def cancelled(self) -> bool:
        """Stop as soon as you can: the lease was lost, the job was cancelled, or its time limit is over.

        A handler in a thread cannot be stopped from outside; one that runs for long should look here now and then. In
        a child process neither this nor `stopping` is ever set: the child is killed.
        """
        return self._is_cancelled

    def wait_cancelled(self, seconds: float | None = None) -> bool:
        """Sleep for so long, but not longer than until it is cancelled; whether it is."""
        if self._cancelled is None:
            self._cancelled = threading.Event()
        if self._is_cancelled:  # before there was an event to set
            return True
        return self._cancelled.wait(seconds)

    @contextmanager
    def finish(self) -> Iterator[Transaction]:
        """Ack this job together with what the block enqueues, all or nothing: ``with current_job().finish() as tx``.

        A step and the one that follows it then cannot come apart: ``next_step.options(transaction=tx).enqueue(...)``.
        When the block has ended the job is done, however the handler ends. After an exception in the block nothing
        has happened.

        It waits for the disk; an async handler calls it in a thread (`asyncio.to_thread`) where that matters.

        Raises:
            UsageError: it was finished before; or it runs in a process pool, which has no broker.
            LeaseLostError: the lease was lost meanwhile, and nothing was enqueued.
        """
        self._check_unfinished()
        is_mine = False
        try:
            with self._app.broker.transaction() as tx:
                tx.ack(self.lease)
                yield tx
                with _finishes:  # another thread of the handler's may do the same
                    self._check_unfinished()
                    # Before the commit: from here on its lease is not renewed, and until it is over not answered.
                    is_mine = self.finished = self.finishing = True
        except BaseException:
            if is_mine:
                self.finished = False
            raise
        finally:
            if is_mine:
                with _finishes:
                    self.finishing = False
                    waiting, self._waiting = self._waiting, ()
                for each in waiting:
                    each()

    def _check_unfinished(self) -> None:
        if self.finished:
            raise UsageError(f"job {self.id}: it was finished before")

    def when_finished(self, call: Callable[[], object]) -> None:
        """For workers: call this when no commit of `finish` is under way; at once if none is."""
        with _finishes:
            if self.finishing:
                self._waiting += (call,)
                return
        call()

    def cancel(self, reason: str) -> None:
        """For workers: tell the handler. The first reason stays."""
        if not self._is_cancelled:
            self.reason = reason
            self._is_cancelled = True
        if (event := self._cancelled) is not None:
            event.set()


_finishes = threading.Lock()
"""Guards, of all jobs, whether a `finish` is under way and who waits for its end: it is held for a moment only."""
_current: ContextVar[CurrentJob] = ContextVar("rivetq_current_job")


def here() -> CurrentJob | None:
    """The job that runs in this thread or asyncio task, if one does."""
    return _current.get(None)


def current_job() -> CurrentJob:
    """The job that runs here; UsageError outside of a handler."""
    found = here()
    if found is None:
        raise UsageError("current_job: no job runs here; it works in a handler that a worker called")
    return found


@contextmanager
def running(job: CurrentJob) -> Iterator[None]:
    """For workers: `job` is the current one in this block."""
    token = _current.set(job)
    try:
        yield
    finally:
        _current.reset(token)
