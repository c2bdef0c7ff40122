"""The directory of segments: append, write, sync, read, drop.

Two locks matter, and neither guards the caller's data:

- `append`, `begin_segment` and the room questions are called with the engine's lock held and do no I/O: they put frames
  into a buffer and say where they will be on disk.
- `write` takes the buffer to the operating system, in order, under `_write_lock`; `sync` waits for the disk outside of
  it, so that others write meanwhile. One thread at a time syncs (see group).

Failure is for good: after an exception while writing or syncing, `broken` is True in that thread, the next write or
sync raises, and no call may report success again.
An fsync is never repeated: on ext4 and xfs the second one succeeds although the data of the first is gone.

The mark is written after each sync, but is not synced itself: it is a witness that may be old, but is never wrong.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import threading
import time
from collections import deque
from collections.abc import Sequence

import attrs
from crc32c import crc32c

from ..histogram import Tally, doubling
from ..machine.snapshot import Place
from .disk import Disk, OwnFile, write_all
from .header import Header, corrupt, encode_header
from .layout import MARK, encode_mark
from .record import HEADER_BYTES, encode_frame
from .segment import OPEN_SEGMENTS, OUT_OF_DESCRIPTORS, SegmentFile, SegmentFiles
from .space import Space

READ_BYTES, READ_GAP_BYTES = 1 << 18, 1 << 12
"""Payloads that lie at most READ_GAP_BYTES apart are read at once, up to READ_BYTES."""


def read_payload(file: SegmentFile, offset: int, length: int, crc: int) -> bytes:
    """Bytes of a segment that were written as a payload. Raises CorruptLogError if these are others."""
    data = file.read(length, offset)
    if len(data) != length or crc32c(data) != crc:
        file.check()  # not damaged, if the program opened another file in its place
        raise corrupt(file.path, offset, f"a payload of {length} bytes does not match its checksum", consequence="")
    return data


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
        self.log_id = log_id
        self._epoch = epoch
        self.space = Space(disk, directory, segment_bytes)
        # Guarded by the engine's lock: the place of the next frame.
        self._tail_id = 0
        self._salt = 0
        self._crc = 0
        self._tail_first_lsn = 1
        self.next_lsn = 1
        self.sizes: dict[int, int] = {}  # bytes used per segment
        # Filled under the engine's lock, emptied under _write_lock; deque operations are atomic.
        self._buffer: deque[_Begin | _Frame] = deque()
        self._write_lock = threading.Lock()  # guards _file, _written and the order of writes
        self._file: SegmentFile | None = None
        self._written_to = 0
        self.written_lsn = 0
        self.durable_lsn = 0
        # Set before the call and cleared after it: any exception in between leaves them set.
        self._writing = 0  # the thread that does it
        self._syncing = 0
        self._mark: OwnFile | None = None
        # The tail and the spares have other references, too, so they stay open when this cache lets files go.
        self._files = SegmentFiles(disk, directory, OPEN_SEGMENTS)
        self.records = self.syncs = self.bytes_written = 0
        self.jobs = 0  # in all records so far; counted by the engine
        self._jobs_synced = 0
        self.sync_seconds, self.sync_jobs = Tally(doubling(50e-6, 16)), Tally(doubling(1, 14))

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
        """Begin a new segment with the next record. It is made of a spare that `body_length` fits into."""
        spare = self.space.take(body_length, len(snapshot))
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
                log_id=self.log_id,
                snapshot=snapshot,
            )
        )
        self._buffer.append(_Begin(spare, header))
        self._files.put(header.id, spare)
        self._tail_id = header.id
        self.space.tail, self.space.tail_offset = spare, header.size
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
        space = self.space
        lsn, offset, segment = self.next_lsn, space.tail_offset, self._tail_id
        frame, self._crc = encode_frame(body, lsn, self._salt, self._crc, self.durable_lsn)
        self._buffer.append((frame, offset, lsn))
        space.tail_offset = self.sizes[segment] = offset + len(frame)
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
        """Hand over the whole buffer, including a begun segment without records."""
        with self._write_lock:
            self._write_buffer()

    def _write_buffer(self) -> None:
        # Caller holds _write_lock. Any exception in here, KeyboardInterrupt included, leaves `_writing` set: some of
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
        """Write neighbouring frames, in one system call."""
        if not frames:
            return
        data, start, lsn = frames[0]
        assert lsn == self.written_lsn + 1, f"record {lsn} is written after record {self.written_lsn}"
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
        # Caller holds _write_lock. The frames of the same buffer are in the file before it gets its name: a header
        # without frames must not cut off the records that a recovery writes again.
        if begun is not None:
            path = self._files.path(begun.header.id)
            try:
                begun.file.publish(path)
            except OSError as error:
                if error.errno not in OUT_OF_DESCRIPTORS:
                    raise
                self._sync_names()  # the last step, and the only one that opens a file
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
        path = os.path.join(self._directory, MARK)
        try:
            fd = self._disk.open(path, write=True)
        except FileNotFoundError:
            fd = self._disk.create(path)
        self._mark = OwnFile(self._disk, path, fd)
        self._write_mark()

    def _write_mark(self) -> None:
        assert self._mark is not None, "open_mark comes first"
        self._mark.check()
        write_all(self._disk, self._mark.fd, encode_mark(self.log_id, self.durable_lsn), 0)

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
        """Remove the segments up to this id, oldest first. A record on disk already says that they are not needed."""
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
        self.space.close()
        self._files.close()
        begun = [item.file for item in self._buffer if isinstance(item, _Begin)]
        for file in [self._file, self.space.tail, *begun]:
            if file is not None:
                file.close()
        self._file = self.space.tail = None
        self._buffer.clear()
        mark, self._mark = self._mark, None
        if mark is not None:
            mark.close()

    def forked(self) -> None:
        """In the child: nothing is written any more, and the holders of the locks do not exist."""
        self._disk.forked()
        self._write_lock = threading.Lock()
        self.space.forked()
        self._files.forked()
