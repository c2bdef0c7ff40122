"""Lists, stats, purge, cancel, redrive."""

# A block around a transaction or a lease that is to fail is more than one statement.

from __future__ import annotations

from math import inf, nan
from typing import Any

import attrs
import pytest

from rivetq import Broker, JobNotFoundError, UsageError

from .shared import (
    _BAD_INTS,
    _COUNTERS,
    _assert_about,
    _bury,
    _each,
    _facts,
    _job,
    _lease,
    _lease_new,
    _one_of_each_state,
    _options,
    _pass_time,
    _refuses,
)

_BAD_IDS = _each(True, False, 1.0, nan, inf)


def test_jobs_are_those_of_the_queue_by_id(broker: Broker) -> None:
    broker.enqueue("other", b"")
    by_state = _one_of_each_state(broker)
    by_state["urgent"] = broker.enqueue("q", b"", priority=9)
    assert [job.id for job in broker.jobs("q")] == sorted(by_state.values())


@pytest.mark.parametrize("state", ["ready", "scheduled", "leased", "dead"])
def test_jobs_may_be_asked_for_by_state(broker: Broker, state: str) -> None:
    by_state = _one_of_each_state(broker)
    assert [(job.id, job.state) for job in broker.jobs("q", state=state)] == [(by_state[state], state)]


def test_jobs_are_paged_by_the_last_id_seen(broker: Broker) -> None:
    ids = list(broker.enqueue_many("q", [b""] * 105))
    assert [job.id for job in broker.jobs("q")] == ids[:100]
    assert [job.id for job in broker.jobs("q", after=ids[1], limit=3)] == ids[2:5]
    assert [job.id for job in broker.jobs("q", after=ids[99], limit=10_000)] == ids[100:]
    assert broker.jobs("q", after=ids[-1]) == []


def test_jobs_without_payloads_are_the_same_but_for_these(broker: Broker) -> None:
    _one_of_each_state(broker)
    broker.enqueue("q", b"x" * 1000, headers={"a": "b"})
    jobs = broker.jobs("q")
    assert broker.jobs("q", payloads=False) == [attrs.evolve(job, payload=b"") for job in jobs]
    assert jobs[-1].payload == b"x" * 1000
    wrong: list[Any] = [0, "yes"]
    for value in wrong:
        with pytest.raises(UsageError, match="payloads"):
            broker.jobs("q", payloads=value)


def test_dead_letters_are_paged_by_the_last_id_seen(broker: Broker) -> None:
    ids = [_bury(broker) for _ in range(5)]
    _bury(broker, "other")
    broker.enqueue("q", b"alive")
    assert [(job.id, job.state) for job in broker.dead_letters("q")] == [(each, "dead") for each in ids]
    assert [job.id for job in broker.dead_letters("q", after=ids[1], limit=2)] == ids[2:4]
    assert broker.dead_letters("q", after=ids[-1]) == []


@pytest.mark.parametrize(
    "options", _options({"state": ["done", "READY", True], "after": _BAD_INTS, "limit": [*_BAD_INTS, 0, -1, 10_001]})
)
def test_a_look_at_jobs_with_a_bad_option_is_refused(broker: Broker, options: dict[str, Any]) -> None:
    _bury(broker)
    with _refuses(broker, UsageError):
        broker.jobs("q", **options)
    if "state" not in options:
        with _refuses(broker, UsageError):
            broker.dead_letters("q", **options)


@pytest.mark.parametrize("job_id", _BAD_IDS)
def test_a_bad_id_is_refused(broker: Broker, job_id: Any) -> None:
    broker.enqueue("q", b"")
    with _refuses(broker, UsageError):
        broker.get(job_id)
    with _refuses(broker, UsageError):
        broker.cancel(job_id)


@pytest.mark.parametrize("state", ["ready", "scheduled", "dead"])
def test_cancel_removes_a_job_that_nobody_works_on(broker: Broker, state: str) -> None:
    job_id = _one_of_each_state(broker)[state]
    assert broker.cancel(job_id) is True
    assert broker.get(job_id) is None
    assert broker.stats("q").cancelled == 1
    assert broker.cancel(job_id) is False
    assert broker.stats("q").cancelled == 1


def test_cancel_leaves_a_leased_job_and_what_is_gone(broker: Broker) -> None:
    leased = _one_of_each_state(broker)["leased"]
    before = _facts(broker)
    assert broker.cancel(leased) is False
    assert broker.cancel(leased + 1000) is False
    assert _facts(broker) == before


def test_purge_removes_all_but_the_leased_jobs(broker: Broker) -> None:
    kept = broker.enqueue("other", b"")
    by_state = _one_of_each_state(broker)
    assert broker.purge("q") == 3
    assert [job.id for job in broker.jobs("q")] == [by_state["leased"]]
    assert broker.stats("q").purged == 3
    assert broker.purge("q") == 0
    assert _job(broker, kept).state == "ready"


