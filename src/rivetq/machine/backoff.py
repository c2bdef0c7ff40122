"""Attempt -> delay."""

from __future__ import annotations

import math
import random

from ..model import RetryPolicy


def retry_delay_ms(policy: RetryPolicy, nth_retry: int) -> int:
    """Milliseconds before the nth retry (1 is the first), jitter included.

    The jitter comes from the process's `random`, so that a test that seeds it sees the same delays again.
    """
    try:
        delay = min(policy.max_delay, policy.base * policy.factor ** (nth_retry - 1))
    except OverflowError:  # factor**n left the floats; with base 0 there is still no wait
        delay = policy.max_delay if policy.base else 0.0
    if policy.jitter == "full":
        delay = random.uniform(0, delay)
    elif policy.jitter == "equal":
        delay = delay / 2 + random.uniform(0, delay / 2)
    return math.ceil(round(delay * 1000, 6))
