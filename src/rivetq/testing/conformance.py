"""The contract suite: what every engine behind a `Broker` must do, one rule a test.

A test module that defines the fixture `broker` and imports everything from here runs the whole suite against that
broker; the fixture decides whether it keeps its files in memory or on disk, and on which clock it runs:

    import pytest
    import rivetq
    from rivetq.testing import ManualClock
    from rivetq.testing.conformance import *

    @pytest.fixture
    def broker(tmp_path):
        with rivetq.Broker(tmp_path / "queue", clock=ManualClock()) as broker:
            yield broker

The broker must be new (no queues, no jobs) and must have the default `max_payload_bytes`. On a `ManualClock` no test
waits for time to pass; on any other clock a test about time takes a few tenths of a second.

The suite uses the public names only. It checks after each refused call that nothing has changed, and it asserts
lower bounds of real time and generous upper ones, so that a slow machine fails nothing.
"""

# A block around a transaction or a lease that is to fail is more than one statement.
# ruff: noqa: PT012

from __future__ import annotations

import mmap
import pickle
import time
from array import array
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta, timezone
from functools import partial
from math import inf, nan
from types import SimpleNamespace
from typing import Any, TypeVar

import attrs
import pytest

import rivetq
from rivetq import (
    Broker,
    BrokerClosedError,
    Deliveries,
    DuplicateJobError,
    Job,
    JobId,
    JobNotFoundError,
    Lease,
    LeaseLostError,
    LeaseRef,
    QueueFullError,
    RateLimit,
    RateLimitedError,
    RetryPolicy,
    RivetQError,
    UsageError,
)
from rivetq.testing import ManualClock

# -- What the tests share ----------------------------------------------------------------------------------------------

_E = TypeVar("_E", bound=RivetQError)

# Real seconds after which a wait counts as hung. A test that passes never waits for so long.
_PATIENCE = 20.0

_AT_ONCE = RetryPolicy(base=0, jitter="none")
_NOT_SOON = RetryPolicy(base=1000, jitter="none")
_COUNTERS = ("ready", "scheduled", "leased", "dead", "enqueued", "acked", "cancelled", "purged")
_JOB_FIELDS = (
    "id",
    "queue",
    "state",
    "payload",
    "headers",
    "priority",
    "attempts",
    "max_attempts",
    "enqueued_at",
    "due_at",
    "last_error",
    "died_at",
)
_LEASE_FIELDS = (
    "id",
    "queue",
    "payload",
    "headers",
    "priority",
    "attempt",
    "token",
    "deadline",
    "enqueued_at",
    "max_attempts",
    "last_error",
)
_CONFIG_FIELDS = ("retry", "rate_limit", "visibility_timeout", "max_jobs", "idempotency_ttl")

_TOO_LONG = 101 * 366 * 86400  # seconds; certainly more than 100 years
_BAD_NAMES = ["", "x" * 256, "é" * 128, "\ud800", b"q", 7, None]
_BAD_DURATIONS = [True, False, -1, -0.001, nan, inf, _TOO_LONG, timedelta(seconds=-1), timedelta(seconds=_TOO_LONG)]
_BAD_MOMENTS = [datetime(2030, 1, 1), True, nan, inf]
_BAD_NUMBERS = [True, nan, inf]
_BAD_INTS = [True, False, 2.0, nan]
_BAD_KEYS = ["", "k" * 257, "é" * 129, b"k", 7]


def _each(*values: object) -> list[Any]:
    """The values as pytest parameters, each under a short name that is the same in every process."""
    names = [type(value).__name__ if " at 0x" in repr(value) else repr(value)[:40] for value in values]
    return [pytest.param(value, id=name) for value, name in zip(values, names, strict=True)]


def _options(bad: dict[str, list[Any]]) -> list[Any]:
    """One pytest parameter, a dict of keyword arguments, for each bad value of each option."""
    return [
        pytest.param({name: value}, id=f"{name}={value!r}"[:60]) for name, values in bad.items() for value in values
    ]


def _pass_time(broker: Broker, seconds: float) -> None:
    """Let `seconds` pass on the broker's clock: moved if it can be moved, waited for if it is real."""
    if isinstance(broker.clock, ManualClock):
        broker.clock.advance(seconds)
    else:
        time.sleep(seconds + 0.02)


