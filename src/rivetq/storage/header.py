"""The header, with which a segment begins.

Format version 2. To change it: add the new version beside the old reader, raise VERSION, describe both in
docs/file-format.md, keep a directory of the old version under tests/ and prove that it opens.

Header, little-endian, padded with zeros to 8 bytes::

    magic 8 bytes   "RivetQ\\0\\n"
    version u32     kept in place by every version, as are magic, size and crc
    size u32        bytes of the whole header, padding included
    crc u32         masked CRC32C of magic, version, size and of all behind this field
    epoch u32       counts the openings of the directory
    salt u32        random, in every frame of this segment
    previous_crc u32      link: crc of the last record of the previous segment, or of its header if it has none
    id u64          1, 2, 3 ...
    first_lsn u64   the number of the first record here. The previous segment counts up to the one before; what lies
                    behind that was cut off by a recovery
    boot_ms u64     the boot-time clock when this was written
    now_ms u64      the queue's time line at that moment
    log id 16 bytes random, the same in all segments of a directory
    boot id 40 bytes      text, padded with zeros
    snapshot        JSON: counters and sessions, as of first_lsn

The first frame chains to the header's crc.
"""

from __future__ import annotations

import struct

import attrs
from crc32c import crc32c

from ..errors import CorruptLogError, FormatError
from .record import ALIGN, mask

VERSION = 2
UNRELEASED = 1
"""The version of the time before the first release; it is not read any more."""
MAGIC = b"RivetQ\0\n"
_PREFIX = struct.Struct("<8sIII")
_FIXED = struct.Struct("<IIIQQQQ16s40s")
HEADER_SALT_AT = _PREFIX.size + 4


@attrs.frozen(kw_only=True)
class Header:
    """The decoded header of a segment."""

    id: int
    epoch: int
    salt: int
    first_lsn: int
    previous_crc: int
    boot_id: str
    boot_ms: int
    now_ms: int
    log_id: bytes
    snapshot: bytes
    crc: int = 0
    size: int = 0


def encode_header(header: Header) -> Header:
    """Fills in crc and size."""
    return attrs.evolve(header, crc=_crc_and_bytes(header)[0], size=len(header_bytes(header)))


def header_bytes(header: Header) -> bytes:
    """The header as it is on disk."""
    return _crc_and_bytes(header)[1]


def _crc_and_bytes(header: Header) -> tuple[int, bytes]:
    fixed = _FIXED.pack(
        header.epoch,
        header.salt,
        header.previous_crc,
        header.id,
        header.first_lsn,
        header.boot_ms,
        header.now_ms,
        header.log_id,
        header.boot_id.encode()[:40],
    )
    rest = fixed + header.snapshot
    size = -(-(_PREFIX.size + len(rest)) // ALIGN) * ALIGN
    rest += bytes(size - _PREFIX.size - len(rest))
    prefix = _PREFIX.pack(MAGIC, VERSION, size, 0)
    crc = mask(crc32c(rest, crc32c(prefix)))
    return crc, _PREFIX.pack(MAGIC, VERSION, size, crc) + rest


def decode_header(data: bytes, path: str) -> Header:
    """The header at the start of a segment's bytes. Raises CorruptLogError, or FormatError for another version."""
    if len(data) < _PREFIX.size:
        raise corrupt(path, len(data), "the file ends inside the segment header")
    magic, version, size, crc = _PREFIX.unpack_from(data)
    intact = (
        magic == MAGIC
        and _PREFIX.size <= size <= len(data)
        and mask(crc32c(data[_PREFIX.size : size], crc32c(_PREFIX.pack(magic, version, size, 0)))) == crc
    )
    if not intact:
        raise corrupt(path, 0, "the segment header is damaged or cut short")
    if version <= UNRELEASED:
        raise FormatError(
            f"{path}: format version {version}, of the time before the first release; this RivetQ reads version "
            f"{VERSION}. Let the RivetQ that wrote it finish its jobs, then begin a new directory"
        )
    if version != VERSION:
        raise FormatError(
            f"{path}: format version {version}, this RivetQ reads version {VERSION}; open it with the RivetQ that "
            f"wrote it, or a newer one"
        )
    fixed = _FIXED.unpack_from(data, _PREFIX.size)
    epoch, salt, previous_crc, number, first_lsn, boot_ms, now_ms, log_id, boot_id = fixed
    return Header(
        id=number,
        epoch=epoch,
        salt=salt,
        first_lsn=first_lsn,
        previous_crc=previous_crc,
        boot_id=boot_id.rstrip(b"\0").decode("utf-8", "replace"),
        boot_ms=boot_ms,
        now_ms=now_ms,
        log_id=log_id,
        snapshot=data[_PREFIX.size + _FIXED.size : size].rstrip(b"\0"),
        crc=crc,
        size=size,
    )


def corrupt(path: str, offset: int, what: str, consequence: str = "; nothing was changed") -> CorruptLogError:
    """The error for damage at a byte."""
    return CorruptLogError(
        f"{path}: damaged at byte {offset}: {what}{consequence}. Restore the directory from a backup, or save what can "
        f"be read: python -m rivetq salvage DIRECTORY OUT",
        file=path,
        offset=offset,
    )
