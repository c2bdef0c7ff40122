"""The verbs that only read. A long answer is read in parts, and other calls go on in between."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from functools import partial
from typing import Any

from ..engine import Operation
from ..machine import decide, look
from ..machine.entry import Entry
from ..machine.look import RUNS_AT_ONCE
from ..machine.queue import NEVER_MS, SCHEDULED, STATES
from ..machine.run import Run
from ..model import Deliveries, Job, JobState, QueueConfig, QueueStats
from ..units import moment
from .clockwork import Clockwork, timeless

FEW_SCHEDULED = 8000
"""Scheduled jobs that are listed under one hold of the lock."""

_Told = tuple[Entry, dict[str, Any]]
"""A job as it was at a moment, and what `jobs` tells of it but for the payload."""


class LookingEngine(Clockwork):
    """Answers what is there."""

    def check(self, operation: Operation) -> list[int | None]:
        ids: list[int | None] = self._look(lambda now_ms: decide.check(self._machine, operation, now_ms))
        return ids

    def get(self, job_id: int) -> Job | None:
        def read(now_ms: int) -> list[tuple[Entry, dict[str, Any]]]:
            entry = look.job(self._machine, job_id)
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
        machine, number = self._machine, number_of(state)
        apart = number in (None, SCHEDULED) and self.stats(queue).scheduled > FEW_SCHEDULED
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
                    entries = look.listed(machine, name, run, part)
                    return [(entry, _view(entry)) for entry in entries if entry.state == SCHEDULED]

                found.update((entry.id, (entry, view)) for entry, view in self._look(read))
        return found

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
            found += self._look(partial(timeless, partial(look.ids_in, part, after, below)))
        return heapq.nsmallest(limit, found, key=_first)

    def _with_payloads(self, found: list[tuple[Entry, dict[str, Any]]]) -> list[Job]:
        payloads = self._payloads([entry for entry, _ in found])
        return [Job(payload=p, **view) for p, (_, view) in zip(payloads, found, strict=True) if p is not None]

    def find(self, queue: str, key: str) -> int | None:
        job_id: int | None = self._look(lambda now_ms: look.find(self._machine, queue, key, now_ms))
        return job_id

    def queues(self) -> list[str]:
        names: list[str] = self._look(lambda now_ms: sorted(self._machine.queues))
        return names

    def stats(self, queue: str | None) -> QueueStats:
        stats: QueueStats = self._look(lambda now_ms: look.stats(self._machine, queue, now_ms))
        return stats

    def deliveries(self, queue: str | None) -> Deliveries:
        deliveries: Deliveries = self._look(lambda now_ms: look.deliveries(self._machine, queue))
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


def _first(found: tuple[int, Run | None]) -> int:
    return found[0]


def number_of(state: JobState | None) -> int | None:
    return None if state is None else STATES.index(state)


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