def _eventually(holds: Callable[[], bool]) -> None:
    """Return once `holds()`; on a real clock what is due may happen a moment later."""
    end = time.monotonic() + _PATIENCE
    while not holds():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.005)


def _facts(broker: Broker) -> dict[str, object]:
    """All that can be seen of the broker, but for `oldest_age`, which grows by itself."""
    return {
        queue: (
            [getattr(broker.stats(queue), name) for name in _COUNTERS],
            [_fields(job, _JOB_FIELDS) for job in broker.jobs(queue, limit=10_000)],
            _fields(broker.configure_queue(queue), _CONFIG_FIELDS),
        )
        for queue in sorted(broker.queues())
    }


def _fields(value: object, names: Iterable[str]) -> list[object]:
    """Its attributes; mappings as dicts, so that any read-only mapping compares."""
    found = [getattr(value, name) for name in names]
    return [dict(each) if hasattr(each, "keys") else each for each in found]


@contextmanager
def _refuses(broker: Broker, error: type[_E]) -> Iterator[pytest.ExceptionInfo[_E]]:
    """The block raises `error`, which says that nothing was done, and nothing was."""
    before = _facts(broker)
    with pytest.raises(error) as caught:
        yield caught
    assert caught.value.outcome == "not_done"
    assert _facts(broker) == before


def _lease(broker: Broker, queue: str = "q", visibility_timeout: float | None = None) -> Lease:
    """A lease on a job that is there, or falls due now."""
    lease = broker.lease(queue, visibility_timeout=visibility_timeout, wait=_PATIENCE)
    assert lease is not None
    return lease


def _lease_new(broker: Broker, queue: str = "q", **options: Any) -> Lease:
    """A lease on a new job, the only one of its queue that can be leased."""
    broker.enqueue(queue, b"x", **options)
    return _lease(broker, queue)


def _job(broker: Broker, job_id: int) -> Job:
    job = broker.get(job_id)
    assert job is not None
    return job


def _bury(broker: Broker, queue: str = "q", *, key: str | None = None) -> int:
    """The id of a new dead letter."""
    lease = _lease_new(broker, queue, priority=9, idempotency_key=key)
    broker.reject(lease, error="buried")
    return lease.id


def _await_state(broker: Broker, job_id: int, state: str) -> Job:
    _eventually(lambda: _job(broker, job_id).state == state)
    return _job(broker, job_id)


def _drain(broker: Broker, queue: str = "q") -> list[int]:
    """The ids of all ready jobs in the order in which they are given out."""
    return [lease.id for lease in broker.lease_many(queue, 1000)]


def _assert_about(broker: Broker, seconds: float, expected: float, most: float | None = None) -> None:
    """From `expected` to `most`: on a ManualClock to rounding; on a real one the calls may have taken their time."""
    slack = 0.002 if isinstance(broker.clock, ManualClock) else 10
    assert expected - 0.002 <= seconds <= (expected if most is None else most) + slack


def _assert_due_in(broker: Broker, job_id: int, expected: float) -> None:
    """The job is scheduled, `expected` seconds after its enqueue (no time was let pass since)."""
    job = _job(broker, job_id)
    assert job.state == "scheduled"
    assert job.due_at is not None
    _assert_about(broker, (job.due_at - job.enqueued_at).total_seconds(), expected)


def _elsewhere(call: Callable[[], object]) -> None:
    """Run it to its end in another thread."""
    with ThreadPoolExecutor(1) as pool:
        pool.submit(call).result(_PATIENCE)


@contextmanager
def _waiting(broker: Broker, queue: str | list[str] = "q") -> Iterator[Future[Lease | None]]:
    """Another thread waits for a lease, and the block makes one possible; it must be woken, not time out."""
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(broker.lease, queue, wait=2 * _PATIENCE)
        time.sleep(0.05)  # so that it waits by now; if it does not, the outcome is the same
        yield future


def _woken(future: Future[Lease | None]) -> Lease:
    lease = future.result(_PATIENCE)
    assert lease is not None
    return lease


def _put_one(broker: Broker, **options: Any) -> object:
    return broker.enqueue("q", b"x", **options)


def _put_many(broker: Broker, **options: Any) -> object:
    return broker.enqueue_many("q", [b"x", b"y"], **options)


