"""Group commit: one sync for all callers that wait.

The first caller that finds no sync under way is the leader: it writes and syncs in its own thread, so a lone caller
pays for no hand-over. Callers that come during the sync wait, each on a lock of its own. After the sync all callers
whose records are on disk are woken at once, and one of the others becomes the next leader. (With a plain mutex around
the sync the leader takes it again before a waiter has woken, and almost nothing is merged: measured, see
docs/design.md.)

Threads that were just woken are about to append their next records. After a sync that served several threads, the first
to return waits for the others; the last one leads. It is already running, so no thread has to be woken. The first one
waits for the time of a few syncs at most. A lone caller never waits.
"""

from __future__ import annotations

import threading
import time
from typing import Protocol

PATIENCE = 2.0
"""The longest that a caller waits for others, in units of a recent sync. A thread needs several times as long as its
work to come back, since the interpreter runs one thread after the other."""
PATIENCE_S = 0.02
"""The same limit in seconds, in case a disk that stalled once has spoiled the estimate."""
COMPANY = 12
"""With so many callers, no one waits for more: with more threads, the next ones gather while the disk is busy."""

_LAST = 2**64  # above every lsn: such a waiter is never covered, it is told to lead in the end


class SyncTarget(Protocol):
    """The log, which is synced."""

    @property
    def broken(self) -> bool: ...
    @property
    def durable_lsn(self) -> int: ...
    def sync(self) -> int: ...


class _Waiter:
    __slots__ = ("lock", "lsn")

    def __init__(self, lsn: int) -> None:
        self.lsn = lsn
        self.lock = threading.Lock()
        self.lock.acquire()

    def wake(self) -> None:
        # Caller holds the group's lock. Once more does no harm: a waiter parks once.
        if self.lock.locked():
            self.lock.release()


class GroupCommit:
    """Makes records durable for many threads. `failure` is the reason why it no longer can."""

    def __init__(self, target: SyncTarget) -> None:
        self._target = target
        self._lock = threading.Lock()  # guards all below; held for microseconds, never over a sync
        self._waiters: list[_Waiter] = []  # those that park, in order of arrival
        self._leader: _Waiter | None = None  # it syncs, or was told to; the one place that says so
        self._company = 1  # callers that took part in the last round
        self._sync_s = 0.0  # how long a sync takes lately
        self.failure: BaseException | None = None

    def wait(self, lsn: int) -> None:
        """Return when the record is on disk. Raises the log's failure, which hits all who wait."""
        if self._target.durable_lsn >= lsn and self.failure is None:
            return
        waiter = _Waiter(lsn)
        try:
            self._join(waiter)
            if self._leader is waiter:
                self._lead()
        except BaseException as error:
            if self._leader is waiter and (self._target.broken or isinstance(error, Exception)):
                self.fail(error)
            self._leave(waiter)
            raise
        if self.failure is not None and self._target.durable_lsn < lsn:
            raise self.failure

    def fail(self, error: BaseException) -> None:
        """End all waiting: nothing will become durable any more."""
        with self._lock:
            self.failure = self.failure or error
            self._wake(_LAST)

    def forked(self, error: BaseException) -> None:
        """In the child: the leader is a thread of the parent, so no caller may wait for it."""
        self._lock = threading.Lock()
        self.failure = error
        for waiter in self._waiters:
            waiter.wake()

    def close(self) -> None:
        """Lead one last time, after the present leader. There is no sync after this has returned.

        If that sync fails, all callers that still wait are told.
        """
        waiter = _Waiter(_LAST)
        try:
            with self._lock:
                parks = self._leader is not None
                if parks:
                    self._waiters.append(waiter)
                else:
                    self._leader = waiter
            if parks and self.failure is None:  # else a fork came in between, say, and no thread would wake it
                waiter.lock.acquire()
            if self.failure is None:
                self._target.sync()
        except BaseException as error:
            if self._leader is waiter:  # it stays the leader: the log is about to be closed
                self.fail(error)
            self._leave(waiter)
            raise
        with self._lock:
            self._wake(_LAST)

    def _join(self, waiter: _Waiter) -> None:
        """Return when the waiter is covered or leads; raise if no sync can succeed any more."""
        with self._lock:
            if self.failure is not None:
                raise self.failure
            if self._target.durable_lsn >= waiter.lsn:
                return
            if self._leader is None and len(self._waiters) + 1 >= min(self._company, COMPANY):
                self._leader = waiter
                return
            is_patient = self._leader is None and not self._waiters
            self._waiters.append(waiter)
        if self.failure is not None:  # a fork above: in the child no thread will wake it
            raise self.failure
        if is_patient:
            if waiter.lock.acquire(timeout=min(self._sync_s * PATIENCE, PATIENCE_S)):
                return
            with self._lock:
                if waiter in self._waiters and self._leader is None:
                    self._leader = waiter
                    self._waiters.remove(waiter)
                    return
        waiter.lock.acquire()

    def _lead(self) -> None:
        started = time.perf_counter()
        durable_lsn = self._target.sync()
        self._sync_s = 0.8 * self._sync_s + 0.2 * (time.perf_counter() - started)
        with self._lock:
            assert self._leader is not None, "a sync without a leader"
            before = len(self._waiters)
            self._wake(durable_lsn)
            self._company = 1 + before
            self._pass_on()

    def _leave(self, waiter: _Waiter) -> None:
        """After an exception at any point, such as Ctrl-C: do what the waiter was about to do for others.

        It may have been the leader, or the patient caller that others rely on, or it may have named the next leader
        without waking it.
        """
        with self._lock:
            if waiter in self._waiters:
                self._waiters.remove(waiter)
            self._wake(self._target.durable_lsn)
            if self.failure is None and self._leader in (waiter, None):
                self._pass_on()
            elif self._leader is not None:
                self._leader.wake()

    def _wake(self, durable_lsn: int) -> None:
        # Caller holds self._lock. May be cut short and called again.
        for waiter in self._waiters:
            if waiter.lsn <= durable_lsn:
                waiter.wake()
        self._waiters = [waiter for waiter in self._waiters if waiter.lsn > durable_lsn]

    def _pass_on(self) -> None:
        # Caller holds self._lock. The first line decides; if what follows is cut short, `_leave` does it again.
        self._leader = self._waiters[0] if self._waiters else None
        if self._leader is not None:
            self._leader.wake()
            del self._waiters[0]
