"""Moves the state to the index and back, and packs loose jobs into runs for it."""

from __future__ import annotations

from collections.abc import Iterable

from .advance import next_wakeup_ms
from .apply import apply
from .columns import RUN_JOBS, Columns
from .entry import Entry
from .events import QueueCopied
from .machine import Machine
from .queue import READY, Queue
from .run import Run
from .sessions import load_sessions
from .snapshot import Place, Session, Snapshot
from .window import FEW_JOBS, Window


def snapshot(machine: Machine) -> Snapshot:
    """The part of the state that is neither jobs, keys nor queues, for a segment's header and the index."""
    sessions = [Session(each.id, each.done_below, dict(each.answers)) for each in machine.sessions.values()]
    return Snapshot(machine.next_id, machine.reserved_id, machine.oldest_segment, machine.now_ms, sessions)


def queue_copied(queue: Queue) -> QueueCopied:
    """All facts of a queue except its jobs and keys."""
    return QueueCopied(
        queue.number, queue.name, queue.config, queue.enqueued, queue.acked, queue.cancelled, queue.purged
    )


def load(machine: Machine, snapshot: Snapshot) -> None:
    """Start from a snapshot; the machine is empty."""
    assert not machine.numbers, "a snapshot is loaded into an empty machine"
    machine.next_id = snapshot.next_id
    machine.reserved_id = snapshot.reserved_id
    machine.oldest_segment = snapshot.oldest_segment
    machine.now_ms = snapshot.now_ms
    load_sessions(machine, snapshot.sessions)


def load_queue(machine: Machine, saved: QueueCopied, segment: int) -> None:
    """A queue of the index, written in this segment."""
    apply(machine, saved, machine.now_ms, Place(segment))
    assert machine.changes is not None, "a queue of an index is loaded into memory without one"
    machine.changes.queues.discard(saved.number)


def load_entry(machine: Machine, entry: Entry, state: int) -> None:
    """A loose job of the index."""
    entry.indexed = True
    machine.next_token = max(machine.next_token, entry.token + 1)
    machine.insert(entry, state, machine.now_ms)
    if machine.changes is not None:
        machine.changes.jobs.discard(entry.id)


def load_run(machine: Machine, run: Run, live: Iterable[tuple[int, int]]) -> None:
    """A run of the index, its columns still there; `live`: bytes per segment."""
    machine.next_run = max(machine.next_run, run.number + 1)
    run.queue.counts[run.state] += run.left
    window = machine.waiting[run.queue.number].window(run.state, run.priority)
    window.insert(run)
    if window.by_due:
        machine.expect_due(window, run.head, run.queue, run.priority)
    for segment, size in live:
        machine.live[segment] = machine.live.get(segment, 0) + size
    if run.state == READY:
        machine.wake(run.queue)


def crowded(machine: Machine, limit: int) -> list[tuple[int, Window]]:
    """Windows with loose jobs to put into runs, each with its state, if there are more than `limit` in all."""
    if len(machine.jobs) - machine.leased_count <= limit:
        return []
    return [
        (state, window)
        for queue in machine.numbers.values()
        for state, window in machine.waiting[queue.number].each()
        if len(window.loose) > FEW_JOBS
    ]


def pack(machine: Machine, state: int, window: Window, count: int) -> bool:
    """Put the last `count` loose jobs of a window into a run, all but the head; False if there are no more."""
    count = min(count, RUN_JOBS, len(window.loose) - FEW_JOBS)
    if count <= 0:
        return False
    columns, changes = Columns(), machine.changes
    for key in window.loose[-count:]:
        entry = machine.jobs.pop(key[1] if window.by_due else key)
        columns.add(entry)
        if changes is not None:
            if entry.indexed:
                changes.packed.add(entry.id)
            (changes.jobs.add if entry.id in changes.packed else changes.jobs.discard)(entry.id)
    del window.loose[-count:]
    window.count -= count
    run = Run(entry.queue, entry.spec.priority, columns, state)
    window.insert(run)
    machine.touch(run, count)
    return True


def thaw_keys(machine: Machine) -> None:
    """See `Keys.thaw`."""
    machine.keys.thaw()
    next_wakeup_ms(machine)
