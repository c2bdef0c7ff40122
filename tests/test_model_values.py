"""The values that users hold: what is taken and what is refused, and that they are frozen, comparable and picklable."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone, tzinfo
from enum import IntEnum
from typing import Any

import attrs
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from rivetq.errors import LeaseLostError, RivetQError, UsageError
from rivetq.model import (
    NO_HEADERS,
    Job,
    JobState,
    Lease,
    LeaseLike,
    LeaseRef,
    QueueConfig,
    QueueStats,
    RateLimit,
    RetryPolicy,
    decode_json,
    read_only,
)
from rivetq.units import MAX_DURATION_MS, Duration, checked_int, duration_ms, moment, moment_ms

NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)
CENTURY_S = MAX_DURATION_MS // 1000
LAST_MS = 253_402_300_799_999
NAN, INF = float("nan"), float("inf")


class Two(IntEnum):
    TWO = 2


class Zoneless(tzinfo):
    """A time zone that does not say what it is: such a datetime is naive in effect."""

    def utcoffset(self, moment: datetime | None) -> None:
        return None


# Durations


@pytest.mark.parametrize(
    ("value", "expected_ms"),
    [
        (0, 0), (0.0, 0), (-0.0, 0), (1, 1000), (1.5, 1500), (0.001, 1), (0.1 + 0.2, 300), (Two.TWO, 2000),
        (timedelta(), 0), (timedelta(milliseconds=3), 3), (timedelta(days=1), 86_400_000),
        (CENTURY_S, MAX_DURATION_MS), (float(CENTURY_S), MAX_DURATION_MS),
        (timedelta(seconds=CENTURY_S), MAX_DURATION_MS),
    ],
)  # fmt: skip
def test_a_duration_is_seconds_or_a_timedelta(value: object, expected_ms: int) -> None:
    found = duration_ms(value, "delay")
    assert found == expected_ms
    assert type(found) is int


@pytest.mark.parametrize(("value", "expected_ms"), [(0.0001, 1), (1.0001, 1001), (timedelta(microseconds=1), 1)])
def test_a_duration_is_rounded_up_never_down(value: object, expected_ms: int) -> None:
    assert duration_ms(value, "delay") == expected_ms


@given(st.integers(0, 10**10))
def test_a_whole_number_of_milliseconds_stays_as_it_is(ms: int) -> None:
    assert duration_ms(ms / 1000, "delay") == ms == duration_ms(timedelta(milliseconds=ms), "delay")


@given(st.floats(1e-6, CENTURY_S))
def test_a_duration_is_never_shorter_than_asked_and_less_than_a_millisecond_longer(seconds: float) -> None:
    found = duration_ms(seconds, "delay")
    assert -1e-3 < found - seconds * 1000 < 1.001


@pytest.mark.parametrize(
    "value", [None, True, False, "1", b"1", [1], 1j, NOON, NAN, INF, -INF, -1, -1e-9, timedelta(microseconds=-1)]
)
def test_what_is_no_duration_is_refused_by_name(value: object) -> None:
    with pytest.raises(UsageError, match=r"^delay: ") as caught:
        duration_ms(value, "delay")
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize("value", [CENTURY_S + 1, CENTURY_S + 0.001, 10**30, 1e300, timedelta.max])
def test_more_than_100_years_are_refused(value: object) -> None:
    with pytest.raises(UsageError, match="0 seconds to 100 years expected"):
        duration_ms(value, "delay")


def test_every_span_of_100_calendar_years_is_a_duration() -> None:
    for year in range(1970, 2100):
        assert duration_ms(datetime(year + 100, 3, 1) - datetime(year, 3, 1), "delay") <= MAX_DURATION_MS


# Moments


@pytest.mark.parametrize(
    ("value", "expected_ms"),
    [
        (0, 0),
        (1.5, 1500),
        (0.1 + 0.2, 300),
        (1.0001, 1001),
        (NOON, 1_772_366_400_000),
        (NOON.astimezone(timezone(timedelta(hours=-7))), 1_772_366_400_000),
        (NOON + timedelta(microseconds=1), 1_772_366_400_001),
        (253_402_300_799, 253_402_300_799_000),
        (datetime.max.replace(tzinfo=UTC), LAST_MS + 1),
    ],
)
def test_a_moment_is_an_aware_datetime_or_epoch_seconds_and_is_rounded_up(value: object, expected_ms: int) -> None:
    found = moment_ms(value, "eta")
    assert found == expected_ms
    assert type(found) is int


@pytest.mark.parametrize("value", [NOON.replace(tzinfo=None), NOON.replace(tzinfo=Zoneless())])
def test_a_naive_datetime_is_refused(value: datetime) -> None:
    with pytest.raises(UsageError, match=r"^eta: an aware datetime expected, got the naive "):
        moment_ms(value, "eta")


@pytest.mark.parametrize(
    "value", [None, True, "now", b"", NOON.date(), timedelta(1), 1j, NAN, INF, -INF, -1, -0.5, 253_402_300_800, 10**30]
)
def test_what_is_no_moment_is_refused_by_name(value: object) -> None:
    with pytest.raises(UsageError, match=r"^eta: ") as caught:
        moment_ms(value, "eta")
    assert repr(value) in str(caught.value)


def test_a_moment_comes_back_aware_in_utc() -> None:
    assert moment(1_772_366_400_001) == NOON + timedelta(milliseconds=1)
    assert moment(0).tzinfo is UTC


def test_a_moment_behind_the_last_datetime_is_shown_as_the_last_one() -> None:
    for at_ms in (LAST_MS + 1, LAST_MS + MAX_DURATION_MS, 2**63, 10**400):
        assert moment(at_ms) == datetime.max.replace(tzinfo=UTC)


@given(st.integers(0, LAST_MS))
@example(1_772_366_400_001)
@example(15_115_744_082_457)  # in 2449, where a float of seconds no longer tells microseconds apart
def test_a_moment_that_comes_back_names_the_same_millisecond(at_ms: int) -> None:
    assert moment_ms(moment(at_ms), "eta") == at_ms


# Numbers and what errors show of them


def test_an_int_is_a_true_int_within_its_bounds() -> None:
    assert checked_int(1, "limit", 1, 3) == 1
    assert checked_int(3, "limit", 1, 3) == 3
    assert checked_int(10**20, "limit", 1) == 10**20
    assert type(checked_int(Two.TWO, "limit", 1)) is int


@pytest.mark.parametrize("value", [True, 1.0, "1", None, NAN])
def test_what_is_no_int_is_refused(value: object) -> None:
    with pytest.raises(UsageError, match=r"^limit: an int expected, got "):
        checked_int(value, "limit", 0)


def test_an_int_out_of_bounds_is_refused_with_the_bounds() -> None:
    with pytest.raises(UsageError, match=r"^limit: 1 to 3 expected, got 4$"):
        checked_int(4, "limit", 1, 3)
    with pytest.raises(UsageError, match=r"^limit: at least 1 expected, got 0$"):
        checked_int(0, "limit", 1)


def test_a_long_value_is_shown_short() -> None:
    with pytest.raises(UsageError) as caught:
        checked_int("x" * 10_000, "limit", 0)
    assert len(str(caught.value)) < 150
    assert str(caught.value).endswith("xxx...")


@pytest.mark.parametrize(
    "check",
    [lambda n: duration_ms(n, "x"), lambda n: moment_ms(n, "x"), lambda n: checked_int(n, "x", 0, 3)],
    ids=["duration", "moment", "int"],
)
def test_an_int_too_long_to_print_is_refused_like_any_other(check: Callable[[int], object]) -> None:
    with pytest.raises(UsageError, match=r"^x: "):
        check(10**5000)


# Policies, limits, configurations


def test_the_documented_defaults_are_in_force() -> None:
    assert attrs.astuple(RetryPolicy()) == (5, 1.0, 2.0, 3600.0, "full")
    assert RateLimit(1, 1).on == "lease"
    config = QueueConfig()
    assert (config.retry, config.rate_limit, config.max_jobs) == (RetryPolicy(), None, None)
    assert (config.visibility_timeout, config.idempotency_ttl, config.paused) == (30.0, 86_400.0, False)


def test_durations_of_a_policy_are_kept_as_seconds() -> None:
    policy = RetryPolicy(base=timedelta(milliseconds=250), max_delay=timedelta(minutes=1), factor=3)
    assert (policy.base, policy.max_delay, policy.factor) == (0.25, 60.0, 3.0)
    assert {type(x) for x in (policy.base, policy.max_delay, policy.factor)} == {float}


@pytest.mark.parametrize(
    "options",
    [
        {"max_attempts": 0}, {"max_attempts": -1}, {"max_attempts": 2**31}, {"max_attempts": 1.0},
        {"max_attempts": True},
        {"base": -1}, {"base": NAN}, {"base": INF}, {"base": True}, {"base": "1"}, {"base": CENTURY_S + 1},
        {"factor": 0.5}, {"factor": NAN}, {"factor": INF}, {"factor": True}, {"factor": "2"}, {"factor": 10**400},
        {"max_delay": -1}, {"max_delay": NAN}, {"max_delay": CENTURY_S + 1}, {"max_delay": None},
        {"jitter": "some"}, {"jitter": None}, {"jitter": True}, {"jitter": ["full"]}, {"jitter": "FULL"},
    ],
)  # fmt: skip
def test_a_policy_that_cannot_work_is_refused_by_name(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=f"^{next(iter(options))}: "):
        RetryPolicy(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"per_second": 0}, {"per_second": -1}, {"per_second": NAN}, {"per_second": INF}, {"per_second": True},
        {"per_second": "1"}, {"burst": 0}, {"burst": 1.5}, {"burst": True}, {"burst": 2**53 + 1}, {"burst": None},
        {"on": "ack"}, {"on": None}, {"on": True}, {"on": ["lease"]},
    ],
)  # fmt: skip
def test_a_limit_that_cannot_work_is_refused_by_name(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=f"^{next(iter(options))}: "):
        RateLimit(**{"per_second": 1, "burst": 1, **options})


def test_the_extremes_of_policies_and_limits_are_taken() -> None:
    RetryPolicy(max_attempts=1, base=0, factor=1, max_delay=0, jitter="none")
    RetryPolicy(max_attempts=2**31 - 1, base=CENTURY_S, factor=1e15, max_delay=CENTURY_S, jitter="equal")
    assert RetryPolicy(max_attempts=None).max_attempts is None
    assert RateLimit(1e-9, 1, "enqueue").per_second == 1e-9
    assert RateLimit(10**15, 2**53).burst == 2**53


def test_a_pause_is_no_part_of_a_configuration_s_equality() -> None:
    assert QueueConfig(paused=True) == QueueConfig()
    assert QueueConfig(max_jobs=1) != QueueConfig()


# Jobs and leases


def job(**changes: Any) -> Job:
    facts: dict[str, Any] = {
        "id": 7, "queue": "mail", "state": JobState.SCHEDULED, "payload": b'{"to": "a"}',
        "headers": read_only({"h": "1"}), "priority": 5, "attempts": 1, "max_attempts": 5, "enqueued_at": NOON,
        "due_at": NOON, "last_error": None, "died_at": None,
    }  # fmt: skip
    return Job(**{**facts, **changes})


def lease(**changes: Any) -> Lease:
    facts: dict[str, Any] = {
        "id": 7, "queue": "mail", "payload": b'{"to": "a"}', "headers": read_only({"h": "1"}), "priority": 5,
        "attempt": 1, "token": 31, "deadline": NOON, "enqueued_at": NOON, "max_attempts": 5, "last_error": None,
    }  # fmt: skip
    return Lease(**{**facts, **changes})


VALUES: list[Callable[[], object]] = [
    job, lease, lambda: job(headers=NO_HEADERS), lambda: lease(headers=NO_HEADERS), lambda: LeaseRef(7, 31),
    RetryPolicy, lambda: RateLimit(2.5, 3), QueueConfig, QueueStats, lambda: QueueConfig(rate_limit=RateLimit(1, 1)),
]  # fmt: skip
each = pytest.mark.parametrize("make", VALUES, ids=lambda make: type(make()).__name__)


@each
def test_a_value_is_frozen(make: Callable[[], Any]) -> None:
    value = make()
    for field in attrs.fields(type(value)):
        with pytest.raises(attrs.exceptions.FrozenInstanceError):
            setattr(value, field.name, None)
        with pytest.raises(attrs.exceptions.FrozenInstanceError):
            delattr(value, field.name)


@each
def test_a_value_equals_another_with_the_same_facts_and_hashes_alike(make: Callable[[], Any]) -> None:
    assert make() == make()
    assert len({make(), make()}) == 1


@each
@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_a_value_survives_pickle(make: Callable[[], Any], protocol: int) -> None:
    again = pickle.loads(pickle.dumps(make(), protocol))
    assert again == make()
    assert hash(again) == hash(make())


@each
def test_a_value_survives_copy(make: Callable[[], Any]) -> None:
    assert copy.copy(make()) == copy.deepcopy(make()) == make()


@pytest.mark.parametrize("make", [job, lease], ids=["job", "lease"])
def test_headers_of_a_pickled_value_are_read_only_again(make: Callable[[], Any]) -> None:
    again = pickle.loads(pickle.dumps(make()))
    assert again.headers == {"h": "1"}
    with pytest.raises(TypeError, match="read-only"):
        again.headers["h"] = "2"


@pytest.mark.parametrize("make", [job, lease], ids=["job", "lease"])
def test_a_payload_is_read_as_json_on_demand(make: Callable[..., Any]) -> None:
    assert make().json() == {"to": "a"}
    with pytest.raises(UsageError, match=r"the payload \(1 bytes\) is not JSON"):
        make(payload=b"\xff").json()


@pytest.mark.parametrize("payload", [b"", b"{", b"\xff\xfe\x00", b"[" * 100_000, b"nul"])
def test_a_payload_that_is_no_json_is_a_usage_error_with_its_cause(payload: bytes) -> None:
    with pytest.raises(UsageError) as caught:
        decode_json(payload)
    assert caught.value.__cause__ is not None
    assert ".payload" in str(caught.value)


def test_a_lease_and_a_lease_ref_name_the_same_delivery() -> None:
    ref = LeaseRef(id=7, token=31)
    assert (ref.id, ref.token) == (lease().id, lease().token)


# Headers


def test_headers_are_a_copy() -> None:
    given_headers = {"a": "1"}
    headers = read_only(given_headers)
    given_headers["a"] = "2"
    assert headers == {"a": "1"}
    assert isinstance(headers, dict)


@pytest.mark.parametrize(
    "change",
    [
        lambda h: h.__setitem__("a", "2"), lambda h: h.__delitem__("a"), lambda h: h.clear(), lambda h: h.pop("a"),
        lambda h: h.popitem(), lambda h: h.setdefault("b", "2"), lambda h: h.update(b="2"),
        lambda h: h.__ior__({"b": "2"}),
    ],
    ids=["set", "delete", "clear", "pop", "popitem", "setdefault", "update", "or"],
)  # fmt: skip
def test_headers_refuse_every_change(change: Callable[[Any], object]) -> None:
    for headers, expected in ((read_only({"a": "1"}), {"a": "1"}), (NO_HEADERS, {})):
        with pytest.raises(TypeError, match="headers are read-only; make a dict of them first"):
            change(headers)
        assert headers == expected


def test_headers_work_where_a_dict_does() -> None:
    headers = read_only({"a": "1", "b": "2"})
    assert json.loads(json.dumps(headers)) == dict(**headers) == {"a": "1", "b": "2"}
    assert headers | {"c": "3"} == {"a": "1", "b": "2", "c": "3"}  # type: ignore[operator]  # headers are a dict to their readers


def test_equal_headers_hash_alike_in_any_order() -> None:
    assert hash(read_only({"a": "1", "b": "2"})) == hash(read_only({"b": "2", "a": "1"}))


def test_no_headers_are_one_and_the_same_object() -> None:
    assert read_only({}) is NO_HEADERS
    assert pickle.loads(pickle.dumps(NO_HEADERS)) is NO_HEADERS
    assert copy.deepcopy(NO_HEADERS) is NO_HEADERS


# What a lease calls back


class Desk:
    """Settles leases for one thread and keeps a list of what was asked."""

    def __init__(self, trouble: RivetQError | None = None) -> None:
        self.calls: list[tuple[object, ...]] = []
        self.watched: dict[int, bool] = {}
        self.trouble = trouble

    def _settle(self, verb: str, lease: LeaseLike, *facts: object) -> None:
        self.calls.append((verb, lease.id, lease.token, *facts))
        if self.trouble is not None:
            raise self.trouble
        if lease.token in self.watched:
            self.watched[lease.token] = True

    def ack(self, lease: LeaseLike) -> None:
        self._settle("ack", lease)

    def nack(self, lease: LeaseLike, *, error: str | None = None, delay: Duration | None = None) -> None:
        self._settle("nack", lease, error, delay)

    def release(self, lease: LeaseLike, *, delay: Duration = 0) -> None:
        self._settle("release", lease, delay)

    def reject(self, lease: LeaseLike, *, error: str | None = None) -> None:
        self._settle("reject", lease, error)

    def extend(self, lease: LeaseLike, seconds: Duration) -> Lease:
        self.calls.append(("extend", lease.id, lease.token, seconds))
        return make_lease(deadline=NOON + timedelta(minutes=1))

    def _watch_lease(self, token: int) -> None:
        self.watched[token] = False

    def _unwatch_lease(self, token: int) -> bool:
        return self.watched.pop(token)


make_lease = lease


def test_the_verbs_of_a_lease_call_its_broker() -> None:
    desk = Desk()
    held = lease(broker=desk)
    held.ack()
    held.nack(error="e", delay=2)
    held.nack()
    held.release(delay=3)
    held.release()
    held.reject(error="e")
    assert held.extend(60).deadline == NOON + timedelta(minutes=1)
    assert desk.calls == [
        ("ack", 7, 31),
        ("nack", 7, 31, "e", 2),
        ("nack", 7, 31, None, None),
        ("release", 7, 31, 3),
        ("release", 7, 31, 0),
        ("reject", 7, 31, "e"),
        ("extend", 7, 31, 60),
    ]


def test_the_broker_takes_no_part_in_equality_text_or_pickle() -> None:
    with_broker, without = lease(broker=Desk()), lease()
    assert with_broker == without
    assert hash(with_broker) == hash(without)
    assert repr(with_broker) == repr(without)
    again = pickle.loads(pickle.dumps(with_broker))
    with pytest.raises(UsageError, match=r"^job 7: this lease was unpickled and knows no broker; call broker.ack"):
        again.ack()


@pytest.mark.parametrize(
    "verb",
    [Lease.ack, Lease.nack, Lease.release, Lease.reject, lambda held: held.extend(1), Lease.__enter__],
    ids=["ack", "nack", "release", "reject", "extend", "enter"],
)
def test_no_verb_works_on_a_lease_without_a_broker(verb: Callable[[Lease], object]) -> None:
    with pytest.raises(UsageError, match="knows no broker"):
        verb(lease())


def test_the_end_of_the_block_acks() -> None:
    desk = Desk()
    with lease(broker=desk) as held:
        assert held == lease()
        assert desk.calls == []
    assert desk.calls == [("ack", 7, 31)]
    assert desk.watched == {}


@pytest.mark.parametrize(
    ("error", "text"),
    [(KeyError("x"), "KeyError: 'x'"), (KeyboardInterrupt(), "KeyboardInterrupt: "), (SystemExit(3), "SystemExit: 3")],
)
def test_an_exception_in_the_block_nacks_and_goes_on_its_way(error: BaseException, text: str) -> None:
    desk = Desk()
    with pytest.raises(type(error)) as caught, lease(broker=desk):
        raise error
    assert caught.value is error
    assert desk.calls == [("nack", 7, 31, text, None)]
    assert desk.watched == {}


@pytest.mark.parametrize("verb", ["ack", "nack", "release", "reject"])
def test_a_block_that_settled_the_lease_is_left_alone(verb: str) -> None:
    desk = Desk()
    with lease(broker=desk) as held:
        getattr(held, verb)()
    with pytest.raises(ZeroDivisionError), lease(broker=desk) as held:
        getattr(held, verb)()
        1 / 0
    assert [call[0] for call in desk.calls] == [verb, verb]


def test_a_lease_that_was_lost_meanwhile_is_told_at_the_end_of_the_block() -> None:
    lost = LeaseLostError("lost", job_id=7, token=31)
    with pytest.raises(LeaseLostError) as caught, lease(broker=Desk(lost)):
        pass
    assert caught.value is lost


def test_the_block_s_own_exception_is_seen_though_the_lease_was_lost() -> None:
    with pytest.raises(ZeroDivisionError) as caught, lease(broker=Desk(LeaseLostError("lost", job_id=7, token=31))):
        1 / 0
    assert not hasattr(caught.value, "__notes__")


def test_the_block_s_own_exception_carries_a_note_if_the_nack_failed() -> None:
    with pytest.raises(ZeroDivisionError) as caught, lease(broker=Desk(RivetQError("disk on fire"))):
        1 / 0
    assert caught.value.__notes__ == ["job 7 could not be nacked: disk on fire"]


def test_a_state_is_its_own_text() -> None:
    assert [str(state) for state in JobState] == ["ready", "scheduled", "leased", "dead"]
    assert JobState("dead") is JobState.DEAD
