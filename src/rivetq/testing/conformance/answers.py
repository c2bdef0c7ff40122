"""Ack, nack, release, reject, extend, and leases as context managers."""

# A block around a transaction or a lease that is to fail is more than one statement.
# ruff: noqa: PT012

from __future__ import annotations

from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest

from rivetq import Broker, LeaseLostError, LeaseRef, RetryPolicy, UsageError

from .shared import (
    _ANSWERS,
    _AT_ONCE,
    _BAD_DURATIONS,
    _NOT_SOON,
    _Answer,
    _assert_about,
    _assert_due_in,
    _await_state,
    _bury,
    _drain,
    _each,
    _every_answer,
    _facts,
    _job,
    _lease,
    _lease_new,
    _pass_time,
    _refuses,
)


def test_an_acked_job_is_gone(broker: Broker) -> None:
    lease = _lease_new(broker)
    broker.ack(lease)
    assert broker.get(lease.id) is None
    assert broker.jobs("q") == []
    assert broker.stats("q").acked == 1


def test_ack_many_acks_over_all_queues(broker: Broker) -> None:
    leases = [_lease_new(broker, queue) for queue in ("a", "b", "a")]
    broker.ack_many(leases)
    assert [broker.get(lease.id) for lease in leases] == [None, None, None]
    assert broker.stats().acked == 3


def test_ack_many_with_one_lost_lease_acks_nothing(broker: Broker) -> None:
    leases = [_lease_new(broker) for _ in range(3)]
    leases[1].ack()
    with _refuses(broker, LeaseLostError) as caught:
        broker.ack_many(leases)
    assert (caught.value.job_id, caught.value.token) == (leases[1].id, leases[1].token)
    broker.ack_many([leases[0], leases[2]])


def test_a_nacked_job_keeps_the_error_and_its_attempts(broker: Broker) -> None:
    lease = _lease_new(broker, retry=_AT_ONCE)
    broker.nack(lease, error="no luck")
    job = _job(broker, lease.id)
    assert (job.state, job.attempts, job.last_error) == ("ready", 1, "no luck")
    again = _lease(broker)
    assert (again.attempt, again.last_error) == (2, "no luck")


@pytest.mark.parametrize("delay", [100, 100.0, timedelta(seconds=100)])
def test_a_nack_with_a_delay_comes_back_after_it_whatever_the_policy(broker: Broker, delay: Any) -> None:
    lease = _lease_new(broker, retry=RetryPolicy(base=2000, jitter="none"))
    broker.nack(lease, delay=delay)
    _assert_due_in(broker, lease.id, 100)


@pytest.mark.parametrize("delay", [None, 0, 100])
def test_a_nacked_job_at_max_attempts_becomes_a_dead_letter(broker: Broker, delay: float | None) -> None:
    lease = _lease_new(broker, max_attempts=2, retry=_AT_ONCE)
    lease.nack()
    _lease(broker).nack(error="the last", delay=delay)
    job = _job(broker, lease.id)
    assert (job.state, job.attempts, job.last_error) == ("dead", 2, "the last")
    assert job.died_at is not None
    assert [dead.id for dead in broker.dead_letters("q")] == [lease.id]
    assert broker.lease("q") is None


def test_an_error_is_kept_up_to_4_kib(broker: Broker) -> None:
    for letter in ("x", "é"):
        lease = _lease_new(broker)
        lease.reject(error=letter * 5000)
        kept = _job(broker, lease.id).last_error
        assert kept is not None
        assert kept.startswith(letter * 2000)
        assert len(kept.encode()) <= 4096


def test_a_release_gives_the_job_back_with_the_attempt_not_counted(broker: Broker) -> None:
    lease = _lease_new(broker, max_attempts=1)
    for _ in range(3):
        broker.release(lease)
        job = _job(broker, lease.id)
        assert (job.state, job.attempts) == ("ready", 0)
        lease = _lease(broker)
        assert lease.attempt == 1


@pytest.mark.parametrize("delay", [100, timedelta(seconds=100)])
def test_a_release_with_a_delay_comes_back_after_it(broker: Broker, delay: Any) -> None:
    one, other = _lease_new(broker), _lease_new(broker)
    broker.release(one, delay=delay)
    other.release(delay=delay)
    for lease in (one, other):
        _assert_due_in(broker, lease.id, 100)
        assert _job(broker, lease.id).attempts == 0


