"""The disk space that a log has taken in advance: the rest of its tail, and spares.

Space is taken before it is promised: a record is accepted only if blocks of the disk are allocated for it. A segment
grows in preallocated steps, and a spare waits beside it. Enqueues stop while RESERVE_BYTES are still left for acks and
leases. When the disk has no more space for the tail, the spare is begun early.
"""

from __future__ import annotations

import errno
import os
import threading

from ..errors import DiskFullError
from .disk import Disk
from .layout import SPARE
from .record import ALIGN, HEADER_BYTES, frame_bytes
from .segment import SegmentFile

RESERVE_BYTES = 256 * 1024
_ROOMY_BYTES = RESERVE_BYTES + HEADER_BYTES + ALIGN
FIRST_BYTES = 512 * 1024
"""Preallocated at the start; a small queue takes little disk."""
SMALL_BYTES = 64 * 1024
"""On a nearly full disk spares get smaller, down to this size, or to the size that an answer needs."""
STEP_BYTES = 16 * 2**20
"""The largest step: a segment doubles up to this one."""
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE}
"""Errors that pass by themselves, or when a user makes room. File descriptors are a kind of space, too."""
_NEW = ".new"
_HEADER_SLACK = 4096  # what a header may grow between the question for room and its writing


class Space:
    """Answers whether a record has room, and gets more. The engine's lock is held unless it says otherwise."""

    def __init__(self, disk: Disk, directory: str, segment_bytes: int) -> None:
        self._disk = disk
        self._directory = directory
        self._segment_bytes = segment_bytes
        self.tail: SegmentFile | None = None
        self.tail_offset = 0
        """Where the next frame goes."""
        self._disk_full = False  # the last attempt to get more space failed
        self._spares: list[SegmentFile] = []
        self._lock = threading.Lock()  # one maker of spares at a time
        self._spare_number = 0
        self._closed = False

    def is_roomy(self, body_length: int) -> bool:
        """The tail alone has room for this record and the reserve, as for all but a few records."""
        tail = self.tail
        return tail is not None and self.tail_offset + body_length + _ROOMY_BYTES <= tail.size

    def fits(self, body_length: int) -> bool:
        """The tail segment has preallocated space for this record."""
        return self.tail is not None and self.tail_offset + frame_bytes(body_length) <= self.tail.size

    def can_extend(self, body_length: int) -> bool:
        """The tail segment may grow for this record, as far as is known: ask `make_room`."""
        return not self._disk_full and self.tail_offset + frame_bytes(body_length) <= self._segment_bytes

    def has_room(self, body_length: int, snapshot_length: int | None, *, keep_reserve: bool) -> bool:
        """The record can be appended without asking the disk for space.

        Args:
            snapshot_length: size of the snapshot if the record begins a segment, else None.
            keep_reserve: leave RESERVE_BYTES for those who may not be refused (answers, leases).
        """
        left = 0 if self.tail is None else self.tail.size - self.tail_offset
        spares = sum(spare.size for spare in self._spares)
        if snapshot_length is not None:
            spare = self._fitting(body_length, snapshot_length)
            if spare is None:
                return False
            spares -= spare.size
            left = spare.size - snapshot_length - _HEADER_SLACK
        frame = frame_bytes(body_length)
        return frame <= left and (not keep_reserve or left - frame + spares >= RESERVE_BYTES)

    def _fitting(self, body_length: int, snapshot_length: int) -> SegmentFile | None:
        need = frame_bytes(body_length) + snapshot_length + _HEADER_SLACK
        return next((spare for spare in self._spares if spare.size >= need), None)

    @property
    def _spare_bytes(self) -> int:
        return min(FIRST_BYTES, self._segment_bytes)

    def _wants_spare(self) -> bool:
        return len(self._spares) < 1 + RESERVE_BYTES // self._spare_bytes

    def is_wanted(self) -> bool:
        """There should be a spare more, or a longer tail. Cheap; no lock needed."""
        tail = self.tail
        if self._wants_spare():
            return True
        return tail is not None and tail.size < self._segment_bytes and tail.size - self.tail_offset < tail.size // 4

    def make_room(self, body_length: int, snapshot_length: int | None, *, keep_reserve: bool) -> None:
        """Get space until `has_room` says yes. The engine's lock is not held.

        Without a snapshot the tail is to grow; if the disk has nothing for it, the next try begins the spare.
        Raises DiskFullError if there is no space for a spare either, and the OSError of any other failure.
        """
        need = frame_bytes(body_length) + (snapshot_length or 0) + _HEADER_SLACK
        with self._lock:
            try:
                size = max(self._spare_bytes, need)
                if snapshot_length is None:
                    self._extend(body_length)
                    size = self._spare_bytes
                while not self.has_room(body_length, snapshot_length, keep_reserve=keep_reserve):
                    if snapshot_length is None and not self.fits(body_length):
                        return  # the tail changed meanwhile: the caller decides again
                    self._spares.append(self._largest_spare(size, need if not keep_reserve else max(need, SMALL_BYTES)))
                    size = self._spare_bytes
                self._disk_full = False
            except OSError as error:
                if error.errno in _NO_SPACE and not self._disk_full and snapshot_length is None:
                    self._disk_full = True
                    return
                raise self._no_space(error) from error

    def _no_space(self, error: OSError) -> DiskFullError | OSError:
        """The error to raise when space could not be got: one that passes, or a failure of the disk."""
        if error.errno not in _NO_SPACE:
            return error
        return DiskFullError(
            f"{self._directory}: no space for more of the log ({error.strerror}); nothing was changed, free some space "
            f"and call again, the broker goes on without reopening",
            path=self._directory,
        )

    def _extend(self, body_length: int) -> None:
        # Caller holds _lock. The tail may change meanwhile: `size` belongs to the file.
        tail = self.tail
        if tail is None or self.fits(body_length):
            return
        need = self.tail_offset + frame_bytes(body_length)
        size = min(self._segment_bytes, max(need, tail.size + min(STEP_BYTES, tail.size)))
        while True:
            try:
                tail.extend(size)
                break
            except OSError:
                if size <= need:
                    raise
                size = max(need, (tail.size + size) // 2)  # the disk is nearly full: a smaller step

    def refill(self) -> None:
        """Get the space that is wanted, ahead of need. Raises as `make_room` does."""
        with self._lock:
            try:
                while self.is_wanted() and not self._closed:
                    tail = self.tail
                    if self._wants_spare():
                        self._spares.append(self._new_spare(self._spare_bytes))
                    elif tail is not None:
                        tail.extend(min(self._segment_bytes, tail.size + min(STEP_BYTES, tail.size)))
                self._disk_full = False
            except OSError as error:
                raise self._no_space(error) from error

    def _largest_spare(self, size: int, least: int) -> SegmentFile:
        """A spare of `size`, or of the size that a nearly full disk still has, down to `least`."""
        while True:
            try:
                return self._new_spare(size)
            except OSError:
                if size <= least:
                    raise
                size = max(least, size // 2)

    def _new_spare(self, size: int) -> SegmentFile:
        self._spare_number += 1
        path = os.path.join(self._directory, f"{SPARE}{self._spare_number}")
        spare = SegmentFile.create(self._disk, path + _NEW, size)
        self._disk.rename(path + _NEW, path)
        spare.path = path
        return spare

    def adopt(self) -> None:
        """Take over the spares of the former owner; unusable ones are removed."""
        for name in sorted(self._disk.list(self._directory)):
            if not name.startswith(SPARE):
                continue
            path = os.path.join(self._directory, name)
            number = name.removeprefix(SPARE)
            spare = SegmentFile.open(self._disk, path) if number.isdigit() else None
            if spare is not None and spare.size == self._spare_bytes:
                self._spares.append(spare)
                self._spare_number = max(self._spare_number, int(number))
            else:
                self._disk.unlink(path)

    def take(self, body_length: int, snapshot_length: int) -> SegmentFile:
        """The spare that becomes the tail; `has_room` was asked for these lengths."""
        spare = self._fitting(body_length, snapshot_length)
        assert spare is not None, "has_room was not asked"
        self._spares.remove(spare)
        return spare

    def close(self) -> None:
        """Close the spares; no other is made. The engine's lock is not held."""
        with self._lock:
            self._closed = True
        for spare in self._spares:
            spare.close()
        self._spares.clear()

    def forked(self) -> None:
        """In the child, where the holder of the lock is not."""
        self._lock = threading.Lock()
