"""Idempotency keys."""

# A block around a transaction or a lease that is to fail is more than one statement.
# ruff: noqa: PT012

from __future__ import annotations

import pickle
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest

from rivetq import Broker, DuplicateJobError, JobId, JobNotFoundError, RateLimit, UsageError

from .shared import _BAD_KEYS, _bury, _each, _facts, _lease, _pass_time, _refuses

_END: dict[str, Callable[[Broker], object]] = {
    "ack": lambda broker: _lease(broker).ack(),
    "cancel": lambda broker: broker.cancel(broker.jobs("q")[0].id),
    "purge": lambda broker: broker.purge("q"),
}
_every_end = pytest.mark.parametrize("end", list(_END.values()), ids=list(_END))


@pytest.mark.parametrize("state", ["ready", "scheduled", "leased", "dead"])
def test_a_second_enqueue_with_the_key_of_a_living_job_creates_nothing(broker: Broker, state: str) -> None:
    first = broker.enqueue("q", b"first", idempotency_key="k", delay=1000 if state == "scheduled" else 0)
    if state in ("leased", "dead"):
        lease = _lease(broker)
        if state == "dead":
            lease.reject()
    before = _facts(broker)
    assert broker.enqueue("q", {"another": "payload"}, idempotency_key="k") == first
    assert list(broker.enqueue_many("q", [b""], idempotency_keys=["k"])) == [first]
    assert broker.find("q", "k") == first
    assert _facts(broker) == before
    with _refuses(broker, DuplicateJobError) as caught:
        broker.enqueue("q", b"", idempotency_key="k", on_duplicate="raise")
    assert (caught.value.job_id, caught.value.queue, caught.value.key) == (first, "q", "k")


def test_a_key_stands_for_its_job_after_the_ack(broker: Broker) -> None:
    first = broker.enqueue("q", b"", idempotency_key="k")
    _lease(broker).ack()
    assert broker.get(first) is None
    assert broker.find("q", "k") == first
    assert broker.enqueue("q", b"", idempotency_key="k") == first
    assert broker.jobs("q") == []
    with _refuses(broker, DuplicateJobError):
        broker.enqueue("q", b"", idempotency_key="k", on_duplicate="raise")


@pytest.mark.parametrize("end", ["cancel", "purge"])
@pytest.mark.parametrize("state", ["ready", "scheduled", "dead"])
def test_cancel_and_purge_free_the_key_at_once_since_nobody_did_the_work(broker: Broker, state: str, end: str) -> None:
    first = broker.enqueue("q", b"", idempotency_key="k", delay=1000 if state == "scheduled" else 0)
    broker.enqueue("q", b"", idempotency_key="other")
    if state == "dead":
        _lease(broker).reject()
    _END[end](broker)
    assert broker.find("q", "k") is None
    second = broker.enqueue("q", b"", idempotency_key="k", on_duplicate="raise")
    assert second > first
    assert broker.find("q", "k") == second


def test_with_a_key_the_answer_says_whether_the_job_is_new(broker: Broker) -> None:
    first = broker.enqueue("q", b"", idempotency_key="k")
    assert isinstance(first, JobId)
    assert first.created
    again = broker.enqueue("q", b"", idempotency_key="k")
    assert isinstance(again, JobId)
    assert (again, again.created) == (first, False)
    many = broker.enqueue_many("q", [b"", b"", b""], idempotency_keys=["k", "new", "new"])
    assert [getattr(job_id, "created", None) for job_id in many] == [False, True, False]
    assert many[1] == many[2]
    with broker.transaction() as tx:
        ids = [tx.enqueue("q", b"", idempotency_key=key) for key in ("k", "tx", "tx")]
    assert [getattr(job_id, "created", None) for job_id in ids] == [False, True, False]
    assert pickle.loads(pickle.dumps(first)).created


@_every_end
def test_with_a_ttl_of_0_a_key_ends_with_its_job(broker: Broker, end: Callable[[Broker], object]) -> None:
    broker.configure_queue("q", idempotency_ttl=0)
    first = broker.enqueue("q", b"", idempotency_key="k")
    assert broker.enqueue("q", b"", idempotency_key="k") == first
    end(broker)
    assert broker.find("q", "k") is None
    second = broker.enqueue("q", b"", idempotency_key="k", on_duplicate="raise")
    assert second > first
    assert broker.find("q", "k") == second


