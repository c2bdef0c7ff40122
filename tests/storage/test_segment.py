"""One segment: its header, its frames in a row, its file."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path

import attrs
import pytest
from crc32c import crc32c

from rivetq import CorruptLogError, FormatError
from rivetq.storage.disk import SystemDisk
from rivetq.storage.header import MAGIC, VERSION, Header, decode_header, encode_header, header_bytes
from rivetq.storage.layout import segment_id, segment_name
from rivetq.storage.record import ALIGN, HEADER_BYTES, encode_frame, frame_bytes, mask
from rivetq.storage.segment import FIRST_ZEROS_BYTES, ZERO_AHEAD_BYTES, ZERO_STEP_BYTES, Scan, SegmentFile, read_header

SALT = 0x5EED5A17
HEADER = encode_header(
    Header(
        id=3,
        epoch=2,
        salt=SALT,
        first_lsn=11,
        previous_crc=0xABCD,
        boot_id="0b0f3e1c-9a3d-4a86-a5ee-6f7d3c1f0a11",
        boot_ms=5_000,
        now_ms=1_767_225_600_000,
        log_id=bytes(range(16)),
        snapshot=b'{"snapshot":1}',
    )
)


def frames_of(*bodies: bytes, durable_lsn: int = 10, salt: int = SALT) -> list[bytes]:
    """Chained frames as the segment of HEADER holds them."""
    frames, crc = [], HEADER.crc
    for lsn, body in enumerate(bodies, HEADER.first_lsn):
        frame, crc = encode_frame(body, lsn, salt, crc, durable_lsn)
        frames.append(frame)
    return frames


def scan_of(*frames: bytes, zeros: int = 512) -> Scan:
    return Scan(header_bytes(HEADER) + b"".join(frames) + bytes(zeros), HEADER)


def bodies_in(scan: Scan, upto_lsn: int | None = None) -> list[bytes]:
    return [record.body for record in scan.records(upto_lsn)]


def flip_byte(data: bytes, at: int) -> bytes:
    return data[:at] + bytes((data[at] ^ 0xFF,)) + data[at + 1 :]


class Recorder(SystemDisk):
    """Notes what changes the disk, in order; fails where told."""

    def __init__(self, fails_at: str | None = None) -> None:
        self.done: list[tuple[str, int, int]] = []  # what, where, how many bytes
        self._fails_at = fails_at

    def _note(self, name: str, at: int = 0, size: int = 0) -> None:
        if name == self._fails_at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.done.append((name, at, size))

    def names(self) -> list[str]:
        return [name for name, _, _ in self.done]

    def pwrite(self, fd: int, data: bytes, offset: int) -> int:  # type: ignore[override]  # a method for a builtin
        self._note("zeros" if not any(data) else "pwrite", offset, len(data))
        return os.pwrite(fd, data, offset)

    def fdatasync(self, fd: int) -> None:  # type: ignore[override]  # a method in place of a builtin
        self._note("fdatasync")
        os.fsync(fd)

    def allocate(self, fd: int, offset: int, size: int) -> None:
        self._note("allocate", offset, size)
        super().allocate(fd, offset, size)

    def rename(self, old: str, new: str) -> None:
        self._note("rename")
        super().rename(old, new)

    def sync_directory(self, path: str) -> None:
        self._note("sync_directory")
        super().sync_directory(path)


def open_files(directory: Path) -> list[str]:
    """What this process holds open below a directory."""
    found = []
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            name = os.readlink(f"/proc/self/fd/{fd}")
            if name.startswith(f"{directory}"):
                found.append(name)
    return found


@pytest.fixture
def spare(tmp_path: Path) -> Callable[..., SegmentFile]:
    def create(size: int = 1 << 17, disk: SystemDisk | None = None) -> SegmentFile:
        return SegmentFile.create(disk or SystemDisk(), str(tmp_path / "spare"), size)

    return create


# -- the header


def test_a_header_comes_back_as_it_was_written() -> None:
    data = header_bytes(HEADER)
    assert decode_header(data, "file") == HEADER
    assert decode_header(data + bytes(4096), "file") == HEADER
    assert HEADER.size == len(data)


@pytest.mark.parametrize("length", range(9))
def test_a_header_is_padded_with_zeros_to_eight_bytes(length: int) -> None:
    header = encode_header(attrs.evolve(HEADER, snapshot=b"x" * length))
    assert header.size % ALIGN == 0
    assert decode_header(header_bytes(header), "file").snapshot == b"x" * length


def test_the_layout_of_the_header_is_the_documented_one() -> None:
    data = header_bytes(HEADER)
    assert data[:8] == b"RivetQ\0\n"
    numbers = [(8, 4, 2), (12, 4, len(data)), (20, 4, 2), (24, 4, SALT), (28, 4, 0xABCD)]
    numbers += [(32, 8, 3), (40, 8, 11), (48, 8, 5_000), (56, 8, 1_767_225_600_000)]
    for at, size, value in numbers:
        assert int.from_bytes(data[at : at + size], "little") == value, f"{size} bytes at {at}"
    assert data[64:80] == bytes(range(16))
    assert data[80:120].rstrip(b"\0").decode() == HEADER.boot_id
    assert data[120:].rstrip(b"\0") == b'{"snapshot":1}'
    unsigned = data[:16] + bytes(4) + data[20:]
    assert int.from_bytes(data[16:20], "little") == mask(crc32c(unsigned[20:], crc32c(unsigned[:20]))) == HEADER.crc


def test_one_flipped_bit_in_the_header_is_damage_at_its_start() -> None:
    data = header_bytes(HEADER) + bytes(4096)
    for bit in range(8 * HEADER.size):
        rotten = bytearray(data)
        rotten[bit // 8] ^= 1 << bit % 8
        with pytest.raises(CorruptLogError, match="segment header") as caught:
            decode_header(bytes(rotten), "the/file")
        assert (caught.value.file, caught.value.offset) == ("the/file", 0)


def test_a_cut_header_is_damage() -> None:
    data = header_bytes(HEADER)
    for end in range(len(data)):
        with pytest.raises(CorruptLogError, match="header") as caught:
            decode_header(data[:end], "the/file")
        assert caught.value.file == "the/file"
        assert caught.value.offset == (end if end < 20 else 0)


@pytest.mark.parametrize("data", [b"", bytes(20), bytes(4096), b"x" * 4096])
def test_what_was_never_a_segment_is_damage(data: bytes) -> None:
    with pytest.raises(CorruptLogError, match="nothing was changed"):
        decode_header(data, "the/file")


def test_an_intact_header_of_another_version_names_both_versions() -> None:
    data = bytearray(header_bytes(HEADER))
    data[8:12] = (VERSION + 1).to_bytes(4, "little")
    data[16:20] = bytes(4)
    data[16:20] = mask(crc32c(data)).to_bytes(4, "little")
    with pytest.raises(FormatError, match=f"the/file: format version {VERSION + 1}, .* reads version {VERSION}"):
        decode_header(bytes(data), "the/file")


def test_a_long_boot_id_is_cut() -> None:
    header = encode_header(attrs.evolve(HEADER, boot_id="x" * 50))
    assert decode_header(header_bytes(header), "file").boot_id == "x" * 40


# -- the frames


def test_frames_are_read_in_order_up_to_the_zeros() -> None:
    frames = frames_of(b"a", b"bb", b"c" * 100)
    scan = scan_of(*frames)
    records = list(scan.records())
    assert [record.body for record in records] == [b"a", b"bb", b"c" * 100]
    assert [record.frame.lsn for record in records] == [11, 12, 13]
    assert records[1].at == HEADER.size + len(frames[0])
    assert records[1].body_offset == records[1].at + HEADER_BYTES
    assert scan.end == HEADER.size + sum(map(len, frames))
    assert scan.next_lsn == 14
    assert scan.last_crc == records[-1].frame.crc


def test_a_segment_without_frames_ends_behind_its_header() -> None:
    scan = scan_of()
    assert bodies_in(scan) == []
    assert (scan.end, scan.next_lsn, scan.last_crc) == (HEADER.size, 11, HEADER.crc)
    assert scan.later_witness_lsn() == 10, "a segment is begun when all before it is on disk"


def test_a_scan_stops_where_it_is_told_to() -> None:
    scan = scan_of(*frames_of(b"a", b"b", b"c"))
    assert bodies_in(scan, upto_lsn=12) == [b"a", b"b"]
    assert scan.next_lsn == 13


def test_a_torn_tail_ends_the_scan() -> None:
    first, second = frames_of(b"first", b"second")
    for end in range(len(second) - (len(second) - HEADER_BYTES - len(b"second"))):
        scan = scan_of(first, second[:end])
        assert bodies_in(scan) == [b"first"], f"cut at {end}"
        assert scan.end == HEADER.size + len(first)


def test_a_frame_whose_padding_was_cut_off_is_whole_and_ends_with_the_file() -> None:
    frame = frames_of(b"x" * 41)[0]
    for missing in range(8):
        scan = scan_of(frame[: len(frame) - missing], zeros=0)
        assert bodies_in(scan) == [b"x" * 41]
        assert scan.end == HEADER.size + len(frame)
        assert scan.end_in_file == HEADER.size + len(frame) - missing
    scan = scan_of(frame)
    bodies_in(scan)
    assert scan.end_in_file == scan.end


def test_a_damaged_frame_ends_the_scan_though_good_ones_follow() -> None:
    frames = frames_of(b"a", b"b", b"c")
    scan = scan_of(frames[0], flip_byte(frames[1], HEADER_BYTES), frames[2])
    assert bodies_in(scan) == [b"a"]


def test_a_frame_out_of_order_ends_the_scan() -> None:
    frames = frames_of(b"a", b"b", b"c")
    assert bodies_in(scan_of(frames[0], frames[2], frames[1])) == [b"a"]
    assert bodies_in(scan_of(frames[1])) == []
    assert bodies_in(scan_of(frames[0], frames[0])) == [b"a"]


def test_a_frame_of_another_history_ends_the_scan() -> None:
    """Right number, right salt, right checksum: but the record before it was another one."""
    ours, other = frames_of(b"a", b"b"), frames_of(b"A", b"b")
    assert bodies_in(scan_of(ours[0], other[1])) == [b"a"]
    assert bodies_in(scan_of(other[0], other[1])) == [b"A", b"b"]


def test_bytes_of_an_earlier_file_are_no_frames() -> None:
    assert bodies_in(scan_of(*frames_of(b"a", b"b", salt=SALT ^ 1))) == []


def test_the_first_frame_chains_to_the_header() -> None:
    frame = encode_frame(b"a", HEADER.first_lsn, SALT, HEADER.crc ^ 1, 0)[0]
    assert bodies_in(scan_of(frame)) == []


# -- witnesses


def test_every_frame_testifies_how_far_the_log_was_synced() -> None:
    frames, crc = [], HEADER.crc
    for lsn, durable_lsn in ((11, 10), (12, 11), (13, 11)):
        frame, crc = encode_frame(b"body", lsn, SALT, crc, durable_lsn)
        frames.append(frame)
    scan = scan_of(*frames)
    bodies_in(scan)
    assert scan.witness_lsn == 11
    assert scan.later_witness_lsn() == 11


@pytest.mark.parametrize("length", [1, 6, 8, 23, 200])
def test_a_frame_behind_a_damaged_one_testifies(length: int) -> None:
    first, crc = encode_frame(b"x" * length, 11, SALT, HEADER.crc, 10)
    second, _ = encode_frame(b"second", 12, SALT, crc, 11)
    scan = scan_of(bytes(len(first)), second)
    assert bodies_in(scan) == []
    assert scan.witness_lsn == 10
    assert scan.later_witness_lsn() == 11


def test_the_best_of_several_witnesses_counts() -> None:
    crc, frames = HEADER.crc, []
    for lsn, durable_lsn in ((11, 10), (12, 11), (13, 12), (14, 11)):
        frame, crc = encode_frame(b"body", lsn, SALT, crc, durable_lsn)
        frames.append(frame)
    scan = scan_of(bytes(len(frames[0])), *frames[1:])
    assert bodies_in(scan) == []
    assert scan.later_witness_lsn() == 12


def test_the_salt_in_a_payload_is_no_witness() -> None:
    salt = SALT.to_bytes(4, "little")
    forged = encode_frame(b"forged", 99, SALT, 0, 98)[0]
    carrier, crc = encode_frame(b"\0" * 3 + forged + salt * 9, 11, SALT, HEADER.crc, 10)
    last, _ = encode_frame(salt * 5, 12, SALT, crc, 10)
    scan = scan_of(flip_byte(carrier, 0), last)
    assert bodies_in(scan) == []
    assert scan.later_witness_lsn() == 10, "it is not where a frame can begin"


def test_a_damaged_frame_is_no_witness() -> None:
    first, crc = encode_frame(b"first", 11, SALT, HEADER.crc, 10)
    second, _ = encode_frame(b"second", 12, SALT, crc, 11)
    scan = scan_of(bytes(len(first)), flip_byte(second, 24))
    assert bodies_in(scan) == []
    assert scan.later_witness_lsn() == 10


# -- names


def test_a_segment_is_named_after_its_number() -> None:
    assert segment_name(1) == "0000000000000001.log"
    assert segment_id(segment_name(1234567)) == 1234567


@pytest.mark.parametrize(
    "name",
    [
        "mark", "spare-1", "1.log", "0000000000000001", "0000000000000001.log.tmp", "0000000000000001.lo",
        "00000000000000001.log", "000000000000000x.log", "-000000000000001.log", "\u0660" * 16 + ".log", ".log", "",
    ],
)  # fmt: skip
def test_other_files_are_no_segments(name: str) -> None:
    assert segment_id(name) is None


# -- the file


def test_a_spare_is_allocated_and_synced_before_it_serves(tmp_path: Path) -> None:
    disk = Recorder()
    file = SegmentFile.create(disk, str(tmp_path / "spare"), 1 << 18)
    assert disk.done == [("allocate", 0, 1 << 18), ("zeros", 0, FIRST_ZEROS_BYTES), ("fdatasync", 0, 0)]
    assert file.size == (tmp_path / "spare").stat().st_size == 1 << 18
    assert stat.S_IMODE((tmp_path / "spare").stat().st_mode) == 0o600


@pytest.mark.parametrize("step", ["allocate", "zeros", "fdatasync"])
def test_a_spare_that_cannot_be_made_leaves_nothing_behind(tmp_path: Path, step: str) -> None:
    with pytest.raises(OSError, match="No space"):
        SegmentFile.create(Recorder(step), str(tmp_path / "spare"), 1 << 18)
    assert list(tmp_path.iterdir()) == []
    assert open_files(tmp_path) == []


def test_a_segment_gets_its_name_when_it_is_on_disk(tmp_path: Path, spare: Callable[..., SegmentFile]) -> None:
    disk = Recorder()
    file = spare(disk=disk)
    disk.done.clear()
    file.write_header(HEADER)
    file.write(frames_of(b"carried over")[0], HEADER.size)
    file.publish(str(tmp_path / segment_name(3)))
    assert disk.names() == ["pwrite", "pwrite", "fdatasync", "rename", "sync_directory"]
    assert [path.name for path in tmp_path.iterdir()] == [segment_name(3)]
    assert file.path == str(tmp_path / segment_name(3))
    assert read_header(file) == HEADER
    scan = Scan(file.read_all(), HEADER)
    assert bodies_in(scan) == [b"carried over"]


def test_an_existing_segment_is_opened_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(header_bytes(HEADER) + b"rest")
    file = SegmentFile.open(SystemDisk(), str(tmp_path / "file"))
    assert file.size == HEADER.size + 4
    assert file.read(4, HEADER.size) == b"rest"
    assert file.read_all() == header_bytes(HEADER) + b"rest"
    with pytest.raises(FileNotFoundError):
        SegmentFile.open(SystemDisk(), str(tmp_path / "none"))


@pytest.mark.parametrize("length", [10, (1 << 16) - 200, 1 << 16, 200_000])
def test_a_header_of_any_length_is_read_whole(tmp_path: Path, length: int) -> None:
    header = encode_header(attrs.evolve(HEADER, snapshot=b"x" * length))
    for rest in (b"", bytes(500)):
        (tmp_path / "file").write_bytes(header_bytes(header) + rest)
        assert read_header(SegmentFile.open(SystemDisk(), str(tmp_path / "file"))) == header


@pytest.mark.parametrize("size", [0, 10, 19, 20, 100, 70_000])
def test_a_cut_file_has_no_header(tmp_path: Path, size: int) -> None:
    header = encode_header(attrs.evolve(HEADER, snapshot=b"x" * 100_000))
    (tmp_path / "file").write_bytes(header_bytes(header)[:size])
    with pytest.raises(CorruptLogError) as caught:
        read_header(SegmentFile.open(SystemDisk(), str(tmp_path / "file")))
    assert caught.value.file == str(tmp_path / "file")


def test_a_damaged_size_asks_for_no_more_than_the_file_has(tmp_path: Path) -> None:
    data = bytearray(header_bytes(HEADER))
    data[12:16] = b"\xff" * 4
    (tmp_path / "file").write_bytes(data)
    with pytest.raises(CorruptLogError):
        read_header(SegmentFile.open(SystemDisk(), str(tmp_path / "file")))
    assert data[:8] == MAGIC


def test_zeros_go_ahead_of_the_frames(spare: Callable[..., SegmentFile]) -> None:
    disk = Recorder()
    size = FIRST_ZEROS_BYTES + 2 * ZERO_AHEAD_BYTES
    file = spare(size, disk)
    disk.done.clear()

    file.write(b"x" * 64, FIRST_ZEROS_BYTES - 64 - ALIGN)
    assert disk.names() == ["pwrite"], "a length of 0 still stands behind the frame"

    disk.done.clear()
    file.write(b"x" * 64, FIRST_ZEROS_BYTES - 64)
    steps = range(FIRST_ZEROS_BYTES, FIRST_ZEROS_BYTES + ZERO_AHEAD_BYTES, ZERO_STEP_BYTES)
    assert disk.done[1:] == [("zeros", start, ZERO_STEP_BYTES) for start in steps]

    disk.done.clear()
    end = FIRST_ZEROS_BYTES + ZERO_AHEAD_BYTES + 1000
    file.write(b"x" * 2000, end - 2000)
    assert disk.done[1] == ("zeros", end, ZERO_STEP_BYTES)
    assert disk.done[-1] == ("zeros", size - (ZERO_STEP_BYTES - 1000), ZERO_STEP_BYTES - 1000), "not beyond the file"
    assert sum(length for _, _, length in disk.done[1:]) == ZERO_AHEAD_BYTES - 1000

    disk.done.clear()
    file.write(b"x" * 64, size - 64)
    assert disk.names() == ["pwrite"]
    assert file.size == size
    assert len(file.read_all()) == size


def test_old_bytes_ahead_of_a_reused_spare_are_overwritten(tmp_path: Path) -> None:
    """A spare of the former owner counts as zeroed where its maker surely wrote zeros, not farther."""
    (tmp_path / "spare").write_bytes(bytes(FIRST_ZEROS_BYTES) + b"old" * 1000)
    file = SegmentFile.open(SystemDisk(), str(tmp_path / "spare"))
    file.write(b"x" * 8, FIRST_ZEROS_BYTES - 8)
    assert file.read_all() == bytes(FIRST_ZEROS_BYTES - 8) + b"x" * 8 + bytes(3000)


def test_a_long_header_counts_as_written(spare: Callable[..., SegmentFile]) -> None:
    file = spare(1 << 18)
    header = encode_header(attrs.evolve(HEADER, snapshot=b"x" * 100_000))
    file.write_header(header)
    file.write(b"x" * 8, header.size)
    assert read_header(file) == header


def test_a_file_grows_and_gives_back(spare: Callable[..., SegmentFile]) -> None:
    disk = Recorder()
    file = spare(1 << 17, disk)
    disk.done.clear()
    file.extend(1 << 18)
    assert disk.done == [("allocate", 1 << 17, 1 << 17)]
    file.extend(1 << 17)
    assert file.size == 1 << 18, "never smaller"
    file.truncate(1000)
    assert file.size == len(file.read_all()) == 1000


def test_the_descriptor_goes_with_the_last_reference(tmp_path: Path, spare: Callable[..., SegmentFile]) -> None:
    file = spare()
    reader = file
    assert len(open_files(tmp_path)) == 1
    del file
    assert reader.read(1, 0) == b"\0"
    reader.__del__()
    assert open_files(tmp_path) == []
    other = (tmp_path / "other").open("wb")
    del reader
    other.close()  # a reused number was not closed again


def test_a_frame_fits_exactly_where_its_length_says(spare: Callable[..., SegmentFile]) -> None:
    frame = frames_of(b"x" * 100)[0]
    assert frame_bytes(100) == len(frame)
    file = spare()
    file.write_header(HEADER)
    file.write(frame, HEADER.size)
    scan = Scan(file.read(HEADER.size + len(frame), 0), HEADER)
    assert bodies_in(scan) == [b"x" * 100]