def _put_one_in_a_transaction(broker: Broker, **options: Any) -> object:
    with broker.transaction() as tx:
        return tx.enqueue("q", b"x", **options)


def _put_many_in_a_transaction(broker: Broker, **options: Any) -> object:
    with broker.transaction() as tx:
        return tx.enqueue_many("q", [b"x", b"y"], **options)


_every_way_in = pytest.mark.parametrize(
    "put",
    [_put_one, _put_many, _put_one_in_a_transaction, _put_many_in_a_transaction],
    ids=["enqueue", "enqueue_many", "tx.enqueue", "tx.enqueue_many"],
)


# -- Putting work in ---------------------------------------------------------------------------------------------------


def test_an_enqueued_job_can_be_seen_and_leased(broker: Broker) -> None:
    job_id = broker.enqueue("q", b"work")
    job = _job(broker, job_id)
    assert (job.id, job.queue, job.state, job.payload, job.attempts) == (job_id, "q", "ready", b"work", 0)
    lease = _lease(broker)
    assert (lease.id, lease.queue, lease.payload, lease.attempt) == (job_id, "q", b"work", 1)


def test_ids_are_positive_ints_that_increase_over_all_queues_and_are_never_used_again(broker: Broker) -> None:
    ids = [broker.enqueue("a", b""), broker.enqueue("b", b""), *broker.enqueue_many("a", [b"", b""])]
    broker.cancel(ids[-1])
    ids.append(broker.enqueue("b", b"", priority=9))
    assert ids[0] > 0
    assert all(type(each) is int for each in ids)
    assert ids == sorted(set(ids))


@pytest.mark.parametrize("payload", _each(b"", b"\x00\xff raw", bytearray(b"mutable"), memoryview(b"a view")))
def test_a_bytes_like_payload_goes_in_as_it_is(broker: Broker, payload: bytes) -> None:
    job_id = broker.enqueue("q", payload)
    assert _job(broker, job_id).payload == bytes(payload)
    assert _lease(broker).payload == bytes(payload)


@pytest.mark.parametrize("payload", _each(None, True, 0, -1.5, "", "Grüße 日本", [], [1, [2, "x"]], {"a": {"b": None}}))
def test_any_other_payload_is_encoded_as_json(broker: Broker, payload: object) -> None:
    job_id = broker.enqueue("q", payload)
    assert _job(broker, job_id).json() == payload
    assert _lease(broker).json() == payload


def test_a_payload_changed_after_the_enqueue_changes_nothing(broker: Broker) -> None:
    raw, listed = bytearray(b"before"), ["before"]
    broker.enqueue("raw", raw)
    broker.enqueue("listed", listed)
    raw[:] = b"behind"
    listed[0] = "behind"
    assert _lease(broker, "raw").payload == b"before"
    assert _lease(broker, "listed").json() == ["before"]


_CIRCLE: list[object] = []
_CIRCLE.append(_CIRCLE)


@pytest.mark.parametrize("payload", _each({1}, object(), nan, inf, [nan], {1: "a"}, {"a": {2: 3}}, [b"x"], _CIRCLE))
def test_a_payload_that_json_cannot_say_is_refused(broker: Broker, payload: object) -> None:
    with _refuses(broker, UsageError):
        broker.enqueue("q", payload)
    with _refuses(broker, UsageError):
        broker.enqueue_many("q", [b"fine", payload])
    with _refuses(broker, UsageError), broker.transaction() as tx:
        tx.enqueue("q", payload)


def test_a_payload_is_measured_as_it_is_stored(broker: Broker) -> None:
    limit = 16 * 2**20
    for too_large in (b"x" * (limit + 1), "x" * (limit - 1)):  # the quotes of JSON count
        with _refuses(broker, UsageError):
            broker.enqueue("q", too_large)
        with _refuses(broker, UsageError):
            broker.enqueue_many("q", [b"small", too_large])
    broker.enqueue("q", b"x" * limit)


@pytest.mark.parametrize("headers", [None, {}, {"trace": "abc", "Ünï": "日本", "empty": ""}])
def test_headers_come_back_as_they_were_without_any_empty(broker: Broker, headers: dict[str, str] | None) -> None:
    job_id = broker.enqueue("q", b"", headers=headers)
    assert dict(_job(broker, job_id).headers) == (headers or {})
    assert dict(_lease(broker).headers) == (headers or {})


