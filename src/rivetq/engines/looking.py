"""The verbs that only read. A long answer is read in parts, and other calls go on in between."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from functools import partial
from itertools import accumulate
from typing import Any

from ..engine import Check, Find, Get, Jobs, Outcomes, QueueOf, Queues, Stats
from ..machine import decide, look
from ..machine.entry import Entry
from ..machine.look import RUNS_AT_ONCE
from ..machine.queue import LEASED, NEVER_MS, SCHEDULED, STATES
from ..machine.run import Run
from ..model import Deliveries, Job, JobState, QueueStats
from ..units import moment
from .clockwork import Clockwork, timeless

FEW_SCHEDULED = 8000
"""Scheduled jobs that are listed under one hold of the lock."""

_Told = tuple[Entry, dict[str, Any]]
"""A job as it was at a moment, and what `jobs` tells of it but for the payload."""


class LookingEngine(Clockwork):
    """Answers what is there."""

    def _check_operations(self, request: Check) -> list[list[int | None]]:
        machine, operations = self._machine, request.operations
        found: list[list[int | None]] = self._look(
            lambda now_ms: [decide.check(machine, operation, now_ms) for operation in operations]
        )
        return found

    def _get(self, request: Get) -> Job | None:
        def read(now_ms: int) -> list[_Told]:
            entry = look.job(self._machine, request.job_id)
            return [] if entry is None else [(entry, _view(entry))]

        found = self._with_payloads(self._look(read))
        return found[0] if found else None

    def _queue_of(self, request: QueueOf) -> str | None:
        def read(now_ms: int) -> str | None:
            entry = look.job(self._machine, request.job_id)
            return None if entry is None else entry.queue.name

        name: str | None = self._look(read)
        return name

    def _jobs(self, request: Jobs) -> list[Job]:
        if request.newest:
            found = self._latest(request.queue, number_of(request.state), request.after, request.limit)
        else:
            found = self._listing(request.queue, number_of(request.state), request.after, request.limit)
        if not request.payloads:
            return [Job(payload=b"", **view) for _, view in found]
        if request.max_bytes is not None:
            sizes = accumulate(entry.length for entry, _ in found)
            found = found[: max(1, sum(size <= request.max_bytes for size in sizes))]
        return self._with_payloads(found)

    def _listing(self, queue: str, number: int | None, after: int, limit: int) -> list[_Told]:
        """The answer to `Jobs` without payloads. A long one is read in parts, so that other calls do not wait long."""
        machine = self._machine
        apart = number in (None, SCHEDULED) and self._count(queue, SCHEDULED) > FEW_SCHEDULED
        found = self._scheduled(queue, after, limit) if apart else {}
        first, left = after, 0 if apart and number == SCHEDULED else limit
        while left:
            count = min(left, decide.PART_JOBS)

            def read(now_ms: int, after: int = first, count: int = count) -> list[_Told]:
                entries = look.listing(machine, queue, number, after, count, by_due=not apart)
                return [(entry, _view(entry)) for entry in entries]

            part = self._look(read)
            found.update((entry.id, (entry, view)) for entry, view in part)
            if len(part) < count:
                break
            left, first = left - count, part[-1][0].id
        if apart and number is None:  # jobs that became scheduled meanwhile, before the listing reached them
            found = self._scheduled(queue, after, limit, in_runs=False) | found
        return [found[i] for i in sorted(found)[:limit]]

    def _scheduled(self, name: str, after: int, limit: int, *, in_runs: bool = True) -> dict[int, _Told]:
        """The scheduled jobs with the lowest ids; the machine holds them in order of their due moments."""
        return self._told_of(name, SCHEDULED, self._lowest(name, SCHEDULED, after, limit, in_runs=in_runs))

    def _latest(self, name: str, number: int | None, below: int, limit: int) -> list[_Told]:
        """The jobs with the highest ids below `below` (0: no bound), descending. They are read in parts, too."""
        machine, below = self._machine, below or NEVER_MS

        def begin(now_ms: int) -> tuple[list[tuple[int, Run | None]], list[Run]]:
            queue = machine.queues.get(name)
            if queue is None:
                return [], []
            windows = [w for each, w in machine.waiting[queue.number].each() if number in (None, each)]
            loose = [key[1] if window.by_due else key for window in windows for key in window.loose]
            loose += queue.leased if number in (None, LEASED) else ()
            return [(i, None) for i in loose if i < below], [run for window in windows for run in window.runs]

        found, runs = self._look(begin)
        runs.sort(key=lambda run: run.high, reverse=True)
        found = heapq.nlargest(limit, found, key=_first)
        for start in range(0, len(runs), RUNS_AT_ONCE):
            least = found[-1][0] if len(found) == limit else 0
            part = [run for run in runs[start : start + RUNS_AT_ONCE] if run.high > least]
            if not part:
                break
            found += self._look(partial(timeless, partial(look.ids_in, part, least, below)))
            found = heapq.nlargest(limit, found, key=_first)
        told = self._told_of(name, number, found)
        return [told[i] for i in sorted(told, reverse=True)]

    def _told_of(self, name: str, number: int | None, found: list[tuple[int, Run | None]]) -> dict[int, _Told]:
        """The fields of jobs that were in these runs, or loose, if they are still in this state."""
        machine = self._machine
        places: dict[Run | None, list[int]] = {}
        for job_id, run in found:
            places.setdefault(run, []).append(job_id)
        told: dict[int, _Told] = {}
        for place, ids in places.items():
            for start in range(0, len(ids), decide.PART_JOBS):

                def read(
                    now_ms: int, run: Run | None = place, part: Sequence[int] = ids[start:][: decide.PART_JOBS]
                ) -> list[_Told]:
                    entries = look.listed(machine, name, run, part)
                    return [(entry, _view(entry)) for entry in entries if number in (None, entry.state)]

                told.update((entry.id, (entry, view)) for entry, view in self._look(read))
        return told

    def _lowest(
        self, name: str, state: int, after: int, limit: int, *, in_runs: bool = True
    ) -> list[tuple[int, Run | None]]:
        """The lowest ids above `after` of jobs that wait in a state, each with its run, if it is in one.

        They are read in parts, so that other calls go on. The result may mix the states of several moments.
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
            found += self._look(partial(timeless, partial(look.ids_in, part, after, below)))
        return heapq.nsmallest(limit, found, key=_first)

    def _with_payloads(self, found: list[tuple[Entry, dict[str, Any]]]) -> list[Job]:
        payloads = self._payloads([entry for entry, _ in found])
        return [Job(payload=p, **view) for p, (_, view) in zip(payloads, found, strict=True) if p is not None]

    def _find(self, request: Find) -> int | None:
        job_id: int | None = self._look(lambda now_ms: look.find(self._machine, request.queue, request.key, now_ms))
        return job_id

    def _queues(self, request: Queues) -> list[str]:
        names: list[str] = self._look(lambda now_ms: sorted(self._machine.queues))
        return names

    def _stats(self, request: Stats) -> QueueStats:
        stats: QueueStats = self._look(lambda now_ms: look.stats(self._machine, request.queue, now_ms))
        return stats

    def _outcomes(self, request: Outcomes) -> Deliveries:
        deliveries: Deliveries = self._look(lambda now_ms: look.deliveries(self._machine, request.queue))
        return deliveries

    def _count(self, name: str, state: int) -> int:
        """How many jobs of a queue are in a state."""

        def read(now_ms: int) -> int:
            queue = self._machine.queues.get(name)
            return 0 if queue is None else queue.counts[state]

        count: int = self._look(read)
        return count

    def is_paused(self, queue: str) -> bool | None:
        if self._ended is not None:
            self._check()
        found = self._machine.queues.get(queue)  # no lock: a change replaces the whole configuration object
        return None if found is None else found.config.paused


def _first(found: tuple[int, Run | None]) -> int:
    return found[0]


def number_of(state: JobState | None) -> int | None:
    return None if state is None else STATES.index(state)


def _view(entry: Entry) -> dict[str, Any]:
    """The fields of a Job, without its payload."""
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
