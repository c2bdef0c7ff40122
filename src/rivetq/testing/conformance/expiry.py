"""Fences, and leases that end by their deadline."""

# A block around a transaction or a lease that is to fail is more than one statement.

from __future__ import annotations

from collections.abc import Callable

import pytest

from rivetq import Broker, Lease, LeaseLostError, LeaseRef, RetryPolicy

from .shared import _AT_ONCE, _Answer, _await_state, _every_answer, _lease, _lease_new, _pass_time, _refuses


def _acked(broker: Broker) -> Lease | LeaseRef:
    lease = _lease_new(broker)
    lease.ack()
    return lease


def _nacked(broker: Broker) -> Lease | LeaseRef:
    lease = _lease_new(broker)
    lease.nack(delay=0)
    return lease


def _released(broker: Broker) -> Lease | LeaseRef:
    lease = _lease_new(broker)
    lease.release()
    return lease


def _rejected(broker: Broker) -> Lease | LeaseRef:
    lease = _lease_new(broker)
    lease.reject()
    return lease


def _expired(broker: Broker) -> Lease | LeaseRef:
    lease = _lease_new(broker, visibility_timeout=0.1, retry=_AT_ONCE)
    _pass_time(broker, 0.1)
    _await_state(broker, lease.id, "ready")
    return lease


def _delivered_again(broker: Broker) -> Lease | LeaseRef:
    lease = _nacked(broker)
    assert _lease(broker).id == lease.id
    return lease


def _of_another_job(broker: Broker) -> Lease | LeaseRef:
    lease = _lease_new(broker)
    return LeaseRef(broker.enqueue("q", b"never leased"), lease.token)


def _of_no_job(broker: Broker) -> Lease | LeaseRef:
    lease = _lease_new(broker)
    return LeaseRef(lease.id + 1000, lease.token)


_LOST = [_acked, _nacked, _released, _rejected, _expired, _delivered_again, _of_another_job, _of_no_job]
_every_lost = pytest.mark.parametrize("lose", _LOST, ids=[lose.__name__ for lose in _LOST])


@_every_answer
@_every_lost
def test_an_answer_that_is_not_to_the_current_delivery_changes_nothing(
    broker: Broker, answer: _Answer, lose: Callable[[Broker], Lease | LeaseRef]
) -> None:
    lost = lose(broker)
    with _refuses(broker, LeaseLostError) as caught:
        answer(broker, lost)
    assert (caught.value.job_id, caught.value.token) == (lost.id, lost.token)


@pytest.mark.parametrize("verb", ["ack", "nack", "release", "reject", "extend"])
def test_the_methods_of_a_lost_lease_change_nothing(broker: Broker, verb: str) -> None:
    lease = _lease_new(broker)
    lease.nack(delay=0)
    current = _lease(broker)
    with _refuses(broker, LeaseLostError):
        getattr(lease, verb)(*([100] if verb == "extend" else []))
    current.ack()


def test_a_lease_is_lost_from_its_deadline_on_noticed_or_not(broker: Broker) -> None:
    leases = [_lease_new(broker, visibility_timeout=0.1) for _ in range(3)]
    _pass_time(broker, 0.1)
    for answer in (leases[0].ack, lambda: leases[1].extend(100), lambda: broker.ack_many(leases[2:])):
        with pytest.raises(LeaseLostError):
            answer()
    assert broker.stats("q").acked == 0


def test_an_expired_lease_ends_as_a_nack(broker: Broker) -> None:
    lease = _lease_new(broker, visibility_timeout=0.1, retry=_AT_ONCE)
    _pass_time(broker, 0.1)
    job = _await_state(broker, lease.id, "ready")
    assert (job.attempts, job.last_error) == (1, "lease expired")
    again = _lease(broker)
    assert (again.attempt, again.last_error) == (2, "lease expired")


def test_the_retry_delay_of_an_expired_lease_counts_from_its_deadline(broker: Broker) -> None:
    lease = _lease_new(broker, visibility_timeout=0.1, retry=RetryPolicy(base=100, jitter="none"))
    _pass_time(broker, 0.2)
    job = _await_state(broker, lease.id, "scheduled")
    assert job.due_at is not None
    assert abs((job.due_at - lease.deadline).total_seconds() - 100) < 0.01


def test_a_job_that_always_expires_reaches_the_dead_letters_after_max_attempts(broker: Broker) -> None:
    job_id = broker.enqueue("q", b"poison", visibility_timeout=0.05, max_attempts=3, retry=_AT_ONCE)
    for attempt in (1, 2, 3):
        assert _lease(broker).attempt == attempt
        _pass_time(broker, 0.05)
    job = _await_state(broker, job_id, "dead")
    assert (job.attempts, job.last_error) == (3, "lease expired")
    assert [dead.id for dead in broker.dead_letters("q")] == [job_id]
