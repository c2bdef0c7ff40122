"""One segment: a file of the log. Header, then frames (see record), then zeros."""

from __future__ import annotations

import errno
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from typing import NamedTuple

from .disk import Disk, OwnFile, write_all
from .header import Header, decode_header, header_bytes
from .layout import segment_name
from .record import ALIGN, HEADER_BYTES, SALT_AT, Frame, body_of, decode_frame, frame_bytes

ZERO_AHEAD_BYTES = 1 << 20
"""Zeros are written this far before the frames: a sync that need not turn unwritten extents into written ones, nor
extend the file, costs about 0.7 of one that must."""
ZERO_STEP_BYTES = 1 << 16
"""In pieces: the kernel keeps what one large write brought in one large folio of its cache, and syncing a few bytes of
such a folio costs a fifth more."""
FIRST_ZEROS_BYTES = 1 << 16  # at creation; small, so that opening a directory costs little
OPEN_SEGMENTS, OPEN_TO_READ = 40, 12
"""Segments that a log, and a reader of a directory, keep open at most. With the tail, the spares and those that threads
have in hand a broker stays below 64 descriptors of segments, also while it makes a backup."""
OUT_OF_DESCRIPTORS = {errno.EMFILE, errno.ENFILE}


class Record(NamedTuple):
    """A frame that was read, with its place in the file."""

    at: int
    frame: Frame
    body: bytes

    @property
    def body_offset(self) -> int:
        return self.at + HEADER_BYTES


class Scan:
    """Reads the frames of a segment in order; afterwards tells where and how the reading ended."""

    def __init__(self, data: bytes, header: Header) -> None:
        self._data = data
        self._header = header
        self.end = header.size  # offset behind the last good frame
        self.last_crc = header.crc
        self.next_lsn = header.first_lsn
        self.witness_lsn = header.first_lsn - 1  # a segment is begun only when all before it is on disk

    def records(self, upto_lsn: int | None = None) -> Iterator[Record]:
        """Good frames in a row, up to `upto_lsn` or to the first place where there is none."""
        while upto_lsn is None or self.next_lsn <= upto_lsn:
            at = self.end
            frame = decode_frame(self._data, at, self._header.salt)
            if frame is None or frame.lsn != self.next_lsn or frame.previous != self.last_crc:
                return
            self.end = at + frame_bytes(frame.length)
            self.last_crc = frame.crc
            self.next_lsn += 1
            self.witness_lsn = max(self.witness_lsn, frame.durable_lsn)
            yield Record(at, frame, body_of(self._data, at, frame))

    @property
    def end_in_file(self) -> int:
        """`end`, or the end of the file if that was cut inside the padding of the last frame."""
        return min(self.end, len(self._data))

    def later_witness_lsn(self) -> int:
        """How far the log had been synced by the testimony of whole frames behind the end of the good ones."""
        lsn = self.witness_lsn
        salt = self._header.salt.to_bytes(4, "little")
        at = self._data.find(salt, self.end)
        while at >= 0:
            frame = decode_frame(self._data, at - SALT_AT, self._header.salt) if at % ALIGN == SALT_AT % ALIGN else None
            if frame is not None:
                lsn = max(lsn, frame.durable_lsn)
            at = self._data.find(salt, at + 1)
        return lsn


