"""What comes out: order, leases, deadlines."""

# A block around a transaction or a lease that is to fail is more than one statement.

from __future__ import annotations

import pickle
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest

from rivetq import Broker, LeaseRef, UsageError

from .shared import (
    _AT_ONCE,
    _BAD_DURATIONS,
    _BAD_INTS,
    _BAD_NAMES,
    _assert_about,
    _bury,
    _each,
    _job,
    _lease,
    _lease_new,
    _options,
    _refuses,
)


def test_a_leased_job_is_leased_to_nobody_else(broker: Broker) -> None:
    job_id = broker.enqueue("q", b"")
    lease = _lease(broker)
    assert lease.id == job_id
    assert broker.lease("q") is None
    assert broker.lease_many("q", 5) == []
    assert _job(broker, job_id).state == "leased"


def test_a_lease_tells_what_it_is_about(broker: Broker) -> None:
    job_id = broker.enqueue("q", b"work", priority=7, headers={"h": "1"}, max_attempts=3, visibility_timeout=100)
    job, lease = _job(broker, job_id), _lease(broker)
    assert (lease.id, lease.queue, lease.payload, dict(lease.headers)) == (job_id, "q", b"work", {"h": "1"})
    assert (lease.priority, lease.attempt, lease.max_attempts) == (7, 1, 3)
    assert lease.enqueued_at == job.enqueued_at
    _assert_about(broker, (lease.deadline - lease.enqueued_at).total_seconds(), 100)


def test_each_delivery_has_its_own_attempt_and_token(broker: Broker) -> None:
    first = _lease_new(broker, retry=_AT_ONCE)
    first.nack()
    second = _lease(broker)
    assert (second.id, first.attempt, second.attempt) == (first.id, 1, 2)
    assert second.token != first.token


def test_moments_come_back_aware_and_in_utc(broker: Broker) -> None:
    scheduled = _job(broker, broker.enqueue("later", b"", delay=100))
    lease = _lease_new(broker)
    dead = _job(broker, _bury(broker))
    for moment in (scheduled.due_at, scheduled.enqueued_at, lease.deadline, lease.enqueued_at, dead.died_at):
        assert moment is not None
        assert moment.utcoffset() == timedelta(0)


def test_lease_many_gives_at_most_max_jobs_the_most_urgent_first(broker: Broker) -> None:
    low, high, usual = (broker.enqueue("q", b"", priority=priority) for priority in (1, 9, 5))
    assert [lease.id for lease in broker.lease_many("q", 2)] == [high, usual]
    assert [lease.id for lease in broker.lease_many("q", 2)] == [low]
    assert broker.lease_many("q", 2) == []


@pytest.mark.parametrize("sequence", [list, tuple])
def test_a_sequence_of_names_is_in_order_of_preference(broker: Broker, sequence: Callable[[list[str]], Any]) -> None:
    urgent = broker.enqueue("second", b"", priority=9)
    preferred = broker.enqueue("first", b"", priority=0)
    names = sequence(["first", "empty", "second"])
    assert [_lease(broker, names).id, _lease(broker, names).id] == [preferred, urgent]
    assert broker.lease(names) is None


def test_lease_many_takes_from_the_preferred_queue_first(broker: Broker) -> None:
    second, first = broker.enqueue_many("second", [b"", b""]), broker.enqueue_many("first", [b"", b""])
    assert [lease.id for lease in broker.lease_many(["first", "second"], 2)] == list(first)
    assert [lease.id for lease in broker.lease_many(["first", "second"], 2)] == list(second)


def test_the_visibility_timeout_is_30_seconds_by_default(broker: Broker) -> None:
    lease = _lease_new(broker)
    _assert_about(broker, (lease.deadline - lease.enqueued_at).total_seconds(), 30)


@pytest.mark.parametrize(
    ("of_the_call", "of_the_job", "expected"),
    [(None, None, 200), (None, 300, 300), (100, 300, 100), (400, None, 400), (timedelta(seconds=250), 300, 250)],
)
def test_the_visibility_timeout_is_that_of_the_call_else_of_the_job_else_of_the_queue(
    broker: Broker, of_the_call: float | None, of_the_job: float | None, expected: float
) -> None:
    broker.configure_queue("q", visibility_timeout=200)
    broker.enqueue_many("q", [b"", b""], visibility_timeout=of_the_job)
    one, (other,) = _lease(broker, "q", of_the_call), broker.lease_many("q", 1, visibility_timeout=of_the_call)
    for lease in (one, other):
        _assert_about(broker, (lease.deadline - lease.enqueued_at).total_seconds(), expected)


