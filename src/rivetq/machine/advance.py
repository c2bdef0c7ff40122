"""The changes that the clock alone makes, and when it acts next: delays fall due, tokens come, keys end.

None of this is logged: after a recovery the clock makes the same changes again.
"""

from __future__ import annotations

import heapq

from .machine import Machine
from .queue import LEASED, NEVER_MS, READY, SCHEDULED, Queue
from .ratelimit import TokenBucket

RIPE_JOBS = 5000
"""Loose jobs that one call to `advance` moves at most, so that no caller pays for a storm; the rest is moved next."""
RUN_COST = 3
"""A run that is moved, or a window in which something is due, costs as much as so many loose jobs."""


def advance(machine: Machine, now_ms: int) -> None:
    """Let the clock act: due jobs become ready, ended keys are forgotten. Not logged: a replay does the same again.

    A storm is taken in parts: then `wake_ms` stays at or below `now_ms`, and the next call goes on.
    """
    assert now_ms >= machine.now_ms, f"time line stepped back: {machine.now_ms} -> {now_ms}"
    machine.now_ms = now_ms
    if now_ms < machine.wake_ms:
        return
    room = RIPE_JOBS
    due, due_upto_ms = machine.due, now_ms - machine.grain_ms
    while due and due[0][0] <= due_upto_ms and room > 0:
        _, number, priority = heapq.heappop(due)
        if (queue := machine.numbers.get(number)) is not None:
            room -= _ripen(machine, queue, priority, due_upto_ms, room)
    while machine.tokens and machine.tokens[0][0] <= now_ms:
        at_ms, number = heapq.heappop(machine.tokens)
        queue = machine.numbers.get(number)
        if queue is not None and queue.token_at_ms == at_ms:
            queue.token_at_ms = NEVER_MS
            machine.wake(queue)
    while room > 0 and (end := machine.keys.first_end()) is not None and end[0] <= now_ms:
        machine.keys.forget(*end[1:])
        room -= 1
    next_wakeup_ms(machine)


def _ripen(machine: Machine, queue: Queue, priority: int, now_ms: int, room: int) -> int:
    """Make the due jobs of one window ready; whole runs at a time where that goes. What it cost, in loose jobs."""
    window = machine.waiting[queue.number].scheduled[priority]
    if window is None:
        return 0
    ready = machine.waiting[queue.number].window(READY, priority)
    moved = before = window.count
    cost = RUN_COST
    while window.runs and window.runs[0].head[0] <= now_ms:  # in any order: all of them go
        run = window.runs[0]
        if run.last[0] > now_ms:
            run.close_holes()
            count = run.below((now_ms + 1, 0), run.at) - run.at
            part = run.split(count)
            window.popped(run, count)
            machine.touch(run)
            run = part
            machine.touch(part, part.left)
        else:
            window.remove(run)
        if run.order_by_id():
            machine.touch(run)
        ready.insert(run)
        cost += RUN_COST
    loose = window.loose
    keys = list(loose.islice(0, min(room, loose.bisect_left((now_ms + 1, 0)))))
    for key in keys:
        entry = machine.jobs[key[1]]
        entry.state = READY
        ready.add(entry.id)
    del loose[: len(keys)]
    window.count -= len(keys)
    moved = before - window.count
    queue.counts[SCHEDULED] -= moved
    queue.counts[READY] += moved
    machine.wake(queue)
    if (first := window.first()) is not None:
        heapq.heappush(machine.due, (first[0], queue.number, priority))
    return cost + len(keys)


def next_wakeup_ms(machine: Machine) -> int | None:
    """When the clock acts next: a delay falls due or a lease ends."""
    lease = _first_deadline(machine)
    at_ms = min(_first_due_ms(machine), _first_token_ms(machine), NEVER_MS if lease is None else lease[0])
    end = machine.keys.first_end()
    machine.wake_ms = at_ms if end is None else min(at_ms, end[0])
    return None if at_ms == NEVER_MS else at_ms


def _first_due_ms(machine: Machine) -> int:
    due = machine.due
    while due:
        due_ms, number, priority = due[0]
        queue = machine.numbers.get(number)
        window = None if queue is None else machine.waiting[queue.number].scheduled[priority]
        first = None if window is None else window.first()
        if first is not None and first[0] == due_ms:
            return due_ms + machine.grain_ms
        if first is not None and first[0] > due_ms:
            heapq.heapreplace(due, (first[0], number, priority))
        else:
            heapq.heappop(due)
    return NEVER_MS


def _first_token_ms(machine: Machine) -> int:
    tokens = machine.tokens
    while tokens:
        at_ms, number = tokens[0]
        queue = machine.numbers.get(number)
        if queue is not None and queue.token_at_ms == at_ms:
            return at_ms
        heapq.heappop(tokens)
    return NEVER_MS


def expect_token(machine: Machine, queue: Queue, now_ms: int) -> None:
    """A lessee waits for the rate limit of a queue: its next token is a moment at which the clock acts."""
    bucket = queue.bucket
    if bucket is not None and bucket.limit.on == "lease":
        at_ms = bucket.ready_at_ms(1, now_ms)
        if at_ms < queue.token_at_ms:
            queue.token_at_ms = at_ms
            heapq.heappush(machine.tokens, (at_ms, queue.number))
            machine.expect(at_ms)


def ended_leases(machine: Machine, now_ms: int, limit: int) -> list[tuple[int, int]]:
    """(deadline_ms, id) of up to `limit` leases whose deadline has come, earliest first."""
    if _first_deadline(machine) is None:
        return []
    ended: dict[tuple[int, int], None] = {}  # an extend may have left the same pair twice
    # In the order of the heap without changing it: nothing has happened yet, apply makes these pairs stale.
    heap, jobs = machine.deadlines, machine.jobs
    coming = [(heap[0], 0)]
    while coming and len(ended) < limit and coming[0][0][0] <= now_ms:
        pair, at = heapq.heappop(coming)
        entry = jobs.get(pair[1])
        if entry is not None and entry.state == LEASED and entry.deadline_ms == pair[0]:
            ended[pair] = None
        for child in (2 * at + 1, 2 * at + 2):
            if child < len(heap):
                heapq.heappush(coming, (heap[child], child))
    return list(ended)


def _first_deadline(machine: Machine) -> tuple[int, int] | None:
    heap = machine.deadlines
    if not machine.leased_count:
        heap.clear()  # in one step: after a storm there may be a hundred thousand
    while heap:
        deadline_ms, job_id = heap[0]
        entry = machine.jobs.get(job_id)
        if entry is not None and entry.state == LEASED and entry.deadline_ms == deadline_ms:
            return heap[0]
        heapq.heappop(heap)
    return None


def resume(machine: Machine, now_ms: int, first_token: int) -> None:
    """After a recovery: told ids are not told again, tokens continue above all former ones, buckets are full."""
    machine.next_id = max(machine.next_id, machine.reserved_id)
    machine.next_token = max(machine.next_token, first_token)
    for queue in machine.numbers.values():
        limit = queue.config.rate_limit
        queue.bucket = None if limit is None else TokenBucket(limit, now_ms)
        queue.start_tallies()
    machine.is_live = True
    advance(machine, now_ms)
