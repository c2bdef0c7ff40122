"""Waiting for work, in a thread and without one."""

# A block around a transaction or a lease that is to fail is more than one statement.

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from rivetq import Broker, BrokerClosedError, RateLimit

from .shared import (
    _AT_ONCE,
    _PATIENCE,
    _assert_about,
    _bury,
    _eventually,
    _lease_new,
    _pass_time,
    _put_one,
    _put_one_in_a_transaction,
    _Told,
    _waiting,
    _woken,
)

# Prepares a queue "q" that gives nothing, and returns the call after which it gives its one job.
_Waker = Callable[[Broker], Callable[[], object]]


def _by_redrive(broker: Broker) -> Callable[[], object]:
    _bury(broker)
    return lambda: broker.redrive("q")


def _by_resume(broker: Broker) -> Callable[[], object]:
    broker.pause("q")
    broker.enqueue("q", b"")
    return lambda: broker.resume("q")


def _by_token(broker: Broker) -> Callable[[], object]:
    broker.configure_queue("q", rate_limit=RateLimit(per_second=3, burst=1, on="lease"))
    _lease_new(broker).ack()
    broker.enqueue("q", b"")
    return lambda: _pass_time(broker, 0.34)


def _by_expiry(broker: Broker) -> Callable[[], object]:
    _lease_new(broker, visibility_timeout=0.3, retry=_AT_ONCE)
    return lambda: _pass_time(broker, 0.3)


def _by_retry(broker: Broker) -> Callable[[], object]:
    _lease_new(broker).nack(delay=0.3)
    return lambda: _pass_time(broker, 0.3)


def _by_delay(broker: Broker) -> Callable[[], object]:
    broker.enqueue("q", b"", delay=0.3)
    return lambda: _pass_time(broker, 0.3)


_WAKERS: dict[str, _Waker] = {
    "an enqueue": lambda broker: lambda: _put_one(broker),
    "a batch": lambda broker: lambda: broker.enqueue_many("q", [b""]),
    "the end of a transaction": lambda broker: lambda: _put_one_in_a_transaction(broker),
    "a nack without delay": lambda broker: partial(_lease_new(broker).nack, delay=0),
    "a release": lambda broker: _lease_new(broker).release,
    "a redrive": _by_redrive,
    "a resume": _by_resume,
    "a delay that falls due": _by_delay,
    "a retry that falls due": _by_retry,
    "an expiry": _by_expiry,
    "a token of the rate limit": _by_token,
}


@pytest.mark.parametrize("prepare", list(_WAKERS.values()), ids=list(_WAKERS))
def test_a_waiting_lease_is_woken_by_whatever_makes_a_job_ready(broker: Broker, prepare: _Waker) -> None:
    wake = prepare(broker)
    with _waiting(broker) as future:
        wake()
        lease = _woken(future)
    assert [(job.id, job.state) for job in broker.jobs("q")] == [(lease.id, "leased")]


def test_a_batch_wakes_as_many_waiting_leases_as_it_has_jobs(broker: Broker) -> None:
    with _waiting(broker) as one, _waiting(broker) as other:
        ids = broker.enqueue_many("q", [b"", b""])
        assert {_woken(one).id, _woken(other).id} == set(ids)


@pytest.mark.parametrize("queue", ["first", "second"])
def test_a_lease_that_waits_for_several_queues_is_woken_by_any(broker: Broker, queue: str) -> None:
    with _waiting(broker, ["first", "second"]) as future:
        job_id = broker.enqueue(queue, b"")
        assert _woken(future).id == job_id


def test_lease_many_waits_for_a_first_job_only(broker: Broker) -> None:
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(broker.lease_many, "q", 5, wait=2 * _PATIENCE)
        job_id = broker.enqueue("q", b"")
        assert [lease.id for lease in future.result(_PATIENCE)] == [job_id]


def test_a_wait_of_none_has_no_end_but_a_job(broker: Broker) -> None:
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(broker.lease, "q", wait=None)
        try:
            job_id = broker.enqueue("q", b"")
            assert _woken(future).id == job_id
        finally:
            broker.close()


def test_close_ends_a_waiting_lease_with_an_error(broker: Broker) -> None:
    with _waiting(broker) as one, _waiting(broker, ["q", "r"]) as other:
        broker.close()
        for future in (one, other):
            with pytest.raises(BrokerClosedError):
                future.result(_PATIENCE)


def test_lease_soon_tells_the_jobs_that_are_there(broker: Broker) -> None:
    ids = [broker.enqueue("q", b"") for _ in range(3)]
    told = _Told()
    waiting = broker.lease_soon("q", 2, told)
    assert told.ids() == ids[:2]
    assert not waiting.cancel()
    assert broker.stats("q").leased == 2


def test_a_lease_of_lease_soon_is_like_any_other(broker: Broker) -> None:
    broker.enqueue("q", {"n": 1}, headers={"a": "b"})
    told = _Told()
    broker.lease_soon(["p", "q"], 1, told, visibility_timeout=7)
    (lease,) = told.leases()
    assert (lease.json(), lease.attempt, dict(lease.headers)) == ({"n": 1}, 1, {"a": "b"})
    _assert_about(broker, (lease.deadline - lease.enqueued_at).total_seconds(), 7)
    lease.ack()


@pytest.mark.parametrize("prepare", list(_WAKERS.values()), ids=list(_WAKERS))
def test_lease_soon_is_told_after_whatever_makes_a_job_ready(broker: Broker, prepare: _Waker) -> None:
    wake = prepare(broker)
    told = _Told()
    broker.lease_soon("q", 1, told)
    assert told.answers == []
    wake()
    (job_id,) = told.ids()
    assert [(job.id, job.state) for job in broker.jobs("q")] == [(job_id, "leased")]


def test_a_cancelled_lease_soon_takes_no_job_and_tells_nobody(broker: Broker) -> None:
    cancelled, other = _Told(), _Told()
    waiting = broker.lease_soon("q", 1, cancelled)
    broker.lease_soon("q", 1, other)
    assert waiting.cancel()
    assert not waiting.cancel()
    job_id = broker.enqueue("q", b"")
    assert other.ids() == [job_id]
    assert cancelled.answers == []


def test_close_tells_lease_soon_an_error_once(broker: Broker) -> None:
    told = _Told()
    waiting = broker.lease_soon("q", 1, told)
    broker.close()
    _eventually(lambda: bool(told.answers))
    ((leases, error),) = told.answers
    assert leases is None
    assert isinstance(error, BrokerClosedError)
    assert not waiting.cancel()


def test_who_waits_in_a_thread_and_who_waits_without_get_each_job_once(broker: Broker) -> None:
    told = [_Told() for _ in range(3)]
    for each in told:
        broker.lease_soon("q", 1, each)
    with _waiting(broker) as future:
        ids = [broker.enqueue("q", b"") for _ in range(4)]
        got = [*(each.ids()[0] for each in told), _woken(future).id]
    assert sorted(got) == ids
