"""What each event changes. Nothing here can fail; it tolerates events that the state already includes (see events)."""

from __future__ import annotations

import heapq
from array import array
from collections.abc import Iterator, Sequence
from typing import assert_never

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
from .machine import Machine
from .queue import DEAD, LEASED, NEVER_MS, READY, SCHEDULED, Queue
from .run import PAYLOAD_BYTES, RUN_JOBS, Columns, Run
from .sessions import note_called
from .snapshot import COPY_BYTES, JOB_BYTES, RECORD_BYTES, Place
from .window import FEW_JOBS, Window


def apply(machine: Machine, event: Event, now_ms: int, place: Place) -> None:
    """Make it so. Cannot fail; tolerates events that the state already includes (see events)."""
    match event:
        case Enqueued():
            _apply_enqueued(machine, event, now_ms, place)
        case Leased():
            _apply_leased(machine, event, now_ms)
        case Acked():
            machine.changed_queue(event.queue).acked += len(event.ids)
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
            machine.meets(Cancelled, entry := machine.loosen(event.id, (queue,)))
            if entry is not None:
                machine.remove((event.id,))
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
            machine.sessions.pop(event.session, None)
        case _:
            assert_never(event)


def _apply_enqueued(machine: Machine, event: Enqueued, now_ms: int, place: Place) -> None:
    queue = machine.changed_queue(event.queue)
    count, first_id, lengths = len(event.lengths), event.first_id, event.lengths
    if count == 1 and first_id >= machine.next_id and event.keys is None and event.due_ms <= now_ms:
        window = machine.waiting[queue.number].ready[event.priority]
        if window is not None and (run := window.open_for(first_id)) is not None:
            _enqueue_next(machine, event, queue, window, run, now_ms, place)
            return
    state = SCHEDULED if event.due_ms > now_ms else READY
    window = machine.waiting[queue.number].window(state, event.priority)
    overhead = RECORD_BYTES // count + JOB_BYTES
    offset, segment = place.body_offset + event.payload_at, place.segment
    keep = machine.keep_payloads or (machine.cache.most > 0 and bool(event.payloads))
    if first_id < machine.next_id:
        _drop_known(machine, first_id, count)
    for job_id, text in enumerate(event.keys or (), first_id):
        if text is not None:
            machine.hold_key(event.queue, text, Key(job_id, segment))
    at = 0
    while at < count:
        job_id = first_id + at
        run = window.open_for((event.due_ms, job_id) if window.by_due else job_id)
        if run is None and count - at < FEW_JOBS and len(window.opens) > 1 and not window.opens[0].is_full:
            _enqueue_loose(machine, event, at, queue, now_ms, place, overhead)
            break
        columns = Columns() if run is None else run.load()
        stop = min(count, at + RUN_JOBS - len(columns))
        part = slice(at, stop)
        whole = stop - at == count
        columns.add_batch(
            job_id,
            lengths if whole else lengths[part],
            event.crcs if whole else event.crcs[part],
            _spec(event, columns),
            now_ms,
            event.due_ms,
            (segment, offset, place.lsn),
            overhead,
            None if event.keys is None else event.keys[part],
            (event.payloads if whole else event.payloads[part]) if keep else None,
        )
        if not whole:
            offset += sum(lengths[part])
        if run is None:
            run = Run(queue, event.priority, columns, state)
            window.insert(run, is_open=True)
            if window.by_due:
                machine.expect_due(window, run.head, queue, event.priority)
        else:
            window.grown(run, stop - at)
        if keep and not machine.keep_payloads:
            machine.cache.add(columns, sum(lengths[part]) + PAYLOAD_BYTES * (stop - at))
        machine.touch(run, stop - at)
        at = stop
    size = sum(lengths) + overhead * count if count > 1 else lengths[0] + overhead
    if segment:
        machine.live[segment] = machine.live.get(segment, 0) + size
    if not machine.keep_payloads and machine.cache.size > machine.cache.most:
        machine.cache.trim()
    _count_enqueued(machine, queue, state, first_id, count, now_ms)


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


def _count_enqueued(machine: Machine, queue: Queue, state: int, first_id: int, count: int, now_ms: int) -> None:
    queue.counts[state] += count
    if state == READY:
        machine.wake(queue)
    if queue.bucket is not None and queue.bucket.limit.on == "enqueue":
        queue.bucket.take(count, now_ms)
    queue.enqueued += count
    if first_id + count > machine.next_id:
        machine.next_id = first_id + count


def _drop_known(machine: Machine, first_id: int, count: int) -> None:
    """Ids that were told in advance, or jobs that a checkpoint took while the log went on."""
    machine.promised.pop(first_id, None)
    for job_id in range(first_id, first_id + count):
        if (known := machine.known(job_id)) is not None:
            if known.indexed and machine.changes is not None:
                machine.changes.packed.add(job_id)
            machine.drop(known)


