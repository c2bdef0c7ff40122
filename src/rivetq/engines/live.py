"""A running machine: the engine that lives in this process, with lock, clock, timer and waiting lessees; no files.

`MemoryEngine` is this as it is. `LocalEngine` adds the log behind the methods that `clockwork` marks "with files".
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn, TypeVar

import attrs

from ..engine import (
    UNSET,
    Answer,
    Call,
    Cancel,
    Capabilities,
    Check,
    Commit,
    Configure,
    Done,
    EndSession,
    Enqueue,
    Exchange,
    Exchanged,
    Find,
    Get,
    Jobs,
    Keeping,
    Once,
    Outcomes,
    Purge,
    QueueOf,
    Queues,
    Redrive,
    RemoveQueue,
    Request,
    Reserve,
    Stats,
    Take,
    Unreserve,
)
from ..errors import RateLimitedError, RivetQError, UsageError
from ..machine import decide
from ..machine.commit import decide_commit
from ..machine.events import Event, Purged, Redriven, SessionEnded
from ..machine.queue import DEAD
from ..machine.sessions import called, told
from ..model import QueueConfig
from .clockwork import NeedRoomError, give_turn, timeless
from .leasing import LeasingEngine
from .looking import number_of

A = TypeVar("A")
logger = logging.getLogger("rivetq")
ID_BLOCK = 1024
"""Ids reserved at a time for transactions. At most this many are skipped after a crash."""
MANY_JOBS = 500
"""After a part of a change with this many jobs, other calls get the lock."""


class LiveEngine(LeasingEngine):
    """The machine behind a lock, with all verbs."""

    capabilities = Capabilities(durable=False, shared=False, strict_order=True, keeping=False)

    @property
    def keeping(self) -> Keeping | None:
        return None

    def call(self, request: Request[A]) -> A:
        verb = _VERBS.get(type(request)) or _unknown(request)
        answer: A = verb(self, request)
        return answer

    def call_soon(self, request: Request[Any], done: Done) -> Call:
        if isinstance(request, Take):
            return self._take_soon(request, done)
        if isinstance(request, Exchange):
            return self._exchange_soon(request, done)
        if isinstance(request, Commit) and request.once is None:
            self._commit_soon(request, done)
        elif isinstance(request, Check | Unreserve) or (isinstance(request, Reserve) and self._has_ids(request.count)):
            done(_VERBS[type(request)](self, request), None)  # this request never waits
        else:
            verb = _VERBS.get(type(request)) or _unknown(request)
            self._check()
            self._notifier.start()  # first: nothing is done yet if there can be no thread
            self._notifier.call(partial(_tell, partial(verb, self, request), done))
        return OVER

    # Changing

    def _commit(self, request: Commit) -> list[Answer]:
        operations = request.operations
        enqueues = Enqueue in map(type, operations)
        if enqueues and self._lessees.lines:
            self._check()  # before the lock, as in _change
            with self._lock:
                self._lessees.wake_early(self._machine, operations)
        if request.once is not None:
            return self._commit_once(request, enqueues)
        while True:  # like `_change`, but inlined
            if self._ended is not None:
                self._check()
            try:
                with self._lock:
                    now_ms = self._tick()
                    events, answers = decide_commit(self._machine, operations, now_ms, request.partial)
                    lsn = self._record(events, now_ms, enqueues) if events else self._last_lsn()
                break
            except NeedRoomError as need:
                self._make_room(need)
            except RateLimitedError as error:
                self._note_limited(error)
                raise
        self._settle(lsn)
        return answers

    def _commit_once(self, request: Commit, enqueues: bool) -> list[Answer]:
        try:
            answers: list[Answer] = self._change(
                lambda now_ms: decide_commit(self._machine, request.operations, now_ms, request.partial),
                keep_reserve=enqueues,
                once=request.once,
            )
        except RateLimitedError as error:
            self._note_limited(error)
            raise
        return answers

    def _exchange(self, request: Exchange) -> Exchanged:
        answers = self._commit(request.commit)
        try:
            return Exchanged(answers, self._take(request.take))
        except RivetQError:
            return Exchanged(answers, [])

    def _exchange_soon(self, request: Exchange, done: Done) -> Call:
        exchange = _Exchange(self, request.take, done)
        self.call_soon(request.commit, exchange.committed)
        return exchange

    def _end_session(self, request: EndSession) -> None:
        def plan(now_ms: int) -> tuple[list[Event], None]:
            return [SessionEnded(request.session)] if request.session in self._machine.sessions else [], None

        self._change(plan, sync=False)

    def _note_limited(self, error: RateLimitedError) -> None:
        with self._lock:
            if (queue := self._machine.queues.get(error.queue)) is not None:
                queue.limited += 1

    def _commit_soon(self, request: Commit, done: Done) -> None:
        self._check()
        self._notifier.start()  # first: nothing is done yet if there can be no thread
        with self._lock:
            now_ms = self._tick()
            try:
                events, answers = decide_commit(self._machine, request.operations, now_ms, request.partial)
                lsn = self._last_lsn()
                if events:
                    lsn = self._record(events, now_ms, Enqueue in map(type, request.operations))
            except NeedRoomError:
                self._notifier.call(partial(_tell, partial(self._commit, request), done))  # room is made by the disk
                return
            except RateLimitedError as error:
                self._machine.queues[error.queue].limited += 1
                raise
            if self._settle_soon(lsn, lambda error: done(None, error) if error else done(answers, None)):
                return
        self._settle(lsn)
        done(answers, None)

    def _reserve(self, request: Reserve) -> int:
        count = request.count
        while True:
            with self._lock:
                self._check()
                if decide.ids(self._machine, count, 0) is None:
                    first_id = self._machine.take_ids(count)
                    break
            # Once in a thousand ids; another caller may take them first.
            self._change(lambda now_ms: (list(filter(None, [decide.ids(self._machine, count, ID_BLOCK)])), None))
        self._settle_reservation()
        return first_id

    def _has_ids(self, count: int) -> bool:
        """Whether this many ids can be told without a wait for the disk."""
        with self._lock:
            self._check()
            return decide.ids(self._machine, count, 0) is None and self._is_reservation_settled()

    def _settle_reservation(self) -> None:
        """Return when the last reservation of ids is on disk. It may be another caller's, and still be on its way."""

    def _is_reservation_settled(self) -> bool:
        return True

    def _unreserve(self, request: Unreserve) -> None:
        self._machine.promised.pop(request.first_id, None)  # atomic: no lock is needed

    def _configure(self, request: Configure) -> QueueConfig:
        changes = attrs.asdict(request.changes, recurse=False)
        given = {name: value for name, value in changes.items() if value is not UNSET}
        config: QueueConfig = self._change(
            lambda now_ms: decide.configure(self._machine, request.queue, given), once=request.once
        )
        return config

    def _purge(self, request: Purge) -> int:
        machine, state = self._machine, number_of(request.state)
        below_id: int | None = None

        def few(now_ms: int) -> tuple[list[Event], int | None]:
            here = decide.purgeable(machine, request.queue, state)
            event = decide.purge(machine, request.queue, state) if here <= decide.PART_JOBS else None
            if event is None or len(event.ids) < here:
                return [], None if here else 0
            return [event], here

        count: int | None = self._change(few, once=request.once)
        if count is not None:
            return count

        def plan(step: int, done: int) -> Purged | None:
            nonlocal below_id
            below_id = machine.next_id if below_id is None else below_id  # jobs that come later stay
            return decide.purge(machine, request.queue, state, below_id)

        return self._change_parts(plan, once=request.once)

    def _change_parts(
        self, plan: Callable[[int, int], Purged | Redriven | None], steps: int | None = None, once: Once | None = None
    ) -> int:
        """Change many jobs, some in each record, and let others have the lock in between. Returns the number of jobs.

        Args:
            plan: gets the step and the number of jobs changed so far; returns the event, or None if nothing is left.
            steps: how many steps there are; without, the first None ends it.
            once: the last record has the answer.
        """
        step = count = 0

        def part(now_ms: int) -> tuple[list[Event], int]:
            event = plan(step, count)
            return ([], 0) if event is None else ([event], len(event.ids))

        try:
            if once is not None and (before := self._look(partial(told, self._machine, once))) is not None:
                if not isinstance(before.answer, int):
                    raise UsageError(f"session {once.session}: request {once.number} was another one")
                return before.answer
            while step != steps:
                changed = self._change(part, sync=False)
                if not changed and steps is None:
                    break
                step, count = step + 1, count + changed
                if changed > MANY_JOBS:
                    give_turn()
            last: list[Event] = [called(once, count)] if once is not None and count else []
            self._change(lambda now_ms: (last, None))  # waits until all parts are durable
        except RivetQError as error:
            if count:
                error.outcome = "unknown"  # some parts were done
            raise
        return count

    def _cancel(self, request: Cancel) -> bool:
        def plan(now_ms: int) -> tuple[list[Event], bool]:
            event = decide.cancel(self._machine, request.job_id)
            return ([], False) if event is None else ([event], True)

        done: bool = self._change(plan, once=request.once)
        return done

    def _redrive(self, request: Redrive) -> int:
        machine, most, queue, limit = self._machine, decide.PART_JOBS, request.queue, request.limit
        ids = None if request.job_ids is None else sorted(set(request.job_ids))
        dead = self._count(queue, DEAD) if ids is None else len(ids)
        if dead <= most:

            def plan(now_ms: int) -> tuple[list[Event], int]:
                event = decide.redrive(machine, queue, ids, limit)
                return ([], 0) if event is None else ([event], len(event.ids))

            count: int = self._change(plan, once=request.once)
            return count
        if ids is None and (limit is None or limit >= dead):
            # No more than there were at the start: else a job that keeps dying would be brought back for ever.
            return self._change_parts(
                lambda _, done: decide.redrive_some(machine, queue, None, dead - done), once=request.once
            )
        if ids is None:
            ids = [job_id for job_id, _ in self._lowest(queue, DEAD, 0, limit or 0)]
        else:
            # All of them are looked at first: if one is not dead, nothing changes. With a number it may be made again
            # after a part was done: then it passes over what is not dead any more.
            for start in range(0, len(ids), most) if request.once is None else ():
                part = ids[start : start + most]
                self._look(partial(timeless, partial(decide.redrive, machine, queue, part, None)))
            ids = ids[:limit]
        parts = [ids[start : start + most] for start in range(0, len(ids), most)]
        return self._change_parts(
            lambda step, _: decide.redrive_some(machine, queue, parts[step], most), len(parts), request.once
        )

    def _remove_queue(self, request: RemoveQueue) -> bool:
        def plan(now_ms: int) -> tuple[list[Event], bool]:
            event = decide.remove_queue(self._machine, request.queue, now_ms)
            return ([], False) if event is None else ([event], True)

        done: bool = self._change(plan, once=request.once)
        return done


