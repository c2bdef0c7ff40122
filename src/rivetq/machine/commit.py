"""Decides a commit of enqueues and answers: all of them happen, or an error is raised and nothing happens.

The usual commits, one enqueue or acks alone, are decided straight on. Any mix goes through a `Plan`, in which each
operation sees what those before it will have done.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import assert_never, cast

from ..engine import Ack, Answer, Deadline, Enqueue, Extend, KeyStands, Lost, Nack, Operation, Reject, Release
from ..errors import DuplicateJobError, JobNotFoundError, LeaseLostError, QueueFullError, RateLimitedError, UsageError
from ..model import NO_HEADERS, JobId, RetryPolicy
from . import look
from .decide import failed, held, ids
from .entry import Entry
from .events import (
    Acked,
    Buried,
    Enqueued,
    Event,
    Extended,
    QueueCreated,
    Released,
)
from .machine import Machine
from .queue import STATES, Queue

SKEW_MS = 2
"""Rounding alone can make the time line and the wall clock differ by this much."""


def decide_commit(
    machine: Machine, operations: Sequence[Operation], now_ms: int, partial: bool = False
) -> tuple[list[Event], list[Answer]]:
    """Events and answers of a commit: of all operations, or an error; `partial`: of those whose leases hold."""
    first = operations[0] if operations else None
    if (
        type(first) is Enqueue
        and len(operations) == 1
        and first.keys is None
        and first.promised is None
        and not partial
    ):
        queue = machine.queues.get(first.queue)
        if queue is not None and first.payloads:
            return _enqueued(machine, queue, first, now_ms)
    elif type(first) is Ack and all(type(operation) is Ack for operation in operations):
        try:
            return _acked(machine, cast(Sequence[Ack], operations), now_ms), [None] * len(operations)
        except LeaseLostError:
            if not partial:
                raise
    plan = Plan(machine, now_ms)
    answers = [plan.fate(operation) if partial else plan.decide(operation) for operation in operations]
    plan.check_limits()
    return plan.events, answers


def _enqueued(machine: Machine, queue: Queue, operation: Enqueue, now_ms: int) -> tuple[list[Event], list[Answer]]:
    """What `Plan` would decide, for one enqueue without keys into a queue that exists."""
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
    """Check max_jobs and the enqueue rate, for `new` jobs and a change of `live` in the occupied places."""
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
    """What `Plan` would decide for acks alone. Nearly every job ends here, so it is quick."""
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
            events.append(Acked(queue.number, ids, now_ms + queue.ttl_ms if queue.ttl_ms else 0))
        ids.append(job_id)
    return events


def keys_until_ms(queue: Queue, now_ms: int) -> int:
    """The moment until which the keys of jobs that are acked now stay in force; 0: they are free at once."""
    return now_ms + queue.ttl_ms if queue.ttl_ms else 0


def _settled_twice(operation: Ack | Nack | Release | Reject | Extend) -> LeaseLostError:
    return LeaseLostError(
        f"job {operation.id}: lease {operation.token} is settled twice in one call; nothing was changed",
        job_id=operation.id,
        token=operation.token,
    )


class Plan:
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

    def fate(self, operation: Operation) -> Answer:
        """Decide an answer to a lease that stands alone."""
        if isinstance(operation, Enqueue | KeyStands):
            raise UsageError("a partial commit is of answers to leases; enqueue by a commit of its own")
        try:
            return self.decide(operation)
        except LeaseLostError as error:
            return Lost(operation.token, str(error))

    def decide(self, operation: Operation) -> Answer:
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
                    until_ms = keys_until_ms(entry.queue, self._now_ms)
                    self._events.append(Acked(entry.queue.number, [entry.id], until_ms))
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
                return Deadline(deadline_ms, deadline_ms - self._now_ms)
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
        """Check max_jobs and enqueue rates at the end: a later ack in the same commit makes room for a job."""
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
        """Whether jobs with these ids are still to be made; False: they exist, since this commit is a repetition.

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
        """The job that a key stands for after the earlier acks in this commit."""
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
