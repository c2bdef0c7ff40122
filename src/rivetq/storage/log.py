"""The directory of segments: append, write, sync, read, drop.

Two locks, neither of them here for the caller's data:

- `append`, `begin_segment` and the room questions are called with the engine's lock held and do no I/O: they put frames
  into a buffer and say where they will be on disk.
- `write` takes the buffer to the operating system, in order, under `_write_lock`; `sync` waits for the disk outside of
  it, so that others write meanwhile. One thread at a time syncs (see group).

Failure is for good: after an exception while writing or syncing, `broken` is True in that thread, the next write or
sync raises, and nobody may say "ok" again.
An fsync is never repeated: on ext4 and xfs the second one says OK although the data of the first is gone.

Space is taken before it is promised: a record is accepted only where blocks of the disk are its own already. A segment
grows in preallocated steps, a spare one waits beside it, and enqueues stop while RESERVE_BYTES are still there for acks
and leases. When the disk has nothing more for the tail, the spare is begun early.

Files: `NNNNNNNNNNNNNNNN.log`, `spare-N` (preallocated, no header yet), `mark` (the last synced lsn; written after each
sync, itself not synced: a witness that may be old, never wrong).
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import struct
import threading
import time
from collections import deque
from collections.abc import Sequence

import attrs
from crc32c import crc32c

from ..errors import DiskFullError
from ..histogram import Tally, doubling
from ..machine.snapshot import Place
from .disk import Disk, OwnFile, write_all
from .record import ALIGN, HEADER_BYTES, encode_frame, frame_bytes
from .segment import (
    OPEN_SEGMENTS,
    OUT_OF_DESCRIPTORS,
    Header,
    SegmentFile,
    SegmentFiles,
    corrupt,
    encode_header,
    segment_id,
)

RESERVE_BYTES = 256 * 1024
_ROOMY_BYTES = RESERVE_BYTES + HEADER_BYTES + ALIGN
FIRST_BYTES = 512 * 1024
"""Preallocated at the start; a small queue takes little disk."""
SMALL_BYTES = 64 * 1024
"""On a nearly full disk spares get smaller, down to this one, or to what an answer needs."""
STEP_BYTES = 16 * 2**20
"""The largest step: a segment doubles up to this one."""
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE}
"""What passes by itself, or when somebody makes room: files that can be opened are a kind of space too."""
_MARK = struct.Struct("<16sQ")
_SPARE = "spare-"
_NEW = ".new"
READ_BYTES, READ_GAP_BYTES = 1 << 18, 1 << 12
"""Payloads that lie this close together are read at once, up to so much."""
_HEADER_SLACK = 4096  # what a header may grow between the question for room and its writing


def read_mark(data: bytes | None, log_id: bytes) -> int:
    """The lsn that the mark file testifies; 0 if it is missing, damaged or another log's."""
    if data is None or len(data) < _MARK.size + 4:
        return 0
    found_id, lsn = _MARK.unpack_from(data)
    crc = int.from_bytes(data[_MARK.size : _MARK.size + 4], "little")
    return int(lsn) if found_id == log_id and crc == crc32c(data[: _MARK.size]) else 0


def read_payload(file: SegmentFile, offset: int, length: int, crc: int) -> bytes:
    """Bytes of a segment that were written as a payload. Raises CorruptLogError if these are others."""
    data = file.read(length, offset)
    if len(data) != length or crc32c(data) != crc:
        file.check()  # not damaged, if the program opened another file in its place
        raise corrupt(file.path, offset, f"a payload of {length} bytes does not match its checksum", so="")
    return data


def encode_mark(log_id: bytes, lsn: int) -> bytes:
    """What the mark file holds when this record is on disk."""
    data = _MARK.pack(log_id, lsn)
    return data + crc32c(data).to_bytes(4, "little")


@attrs.define
class _Begin:
    """In the buffer: from here on frames go into this segment."""

    file: SegmentFile
    header: Header


_Frame = tuple[bytes, int, int]
"""In the buffer: a frame, its offset, its lsn."""


