"""A running machine: the engine that lives in this process, with lock, clock, timer and waiting lessees; no files.

`MemoryEngine` is this as it is. `LocalEngine` adds the log behind the five methods marked "with files".

One call goes like this: take the lock, let the clock act, decide, record, apply, wake who waits; drop the lock; wait
until the record is safe. Everything under the lock takes microseconds and never waits for a disk or calls user code.
"""

from __future__ import annotations

import heapq
import os
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from functools import partial
from typing import Any

from ..clock import Clock, read_together
from ..engine import Backup, Capabilities, Done, Enqueue, Operation
from ..errors import (
    BrokerClosedError,
    BrokerFailedError,
    DiskFullError,
    ForkedBrokerError,
    RateLimitedError,
    RivetQError,
    UsageError,
)
from ..histogram import Histogram
from ..machine import decide
from ..machine.entry import Entry
from ..machine.events import Event, Leased, Purged, Redriven
from ..machine.machine import RUNS_AT_ONCE, Machine
from ..machine.queue import DEAD, NEVER_MS, READY, SCHEDULED, STATES, Queue
from ..machine.run import Run
from ..machine.snapshot import Place
from ..model import Deliveries, Health, Job, JobState, Lease, QueueConfig, QueueStats, Settler, moment
from .notifier import Notifier, Tell

_LONGEST_SLEEP_S = 3600.0
ROOM_RETRY_S = 1.0
"""After the disk had no space for the record of ended leases."""
EXPIRY_ROUNDS = 4
"""Records of ended leases that one call writes at most: a storm of them is shared among the calls and the timer."""
FEW_SCHEDULED, MANY_JOBS, TURN_S = 8000, 500, 0.0001
"""Scheduled jobs that are listed under one hold of the lock; and after a part of a change with so many jobs, the time
for others to take it: a thread that takes a lock again at once gets it before those who wait."""
JOIN_S = 2.0
"""How long close() waits for one of its threads: far longer than a slice of their work takes."""


class NeedRoomError(Exception):
    """Internal: the record does not fit into the space that is ready; make room outside the lock and decide again."""

    def __init__(self, body_length: int, snapshot_length: int | None, keep_reserve: bool) -> None:
        super().__init__(body_length)
        self.body_length = body_length
        self.snapshot_length = snapshot_length
        self.keep_reserve = keep_reserve


class _Lessee:
    """A thread that waits for a first job. A bare lock, free when it was woken: half the work of an Event."""

    __slots__ = ("_asleep", "over")

    def __init__(self) -> None:
        self.over = False  # guarded by the engine's lock: it has taken jobs, or wants none any more
        self._asleep = threading.Lock()
        self._asleep.acquire()

    def wake(self) -> None:
        with suppress(RuntimeError):  # it was woken before
            self._asleep.release()

    def park(self, timeout_s: float | None) -> None:
        self._asleep.acquire(timeout=_LONGEST_SLEEP_S if timeout_s is None else min(timeout_s, _LONGEST_SLEEP_S))

    def reset(self) -> None:
        # Caller holds the engine's lock and is about to look at the state: no wake-up is lost.
        self._asleep.acquire(blocking=False)


_Told = tuple[Entry, dict[str, Any]]
"""A job as it was at a moment, and what `jobs` tells of it but for the payload."""
_Taken = tuple[int, int, Leased, list[Entry], list[str | None]]
"""The lsn of a lease, its moment, its event, its jobs and their last errors."""


