"""The rules as decisions: look at the machine and at `now_ms`, change nothing, return events or raise.

A caller's mistakes raise from the error tree, before anything is written. The events hold absolute values (see events),
so that nothing is decided again when the log is replayed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import attrs

from ..engine import Enqueue, KeyStands, Operation
from ..errors import JobNotFoundError, LeaseLostError, UsageError
from ..model import QueueConfig
from ..units import quoted
from . import look
from .advance import ended_leases
from .backoff import retry_delay_ms
from .entry import Entry
from .events import (
    Buried,
    Cancelled,
    Event,
    IdsReserved,
    Leased,
    Purged,
    QueueConfigured,
    QueueCreated,
    QueueRemoved,
    Redriven,
    Released,
    Retried,
)
from .machine import Machine
from .queue import DEAD, LEASED, PRIORITIES, READY, SCHEDULED, Queue

PART_JOBS = 1000
"""The most jobs that one record of a purge or a redrive changes, so that other calls get their turn in between."""
EXPIRY_BATCH = 1000
"""Leases that one call ends at most, in one record: a storm of expiries is shared among the calls and the timer."""
LEASE_EXPIRED = "lease expired"
OWNER_GONE = "owner gone"


def check(machine: Machine, operation: Operation, now_ms: int) -> list[int | None]:
    """The fence or the keys of one operation, as they stand now."""
    if isinstance(operation, KeyStands):
        return [look.find(machine, operation.queue, operation.key, now_ms)]
    if not isinstance(operation, Enqueue):
        held(machine, operation.id, operation.token, now_ms)
        return []
    return [(key and look.find(machine, operation.queue, key, now_ms)) or None for key in operation.keys or ()]


def held(machine: Machine, job_id: int, token: int, now_ms: int) -> Entry:
    """The job of a lease that is still in force, else `LeaseLostError`."""
    entry = machine.jobs.get(job_id)
    if entry is not None and entry.state == LEASED and entry.token == token and entry.deadline_ms > now_ms:
        return entry
    if entry is None:
        why = "the job was settled already, or removed"
    elif entry.token != token:
        why = "the job was delivered again" if entry.token > token else "no such delivery was made"
    elif entry.state == LEASED:
        why = f"it expired {now_ms - entry.deadline_ms} ms ago"
    else:
        why = "it was settled before, or ended"
    raise LeaseLostError(
        f"job {job_id}: lease {token} was lost ({why}); the job may run again elsewhere, so discard this result",
        job_id=job_id,
        token=token,
    )


def lease(
    machine: Machine,
    names: Sequence[str],
    max_jobs: int,
    visibility_ms: int | None,
    now_ms: int,
    max_bytes: int | None = None,
    one_at_least: bool = True,
) -> tuple[Leased | None, list[Queue]]:
    """The most urgent jobs of the queues in the order given, and the queues whose rate limit refused some.

    Their payloads have `max_bytes` together at most; but one job is leased in any case, if `one_at_least`.
    """
    ids: list[int] = []
    attempts: list[int] = []
    deadlines: list[int] = []
    places: list[tuple[int, int, int]] = []
    limited: list[Queue] = []
    for name in names:
        queue = machine.queues.get(name)
        if queue is None or queue.config.paused or not queue.counts[READY]:
            continue
        room, bucket = max_jobs - len(ids), queue.bucket
        if bucket is not None and bucket.limit.on == "lease":
            room = min(room, bucket.available(now_ms))
            if not room:
                limited.append(queue)
        default_ms = now_ms + queue.visibility_ms
        for priority in range(PRIORITIES - 1, -1, -1):
            if room <= 0:
                break
            window = machine.waiting[queue.number].ready[priority]
            if window is None or not window.count:
                continue
            wanted = room
            if max_bytes is not None:
                wanted, size = look.within(machine, window, room, max_bytes)
                if not wanted and not ids and one_at_least:
                    wanted, size = 1, max_bytes
                if wanted < min(room, window.count):
                    max_jobs = len(ids) + wanted  # the next one is too large
                    room = wanted
                max_bytes -= size
            if not wanted:
                break
            here, before, visibilities = look.head(machine, window, wanted)
            room -= (count := len(here))
            assert room >= 0, f"{-room} jobs more are leased than were asked for"
            ids += here
            attempts += [n + 1 for n in before]
            if visibility_ms is not None:
                visibilities = [visibility_ms] * count
            deadlines += [default_ms if own is None else now_ms + own for own in visibilities]
            places.append((queue.number, priority, count))
        if len(ids) == max_jobs:
            break
    if not ids:
        return None, limited
    first = machine.next_token
    return Leased(ids, list(range(first, first + len(ids))), attempts, deadlines, places), limited


def expiry(machine: Machine, now_ms: int) -> list[Event]:
    """The ends of up to EXPIRY_BATCH leases whose deadline has come, each as a nack at its deadline."""
    ended = [(at_ms, machine.jobs[i]) for at_ms, i in ended_leases(machine, now_ms, EXPIRY_BATCH)]
    return [_unbegun(machine, entry, now_ms) or failed(entry, LEASE_EXPIRED, at_ms) for at_ms, entry in ended]


def held_jobs(machine: Machine) -> list[int]:
    """The ids of all leased jobs, ascending."""
    return sorted(i for queue in machine.numbers.values() for i in queue.leased)


def owner_gone(machine: Machine, now_ms: int, job_ids: Sequence[int] | None = None) -> list[Event]:
    """The ends of leases at an opening: a job after its first attempt is ready at once, later ones wait by policy.

    Without the wait, a poison job that kills its process would be leased again and again with the same neighbours.

    Args:
        job_ids: which leases, if they have not ended meanwhile; None: all.
    """
    held = held_jobs(machine) if job_ids is None else [i for i in job_ids if i in machine.jobs]
    return [
        _unbegun(machine, entry, now_ms) or failed(entry, OWNER_GONE, now_ms, first_at_once=True)
        for entry in map(machine.jobs.__getitem__, held)
        if entry.state == LEASED
    ]


def _unbegun(machine: Machine, entry: Entry, now_ms: int) -> Released | None:
    """The end of a former owner's lease that was taken in advance and never began: its attempt does not count."""
    return Released(entry.id, now_ms, entry.attempts - 1) if entry.token in machine.unbegun else None


