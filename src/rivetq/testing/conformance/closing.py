"""Errors, and what a closed broker says."""

# A block around a transaction or a lease that is to fail is more than one statement.
# ruff: noqa: PT012

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import pytest

import rivetq
from rivetq import (
    Broker,
    BrokerClosedError,
    Deliveries,
    DuplicateJobError,
    JobNotFoundError,
    Lease,
    LeaseLostError,
    QueueFullError,
    RateLimit,
    RateLimitedError,
    RivetQError,
    UsageError,
)

from .shared import _ANSWERS, _PATIENCE, _eventually, _fields, _lease_new, _pass_time, _put_one_in_a_transaction, _Told


@pytest.mark.parametrize(
    ("error", "parent"),
    [
        (rivetq.UsageError, rivetq.RivetQError),
        (rivetq.UsageError, ValueError),
        (rivetq.JobError, rivetq.RivetQError),
        (rivetq.JobNotFoundError, rivetq.JobError),
        (rivetq.LeaseLostError, rivetq.JobError),
        (rivetq.DuplicateJobError, rivetq.JobError),
        (rivetq.CapacityError, rivetq.RivetQError),
        (rivetq.QueueFullError, rivetq.CapacityError),
        (rivetq.RateLimitedError, rivetq.CapacityError),
        (rivetq.DiskFullError, rivetq.CapacityError),
        (rivetq.StorageError, rivetq.RivetQError),
        (rivetq.CorruptLogError, rivetq.StorageError),
        (rivetq.BrokerFailedError, rivetq.StorageError),
        (rivetq.BrokerLockedError, rivetq.StorageError),
        (rivetq.FormatError, rivetq.StorageError),
        (rivetq.BrokerClosedError, rivetq.RivetQError),
        (rivetq.ForkedBrokerError, rivetq.RivetQError),
    ],
)
def test_each_error_has_its_place_in_the_hierarchy(
    broker: Broker, error: type[Exception], parent: type[Exception]
) -> None:
    assert issubclass(error, parent)


def _provoke(broker: Broker, error: type[RivetQError]) -> None:
    """Make one call that is refused with `error`; the queue is "q", the key "k", the job the one of the lease."""
    limit = RateLimit(per_second=0.01, burst=1, on="enqueue")
    lease = _lease_new(broker, idempotency_key="k")
    if error is LeaseLostError:
        lease.ack()
        lease.ack()
    elif error is JobNotFoundError:
        broker.redrive("q", job_ids=[lease.id])
    elif error is DuplicateJobError:
        broker.enqueue("q", b"", idempotency_key="k", on_duplicate="raise")
    elif error is QueueFullError:
        broker.configure_queue("q", max_jobs=1)
        broker.enqueue("q", b"")
    elif error is RateLimitedError:
        broker.configure_queue("q", rate_limit=limit)
        broker.enqueue("q", b"")
        broker.enqueue("q", b"")
    elif error is BrokerClosedError:
        broker.close()
        lease.ack()
    else:
        broker.enqueue("q", b"", priority=10)


@pytest.mark.parametrize(
    ("error", "facts"),
    [
        (UsageError, ()),
        (LeaseLostError, ("job_id", "token")),
        (JobNotFoundError, ("job_id",)),
        (DuplicateJobError, ("job_id", "queue", "key")),
        (QueueFullError, ("queue", "max_jobs")),
        (RateLimitedError, ("queue", "retry_after")),
        (BrokerClosedError, ()),
    ],
)
def test_an_error_keeps_its_facts_and_its_message_when_pickled(
    broker: Broker, error: type[RivetQError], facts: tuple[str, ...]
) -> None:
    with pytest.raises(error) as caught:
        _provoke(broker, error)
    copy = pickle.loads(pickle.dumps(caught.value))
    assert type(copy) is type(caught.value)
    assert str(copy) == str(caught.value) != ""
    assert copy.outcome == caught.value.outcome == "not_done"
    assert _fields(copy, facts) == _fields(caught.value, facts)


def _with(broker: Broker, lease: Lease) -> None:
    with lease:
        pass


def test_deliveries_count_what_became_of_each(broker: Broker) -> None:
    for end in (Lease.ack, Lease.nack, Lease.release, Lease.reject):
        end(_lease_new(broker))
        broker.purge("q")
    _lease_new(broker, visibility_timeout=0.1, max_attempts=1)
    _pass_time(broker, 0.2)
    _eventually(lambda: broker.stats("q").dead == 1)
    _lease_new(broker)
    broker.enqueue("other", b"")
    broker.lease("other")
    found = broker.deliveries("q")
    assert found == Deliveries(leased=6, nacked=2, released=1, expired=1, dead=2, rate_limited=0)
    assert broker.deliveries().leased == 7
    assert broker.deliveries("unknown") == Deliveries()


