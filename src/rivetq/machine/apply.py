"""What each event changes. Nothing here can fail; it tolerates events that the state already includes (see events)."""

from __future__ import annotations

import heapq
from array import array
from collections.abc import Iterator, Sequence
from typing import assert_never

from .apply_enqueued import apply_enqueued
from .columns import Columns
from .entry import Entry, Spec
from .events import (
    Acked,
    Buried,
    Called,
    Cancelled,
    Copied,
    Enqueued,
    Event,
    Extended,
    IdsReserved,
    KeyCopied,
    Leased,
    Purged,
    QueueConfigured,
    QueueCopied,
    QueueCreated,
    QueueRemoved,
    Redriven,
    Released,
    Retried,
    SegmentsDropped,
    SessionEnded,
)
from .keys import Key
from .machine import Found, Machine
from .queue import DEAD, LEASED, NEVER_MS, READY, Queue
from .run import Run
from .sessions import end_session, note_called
from .snapshot import COPY_BYTES, Place
from .window import FEW_JOBS, Window


def apply(machine: Machine, event: Event, now_ms: int, place: Place) -> None:
    """Change the state as the event says. Cannot fail; tolerates events that it already includes (see events)."""
    match event:
        case Enqueued():
            apply_enqueued(machine, event, now_ms, place)
        case Leased():
            _apply_leased(machine, event, now_ms)
        case Acked():
            machine.numbers[event.queue].acked += len(event.ids)
            if machine.changes is not None:
                machine.changes.queues.add(event.queue)
            machine.remove(event.ids, event.keys_until_ms)
        case Retried():
            machine.meets(Retried, entry := machine.known(event.id))
            if entry is not None:
                entry.last_error = event.error
                entry.queue.retried += 1
                machine.wait(entry, event.due_ms, now_ms)
        case Released():
            machine.meets(Released, entry := machine.known(event.id))
            if entry is not None:
                entry.queue.released += 1
                entry.attempts = event.attempts
                machine.wait(entry, event.due_ms, now_ms)
        case Buried():
            _apply_buried(machine, event)
        case Extended():
            _apply_extended(machine, event)
        case Cancelled():
            queue = machine.changed_queue(event.queue)
            queue.cancelled += 1
            _apply_cancelled(machine, queue, event)
        case Purged():
            queue = machine.changed_queue(event.queue)
            queue.purged += len(event.ids)
            _apply_purged(machine, queue, event.ids)
        case Redriven():
            _apply_redriven(machine, event, now_ms)
        case QueueCreated() | QueueRemoved() | QueueConfigured() | QueueCopied():
            _apply_to_queue(machine, event, now_ms, place)
        case IdsReserved():
            machine.reserved_id = event.next_id
        case Copied():
            _apply_copied(machine, event, now_ms, place)
        case KeyCopied():
            machine.hold_key(event.queue, event.key, Key(event.job_id, place.segment, event.expires_ms))
        case SegmentsDropped():
            _apply_segments_dropped(machine, event.upto)
        case Called():
            note_called(machine, event)
        case SessionEnded():
            end_session(machine, event.session)
        case _:
            assert_never(event)


def _apply_to_queue(
    machine: Machine, event: QueueCreated | QueueRemoved | QueueConfigured | QueueCopied, now_ms: int, place: Place
) -> None:
    match event:
        case QueueCreated():
            is_new = event.number not in machine.numbers
            machine.name_queue(event.number, event.name, place.segment)
            if is_new:
                machine.numbers[event.number].keyed = False
        case QueueRemoved():
            _apply_queue_removed(machine, event.number)
        case QueueConfigured():
            queue = machine.changed_queue(event.queue)
            queue.configure(event.config, now_ms)
            machine.wake(queue)
        case QueueCopied():
            _apply_queue_copied(machine, event, now_ms, place)
        case _:
            assert_never(event)


def _apply_leased(machine: Machine, event: Leased, now_ms: int) -> None:
    entries: list[Entry | None] = []
    ids = event.ids
    for number, priority, count in event.places:
        at = len(entries)
        _lease_from(machine, machine.numbers[number], priority, ids[at : at + count], entries)
    entries += [machine.loosen(job_id, machine.numbers.values()) for job_id in ids[len(entries) :]]
    deadlines = machine.deadlines
    least_ms = NEVER_MS
    for entry, token, attempts, deadline_ms in zip(
        entries, event.tokens, event.attempts, event.deadlines_ms, strict=True
    ):
        if entry is None:
            machine.meets(Leased, entry)
            continue
        queue, job_id = entry.queue, entry.id
        queue.delivered += 1
        if entry.state != LEASED:
            machine.meets(Leased, entry)
            machine.leave(entry)
            entry.state = LEASED
            queue.counts[LEASED] += 1
            queue.leased.add(job_id)
            machine.leased_count += 1
        entry.token = token
        entry.attempts = attempts
        entry.deadline_ms = deadline_ms
        heapq.heappush(deadlines, (deadline_ms, job_id))
        if deadline_ms < least_ms:
            least_ms = deadline_ms
        if queue.bucket is not None and queue.bucket.limit.on == "lease":
            queue.bucket.take(1, now_ms)
    if machine.changes is not None:
        machine.changes.jobs.update(ids if None not in entries else [entry.id for entry in entries if entry])
    machine.expect(least_ms)
    machine.trim_deadlines()
    machine.next_token = max(machine.next_token, event.tokens[-1] + 1)