def failed(
    entry: Entry,
    error: str | None,
    from_ms: int,
    delay_ms: int | None = None,
    *,
    first_at_once: bool = False,
) -> Retried | Buried:
    """The end of a delivery without an ack: a retry counted from `from_ms`, or a dead letter."""
    assert entry.state == LEASED, f"job {entry.id} failed and is not leased"
    spec = entry.spec
    if spec.max_attempts is not None and entry.attempts >= spec.max_attempts:
        return Buried(entry.id, from_ms, error)
    if first_at_once and entry.attempts == 1:
        delay_ms = 0
    if delay_ms is None:
        delay_ms = retry_delay_ms(spec.retry, entry.attempts)
    return Retried(entry.id, from_ms + delay_ms, error)


def purge(machine: Machine, name: str, state: int | None, below_id: int | None = None) -> Purged | None:
    """Remove ready, scheduled and dead jobs, or those in one of these states: PART_JOBS of them at most.

    Args:
        below_id: jobs from this id on came too late and stay.
    """
    queue = machine.queues.get(name)
    if queue is None:
        return None
    wanted = _purged_states(state)
    ids = look.some_ids(machine, queue, wanted, machine.next_id if below_id is None else below_id, PART_JOBS)
    return Purged(queue.number, ids) if ids else None


def _purged_states(state: int | None) -> tuple[int, ...]:
    return (READY, SCHEDULED, DEAD) if state is None else (state,)


def purgeable(machine: Machine, name: str, state: int | None) -> int:
    """How many jobs a purge removes."""
    queue = machine.queues.get(name)
    return 0 if queue is None else sum(queue.counts[each] for each in _purged_states(state))