def test_headers_are_copied_and_read_only_afterwards(broker: Broker) -> None:
    given = {"a": "1"}
    job_id = broker.enqueue("q", b"", headers=given)
    given["b"] = "2"
    for headers in (_job(broker, job_id).headers, _lease(broker).headers):
        writable: Any = headers
        with pytest.raises(TypeError):
            writable["a"] = "2"
    assert dict(_job(broker, job_id).headers) == {"a": "1"}


def test_the_highest_priority_is_given_out_first_and_5_is_the_usual_one(broker: Broker) -> None:
    ids = {priority: broker.enqueue("q", b"", priority=priority) for priority in (3, 9, 0, 7, 1, 8, 2, 6, 4)}
    ids[5] = broker.enqueue("q", b"")
    assert _drain(broker) == [ids[priority] for priority in range(9, -1, -1)]


def test_within_a_priority_the_first_in_is_the_first_out(broker: Broker) -> None:
    ids = [broker.enqueue("q", b"") for _ in range(20)]
    assert [_lease(broker).id for _ in ids] == ids


def test_a_delayed_job_is_scheduled_and_never_leased_early(broker: Broker) -> None:
    job_id = broker.enqueue("q", b"", delay=100)
    _assert_due_in(broker, job_id, 100)
    assert broker.lease("q") is None


@pytest.mark.parametrize("option", ["delay", "eta"])
def test_a_delayed_job_is_leased_once_it_is_due(broker: Broker, option: str) -> None:
    now = _job(broker, broker.enqueue("probe", b"")).enqueued_at
    later = timedelta(seconds=0.2)
    options: dict[str, Any] = {option: later if option == "delay" else now + later}
    job_id = broker.enqueue("q", b"", **options)
    _pass_time(broker, 0.2)
    lease = _lease(broker)
    assert (lease.id, lease.attempt) == (job_id, 1)


def test_a_delayed_job_takes_its_place_by_id_when_it_is_due(broker: Broker) -> None:
    delayed, later = broker.enqueue("q", b"", delay=0.1), broker.enqueue("q", b"")
    _pass_time(broker, 0.1)
    _await_state(broker, delayed, "ready")
    assert _drain(broker) == [delayed, later]


def test_an_eta_is_an_aware_moment_or_epoch_seconds(broker: Broker) -> None:
    now = _job(broker, broker.enqueue("probe", b"")).enqueued_at
    due = now + timedelta(seconds=100)
    elsewhere = timezone(timedelta(hours=-7))
    for eta in (due, due.astimezone(elsewhere), due.timestamp(), int(due.timestamp()) + 1):
        job = _job(broker, broker.enqueue("q", b"", eta=eta))
        assert job.state == "scheduled"
        assert job.due_at is not None
        assert abs((job.due_at - due).total_seconds()) <= 1


@pytest.mark.parametrize("seconds", [0, 1, 86400 * 365])
def test_an_eta_that_has_passed_means_now(broker: Broker, seconds: int) -> None:
    now = _job(broker, broker.enqueue("probe", b"")).enqueued_at
    job_id = broker.enqueue("q", b"", eta=now - timedelta(seconds=seconds))
    assert _lease(broker).id == job_id


@pytest.mark.parametrize(
    "queue", _each("x" * 255, "é" * 127, " ", "a/b", "..", "\x00", "日本", "-", ":memory:", "None")
)
def test_a_queue_may_have_any_characters_in_its_name(broker: Broker, queue: str) -> None:
    job_id = broker.enqueue(queue, b"")
    assert broker.queues() == [queue]
    lease = _lease(broker, queue)
    assert (lease.id, lease.queue) == (job_id, queue)


def test_queue_names_are_not_normalized(broker: Broker) -> None:
    names = ["q", "Q", " q", "\u00e9", "e\u0301"]
    ids = [broker.enqueue(name, b"") for name in names]
    assert set(broker.queues()) == set(names)
    assert [_drain(broker, name) for name in names] == [[each] for each in ids]


@pytest.mark.parametrize("queue", _each(*_BAD_NAMES))
def test_a_queue_name_is_1_to_255_bytes_of_utf8(broker: Broker, queue: Any) -> None:
    with _refuses(broker, UsageError):
        broker.enqueue(queue, b"")
    with _refuses(broker, UsageError):
        broker.enqueue_many(queue, [b""])
    with _refuses(broker, UsageError), broker.transaction() as tx:
        tx.enqueue(queue, b"")