class SegmentFile(OwnFile):
    """An open segment."""

    def __init__(self, disk: Disk, path: str, fd: int, size: int, zeroed: int) -> None:
        super().__init__(disk, path, fd)
        self._zeroed = zeroed  # zeros or frames were written up to here
        self.size = size

    @classmethod
    def create(cls, disk: Disk, path: str, size: int) -> SegmentFile:
        """A preallocated file of `size` bytes without a header, durable but for its name.

        On an error (no space, say) nothing stays behind.
        """
        made = cls(disk, path, disk.create(path), size, min(FIRST_ZEROS_BYTES, size))
        try:
            disk.allocate(made.fd, 0, size)
            made.check()
            write_all(disk, made.fd, bytes(made._zeroed), 0)
            made.check()
            disk.fdatasync(made.fd)
        except BaseException:
            made.close()
            disk.unlink(path)
            raise
        return made

    @classmethod
    def open(cls, disk: Disk, path: str) -> SegmentFile:
        """An existing one, for reading, or a spare for its first use."""
        try:
            fd = disk.open(path, write=True)
        except OSError as error:
            if error.errno not in (errno.EROFS, errno.EACCES):
                raise
            fd = disk.open(path)  # for looking only
        size = disk.size(fd)
        return cls(disk, path, fd, size, min(FIRST_ZEROS_BYTES, size))

    def read(self, size: int, offset: int) -> bytes:
        return self._disk.pread(self._fd, size, offset)

    def read_all(self) -> bytes:
        return self.read(self._disk.size(self._fd), 0)

    def write_header(self, header: Header) -> None:
        """Make the spare a segment but for its name."""
        self.check()
        write_all(self._disk, self._fd, header_bytes(header), 0)
        self._zeroed = max(self._zeroed, header.size)

    def publish(self, final_path: str) -> None:
        """Sync what is in it, then give it its name, durably: a segment that has its name is whole up to here."""
        self.check()
        self._disk.fdatasync(self._fd)
        self._disk.rename(self.path, final_path)
        self._disk.sync_directory(os.path.dirname(final_path))
        self.path = final_path

    def write(self, data: bytes, offset: int) -> int:
        """Write frames; zeros go ahead of them in steps. Returns where they end."""
        assert offset % ALIGN == 0, f"a frame at byte {offset}, which is no multiple of {ALIGN}"
        self.check()
        end = offset + len(data)
        written = offset + self._disk.pwrite(self._fd, data, offset)
        if written < end:
            write_all(self._disk, self._fd, data[written - offset :], written)
        if end > self._zeroed - ALIGN and self._zeroed < self.size:
            at = max(end, self._zeroed)
            self._zeroed = min(self.size, at + ZERO_AHEAD_BYTES)
            for start in range(at, self._zeroed, ZERO_STEP_BYTES):
                write_all(self._disk, self._fd, bytes(min(ZERO_STEP_BYTES, self._zeroed - start)), start)
        return end

    def extend(self, size: int) -> None:
        """Preallocate further, to `size` bytes in all. Raises OSError if there is no space."""
        if size > self.size:
            self.check()
            try:
                self._disk.allocate(self._fd, self.size, size - self.size)
            except OSError:
                self._disk.truncate(self._fd, self.size)  # give back what it got before the space ended
                raise
            self.size = size

    def truncate(self, size: int) -> None:
        """Give back what was preallocated behind `size`."""
        self.check()
        self._disk.truncate(self._fd, size)
        self.size = size


class SegmentFiles:
    """The segments of a directory, opened when they are read.

    Of more than `most` the one that was not used for longest is let go; a reader that has it in hand reads on, since
    its descriptor is closed with the last reference. Thread-safe.
    """

    def __init__(self, disk: Disk, directory: str, most: int = OPEN_TO_READ) -> None:
        self._disk = disk
        self._directory = directory
        self._most = most
        # Guards the files below. It is held while one is opened, so that two readers do not open it twice.
        self._lock = threading.Lock()
        self._files: OrderedDict[int, SegmentFile] = OrderedDict()  # the one used last is the last

    def path(self, number: int) -> str:
        return os.path.join(self._directory, segment_name(number))

    def get(self, number: int) -> SegmentFile:
        """An open file. Raises FileNotFoundError if there is none, and OSError as the system does."""
        with self._lock:
            file = self._files.get(number)
            if file is not None:
                self._files.move_to_end(number)
                return file
            try:
                file = SegmentFile.open(self._disk, self.path(number))
            except OSError as error:
                # The program has used up its descriptors. It can do without those that are kept here.
                if error.errno not in OUT_OF_DESCRIPTORS or not self._files:
                    raise
                self._files.clear()
                file = SegmentFile.open(self._disk, self.path(number))
            self._keep(number, file)
            return file

    def put(self, number: int, file: SegmentFile) -> None:
        """Keep a file that is open already."""
        with self._lock:
            self._keep(number, file)

    def _keep(self, number: int, file: SegmentFile) -> None:
        # Caller holds _lock.
        self._files[number] = file
        while len(self._files) > self._most:
            self._files.popitem(last=False)

    def forget(self, number: int) -> None:
        """Let go of a file, if it is kept."""
        with self._lock:
            self._files.pop(number, None)

    def shed(self) -> None:
        """Let go of all of them: the program needs descriptors."""
        with self._lock:
            self._files.clear()

    def forked(self) -> None:
        """In the child: the holder of the lock is not here."""
        self._lock = threading.Lock()

    def close(self) -> None:
        """Close what is kept, and keep none from now on."""
        with self._lock:
            self._most = 0
            files = list(self._files.values())
            self._files.clear()
        for file in files:
            file.close()  # an error that is kept holds the frames of its traceback, and what is in them


def read_header(file: SegmentFile) -> Header:
    """The header of an open segment. Raises CorruptLogError or FormatError."""
    data = file.read(1 << 16, 0)
    size = int.from_bytes(data[12:16], "little")
    if len(data) < size <= file.size:  # many queues make a long snapshot
        data = file.read(size, 0)
    return decode_header(data, file.path)