class LiveEngine:
    """The machine behind a lock.

    Args:
        machine: its state.
        clock: where time comes from.
        now_ms: a moment of the time line.
        boot_ms: the boot-time clock at that moment.
    """

    capabilities = Capabilities(durable=False, shared=False, strict_order=True)

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
        self._lessees: dict[str, dict[_Lessee | SoonLease, None]] = {}  # by queue, in order of arrival
        self._behind = False  # the last tick left something for the next
        self._needs_room: NeedRoomError | None = None  # the record of ended leases did; the timer makes it
        self._timer_at_ms = NEVER_MS  # when the timer thread wakes by itself, or was told to look
        self._timer_poked = threading.Event()
        self._stopping = threading.Event()  # close() has begun
        self._close_lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._unsubscribe: Callable[[], None] = _nothing
        self._soon: Notifier | None = None  # made when it is needed: it refers to the engine, and most live without
        self._soon_lock = threading.Lock()
        _live.add(self)

    @property
    def _notifier(self) -> Notifier:
        found = self._soon
        if found is None:
            with self._soon_lock:
                self._check()  # close() ends the one that is there; none comes after it
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

    def _prepare(self, events: Sequence[Event], now_ms: int, keep_reserve: bool) -> Any:
        """What `_append` needs. Changes nothing; may raise NeedRoomError."""
        return None

    def _append(self, prepared: Any, now_ms: int) -> Place:
        """Put the record into the log's buffer; its place."""
        return Place()

    def _make_room(self, need: NeedRoomError) -> None:
        """After a NeedRoomError, without the lock. Raises DiskFullError."""
        raise AssertionError("memory needs no room made")

    def _settle(self, lsn: int, *, sync: bool = True) -> None:
        """Return when the record has been handed to the operating system and, if `sync`, is as durable as promised."""

    def _settle_reservation(self) -> None:
        """Return when the last reservation of ids is on disk: it may be another caller's, on its way there."""

    def _settle_soon(self, lsn: int, tell: Tell) -> bool:
        """Leave `tell` to be called when the record is as durable as promised; False: `_settle` does not wait."""
        # Caller holds self._lock: whoever closes the engine tells all who came before.
        return False

    def _payloads(self, entries: Sequence[Entry]) -> list[bytes | None]:
        """The payloads; None for a job that is gone by now."""
        return [entry.payload for entry in entries]

    # Changing

    def commit(self, operations: Sequence[Operation]) -> list[Any]:
        enqueues = Enqueue in map(type, operations)
        if enqueues and self._lessees:
            self._check()  # before the lock, as in _change
            self._wake_early(operations)
        answers: list[Any] = self._change(partial(decide.commit, self._machine, operations), keep_reserve=enqueues)
        return answers

    def commit_soon(self, operations: Sequence[Operation], done: Done) -> None:
        self._check()
        self._notifier.start()  # first: nothing is done yet if there can be no thread
        enqueues = Enqueue in map(type, operations)

        def commit() -> None:
            try:
                answers = self.commit(operations)
            except BaseException as error:
                done(None, error)
            else:
                done(answers, None)

        with self._lock:
            now_ms = self._tick()
            try:
                events, answers = self._planned(partial(decide.commit, self._machine, operations), now_ms)
                lsn = self._record(events, now_ms, enqueues) if events else self._last_lsn()
            except NeedRoomError:
                self._notifier.call(commit)  # room is made by the disk
                return
            if self._settle_soon(lsn, lambda error: done(None, error) if error else done(answers, None)):
                return
        self._settle(lsn)
        done(answers, None)

    def _planned(self, plan: Callable[[int], tuple[list[Event], Any]], now_ms: int) -> tuple[list[Event], Any]:
        # Caller holds self._lock.
        try:
            return plan(now_ms)
        except RateLimitedError as error:
            self._machine.queues[error.queue].limited += 1
            raise

    def _change(
        self, plan: Callable[[int], tuple[list[Event], Any]], *, keep_reserve: bool = False, sync: bool = True
    ) -> Any:
        """Decide, record, apply, and wait until it is durable (`sync`); the answer of `plan`."""
        while True:
            if self._ended is not None:  # before the lock: in a forked child its holder may not exist
                self._check()
            try:
                with self._lock:
                    now_ms = self._tick()
                    events, answer = self._planned(plan, now_ms)
                    # Without events the answer may rest on a record that is still on its way to the disk.
                    lsn = self._record(events, now_ms, keep_reserve) if events else self._last_lsn()
                break
            except NeedRoomError as need:
                self._make_room(need)
        self._settle(lsn, sync=sync)
        return answer

    def _last_lsn(self) -> int:
        """The lsn of the last record."""
        return 0

    def _record(self, events: Sequence[Event], now_ms: int, keep_reserve: bool = False) -> int:
        # Caller holds self._lock.
        machine = self._machine
        prepared = self._prepare(events, now_ms, keep_reserve)
        try:
            place = self._append(prepared, now_ms)
            for event in events:
                machine.apply(event, now_ms, place)
            if machine.woken:
                self._wake_lessees()
            if machine.wake_ms < self._timer_at_ms:
                self._poke_timer()
        except BaseException as error:
            # Log and machine may differ now, or a lessee sleeps that should not. That goes for any exception,
            # KeyboardInterrupt included: no call may go on from here.
            self._fail(error)
            raise
        return place.lsn

    def _poke_timer(self) -> None:
        # Caller holds self._lock. The clock acts earlier than the timer thinks; one poke is enough.
        self._timer_at_ms = self._machine.wake_ms
        self._timer_poked.set()

    def check(self, operation: Operation) -> list[int | None]:
        ids: list[int | None] = self._look(lambda now_ms: decide.check(self._machine, operation, now_ms))
        return ids

    def reserve(self, count: int) -> int:
        def plan(now_ms: int) -> tuple[list[Event], None]:
            event = decide.ids(self._machine, count, ID_BLOCK)
            return ([] if event is None else [event]), None

        while True:
            with self._lock:
                self._check()
                if decide.ids(self._machine, count, 0) is None:
                    first_id = self._machine.take_ids(count)
                    break
            self._change(plan)  # once in a thousand ids; another caller may take them first
        self._settle_reservation()
        return first_id

    def unreserve(self, first_id: int) -> None:
        self._machine.promised.pop(first_id, None)  # atomic: no lock is needed

    def configure(self, queue: str, changes: Mapping[str, Any]) -> QueueConfig:
        self._change(lambda now_ms: (decide.configure(self._machine, queue, changes), None))
        return self.config(queue)

    def purge(self, queue: str, state: JobState | None) -> int:
        machine = self._machine
        below_id: int | None = None

        def plan(step: int, done: int) -> Purged | None:
            nonlocal below_id
            below_id = machine.next_id if below_id is None else below_id  # what comes later stays
            return decide.purge(machine, queue, _number(state), below_id)

        return self._change_parts(plan)

    def _change_parts(self, plan: Callable[[int, int], Purged | Redriven | None], steps: int | None = None) -> int:
        """Change many jobs, some in each record, and let others have the lock in between; how many.

        Args:
            plan: the part of this step, after so many have been changed; None: there is none.
            steps: how many there are; without, it ends with the first that has none.
        """
        step = count = 0

        def part(now_ms: int) -> tuple[list[Event], int]:
            event = plan(step, count)
            return ([], 0) if event is None else ([event], len(event.ids))

        try:
            while step != steps:
                changed = self._change(part, sync=False)
                if not changed and steps is None:
                    break
                step, count = step + 1, count + changed
                if changed > MANY_JOBS:
                    give_turn()
            self._change(lambda now_ms: ([], None))  # it waits until all of it is durable
        except RivetQError as error:
            if count:
                error.outcome = "unknown"  # a part was done
            raise
        return count

    def cancel(self, job_id: int) -> bool:
        def plan(now_ms: int) -> tuple[list[Event], bool]:
            event = decide.cancel(self._machine, job_id)
            return ([], False) if event is None else ([event], True)

        done: bool = self._change(plan)
        return done

    def redrive(self, queue: str, job_ids: Sequence[int] | None, limit: int | None) -> int:
        machine, most = self._machine, decide.PART_JOBS
        ids = None if job_ids is None else sorted(set(job_ids))
        dead = self.stats(queue).dead
        if (dead if ids is None else len(ids)) <= most:

            def plan(now_ms: int) -> tuple[list[Event], int]:
                event = decide.redrive(machine, queue, ids, limit)
                return ([], 0) if event is None else ([event], len(event.ids))

            count: int = self._change(plan)
            return count
        if ids is None and (limit is None or limit >= dead):
            # No more than there were: a job that dies again meanwhile is not brought back for ever.
            return self._change_parts(lambda _, done: decide.redrive_some(machine, queue, None, dead - done))
        if ids is None:
            ids = [job_id for job_id, _ in self._lowest(queue, DEAD, 0, limit or 0)]
        else:
            for start in range(0, len(ids), most):  # all of them first: nothing is changed if one is none
                part = ids[start : start + most]
                self._look(partial(_timeless, partial(decide.redrive, machine, queue, part, None)))
            ids = ids[:limit]
        parts = [ids[start : start + most] for start in range(0, len(ids), most)]
        return self._change_parts(lambda step, _: decide.redrive_some(machine, queue, parts[step], most), len(parts))

    def _lowest(
        self, name: str, state: int, after: int, limit: int, *, in_runs: bool = True
    ) -> list[tuple[int, Run | None]]:
        """The lowest ids above `after` of jobs that wait in a state, each with its run, if it is in one.

        However many there are, other calls go on: it is read in parts. So it need not be what was there at one moment.
        """
        machine = self._machine

        def begin(now_ms: int) -> tuple[list[tuple[int, Run | None]], list[Run]]:
            queue = machine.queues.get(name)
            windows = [] if queue is None else machine.waiting[queue.number].windows(state)
            loose = [key[1] if window.by_due else key for window in windows for key in window.loose]
            return [(i, None) for i in loose if i > after], [run for each in windows for run in each.runs if in_runs]

        found, runs = self._look(begin)
        below = NEVER_MS  # as large as any id
        for start in range(0, len(runs), RUNS_AT_ONCE):
            if len(found) >= limit:
                found = heapq.nsmallest(limit, found, key=_first)
                below = found[-1][0] if found else 0
            part = runs[start : start + RUNS_AT_ONCE]
            found += self._look(partial(_timeless, partial(machine.ids_in, part, after, below)))
        return heapq.nsmallest(limit, found, key=_first)

    def remove_queue(self, queue: str) -> bool:
        def plan(now_ms: int) -> tuple[list[Event], bool]:
            event = decide.remove_queue(self._machine, queue, now_ms)
            return ([], False) if event is None else ([event], True)

        done: bool = self._change(plan)
        return done

    # Leasing

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
        lessee = None if wait_s == 0 else _Lessee()
        if not begun:
            self._ready_for_unbegun()
        try:
            taken = self._take(queues, max_jobs, visibility_ms, wait_s, lessee, begun=begun, max_bytes=max_bytes)
        except BaseException:
            if lessee is not None and self._ended is None:
                with self._lock:  # KeyboardInterrupt, just when it was woken: hand the wake-up on
                    self._unregister(lessee, queues)
                    self._wake_lessees(queues)
            raise
        return [] if taken is None else self._hand_out(*taken, settler)

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
    ) -> SoonLease:
        self._check()
        self._notifier.start()
        if not begun:
            self._ready_for_unbegun()
        found = SoonLease(self, queues, max_jobs, visibility_ms, settler, done, begun=begun, max_bytes=max_bytes)
        found.look()
        if self._ended == "forked":  # meanwhile: in the child there is no thread to tell
            self._check()
        return found

    def begin(self, token: int) -> None:
        """What is leased in memory ends with the process, so no opening asks for it."""
        if self._ended is not None:
            self._check()

    def _ready_for_unbegun(self) -> None:
        """What `_note_unbegun` needs from the disk."""

    def _forget_unbegun(self, event: Leased) -> None:
        """The record of these leases could not be made."""

    def _note_unbegun(self, event: Leased) -> None:
        """These leases are taken in advance: with files, an opening after a crash will know."""
        # Caller holds self._lock.

    def _take(
        self,
        queues: Sequence[str],
        max_jobs: int,
        visibility_ms: int | None,
        wait_s: float | None,
        lessee: _Lessee | None,
        *,
        begun: bool,
        max_bytes: int | None,
    ) -> _Taken | None:
        """Lease, waiting for a first job; None when the time is over."""
        until = time.monotonic() + wait_s if wait_s else None
        while True:
            if self._ended is not None:
                self._check()
            timeout_s = until - time.monotonic() if until is not None else wait_s
            over = timeout_s is not None and timeout_s <= 0
            try:
                taken = self._attempt(
                    queues, max_jobs, visibility_ms, lessee, waits=not over, begun=begun, max_bytes=max_bytes
                )
            except NeedRoomError as need:
                self._make_room(need)
                continue
            if taken is not None or over:
                return taken
            if self._ended is None:  # else whoever ended it may have looked for lessees before this one was there
                assert lessee is not None
                lessee.park(timeout_s)

    def _attempt(
        self,
        queues: Sequence[str],
        max_jobs: int,
        visibility_ms: int | None,
        lessee: _Lessee | SoonLease | None,
        *,
        waits: bool,
        begun: bool,
        max_bytes: int | None,
    ) -> _Taken | None:
        """Look for jobs once. A lessee that finds nothing and `waits` is woken from now on, in order of arrival."""
        machine = self._machine
        with self._lock:
            if lessee is not None:
                if lessee.over:
                    return None
                lessee.reset()
            now_ms = self._tick()
            event, limited = decide.lease(machine, queues, max_jobs, visibility_ms, now_ms, max_bytes)
            if event is None:
                for queue in limited:
                    queue.limited += 1
                if lessee is not None:
                    if waits:
                        self._register(lessee, queues)  # it keeps its place in the line
                        self._expect_tokens(limited, now_ms)
                    else:
                        self._unregister(lessee, queues)
                return None
            try:
                if not begun:
                    self._note_unbegun(event)  # first: a crash behind the record finds it
                lsn = self._record([event], now_ms)
            except BaseException:
                if not begun:
                    self._forget_unbegun(event)  # these tokens may go to other leases
                raise
            if lessee is not None:
                self._unregister(lessee, queues)
                lessee.over = True
            entries = [machine.jobs[job_id] for job_id in event.ids]
            if self._lessees:
                self._wake_lessees(queues)  # this one may have been woken for another of its queues
            return lsn, now_ms, event, entries, [entry.last_error for entry in entries]

    def _expect_tokens(self, limited: Sequence[Queue], now_ms: int) -> None:
        # Caller holds self._lock. Lessees wait for these queues: they are woken when there is a token.
        for queue in limited:
            self._machine.expect_token(queue, now_ms)
        if self._machine.wake_ms < self._timer_at_ms:
            self._poke_timer()

    def _hand_out(
        self, lsn: int, at_ms: int, event: Leased, entries: list[Entry], errors: list[str | None], settler: Settler
    ) -> list[Lease]:
        self._settle(lsn, sync=False)
        at = moment if len(entries) == 1 else _Moments().__getitem__  # in a batch most moments are the same
        # What may have changed since is taken from the event. No payload: the lease ended while it was read.
        leases = [
            Lease(
                id=entry.id,
                queue=entry.queue.name,
                payload=payload,
                headers=entry.spec.headers,
                priority=entry.spec.priority,
                attempt=attempt,
                token=token,
                deadline=at(deadline_ms),
                granted=(deadline_ms - at_ms) / 1000,
                enqueued_at=at(entry.enqueued_at_ms),
                max_attempts=entry.spec.max_attempts,
                last_error=error,
                broker=settler,
            )
            for entry, payload, attempt, token, deadline_ms, error in zip(
                entries, self._payloads(entries), event.attempts, event.tokens, event.deadlines_ms, errors, strict=True
            )
            if payload is not None
        ]
        # With a sync in every call nothing is handed out that a power cut could still take back.
        self._settle(max([entry.lsn for entry in entries]))
        return leases

    def _register(self, lessee: _Lessee | SoonLease, queues: Sequence[str]) -> None:
        # Caller holds self._lock.
        for name in queues:
            self._lessees.setdefault(name, {})[lessee] = None

    def _unregister(self, lessee: _Lessee | SoonLease, queues: Sequence[str]) -> None:
        # Caller holds self._lock.
        for name in queues:
            waiting = self._lessees.get(name)
            if waiting is not None:
                waiting.pop(lessee, None)
                if not waiting:
                    del self._lessees[name]

    def _wake_early(self, operations: Sequence[Operation]) -> None:
        """Who waits for what is about to come gets up meanwhile: that takes longer than the enqueue itself.

        Nothing rests on it. Whoever is too early waits again, and is woken again when the jobs are there.
        """
        with self._lock:
            for operation in operations:
                if isinstance(operation, Enqueue) and (waiting := self._lessees.get(operation.queue)):
                    queue = self._machine.queues.get(operation.queue)
                    if queue is None or not queue.config.paused:
                        for lessee in list(waiting)[: len(operation.payloads)]:
                            lessee.wake()

    def _wake_lessees(self, names: Sequence[str] | None = None) -> None:
        # Caller holds self._lock. As many as there are jobs that may be taken: no lessee is woken in vain, and none is
        # forgotten.
        machine = self._machine
        if self._lessees:
            for name in machine.woken if names is None else names:
                waiting, queue = self._lessees.get(name), machine.queues.get(name)
                if not waiting or queue is None or queue.config.paused or not queue.counts[READY]:
                    continue
                count = queue.counts[READY]
                if queue.bucket is not None and queue.bucket.limit.on == "lease":
                    count = min(count, queue.bucket.available(machine.now_ms))
                for lessee in list(waiting)[:count]:
                    lessee.wake()
                if not count:  # else those who are woken take the tokens first, and come here
                    self._expect_tokens([queue], machine.now_ms)
        if names is None:
            machine.woken.clear()

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

    def get(self, job_id: int) -> Job | None:
        def read(now_ms: int) -> list[tuple[Entry, dict[str, Any]]]:
            entry = self._machine.look(job_id)
            return [] if entry is None else [(entry, _view(entry))]

        found = self._with_payloads(self._look(read))
        return found[0] if found else None

    def jobs(self, queue: str, state: JobState | None, after: int, limit: int, *, payloads: bool = True) -> list[Job]:
        found = self._listing(queue, state, after, limit)
        return self._with_payloads(found) if payloads else [Job(payload=b"", **view) for _, view in found]

    def _listing(
        self, queue: str, state: JobState | None, after: int, limit: int
    ) -> list[tuple[Entry, dict[str, Any]]]:
        """What `jobs` tells of each but for the payload. A long one is read in parts: other calls do not wait long."""
        machine, number = self._machine, _number(state)
        apart = number in (None, SCHEDULED) and self.stats(queue).scheduled > FEW_SCHEDULED
        found = self._scheduled(queue, after, limit) if apart else {}
        first, left = after, 0 if apart and number == SCHEDULED else limit
        while left:
            count = min(left, decide.PART_JOBS)

            def read(now_ms: int, after: int = first, count: int = count) -> list[_Told]:
                entries = machine.listing(queue, number, after, count, by_due=not apart)
                return [(entry, _view(entry)) for entry in entries]

            part = self._look(read)
            found.update((entry.id, (entry, view)) for entry, view in part)
            if len(part) < count:
                break
            left, first = left - count, part[-1][0].id
        if apart and number is None:  # those that came back meanwhile, whose turn among the others had not come
            found = self._scheduled(queue, after, limit, in_runs=False) | found
        return [found[i] for i in sorted(found)[:limit]]

    def _scheduled(self, name: str, after: int, limit: int, *, in_runs: bool = True) -> dict[int, _Told]:
        """The scheduled jobs with the lowest ids, of many that are in order of their due moments."""
        machine = self._machine
        places: dict[Run | None, list[int]] = {}
        for job_id, run in self._lowest(name, SCHEDULED, after, limit, in_runs=in_runs):
            places.setdefault(run, []).append(job_id)
        found: dict[int, _Told] = {}
        for place, ids in places.items():
            for start in range(0, len(ids), decide.PART_JOBS):

                def read(
                    now_ms: int, run: Run | None = place, part: Sequence[int] = ids[start:][: decide.PART_JOBS]
                ) -> list[_Told]:
                    entries = machine.listed(name, run, part)
                    return [(entry, _view(entry)) for entry in entries if entry.state == SCHEDULED]

                found.update((entry.id, (entry, view)) for entry, view in self._look(read))
        return found

    def _with_payloads(self, found: list[tuple[Entry, dict[str, Any]]]) -> list[Job]:
        payloads = self._payloads([entry for entry, _ in found])
        return [Job(payload=p, **view) for p, (_, view) in zip(payloads, found, strict=True) if p is not None]

    def find(self, queue: str, key: str) -> int | None:
        job_id: int | None = self._look(lambda now_ms: self._machine.find(queue, key, now_ms))
        return job_id

    def queues(self) -> list[str]:
        names: list[str] = self._look(lambda now_ms: sorted(self._machine.queues))
        return names

    def stats(self, queue: str | None) -> QueueStats:
        stats: QueueStats = self._look(lambda now_ms: self._machine.stats(queue, now_ms))
        return stats

    def deliveries(self, queue: str | None) -> Deliveries:
        deliveries: Deliveries = self._look(lambda now_ms: self._machine.deliveries(queue))
        return deliveries

    def config(self, queue: str) -> QueueConfig:
        def read(now_ms: int) -> QueueConfig:
            found = self._machine.queues.get(queue)
            return QueueConfig() if found is None else found.config

        config: QueueConfig = self._look(read)
        return config

    def is_paused(self, queue: str) -> bool | None:
        if self._ended is not None:
            self._check()
        found = self._machine.queues.get(queue)  # no lock: a change puts another configuration in the place of this one
        return None if found is None else found.config.paused

    # Time

    def _tick(self) -> int:
        # Caller holds self._lock. First thing in every call: nothing is decided on a state that time has overtaken.
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
        for _ in range(EXPIRY_ROUNDS):
            ended = decide.expiry(machine, now_ms)
            if not ended:
                break
            try:
                self._record(ended, now_ms)
            except NeedRoomError as need:
                self._needs_room = need  # these leases end when there is room, which the timer makes
                self._timer_poked.set()
                break
            machine.tally_expired(ended)
            self._advance(now_ms)
        self._behind = machine.wake_ms <= now_ms and self._needs_room is None
        return now_ms

    def _advance(self, now_ms: int) -> None:
        # Caller holds self._lock.
        try:
            self._machine.advance(now_ms)
            if self._machine.woken:
                self._wake_lessees()
        except BaseException as error:
            # What the clock changes is in no record: a machine that is half changed may not go on.
            self._fail(error)
            raise

    def _run_timer(self) -> None:
        while True:
            self._timer_poked.clear()
            try:
                with self._lock:
                    before = self._last_lsn()
                    now_ms = self._tick()
                    at_ms = self._machine.next_wakeup_ms()
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
            self._timer_poked.wait(None if timeout_s is None else min(timeout_s, _LONGEST_SLEEP_S))

    def _room_for_ends(self, need: NeedRoomError) -> bool:
        """Make room for the record of ended leases; whether there is some now."""
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
                    for waiting in self._lessees.values():
                        for lessee in waiting:
                            lessee.wake()
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
        for waiting in list(self._lessees.values()):
            for lessee in list(waiting):
                lessee.wake()
        self._timer_poked.set()

    def close(self) -> None:
        if self._ended == "forked":
            return
        with self._close_lock:
            with self._lock:
                if self._finished:
                    return
                self._ended = "closed"
                for waiting in self._lessees.values():
                    for lessee in waiting:
                        lessee.wake()
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
        for waiting in self._lessees.values():
            for lessee in waiting:
                if isinstance(lessee, _Lessee):
                    lessee.wake()
        if self._soon is not None:
            self._soon.forked()

    # For tests: a look at everything, while the threads of the engine stand still

    def dump(self) -> dict[str, Any]:
        """The machine's whole state in canonical order."""
        with self._lock:
            return self._machine.dump()

    def audit(self) -> None:
        """See `Machine.check`."""
        with self._lock:
            self._machine.check()

    # Housekeeping: nothing to do without files

    def maintain(self, verb: str) -> None:
        self._check()

    def backup(self, out: str, *, link: bool) -> Backup:
        self._check()
        raise UsageError("a queue in memory has nothing that could be copied")

    def metrics(self) -> dict[str, int]:
        self._check()
        return {"records": 0, "fsyncs": 0}

    def histograms(self) -> dict[str, Histogram]:
        self._check()
        return {}

    def health(self) -> Health:
        if self._ended is None:
            return self._vitals()
        failure = self._failure
        state: Any = self._ended
        return Health(state=state, last_error=None if failure is None else f"{type(failure).__name__}: {failure}")

    def _vitals(self) -> Health:
        """The health of an open engine."""
        return Health(state="open")


