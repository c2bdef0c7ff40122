"""Counts of measured values by size, so that a reader who looks now and then sees how they are spread."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

import attrs


@attrs.frozen
class Histogram:
    """How many values fell below each bound, cumulated from the smallest bound on, as Prometheus counts them."""

    bounds: Sequence[float]
    """Upper bounds, ascending; a value equal to a bound belongs to it."""
    counts: Sequence[int]
    """Values up to each bound."""
    count: int
    """All values, also those above the last bound."""
    sum: float
    """Of all values."""


class Tally:
    """Fills a histogram. Not thread-safe: one thread observes at a time."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def histogram(self) -> Histogram:
        """What was observed so far."""
        counts, running = [], 0
        for count in self._counts:
            running += count
            counts.append(running)
        return Histogram(self._bounds, tuple(counts[:-1]), running, self._sum)


def doubling(first: float, count: int) -> tuple[float, ...]:
    """`count` bounds, each twice the one before."""
    return tuple(first * 2**i for i in range(count))
