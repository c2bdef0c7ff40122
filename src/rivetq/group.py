"""Group commit: one sync for all who wait.

The first caller that finds nobody syncing leads: it writes and syncs, in its own thread, so that a lone caller pays for
no hand-over. Whoever comes meanwhile parks on a lock of its own. After the sync all who are covered are woken at once,
and one of the others, if there are any, is told to lead next. (With a plain mutex around the sync the leader takes it
again before a waiter has woken, and almost nothing is merged: measured, see docs/design.md.)

Those who were woken a moment ago are about to append their next records. So whoever comes first after a sync that had
company parks until the others are back, and the last to come leads: it is running anyway, no thread is woken for it.
The first one's patience ends after a few syncs' time at most; a lone caller never waits.
"""

from __future__ import annotations

import threading
import time
from typing import Protocol

PATIENCE = 2.0
"""The longest that a caller waits for company, in syncs as they took lately. Until a thread has come back it takes
several times as long as its work: the interpreter goes from one to the next."""
PATIENCE_S = 0.02
"""And this at most, whatever a disk that stalled once has done to that figure."""
COMPANY = 12
"""As many are company enough: with more threads than that, the next ones gather while the disk is busy."""

_LAST = 2**64  # above every lsn: such a waiter is never covered, it is told to lead in the end


class SyncTarget(Protocol):
    """What is synced: the log."""

    @property
    def broken(self) -> bool: ...
    @property
    def durable_lsn(self) -> int: ...
    def sync(self) -> int: ...


class _Waiter:
    __slots__ = ("is_patient", "leads", "lock", "lsn")

    def __init__(self, lsn: int) -> None:
        self.lsn = lsn
        self.leads = False
        self.is_patient = False
        self.lock = threading.Lock()
        self.lock.acquire()


class GroupCommit:
    """Makes records durable for many threads. `failure` is why it cannot any more."""

    def __init__(self, target: SyncTarget) -> None:
        self._target = target
        self._lock = threading.Lock()  # guards all below; held for microseconds, never over a sync
        self._waiters: list[_Waiter] = []
        self._leading = False  # somebody syncs, or was told to
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
            if waiter.leads:
                self._lead(waiter)
        except BaseException as error:
            if waiter.leads and (self._target.broken or isinstance(error, Exception)):
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

    def close(self) -> None:
        """Lead a last time, after whoever leads now, and for good: nobody syncs when this has returned."""
        waiter = _Waiter(_LAST)
        with self._lock:
            parks = self._leading
            if parks:
                self._waiters.append(waiter)
            self._leading = True
        if parks:
            try:
                waiter.lock.acquire()
            except BaseException:
                self._leave(waiter)
                raise
        try:
            if self.failure is None:
                self._target.sync()
        finally:
            with self._lock:
                self._wake(_LAST)

    def _join(self, waiter: _Waiter) -> None:
        """Return when it is covered, or leads, or all is lost."""
        with self._lock:
            if self.failure is not None:
                raise self.failure
            if self._target.durable_lsn >= waiter.lsn:
                return
            if not self._leading and len(self._waiters) + 1 >= min(self._company, COMPANY):
                self._leading = waiter.leads = True
                return
            waiter.is_patient = not self._leading and not self._waiters
            self._waiters.append(waiter)
        if waiter.is_patient:
            if waiter.lock.acquire(timeout=min(self._sync_s * PATIENCE, PATIENCE_S)):
                return
            with self._lock:
                if waiter in self._waiters and not self._leading:
                    self._leading = waiter.leads = True
                    self._waiters.remove(waiter)
                    return
        waiter.lock.acquire()

    def _lead(self, waiter: _Waiter) -> None:
        started = time.perf_counter()
        durable_lsn = self._target.sync()
        self._sync_s = 0.8 * self._sync_s + 0.2 * (time.perf_counter() - started)
        with self._lock:
            before = len(self._waiters)
            self._wake(durable_lsn)
            self._company = 1 + before
            self._pass_on(waiter)

    def _leave(self, waiter: _Waiter) -> None:
        """A KeyboardInterrupt, at any point: take neither the lead along, nor the patience that others count on."""
        with self._lock:
            if waiter in self._waiters:
                self._waiters.remove(waiter)
            if waiter.leads or (waiter.is_patient and not self._leading):
                self._wake(self._target.durable_lsn)
                self._pass_on(waiter)

    def _wake(self, durable_lsn: int) -> None:
        # Caller holds self._lock. May be cut short and called again.
        for waiter in self._waiters:
            if waiter.lsn <= durable_lsn and waiter.lock.locked():
                waiter.lock.release()
        self._waiters = [waiter for waiter in self._waiters if waiter.lsn > durable_lsn]

    def _pass_on(self, waiter: _Waiter) -> None:
        # Caller holds self._lock. Somebody leads at every moment, also if this is cut short between two lines.
        if self._waiters:
            heir = self._waiters[0]
            self._leading, heir.leads, waiter.leads = True, True, False
            heir.lock.release()
            del self._waiters[0]
        else:
            self._leading = waiter.leads = False
