"""The token bucket: a number and a moment, moved by `now`."""

from __future__ import annotations

import math

from ..model import RateLimit
from ..units import MAX_DURATION_MS

_EPSILON = 1e-6  # refills are sums of floats: ten tenths of a token are a token


class TokenBucket:
    """Holds up to `limit.burst` tokens, refilled by `limit.per_second`; starts full."""

    __slots__ = ("_at_ms", "_tokens", "limit")

    def __init__(self, limit: RateLimit, now_ms: int) -> None:
        self.limit = limit
        self._tokens = float(limit.burst)
        self._at_ms = now_ms

    def available(self, now_ms: int) -> int:
        """Whole tokens that can be taken now."""
        return int(self._level(now_ms) + _EPSILON)

    def take(self, count: int, now_ms: int) -> None:
        """Remove tokens. A replay may take more than are there: the level never goes below zero."""
        self._tokens = max(0.0, self._level(now_ms) - count)
        self._at_ms = max(now_ms, self._at_ms)

    def ready_at_ms(self, count: int, now_ms: int) -> int:
        """The first moment at which `count` tokens (at most `burst`) are there; in 100 years if it is later still."""
        missing = count - self._level(now_ms) - _EPSILON
        if missing <= 0:
            return now_ms
        return now_ms + math.ceil(min(missing * 1000 / self.limit.per_second, MAX_DURATION_MS))

    def _level(self, now_ms: int) -> float:
        elapsed_ms = max(0, now_ms - self._at_ms)
        return min(float(self.limit.burst), self._tokens + elapsed_ms * self.limit.per_second / 1000)
