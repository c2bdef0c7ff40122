"""The raw limit: what the disk gives to one thread that appends and syncs, with nothing else to do.

A durable commit of one thread cannot be faster than the bytes it writes and the sync that it waits for. So the durable
cases are measured beside a loop that does only that: `pwrite` the same number of bytes at the end of a growing file,
`fdatasync`. Several threads that share a sync can exceed it.
"""

from __future__ import annotations

import os
from pathlib import Path


class RawFile:
    """A file that grows by one commit at a time."""

    def __init__(self, path: Path, commit_bytes: int) -> None:
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        self._commit = os.urandom(commit_bytes)
        self._end = 0

    def commit(self) -> None:
        self._end += os.pwrite(self._descriptor, self._commit, self._end)
        os.fdatasync(self._descriptor)

    def close(self) -> None:
        os.close(self._descriptor)