# Functions, not bound methods: a table of these in each engine would keep it alive.
_VERBS: dict[type[Request[Any]], Callable[[Any, Any], Any]] = {
    Commit: LiveEngine._commit,
    Reserve: LiveEngine._reserve,
    Unreserve: LiveEngine._unreserve,
    Check: LiveEngine._check_operations,
    Take: LiveEngine._take,
    Get: LiveEngine._get,
    QueueOf: LiveEngine._queue_of,
    Jobs: LiveEngine._jobs,
    Find: LiveEngine._find,
    Queues: LiveEngine._queues,
    Stats: LiveEngine._stats,
    Outcomes: LiveEngine._outcomes,
    Configure: LiveEngine._configure,
    Purge: LiveEngine._purge,
    Cancel: LiveEngine._cancel,
    Redrive: LiveEngine._redrive,
    RemoveQueue: LiveEngine._remove_queue,
    Exchange: LiveEngine._exchange,
    EndSession: LiveEngine._end_session,
}


def _unknown(request: Request[Any]) -> NoReturn:
    raise UsageError(f"this engine knows no request {type(request).__name__}")


def _tell(call: Callable[[], Any], done: Done) -> None:
    """Make the call and tell its answer; in the notifier's thread."""
    try:
        answer = call()
    except BaseException as error:
        done(None, error)
    else:
        done(answer, None)