@_every_way_in
def test_every_way_in_takes_the_same_options(broker: Broker, put: Callable[..., object]) -> None:
    policy = RetryPolicy(base=100, jitter="none")
    put(broker, priority=7, headers={"h": "1"}, max_attempts=3, visibility_timeout=200, retry=policy)
    leases = broker.lease_many("q", 9)
    assert leases
    for lease in leases:
        assert (lease.priority, dict(lease.headers), lease.max_attempts) == (7, {"h": "1"}, 3)
        _assert_about(broker, (lease.deadline - lease.enqueued_at).total_seconds(), 200)
        lease.nack()
        _assert_due_in(broker, lease.id, 100)


@_every_way_in
@pytest.mark.parametrize("option", ["delay", "eta"])
def test_every_way_in_may_put_its_jobs_off(broker: Broker, put: Callable[..., object], option: str) -> None:
    now = _job(broker, broker.enqueue("probe", b"")).enqueued_at
    put(broker, **{option: 100 if option == "delay" else now + timedelta(seconds=100)})
    jobs = broker.jobs("q", state="scheduled")
    assert jobs
    for job in jobs:
        assert job.due_at is not None
        _assert_about(broker, (job.due_at - now).total_seconds(), 100)


@_every_way_in
@pytest.mark.parametrize(
    "options",
    [
        *_options(
            {
                "priority": [*_BAD_INTS, -1, 10],
                "delay": _BAD_DURATIONS,
                "eta": _BAD_MOMENTS,
                "headers": [{"a": 1}, {1: "a"}, {"a": None}, {b"a": "b"}, ["a"], "ab"],
                "max_attempts": _BAD_INTS,
                "retry": [3, "full", {"base": 1}],
                "visibility_timeout": _BAD_DURATIONS,
                "on_duplicate": ["ignore", "RETURN", True, None],
            }
        ),
        pytest.param({"delay": 1, "eta": datetime(2030, 1, 1, tzinfo=UTC)}, id="delay and eta"),
    ],
)
def test_an_enqueue_with_a_bad_option_is_refused(
    broker: Broker, put: Callable[..., object], options: dict[str, Any]
) -> None:
    with _refuses(broker, UsageError):
        put(broker, **options)


@pytest.mark.parametrize(
    "options",
    _options(
        {
            "max_attempts": _BAD_INTS,
            "base": _BAD_DURATIONS,
            "factor": _BAD_NUMBERS,
            "max_delay": _BAD_DURATIONS,
            "jitter": ["some", True, None],
        }
    ),
)
def test_a_retry_policy_with_a_bad_value_is_refused(broker: Broker, options: dict[str, Any]) -> None:
    with _refuses(broker, UsageError):
        broker.enqueue("q", b"", retry=RetryPolicy(**options))
    with _refuses(broker, UsageError):
        broker.configure_queue("q", retry=RetryPolicy(**options))


# -- Putting many in ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sequence", [list, tuple])
def test_a_batch_gives_one_id_a_payload_in_their_order(
    broker: Broker, sequence: Callable[[list[object]], list[object]]
) -> None:
    ids = list(broker.enqueue_many("q", sequence([b"a", {"b": 1}, b"c"])))
    assert len(ids) == 3
    assert ids == sorted(set(ids))
    leases = broker.lease_many("q", 3)
    assert [lease.id for lease in leases] == ids
    assert leases[0].payload == b"a"
    assert leases[1].json() == {"b": 1}
    assert leases[2].payload == b"c"


def test_a_batch_takes_one_key_or_none_a_payload(broker: Broker) -> None:
    ids = broker.enqueue_many("q", [b"a", b"b", b"c"], idempotency_keys=["ka", None, "kc"])
    assert [broker.find("q", key) for key in ("ka", "kc")] == [ids[0], ids[2]]


def test_a_key_that_stands_for_a_job_gives_its_id_in_its_place_of_the_batch(broker: Broker) -> None:
    first = broker.enqueue("q", b"first", idempotency_key="k")
    ids = broker.enqueue_many("q", [b"a", b"again", b"b"], idempotency_keys=[None, "k", None])
    assert ids[1] == first
    assert _drain(broker) == [first, ids[0], ids[2]]


