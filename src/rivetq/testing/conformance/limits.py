"""max_jobs and rate limits."""

# A block around a transaction or a lease that is to fail is more than one statement.
# ruff: noqa: PT012

from __future__ import annotations

from collections.abc import Callable

import pytest

from rivetq import Broker, QueueFullError, RateLimit, RateLimitedError, UsageError

from .shared import _AT_ONCE, _every_way_in, _job, _lease, _lease_new, _one_of_each_state, _pass_time, _refuses


def test_max_jobs_counts_ready_scheduled_and_leased_jobs_but_no_dead_letters(broker: Broker) -> None:
    _one_of_each_state(broker)
    broker.configure_queue("q", max_jobs=4)
    broker.enqueue("q", b"the fourth")
    with _refuses(broker, QueueFullError) as caught:
        broker.enqueue("q", b"the fifth")
    assert (caught.value.queue, caught.value.max_jobs) == ("q", 4)


@_every_way_in
def test_a_full_queue_refuses_every_way_in(broker: Broker, put: Callable[..., object]) -> None:
    broker.configure_queue("q", max_jobs=1)
    broker.enqueue("other", b"")
    broker.enqueue("q", b"")
    with _refuses(broker, QueueFullError):
        put(broker)


def test_a_batch_that_does_not_fit_is_refused_as_a_whole(broker: Broker) -> None:
    broker.configure_queue("q", max_jobs=3)
    broker.enqueue("q", b"")
    with _refuses(broker, QueueFullError):
        broker.enqueue_many("q", [b"", b"", b""])
    assert len(broker.enqueue_many("q", [b"", b""])) == 2


def test_a_job_that_ends_makes_room_in_a_full_queue(broker: Broker) -> None:
    broker.configure_queue("q", max_jobs=1)
    _lease_new(broker).ack()
    _lease_new(broker).reject()
    broker.cancel(broker.enqueue("q", b""))
    broker.enqueue("q", b"")
    broker.configure_queue("q", max_jobs=None)
    assert len(broker.enqueue_many("q", [b""] * 10)) == 10


@pytest.mark.parametrize("back", ["nack", "release", "redrive"])
def test_a_job_that_comes_back_is_never_refused_by_a_full_queue(broker: Broker, back: str) -> None:
    broker.configure_queue("q", max_jobs=1)
    lease = _lease_new(broker, retry=_AT_ONCE)
    if back == "redrive":
        lease.reject()
        broker.enqueue("q", b"takes the room")
        assert broker.redrive("q") == 1
    else:
        getattr(lease, back)()
    assert _job(broker, lease.id).state == "ready"
    with _refuses(broker, QueueFullError):
        broker.enqueue("q", b"")


def test_a_rate_limit_on_lease_gives_what_the_bucket_allows(broker: Broker) -> None:
    broker.configure_queue("q", rate_limit=RateLimit(per_second=0.01, burst=3, on="lease"))
    ids = list(broker.enqueue_many("q", [b""] * 5))
    assert _lease(broker).id == ids[0]
    assert [lease.id for lease in broker.lease_many("q", 10)] == ids[1:3]
    assert broker.lease("q") is None
    assert broker.lease_many("q", 10, wait=0.05) == []
    assert broker.stats("q").ready == 2


def test_a_rate_limit_on_lease_refills_with_time_up_to_its_burst(broker: Broker) -> None:
    broker.configure_queue("q", rate_limit=RateLimit(per_second=100, burst=2, on="lease"))
    broker.enqueue_many("q", [b""] * 4)
    assert len(broker.lease_many("q", 2)) == 2
    _pass_time(broker, 0.3)
    assert len(broker.lease_many("q", 10)) == 2


def test_each_delivery_costs_a_token_that_is_not_refunded(broker: Broker) -> None:
    broker.configure_queue("q", rate_limit=RateLimit(per_second=0.01, burst=2, on="lease"))
    broker.enqueue("q", b"")
    _lease(broker).release()
    _lease(broker).nack(delay=0)
    assert broker.lease("q") is None


def test_a_rate_limit_on_enqueue_refuses_what_is_over_it(broker: Broker) -> None:
    broker.configure_queue("q", rate_limit=RateLimit(per_second=0.01, burst=3, on="enqueue"))
    broker.enqueue("q", b"")
    with _refuses(broker, RateLimitedError):
        broker.enqueue_many("q", [b""] * 3)
    broker.enqueue_many("q", [b""] * 2)
    with _refuses(broker, RateLimitedError) as caught:
        broker.enqueue("q", b"")
    assert caught.value.queue == "q"
    assert 0 < caught.value.retry_after <= 100.01
    broker.enqueue("other", b"")


def test_a_rate_limit_on_enqueue_takes_a_job_again_after_retry_after(broker: Broker) -> None:
    broker.configure_queue("q", rate_limit=RateLimit(per_second=4, burst=1, on="enqueue"))
    with pytest.raises(RateLimitedError) as caught:
        for _ in range(100):
            broker.enqueue("q", b"")
    _pass_time(broker, caught.value.retry_after)
    broker.enqueue("q", b"")


def test_a_batch_larger_than_the_burst_is_refused(broker: Broker) -> None:
    broker.configure_queue("q", rate_limit=RateLimit(per_second=1000, burst=3, on="enqueue"))
    with _refuses(broker, UsageError):
        broker.enqueue_many("q", [b""] * 4)
    assert len(broker.enqueue_many("q", [b""] * 3)) == 3


def test_a_rate_limit_holds_for_what_it_is_on_and_for_its_queue_only(broker: Broker) -> None:
    broker.configure_queue("leases", rate_limit=RateLimit(per_second=0.01, burst=1, on="lease"))
    broker.configure_queue("enqueues", rate_limit=RateLimit(per_second=0.01, burst=3, on="enqueue"))
    for queue in ("leases", "enqueues", "free"):
        broker.enqueue_many(queue, [b""] * 3)
    assert [len(broker.lease_many(queue, 3)) for queue in ("leases", "enqueues", "free")] == [1, 3, 3]


def test_batches_of_one_transaction_that_exceed_the_burst_never_pass(broker: Broker) -> None:
    broker.configure_queue("q", rate_limit=RateLimit(1, 2, on="enqueue"))
    with _refuses(broker, UsageError), broker.transaction() as tx:
        for _ in range(3):
            tx.enqueue("q", b"")