def test_deliveries_count_what_a_rate_limit_refused(broker: Broker) -> None:
    broker.configure_queue("in", rate_limit=RateLimit(per_second=0.001, burst=1, on="enqueue"))
    broker.configure_queue("out", rate_limit=RateLimit(per_second=0.001, burst=1))
    broker.enqueue("in", b"")
    with pytest.raises(RateLimitedError):
        broker.enqueue("in", b"")
    broker.enqueue_many("out", [b"", b""])
    assert broker.lease("out") is not None
    assert broker.lease("out") is None
    assert [broker.deliveries(queue).rate_limited for queue in ("in", "out")] == [1, 1]


def test_health_tells_the_state_and_never_raises(broker: Broker) -> None:
    assert broker.health().is_well
    broker.close()
    found = broker.health()
    assert (found.state, found.last_error, found.is_well) == ("closed", None, False)


_CALLS: dict[str, Callable[[Broker, Lease], object]] = {
    "enqueue": lambda broker, lease: broker.enqueue("q", b""),
    "enqueue_many": lambda broker, lease: broker.enqueue_many("q", [b""]),
    "lease": lambda broker, lease: broker.lease("q"),
    "lease that waits": lambda broker, lease: broker.lease("q", wait=_PATIENCE),
    "lease_many": lambda broker, lease: broker.lease_many("q", 1),
    "lease_soon": lambda broker, lease: broker.lease_soon("q", 1, _Told()),
    "extend_many": lambda broker, lease: broker.extend_many([lease], 1),
    "deliveries": lambda broker, lease: broker.deliveries(),
    "metrics": lambda broker, lease: broker.metrics(),
    "histograms": lambda broker, lease: broker.histograms(),
    **_ANSWERS,
    "lease.ack": lambda broker, lease: lease.ack(),
    "lease.nack": lambda broker, lease: lease.nack(),
    "lease.release": lambda broker, lease: lease.release(),
    "lease.reject": lambda broker, lease: lease.reject(),
    "lease.extend": lambda broker, lease: lease.extend(1),
    "with lease": _with,
    "transaction": lambda broker, lease: _put_one_in_a_transaction(broker),
    "configure_queue": lambda broker, lease: broker.configure_queue("q", max_jobs=5),
    "configure_queue that asks": lambda broker, lease: broker.configure_queue("q"),
    "pause": lambda broker, lease: broker.pause("q"),
    "resume": lambda broker, lease: broker.resume("q"),
    "is_paused": lambda broker, lease: broker.is_paused("q"),
    "purge": lambda broker, lease: broker.purge("q"),
    "find": lambda broker, lease: broker.find("q", "k"),
    "cancel": lambda broker, lease: broker.cancel(lease.id),
    "get": lambda broker, lease: broker.get(lease.id),
    "jobs": lambda broker, lease: broker.jobs("q"),
    "dead_letters": lambda broker, lease: broker.dead_letters("q"),
    "redrive": lambda broker, lease: broker.redrive("q"),
    "queues": lambda broker, lease: broker.queues(),
    "stats": lambda broker, lease: broker.stats(),
    "sync": lambda broker, lease: broker.sync(),
}


@pytest.mark.parametrize("call", list(_CALLS.values()), ids=list(_CALLS))
def test_a_closed_broker_refuses_every_call(broker: Broker, call: Callable[[Broker, Lease], object]) -> None:
    lease = _lease_new(broker)
    broker.close()
    with pytest.raises(BrokerClosedError):
        call(broker, lease)


def test_a_transaction_cannot_end_on_a_closed_broker(broker: Broker) -> None:
    with pytest.raises(BrokerClosedError), broker.transaction() as tx:
        tx.enqueue("q", b"")
        broker.close()


def test_close_may_be_repeated_and_ends_a_with_block(broker: Broker) -> None:
    with broker:
        broker.enqueue("q", b"")
        broker.sync()
    with pytest.raises(BrokerClosedError):
        broker.enqueue("q", b"")
    broker.close()
    broker.close()


def test_a_closed_broker_is_not_entered(broker: Broker) -> None:
    broker.close()
    with pytest.raises(BrokerClosedError), broker:
        pass


def test_an_unknown_keyword_is_a_type_error(broker: Broker) -> None:
    options: Any = {"prioritty": 1}
    for verb in ("enqueue", "enqueue_many", "lease", "configure_queue", "redrive"):
        with pytest.raises(TypeError, match="prioritty"):
            getattr(broker, verb)("q", **options)