def _lease_from(machine: Machine, queue: Queue, priority: int, ids: Sequence[int], entries: list[Entry | None]) -> None:
    """Add the jobs of these ids to `entries`; jobs in a run become objects. Usually they are the head of a run."""
    window = machine.waiting[queue.number].window(READY, priority)
    jobs, at, n = machine.jobs, 0, len(ids)
    while at < n:
        job_id = ids[at]
        entry = jobs.get(job_id)
        if entry is not None:
            entries.append(entry)
            at += 1
            continue
        run = window.runs[0] if window.runs else None
        if run is None or run.head != job_id:
            entries.append(machine.loosen(job_id, (queue,)))
            at += 1
            continue
        column, first = run.load().ids, run.at
        count = min(n - at, run.left)
        if run.gone is not None:
            count = run.hole(first, first + count) - first
        if count > 1 and column[first : first + count] != array("Q", ids[at : at + count]):
            count = next(i for i in range(1, n - at + 1) if i == count or column[first + i] != ids[at + i])
        popped = run.pop(count, LEASED)
        window.popped(run, count)
        machine.touch(run)
        for entry in popped:
            jobs[entry.id] = entry
        machine.unpack(popped)
        queue.leased.update(column[first : first + count])
        queue.counts[READY] -= count
        queue.counts[LEASED] += count
        machine.leased_count += count
        entries += popped
        at += count


def _apply_cancelled(machine: Machine, queue: Queue, event: Cancelled) -> None:
    found = event.found
    if found is None and (entry := machine.known(event.id)) is not None:
        machine.meets(Cancelled, entry)
        machine.remove((event.id,))
        return
    found = found or machine.locate(event.id, (queue,))
    assert found is not None or not machine.is_live, f"cancel of job {event.id}, which is gone"
    if found is not None:
        machine.lose(found)


def _apply_purged(machine: Machine, queue: Queue, ids: Sequence[int]) -> None:
    machine.remove([i for i in ids if i in machine.jobs])
    if len(ids) < FEW_JOBS:
        for job_id in ids:
            if (found := machine.locate(job_id, (queue,))) is not None:
                machine.lose(found)
        return
    for state, window in list(machine.waiting[queue.number].each()):
        for _, gone in _extract(machine, window, ids):
            queue.counts[state] -= len(gone)
            for segment, size in gone.live().items():
                if segment in machine.live:
                    machine.live[segment] -= size
            for i, text in enumerate(gone.keys or ()):
                if text is not None:
                    machine.free_key(queue, text, gone.ids[i])


def _extract(machine: Machine, window: Window, ids: Sequence[int]) -> Iterator[tuple[Run, Columns]]:
    """Take the jobs of these ids out of the runs of a window. Yields each run and the columns of its jobs that left."""
    wanted = set(ids)
    low, high = min(ids), max(ids)
    for run in [run for run in window.runs if run.low <= high and run.high >= low]:
        columns, at = run.peek()
        here = wanted.intersection(columns.ids[at:])
        if not here:
            continue
        cells = range(at, len(columns))
        gone = columns.picked([i for i in cells if columns.ids[i] in here])
        window.remove(run)
        run.keep([i for i in cells if columns.ids[i] not in here])
        if run.left:
            window.insert(run)
        machine.touch(run)
        yield run, gone


def _apply_redriven(machine: Machine, event: Redriven, now_ms: int) -> None:
    queue, ids = machine.numbers[event.queue], event.ids
    if event.found is not None:
        _revive_in_run(machine, event.found)
        return
    revived = 0
    for job_id in ids:
        if (entry := machine.known(job_id)) is not None:
            _revive(machine, entry, now_ms)
            revived += 1
    left = [i for i in ids if i not in machine.jobs]
    if left:
        revived += _revive_in_runs(machine, queue, left, now_ms)
        machine.wake(queue)
    assert not machine.is_live or revived == len(ids), f"{len(ids) - revived} of a redrive are no dead letters"