class _Over:
    """A call that cannot be taken back."""

    def cancel(self, done: Callable[[bool], None]) -> None:
        done(False)

    def abandon(self, unwanted: Callable[[], None]) -> None:
        unwanted()


class _Exchange:
    """An exchange in the background: first the commit, which cannot be taken back, then the lease."""

    def __init__(self, engine: LiveEngine, take: Take, done: Done) -> None:
        self._engine = engine
        self._take = take
        self._done = done
        self._answers: list[Answer] = []
        self._lock = threading.Lock()
        self._leasing: Call | None = None
        self._unwanted = False  # no lease is wanted any more: only the answers are told

    def committed(self, answers: Any, error: BaseException | None) -> None:
        if error is not None:
            self._done(None, error)
            return
        self._answers = answers
        if self._unwanted:
            self._leased([], None)
            return
        try:
            leasing = self._engine.call_soon(self._take, self._leased)
        except Exception as failure:
            self._leased([], failure)
            return
        with self._lock:
            self._leasing = leasing
            unwanted = self._unwanted
        if unwanted:
            self._stop(leasing)

    def _leased(self, grants: Any, error: BaseException | None) -> None:
        """The commit was done, so its answers are told with an error of the lease, too."""
        if error is not None and not isinstance(error, RivetQError):
            logger.error("rivetq: the lease of an exchange failed", exc_info=error)
        self._done(Exchanged(self._answers, [] if error is not None else grants), None)

    def cancel(self, done: Callable[[bool], None]) -> None:
        """Stop waiting for jobs. The answers are told in any case."""
        with self._lock:
            self._unwanted, leasing = True, self._leasing
        if leasing is not None:
            self._stop(leasing)
        done(False)

    def _stop(self, leasing: Call) -> None:
        leasing.cancel(lambda nothing_came: self._leased([], None) if nothing_came else None)

    def abandon(self, unwanted: Callable[[], None]) -> None:
        self._engine._notifier.call(lambda: self.cancel(lambda _: unwanted()))


OVER = _Over()
