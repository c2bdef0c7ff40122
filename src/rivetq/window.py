"""An ordered set of which only the head needs to be in memory.

Today every key is resident. The machine reads its ordered sets only through these few verbs, none of which asks for
all keys at once or for a position, so that a horizon and a refill from the index can be put behind them without a
change to the rules (DESIGN: no key outside memory is below the horizon).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import Any

from sortedcontainers import SortedList


class Window:
    """Keys in order, each at most once."""

    __slots__ = ("_keys",)

    def __init__(self) -> None:
        self._keys: SortedList[Any] = SortedList()

    def __len__(self) -> int:
        return len(self._keys)

    def add(self, key: Any) -> None:
        """Add a key that is not there."""
        self._keys.add(key)

    def update(self, keys: Iterable[Any]) -> None:
        """Add many keys that are not there."""
        self._keys.update(keys)

    def discard(self, key: Any) -> None:
        """Remove a key that may be there."""
        self._keys.discard(key)

    def first(self) -> Any:
        """The least key, or None."""
        return self._keys[0] if self._keys else None

    def head(self, count: int) -> list[Any]:
        """The `count` least keys, fewer if there are fewer."""
        return list(self._keys.islice(0, count))

    def after(self, key: Any) -> Iterator[Any]:
        """Keys greater than `key`, in order; the set must not change meanwhile."""
        return iter(self._keys.irange(minimum=key, inclusive=(False, True)))

    def check(self) -> None:
        """Assert the order and that no key is there twice."""
        self._keys._check()
        keys = list(self._keys)
        assert all(a < b for a, b in pairwise(keys)), "window: keys out of order or twice"
