"""What goes in: payloads, headers, options, batches."""

# A block around a transaction or a lease that is to fail is more than one statement.

from __future__ import annotations

import mmap
from array import array
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from math import inf, nan
from typing import Any

import pytest

from rivetq import Broker, DuplicateJobError, RetryPolicy, UsageError

from .shared import (
    _BAD_DURATIONS,
    _BAD_INTS,
    _BAD_KEYS,
    _BAD_MOMENTS,
    _BAD_NAMES,
    _BAD_NUMBERS,
    _assert_about,
    _assert_due_in,
    _await_state,
    _drain,
    _each,
    _every_way_in,
    _job,
    _lease,
    _options,
    _pass_time,
    _refuses,
)


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


def test_headers_are_utf_8(broker: Broker) -> None:
    for headers in ({"a": "\ud800"}, {"\ud800": "a"}):
        with _refuses(broker, UsageError):
            broker.enqueue("q", b"", headers=headers)


def test_a_view_that_was_released_is_no_payload(broker: Broker) -> None:
    view = memoryview(b"x")
    view.release()
    with _refuses(broker, UsageError):
        broker.enqueue("q", view)
