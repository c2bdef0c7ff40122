"""The lock, the time and the end of an engine that lives in this process: everything that its verbs share.

Each call takes these steps: take the lock, let the clock act, decide, record, apply, wake lessees; drop the lock; wait
until the record is safe. Everything under the lock takes microseconds and never waits for a disk or calls user code.

The engine stops for good (`_fail`) when log and machine may differ, or when the disk can no longer be trusted. Every
later call raises BrokerFailedError.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from ..clock import Clock, read_together
from ..engine import Once
from ..errors import (
    BrokerClosedError,
    BrokerFailedError,
    DiskFullError,
    ForkedBrokerError,
    RivetQError,
)
from ..machine import decide
from ..machine.advance import advance, expect_token, next_wakeup_ms
from ..machine.apply import apply, tally_expired
from ..machine.check import check, dump
from ..machine.entry import Entry
from ..machine.events import Event
from ..machine.machine import Machine
from ..machine.queue import NEVER_MS, Queue
from ..machine.sessions import called, told
from ..machine.snapshot import Place
from ..model import Health
from .lessees import LONGEST_SLEEP_S, Lessees, SleepingLessee
from .notifier import Notifier, Tell

ROOM_RETRY_S = 1.0
"""After the disk had no space for the record of ended leases."""
JOIN_S = 2.0
"""How long close() waits for one of its threads: far longer than a slice of their work takes."""
TURN_S = 0.0001
"""The pause between two parts of a large change, so that others get the lock. A thread that takes it again at once
would get it before those who wait."""


class NeedRoomError(Exception):
    """Internal: the record does not fit into the space that is ready. Make room outside the lock and decide again."""

    def __init__(self, body_length: int, snapshot_length: int | None, keep_reserve: bool) -> None:
        super().__init__(body_length)
        self.body_length = body_length
        self.snapshot_length = snapshot_length
        self.keep_reserve = keep_reserve


class Clockwork:
    """A machine behind a lock. With files, an engine fills in the methods marked so.

    Args:
        machine: its state.
        clock: where time comes from.
        now_ms: a moment of the time line.
        boot_ms: the boot-time clock at that moment.
    """

    def __init__(self, machine: Machine, clock: Clock, now_ms: int, boot_ms: int) -> None:
        self.clock = clock
        self._machine = machine
        machine.grain_ms = getattr(clock, "grain_ms", 0)
        self._offset_ms = now_ms - boot_ms
        machine.ahead_ms = partial(_ahead_ms, clock, self._offset_ms)
        self._lock = threading.Lock()  # guards the machine, the log's tail and all below
        self._ended: str | None = None  # "closed", "forked" or "failed": no call works any more
        self._finished = False  # close() is through
        self._saving = False  # it has begun to save
        self._failure: BaseException | None = None
        self._lessees = Lessees()
        self._behind = False  # the last tick left something for the next
        self._needs_room: NeedRoomError | None = None  # for the record of ended leases; the timer makes the room
        self._timer_at_ms = NEVER_MS  # when the timer thread wakes by itself, or was poked for
        self._timer_poked = threading.Event()
        self._stopping = threading.Event()  # close() has begun
        self._close_lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._unsubscribe: Callable[[], None] = _nothing
        self._soon: Notifier | None = None  # made when it is needed: most engines never need one
        self._soon_lock = threading.Lock()
        _live.add(self)

    @property
    def _notifier(self) -> Notifier:
        found = self._soon
        if found is None:
            with self._soon_lock:
                self._check()  # close() ends the one that is there; none may start after that
                found = self._soon = self._soon or Notifier(self._settle, self._start_thread, self._fail)
        return found

    def start(self) -> None:
        """Begin to serve: the threads run from here on."""
        self._unsubscribe = self.clock.subscribe(self._clock_moved)
        self._start_thread("rivetq-timer", self._run_timer)

    def _start_thread(self, name: str, target: Callable[[], None]) -> None:
        thread = threading.Thread(target=target, name=name, daemon=True)
        self._threads.append(thread)  # first: if an exception breaks into the start, close() still waits for it
        thread.start()

    # With files

    def _record(self, events: Sequence[Event], now_ms: int, keep_reserve: bool = False) -> int:
        """Record and apply the events; returns the record's lsn. After a NeedRoomError nothing was done."""
        # Caller holds self._lock.
        try:
            self._apply(events, now_ms, Place())
        except BaseException as error:
            self._fail(error)
            raise
        return 0

    def _make_room(self, need: NeedRoomError) -> None:
        """After a NeedRoomError, without the lock. Raises DiskFullError."""
        raise AssertionError("memory needs no room made")

    def _settle(self, lsn: int, *, sync: bool = True) -> None:
        """Return when the record has been handed to the operating system and, if `sync`, is as durable as promised."""

    def _settle_enqueues(self, lsn: int) -> None:
        """`_settle` for jobs that are leased. The records of most of them were settled long ago."""

    def _settle_soon(self, lsn: int, tell: Tell) -> bool:
        """Have `tell` called when the record is as durable as promised; False: `_settle` would not wait."""
        # Caller holds self._lock: then close() tells everything that was left here before it.
        return False

    def _payloads(self, entries: Sequence[Entry]) -> list[bytes | None]:
        """The payloads; None for a job that is gone by now."""
        return [entry.payload for entry in entries]

    def _last_lsn(self) -> int:
        """The lsn of the last record."""
        return 0

    # Changing

    def _change(
        self,
        plan: Callable[[int], tuple[list[Event], Any]],
        *,
        keep_reserve: bool = False,
        sync: bool = True,
        once: Once | None = None,
    ) -> Any:
        """Decide, record, apply, and wait until the record is durable (`sync`).

        Returns the answer of `plan`, or the one remembered for `once`.
        """
        while True:
            if self._ended is not None:  # before the lock: in a forked child its holder may not exist
                self._check()
            try:
                with self._lock:
                    now_ms = self._tick()
                    if once is not None:
                        events, answer = self._planned_once(plan, once, now_ms)
                    else:
                        events, answer = plan(now_ms)
                    # Without events the answer may rest on a record that is still on its way to the disk.
                    lsn = self._record(events, now_ms, keep_reserve) if events else self._last_lsn()
                break
            except NeedRoomError as need:
                self._make_room(need)
        self._settle(lsn, sync=sync)
        return answer

    def _planned_once(
        self, plan: Callable[[int], tuple[list[Event], Any]], once: Once, now_ms: int
    ) -> tuple[list[Event], Any]:
        # Caller holds self._lock.
        before = told(self._machine, once, now_ms)
        if before is not None:
            return [], before.answer
        events, answer = plan(now_ms)
        if events:
            events = [*events, called(once, answer)]
        return events, answer

    def _apply(self, events: Sequence[Event], now_ms: int, place: Place) -> None:
        # Caller holds self._lock. It fails the engine on any exception from here, KeyboardInterrupt included: log and
        # machine differ then, or a lessee sleeps that should not.
        machine = self._machine
        for event in events:
            apply(machine, event, now_ms, place)
        if machine.woken:
            self._wake_lessees()
        if machine.wake_ms < self._timer_at_ms:
            self._poke_timer()

    def _poke_timer(self) -> None:
        # Caller holds self._lock. The clock acts earlier than the timer expects; one poke is enough.
        self._timer_at_ms = self._machine.wake_ms
        self._timer_poked.set()

    def _wake_lessees(self, names: Iterable[str] | None = None) -> None:
        # Caller holds self._lock. Without names: the queues that got jobs since the last time.
        machine = self._machine
        if self._lessees.lines:
            without_token = self._lessees.wake(machine, machine.woken if names is None else names)
            if without_token:
                self._expect_tokens(without_token, machine.now_ms)
        if names is None:
            machine.woken.clear()

    def _expect_tokens(self, limited: Sequence[Queue], now_ms: int) -> None:
        # Caller holds self._lock. Lessees wait for these queues: they are woken when there is a token.
        for queue in limited:
            expect_token(self._machine, queue, now_ms)
        if self._machine.wake_ms < self._timer_at_ms:
            self._poke_timer()

    # Looking

    def _look(self, read: Callable[[int], Any]) -> Any:
        self._check()
        with self._lock:
            before = self._last_lsn()
            value = read(self._tick())
            lsn = self._last_lsn()
        if lsn != before:
            self._settle(lsn, sync=False)  # the clock ended some leases
        return value

    # Time

    def _tick(self) -> int:
        # Caller holds self._lock. Every call begins with this: no decision rests on a state that is out of date.
        if self._ended is not None:
            self._check()
        machine = self._machine
        now_ms = self.clock.boot_ms() + self._offset_ms
        if now_ms < machine.now_ms:
            now_ms = machine.now_ms
        if now_ms < machine.wake_ms:
            machine.now_ms = now_ms
            self._behind = False
            return now_ms
        self._advance(now_ms)
        self._needs_room = None
        ended = decide.expiry(machine, now_ms)  # of a storm a part: the timer and the next calls go on with it
        if ended:
            try:
                self._record(ended, now_ms)
            except NeedRoomError as need:
                self._needs_room = need  # these leases end when the timer has made room
                self._timer_poked.set()
            else:
                tally_expired(machine, ended)
                self._advance(now_ms)
        self._behind = machine.wake_ms <= now_ms and self._needs_room is None
        return now_ms

    def _advance(self, now_ms: int) -> None:
        # Caller holds self._lock.
        try:
            advance(self._machine, now_ms)
            if self._machine.woken:
                self._wake_lessees()
        except BaseException as error:
            # No record holds the clock's changes, so a machine that is half changed may not go on.
            self._fail(error)
            raise

    def _run_timer(self) -> None:
        while True:
            self._timer_poked.clear()
            try:
                with self._lock:
                    before = self._last_lsn()
                    now_ms = self._tick()
                    at_ms = next_wakeup_ms(self._machine)
                    self._timer_at_ms = NEVER_MS if at_ms is None else at_ms
                    lsn, need = self._last_lsn(), self._needs_room
                if lsn != before:
                    self._settle(lsn, sync=False)
                has_room = need is None or self._room_for_ends(need)
            except RivetQError:
                return  # closed, failed or forked: no more time here
            except BaseException as error:
                self._fail(error)
                return
            if need is not None:
                if not has_room:
                    self._stopping.wait(ROOM_RETRY_S)
                continue
            timeout_s = None if at_ms is None else self.clock.timeout_s(max(1, at_ms - now_ms))
            self._timer_poked.wait(None if timeout_s is None else min(timeout_s, LONGEST_SLEEP_S))

    def _room_for_ends(self, need: NeedRoomError) -> bool:
        """Make room for the record of ended leases. Returns whether there is room now."""
        try:
            self._make_room(need)
        except DiskFullError:
            return False
        return True

    def _clock_moved(self) -> None:
        """A manual clock jumped: everything due happens now, in the thread that moved it."""
        try:
            self._behind = True
            while self._behind:
                with self._lock:
                    before = self._last_lsn()
                    self._tick()
                    lsn = self._last_lsn()
                    need = self._needs_room
                    self._lessees.wake_all()
                if lsn != before:
                    self._settle(lsn, sync=False)
                if need is not None:
                    self._behind = self._room_for_ends(need)
        except RivetQError:
            return  # the next call tells its caller

    # Ending

    def check_open(self) -> None:
        self._check()

    def _check(self) -> None:
        if self._ended is None:
            return
        if self._ended == "forked":
            raise ForkedBrokerError(
                f"this broker was opened by another process and cannot be used in its forked child {os.getpid()}; "
                f"open a broker of your own, or talk to the parent"
            )
        if self._ended == "closed":
            raise BrokerClosedError("the broker is closed; open it again to go on")
        raise self._failed_error("not_done")

    def _failed_error(self, outcome: Any) -> BrokerFailedError:
        if self._ended == "forked":  # that is the reason
            self._check()
        error = BrokerFailedError(
            f"the broker failed and takes no more calls ({type(self._failure).__name__}: {self._failure}); close it "
            f"and open the directory again, nothing that was answered is lost"
        )
        error.__cause__ = self._failure
        error.outcome = outcome
        return error

    def _fail(self, error: BaseException) -> None:
        """For good: every later call raises BrokerFailedError with this cause. May be called with the lock held."""
        if self._ended is None:
            self._failure = error
            self._ended = "failed"
        self._lessees.wake_all()
        self._timer_poked.set()

    def close(self) -> None:
        if self._ended == "forked":
            return
        with self._close_lock:
            with self._lock:
                if self._finished:
                    return
                self._ended = "closed"
                self._lessees.wake_all()
            unsubscribe, self._unsubscribe = self._unsubscribe, _nothing
            unsubscribe()
            self._stopping.set()
            self._timer_poked.set()
            with self._soon_lock:
                soon = self._soon
            if soon is not None:
                soon.stop()
            self._stop()
            for thread in self._threads:
                if thread is not threading.current_thread() and thread.is_alive():
                    thread.join(JOIN_S)
            # Not after a failure, nor a second time: the first may have been cut short in the middle, by Ctrl-C say.
            save, self._saving = self._failure is None and not self._saving, True
            self._finish(save)
            _live.discard(self)
            self._finished = True

    def _stop(self) -> None:
        """Tell further threads to end."""

    def _finish(self, save: bool) -> None:
        """Save, and let go of what the threads used; they have ended."""

    def forked(self) -> None:
        """In the child: no call works any more. Locks are made anew, since their holders do not exist here."""
        self._ended = "forked"
        self._lock, self._close_lock, self._soon_lock = threading.Lock(), threading.Lock(), threading.Lock()
        self._timer_poked, self._stopping = threading.Event(), threading.Event()
        # The call that the forking thread was in goes on here, too; if it is about to wait, no thread would wake it.
        for line in self._lessees.lines.values():
            for lessee in line:
                if isinstance(lessee, SleepingLessee):
                    lessee.wake()
        if self._soon is not None:
            self._soon.forked()

    def health(self) -> Health:
        if self._ended is None:
            return self._vitals()
        failure = self._failure
        state: Any = self._ended
        return Health(state=state, last_error=None if failure is None else f"{type(failure).__name__}: {failure}")

    def _vitals(self) -> Health:
        """The health of an open engine."""
        return Health(state="open")

    # For tests: everything, while the threads of the engine stand still

    def dump(self) -> dict[str, Any]:
        """The machine's whole state in canonical order."""
        with self._lock:
            return dump(self._machine)

    def audit(self) -> None:
        """See `machine.check`."""
        with self._lock:
            check(self._machine)


_live: weakref.WeakSet[Clockwork] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for engine in list(_live):
        engine.forked()


def _nothing() -> None:
    """In place of what was done already."""


def _ahead_ms(clock: Clock, offset_ms: int, now_ms: int) -> int:
    """How far the wall clock is ahead of the time line, which has seen `now_ms`.

    No method: the machine would keep its engine alive.
    """
    boot_ms, wall_ms = read_together(clock)
    return wall_ms - max(boot_ms + offset_ms, now_ms)


def give_turn() -> None:
    """Let others take the lock that was just let go."""
    time.sleep(TURN_S)


def timeless(read: Callable[[], Any], now_ms: int) -> Any:
    """For `_look`: what does not depend on the time."""
    return read()


os.register_at_fork(after_in_child=_after_fork_in_child)