class Log:
    """An open log, after recovery. `begin_segment` must come first."""

    def __init__(self, disk: Disk, directory: str, *, log_id: bytes, epoch: int, segment_bytes: int) -> None:
        self._disk = disk
        self._directory = directory
        self._log_id = log_id
        self._epoch = epoch
        self._segment_bytes = segment_bytes
        # Guarded by the engine's lock: where the next frame goes.
        self._tail_id = 0
        self._tail_offset = 0
        self._tail: SegmentFile | None = None
        self._disk_full = False  # the last attempt to get more space failed
        self._salt = 0
        self._crc = 0
        self._tail_first_lsn = 1
        self.next_lsn = 1
        self.sizes: dict[int, int] = {}  # bytes used per segment
        # Filled under the engine's lock, emptied under _write_lock; deque operations are atomic.
        self._buffer: deque[_Begin | _Frame] = deque()
        self._spares: list[SegmentFile] = []
        self._spare_lock = threading.Lock()  # one maker of spares at a time
        self._spare_number = 0
        self._closed = False
        self._write_lock = threading.Lock()  # guards _file, _written and the order of writes
        self._file: SegmentFile | None = None
        self._written_to = 0
        self.written_lsn = 0
        self.durable_lsn = 0
        # Set before and cleared after: whatever breaks in leaves them set.
        self._writing = 0  # the thread that does it
        self._syncing = 0
        self._mark: OwnFile | None = None
        # Of the tail and the spares there are references of their own: they stay open when others are let go here.
        self._files = SegmentFiles(disk, directory, OPEN_SEGMENTS)
        self.records = self.syncs = self.bytes_written = 0
        self.jobs = 0  # in all records so far; counted by the engine
        self._jobs_synced = 0
        self.sync_seconds, self.sync_jobs = Tally(doubling(50e-6, 16)), Tally(doubling(1, 14))

    # Room; the engine's lock is held unless it says otherwise

    def is_roomy(self, body_length: int) -> bool:
        """There is room for this record and the reserve in the tail alone: what all but a few find."""
        tail = self._tail
        return tail is not None and self._tail_offset + body_length + _ROOMY_BYTES <= tail.size

    def fits(self, body_length: int) -> bool:
        """The tail segment has preallocated space for this record."""
        return self._tail is not None and self._tail_offset + frame_bytes(body_length) <= self._tail.size

    def can_extend(self, body_length: int) -> bool:
        """The tail segment may grow for this record, as far as is known: ask `make_room`."""
        return not self._disk_full and self._tail_offset + frame_bytes(body_length) <= self._segment_bytes

    def has_room(self, body_length: int, snapshot_length: int | None, *, keep_reserve: bool) -> bool:
        """The record can be appended without asking the disk for space.

        Args:
            snapshot_length: size of the snapshot if the record begins a segment, else None.
            keep_reserve: leave RESERVE_BYTES for those who may not be refused (answers, leases).
        """
        left = 0 if self._tail is None else self._tail.size - self._tail_offset
        spares = sum(spare.size for spare in self._spares)
        if snapshot_length is not None:
            spare = self._spare_for(body_length, snapshot_length)
            if spare is None:
                return False
            spares -= spare.size
            left = spare.size - snapshot_length - _HEADER_SLACK
        frame = frame_bytes(body_length)
        return frame <= left and (not keep_reserve or left - frame + spares >= RESERVE_BYTES)

    def _spare_for(self, body_length: int, snapshot_length: int) -> SegmentFile | None:
        need = frame_bytes(body_length) + snapshot_length + _HEADER_SLACK
        return next((spare for spare in self._spares if spare.size >= need), None)

    @property
    def _spare_bytes(self) -> int:
        return min(FIRST_BYTES, self._segment_bytes)

    def _wants_spare(self) -> bool:
        return len(self._spares) < 1 + RESERVE_BYTES // self._spare_bytes

    def wants_space(self) -> bool:
        """There should be a spare more, or a longer tail. Cheap; no lock needed."""
        tail = self._tail
        if self._wants_spare():
            return True
        return tail is not None and tail.size < self._segment_bytes and tail.size - self._tail_offset < tail.size // 4

    def make_room(self, body_length: int, snapshot_length: int | None, *, keep_reserve: bool) -> None:
        """Get space until `has_room` says yes. The engine's lock is not held.

        Without a snapshot the tail is to grow; if the disk has nothing for it, the next try begins the spare.
        Raises DiskFullError if there is no space for a spare either, and the OSError of any other failure.
        """
        need = frame_bytes(body_length) + (snapshot_length or 0) + _HEADER_SLACK
        with self._spare_lock:
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
        """What a failure to get space is to the caller: something that passes, or a failure of the disk."""
        if error.errno not in _NO_SPACE:
            return error
        return DiskFullError(
            f"{self._directory}: no space for more of the log ({error.strerror}); nothing was changed, free some space "
            f"and call again, the broker goes on without reopening",
            path=self._directory,
        )

    def _extend(self, body_length: int) -> None:
        # Caller holds _spare_lock. The tail may change meanwhile: `size` belongs to the file.
        tail = self._tail
        if tail is None or self.fits(body_length):
            return
        need = self._tail_offset + frame_bytes(body_length)
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
        with self._spare_lock:
            try:
                while self.wants_space() and not self._closed:
                    tail = self._tail
                    if self._wants_spare():
                        self._spares.append(self._new_spare(self._spare_bytes))
                    elif tail is not None:
                        tail.extend(min(self._segment_bytes, tail.size + min(STEP_BYTES, tail.size)))
                self._disk_full = False
            except OSError as error:
                raise self._no_space(error) from error

    def _largest_spare(self, size: int, least: int) -> SegmentFile:
        """Of `size`, or of what a nearly full disk still has, down to `least`."""
        while True:
            try:
                return self._new_spare(size)
            except OSError:
                if size <= least:
                    raise
                size = max(least, size // 2)

    def _new_spare(self, size: int) -> SegmentFile:
        self._spare_number += 1
        path = os.path.join(self._directory, f"{_SPARE}{self._spare_number}")
        spare = SegmentFile.create(self._disk, path + _NEW, size)
        self._disk.rename(path + _NEW, path)
        spare.path = path
        return spare

    def adopt_spares(self) -> None:
        """Take over the spares of the former owner; what is unusable goes."""
        for name in sorted(self._disk.list(self._directory)):
            if not name.startswith(_SPARE):
                continue
            path = os.path.join(self._directory, name)
            number = name.removeprefix(_SPARE)
            spare = SegmentFile.open(self._disk, path) if number.isdigit() else None
            if spare is not None and spare.size == self._spare_bytes:
                self._spares.append(spare)
                self._spare_number = max(self._spare_number, int(number))
            else:
                self._disk.unlink(path)

    # Append; the engine's lock is held

    def begin_segment(
        self,
        snapshot: bytes,
        *,
        boot_id: str,
        boot_ms: int,
        now_ms: int,
        body_length: int = 1,
    ) -> None:
        """From the next record on a new segment, made of a spare that `body_length` fits into."""
        spare = self._spare_for(body_length, len(snapshot))
        assert spare is not None, "has_room was not asked"
        self._spares.remove(spare)
        header = encode_header(
            Header(
                id=self._tail_id + 1,
                epoch=self._epoch,
                salt=secrets.randbits(32) | 1,
                first_lsn=self.next_lsn,
                previous_crc=self._crc,
                boot_id=boot_id,
                boot_ms=boot_ms,
                now_ms=now_ms,
                log_id=self._log_id,
                snapshot=snapshot,
            )
        )
        self._buffer.append(_Begin(spare, header))
        self._files.put(header.id, spare)
        self._tail_id = header.id
        self._tail_offset = header.size
        self._tail = spare
        self._tail_first_lsn = header.first_lsn
        self._salt = header.salt
        self._crc = header.crc
        self.sizes[header.id] = header.size

    def resume_after(self, segment: int, lsn: int, crc: int) -> None:
        """The place where the next segment links on: the last record that counts."""
        self._tail_id = segment
        self.next_lsn = lsn + 1
        self._crc = crc
        self.written_lsn = self.durable_lsn = lsn

    def append(self, body: bytes) -> Place:
        """Put a record into the buffer; it fits (see `fits`)."""
        lsn, offset, segment = self.next_lsn, self._tail_offset, self._tail_id
        frame, self._crc = encode_frame(body, lsn, self._salt, self._crc, self.durable_lsn)
        self._buffer.append((frame, offset, lsn))
        self._tail_offset = self.sizes[segment] = offset + len(frame)
        self.next_lsn = lsn + 1
        return Place(segment, offset + HEADER_BYTES, lsn)

    @property
    def tail_is_empty(self) -> bool:
        """No record went into the tail segment yet."""
        return self._tail_first_lsn == self.next_lsn

    # Write and sync; the engine's lock is not held

    @property
    def broken(self) -> bool:
        """A write or sync of this thread was cut short. Asked after an exception."""
        return threading.get_ident() in (self._writing, self._syncing)

    def write(self, upto_lsn: int) -> None:
        """Hand everything up to this record, at least, to the operating system."""
        if self.written_lsn >= upto_lsn:
            return
        with self._write_lock:
            if self.written_lsn < upto_lsn:
                self._write_buffer()

    def flush(self) -> None:
        """Hand over the whole buffer, a begun segment without records included."""
        with self._write_lock:
            self._write_buffer()

    def _write_buffer(self) -> None:
        # Caller holds _write_lock. Whatever interrupts this, KeyboardInterrupt included, leaves `_writing` set: some of
        # the frames may be in the file and some not, and the buffer has forgotten them.
        if self._writing:
            raise OSError("an earlier write of the log failed")
        self._writing = threading.get_ident()
        buffer = self._buffer
        frames: list[_Frame] = []
        begun: _Begin | None = None
        while buffer:
            item = buffer.popleft()
            if type(item) is tuple:
                frames.append(item)
                continue
            assert isinstance(item, _Begin)
            self._write_frames(frames)
            frames = []
            self._publish(begun)
            self._begin(item)
            begun = item
        self._write_frames(frames)
        self._publish(begun)
        self._writing = 0

    def _write_frames(self, frames: list[_Frame]) -> None:
        """Neighbours, in one system call."""
        if not frames:
            return
        data, start, lsn = frames[0]
        if len(frames) > 1:
            lsn = frames[-1][2]
            data = b"".join([frame[0] for frame in frames])
        assert self._file is not None
        self._written_to = end = self._file.write(data, start)
        self.records += len(frames)
        self.bytes_written += end - start
        self.written_lsn = lsn

    def _begin(self, item: _Begin) -> None:
        # A segment is begun only when all before it is on disk: its header testifies that.
        old = self._file
        if old is not None:
            old.check()
            self._disk.fdatasync(old.fd)
            self.syncs += 1
            self.durable_lsn = max(self.durable_lsn, item.header.first_lsn - 1)
            old.truncate(self._written_to)
        item.file.write_header(item.header)
        self._file = item.file
        self._written_to = item.header.size

    def _publish(self, begun: _Begin | None) -> None:
        # Caller holds _write_lock. The frames of the same buffer are in the file before it gets its name: what a
        # recovery writes again must not be cut off by a header that stands alone.
        if begun is not None:
            path = self._files.path(begun.header.id)
            try:
                begun.file.publish(path)
            except OSError as error:
                if error.errno not in OUT_OF_DESCRIPTORS:
                    raise
                self._sync_names()  # all but this is done: nothing else of it opens a file
                begun.file.path = path
            self.syncs += 1

    def _sync_names(self) -> None:
        """Make the names in the directory durable. If the program has no descriptor left, a segment gives its own."""
        try:
            self._disk.sync_directory(self._directory)
        except OSError as error:
            if error.errno not in OUT_OF_DESCRIPTORS:
                raise
            self._files.shed()
            self._disk.sync_directory(self._directory)

    def sync(self) -> int:
        """Write the buffer and wait until it is on disk; the last durable lsn. One caller at a time (see group)."""
        with self._write_lock:
            self._write_buffer()
            file, lsn, jobs = self._file, self.written_lsn, self.jobs
            assert file is not None
        if lsn > self.durable_lsn:
            if self._syncing:
                raise OSError("an earlier sync of the log failed")
            file.check()  # else another file is synced, and this one said to be
            self._syncing = threading.get_ident()
            started = time.perf_counter()
            done: list[None] = []
            try:
                # One C call from the system call to the note of its success: a KeyboardInterrupt that waited for the
                # disk to answer is raised after both, and the log is as good as before.
                done.extend(map(self._disk.fdatasync, (file.fd,)))
            finally:
                if done:
                    self._syncing = 0
                    self.syncs += 1
                    self.durable_lsn = max(self.durable_lsn, lsn)
            self._write_mark()
            self.sync_seconds.observe(time.perf_counter() - started)
            self.sync_jobs.observe(jobs - self._jobs_synced)
            self._jobs_synced = jobs
        return self.durable_lsn

    def open_mark(self) -> None:
        """Make the mark file writable, so that a later sync needs no space for it."""
        path = os.path.join(self._directory, "mark")
        try:
            fd = self._disk.open(path, write=True)
        except FileNotFoundError:
            fd = self._disk.create(path)
        self._mark = OwnFile(self._disk, path, fd)
        self._write_mark()

    def _write_mark(self) -> None:
        assert self._mark is not None, "open_mark comes first"
        self._mark.check()
        write_all(self._disk, self._mark.fd, encode_mark(self._log_id, self.durable_lsn), 0)

    # Read and drop

    def read(self, segment: int, offset: int, length: int, crc: int) -> bytes | None:
        """A payload; None if its segment was dropped, so the caller must ask again where it is now.

        Raises CorruptLogError if it is not what was written.
        """
        try:
            file = self.open_segment(segment)
        except FileNotFoundError:
            return None
        return read_payload(file, offset, length, crc)

    def read_many(self, places: Sequence[tuple[int, int, int, int]]) -> list[bytes | None]:
        """Payloads of many places (segment, offset, length, crc), as `read` gives them one by one.

        Neighbours are read at once: a batch is one system call, not one a job.
        """
        found: list[bytes | None] = []
        while len(found) < len(places):
            segment, start, length, _ = places[len(found)]
            end, stretch = start + length, [places[len(found)]]
            for place in places[len(found) + 1 :]:
                gap = place[1] - end
                if place[0] != segment or not 0 <= gap <= READ_GAP_BYTES or end - start > READ_BYTES:
                    break
                end = place[1] + place[2]
                stretch.append(place)
            try:
                data = self.open_segment(segment).read(end - start, start)
            except FileNotFoundError:
                found += [None] * len(stretch)
                continue
            for place in stretch:
                _, offset, length, crc = place
                payload = data[offset - start : offset - start + length]
                whole = len(payload) == length and crc32c(payload) == crc
                found.append(payload if whole else self.read(*place))  # which says what is wrong
        return found

    def open_segment(self, segment: int) -> SegmentFile:
        """The open file of a segment. Raises FileNotFoundError if it was dropped."""
        return self._files.get(segment)

    def check(self) -> None:
        """Raises OSError if the program closed the files that are written to."""
        for file in (self._file, self._mark):
            if file is not None:
                file.check()

    def drop(self, upto: int) -> None:
        """Remove the segments up to this id, oldest first. That they are not needed is on disk already."""
        numbers = sorted(s for s in self.sizes if s <= upto)
        for number in numbers:
            with contextlib.suppress(FileNotFoundError):
                self._disk.unlink(self._files.path(number))
            self._files.forget(number)
            del self.sizes[number]
        if numbers:
            self._sync_names()

    def close(self) -> None:
        """Sync, give back the preallocated rest of the tail, close all files. Raises as `sync` does."""
        try:
            if self._file is not None:
                self.sync()
                self._file.truncate(self._written_to)
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Close all files as they are."""
        with self._spare_lock:
            self._closed = True
        self._files.close()
        begun = [item.file for item in self._buffer if isinstance(item, _Begin)]
        for file in [self._file, self._tail, *begun, *self._spares]:
            if file is not None:
                file.close()
        self._file = self._tail = None
        self._spares.clear()
        self._buffer.clear()
        mark, self._mark = self._mark, None
        if mark is not None:
            mark.close()

    def forked(self) -> None:
        """In the child: nothing is written any more, and the holders of the locks are not here."""
        self._disk.forked()
        self._write_lock, self._spare_lock = threading.Lock(), threading.Lock()
        self._files.forked()


def list_segments(disk: Disk, directory: str) -> list[int]:
    """Ids of the segment files in a directory, ascending."""
    return sorted(number for name in disk.list(directory) if (number := segment_id(name)) is not None)