@pytest.mark.parametrize("state", ["ready", "scheduled", "dead"])
def test_purge_of_one_state_removes_no_other_job(broker: Broker, state: str) -> None:
    by_state = _one_of_each_state(broker)
    assert broker.purge("q", state=state) == 1
    assert {job.id for job in broker.jobs("q")} == set(by_state.values()) - {by_state[state]}


@pytest.mark.parametrize("state", _each("leased", "done", "READY", True, 1))
def test_purge_of_leased_jobs_or_of_an_unknown_state_is_refused(broker: Broker, state: Any) -> None:
    _one_of_each_state(broker)
    with _refuses(broker, UsageError):
        broker.purge("q", state=state)


def test_redrive_brings_dead_letters_back_with_attempts_from_0(broker: Broker) -> None:
    lease = _lease_new(broker, max_attempts=1)
    lease.nack()
    assert broker.redrive("q") == 1
    job = _job(broker, lease.id)
    assert (job.state, job.attempts, job.max_attempts) == ("ready", 0, 1)
    assert _lease(broker).attempt == 1
    assert broker.redrive("q") == 0


def test_redrive_takes_the_ids_that_are_given_or_the_lowest_first(broker: Broker) -> None:
    ids = [_bury(broker) for _ in range(6)]
    assert broker.redrive("q", job_ids=[ids[4], ids[0]]) == 2
    assert [job.id for job in broker.dead_letters("q")] == [ids[1], ids[2], ids[3], ids[5]]
    assert broker.redrive("q", limit=2) == 2
    assert [job.id for job in broker.dead_letters("q")] == [ids[3], ids[5]]
    assert broker.redrive("q", limit=100) == 2


@pytest.mark.parametrize("state", ["ready", "scheduled", "leased", "of another queue", "gone"])
def test_redrive_of_an_id_that_is_no_dead_letter_of_the_queue_changes_nothing(broker: Broker, state: str) -> None:
    by_state = _one_of_each_state(broker)
    by_state["of another queue"] = _bury(broker, "other")
    by_state["gone"] = by_state["dead"] + 1000
    with _refuses(broker, JobNotFoundError) as caught:
        broker.redrive("q", job_ids=[by_state["dead"], by_state[state]])
    assert caught.value.job_id == by_state[state]


@pytest.mark.parametrize("options", _options({"job_ids": [[True], [1.0], [nan]], "limit": _BAD_INTS}))
def test_a_redrive_with_a_bad_option_is_refused(broker: Broker, options: dict[str, Any]) -> None:
    _bury(broker)
    with _refuses(broker, UsageError):
        broker.redrive("q", **options)


def test_enqueued_is_at_each_moment_the_sum_of_the_other_seven(broker: Broker) -> None:
    expected = dict.fromkeys(_COUNTERS, 0)

    def check(**changes: int) -> None:
        for name, change in changes.items():
            expected[name] += change
        for stats in (broker.stats("q"), broker.stats()):
            assert {name: getattr(stats, name) for name in _COUNTERS} == expected
        assert expected["enqueued"] == sum(expected.values()) - expected["enqueued"]

    broker.enqueue_many("q", [b""] * 5)
    check(enqueued=5, ready=5)
    cancelled = broker.enqueue("q", b"", delay=1000)
    check(enqueued=1, scheduled=1)
    acked, nacked, released, rejected = broker.lease_many("q", 4)
    check(ready=-4, leased=4)
    acked.ack()
    check(leased=-1, acked=1)
    nacked.nack(delay=1000)
    check(leased=-1, scheduled=1)
    released.release()
    check(leased=-1, ready=1)
    rejected.reject()
    check(leased=-1, dead=1)
    broker.cancel(cancelled)
    check(scheduled=-1, cancelled=1)
    broker.redrive("q")
    check(dead=-1, ready=1)
    broker.purge("q", state="ready")
    check(ready=-3, purged=3)


def test_stats_without_a_queue_are_those_of_all(broker: Broker) -> None:
    broker.enqueue_many("a", [b"", b""])
    broker.enqueue("b", b"", delay=1000)
    _lease(broker, "a").ack()
    total, parts = broker.stats(), [broker.stats("a"), broker.stats("b")]
    for name in _COUNTERS:
        assert getattr(total, name) == sum(getattr(part, name) for part in parts)


def test_the_oldest_age_is_that_of_the_oldest_ready_job_since_its_enqueue(broker: Broker) -> None:
    lease = _lease_new(broker)
    assert broker.stats("q").oldest_age is None
    _pass_time(broker, 0.2)
    broker.enqueue("q", b"younger")
    lease.release()
    for stats in (broker.stats("q"), broker.stats()):
        assert stats.oldest_age is not None
        _assert_about(broker, stats.oldest_age, 0.2)


def test_the_queue_of_a_job_is_told(broker: Broker) -> None:
    waiting = broker.enqueue("q", b"x")
    leased = _lease_new(broker, "other")
    assert [broker.queue_of(job_id) for job_id in (waiting, leased.id, leased.id + 1)] == ["q", "other", None]
    leased.ack()
    assert broker.queue_of(leased.id) is None
