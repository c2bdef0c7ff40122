"""When a job comes again, and when it is a dead letter."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from rivetq import Broker, RetryPolicy

from .shared import _assert_about, _assert_due_in, _job, _lease, _lease_new


@pytest.mark.parametrize(("attempt", "expected"), [(1, 100), (2, 300), (3, 900), (4, 1000), (5, 1000)])
def test_the_nth_retry_waits_base_times_factor_to_the_n_minus_1_up_to_max_delay(
    broker: Broker, attempt: int, expected: float
) -> None:
    policy = RetryPolicy(max_attempts=9, base=100, factor=3, max_delay=1000, jitter="none")
    lease = _lease_new(broker, retry=policy)
    for _ in range(attempt - 1):
        lease.nack(delay=0)
        lease = _lease(broker)
    lease.nack()
    _assert_due_in(broker, lease.id, expected)


def test_durations_of_a_policy_may_be_timedeltas(broker: Broker) -> None:
    policy = RetryPolicy(base=timedelta(seconds=500), max_delay=timedelta(seconds=200), jitter="none")
    lease = _lease_new(broker, retry=policy)
    lease.nack()
    _assert_due_in(broker, lease.id, 200)


@pytest.mark.parametrize(("jitter", "least"), [("equal", 500), ("full", 0)])
def test_jitter_stays_within_its_bounds(broker: Broker, jitter: Any, least: float) -> None:
    broker.enqueue_many("q", [b""] * 10, retry=RetryPolicy(base=1000, jitter=jitter))
    for lease in broker.lease_many("q", 10):
        lease.nack()
    scheduled = broker.jobs("q", state="scheduled")
    assert scheduled  # all of them, unless "full" drew next to nothing
    for job in scheduled:
        assert job.due_at is not None
        _assert_about(broker, (job.due_at - job.enqueued_at).total_seconds(), least, most=1000)


def test_a_base_of_0_means_no_wait(broker: Broker) -> None:
    lease = _lease_new(broker, retry=RetryPolicy(base=0))
    lease.nack()
    again = broker.lease("q")
    assert again is not None
    assert (again.id, again.attempt) == (lease.id, 2)


def test_the_defaults_of_a_policy(broker: Broker) -> None:
    policy = RetryPolicy()
    assert (policy.max_attempts, policy.base, policy.factor, policy.max_delay) == (5, 1.0, 2.0, 3600.0)
    assert policy.jitter == "full"
    assert _job(broker, broker.enqueue("q", b"", retry=policy)).max_attempts == 5


def test_a_policy_without_max_attempts_has_no_end(broker: Broker) -> None:
    lease = _lease_new(broker, retry=RetryPolicy(max_attempts=None, base=0))
    for attempt in range(2, 13):
        lease.nack()
        lease = _lease(broker)
        assert lease.attempt == attempt


@pytest.mark.parametrize(
    ("of_the_call", "of_the_policy", "expected"), [(None, None, 7), (None, 3, 3), (2, 3, 2), (4, 3, 4), (2, None, 2)]
)
def test_max_attempts_are_those_of_the_call_else_of_its_policy_else_of_the_queue(
    broker: Broker, of_the_call: int | None, of_the_policy: int | None, expected: int
) -> None:
    broker.configure_queue("q", retry=RetryPolicy(max_attempts=7, base=0))
    policy = RetryPolicy(max_attempts=of_the_policy, base=0) if of_the_policy else None
    lease = _lease_new(broker, max_attempts=of_the_call, retry=policy)
    assert lease.max_attempts == _job(broker, lease.id).max_attempts == expected
    for _ in range(expected - 1):
        lease.nack()
        lease = _lease(broker)
    lease.nack()
    assert _job(broker, lease.id).state == "dead"


def test_the_policy_of_a_job_wins_over_that_of_its_queue(broker: Broker) -> None:
    broker.configure_queue("q", retry=RetryPolicy(base=2000, jitter="none"))
    own = _lease_new(broker, retry=RetryPolicy(base=100, jitter="none"))
    own.nack()
    of_the_queue = _lease_new(broker)
    of_the_queue.nack()
    _assert_due_in(broker, own.id, 100)
    _assert_due_in(broker, of_the_queue.id, 2000)


def test_the_policy_of_the_queue_is_that_at_the_time_of_the_enqueue(broker: Broker) -> None:
    broker.configure_queue("q", retry=RetryPolicy(max_attempts=7, base=100, jitter="none"))
    lease = _lease_new(broker)
    broker.configure_queue("q", retry=RetryPolicy(max_attempts=1, base=2000, jitter="none"))
    lease.nack()
    _assert_due_in(broker, lease.id, 100)
    assert _job(broker, lease.id).max_attempts == 7
