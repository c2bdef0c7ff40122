"""A running machine: the engine that lives in this process, with lock, clock, timer and waiting lessees; no files.

`MemoryEngine` is this as it is. `LocalEngine` adds the log behind the methods that `clockwork` marks "with files".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from ..engine import Backup, Capabilities, Done, Enqueue, Operation
from ..errors import RivetQError, UsageError
from ..histogram import Histogram
from ..machine import decide
from ..machine.commit import decide_commit
from ..machine.events import Event, Purged, Redriven
from ..machine.queue import DEAD
from ..model import JobState, QueueConfig
from .clockwork import NeedRoomError, give_turn, timeless
from .leasing import LeasingEngine
from .looking import number_of

ID_BLOCK = 1024
"""Ids written down at once as "told" (transactions): so many may be skipped after a crash."""
MANY_JOBS = 500
"""After a part of a change with so many jobs others get the lock."""


class LiveEngine(LeasingEngine):
    """The machine behind a lock, with all verbs."""

    capabilities = Capabilities(durable=False, shared=False, strict_order=True)

    # Changing

    def commit(self, operations: Sequence[Operation]) -> list[Any]:
        enqueues = Enqueue in map(type, operations)
        if enqueues and self._lessees.lines:
            self._check()  # before the lock, as in _change
            with self._lock:
                self._lessees.wake_early(self._machine, operations)
        answers: list[Any] = self._change(partial(decide_commit, self._machine, operations), keep_reserve=enqueues)
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
                events, answers = self._planned(partial(decide_commit, self._machine, operations), now_ms)
                lsn = self._record(events, now_ms, enqueues) if events else self._last_lsn()
            except NeedRoomError:
                self._notifier.call(commit)  # room is made by the disk
                return
            if self._settle_soon(lsn, lambda error: done(None, error) if error else done(answers, None)):
                return
        self._settle(lsn)
        done(answers, None)

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
            return decide.purge(machine, queue, number_of(state), below_id)

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
                self._look(partial(timeless, partial(decide.redrive, machine, queue, part, None)))
            ids = ids[:limit]
        parts = [ids[start : start + most] for start in range(0, len(ids), most)]
        return self._change_parts(lambda step, _: decide.redrive_some(machine, queue, parts[step], most), len(parts))

    def remove_queue(self, queue: str) -> bool:
        def plan(now_ms: int) -> tuple[list[Event], bool]:
            event = decide.remove_queue(self._machine, queue, now_ms)
            return ([], False) if event is None else ([event], True)

        done: bool = self._change(plan)
        return done

    def _settle_reservation(self) -> None:
        """Return when the last reservation of ids is on disk: it may be another caller's, on its way there."""

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
