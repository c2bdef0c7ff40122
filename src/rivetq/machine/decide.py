"""The rules as decisions: look at the machine and at `now_ms`, change nothing, return events or raise.

A caller's mistakes raise from the error tree, before anything is written. What is returned is in absolute values (see
events), so that nothing is decided again when the log is replayed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, assert_never, cast

import attrs

from ..engine import Ack, Enqueue, Extend, KeyStands, Nack, Operation, Reject, Release
from ..errors import DuplicateJobError, JobNotFoundError, LeaseLostError, QueueFullError, RateLimitedError, UsageError
from ..model import NO_HEADERS, JobId, QueueConfig, RetryPolicy, quoted
from . import look
from .advance import ended_leases
from .backoff import retry_delay_ms
from .entry import Entry
from .events import (
    Acked,
    Buried,
    Cancelled,
    Enqueued,
    Event,
    Extended,
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
from .queue import DEAD, LEASED, PRIORITIES, READY, SCHEDULED, STATES, Queue

SKEW_MS = 2
"""The time line and the wall clock differ by so much from rounding alone."""
PART_JOBS = 1000
"""Jobs that one record of a purge or a redrive changes at most, so that other calls get their turn in between."""
EXPIRY_BATCH = 1000
"""Leases that end in one record, so that a storm of expiries does not become one giant record."""
LEASE_EXPIRED = "lease expired"
OWNER_GONE = "owner gone"


def commit(machine: Machine, operations: Sequence[Operation], now_ms: int) -> tuple[list[Event], list[Any]]:
    """Events and answers of a commit: all of the operations or an error."""
    first = operations[0] if operations else None
    if type(first) is Enqueue and len(operations) == 1 and first.keys is None and first.promised is None:
        queue = machine.queues.get(first.queue)
        if queue is not None and first.payloads:
            return _enqueued(machine, queue, first, now_ms)
    elif type(first) is Ack and all(type(operation) is Ack for operation in operations):
        return _acked(machine, cast(Sequence[Ack], operations), now_ms), [None] * len(operations)
    plan = _Plan(machine, now_ms)
    answers = [plan.decide(operation) for operation in operations]
    plan.check_limits()
    return plan.events, answers


def _enqueued(machine: Machine, queue: Queue, operation: Enqueue, now_ms: int) -> tuple[list[Event], list[Any]]:
    """What `_Plan` would decide, for one enqueue without keys into a queue that exists."""
    count = len(operation.payloads)
    config = queue.config
    if queue.bucket is not None or config.max_jobs is not None:
        _check_burst(queue, count)
        _check_limits(queue, count, count, now_ms)
    first_id = machine.next_id
    due_ms = _due_ms(machine, operation, now_ms)
    events: list[Event] = [_new_jobs(operation, queue.number, config.retry, first_id, operation.payloads, None, due_ms)]
    if machine.id_block and (reserved := ids(machine, count, machine.id_block)):
        events.insert(0, reserved)
    return events, [list(range(first_id, first_id + count))]


def _due_ms(machine: Machine, operation: Enqueue, now_ms: int) -> int:
    """The moment on the time line at which new jobs are due; 0: at once."""
    eta_ms = operation.eta_ms
    if eta_ms is None:
        return now_ms + operation.delay_ms if operation.delay_ms else 0
    ahead_ms = 0 if machine.ahead_ms is None else machine.ahead_ms(now_ms)
    if abs(ahead_ms) > SKEW_MS:  # the wall clock was set since the time line began
        eta_ms -= ahead_ms
    return eta_ms if eta_ms > now_ms else 0


def _new_jobs(
    operation: Enqueue,
    number: int,
    policy: RetryPolicy,
    first_id: int,
    payloads: Sequence[bytes],
    keys: Sequence[str | None] | None,
    due_ms: int,
) -> Enqueued:
    """The jobs of an enqueue; `policy` is the queue's."""
    retry = operation.retry or policy
    return Enqueued(
        number,
        first_id,
        operation.priority,
        due_ms,
        retry.max_attempts if operation.max_attempts is None else operation.max_attempts,
        retry,
        operation.visibility_ms,
        list(map(len, payloads)),
        payloads,
        operation.headers or NO_HEADERS,
        keys,
    )