@pytest.mark.parametrize("wait", [0.1, timedelta(seconds=0.1)])
def test_a_wait_that_nothing_ends_gives_nothing(broker: Broker, wait: Any) -> None:
    broker.enqueue("q", b"", delay=100)
    start = time.monotonic()
    assert broker.lease("q", wait=wait) is None
    assert broker.lease_many("q", 5, wait=wait) == []
    assert time.monotonic() - start >= 0.19  # real time, on a ManualClock as well


_BAD_LEASE_OPTIONS = _options({"visibility_timeout": _BAD_DURATIONS, "wait": _BAD_DURATIONS})


@pytest.mark.parametrize("options", _BAD_LEASE_OPTIONS)
def test_a_lease_with_a_bad_option_is_refused(broker: Broker, options: dict[str, Any]) -> None:
    broker.enqueue("q", b"")
    with _refuses(broker, UsageError):
        broker.lease("q", **options)
    with _refuses(broker, UsageError):
        broker.lease_many("q", 1, **options)


@pytest.mark.parametrize("queue", _each(*_BAD_NAMES, *(["q", bad] for bad in _BAD_NAMES)))
def test_a_lease_on_a_bad_name_is_refused(broker: Broker, queue: Any) -> None:
    broker.enqueue("q", b"")
    with _refuses(broker, UsageError):
        broker.lease(queue)
    with _refuses(broker, UsageError):
        broker.lease_many(queue, 1)


@pytest.mark.parametrize("max_jobs", _each(*_BAD_INTS, 0, -1))
def test_lease_many_takes_a_max_jobs_of_at_least_1(broker: Broker, max_jobs: Any) -> None:
    broker.enqueue("q", b"")
    with _refuses(broker, UsageError):
        broker.lease_many("q", max_jobs)


def test_threads_that_lease_at_the_same_time_never_get_the_same_job(broker: Broker) -> None:
    ids = broker.enqueue_many("q", [b""] * 60)

    def drain() -> list[int]:
        leased = []
        while lease := broker.lease("q"):
            leased.append(lease.id)
            lease.ack()
        return leased

    with ThreadPoolExecutor(4) as pool:
        drained = [pool.submit(drain) for _ in range(4)]
    assert sorted(job_id for future in drained for job_id in future.result()) == list(ids)


@pytest.mark.parametrize("nothing", [0, 0.0, timedelta(0)], ids=repr)
def test_a_visibility_timeout_is_more_than_nothing(broker: Broker, nothing: Any) -> None:
    broker.enqueue("q", b"")
    for call in (
        lambda: broker.enqueue("q", b"", visibility_timeout=nothing),
        lambda: broker.enqueue_many("q", [b""], visibility_timeout=nothing),
        lambda: broker.lease("q", visibility_timeout=nothing),
        lambda: broker.lease_many("q", 2, visibility_timeout=nothing),
        lambda: broker.configure_queue("q", visibility_timeout=nothing),
    ):
        with _refuses(broker, UsageError):
            call()


def test_a_lease_says_for_how_long_it_was_granted(broker: Broker) -> None:
    broker.configure_queue("q", visibility_timeout=20)
    broker.enqueue("q", b"of the queue")
    broker.enqueue("q", b"of the job", visibility_timeout=7)
    broker.enqueue("q", b"of the call", visibility_timeout=7)
    assert [lease.granted for lease in broker.lease_many("q", 2)] == [20.0, 7.0]
    lease = _lease(broker, visibility_timeout=2.5)
    assert lease.granted == 2.5
    assert lease.extend(60).granted == 60.0
    assert pickle.loads(pickle.dumps(lease)).granted == 2.5


def test_what_is_leased_in_advance_is_a_lease_like_any_other(broker: Broker) -> None:
    broker.enqueue_many("q", [b"a", b"b"])
    first, second = broker.lease_many("q", 2, begun=False)
    broker.begin(first)
    broker.begin(first)
    broker.begin(LeaseRef(12345, 67890))
    first.ack()
    second.release()
    again = _lease(broker)
    assert (again.payload, again.attempt) == (b"b", 1)
