"""Leasing: taking jobs now, or waiting for a first one, in a thread or without."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import attrs

from ..engine import Done, Grant, Take
from ..errors import RivetQError, UsageError
from ..machine import decide
from ..machine.entry import Entry
from ..machine.events import Event, Leased, Took
from ..machine.sessions import called, told
from .clockwork import NeedRoomError, give_turn
from .lessees import Lessee, SleepingLessee
from .looking import LookingEngine

PART_LEASES = 5000
"""The most jobs that one record of a lease takes, so that other calls get their turn in between."""
_Taken = tuple[int, int, Leased, list[Entry], list[str | None]]
"""Jobs that were leased and not handed out yet: the lsn, the moment and the event of the lease; the jobs, and their
last errors at that moment."""
_grant: Callable[[tuple[Any, ...]], Grant] = partial(tuple.__new__, Grant)  # a third of the time of a call of the class


class LeasingEngine(LookingEngine):
    """Hands out leases."""

    def _take(self, request: Take) -> list[Grant]:
        if not request.begun:
            self._ready_for_unbegun()
        if request.wait_ms == 0:
            taken = self._take_now(request)
            if taken is not None and request.max_jobs <= PART_LEASES:
                return self._hand_out(taken)
            return [] if taken is None else self._hand_out_all(request, taken)
        lessee = SleepingLessee()
        try:
            taken = self._wait_for_jobs(request, lessee)
        except BaseException:
            if self._ended is None:
                with self._lock:  # a KeyboardInterrupt may come just as it is woken: pass the wake-up on
                    self._lessees.remove(lessee, request.queues)
                    self._wake_lessees(request.queues)
            raise
        return [] if taken is None else self._hand_out_all(request, taken)

    def _take_soon(self, request: Take, done: Done) -> SoonLease:
        self._check()
        self._notifier.start()
        if not request.begun:
            self._ready_for_unbegun()
        found = SoonLease(self, request, done)
        found.look()
        if self._ended == "forked":  # forked meanwhile: the child has no thread that could tell
            self._check()
        return found

    def begin(self, token: int) -> None:
        """Nothing to do: leases in memory end with the process, so no opening asks whether they began."""
        if self._ended is not None:
            self._check()

    def _ready_for_unbegun(self) -> None:
        """Get from the disk what `_note_unbegun` needs."""

    def _forget_unbegun(self, event: Leased) -> None:
        """The record of these leases could not be made."""

    def _note_unbegun(self, event: Leased) -> None:
        """Note that these leases are taken in advance. With files, an opening after a crash will know it."""

    def _take_now(self, request: Take, *, one_at_least: bool = True) -> _Taken | None:
        while True:
            if self._ended is not None:
                self._check()
            try:
                return self._attempt(request, None, False, one_at_least)
            except NeedRoomError as need:
                self._make_room(need)

    def _wait_for_jobs(self, request: Take, lessee: SleepingLessee) -> _Taken | None:
        """Lease, waiting for a first job; None when the time is over."""
        until = None if request.wait_ms is None else time.monotonic() + request.wait_ms / 1000
        while True:
            if self._ended is not None:
                self._check()
            timeout_s = None if until is None else until - time.monotonic()
            over = timeout_s is not None and timeout_s <= 0
            try:
                taken = self._attempt(request, lessee, waits=not over)
            except NeedRoomError as need:
                self._make_room(need)
                continue
            if taken is not None or over:
                return taken
            if self._ended is None:  # else the engine may have woken all lessees before this one was in the line
                lessee.park(timeout_s)

    def _attempt(self, request: Take, lessee: Lessee | None, waits: bool, one_at_least: bool = True) -> _Taken | None:
        """Look for jobs once. A lessee that finds nothing and `waits` is woken from now on, in order of arrival."""
        machine, queues, begun = self._machine, request.queues, request.begun
        with self._lock:
            if lessee is not None:
                if lessee.over:
                    return None
                lessee.reset()
            now_ms = self._tick()
            once = request.once
            if once is not None and (before := told(machine, once, now_ms)) is not None:
                if not isinstance(before.answer, Took):
                    raise UsageError(f"session {once.session}: request {once.number} was no lease")
                return self._granted_before(request, lessee, before.answer, now_ms)
            most = request.max_jobs if request.max_jobs < PART_LEASES else PART_LEASES
            event, limited = decide.lease(
                machine, queues, most, request.visibility_ms, now_ms, request.max_bytes, one_at_least
            )
            if event is None:
                for queue in limited:
                    queue.limited += 1
                if lessee is not None:
                    if waits:
                        self._lessees.add(lessee, queues)  # it keeps its place in the line
                        self._expect_tokens(limited, now_ms)
                    else:
                        self._lessees.remove(lessee, queues)
                return None
            try:
                if not begun:
                    self._note_unbegun(event)  # first: after a crash behind the record the note must be there
                events: list[Event] = [event]
                if once is not None:
                    events.append(called(once, Took(event.ids, event.tokens)))
                lsn = self._record(events, now_ms)
            except BaseException:
                if not begun:
                    self._forget_unbegun(event)  # these tokens may go to other leases
                raise
            if lessee is not None:
                self._lessees.remove(lessee, queues)
                lessee.over = True
            entries = [machine.jobs[job_id] for job_id in event.ids]
            if self._lessees.lines:
                self._wake_lessees(queues)  # this one may have been woken for another of its queues
            return lsn, now_ms, event, entries, [entry.last_error for entry in entries]

    def _granted_before(self, request: Take, lessee: Lessee | None, took: Took, now_ms: int) -> _Taken:
        # Caller holds self._lock. The leases that the same request took before, as far as they are in force.
        entries = [self._machine.jobs[job_id] for job_id in took.ids]
        deadlines = [entry.deadline_ms for entry in entries]
        event = Leased(took.ids, took.tokens, [entry.attempts for entry in entries], deadlines)
        if lessee is not None:
            self._lessees.remove(lessee, request.queues)
            lessee.over = True
            if self._lessees.lines:
                self._wake_lessees(request.queues)  # it may have been woken for a job that another can have
        return self._last_lsn(), now_ms, event, entries, [entry.last_error for entry in entries]

    def _hand_out_all(self, request: Take, taken: _Taken) -> list[Grant]:
        """Hand out what was taken. The rest of a large lease is taken in parts, so that other calls get their turn."""
        grants = self._hand_out(taken)
        if request.max_jobs <= PART_LEASES or request.once is not None:
            return grants
        part, left_bytes = len(taken[3]), request.max_bytes
        try:
            while part == PART_LEASES and len(grants) < request.max_jobs:
                if left_bytes is not None:
                    left_bytes -= sum(entry.length for entry in taken[3])
                give_turn()
                rest = attrs.evolve(request, max_jobs=request.max_jobs - len(grants), wait_ms=0, max_bytes=left_bytes)
                more = self._take_now(rest, one_at_least=False)
                if more is None:
                    break
                taken, part = more, len(more[3])
                grants += self._hand_out(taken)
        except RivetQError:
            pass  # the jobs that were leased before are handed out
        return grants

    def _hand_out(self, taken: _Taken) -> list[Grant]:
        lsn, at_ms, event, entries, errors = taken
        self._settle(lsn, sync=False)
        payloads = self._payloads(entries)
        # With a sync in every call nothing is handed out that a power cut could still take back.
        self._settle_enqueues(max([entry.lsn for entry in entries], default=0))
        now_ms = self.clock.boot_ms() + self._offset_ms
        # The event has the values that may have changed since. No payload: the lease ended while it was read.
        return [
            _grant((
                entry.id, entry.queue.name, payload, entry.spec.headers, entry.spec.priority, attempt, token,
                deadline_ms, deadline_ms - now_ms if deadline_ms > now_ms else 0, deadline_ms - at_ms,
                entry.enqueued_at_ms, entry.spec.max_attempts, error,
            ))
            for entry, payload, attempt, token, deadline_ms, error in zip(
                entries, payloads, event.attempts, event.tokens, event.deadlines_ms, errors, strict=True
            )
            if payload is not None
        ]  # fmt: skip


class SoonLease:
    """A lessee without a thread: it looks again when it is woken, in the notifier's thread."""

    __slots__ = ("_done", "_engine", "_request", "_told", "_woken", "over")

    def __init__(self, engine: LeasingEngine, request: Take, done: Done) -> None:
        self._engine = engine
        self._request = request
        self._done = done
        self._woken = False  # guarded by the engine's lock, as is `over`
        self.over = False  # it has leased, failed or been cancelled
        self._told = False  # its caller was told, or wants to be told no more

    def wake(self) -> None:
        # Caller holds the engine's lock.
        if not self._woken:
            self._engine._notifier.call(self.look)
            self._woken = True  # last: an exception in between costs a second look, not the only one

    def reset(self) -> None:
        # Caller holds the engine's lock and is about to look at the state: no wake-up is lost.
        self._woken = False

    def cancel(self, done: Callable[[bool], None]) -> None:
        done(self._cancel())

    def _cancel(self) -> bool:
        engine = self._engine
        if engine._ended == "forked":
            engine._check()
        with engine._lock:
            if self.over:
                return False
            self.over = self._told = True
            engine._lessees.remove(self, self._request.queues)
            engine._wake_lessees(self._request.queues)  # it may have been woken for a job that another can have
        return True

    def abandon(self, unwanted: Callable[[], None]) -> None:
        def give_up() -> None:
            if not self._cancel():
                unwanted()

        self._engine._notifier.call(give_up)

    def look(self) -> None:
        """Take jobs and tell the caller, or wait to be woken. An exception in here is told, too."""
        try:
            taken = self._attempt()
            if taken is not None:
                self._hand_out(taken)
            elif self._engine._ended is not None:  # perhaps before this one was in the line, and so it was not woken
                self._engine._check()
        except BaseException as error:
            self._end(error)
            if not isinstance(error, Exception):  # Ctrl-C in the caller's own thread
                raise

    def _attempt(self) -> _Taken | None:
        engine = self._engine
        while True:
            engine._check()
            try:
                return engine._attempt(self._request, self, waits=True)
            except NeedRoomError as need:
                # Here, not in the notifier's thread: a caller that does not wait must not be told that there is no job.
                engine._make_room(need)

    def _end(self, error: BaseException) -> None:
        """End with this error. Jobs that it took meanwhile stay leased until their deadline."""
        engine = self._engine
        with engine._lock:
            self.over = True
            engine._lessees.remove(self, self._request.queues)
            if engine._ended is None:
                engine._wake_lessees(self._request.queues)  # it may have been woken for a job that another can have
        self._tell(None, error)

    def _tell(self, grants: list[Grant] | None, error: BaseException | None) -> None:
        if self._told:
            return
        try:
            self._told = True
            self._done(grants, error)
        except (MemoryError, KeyboardInterrupt):
            self._told = True
            self._done(grants, error)  # once more: it may have come before the caller was told
            raise

    def _hand_out(self, taken: _Taken) -> None:
        """Tell the caller at once if no wait is needed, else from the notifier's thread."""
        engine, entries = self._engine, taken[3]

        def tell(error: BaseException | None) -> None:
            grants = None
            if error is None:
                try:
                    grants = engine._hand_out_all(self._request, taken)
                except BaseException as failure:
                    error = failure
            self._tell(grants, error)

        with engine._lock:
            # If the engine ended since the jobs were taken, the notifier may be gone: nothing may be left with it.
            is_open = engine._ended is None
            if is_open and engine._settle_soon(max((entry.lsn for entry in entries), default=0), tell):
                return
            if is_open and (len(entries) == PART_LEASES or any(entry.payload is None for entry in entries)):
                engine._notifier.call(partial(tell, None))  # payloads are read from the disk, or more jobs are taken
                return
        try:
            engine._check()
        except RivetQError as error:
            self._tell(None, error)
        else:
            tell(None)