def _enqueue_next(
    machine: Machine, event: Enqueued, queue: Queue, window: Window, run: Run, now_ms: int, place: Place
) -> None:
    """One ready job without a key behind those of an open run: what most calls do."""
    columns, payloads, length = run.load(), event.payloads, event.lengths[0]
    payload = payloads[0] if payloads and (machine.keep_payloads or machine.cache.most) else None
    size, segment = length + RECORD_BYTES + JOB_BYTES, place.segment
    columns.append(
        event.first_id, now_ms, event.due_ms, segment, place.body_offset + event.payload_at, length,
        event.crcs[0] if event.crcs else 0, size, place.lsn, _spec(event, columns), None, payload,
    )  # fmt: skip
    window.grown_by_one(run, event.first_id)
    changes = machine.changes
    if changes is not None:
        changes.cells += 1
        changes.runs.add(run)
        machine.live[segment] = machine.live.get(segment, 0) + size
        if payload is not None:
            machine.cache.add(columns, length + PAYLOAD_BYTES)
            if machine.cache.size > machine.cache.most:
                machine.cache.trim()
    queue.counts[READY] += 1
    queue.enqueued += 1
    machine.next_id = event.first_id + 1
    if not queue.config.paused:
        machine.woken.add(queue.name)
    if queue.bucket is not None and queue.bucket.limit.on == "enqueue":
        queue.bucket.take(1, now_ms)


def _spec(event: Enqueued, columns: Columns) -> Spec:
    """What the jobs of the event share; the one object of the jobs before them if that is the same."""
    last = columns.specs[-1] if columns.specs else None
    if (
        last is not None
        and last.retry is event.retry
        and last.max_attempts == event.max_attempts
        and last.visibility_ms == event.visibility_ms
        and (last.headers is event.headers or last.headers == event.headers)
    ):
        return last
    return Spec(event.priority, event.max_attempts, event.retry, event.visibility_ms, event.headers)


def _enqueue_loose(
    machine: Machine, event: Enqueued, at: int, queue: Queue, now_ms: int, place: Place, overhead: int
) -> None:
    """Jobs whose ids were told long before (by transactions): they find their place among the others."""
    spec = Spec(event.priority, event.max_attempts, event.retry, event.visibility_ms, event.headers)
    offset = place.body_offset + event.payload_at + sum(event.lengths[:at])
    for i in range(at, len(event.lengths)):
        length = event.lengths[i]
        key = None if event.keys is None else event.keys[i]
        entry = Entry(
            event.first_id + i, queue, spec, now_ms, event.due_ms, key, place.segment, offset, length,
            event.crcs[i] if event.crcs else 0, length + overhead, place.lsn,
            event.payloads[i] if machine.keep_payloads else None, SCHEDULED if event.due_ms > now_ms else READY,
        )  # fmt: skip
        offset += length
        machine.jobs[entry.id] = entry
        machine.note(entry)
        machine.line_up(entry)


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
    """Add the jobs of these ids to `entries`; those in a run become objects. Usually they are the head of one."""
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
        if count > 1 and column[first : first + count] != array("Q", ids[at : at + count]):
            count = next(i for i in range(1, n - at + 1) if i == count or column[first + i] != ids[at + i])
        popped = run.pop(count, LEASED)
        window.popped(run, count)
        machine.touch(run)
        for entry in popped:
            jobs[entry.id] = entry
        queue.leased.update(column[first : first + count])
        queue.counts[READY] -= count
        queue.counts[LEASED] += count
        machine.leased_count += count
        entries += popped
        at += count


def _apply_purged(machine: Machine, queue: Queue, ids: Sequence[int]) -> None:
    machine.remove([i for i in ids if i in machine.jobs])
    if len(ids) == 1:
        if machine.loosen(ids[0], (queue,)) is not None:
            machine.remove(ids)
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
    """Take the jobs of these ids out of the runs of a window: each run, and what left it."""
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
    """Those of these jobs that are dead letters in runs of a queue; how many."""
    revived, low, high = 0, min(ids), max(ids)
    for window in machine.waiting[queue.number].windows(DEAD):
        if not window.around(low, high):
            continue
        if len(ids) < FEW_JOBS:
            for job_id in ids:
                if (entry := machine.loosen(job_id, (queue,), DEAD)) is not None and entry.state == DEAD:
                    _revive(machine, entry, now_ms)
                    revived += 1
            break
        for run, columns in _extract(machine, window, ids):
            columns.start_anew()
            again = Run(queue, run.priority, columns, READY)
            machine.waiting[queue.number].window(READY, run.priority).insert(again)
            machine.touch(again, again.left)
            queue.counts[DEAD] -= again.left
            queue.counts[READY] += again.left
            revived += again.left
    return revived


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
    """These retries and deaths, just applied, were not an answer's. What never began has not expired."""
    for event in events:
        if isinstance(event, Released):
            continue
        assert isinstance(event, Retried | Buried), event
        machine.jobs[event.id].queue.expired += 1  # it was leased a moment ago, so it is loose