def test_a_key_twice_in_one_batch_creates_one_job(broker: Broker) -> None:
    ids = broker.enqueue_many("q", [b"a", b"b", b"a again"], idempotency_keys=["k", None, "k"])
    assert ids[0] == ids[2] != ids[1]
    assert [lease.payload for lease in broker.lease_many("q", 9)] == [b"a", b"b"]


def test_a_batch_with_a_duplicate_that_raises_puts_nothing_in(broker: Broker) -> None:
    first = broker.enqueue("q", b"first", idempotency_key="k")
    with _refuses(broker, DuplicateJobError) as caught:
        broker.enqueue_many("q", [b"a", b"b"], idempotency_keys=["new", "k"], on_duplicate="raise")
    assert (caught.value.job_id, caught.value.queue, caught.value.key) == (first, "q", "k")
    assert broker.find("q", "new") is None


@pytest.mark.parametrize("keys", _each([], ["a"], ["a", "b", "c"], *(["a", bad] for bad in _BAD_KEYS)))
def test_bad_keys_of_a_batch_are_refused(broker: Broker, keys: Any) -> None:
    with _refuses(broker, UsageError):
        broker.enqueue_many("q", [b"a", b"b"], idempotency_keys=keys)
    assert broker.queues() == []


# -- Taking work out ---------------------------------------------------------------------------------------------------


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


# -- Waiting for work --------------------------------------------------------------------------------------------------


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


# -- Waiting without a thread ------------------------------------------------------------------------------------------


class _Told:
    """What `lease_soon` told, and how often."""

    def __init__(self) -> None:
        self.answers: list[tuple[list[Lease] | None, BaseException | None]] = []

    def __call__(self, leases: list[Lease] | None, error: BaseException | None) -> None:
        self.answers.append((leases, error))

    def leases(self) -> list[Lease]:
        _eventually(lambda: bool(self.answers))
        ((leases, error),) = self.answers
        assert error is None
        assert leases is not None
        return leases

    def ids(self) -> list[int]:
        return [lease.id for lease in self.leases()]


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


# -- Answers -----------------------------------------------------------------------------------------------------------


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


_Answer = Callable[[Broker, Any], object]


def _tx_answer(verb: str) -> _Answer:
    def answer(broker: Broker, lease: Any) -> None:
        with broker.transaction() as tx:
            tx.enqueue("q", b"never there when the answer is refused")
            getattr(tx, verb)([lease] if verb == "ack_many" else lease)

    return answer


_ANSWERS: dict[str, _Answer] = {
    "ack": lambda broker, lease: broker.ack(lease),
    "ack_many": lambda broker, lease: broker.ack_many([lease]),
    "nack": lambda broker, lease: broker.nack(lease),
    "release": lambda broker, lease: broker.release(lease),
    "reject": lambda broker, lease: broker.reject(lease),
    "extend": lambda broker, lease: broker.extend(lease, 100),
    **{f"tx.{verb}": _tx_answer(verb) for verb in ("ack", "ack_many", "nack", "release", "reject")},
}
_every_answer = pytest.mark.parametrize("answer", list(_ANSWERS.values()), ids=list(_ANSWERS))


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


# -- Fencing and expiry ------------------------------------------------------------------------------------------------


def _acked(broker: Broker) -> Lease | LeaseRef:
    lease = _lease_new(broker)
    lease.ack()
    return lease


def _nacked(broker: Broker) -> Lease | LeaseRef:
    lease = _lease_new(broker)
    lease.nack(delay=0)
    return lease


def _released(broker: Broker) -> Lease | LeaseRef:
    lease = _lease_new(broker)
    lease.release()
    return lease


def _rejected(broker: Broker) -> Lease | LeaseRef:
    lease = _lease_new(broker)
    lease.reject()
    return lease


def _expired(broker: Broker) -> Lease | LeaseRef:
    lease = _lease_new(broker, visibility_timeout=0.1, retry=_AT_ONCE)
    _pass_time(broker, 0.1)
    _await_state(broker, lease.id, "ready")
    return lease


def _delivered_again(broker: Broker) -> Lease | LeaseRef:
    lease = _nacked(broker)
    assert _lease(broker).id == lease.id
    return lease


