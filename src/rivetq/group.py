"""Group commit: one sync for all who wait.

The first caller that finds nobody syncing leads: it writes and syncs, in its own thread, so that a lone caller pays for
no hand-over. Whoever comes meanwhile parks on a lock of its own. After the sync all who are covered are woken at once,
and one of the others, if there are any, is told to lead next. (With a plain mutex around the sync the leader takes it
again before a waiter has woken, and almost nothing is merged: measured, see docs/design.md.)

A new leader that has just seen company lets the others come back first: they were woken a moment ago and are about to
append their next records. It waits until as many are parked as took part in the last round, and for a fraction of a
sync at most; a lone caller never waits.
"""

from __future__ import annotations

import threading
import time
from typing import Protocol

PATIENCE = 0.5
"""The longest a leader waits for company, as a fraction of what a sync took lately."""


_LAST = 2**64  # above every lsn: such a waiter is never covered, it is told to lead in the end


class SyncTarget(Protocol):
    """What is synced: the log."""

    @property
    def broken(self) -> bool: ...
    @property
    def durable_lsn(self) -> int: ...
    def sync(self) -> int: ...


class _Waiter:
    __slots__ = ("leads", "lock", "lsn")

    def __init__(self, lsn: int) -> None:
        self.lsn = lsn
        self.leads = False
        self.lock = threading.Lock()
        self.lock.acquire()


class GroupCommit:
    """Makes records durable for many threads. `failure` is why it cannot any more."""

    def __init__(self, target: SyncTarget) -> None:
        self._target = target
        self._lock = threading.Lock()  # guards all below; held for microseconds, never over a sync
        self._waiters: list[_Waiter] = []
        self._leading = False
        self._company = 0  # callers that took part in the last rounds
        self._enough = 0  # parked callers for whom the patient leader waits; 0: it does not
        self._arrived = threading.Lock()
        self._arrived.acquire()
        self._sync_s = 0.0  # how long a sync takes lately
        self.failure: BaseException | None = None

    def wait(self, lsn: int) -> None:
        """Return when the record is on disk. Raises the log's failure, which hits all who wait."""
        if self._target.durable_lsn >= lsn and self.failure is None:
            return
        with self._lock:
            if self.failure is not None:
                raise self.failure
            if self._target.durable_lsn >= lsn:
                return
            waiter = None
            if self._leading:
                waiter = _Waiter(lsn)
                self._waiters.append(waiter)
                if self._enough and len(self._waiters) >= self._enough:
                    self._enough = 0
                    self._arrived.release()
            self._leading = True
        if waiter is not None:
            self._park(waiter)
            if self.failure is not None and self._target.durable_lsn < lsn:
                raise self.failure
            if not waiter.leads:
                return
        self._lead()

    def fail(self, error: BaseException) -> None:
        """End all waiting: nothing will become durable any more."""
        with self._lock:
            self.failure = self.failure or error
            for waiter in self._waiters:
                waiter.lock.release()
            self._waiters.clear()

    def close(self) -> None:
        """Lead a last time, after whoever leads now, and for good: nobody syncs when this has returned."""
        waiter = None
        with self._lock:
            if self._leading:
                waiter = _Waiter(_LAST)
                self._waiters.append(waiter)
            self._leading = True
        if waiter is not None:
            self._park(waiter)
        try:
            if self.failure is None:
                self._target.sync()
        finally:
            with self._lock:
                late, self._waiters = self._waiters, []
            for each in late:
                each.lock.release()

    def _park(self, waiter: _Waiter) -> None:
        try:
            waiter.lock.acquire()
        except BaseException:  # KeyboardInterrupt: leave, and do not take the leadership along
            with self._lock:
                if waiter in self._waiters:
                    self._waiters.remove(waiter)
                elif waiter.leads:
                    self._pass_on()
            raise

    def _lead(self) -> None:
        try:
            if self._company > 1:
                self._await_company()
            started = time.perf_counter()
            durable_lsn = self._target.sync()
            self._sync_s = 0.8 * self._sync_s + 0.2 * (time.perf_counter() - started)
        except BaseException as error:
            if self._target.broken or isinstance(error, Exception):
                self.fail(error)
            with self._lock:
                self._pass_on()
            raise
        with self._lock:
            done = [w for w in self._waiters if w.lsn <= durable_lsn]
            self._waiters = [w for w in self._waiters if w.lsn > durable_lsn]
            self._company = 1 + len(done) + len(self._waiters)
            self._pass_on()
        for waiter in done:
            waiter.lock.release()

    def _pass_on(self) -> None:
        # Caller holds self._lock and leads, or was told to.
        if self._waiters:
            heir = self._waiters.pop(0)
            heir.leads = True
            heir.lock.release()
        else:
            self._leading = False

    def _await_company(self) -> None:
        with self._lock:
            missing = self._company - 1 - len(self._waiters)
            self._enough = self._company - 1 if missing > 0 else 0
        if missing > 0:
            self._arrived.acquire(timeout=self._sync_s * PATIENCE)
            with self._lock:
                if not self._arrived.locked():  # the last one came just as the patience ended
                    self._arrived.acquire()
                self._enough = 0