def _revive_in_runs(machine: Machine, queue: Queue, ids: Sequence[int], now_ms: int) -> int:
    """Revive those of these jobs that are dead letters in runs of a queue. Returns the number of jobs."""
    revived, low, high = 0, min(ids), max(ids)
    if len(ids) < FEW_JOBS:
        for job_id in ids:
            if (found := machine.locate(job_id, (queue,), DEAD)) is not None:
                _revive_in_run(machine, found)
                revived += 1
        return revived
    for window in machine.waiting[queue.number].windows(DEAD):
        if not window.around(low, high):
            continue
        for run, columns in _extract(machine, window, ids):
            columns.start_anew()
            again = Run(queue, run.priority, columns, READY)
            machine.waiting[queue.number].window(READY, run.priority).insert(again)
            machine.touch(again, again.left)
            queue.counts[DEAD] -= again.left
            queue.counts[READY] += again.left
            revived += again.left
    return revived


def _revive_in_run(machine: Machine, found: Found) -> None:
    entry = machine.take_out(found)
    entry.attempts = entry.died_at_ms = entry.due_ms = 0
    machine.enter(entry, READY)


def _apply_buried(machine: Machine, event: Buried) -> None:
    machine.meets(Buried, entry := machine.known(event.id))
    if entry is not None:
        machine.leave(entry)
        entry.queue.buried += 1
        entry.last_error = event.error
        entry.died_at_ms = event.died_at_ms
        machine.enter(entry, DEAD)


def _apply_extended(machine: Machine, event: Extended) -> None:
    machine.meets(Extended, entry := machine.known(event.id))
    if entry is not None and entry.state == LEASED:
        entry.deadline_ms = event.deadline_ms
        machine.push_deadline(entry)


def _apply_queue_removed(machine: Machine, number: int) -> None:
    gone = machine.numbers.get(number)
    if gone is not None and not any(gone.counts):  # in a salvaged log it may still hold something
        machine.forget_queue(gone)


def _apply_queue_copied(machine: Machine, event: QueueCopied, now_ms: int, place: Place) -> None:
    is_known = event.number in machine.numbers
    machine.name_queue(event.number, event.name, place.segment)
    queue = machine.changed_queue(event.number)
    queue.configure(event.config, now_ms)
    totals = event.enqueued, event.acked, event.cancelled, event.purged
    counted = (queue.enqueued, queue.acked, queue.cancelled, queue.purged)
    assert not (machine.is_live and is_known) or totals == counted, f"queue {queue.name!r}: {totals} for {counted}"
    queue.enqueued, queue.acked, queue.cancelled, queue.purged = totals


def _apply_segments_dropped(machine: Machine, upto: int) -> None:
    machine.oldest_segment = max(machine.oldest_segment, upto + 1)
    for kept in (machine.live, machine.homes):
        for segment in [s for s in kept if s <= upto]:
            del kept[segment]
    machine.keys.drop_segments(upto)


def _revive(machine: Machine, entry: Entry, now_ms: int) -> None:
    machine.meets(Redriven, entry)
    entry.attempts = entry.died_at_ms = 0
    machine.wait(entry, 0, now_ms)


def _apply_copied(machine: Machine, event: Copied, now_ms: int, place: Place) -> None:
    queue = machine.numbers[event.queue]
    size = event.length + COPY_BYTES
    old = machine.jobs.get(event.id)
    machine.next_id = max(machine.next_id, event.id + 1)
    machine.next_token = max(machine.next_token, event.token + 1)
    found = machine.locate(event.id, (queue,), priority=event.priority) if old is None else None
    if found is not None:  # it goes on waiting where it is; only its place in the log is new
        _, _, run, i = found
        columns = run.load()
        segment = columns.segments[i]
        if segment in machine.live:
            machine.live[segment] -= columns.sizes[i]
        columns.segments[i], columns.offsets[i] = place.segment, place.body_offset + event.payload_at
        columns.sizes[i], columns.lsns[i] = size, place.lsn
        machine.live[place.segment] = machine.live.get(place.segment, 0) + size
        machine.touch(run)
        return
    if old is not None:
        machine.drop(old)
    spec = Spec(event.priority, event.max_attempts, event.retry, event.visibility_ms, event.headers)
    offset = place.body_offset + event.payload_at
    entry = Entry(
        event.id, queue, spec, event.enqueued_at_ms, event.due_ms, event.key, place.segment, offset, event.length,
        event.crc, size, place.lsn,
    )  # fmt: skip
    entry.attempts, entry.token, entry.last_error = event.attempts, event.token, event.last_error
    entry.deadline_ms, entry.died_at_ms = event.deadline_ms, event.died_at_ms
    entry.indexed = old is not None and old.indexed
    if old is None and event.key is not None:
        machine.hold_key(event.queue, event.key, Key(event.id, place.segment))
    machine.insert(entry, event.state, now_ms)


def tally_expired(machine: Machine, events: Sequence[Event]) -> None:
    """Count these retries and deaths, just applied, as expired leases. A lease that never began does not count."""
    for event in events:
        if isinstance(event, Released):
            continue
        assert isinstance(event, Retried | Buried), event
        machine.jobs[event.id].queue.expired += 1  # it was leased a moment ago, so it is loose
