"""One framed, checksummed record <-> bytes.

Frame = 32-byte header + body, padded with zeros to 8 bytes::

    crc u32      masked CRC32C of everything behind this field, header and body (padding excluded)
    length u32   bytes of the body, never 0
    lsn u64      number of the record: 1, 2, 3 ... over the whole log, with no gap
    salt u32     of the segment: bytes that an earlier file left on the disk never pass for a frame of this one
    previous u32 the crc field of the record before: the chain
    durable u64  the lsn up to which the log was known to be on disk when this was written: a witness
    body

A header of zeros is "end", never a frame: length 0 is not written, and crc32c(b"") is 0, which the mask turns into
something else. The chain is by content (the previous frame's checksum is a field), so that a frame behind a damaged
one can still be recognized and testify how far the log had been synced.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from crc32c import crc32c

HEADER = struct.Struct("<IIQIIQ")
HEADER_BYTES = HEADER.size
SALT_AT = 16
"""Where the salt is in a header: what a search for frames behind a damaged one looks for."""
MAX_BODY_BYTES = 2**30
ALIGN = 8
_CRC, _TAIL = struct.Struct("<I"), struct.Struct("<IQIIQ")  # the header, in two parts
_PADDING = [bytes(n) for n in range(ALIGN)]  # the header itself fills whole units


class Frame(NamedTuple):
    """A frame that passed its checksum."""

    crc: int
    length: int
    lsn: int
    previous: int
    durable_lsn: int


def mask(crc: int) -> int:
    """A CRC that is stored beside data which itself contains CRCs is masked (LevelDB, log_format.md)."""
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def frame_bytes(length: int) -> int:
    """Bytes on disk of a frame with a body of `length`."""
    return -(-(HEADER_BYTES + length) // ALIGN) * ALIGN


def encode_frame(body: bytes, lsn: int, salt: int, previous: int, durable_lsn: int) -> tuple[bytes, int]:
    """The frame and its crc, which the next frame chains to."""
    tail = _TAIL.pack(len(body), lsn, salt, previous, durable_lsn)
    crc = mask(crc32c(body, crc32c(tail)))
    return b"".join((_CRC.pack(crc), tail, body, _PADDING[-len(body) % ALIGN])), crc


def decode_frame(data: bytes, at: int, salt: int) -> Frame | None:
    """The frame that begins at `at` of `data`, or None if there is no whole, intact one of this salt."""
    if at + HEADER_BYTES > len(data):
        return None
    crc, length, lsn, found_salt, previous, durable_lsn = HEADER.unpack_from(data, at)
    end = at + HEADER_BYTES + length
    if found_salt != salt or not 0 < length <= MAX_BODY_BYTES or end > len(data):
        return None
    if mask(crc32c(memoryview(data)[at + 4 : end])) != crc:
        return None
    return Frame(crc, length, lsn, previous, durable_lsn)


def body_of(data: bytes, at: int, frame: Frame) -> bytes:
    """The body of the frame that begins at `at`."""
    return data[at + HEADER_BYTES : at + HEADER_BYTES + frame.length]
