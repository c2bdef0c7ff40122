"""Idempotency keys: which job each stands for, and until when.

Keys that changed since the last checkpoint are in memory; the others are looked up on the shelf (the index). Without a
shelf, as in the memory engine, all are in memory. A checkpoint freezes the changed keys while it writes them: a frozen
key can still be looked up, and a change makes a new one.

For each segment the keys that outlived their job are counted, including those on the shelf.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sortedcontainers import SortedList

from .columns import Shelf


class Key:
    """A key: `expires_ms` 0 while its job lives. Job 0: it is free, but the shelf knows an old one. Never changed."""

    __slots__ = ("expires_ms", "job_id", "segment")

    def __init__(self, job_id: int, segment: int, expires_ms: int = 0) -> None:
        self.job_id = job_id
        self.segment = segment
        self.expires_ms = expires_ms


class Keys:
    """All keys of all queues, by queue number and text."""

    def __init__(self) -> None:
        self.changed: dict[tuple[int, str], Key] = {}
        self.frozen: dict[tuple[int, str], Key] = {}
        self.shelf: Shelf | None = None
        self.counts: dict[int, int] = {}  # keys that outlived their job, per segment
        self._ends: SortedList[Any] = SortedList()  # (expires_ms, queue number, text) of `changed`

    def get(self, number: int, text: str) -> Key | None:
        """A key as it was last changed, whether or not its window has ended."""
        name = (number, text)
        key = self.changed.get(name) or self.frozen.get(name)
        if key is None and self.shelf is not None and (found := self.shelf.key(number, text)) is not None:
            job_id, expires_ms, segment = found
            key = Key(job_id, segment, expires_ms)
        return None if key is None or not key.job_id else key

    def all(self) -> dict[tuple[int, str], Key]:
        """All keys, including those on the shelf; for dumps and checks."""
        names = {*self.changed, *self.frozen, *(self.shelf.key_names() if self.shelf is not None else ())}
        return {name: key for name in names if (key := self.get(*name)) is not None}

    def hold(self, number: int, text: str, key: Key) -> None:
        """Set which job the key stands for, and until when."""
        old = self.get(number, text)
        if old is not None and old.expires_ms:
            self._ends.discard((old.expires_ms, number, text))
            self._count(old.segment, -1)
        self.changed[number, text] = key
        if key.expires_ms:
            self._ends.add((key.expires_ms, number, text))
            self._count(key.segment, 1)

    def stand_in(self, number: int, now_ms: int) -> bool:
        """Whether a key of this queue is in force. Looks at all keys that changed lately."""
        for keys in (self.changed, self.frozen):
            for (n, text), key in keys.items():
                newest = n == number and (keys is self.changed or (n, text) not in self.changed)
                if newest and key.job_id and not 0 < key.expires_ms <= now_ms:
                    return True
        shelved = self.shelf.keys_of(number) if self.shelf is not None else ()
        return any(
            not 0 < expires_ms <= now_ms and (number, text) not in self.changed and (number, text) not in self.frozen
            for text, expires_ms in shelved
        )

    def forget(self, number: int, text: str) -> None:
        """The key is free again."""
        self.hold(number, text, Key(0, 0))
        if self.shelf is None and not self.frozen:
            del self.changed[number, text]  # it is nowhere else

    def first_end(self) -> tuple[int, int, str] | None:
        """Moment, queue number and text of the changed key whose window ends first."""
        return self._ends[0] if self._ends else None

    def sweep(self, ended: Iterable[tuple[int, str]], now_ms: int) -> None:
        """Forget those of these keys on the shelf whose window is over. Some may have changed meanwhile."""
        for number, text in ended:
            key = self.get(number, text)
            if key is not None and key.expires_ms and key.expires_ms <= now_ms:
                self.forget(number, text)

    # A checkpoint

    def freeze(self) -> dict[tuple[int, str], Key]:
        """The changed keys, to be written. Look-ups find them as frozen until `thaw` or `written`."""
        assert not self.frozen, "one checkpoint at a time"
        # In one line, as in the two methods below: an exception finds all of it done or nothing.
        self.frozen, self.changed, self._ends = self.changed, {}, SortedList()
        return self.frozen

    def written(self, shelf: Shelf) -> None:
        """The shelf has the frozen keys."""
        self.shelf, self.frozen = shelf, {}

    def thaw(self) -> None:
        """The checkpoint did not happen: these keys are still to be written."""
        changed = {**self.frozen, **self.changed}
        ends = SortedList((key.expires_ms, *name) for name, key in changed.items() if key.expires_ms)
        self.changed, self._ends, self.frozen = changed, ends, {}

    # Segments

    def load_counts(self, counts: Iterable[tuple[int, int]]) -> None:
        """Start from the counts of the shelf's keys."""
        for segment, count in counts:
            self._count(segment, count)

    def drop_segments(self, upto: int) -> None:
        for segment in [s for s in self.counts if s <= upto]:
            del self.counts[segment]

    def _count(self, segment: int, change: int) -> None:
        if segment and (change > 0 or segment in self.counts):  # not for a dropped segment; 0 is no file
            self.counts[segment] = self.counts.get(segment, 0) + change