def test_a_rejected_job_is_a_dead_letter_at_once(broker: Broker) -> None:
    lease = _lease_new(broker, max_attempts=5)
    broker.reject(lease, error="hopeless")
    job = _job(broker, lease.id)
    assert (job.state, job.attempts, job.last_error) == ("dead", 1, "hopeless")
    assert job.died_at is not None
    assert broker.stats("q").dead == 1


@pytest.mark.parametrize("back", ["nack", "release", "expiry", "redrive"])
def test_a_job_that_comes_back_returns_to_its_place_by_id(broker: Broker, back: str) -> None:
    ids = broker.enqueue_many("q", [b"", b"", b""], retry=_AT_ONCE)
    lease = _lease(broker, "q", 0.1 if back == "expiry" else None)
    {
        "nack": lease.nack,
        "release": lease.release,
        "expiry": lambda: _pass_time(broker, 0.1),
        "redrive": lease.reject,
    }[back]()
    if back == "redrive":
        broker.redrive("q")
    _await_state(broker, lease.id, "ready")
    assert _drain(broker) == list(ids)


@pytest.mark.parametrize("seconds", [100, 100.0, timedelta(seconds=100)])
def test_an_extended_lease_lasts_from_now(broker: Broker, seconds: Any) -> None:
    lease = _lease_new(broker)
    extended = broker.extend(lease, seconds)
    assert (extended.id, extended.token, extended.attempt) == (lease.id, lease.token, lease.attempt)
    _assert_about(broker, (extended.deadline - lease.enqueued_at).total_seconds(), 100)


@pytest.mark.parametrize("seconds", [0, 1, 29.5])
def test_an_extend_never_shortens_a_lease(broker: Broker, seconds: float) -> None:
    lease = _lease_new(broker, visibility_timeout=1000)
    assert broker.extend(lease, seconds).deadline == lease.deadline


@pytest.mark.parametrize("which", ["old", "new"])
def test_after_an_extend_both_the_old_and_the_new_value_answer(broker: Broker, which: str) -> None:
    old = _lease_new(broker, visibility_timeout=0.3)
    new = old.extend(100)
    _pass_time(broker, 0.3)
    assert broker.lease("q") is None
    (old if which == "old" else new).ack()
    assert broker.get(old.id) is None


def test_extend_many_is_extend_for_each(broker: Broker) -> None:
    leases = [_lease_new(broker, queue) for queue in ("a", "b")]
    for lease, deadline in zip(leases, broker.extend_many(leases, 100), strict=True):
        _assert_about(broker, (deadline - lease.enqueued_at).total_seconds(), 100)
        assert broker.extend(lease, 0).deadline == deadline


def test_extend_many_with_one_lost_lease_extends_none_and_says_which(broker: Broker) -> None:
    leases = [_lease_new(broker, visibility_timeout=100) for _ in range(3)]
    leases[1].ack()
    with _refuses(broker, LeaseLostError) as caught:
        broker.extend_many(leases, 1000)
    assert caught.value.job_id == leases[1].id
    assert broker.extend(leases[0], 0).deadline == leases[0].deadline


@_every_answer
@pytest.mark.parametrize("foreign", [False, True], ids=["LeaseRef", "foreign"])
def test_an_answer_takes_anything_with_an_id_and_a_token(broker: Broker, answer: _Answer, foreign: bool) -> None:
    lease = _lease_new(broker, retry=_NOT_SOON)
    ref = LeaseRef(lease.id, lease.token)
    answer(broker, SimpleNamespace(id=lease.id, token=lease.token) if foreign else ref)
    if answer is _ANSWERS["extend"]:
        lease.ack()
    else:
        with _refuses(broker, LeaseLostError):
            lease.ack()


@_every_answer
@pytest.mark.parametrize("lease", _each(None, 7, "lease", object()))
def test_an_answer_to_what_is_no_lease_is_refused(broker: Broker, answer: _Answer, lease: object) -> None:
    _lease_new(broker)
    with _refuses(broker, UsageError):
        answer(broker, lease)


@pytest.mark.parametrize(
    ("verb", "options"),
    [
        pytest.param(verb, {name: value}, id=f"{verb}-{name}={value!r}")
        for verb, name, values in [
            ("nack", "delay", _BAD_DURATIONS),
            ("nack", "error", [7, b"bytes", ValueError("not its text")]),
            ("release", "delay", _BAD_DURATIONS),
            ("reject", "error", [7, b"bytes", ValueError("not its text")]),
            ("extend", "seconds", _BAD_DURATIONS),
        ]
        for value in values
    ],
)
def test_an_answer_with_a_bad_option_is_refused(broker: Broker, verb: str, options: dict[str, Any]) -> None:
    lease = _lease_new(broker)
    with _refuses(broker, UsageError):
        getattr(broker, verb)(lease, **options)
    with _refuses(broker, UsageError):
        getattr(lease, verb)(**options)
    if verb != "extend":
        with _refuses(broker, UsageError), broker.transaction() as tx:
            getattr(tx, verb)(lease, **options)


