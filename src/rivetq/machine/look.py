"""Answers about the state. Nothing here changes it, except that runs are read back from the index."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Sequence

import attrs

from ..model import Deliveries, QueueStats
from .entry import Entry
from .machine import Machine
from .queue import LEASED, READY, STATES, Queue
from .run import Run
from .snapshot import KEY_BYTES, QUEUE_BYTES
from .window import Window

RUNS_AT_ONCE = 8
"""Runs that may have to be read from the index under one hold of the lock, some 300 us each."""


def job(machine: Machine, job_id: int, number: int = 0, priority: int | None = None) -> Entry | None:
    """A job, wherever it is, for looking only. Queue and priority make it quicker, if they are known."""
    entry = machine.jobs.get(job_id)
    if entry is not None:
        return entry
    queues = machine.numbered(number) if number else machine.numbers.values()
    found = machine.locate(job_id, queues, priority=priority)
    if found is None:
        return None
    state, _, run, i = found
    return run.load().entry(i, run.queue, state)


def alive(machine: Machine, number: int, priority: int, first_id: int, last_id: int) -> set[int]:
    """The ids in this range of jobs of a queue and priority that still exist."""
    found = {i for i in range(first_id, last_id + 1) if i in machine.jobs}
    for queue in machine.numbered(number):
        for _, window in machine.waiting[queue.number].each(priority):
            for run in window.around(first_id, last_id):
                found.update(run.between(first_id, last_id))
    return found


def find(machine: Machine, name: str, text: str, now_ms: int) -> int | None:
    """The id that an idempotency key stands for now."""
    queue = machine.queues.get(name)
    key = None if queue is None else machine.keys.get(queue.number, text)
    return None if key is None or (key.expires_ms and key.expires_ms <= now_ms) else key.job_id


def head(machine: Machine, window: Window, count: int) -> tuple[list[int], list[int], list[int | None]]:
    """The first jobs of a window: ids, attempts so far, visibility timeouts of their own."""
    ids: list[int] = []
    attempts: list[int] = []
    visibilities: list[int | None] = []
    if count == 1 and window.runs and not window.loose:  # most calls ask for this
        first = window.runs[0]
        columns, i = first.load(), first.at
        job_id, extras = columns.ids[i], columns.extras
        before = extras[job_id][0] if extras is not None and job_id in extras else 0
        return [job_id], [before], [columns.specs[i].visibility_ms]
    for run, start, stop in window.walk():
        room = count - len(ids)
        stop = min(stop, start + room)
        if run is None:
            for entry in map(machine.jobs.__getitem__, window.loose[start:stop]):
                ids.append(entry.id)
                attempts.append(entry.attempts)
                visibilities.append(entry.spec.visibility_ms)
        else:
            columns = run.load()
            here, extras = columns.ids[start:stop], columns.extras
            ids += here
            attempts += [0] * len(here) if extras is None else [extras[i][0] if i in extras else 0 for i in here]
            visibilities += [spec.visibility_ms for spec in columns.specs[start:stop]]
        if len(ids) == count:
            break
    return ids, attempts, visibilities


def within(machine: Machine, window: Window, count: int, max_bytes: int) -> tuple[int, int]:
    """How many of the first `count` jobs of a window fit into `max_bytes` of payload, and their bytes."""
    found = size = 0
    for run, start, stop in window.walk():
        stop = min(stop, start + count - found)
        lengths: Iterable[int]
        if run is None:
            lengths = [machine.jobs[i].length for i in window.loose[start:stop]]
        else:
            lengths = run.load().lengths[start:stop]
        for length in lengths:
            if size + length > max_bytes:
                return found, size
            size += length
            found += 1
        if found == count:
            break
    return found, size


def some_ids(machine: Machine, queue: Queue, states: Sequence[int], below_id: int, count: int) -> list[int]:
    """Up to `count` ids below `below_id` of jobs that wait in one of these states; none if there are none.

    Not the lowest ids, but jobs that lie together: only a few runs are read, however many there are.
    """
    ids: list[int] = []
    runs_read = 0
    windows = [window for state, window in machine.waiting[queue.number].each() if state in states]
    for window in windows:
        for run in window.runs:
            if run.low >= below_id:
                continue
            columns, at = run.peek()
            ids += [i for i in columns.ids[at:] if i < below_id][: count - len(ids)]
            runs_read += 1
            if ids and (len(ids) == count or runs_read >= RUNS_AT_ONCE):
                return sorted(ids)
    for window in windows:
        for key in window.loose:
            job_id = key[1] if window.by_due else key
            if len(ids) == count:
                return sorted(ids)
            if job_id < below_id:
                ids.append(job_id)
    return sorted(ids)


def ids_in(runs: Iterable[Run], after: int, below: int) -> list[tuple[int, Run]]:
    """The ids between `after` and `below` in these runs, each with its run. A run used up meanwhile yields none."""
    found: list[tuple[int, Run]] = []
    for run in runs:
        if run.left and run.high > after and run.low < below:
            columns, at = run.peek()
            found += [(i, run) for i in columns.ids[at:] if after < i < below]
    return found


def listed(machine: Machine, name: str, run: Run | None, ids: Sequence[int]) -> Iterator[Entry]:
    """The jobs of these ids, for looking only. They were in this run, or loose, a moment ago."""
    queue, wanted = machine.queues.get(name), set(ids)
    if queue is None:
        return
    if run is not None and run.left:
        columns, at = run.peek()
        for i in range(at, len(columns)):
            if columns.ids[i] in wanted:
                wanted.remove(columns.ids[i])
                yield columns.entry(i, queue, run.state)
    for job_id in wanted:
        if (entry := job(machine, job_id, queue.number)) is not None:
            yield entry


def deliveries(machine: Machine, name: str | None) -> Deliveries:
    """What became of the deliveries of one queue, or of all together."""
    each = [attrs.astuple(queue.deliveries()) for queue in _named(machine, name)]
    return Deliveries(*map(sum, zip(*each, strict=True))) if each else Deliveries()


def stats(machine: Machine, name: str | None, now_ms: int) -> QueueStats:
    """Counts of one queue, or of all together."""
    queues = _named(machine, name)
    ages = [now_ms - at for queue in queues if (at := _oldest_ready_ms(machine, queue)) is not None]
    ready, scheduled, leased, dead = (sum(q.counts[state] for q in queues) for state in range(len(STATES)))
    return QueueStats(
        ready=ready,
        scheduled=scheduled,
        leased=leased,
        dead=dead,
        enqueued=sum(q.enqueued for q in queues),
        acked=sum(q.acked for q in queues),
        cancelled=sum(q.cancelled for q in queues),
        purged=sum(q.purged for q in queues),
        oldest_age=max(ages) / 1000 if ages else None,
    )


def _oldest_ready_ms(machine: Machine, queue: Queue) -> int | None:
    firsts: list[int] = []
    for window in machine.waiting[queue.number].windows(READY):
        run, start, _ = next(window.walk())
        firsts.append(machine.jobs[window.loose[start]].enqueued_at_ms if run is None else run.load().times[start])
    return min(firsts, default=None)


def listing(
    machine: Machine, name: str, state: int | None, after: int, limit: int, *, by_due: bool = True
) -> list[Entry]:
    """Up to `limit` jobs of a queue with ids above `after`, ascending; the scheduled ones only if `by_due`."""
    queue = machine.queues.get(name)
    if queue is None:
        return []
    found: list[Entry] = []
    if state is None or state == LEASED:
        ids = heapq.nsmallest(limit, (i for i in queue.leased if i > after))
        found += map(machine.jobs.__getitem__, ids)
    for each, window in machine.waiting[queue.number].each():
        if state in (None, each) and (by_due or not window.by_due):
            cells = _by_due(window, after, limit) if window.by_due else window.walk(after)
            found += _stretch(machine, queue, each, window, cells, limit)
    found.sort(key=lambda entry: entry.id)
    return found[:limit]


def _stretch(
    machine: Machine, queue: Queue, state: int, window: Window, cells: Iterable[tuple[Run | None, int, int]], limit: int
) -> list[Entry]:
    found: list[Entry] = []
    for run, start, stop in cells:
        stop = min(stop, start + limit - len(found))
        if run is None:
            keys = window.loose[start:stop]
            found += [machine.jobs[key[1] if window.by_due else key] for key in keys]
        else:
            columns = run.load()
            found += columns.entries(start, stop, queue, state)
        if len(found) == limit:
            break
    return found


def _by_due(window: Window, after: int, limit: int) -> list[tuple[Run | None, int, int]]:
    """The jobs with the lowest ids above `after`, of a window in order of due moments. Looks at all its jobs."""
    found: list[tuple[int, Run | None, int]] = []
    for run in window.runs:
        if run.high > after and (not found or len(found) < limit or run.low < found[-1][0]):
            columns, at = run.peek()
            found += [(i, run, cell) for cell, i in enumerate(columns.ids[at:], at) if i > after]
            found = heapq.nsmallest(limit, found, key=lambda each: each[0])
    found += [(key[1], None, at) for at, key in enumerate(window.loose) if key[1] > after]
    return [(run, cell, cell + 1) for _, run, cell in heapq.nsmallest(limit, found, key=lambda each: each[0])]


def live_bytes(machine: Machine) -> dict[int, int]:
    """What jobs and keys still need of each segment."""
    live = dict(machine.live)
    for segment, count in machine.keys.counts.items():
        live[segment] = live.get(segment, 0) + KEY_BYTES * count
    return live


def queue_bytes(machine: Machine) -> dict[int, int]:
    """What queues still need of each segment."""
    return {segment: QUEUE_BYTES * count for segment, count in machine.homes.items()}


def everything(machine: Machine) -> Iterator[Entry]:
    """All jobs, in no order; for dumps and checks."""
    yield from list(machine.jobs.values())
    for queue in machine.numbers.values():
        for state, window in machine.waiting[queue.number].each():
            for run in window.runs:
                columns, at = run.peek()
                yield from columns.entries(at, len(columns), queue, state)


def _named(machine: Machine, name: str | None) -> list[Queue]:
    """One queue, if there is such a one, or all."""
    if name is None:
        return list(machine.numbers.values())
    return [machine.queues[name]] if name in machine.queues else []