def _of_another_job(broker: Broker) -> Lease | LeaseRef:
    lease = _lease_new(broker)
    return LeaseRef(broker.enqueue("q", b"never leased"), lease.token)


def _of_no_job(broker: Broker) -> Lease | LeaseRef:
    lease = _lease_new(broker)
    return LeaseRef(lease.id + 1000, lease.token)


_LOST = [_acked, _nacked, _released, _rejected, _expired, _delivered_again, _of_another_job, _of_no_job]
_every_lost = pytest.mark.parametrize("lose", _LOST, ids=[lose.__name__ for lose in _LOST])


@_every_answer
@_every_lost
def test_an_answer_that_is_not_to_the_current_delivery_changes_nothing(
    broker: Broker, answer: _Answer, lose: Callable[[Broker], Lease | LeaseRef]
) -> None:
    lost = lose(broker)
    with _refuses(broker, LeaseLostError) as caught:
        answer(broker, lost)
    assert (caught.value.job_id, caught.value.token) == (lost.id, lost.token)


@pytest.mark.parametrize("verb", ["ack", "nack", "release", "reject", "extend"])
def test_the_methods_of_a_lost_lease_change_nothing(broker: Broker, verb: str) -> None:
    lease = _lease_new(broker)
    lease.nack(delay=0)
    current = _lease(broker)
    with _refuses(broker, LeaseLostError):
        getattr(lease, verb)(*([100] if verb == "extend" else []))
    current.ack()


def test_a_lease_is_lost_from_its_deadline_on_noticed_or_not(broker: Broker) -> None:
    leases = [_lease_new(broker, visibility_timeout=0.1) for _ in range(3)]
    _pass_time(broker, 0.1)
    for answer in (leases[0].ack, lambda: leases[1].extend(100), lambda: broker.ack_many(leases[2:])):
        with pytest.raises(LeaseLostError):
            answer()
    assert broker.stats("q").acked == 0


def test_an_expired_lease_ends_as_a_nack(broker: Broker) -> None:
    lease = _lease_new(broker, visibility_timeout=0.1, retry=_AT_ONCE)
    _pass_time(broker, 0.1)
    job = _await_state(broker, lease.id, "ready")
    assert (job.attempts, job.last_error) == (1, "lease expired")
    again = _lease(broker)
    assert (again.attempt, again.last_error) == (2, "lease expired")


def test_the_retry_delay_of_an_expired_lease_counts_from_its_deadline(broker: Broker) -> None:
    lease = _lease_new(broker, visibility_timeout=0.1, retry=RetryPolicy(base=100, jitter="none"))
    _pass_time(broker, 0.2)
    job = _await_state(broker, lease.id, "scheduled")
    assert job.due_at is not None
    assert abs((job.due_at - lease.deadline).total_seconds() - 100) < 0.01


def test_a_job_that_always_expires_reaches_the_dead_letters_after_max_attempts(broker: Broker) -> None:
    job_id = broker.enqueue("q", b"poison", visibility_timeout=0.05, max_attempts=3, retry=_AT_ONCE)
    for attempt in (1, 2, 3):
        assert _lease(broker).attempt == attempt
        _pass_time(broker, 0.05)
    job = _await_state(broker, job_id, "dead")
    assert (job.attempts, job.last_error) == (3, "lease expired")
    assert [dead.id for dead in broker.dead_letters("q")] == [job_id]


# -- Retries -----------------------------------------------------------------------------------------------------------


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


# -- with lease --------------------------------------------------------------------------------------------------------


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


# -- Values ------------------------------------------------------------------------------------------------------------


def test_leases_and_jobs_are_frozen(broker: Broker) -> None:
    lease = _lease_new(broker)
    for value, fields in ((lease, _LEASE_FIELDS), (_job(broker, lease.id), _JOB_FIELDS)):
        before = _fields(value, fields)
        for field in fields:
            with pytest.raises(AttributeError):
                setattr(value, field, None)
        assert _fields(value, fields) == before


def test_a_pickled_lease_says_the_same_and_can_be_answered(broker: Broker) -> None:
    lease = _lease_new(broker, headers={"h": "1"})
    copy = pickle.loads(pickle.dumps(lease))
    assert _fields(copy, _LEASE_FIELDS) == _fields(lease, _LEASE_FIELDS)
    broker.ack(copy)
    assert broker.get(lease.id) is None