def _check_burst(queue: Queue, count: int) -> None:
    bucket = queue.bucket
    if bucket is not None and bucket.limit.on == "enqueue" and count > bucket.limit.burst:
        raise UsageError(
            f"queue {queue.name!r}: {count} jobs in a batch never pass its rate limit with "
            f"burst={bucket.limit.burst}; split it"
        )


def _check_limits(queue: Queue, new: int, live: int, now_ms: int) -> None:
    """max_jobs and the enqueue rate, for `new` jobs and a change of `live` in the places that are taken."""
    limit = queue.config.max_jobs
    if limit is not None and queue.occupied() + live > limit:
        raise QueueFullError(
            f"queue {queue.name!r} is full: {queue.occupied()} of max_jobs={limit} places are taken and {new} "
            f"more asked for; nothing was enqueued, try again after some jobs are done",
            queue=queue.name,
            max_jobs=limit,
        )
    bucket = queue.bucket
    if bucket is not None and bucket.limit.on == "enqueue" and new > bucket.available(now_ms):
        retry_after = (bucket.ready_at_ms(new, now_ms) - now_ms) / 1000
        raise RateLimitedError(
            f"queue {queue.name!r} is over its rate of {bucket.limit.per_second:g} jobs a second; none of these "
            f"{new} was enqueued, try again in {retry_after:.3f} s, at most {bucket.limit.burst} at once",
            queue=queue.name,
            retry_after=retry_after,
        )


def _acked(machine: Machine, operations: Sequence[Ack], now_ms: int) -> list[Event]:
    """What `_Plan` would decide, for nothing but acks: the end of every job passes here."""
    events: list[Event] = []
    seen: set[int] = set()
    ids: list[int] = []
    queue = None
    for operation in operations:
        job_id = operation.id
        if job_id in seen:
            raise _settled_twice(operation)
        seen.add(job_id)
        entry = held(machine, job_id, operation.token, now_ms)
        if entry.queue is not queue:
            queue, ids = entry.queue, []
            events.append(Acked(queue.number, ids))
        ids.append(job_id)
    return events


def _settled_twice(operation: Ack | Nack | Release | Reject | Extend) -> LeaseLostError:
    return LeaseLostError(
        f"job {operation.id}: lease {operation.token} is settled twice in one call; nothing was changed",
        job_id=operation.id,
        token=operation.token,
    )


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
) -> tuple[Leased | None, list[Queue]]:
    """The most urgent jobs of the queues in the order given, and the queues whose rate limit refused some.

    Their payloads have `max_bytes` together at most; but one job is leased in any case.
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
        room = max_jobs - len(ids)
        bucket = queue.bucket
        if bucket is not None and bucket.limit.on == "lease":
            allowed = bucket.available(now_ms)
            if not allowed:
                limited.append(queue)
            room = min(room, allowed)
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
                if not wanted and not ids:
                    wanted, size = 1, max_bytes
                if wanted < min(room, window.count):
                    max_jobs = len(ids) + wanted  # the next one is too large
                    room = wanted
                max_bytes -= size
            if not wanted:
                break
            here, before, visibilities = look.head(machine, window, wanted)
            room -= (count := len(here))
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
    return sorted(i for queue in machine.queues.values() for i in queue.leased)


def owner_gone(machine: Machine, now_ms: int, job_ids: Sequence[int] | None = None) -> list[Event]:
    """The ends of leases, for an opening: a first attempt is ready at once, later ones wait by policy.

    A poison job that takes its process with it would otherwise be leased again and again beside the same
    neighbours.

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
    spec = entry.spec
    if spec.max_attempts is not None and entry.attempts >= spec.max_attempts:
        return Buried(entry.id, from_ms, error)
    if first_at_once and entry.attempts == 1:
        delay_ms = 0
    if delay_ms is None:
        delay_ms = retry_delay_ms(spec.retry, entry.attempts)
    return Retried(entry.id, from_ms + delay_ms, error)


