"""Configurations, pause and resume, removal."""

# A block around a transaction or a lease that is to fail is more than one statement.

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from rivetq import Broker, RateLimit, RetryPolicy, UsageError

from .shared import (
    _AT_ONCE,
    _BAD_DURATIONS,
    _BAD_INTS,
    _BAD_NAMES,
    _BAD_NUMBERS,
    _CONFIG_FIELDS,
    _COUNTERS,
    _bury,
    _each,
    _fields,
    _job,
    _lease,
    _lease_new,
    _options,
    _refuses,
)


def test_a_queue_exists_from_its_first_enqueue_configure_queue_or_pause(broker: Broker) -> None:
    broker.enqueue("a", b"")
    broker.configure_queue("b", max_jobs=5)
    broker.pause("c")
    with broker.transaction() as tx:
        tx.enqueue("d", b"")
    assert sorted(broker.queues()) == ["a", "b", "c", "d"]


def test_an_unknown_queue_gives_zeros_empty_lists_and_none_and_stays_unknown(broker: Broker) -> None:
    assert broker.lease("unknown") is None
    assert broker.lease_many(["unknown", "other"], 5) == []
    assert broker.jobs("unknown") == broker.dead_letters("unknown") == []
    assert broker.find("unknown", "k") is None
    assert broker.purge("unknown") == 0
    stats = broker.stats("unknown")
    assert [getattr(stats, name) for name in _COUNTERS] == [0] * len(_COUNTERS)
    assert stats.oldest_age is None
    assert broker.queues() == []


def test_configure_queue_returns_what_is_in_force(broker: Broker) -> None:
    policy, limit = RetryPolicy(max_attempts=3), RateLimit(per_second=5, burst=10, on="enqueue")
    set_now = broker.configure_queue(
        "q", retry=policy, rate_limit=limit, visibility_timeout=60, max_jobs=7, idempotency_ttl=120
    )
    for config in (set_now, broker.configure_queue("q")):
        assert (config.retry, config.rate_limit) == (policy, limit)
        assert (config.visibility_timeout, config.max_jobs, config.idempotency_ttl) == (60, 7, 120)


@pytest.mark.parametrize(
    "change",
    [
        {"retry": RetryPolicy(max_attempts=9)},
        {"rate_limit": RateLimit(per_second=1, burst=1, on="lease")},
        {"visibility_timeout": 90},
        {"max_jobs": 11},
        {"idempotency_ttl": 0},
    ],
    ids=_CONFIG_FIELDS,
)
def test_what_is_not_given_to_configure_queue_stays(broker: Broker, change: dict[str, Any]) -> None:
    full: dict[str, Any] = {
        "retry": RetryPolicy(max_attempts=3),
        "rate_limit": RateLimit(per_second=5, burst=10, on="enqueue"),
        "visibility_timeout": 60,
        "max_jobs": 7,
        "idempotency_ttl": 120,
    }
    broker.configure_queue("q", **full)
    expected = list({**full, **change}.values())
    assert _fields(broker.configure_queue("q", **change), _CONFIG_FIELDS) == expected
    assert _fields(broker.configure_queue("q"), _CONFIG_FIELDS) == expected


def test_the_defaults_of_a_queue(broker: Broker) -> None:
    broker.enqueue("q", b"")
    config = broker.configure_queue("q")
    assert (config.visibility_timeout, config.max_jobs, config.idempotency_ttl) == (30, None, 86400)


@pytest.mark.parametrize(
    "options",
    _options(
        {
            "retry": [3, "full", {"base": 1}],
            "rate_limit": [3, "lease", {"burst": 1}],
            "visibility_timeout": _BAD_DURATIONS,
            "max_jobs": _BAD_INTS,
            "idempotency_ttl": _BAD_DURATIONS,
        }
    ),
)
def test_a_bad_option_of_a_queue_is_refused(broker: Broker, options: dict[str, Any]) -> None:
    broker.configure_queue("q", max_jobs=5)
    for queue in ("q", "new"):
        with _refuses(broker, UsageError):
            broker.configure_queue(queue, **options)


@pytest.mark.parametrize(
    "options", _options({"per_second": _BAD_NUMBERS, "burst": _BAD_INTS, "on": ["ack", "Lease", True, None]})
)
def test_a_rate_limit_with_a_bad_value_is_refused(broker: Broker, options: dict[str, Any]) -> None:
    good: dict[str, Any] = {"per_second": 5, "burst": 10, "on": "lease"}
    with _refuses(broker, UsageError):
        broker.configure_queue("q", rate_limit=RateLimit(**{**good, **options}))


