"""Which files a data directory has, and how they are called.

::

    LOCK               who has it open; see lock
    log/               the truth
        0000000000000001.log ...   segments, by their ids
        spare-1 ...    preallocated, no header yet
        mark           the last synced lsn
    index/             the cache: an LMDB environment
        data.mdb
        lock.mdb       LMDB's own
        manifest       what checks data.mdb
    ahead              tokens of jobs that were leased in advance and have not begun
"""

from __future__ import annotations

import contextlib
import os
import struct

from crc32c import crc32c

from .disk import Disk

LOCK, LOG, INDEX, AHEAD = "LOCK", "log", "index", "ahead"
MARK, SPARE = "mark", "spare-"
DATA, MANIFEST = "data.mdb", "manifest"
_MARK = struct.Struct("<16sQ")


def segment_name(number: int) -> str:
    return f"{number:016d}.log"


def segment_id(name: str) -> int | None:
    """The id in a segment's file name, None for any other file."""
    stem, dot, suffix = name.partition(".")
    return int(stem) if dot and suffix == "log" and len(stem) == 16 and stem.isascii() and stem.isdigit() else None


def list_segments(disk: Disk, directory: str) -> list[int]:
    """Ids of the segment files in a directory, ascending."""
    return sorted(number for name in disk.list(directory) if (number := segment_id(name)) is not None)


def log_bytes(disk: Disk, directory: str) -> int:
    """Bytes of all segments of a data directory."""
    log, size = os.path.join(directory, LOG), 0
    for number in list_segments(disk, log):
        with contextlib.suppress(FileNotFoundError):  # dropped meanwhile
            size += os.path.getsize(os.path.join(log, segment_name(number)))
    return size


def read_mark(data: bytes | None, log_id: bytes) -> int:
    """The lsn that the mark file testifies; 0 if it is missing, damaged or another log's."""
    if data is None or len(data) < _MARK.size + 4:
        return 0
    found_id, lsn = _MARK.unpack_from(data)
    crc = int.from_bytes(data[_MARK.size : _MARK.size + 4], "little")
    return int(lsn) if found_id == log_id and crc == crc32c(data[: _MARK.size]) else 0


def encode_mark(log_id: bytes, lsn: int) -> bytes:
    """What the mark file holds when this record is on disk."""
    data = _MARK.pack(log_id, lsn)
    return data + crc32c(data).to_bytes(4, "little")