def purge(machine: Machine, name: str, state: int | None, below_id: int | None = None) -> Purged | None:
    """Removal of the ready, scheduled and dead jobs, or of one of these states: of some PART_JOBS of them.

    Args:
        below_id: those from this id on came too late.
    """
    queue = machine.queues.get(name)
    if queue is None:
        return None
    wanted = (READY, SCHEDULED, DEAD) if state is None else (state,)
    ids = look.some_ids(machine, queue, wanted, machine.next_id if below_id is None else below_id, PART_JOBS)
    return Purged(queue.number, ids) if ids else None


def cancel(machine: Machine, job_id: int) -> Cancelled | None:
    entry = look.job(machine, job_id)
    return None if entry is None or entry.state == LEASED else Cancelled(entry.queue.number, job_id)


def redrive_some(machine: Machine, name: str, job_ids: Sequence[int] | None, most: int) -> Redriven | None:
    """PART_JOBS dead letters to bring back, in any order; of those that are named, the ones that are still dead."""
    queue = machine.queues.get(name)
    if queue is None:
        return None
    if job_ids is None:
        ids = look.some_ids(machine, queue, (DEAD,), machine.next_id, min(most, PART_JOBS))
    else:
        found = (look.job(machine, job_id, queue.number) for job_id in job_ids)
        ids = [entry.id for entry in found if entry is not None and entry.state == DEAD]
    return Redriven(ids) if ids else None


def redrive(machine: Machine, name: str, job_ids: Sequence[int] | None, limit: int | None) -> Redriven | None:
    """Dead letters to bring back, lowest ids first."""
    queue = machine.queues.get(name)
    if job_ids is None:
        ids = [] if queue is None else machine.waiting[queue.number].ids(DEAD)[:limit]
    else:
        ids = sorted(set(job_ids))
        for job_id in ids:
            entry = None if queue is None else look.job(machine, job_id, queue.number)
            if entry is None or entry.queue is not queue or entry.state != DEAD:
                raise JobNotFoundError(
                    f"redrive: job {quoted(job_id)} is no dead letter of queue {name!r}; nothing was changed",
                    job_id=job_id,
                )
        ids = ids[:limit]
    return Redriven(ids) if ids else None


def configure(machine: Machine, name: str, changes: Mapping[str, Any]) -> list[Event]:
    """The whole new configuration of a queue, which is created if it is unknown."""
    queue = machine.queues.get(name)
    events: list[Event] = []
    if queue is None:
        number = machine.next_queue
        events.append(QueueCreated(number, name))
        config = QueueConfig()
    else:
        number, config = queue.number, queue.config
    changed = attrs.evolve(config, **changes)
    if (changed, changed.paused) != (config, config.paused):
        events.append(QueueConfigured(number, changed))
    return events


def remove_queue(machine: Machine, name: str, now_ms: int) -> QueueRemoved | None:
    """The end of a queue in which nothing is; None if there is no such queue."""
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


