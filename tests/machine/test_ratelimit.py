"""The token bucket: full at first, refilled by time alone, never over the burst and never below zero."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rivetq.machine.ratelimit import TokenBucket
from rivetq.model import RateLimit

START_MS = 1_767_225_600_000


def bucket(per_second: float, burst: int, now_ms: int = START_MS) -> TokenBucket:
    return TokenBucket(RateLimit(per_second, burst), now_ms)


def test_a_bucket_starts_full() -> None:
    assert bucket(0.001, 5).available(START_MS) == 5
    assert bucket(0.001, 5).ready_at_ms(5, START_MS) == START_MS


def test_what_is_taken_is_gone() -> None:
    b = bucket(1, 5)
    b.take(2, START_MS)
    assert b.available(START_MS) == 3
    b.take(3, START_MS)
    assert b.available(START_MS) == 0


def test_tokens_come_back_with_time_whole_ones_only() -> None:
    b = bucket(2, 5)
    b.take(5, START_MS)
    assert [b.available(START_MS + ms) for ms in (0, 499, 500, 999, 1000, 2499, 2500)] == [0, 0, 1, 1, 2, 4, 5]


def test_a_bucket_never_holds_more_than_its_burst() -> None:
    b = bucket(1000, 3)
    b.take(1, START_MS)
    assert b.available(START_MS + 10**12) == 3
    b.take(3, START_MS + 10**12)
    assert b.available(START_MS + 10**12) == 0


def test_a_replay_may_take_more_than_there_is_and_the_level_stays_at_zero() -> None:
    b = bucket(1, 3)
    b.take(100, START_MS)
    assert b.available(START_MS) == 0
    assert b.available(START_MS + 1000) == 1


def test_looking_takes_nothing_and_moves_nothing() -> None:
    b = bucket(1, 3)
    b.take(3, START_MS)
    for _ in range(5):
        assert b.available(START_MS + 2000) == 2
        assert b.ready_at_ms(3, START_MS + 2000) == START_MS + 3000
    assert b.available(START_MS + 1000) == 1


def test_time_that_seems_to_step_back_adds_nothing_and_is_not_counted_twice() -> None:
    b = bucket(1, 10)
    b.take(10, START_MS + 5000)
    assert b.available(START_MS) == 0
    b.take(1, START_MS)
    assert b.available(START_MS + 5000) == 0
    assert b.available(START_MS + 6000) == 1


def test_ten_tenths_of_a_token_are_a_token() -> None:
    b = bucket(1, 1)
    b.take(1, START_MS)
    for tenth in range(1, 11):
        b.take(0, START_MS + tenth * 100)
    assert b.available(START_MS + 1000) == 1


@pytest.mark.parametrize(
    ("per_second", "count", "wait_ms"),
    [(1, 1, 1000), (3, 1, 334), (3, 2, 667), (1000, 1, 1), (0.5, 3, 6000), (1e6, 1, 1)],
)
def test_the_moment_of_the_next_tokens_is_told_rounded_up(per_second: float, count: int, wait_ms: int) -> None:
    b = bucket(per_second, 5)
    b.take(5, START_MS)
    assert b.ready_at_ms(count, START_MS) == START_MS + wait_ms


def test_tokens_that_are_there_are_ready_now() -> None:
    b = bucket(1, 5)
    b.take(3, START_MS)
    assert [b.ready_at_ms(n, START_MS) for n in range(1, 5)] == [START_MS] * 2 + [START_MS + 1000, START_MS + 2000]


def test_the_slowest_rate_gives_a_moment_and_no_overflow() -> None:
    b = bucket(1e-9, 1)
    b.take(1, START_MS)
    assert b.ready_at_ms(1, START_MS) == pytest.approx(START_MS + 10**12, rel=1e-5)


rates = st.sampled_from([0.01, 0.1, 0.5, 1, 3, 7.5, 100, 1000, 12_345.678])
steps = st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 6)), max_size=30)


@given(rates, st.integers(1, 20), steps)
def test_the_level_is_that_of_exact_arithmetic(per_second: float, burst: int, steps: list[tuple[int, int]]) -> None:
    b = bucket(per_second, burst)
    level, now_ms = Fraction(burst), START_MS
    for wait_ms, count in steps:
        now_ms += wait_ms
        level = min(Fraction(burst), level + wait_ms * Fraction(per_second) / 1000)
        assert b.available(now_ms) == int(level + Fraction(1, 10**6)) or abs(level - round(level)) < 2e-6
        b.take(count, now_ms)
        level = max(Fraction(0), level - count)


@given(rates, st.integers(1, 20), steps, st.data())
def test_at_the_moment_told_the_tokens_are_there_and_a_millisecond_before_they_are_not(
    per_second: float, burst: int, steps: list[tuple[int, int]], data: st.DataObject
) -> None:
    b = bucket(per_second, burst)
    now_ms = START_MS
    for wait_ms, count in steps:
        now_ms += wait_ms
        b.take(count, now_ms)
    count = data.draw(st.integers(1, burst))
    at_ms = b.ready_at_ms(count, now_ms)
    assert b.available(at_ms) >= count
    if at_ms > now_ms:
        assert b.available(at_ms - 1) < count


@given(rates, st.integers(1, 20), st.lists(st.integers(0, 3000), min_size=1, max_size=40))
def test_no_span_of_time_gives_more_than_the_burst_and_the_refill(
    per_second: float, burst: int, waits: list[int]
) -> None:
    b = bucket(per_second, burst)
    now_ms, taken = START_MS, 0
    for wait_ms in waits:
        now_ms += wait_ms
        count = b.available(now_ms)
        b.take(count, now_ms)
        taken += count
        assert taken <= burst + per_second * (now_ms - START_MS) / 1000 + 1e-3
