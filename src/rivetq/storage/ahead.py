"""Which leases were taken in advance and have not begun: a page that outlives the process, but no power cut.

A worker leases some jobs before it can run them. If its process is killed, the next opening must tell those apart from
the ones that ran: a job that never began pays no attempt. A record for each beginning would cost as much as the lease.
So the tokens that have not begun stand in a small file that is mapped into memory. Beginning is a store of eight zeros:
no system call, no lock, and what a killed process stored is still there, since the page belongs to the system.

Nothing rests on it. What is lost of it (a power cut, a full disk, more leases than slots) counts as begun, which is how
every other lease counts. Tokens are never given twice, so an old file says nothing of new leases.

File `ahead`: SLOTS numbers of 8 bytes, little-endian; 0 is a free slot.
"""

from __future__ import annotations

import logging
import mmap
import os
import struct
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

from .disk import FILE_MODE, REFUSING

logger = logging.getLogger("rivetq")

SLOTS = 8192
"""64 KiB: more than a worker leases in advance. If there are more, the rest counts as begun."""
_TOKEN = struct.Struct("<Q")
_ZEROS = bytes(_TOKEN.size)


def read_ahead(path: str) -> set[int]:
    """The tokens that the former owner had not begun; none if that cannot be read."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return set()
    try:
        data = os.pread(fd, SLOTS * _TOKEN.size, 0)
    except OSError:
        return set()
    finally:
        os.close(fd)
    return {token for (token,) in _TOKEN.iter_unpack(data[: len(data) // _TOKEN.size * _TOKEN.size]) if token}


class Ahead:
    """The table of an open broker. Its file is made when it is first needed.

    Args:
        kept: tokens of the former owner whose leases are still in force, with their jobs.
    """

    def __init__(self, path: str, kept: Iterable[tuple[int, int]] = ()) -> None:
        self._path = path
        self._os: Any = os  # what makes the file; in a forked child it refuses
        self._lock = threading.Lock()  # one maker of the file
        self._kept = list(kept)
        self._map: mmap.mmap | None = None
        self._is_made = False
        self._slots: dict[int, tuple[int, int]] = {}  # token -> place, job
        self._free: list[int] = []  # places in the page

    def make(self) -> None:
        """Make the file, if it is not there; never raises. No lock of the engine's is held: this writes."""
        if self._is_made:
            return
        with self._lock:
            if self._is_made:
                return
            try:
                self._make()
            except (OSError, ValueError) as error:
                logger.warning("rivetq: %s: jobs that are leased in advance will count as begun: %s", self._path, error)
            self._is_made = True

    def _make(self) -> None:
        new = self._path + ".new"
        with suppress(FileNotFoundError):
            self._os.unlink(new)
        fd: int = self._os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, FILE_MODE)
        try:
            os.fchmod(fd, FILE_MODE)
            # Written, not only made longer: on a full disk a store into a page without a block is a SIGBUS.
            if self._os.write(fd, _ZEROS * SLOTS) != len(_ZEROS) * SLOTS:
                raise OSError("no space")
            made = mmap.mmap(fd, len(_ZEROS) * SLOTS)
        finally:
            os.close(fd)
        self._map, self._free = made, list(range((SLOTS - 1) * _TOKEN.size, -1, -_TOKEN.size))
        self.note(self._kept, lambda token, job_id: True)
        self._os.rename(new, self._path)  # last: until then the old one speaks

    def note(self, leases: Iterable[tuple[int, int]], is_held: Callable[[int, int], bool]) -> None:
        """These leases (token, job) have not begun. `is_held` tells whether an older one is still in force."""
        # Caller holds the engine's lock, or no other thread knows the table yet.
        table = self._map
        if table is None:
            return
        for token, job_id in leases:
            if token in self._slots:
                self.begin(token)  # of an attempt that was broken off
            if not self._free and not self._sweep(is_held):
                return
            at = self._free.pop()
            _TOKEN.pack_into(table, at, token)
            self._slots[token] = at, job_id

    def _sweep(self, is_held: Callable[[int, int], bool]) -> bool:
        """Forget leases that ended before they began; whether there is a slot now."""
        for token, (_, job_id) in list(self._slots.items()):
            if not is_held(token, job_id):
                self.begin(token)
        return bool(self._free)

    def begin(self, token: int) -> None:
        """It begins, or has ended before it did."""
        found, table = self._slots.pop(token, None), self._map
        if found is not None and table is not None:
            at = found[0]
            try:
                _TOKEN.pack_into(table, at, 0)
            except ValueError:  # closed meanwhile
                return
            self._free.append(at)

    def close(self) -> None:
        table, self._map = self._map, None
        self._slots.clear()
        self._is_made = True
        if table is not None:
            with suppress(BufferError):
                table.close()

    def forked(self) -> None:
        """In the child: page and file are the parent's, and the holder of the lock is not here."""
        self._lock, self._os = threading.Lock(), REFUSING
        table, self._map, self._slots, self._is_made = self._map, None, {}, True
        if table is not None:
            with suppress(BufferError):
                table.close()  # this process's view of it alone
