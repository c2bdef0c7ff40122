"""All of a block or nothing of it."""

# A block around a transaction or a lease that is to fail is more than one statement.
# ruff: noqa: PT012

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from rivetq import Broker, DuplicateJobError, LeaseLostError, QueueFullError, RateLimit, RateLimitedError, UsageError
from rivetq.engine import Ack, Enqueue, Once, Operation

from .shared import _NOT_SOON, _assert_due_in, _elsewhere, _facts, _job, _lease, _lease_new, _pass_time, _refuses


def test_a_transaction_does_all_of_it_over_any_queues(broker: Broker) -> None:
    done, nacked, released, rejected = (_lease_new(broker) for _ in range(4))
    with broker.transaction() as tx:
        tx.ack(done)
        tx.nack(nacked, error="no luck", delay=100)
        tx.release(released, delay=timedelta(seconds=200))
        tx.reject(rejected, error="hopeless")
        following = tx.enqueue("next", {"a": 1}, priority=7)
        audit = list(tx.enqueue_many("audit", [b"x", b"y"], delay=100))
    assert broker.get(done.id) is None
    _assert_due_in(broker, nacked.id, 100)
    _assert_due_in(broker, released.id, 200)
    assert [_job(broker, lease.id).last_error for lease in (nacked, rejected)] == ["no luck", "hopeless"]
    assert (_lease(broker, "next").id, _job(broker, following).priority) == (following, 7)
    assert [job.id for job in broker.jobs("audit", state="scheduled")] == audit


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()])
def test_a_transaction_that_raises_did_nothing(broker: Broker, error: BaseException) -> None:
    lease = _lease_new(broker)
    before = _facts(broker)
    with pytest.raises(type(error)) as caught, broker.transaction() as tx:
        tx.enqueue("new", b"", idempotency_key="k")
        tx.ack(lease)
        raise error
    assert caught.value is error
    assert _facts(broker) == before
    assert broker.find("new", "k") is None
    lease.ack()


def test_a_transaction_that_fails_at_its_end_did_nothing(broker: Broker) -> None:
    kept, lost = _lease_new(broker), _lease_new(broker)
    with pytest.raises(LeaseLostError) as caught, broker.transaction() as tx:
        tx.enqueue("new", b"")
        tx.ack_many([kept, lost])
        _elsewhere(lost.ack)
    assert (caught.value.job_id, caught.value.token, caught.value.outcome) == (lost.id, lost.token, "not_done")
    assert broker.queues() == ["q"]
    kept.ack()


def test_a_job_of_a_transaction_exists_when_the_block_ends(broker: Broker) -> None:
    with broker.transaction() as tx:
        job_id = tx.enqueue("q", b"x")
        assert broker.get(job_id) is None
        assert broker.lease("q") is None
        assert broker.stats("q").enqueued == 0
    assert _lease(broker).id == job_id


def test_ids_of_a_transaction_increase_in_the_order_of_its_calls(broker: Broker) -> None:
    before = broker.enqueue("q", b"")
    with broker.transaction() as tx:
        ids = [tx.enqueue("q", b""), *tx.enqueue_many("r", [b"", b""]), tx.enqueue("q", b"")]
    after = broker.enqueue("q", b"")
    ids = [before, *ids, after]
    assert ids == sorted(set(ids))


def test_ids_of_a_rolled_back_transaction_are_not_used_again(broker: Broker) -> None:
    with pytest.raises(ValueError, match="no"), broker.transaction() as tx:
        unused = tx.enqueue("q", b"")
        raise ValueError("no")
    assert broker.get(unused) is None
    assert broker.enqueue("q", b"") > unused


@pytest.mark.parametrize(
    ("verb", "state"), [("ack", None), ("nack", "scheduled"), ("release", "ready"), ("reject", "dead")]
)
def test_an_answer_in_a_transaction_holds_from_its_end_on(broker: Broker, verb: str, state: str | None) -> None:
    lease = _lease_new(broker, retry=_NOT_SOON)
    with broker.transaction() as tx:
        getattr(tx, verb)(lease)
        assert _job(broker, lease.id).state == "leased"
    job = broker.get(lease.id)
    assert (job.state if job else None) == state
    with pytest.raises(LeaseLostError):
        lease.ack()


def test_a_lease_that_expires_during_a_transaction_fails_its_end(broker: Broker) -> None:
    lease = _lease_new(broker, visibility_timeout=0.3)
    with pytest.raises(LeaseLostError), broker.transaction() as tx:
        tx.ack(lease)
        tx.enqueue("new", b"")
        _pass_time(broker, 0.3)
    assert broker.queues() == ["q"]
    assert broker.stats("q").acked == 0


