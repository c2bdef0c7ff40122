"""Payloads of waiting jobs that stay in memory, so that a lease need not read them from the log."""

from __future__ import annotations

from collections import deque

from .columns import Columns


class Cache:
    """Knows whose payloads are in memory, and lets go of the oldest.

    Args:
        most: bytes; 0: none are kept.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.size = 0
        """About how many bytes are cached. Payloads that were leased meanwhile still count until the next `trim`."""
        self._columns: deque[Columns] = deque()  # those with payloads, oldest first

    def add(self, columns: Columns, size: int) -> None:
        columns.cached_bytes += size
        self.size += size
        if not self._columns or self._columns[-1] is not columns:
            self._columns.append(columns)

    def trim(self) -> None:
        """Count anew what is cached, and let go of the oldest until there is room again for some time."""
        sizes = [(columns, columns.cached_bytes) for columns in dict.fromkeys(self._columns)]
        self._columns = deque(columns for columns, size in sizes if size)
        left = sum(size for _, size in sizes)
        for columns, size in sizes:
            if left <= self.most // 4 * 3:
                break
            if size:
                columns.payloads, columns.cached_bytes = None, 0
                self._columns.popleft()
                left -= size
        self.size = left