class SoonLease:
    """A lessee without a thread: it looks again when it is woken, in the notifier's thread."""

    __slots__ = ("_arguments", "_begun", "_done", "_engine", "_max_bytes", "_settler", "_told", "_woken", "over")

    def __init__(
        self,
        engine: LiveEngine,
        queues: Sequence[str],
        max_jobs: int,
        visibility_ms: int | None,
        settler: Settler,
        done: Done,
        *,
        begun: bool,
        max_bytes: int | None,
    ) -> None:
        self._engine = engine
        self._arguments = queues, max_jobs, visibility_ms
        self._begun = begun
        self._max_bytes = max_bytes
        self._settler = settler
        self._done = done
        self._woken = False  # guarded by the engine's lock, as is `over`
        self.over = False  # it has taken jobs, or was told, or cancelled
        self._told = False  # or wants to be told no more

    def wake(self) -> None:
        # Caller holds the engine's lock.
        if not self._woken:
            self._engine._notifier.call(self.look)
            self._woken = True  # last: what breaks in between costs a second look, not the only one

    def reset(self) -> None:
        # Caller holds the engine's lock and is about to look at the state: no wake-up is lost.
        self._woken = False

    def cancel(self) -> bool:
        engine = self._engine
        if engine._ended == "forked":
            engine._check()
        with engine._lock:
            if self.over:
                return False
            self.over = self._told = True
            engine._unregister(self, self._arguments[0])
            engine._wake_lessees(self._arguments[0])  # it may have been woken for a job that another can have
        return True

    def abandon(self, unwanted: Callable[[], None]) -> None:
        def give_up() -> None:
            if not self.cancel():
                unwanted()

        self._engine._notifier.call(give_up)

    def look(self) -> None:
        """Take what there is and tell it, else wait to be woken. An exception that breaks in is told, too."""
        try:
            taken = self._attempt()
            if taken is not None:
                self._hand_out(taken)
            elif self._engine._ended is not None:  # perhaps before this one was in the line, where it is told
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
                return engine._attempt(*self._arguments, self, waits=True, begun=self._begun, max_bytes=self._max_bytes)
            except NeedRoomError as need:
                # Here, not in the notifier's thread: whoever does not wait at all must not be told that there is none.
                engine._make_room(need)

    def _end(self, error: BaseException) -> None:
        """It is over for a reason of its own. Jobs that it took meanwhile stay leased until their deadline."""
        engine = self._engine
        with engine._lock:
            self.over = True
            engine._unregister(self, self._arguments[0])
            if engine._ended is None:
                engine._wake_lessees(self._arguments[0])  # it may have been woken for a job that another can have
        self._tell(None, error)

    def _tell(self, leases: list[Lease] | None, error: BaseException | None) -> None:
        if not self._told:
            self._told = True
            self._done(leases, error)

    def _hand_out(self, taken: _Taken) -> None:
        """At once if nothing has to be waited for, else from the notifier's thread."""
        engine, entries = self._engine, taken[3]

        def tell(error: BaseException | None) -> None:
            leases = None
            if error is None:
                try:
                    leases = engine._hand_out(*taken, self._settler)
                except BaseException as failure:
                    error = failure
            self._tell(leases, error)

        with engine._lock:
            # An end since they were taken: the notifier may have gone, so nothing is left with it any more.
            is_open = engine._ended is None
            if is_open and engine._settle_soon(max(entry.lsn for entry in entries), tell):
                return
            if is_open and any(entry.payload is None for entry in entries):
                engine._notifier.call(partial(tell, None))  # they are read from the disk
                return
        try:
            engine._check()
        except RivetQError as error:
            self._tell(None, error)
        else:
            tell(None)


