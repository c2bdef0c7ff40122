"""Attempt to delay: the documented formula, the bounds of the jitter, and no overflow however long a job retries."""

from __future__ import annotations

import random
from statistics import mean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rivetq.machine.backoff import retry_delay_ms
from rivetq.model import Jitter, RetryPolicy

JITTERS: tuple[Jitter, ...] = ("full", "equal", "none")
HUGE = 2**31 - 1

policies = st.builds(
    RetryPolicy,
    base=st.floats(0, 1e6),
    factor=st.floats(1, 1e15),
    max_delay=st.floats(0, 1e6),
    jitter=st.sampled_from(JITTERS),
)


@pytest.mark.parametrize(
    ("nth", "expected_ms"), [(1, 1000), (2, 2000), (3, 4000), (7, 64_000), (8, 100_000), (9, 100_000)]
)
def test_the_nth_retry_waits_base_times_factor_to_the_n_less_one_up_to_the_longest_wait(
    nth: int, expected_ms: int
) -> None:
    policy = RetryPolicy(base=1, factor=2, max_delay=100, jitter="none")
    assert retry_delay_ms(policy, nth) == expected_ms


def test_the_first_retry_too_waits_no_longer_than_the_longest_wait() -> None:
    assert retry_delay_ms(RetryPolicy(base=60, max_delay=1, jitter="none"), 1) == 1000


def test_a_factor_of_one_is_a_constant_wait() -> None:
    policy = RetryPolicy(base=0.25, factor=1, jitter="none")
    assert {retry_delay_ms(policy, nth) for nth in (1, 2, 100, HUGE)} == {250}


@pytest.mark.parametrize("jitter", JITTERS)
@pytest.mark.parametrize("nth", [1, 5, HUGE])
def test_without_a_base_there_is_no_wait(jitter: Jitter, nth: int) -> None:
    assert retry_delay_ms(RetryPolicy(base=0, jitter=jitter), nth) == 0


@pytest.mark.parametrize("nth", [1023, 1024, 1025, 1026, 10**6, HUGE, 10**30])
def test_a_huge_attempt_waits_the_longest_and_does_not_overflow(nth: int) -> None:
    assert retry_delay_ms(RetryPolicy(base=1, factor=2, max_delay=3600, jitter="none"), nth) == 3_600_000


@given(policies, st.integers(1, HUGE))
def test_the_delay_is_always_within_the_bounds_of_its_jitter(policy: RetryPolicy, nth: int) -> None:
    exact_ms = retry_delay_ms(
        RetryPolicy(base=policy.base, factor=policy.factor, max_delay=policy.max_delay, jitter="none"), nth
    )
    found = retry_delay_ms(policy, nth)
    least = {"none": exact_ms, "equal": exact_ms // 2, "full": 0}[policy.jitter]
    assert least <= found <= exact_ms <= policy.max_delay * 1000 + 1
    assert type(found) is int


@pytest.mark.parametrize(("jitter", "low", "high"), [("full", 0, 8000), ("equal", 4000, 8000), ("none", 8000, 8000)])
def test_the_jitter_fills_its_whole_span_evenly(jitter: Jitter, low: int, high: int) -> None:
    random.seed(20260301)
    policy = RetryPolicy(base=2, factor=4, jitter=jitter)
    found = [retry_delay_ms(policy, 2) for _ in range(4000)]
    span = high - low
    assert low <= min(found) <= low + span // 100
    assert high - span // 100 <= max(found) <= high
    assert abs(mean(found) - (low + high) / 2) <= span / 50


@pytest.mark.parametrize(
    ("top", "expected_ms"), [(0.0, {"full": 0, "equal": 500}), (1.0, {"full": 1000, "equal": 1000})]
)
@pytest.mark.parametrize("jitter", ["full", "equal"])
def test_both_ends_of_the_jitter_are_as_documented(
    monkeypatch: pytest.MonkeyPatch, top: float, expected_ms: dict[str, int], jitter: Jitter
) -> None:
    monkeypatch.setattr(random, "uniform", lambda low, high: low + top * (high - low))
    assert retry_delay_ms(RetryPolicy(base=1, jitter=jitter), 1) == expected_ms[jitter]


def test_the_same_seed_gives_the_same_delays() -> None:
    policy = RetryPolicy()
    runs = []
    for _ in range(2):
        random.seed(7)
        runs.append([retry_delay_ms(policy, nth) for nth in range(1, 20)])
    assert runs[0] == runs[1]


def test_a_fraction_of_a_millisecond_is_rounded_up() -> None:
    assert retry_delay_ms(RetryPolicy(base=0.0001, jitter="none"), 1) == 1
    assert retry_delay_ms(RetryPolicy(base=0.1, factor=3, jitter="none"), 2) == 300  # 0.1 * 3 is a little more than 0.3