def test_a_pickled_job_says_the_same(broker: Broker) -> None:
    job = _job(broker, broker.enqueue("q", {"a": 1}, headers={"h": "1"}, delay=100))
    copy = pickle.loads(pickle.dumps(job))
    assert _fields(copy, _JOB_FIELDS) == _fields(job, _JOB_FIELDS)
    assert copy.json() == {"a": 1}


def test_a_state_is_a_str(broker: Broker) -> None:
    job = _job(broker, broker.enqueue("q", b""))
    assert isinstance(job.state, str)
    assert str(job.state) == f"{job.state}" == "ready"
    assert [each.id for each in broker.jobs("q", state=job.state)] == [job.id]


# -- Transactions ------------------------------------------------------------------------------------------------------


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


# -- Queues: configure, pause, resume ----------------------------------------------------------------------------------


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


# -- Queues: looking, purge, cancel, redrive, stats --------------------------------------------------------------------


def _one_of_each_state(broker: Broker) -> dict[str, int]:
    """The ids of four jobs of "q" by their states."""
    dead = _bury(broker)
    leased = _lease_new(broker).id
    return {
        "dead": dead,
        "leased": leased,
        "ready": broker.enqueue("q", b""),
        "scheduled": broker.enqueue("q", b"", delay=1000),
    }


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


# -- Idempotency -------------------------------------------------------------------------------------------------------

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


# -- Limits ------------------------------------------------------------------------------------------------------------


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


# -- Errors and closing ------------------------------------------------------------------------------------------------


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


# -- A second look -----------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("buffer", [array("I", [1]), mmap.mmap(-1, 1)], ids=["array", "mmap"])
def test_a_buffer_that_is_no_bytes_is_no_payload(broker: Broker, buffer: Any) -> None:
    """Its bytes alone do not say what they were."""
    with _refuses(broker, UsageError):
        broker.enqueue("q", buffer)


def test_headers_have_a_limit_in_all(broker: Broker) -> None:
    broker.enqueue("q", b"", headers={"h": "x" * (64 * 1024 - 1)})
    broker.enqueue("q", b"", headers={str(n): "ü" * 1000 for n in range(10, 42)})
    for headers in ({"h": "x" * 64 * 1024}, {str(n): "ü" * 1000 for n in range(10, 43)}, {"x" * 64 * 1024: "y"}):
        with _refuses(broker, UsageError):
            broker.enqueue("q", b"", headers=headers)


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


def test_of_two_extends_in_one_call_the_longer_holds(broker: Broker) -> None:
    broker.enqueue("q", b"")
    lease = _lease(broker, visibility_timeout=10)
    first, second = broker.extend_many([lease, lease], 100)
    assert first == second > lease.deadline


def test_batches_of_one_transaction_that_exceed_the_burst_never_pass(broker: Broker) -> None:
    broker.configure_queue("q", rate_limit=RateLimit(1, 2, on="enqueue"))
    with _refuses(broker, UsageError), broker.transaction() as tx:
        for _ in range(3):
            tx.enqueue("q", b"")


def test_a_closed_broker_is_not_entered(broker: Broker) -> None:
    broker.close()
    with pytest.raises(BrokerClosedError), broker:
        pass


def test_an_unknown_keyword_is_a_type_error(broker: Broker) -> None:
    options: Any = {"prioritty": 1}
    for verb in ("enqueue", "enqueue_many", "lease", "configure_queue", "redrive"):
        with pytest.raises(TypeError, match="prioritty"):
            getattr(broker, verb)("q", **options)


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


def test_an_exception_without_a_text_goes_through_a_lease_and_nacks(broker: Broker) -> None:
    class SilentError(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no text")

    lease = _lease_new(broker)
    with pytest.raises(SilentError), lease:
        raise SilentError
    assert "SilentError" in str(_job(broker, lease.id).last_error)


def test_headers_are_utf_8(broker: Broker) -> None:
    for headers in ({"a": "\ud800"}, {"\ud800": "a"}):
        with _refuses(broker, UsageError):
            broker.enqueue("q", b"", headers=headers)


def test_a_view_that_was_released_is_no_payload(broker: Broker) -> None:
    view = memoryview(b"x")
    view.release()
    with _refuses(broker, UsageError):
        broker.enqueue("q", view)


__all__ = [name for name in dir() if name.startswith("test_")]