@pytest.mark.parametrize("ttl", [0.3, timedelta(seconds=0.3)])
def test_a_key_is_free_once_the_ttl_has_passed_since_the_end_of_its_job(broker: Broker, ttl: Any) -> None:
    broker.configure_queue("q", idempotency_ttl=ttl)
    first = broker.enqueue("q", b"", idempotency_key="k")
    _pass_time(broker, 0.3)
    assert broker.find("q", "k") == first  # it lives
    _lease(broker).ack()
    _pass_time(broker, 0.3)
    assert broker.find("q", "k") is None
    assert broker.enqueue("q", b"", idempotency_key="k") > first


def test_a_dead_letter_holds_its_key_and_keeps_it_when_redriven(broker: Broker) -> None:
    broker.configure_queue("q", idempotency_ttl=0)
    dead = _bury(broker, key="k")
    assert broker.find("q", "k") == dead
    broker.redrive("q")
    assert broker.enqueue("q", b"", idempotency_key="k") == dead
    assert len(broker.jobs("q")) == 1


def test_a_key_holds_in_its_own_queue_only(broker: Broker) -> None:
    one, other = (broker.enqueue(queue, b"", idempotency_key="k", on_duplicate="raise") for queue in ("a", "b"))
    assert one != other
    assert [broker.find(queue, "k") for queue in ("a", "b")] == [one, other]
    assert broker.find("a", "another key") is None


def test_a_known_key_gives_the_first_id_even_if_the_queue_is_full_or_over_its_rate(broker: Broker) -> None:
    broker.configure_queue("q", max_jobs=1, rate_limit=RateLimit(per_second=0.01, burst=1, on="enqueue"))
    first = broker.enqueue("q", b"", idempotency_key="k")
    assert broker.enqueue("q", b"", idempotency_key="k") == first
    assert list(broker.enqueue_many("q", [b""], idempotency_keys=["k"])) == [first]
    with broker.transaction() as tx:
        assert tx.enqueue("q", b"", idempotency_key="k") == first


@pytest.mark.parametrize("key", _each("x" * 256, "é" * 128, " ", "\x00", "日本"))
def test_a_key_may_have_any_characters(broker: Broker, key: str) -> None:
    first = broker.enqueue("q", b"", idempotency_key=key)
    assert broker.enqueue("q", b"", idempotency_key=key) == broker.find("q", key) == first


@pytest.mark.parametrize("key", _each(*_BAD_KEYS))
def test_a_key_is_1_to_256_bytes_of_utf8(broker: Broker, key: Any) -> None:
    with _refuses(broker, UsageError):
        broker.enqueue("q", b"", idempotency_key=key)
    with _refuses(broker, UsageError), broker.transaction() as tx:
        tx.enqueue("q", b"", idempotency_key=key)
    with _refuses(broker, UsageError):
        broker.find("q", key)


def test_a_duplicate_says_in_which_state_its_job_is(broker: Broker) -> None:
    for state in ("ready", "leased", "dead", None):
        if state == "leased":
            lease = _lease(broker)
        elif state == "dead":
            lease.reject()
        elif state is None:
            broker.redrive("q")
            _lease(broker).ack()
        else:
            broker.enqueue("q", b"", idempotency_key="k")
        for call in (broker.enqueue, lambda *args, **options: _in_transaction(broker, *args, **options)):
            with _refuses(broker, DuplicateJobError) as caught:
                call("q", b"", idempotency_key="k", on_duplicate="raise")
            assert caught.value.state == state


def _in_transaction(broker: Broker, *args: Any, **options: Any) -> None:
    with broker.transaction() as tx:
        tx.enqueue(*args, **options)


@pytest.mark.parametrize("end", ["cancel", "purge"])
def test_a_key_that_is_free_at_the_end_of_a_transaction_that_was_told_a_job_ends_it(broker: Broker, end: str) -> None:
    """Else the job that the caller counts on would be in no queue, without a word."""
    old = broker.enqueue("q", b"old", idempotency_key="k")
    with pytest.raises(JobNotFoundError) as caught, broker.transaction() as tx:
        assert tx.enqueue("q", b"new", idempotency_key="k") == old
        tx.enqueue("other", b"")
        _END[end](broker)
    assert (caught.value.job_id, caught.value.outcome) == (old, "not_done")
    assert broker.stats().ready == 0
    with broker.transaction() as tx:
        assert tx.enqueue("q", b"new", idempotency_key="k") > old
    assert broker.stats("q").ready == 1


def test_an_ack_frees_a_key_without_a_window_for_the_same_transaction(broker: Broker) -> None:
    broker.configure_queue("q", idempotency_ttl=0)
    old = broker.enqueue("q", b"old", idempotency_key="k")
    lease = _lease(broker)
    with broker.transaction() as tx:
        tx.ack(lease)
        new = tx.enqueue("q", b"new", idempotency_key="k")
    assert new > old
    assert broker.find("q", "k") == new
    assert _lease(broker).payload == b"new"