def cancel(machine: Machine, job_id: int) -> Cancelled | None:
    entry = machine.jobs.get(job_id)
    if entry is not None:
        return None if entry.state == LEASED else Cancelled(entry.queue.number, job_id)
    found = machine.locate(job_id, machine.numbers.values())
    return None if found is None else Cancelled(found[2].queue.number, job_id, found)


def redrive_some(machine: Machine, name: str, job_ids: Sequence[int] | None, most: int) -> Redriven | None:
    """Bring back PART_JOBS dead letters at most, in any order; of named jobs, those that are still dead."""
    queue = machine.queues.get(name)
    if queue is None:
        return None
    if job_ids is None:
        ids = look.some_ids(machine, queue, (DEAD,), machine.next_id, min(most, PART_JOBS))
    else:
        found = (look.job(machine, job_id, queue.number) for job_id in job_ids)
        ids = [entry.id for entry in found if entry is not None and entry.state == DEAD]
    return Redriven(queue.number, ids) if queue is not None and ids else None


def redrive(machine: Machine, name: str, job_ids: Sequence[int] | None, limit: int | None) -> Redriven | None:
    """Dead letters to bring back, lowest ids first."""
    queue = machine.queues.get(name)
    if job_ids is None:
        ids = [] if queue is None else machine.waiting[queue.number].ids(DEAD)[:limit]
    else:
        ids, found = sorted(set(job_ids)), None
        for job_id in ids:
            entry = machine.jobs.get(job_id)
            found = machine.locate(job_id, (queue,), DEAD) if entry is None and queue is not None else None
            is_dead = found is not None if entry is None else (entry.queue, entry.state) == (queue, DEAD)
            if not is_dead:
                raise JobNotFoundError(
                    f"redrive: job {quoted(job_id)} is no dead letter of queue {name!r}; nothing was changed",
                    job_id=job_id,
                )
        if queue is not None and len(ids) == 1 and limit != 0:
            return Redriven(queue.number, ids, found)
        ids = ids[:limit]
    return Redriven(queue.number, ids) if queue is not None and ids else None


def configure(machine: Machine, name: str, changes: Mapping[str, Any]) -> tuple[list[Event], QueueConfig]:
    """The events of the change and the whole new configuration. Creates an unknown queue, unless nothing changes."""
    queue = machine.queues.get(name)
    config = QueueConfig() if queue is None else queue.config
    changed = attrs.evolve(config, **changes)
    if not changes or (queue is None and changes == {"paused": False}):
        return [], config
    number = machine.next_queue if queue is None else queue.number
    events: list[Event] = [QueueCreated(number, name)] if queue is None else []
    if (changed, changed.paused) != (config, config.paused):
        events.append(QueueConfigured(number, changed))
    return events, changed


def remove_queue(machine: Machine, name: str, now_ms: int) -> QueueRemoved | None:
    """Remove a queue that holds nothing; None if there is no such queue."""
    queue = machine.queues.get(name)
    if queue is None:
        return None
    ready, scheduled, leased, dead = queue.counts
    if any(queue.counts):
        raise UsageError(
            f"queue {name!r} cannot be removed: {ready} ready, {scheduled} scheduled, {leased} leased and {dead} dead "
            f"jobs are in it; purge it first"
        )
    if queue.config.paused or queue.config != QueueConfig():
        raise UsageError(f"queue {name!r} is paused or configured and cannot be removed; give it the defaults first")
    if queue.keyed and machine.keys.stand_in(queue.number, now_ms):
        raise UsageError(
            f"queue {name!r} has idempotency keys that are still in force and cannot be removed; they end "
            f"{queue.config.idempotency_ttl:g} s after their jobs"
        )
    return QueueRemoved(queue.number)


def ids(machine: Machine, count: int, block: int) -> IdsReserved | None:
    """The reservation to write down before the next `count` ids may be told; None if one covers them."""
    upto = machine.next_id + count
    return IdsReserved(upto + block) if upto > machine.reserved_id else None