def test_a_str_is_no_sequence(broker: Broker) -> None:
    _bury(broker)
    text: Any = "12"
    with _refuses(broker, UsageError):
        broker.enqueue_many("q", text)
    with _refuses(broker, UsageError):
        broker.enqueue_many("q", [b"", b""], idempotency_keys=text)
    with _refuses(broker, UsageError):
        broker.ack_many(text)
    with _refuses(broker, UsageError):
        broker.redrive("q", job_ids=text)


def test_a_with_block_acks_at_its_end(broker: Broker) -> None:
    lease = _lease_new(broker)
    with lease:
        assert _job(broker, lease.id).state == "leased"
    assert broker.get(lease.id) is None
    assert broker.stats("q").acked == 1


@pytest.mark.parametrize(
    "error", [ValueError("no luck"), KeyError("key"), KeyboardInterrupt("stop"), SystemExit("out")]
)
def test_a_with_block_that_raises_nacks_and_lets_the_exception_through(broker: Broker, error: BaseException) -> None:
    lease = _lease_new(broker, retry=_AT_ONCE)
    with pytest.raises(type(error)) as caught, lease:
        raise error
    assert caught.value is error
    job = _job(broker, lease.id)
    assert (job.state, job.attempts, job.last_error) == ("ready", 1, f"{type(error).__name__}: {error}")


_SETTLE: dict[str, _Answer] = {
    "lease.ack": lambda broker, lease: lease.ack(),
    "lease.nack": lambda broker, lease: lease.nack(error="mine"),
    "lease.release": lambda broker, lease: lease.release(),
    "lease.reject": lambda broker, lease: lease.reject(error="mine"),
    **{name: answer for name, answer in _ANSWERS.items() if name != "extend"},
}
_every_settling = pytest.mark.parametrize("settle", list(_SETTLE.values()), ids=list(_SETTLE))


@_every_settling
def test_a_with_block_whose_body_settled_the_lease_does_nothing_at_its_end(broker: Broker, settle: _Answer) -> None:
    lease = _lease_new(broker, retry=_NOT_SOON)
    with lease:
        settle(broker, lease)
        settled = _facts(broker)
    assert _facts(broker) == settled


@_every_settling
def test_a_with_block_that_settles_and_then_raises_does_nothing_more(broker: Broker, settle: _Answer) -> None:
    lease = _lease_new(broker, retry=_NOT_SOON)
    with pytest.raises(ValueError, match="afterwards"), lease:
        settle(broker, lease)
        settled = _facts(broker)
        raise ValueError("afterwards")
    assert _facts(broker) == settled


def test_a_with_block_may_extend_its_lease(broker: Broker) -> None:
    lease = _lease_new(broker, visibility_timeout=0.3)
    with lease:
        lease.extend(100)
        _pass_time(broker, 0.3)
    assert broker.get(lease.id) is None


def test_a_with_block_that_lost_its_lease_raises(broker: Broker) -> None:
    lease = _lease_new(broker, visibility_timeout=0.1, retry=_AT_ONCE)
    with pytest.raises(LeaseLostError) as caught, lease:
        _pass_time(broker, 0.1)
    assert (caught.value.job_id, caught.value.token) == (lease.id, lease.token)
    assert _await_state(broker, lease.id, "ready").last_error == "lease expired"


def test_a_with_block_that_lost_its_lease_lets_its_own_exception_through(broker: Broker) -> None:
    lease = _lease_new(broker, visibility_timeout=0.1, retry=_AT_ONCE)
    with pytest.raises(ValueError, match="mine"), lease:
        _pass_time(broker, 0.1)
        raise ValueError("mine")
    assert _await_state(broker, lease.id, "ready").last_error == "lease expired"


def test_of_two_extends_in_one_call_the_longer_holds(broker: Broker) -> None:
    broker.enqueue("q", b"")
    lease = _lease(broker, visibility_timeout=10)
    first, second = broker.extend_many([lease, lease], 100)
    assert first == second > lease.deadline


def test_an_exception_without_a_text_goes_through_a_lease_and_nacks(broker: Broker) -> None:
    class SilentError(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no text")

    lease = _lease_new(broker)
    with pytest.raises(SilentError), lease:
        raise SilentError
    assert "SilentError" in str(_job(broker, lease.id).last_error)
