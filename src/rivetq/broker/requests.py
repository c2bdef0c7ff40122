"""What a caller says, as requests to an engine: checked, with defaults filled in; and answers as what a caller gets.

`Broker`, `AsyncBroker` and their transactions share it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from types import EllipsisType
from typing import Any, Literal

import attrs

from ..engine import (
    Ack,
    Configure,
    Deadline,
    Enqueue,
    Extend,
    Find,
    Grant,
    Jobs,
    KeyStands,
    Nack,
    Once,
    Operation,
    Purge,
    QueueChanges,
    Redrive,
    Reject,
    Release,
    Take,
)
from ..errors import UsageError
from ..model import Job, JobState, Lease, LeaseLike, RateLimit, RetryPolicy, Settler
from ..units import MAX_DURATION_MS, Duration, checked_int, duration_ms, moment, moment_ms, quoted, shown_value
from .arguments import (
    MAX_KEY_BYTES,
    MAX_QUEUE_BYTES,
    checked_bool,
    checked_error,
    checked_headers,
    checked_lease,
    checked_leases,
    checked_queues,
    checked_state,
    checked_text,
    checked_visibility,
    encoded,
)

Payload = (
    bytes | bytearray | memoryview | str | int | float | bool | None | list[Any] | tuple[Any, ...] | dict[str, Any]
)
OnDuplicate = Literal["return", "raise"]
Moment = datetime | int | float
WallMs = Callable[[], int]
"""The time in epoch milliseconds, where an engine lives by another clock; None: its moments are good here."""


def name_of(queue: object) -> str:
    return checked_text(queue, "queue", MAX_QUEUE_BYTES)


# Put work in


def enqueue(
    max_payload_bytes: int,
    queue: str,
    payloads: Sequence[Any],
    priority: int,
    delay: Duration,
    eta: Moment | None,
    headers: Mapping[str, str] | None,
    max_attempts: int | None,
    retry: RetryPolicy | None,
    visibility_timeout: Duration | None,
    keys: Sequence[str | None] | None,
    on_duplicate: str,
) -> Enqueue:
    """See `Broker.enqueue_many`."""
    if keys is not None:
        if len(keys) != len(payloads):
            raise UsageError(f"idempotency_keys: {len(payloads)} expected, one a payload, got {len(keys)}")
        for key in keys:
            if key is not None:
                checked_text(key, "idempotency_key", MAX_KEY_BYTES)
    if on_duplicate not in ("return", "raise"):
        raise UsageError(f"on_duplicate: 'return' or 'raise' expected, got {quoted(on_duplicate)}")
    if retry is not None and not isinstance(retry, RetryPolicy):
        raise UsageError(f"retry: a RetryPolicy expected, got {type(retry).__name__}")
    # Most calls give neither: the hot path.
    delay_ms, eta_ms = _delay_or_eta(delay, eta) if delay or eta is not None or type(delay) is not int else (0, None)
    return Enqueue(
        name_of(queue),
        [encode(payload, max_payload_bytes) for payload in payloads],
        checked_int(priority, "priority", 0, 9),
        delay_ms,
        eta_ms,
        None if headers is None else checked_headers(headers),
        retry,
        None if max_attempts is None else checked_int(max_attempts, "max_attempts", 1, 2**31 - 1),
        None if visibility_timeout is None else checked_visibility(visibility_timeout),
        keys,
        on_duplicate == "raise",
    )


def encode(payload: Any, most: int) -> bytes:
    """Bytes of a payload, `most` at most."""
    if type(payload) is not bytes:
        payload = encoded(payload)
    if len(payload) > most:
        raise UsageError(
            f"payload: {len(payload)} bytes, {most} is the most; raise max_payload_bytes, or "
            f"store it elsewhere and enqueue a reference"
        )
    return bytes(payload)


def _delay_or_eta(delay: Duration, eta: Moment | None) -> tuple[int, int | None]:
    """Milliseconds of a delay, or none and the moment."""
    delay_ms = 0 if delay == 0 and type(delay) is int else duration_ms(delay, "delay")
    if eta is None:
        return delay_ms, None
    if delay_ms:
        raise UsageError("delay and eta exclude each other; give one of them")
    return 0, moment_ms(eta, "eta")


# Take work out


def take(
    queue: object,
    max_jobs: object,
    visibility_timeout: Duration | None,
    wait: Duration | None,
    begun: object,
    max_bytes: object,
) -> Take:
    """See `Broker.lease_many`."""
    return Take(
        checked_queues(queue),
        checked_int(max_jobs, "max_jobs", 1),
        None if visibility_timeout is None else checked_visibility(visibility_timeout),
        None if wait is None else duration_ms(wait, "wait"),
        checked_bool(begun, "begun"),
        None if max_bytes is None else checked_int(max_bytes, "max_bytes", 1),
    )


def leases_of(grants: list[Grant], settler: Settler, wall_ms: WallMs | None) -> list[Lease]:
    """What a caller gets of these jobs."""
    if wall_ms is not None and grants:
        now_ms = wall_ms()
        grants = [grant._replace(deadline_ms=now_ms + grant.remaining_ms) for grant in grants]
    at = moment if len(grants) == 1 else _Moments().__getitem__  # in a batch most moments are the same
    leases = []
    for (
        job_id, queue, payload, headers, priority, attempt, token, deadline_ms, _, granted_ms, enqueued_at_ms,
        max_attempts, last_error,
    ) in grants:  # fmt: skip
        lease = Lease.__new__(Lease)
        # As its `__init__` does, in half the time: every delivery passes here.
        lease.__dict__.update(
            id=job_id, queue=queue, payload=payload, headers=headers, priority=priority, attempt=attempt, token=token,
            deadline=at(deadline_ms), granted=granted_ms / 1000, enqueued_at=at(enqueued_at_ms),
            max_attempts=max_attempts, last_error=last_error, _broker=settler,
        )  # fmt: skip
        leases.append(lease)
    return leases


class _Moments(dict[int, datetime]):
    """Epoch milliseconds to datetimes, each made once."""

    def __missing__(self, at_ms: int) -> datetime:
        self[at_ms] = found = moment(at_ms)
        return found


def deadline_of(deadline: Deadline, wall_ms: WallMs | None) -> datetime:
    return moment(deadline.at_ms if wall_ms is None else wall_ms() + deadline.remaining_ms)


def extended(lease: Lease, deadline: datetime, seconds: Duration, settler: Settler) -> Lease:
    """The lease with the deadline that an extension gave it."""
    return attrs.evolve(lease, deadline=deadline, granted=duration_ms(seconds, "seconds") / 1000, broker=settler)


def lease_of(job: Job, token: int, deadline: datetime, seconds: Duration, settler: Settler) -> Lease:
    """The lease of a job that was extended by its numbers alone."""
    return Lease(
        id=job.id,
        queue=job.queue,
        payload=job.payload,
        headers=job.headers,
        priority=job.priority,
        attempt=job.attempts,
        token=token,
        deadline=deadline,
        granted=duration_ms(seconds, "seconds") / 1000,
        enqueued_at=job.enqueued_at,
        max_attempts=job.max_attempts,
        last_error=job.last_error,
        broker=settler,
    )


# Answers


def ack(lease: LeaseLike) -> Ack:
    return Ack(*checked_lease(lease))


def acks(leases: Iterable[LeaseLike]) -> list[Ack]:
    return [Ack(*checked_lease(lease)) for lease in checked_leases(leases)]


def nack(lease: LeaseLike, error: str | None, delay: Duration | None) -> Nack:
    delay_ms = None if delay is None else duration_ms(delay, "delay")
    return Nack(*checked_lease(lease), checked_error(error), delay_ms)


def release(lease: LeaseLike, delay: Duration) -> Release:
    return Release(*checked_lease(lease), duration_ms(delay, "delay"))


def reject(lease: LeaseLike, error: str | None) -> Reject:
    return Reject(*checked_lease(lease), checked_error(error))


def extends(leases: Iterable[LeaseLike], seconds: Duration) -> list[Extend]:
    extra_ms = duration_ms(seconds, "seconds")
    return [Extend(*checked_lease(lease), extra_ms) for lease in checked_leases(leases)]


# Operations that a caller made


def once(given: object) -> Once | None:
    """The number of a request, if it has one."""
    if given is None or isinstance(given, Once):
        return given
    raise UsageError(f"once: a rivetq.engine.Once expected, got {shown_value(given)}")


def operations(made: Iterable[Operation], max_payload_bytes: int) -> list[Operation]:
    """All of them, checked."""
    if isinstance(made, (str, bytes, Mapping)) or not isinstance(made, Iterable):
        raise UsageError(f"operations: a sequence expected, got {type(made).__name__}")
    return [
        # Nearly all are acks.
        each if type(each) is Ack and type(each.id) is type(each.token) is int else _checked(each, max_payload_bytes)
        for each in made
    ]


def _checked(operation: Operation, max_payload_bytes: int) -> Operation:
    match operation:
        case Enqueue():
            _check_enqueue(operation, max_payload_bytes)
            return operation
        case KeyStands():
            find(operation.queue, operation.key)
            checked_int(operation.id, "id", 0)
            return operation
        case Ack() | Nack() | Release() | Reject() | Extend():
            checked_lease(operation)
        case _:
            raise UsageError(f"operations of rivetq.engine expected, got {type(operation).__name__}")
    match operation:
        case Nack():
            if operation.delay_ms is not None:
                checked_int(operation.delay_ms, "delay_ms", 0, MAX_DURATION_MS)
            return attrs.evolve(operation, error=checked_error(operation.error))
        case Reject():
            return attrs.evolve(operation, error=checked_error(operation.error))
        case Release():
            checked_int(operation.delay_ms, "delay_ms", 0, MAX_DURATION_MS)
        case Extend():
            checked_int(operation.extra_ms, "extra_ms", 0, MAX_DURATION_MS)
    return operation


def _check_enqueue(operation: Enqueue, max_payload_bytes: int) -> None:
    for payload in operation.payloads:
        if type(payload) is not bytes:
            raise UsageError(f"payloads: bytes expected, got {type(payload).__name__}")
    enqueue(
        max_payload_bytes, operation.queue, operation.payloads, operation.priority, 0, None, operation.headers,
        operation.max_attempts, operation.retry, None, operation.keys, "return",
    )  # fmt: skip
    checked_int(operation.delay_ms, "delay_ms", 0, MAX_DURATION_MS)
    checked_int(operation.visibility_ms or 1, "visibility_ms", 1, MAX_DURATION_MS)
    checked_int(operation.eta_ms or 0, "eta_ms", 0)
    checked_int(operation.promised or 0, "promised", 0)


# Queues


def configure(
    queue: str,
    retry: RetryPolicy | EllipsisType,
    rate_limit: RateLimit | EllipsisType | None,
    visibility_timeout: Duration | EllipsisType,
    max_jobs: int | EllipsisType | None,
    idempotency_ttl: Duration | EllipsisType,
) -> Configure:
    """See `Broker.configure_queue`."""
    name_of(queue)
    changes = QueueChanges()
    if retry is not ...:
        if not isinstance(retry, RetryPolicy):
            raise UsageError(f"retry: a RetryPolicy expected, got {type(retry).__name__}")
        changes.retry = retry
    if rate_limit is not ...:
        if rate_limit is not None and not isinstance(rate_limit, RateLimit):
            raise UsageError(f"rate_limit: a RateLimit or None expected, got {type(rate_limit).__name__}")
        changes.rate_limit = rate_limit
    if visibility_timeout is not ...:
        changes.visibility_timeout = checked_visibility(visibility_timeout) / 1000
    if max_jobs is not ...:
        changes.max_jobs = None if max_jobs is None else checked_int(max_jobs, "max_jobs", 1, 2**63 - 1)
    if idempotency_ttl is not ...:
        changes.idempotency_ttl = duration_ms(idempotency_ttl, "idempotency_ttl") / 1000
    return Configure(queue, changes)


def purge(queue: str, state: JobState | str | None) -> Purge:
    """See `Broker.purge`."""
    checked = checked_state(state)
    if checked is JobState.LEASED:
        raise UsageError("purge: leased jobs stay; wait for their answers or their deadline")
    return Purge(name_of(queue), checked)


def redrive(queue: str, job_ids: Iterable[int] | None, limit: int | None) -> Redrive:
    """See `Broker.redrive`."""
    name_of(queue)
    ids: list[int] | None = None
    if job_ids is not None:
        if isinstance(job_ids, (str, bytes, bytearray)) or not isinstance(job_ids, Iterable):
            raise UsageError(f"job_ids: a sequence of ids expected, got {type(job_ids).__name__}")
        ids = [checked_int(job_id, "job_ids", 0) for job_id in job_ids]
    return Redrive(queue, ids, None if limit is None else checked_int(limit, "limit", 0))


# Looking


def jobs(queue: str, state: JobState | str | None, after: int, limit: int, payloads: bool) -> Jobs:
    """See `Broker.jobs`."""
    return Jobs(
        name_of(queue),
        checked_state(state),
        checked_int(after, "after", 0),
        checked_int(limit, "limit", 1, 10_000),
        checked_bool(payloads, "payloads"),
    )


def find(queue: str, idempotency_key: str) -> Find:
    return Find(name_of(queue), checked_text(idempotency_key, "idempotency_key", MAX_KEY_BYTES))