ID_BLOCK = 1024
"""Ids written down at once as "told" (transactions): so many may be skipped after a crash."""

_live: weakref.WeakSet[LiveEngine] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for engine in list(_live):
        engine.forked()


os.register_at_fork(after_in_child=_after_fork_in_child)


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


def _timeless(read: Callable[[], Any], now_ms: int) -> Any:
    """For `_look`: what does not depend on the time."""
    return read()


def _first(found: tuple[int, Run | None]) -> int:
    return found[0]


def _number(state: JobState | None) -> int | None:
    return None if state is None else STATES.index(state)


class _Moments(dict[int, datetime]):
    """Epoch milliseconds to datetimes, each made once."""

    def __missing__(self, at_ms: int) -> datetime:
        self[at_ms] = found = moment(at_ms)
        return found


def _view(entry: Entry) -> dict[str, Any]:
    """The fields of a Job besides its payload."""
    spec = entry.spec
    return {
        "id": entry.id,
        "queue": entry.queue.name,
        "state": STATES[entry.state],
        "headers": spec.headers,
        "priority": spec.priority,
        "attempts": entry.attempts,
        "max_attempts": spec.max_attempts,
        "enqueued_at": moment(entry.enqueued_at_ms),
        "due_at": moment(entry.due_ms) if entry.state == SCHEDULED else None,
        "last_error": entry.last_error,
        "died_at": moment(entry.died_at_ms) if entry.died_at_ms else None,
    }