class _Plan:
    """The decisions of one commit, each seeing those before it; the machine stays as it is."""

    __slots__ = (
        "_created", "_deadlines", "_events", "_freed", "_keys", "_live", "_machine", "_new", "_next_id", "_now_ms",
        "_promised", "_settled",
    )  # fmt: skip

    def __init__(self, machine: Machine, now_ms: int) -> None:
        self._machine = machine
        self._now_ms = now_ms
        self._events: list[Event] = []
        self._settled: set[int] = set()
        self._keys: dict[tuple[str, str], int] = {}
        self._live: dict[str, int] = {}  # change of the occupied places per queue
        self._new: dict[str, int] = {}  # new jobs per queue
        self._created: dict[str, int] = {}  # numbers of queues that this commit creates
        self._deadlines: dict[int, int] = {}  # of leases that this commit extends, by job
        self._freed: set[int] = set()  # jobs whose keys end with their acks in this commit
        self._promised: set[int] = set()  # first ids of promises that this commit keeps
        self._next_id = machine.next_id

    @property
    def events(self) -> list[Event]:
        return self._events

    def decide(self, operation: Operation) -> Any:
        match operation:
            case Enqueue():
                return self._enqueue(operation)
            case Ack():
                entry = self._settle(operation)
                if entry.key is not None and not entry.queue.ttl_ms:
                    self._freed.add(entry.id)
                last = self._events[-1] if self._events else None
                if isinstance(last, Acked) and last.queue == entry.queue.number:
                    assert isinstance(last.ids, list)
                    last.ids.append(entry.id)
                else:
                    self._events.append(Acked(entry.queue.number, [entry.id]))
                self._count(self._live, entry.queue.name, -1)
            case Nack():
                entry = self._settle(operation)
                event = failed(entry, operation.error, self._now_ms, operation.delay_ms)
                if isinstance(event, Buried):
                    self._count(self._live, entry.queue.name, -1)
                self._events.append(event)
            case Release():
                entry = self._settle(operation)
                self._events.append(Released(entry.id, self._now_ms + operation.delay_ms, entry.attempts - 1))
            case Reject():
                entry = self._settle(operation)
                self._events.append(Buried(entry.id, self._now_ms, operation.error))
                self._count(self._live, entry.queue.name, -1)
            case Extend():
                entry = self._held(operation)
                before_ms = self._deadlines.get(entry.id, entry.deadline_ms)
                deadline_ms = self._deadlines[entry.id] = max(before_ms, self._now_ms + operation.extra_ms)
                if deadline_ms > before_ms:
                    self._events.append(Extended(entry.id, deadline_ms))
                return deadline_ms
            case KeyStands():
                found = self._keys.get((operation.queue, operation.key)) or self._standing(
                    operation.queue, operation.key
                )
                if found != operation.id:
                    raise JobNotFoundError(
                        f"queue {operation.queue!r}: idempotency key {operation.key!r} does not stand for job "
                        f"{operation.id} any more, as the transaction was told; nothing was done, make it again",
                        job_id=operation.id,
                    )
            case _:
                assert_never(operation)
        return None

    def check_limits(self) -> None:
        """max_jobs and enqueue rates, at the end: an ack in the same commit makes room for a job before it."""
        for name, count in self._new.items():
            queue = self._machine.queues.get(name)
            if queue is not None:
                _check_burst(queue, count)  # of all batches together: no waiting would help
                _check_limits(queue, count, self._live[name], self._now_ms)

    def _enqueue(self, operation: Enqueue) -> list[int]:
        name, payloads, keys = operation.queue, operation.payloads, operation.keys
        if operation.promised is not None and not self._keeps_promise(operation, operation.promised):
            return list(range(operation.promised, operation.promised + len(payloads)))
        answer: list[int | None] = []
        fresh = range(len(payloads)) if keys is None else self._fresh(operation, answer)
        count = len(fresh)
        if not count:
            return [i for i in answer if i is not None]
        machine = self._machine
        queue = machine.queues.get(name)
        if operation.promised is not None:
            first_id = operation.promised
        else:
            first_id = self._next_id
            self._next_id += count
            if machine.id_block and (reserved := ids(machine, self._next_id - machine.next_id, machine.id_block)):
                self._events.append(reserved)
        number = self._number(name) if queue is None else queue.number
        policy = _DEFAULT_RETRY if queue is None else queue.config.retry
        if count != len(payloads):
            payloads = [payloads[i] for i in fresh]
        new_keys = None if keys is None else [keys[i] for i in fresh]
        due_ms = _due_ms(machine, operation, self._now_ms)
        self._events.append(_new_jobs(operation, number, policy, first_id, payloads, new_keys, due_ms))
        self._count(self._live, name, count)
        self._count(self._new, name, count)
        if keys is None:
            return list(range(first_id, first_id + count))
        for job_id, i in enumerate(fresh, first_id):
            answer[i] = JobId(job_id, created=True)
            if (key := keys[i]) is not None:
                self._keys[name, key] = job_id
        return [JobId(self._keys[name, keys[i] or ""]) if job is None else job for i, job in enumerate(answer)]

    def _keeps_promise(self, operation: Enqueue, first_id: int) -> bool:
        """Whether jobs with these ids are still to be made; False: they are there, the commit is made once more.

        Raises UsageError for ids that were never promised: a second job under one id would ruin the queue.
        """
        machine, count = self._machine, len(operation.payloads)
        if machine.promised.get(first_id) == count and first_id not in self._promised:
            self._promised.add(first_id)
            return True
        queue = machine.queues.get(operation.queue)
        if queue is not None and all(look.job(machine, first_id + i, queue.number) for i in range(count)):
            return False
        raise UsageError(
            f"queue {operation.queue!r}: ids from {first_id} on were never promised to {count} jobs, or not any more; "
            f"nothing was enqueued"
        )

    def _fresh(self, operation: Enqueue, answer: list[int | None]) -> list[int]:
        """Positions of the payloads that make new jobs; ids of the duplicates go into `answer`.

        A key that comes twice in one batch makes one job; its later positions stay None until that has its id.
        """
        name, keys = operation.queue, operation.keys
        assert keys is not None
        answer += [None] * len(keys)
        fresh: list[int] = []
        seen: set[str] = set()
        for i, key in enumerate(keys):
            known = None
            if key is not None:
                known = self._keys.get((name, key)) or self._standing(name, key)
                if known is not None and (operation.raise_on_duplicate or operation.promised is not None):
                    entry = look.job(self._machine, known)
                    raise DuplicateJobError(
                        f"queue {name!r}: idempotency key {key!r} stands for job {known}; nothing was enqueued",
                        job_id=known,
                        queue=name,
                        key=key,
                        state=None if entry is None else STATES[entry.state],
                    )
            if known is not None:
                answer[i] = JobId(known)
            elif key is None or key not in seen:
                fresh.append(i)
                if key is not None:
                    seen.add(key)
            elif operation.raise_on_duplicate:
                raise DuplicateJobError(
                    f"queue {name!r}: idempotency key {key!r} comes twice in one batch; nothing was enqueued",
                    job_id=self._next_id + fresh.index(keys.index(key)),
                    queue=name,
                    key=key,
                )
        return fresh

    def _standing(self, name: str, key: str) -> int | None:
        """The job that a key stands for when the acks before it in this commit have happened."""
        known = look.find(self._machine, name, key, self._now_ms)
        return None if known in self._freed else known

    def _number(self, name: str) -> int:
        """The number of a queue that does not exist yet."""
        if name not in self._created:
            self._created[name] = self._machine.next_queue + len(self._created)
            self._events.append(QueueCreated(self._created[name], name))
        return self._created[name]

    def _held(self, operation: Ack | Nack | Release | Reject | Extend) -> Entry:
        if operation.id in self._settled:
            raise _settled_twice(operation)
        return held(self._machine, operation.id, operation.token, self._now_ms)

    def _settle(self, operation: Ack | Nack | Release | Reject) -> Entry:
        entry = self._held(operation)
        self._settled.add(operation.id)
        return entry

    @staticmethod
    def _count(counter: dict[str, int], name: str, change: int) -> None:
        counter[name] = counter.get(name, 0) + change


_DEFAULT_RETRY = RetryPolicy()