def test_a_key_taken_during_a_transaction_fails_its_end(broker: Broker) -> None:
    with pytest.raises(DuplicateJobError) as caught, broker.transaction() as tx:
        tx.enqueue("q", b"mine", idempotency_key="k", on_duplicate="raise")
        tx.enqueue("new", b"")
        _elsewhere(lambda: broker.enqueue("q", b"theirs", idempotency_key="k"))
    (job,) = broker.jobs("q")
    assert job.payload == b"theirs"
    assert (caught.value.job_id, caught.value.queue, caught.value.key) == (job.id, "q", "k")
    assert broker.queues() == ["q"]


def test_a_queue_filled_during_a_transaction_fails_its_end(broker: Broker) -> None:
    broker.configure_queue("q", max_jobs=2)
    with pytest.raises(QueueFullError) as caught, broker.transaction() as tx:
        tx.enqueue("q", b"mine")
        tx.enqueue("new", b"")
        _elsewhere(lambda: broker.enqueue_many("q", [b"theirs", b"theirs"]))
    assert (caught.value.queue, caught.value.max_jobs) == ("q", 2)
    assert [job.payload for job in broker.jobs("q")] == [b"theirs", b"theirs"]
    assert broker.queues() == ["q"]


def test_a_rate_used_up_during_a_transaction_fails_its_end(broker: Broker) -> None:
    broker.configure_queue("q", rate_limit=RateLimit(per_second=0.01, burst=1, on="enqueue"))
    with pytest.raises(RateLimitedError) as caught, broker.transaction() as tx:
        tx.enqueue("q", b"mine")
        tx.enqueue("new", b"")
        _elsewhere(lambda: broker.enqueue("q", b"theirs"))
    assert caught.value.queue == "q"
    assert [job.payload for job in broker.jobs("q")] == [b"theirs"]
    assert broker.queues() == ["q"]


def test_a_key_that_stands_for_a_job_gives_its_id_in_a_transaction_or_raises(broker: Broker) -> None:
    first = broker.enqueue("q", b"first", idempotency_key="k")
    with broker.transaction() as tx:
        assert tx.enqueue("q", b"again", idempotency_key="k") == first
        assert list(tx.enqueue_many("q", [b"again"], idempotency_keys=["k"])) == [first]
    with _refuses(broker, DuplicateJobError), broker.transaction() as tx:
        tx.enqueue("q", b"", idempotency_key="k", on_duplicate="raise")
    with _refuses(broker, DuplicateJobError), broker.transaction() as tx:
        tx.enqueue_many("q", [b""], idempotency_keys=["k"], on_duplicate="raise")
    assert [job.payload for job in broker.jobs("q")] == [b"first"]


def test_other_threads_are_not_blocked_by_a_transaction(broker: Broker) -> None:
    lease = _lease_new(broker)
    with broker.transaction() as tx:
        tx.ack(lease)
        _elsewhere(lambda: broker.enqueue("q", b"theirs"))
        _elsewhere(lambda: _lease(broker).ack())
    assert broker.stats("q").acked == 2


@pytest.mark.parametrize("ending", ["commit", "rollback"])
@pytest.mark.parametrize("verb", ["enqueue", "enqueue_many", "ack", "ack_many", "nack", "release", "reject"])
def test_a_transaction_that_has_ended_is_refused(broker: Broker, verb: str, ending: str) -> None:
    lease = _lease_new(broker)
    tx = None
    try:
        with broker.transaction() as tx:
            if ending == "rollback":
                raise ValueError("no")
    except ValueError:
        pass
    arguments: dict[str, tuple[Any, ...]] = {
        "enqueue": ("q", b""),
        "enqueue_many": ("q", [b""]),
        "ack_many": ([lease],),
    }
    with _refuses(broker, UsageError):
        getattr(tx, verb)(*arguments.get(verb, (lease,)))


def test_a_commit_that_is_made_again_with_its_number_is_not_done_twice(broker: Broker) -> None:
    lease = _lease_new(broker)
    operations: list[Operation] = [Ack(lease.id, lease.token), Enqueue("next", [b"a", b"b"], keys=["k", None])]
    first = broker.commit(operations, once=Once(2**64 - 1, 1))
    before = _facts(broker)
    again = broker.commit(operations, once=Once(2**64 - 1, 1))
    assert (again, _facts(broker)) == (first, before)
    ids = again[1]
    assert isinstance(ids, list)
    assert [getattr(each, "created", None) for each in ids] == [True, True]
    broker.commit(operations[1:], once=Once(2**64 - 1, 2, done_below=2))
    with _refuses(broker, UsageError):
        broker.commit(operations, once=Once(2**64 - 1, 1))
