"""Applying an `Enqueued`: its jobs go into the runs of their window, a batch with a handful of array operations."""

from __future__ import annotations

from .columns import PAYLOAD_BYTES, RUN_JOBS, Columns
from .entry import Entry, Spec
from .events import Enqueued
from .keys import Key
from .machine import Machine
from .queue import READY, SCHEDULED, Queue
from .run import Run
from .snapshot import JOB_BYTES, RECORD_BYTES, Place
from .window import FEW_JOBS, Window


def apply_enqueued(machine: Machine, event: Enqueued, now_ms: int, place: Place) -> None:
    queue = machine.numbers[event.queue]
    if machine.changes is not None:
        machine.changes.queues.add(event.queue)
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
            job_id, lengths if whole else lengths[part], event.crcs if whole else event.crcs[part],
            _spec(event, columns), now_ms, event.due_ms, (segment, offset, place.lsn), overhead,
            None if event.keys is None else event.keys[part],
            (event.payloads if whole else event.payloads[part]) if keep else None,
        )  # fmt: skip
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
    """The `Spec` that the jobs of the event share. It is the object of the jobs before them, if that is equal."""
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
        machine.unpack((entry,))
        machine.note(entry)
        machine.line_up(entry)