_BY_QUEUE: dict[str, Callable[[Broker, Any], object]] = {
    "configure_queue": lambda broker, queue: broker.configure_queue(queue, max_jobs=5),
    "pause": lambda broker, queue: broker.pause(queue),
    "resume": lambda broker, queue: broker.resume(queue),
    "is_paused": lambda broker, queue: broker.is_paused(queue),
    "purge": lambda broker, queue: broker.purge(queue),
    "find": lambda broker, queue: broker.find(queue, "k"),
    "jobs": lambda broker, queue: broker.jobs(queue),
    "dead_letters": lambda broker, queue: broker.dead_letters(queue),
    "redrive": lambda broker, queue: broker.redrive(queue),
    "stats": lambda broker, queue: broker.stats("" if queue is None else queue),  # None means all queues
}


@pytest.mark.parametrize("queue", _each(*_BAD_NAMES))
@pytest.mark.parametrize("verb", list(_BY_QUEUE.values()), ids=list(_BY_QUEUE))
def test_every_verb_of_a_queue_refuses_a_bad_name(
    broker: Broker, verb: Callable[[Broker, Any], object], queue: object
) -> None:
    _bury(broker)
    with _refuses(broker, UsageError):
        verb(broker, queue)


def test_a_batch_of_leases_has_a_limit_of_bytes(broker: Broker) -> None:
    ids = [broker.enqueue("q", b"x" * size) for size in (10, 20, 30, 40, 1)]
    other = broker.enqueue("r", b"x")
    for max_bytes in (0, -1, True, 1.5):
        with pytest.raises(UsageError, match="max_bytes"):
            broker.lease_many("q", 9, max_bytes=max_bytes)  # type: ignore[arg-type]  # wrong, as a caller may be
    leases = broker.lease_many(["q", "r"], 9, max_bytes=59)  # the next one would be too large, and none is left out
    assert [lease.id for lease in leases] == ids[:2]
    [large] = broker.lease_many(["q", "r"], 9, max_bytes=1)  # one is leased in any case
    assert large.id == ids[2]
    leases[0].release()
    large.release()
    assert [lease.id for lease in broker.lease_many(["q", "r"], 9, max_bytes=81)] == [ids[0], ids[2], ids[3], ids[4]]
    assert [lease.id for lease in broker.lease_many(["q", "r"], 9, max_bytes=1)] == [other]
    urgent = broker.enqueue("q", b"x" * 5, priority=9)
    less = broker.enqueue("q", b"x" * 5, priority=0)
    assert [lease.id for lease in broker.lease_many("q", 9, max_bytes=9)] == [urgent]
    assert [lease.id for lease in broker.lease_many("q", 9, max_bytes=9)] == [less]


def test_a_paused_queue_takes_jobs_and_gives_none(broker: Broker) -> None:
    assert not broker.is_paused("q")
    broker.pause("q")
    assert broker.is_paused("q")
    job_id = broker.enqueue("q", b"")
    assert broker.lease("q") is None
    assert broker.lease_many("q", 5, wait=0.05) == []
    assert _job(broker, job_id).state == "ready"
    broker.resume("q")
    assert not broker.is_paused("q")
    assert _lease(broker).id == job_id


def test_a_paused_queue_takes_answers(broker: Broker) -> None:
    acked, nacked = _lease_new(broker), _lease_new(broker, retry=_AT_ONCE)
    broker.pause("q")
    acked.ack()
    nacked.nack()
    assert _job(broker, nacked.id).state == "ready"
    assert broker.lease("q") is None


def test_a_paused_queue_is_passed_over_among_others(broker: Broker) -> None:
    broker.enqueue("paused", b"")
    job_id = broker.enqueue("other", b"")
    broker.pause("paused")
    assert [lease.id for lease in broker.lease_many(["paused", "other"], 5)] == [job_id]


def test_a_queue_in_which_nothing_is_can_be_removed(broker: Broker) -> None:
    broker.enqueue("q", b"", idempotency_key="k")
    with _refuses(broker, UsageError):
        broker.remove_queue("q")
    _lease(broker).ack()
    with _refuses(broker, UsageError):  # its key stands
        broker.remove_queue("q")
    broker.configure_queue("other", max_jobs=1)
    with _refuses(broker, UsageError):
        broker.remove_queue("other")
    broker.configure_queue("other", max_jobs=None)
    broker.pause("other")
    with _refuses(broker, UsageError):
        broker.remove_queue("other")
    broker.resume("other")
    assert broker.remove_queue("other") is True
    assert broker.remove_queue("other") is False
    assert broker.queues() == ["q"]
    broker.enqueue("other", b"again")
    assert broker.stats("other").enqueued == 1
    broker.purge("other")
    assert broker.remove_queue("other") is True
    assert broker.stats().enqueued == 1
