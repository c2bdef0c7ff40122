"""The log by itself: what was appended is on disk after a sync, space is taken ahead, a failure is for good."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from unittest import mock

import pytest
from crc32c import crc32c

from rivetq import CorruptLogError, DiskFullError
from rivetq.storage.disk import SystemDisk
from rivetq.storage.header import Header
from rivetq.storage.layout import list_segments, read_mark, segment_name
from rivetq.storage.log import READ_BYTES, READ_GAP_BYTES, Log
from rivetq.storage.record import frame_bytes
from rivetq.storage.segment import Scan, SegmentFile, read_header
from rivetq.storage.space import FIRST_BYTES, RESERVE_BYTES, STEP_BYTES

LOG_ID = bytes(range(16))
SEGMENT_BYTES = 1 << 16
SPARES = 1 + RESERVE_BYTES // SEGMENT_BYTES
"""How many small spares stand for one and the reserve."""
SNAPSHOT = b'{"snapshot":1}'


class Interrupted(BaseException):
    """What a signal handler raises in the middle of a call."""


class FaultyDisk(SystemDisk):
    """A real disk that notes its calls and fails at the named ones; `space` is what it still gives away."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.faults: dict[str, BaseException] = {}
        self.before: dict[str, Callable[[], None]] = {}
        self.space = 1 << 40

    def _note(self, name: str) -> None:
        self.before.get(name, lambda: None)()
        if name in self.faults:
            raise self.faults[name]
        self.done.append(name)

    def pwrite(self, fd: int, data: bytes, offset: int) -> int:  # type: ignore[override]  # a method for a builtin
        self._note("pwrite")
        return os.pwrite(fd, data, offset)

    def fdatasync(self, fd: int) -> None:  # type: ignore[override]  # a method in place of a builtin
        self._note("fdatasync")
        os.fsync(fd)

    def allocate(self, fd: int, offset: int, size: int) -> None:
        self._note("allocate")
        if size > self.space:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.space -= size
        super().allocate(fd, offset, size)

    def create(self, path: str) -> int:
        self._note("create")
        return super().create(path)

    def truncate(self, fd: int, size: int) -> None:
        self._note("truncate")
        super().truncate(fd, size)

    def rename(self, old: str, new: str) -> None:
        self._note(f"rename to {os.path.basename(new)}")
        super().rename(old, new)

    def unlink(self, path: str) -> None:
        self._note(f"unlink {os.path.basename(path)}")
        super().unlink(path)

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


def input_output_error() -> OSError:
    return OSError(errno.EIO, os.strerror(errno.EIO))


class Desk:
    """A directory, its disk, and the log in it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.disk = FaultyDisk()
        self.log = self.open()

    def open(self, segment_bytes: int = SEGMENT_BYTES, epoch: int = 1) -> Log:
        self.log = Log(self.disk, str(self.directory), log_id=LOG_ID, epoch=epoch, segment_bytes=segment_bytes)
        return self.log

    def begin(self, snapshot: bytes = SNAPSHOT, *, body_length: int = 1) -> None:
        if not self.log.space.has_room(body_length, len(snapshot), keep_reserve=False):
            self.log.space.make_room(body_length, len(snapshot), keep_reserve=False)
        self.log.begin_segment(
            snapshot, boot_id="boot", boot_ms=5, now_ms=7, body_length=body_length
        )  # fmt: skip

    def start(self, segment_bytes: int = SEGMENT_BYTES) -> Log:
        """As an opening does, up to the first record."""
        self.open(segment_bytes)
        self.begin()
        self.log.flush()
        self.log.open_mark()
        return self.log

    def path(self, number: int) -> Path:
        return self.directory / segment_name(number)

    def header(self, number: int) -> Header:
        return read_header(SegmentFile.open(SystemDisk(), str(self.path(number))))

    def bodies(self, number: int) -> list[bytes]:
        return [record.body for record in Scan(self.path(number).read_bytes(), self.header(number)).records()]

    def marked(self) -> int:
        return read_mark((self.directory / "mark").read_bytes(), LOG_ID)

    def files(self) -> set[str]:
        return {path.name for path in self.directory.iterdir()}


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


def fill(log: Log, body: bytes = b"x" * 4000) -> int:
    """Append while it fits; how many."""
    count = 0
    while log.space.fits(len(body)):
        log.append(body)
        count += 1
    return count


# -- append, write, sync


def test_what_was_synced_is_in_the_file_in_order(desk: Desk) -> None:
    log = desk.start()
    places = [log.append(body) for body in (b"a", b"bb", b"ccc")]
    assert [place.lsn for place in places] == [1, 2, 3]
    assert log.sync() == 3
    assert desk.bodies(1) == [b"a", b"bb", b"ccc"]
    assert (log.written_lsn, log.durable_lsn, log.next_lsn) == (3, 3, 4)


def test_a_place_tells_where_the_body_is(desk: Desk) -> None:
    log = desk.start()
    places = [(log.append(body), body) for body in (b"first", b"second")]
    log.write(2)
    for place, body in places:
        assert place.segment == 1
        assert log.read(place.segment, place.body_offset, len(body), crc32c(body)) == body


def test_appending_does_no_io(desk: Desk) -> None:
    log = desk.start()
    desk.disk.done.clear()
    log.append(b"a")
    log.space.fits(1)
    log.space.has_room(1, None, keep_reserve=True)
    assert desk.disk.done == []
    assert desk.bodies(1) == []


def test_writing_hands_over_and_does_not_wait(desk: Desk) -> None:
    log = desk.start()
    log.append(b"a")
    desk.disk.done.clear()
    log.write(1)
    assert desk.disk.done == ["pwrite"]
    assert (log.written_lsn, log.durable_lsn) == (1, 0)
    assert desk.bodies(1) == [b"a"]


def test_what_was_written_is_not_written_again(desk: Desk) -> None:
    log = desk.start()
    log.append(b"a")
    log.append(b"b")
    desk.disk.done.clear()
    log.write(1)
    assert desk.disk.done == ["pwrite"], "one for all that is in the buffer"
    log.write(2)
    assert desk.disk.done == ["pwrite"]


def test_a_writer_that_waited_for_another_finds_its_record_written(desk: Desk) -> None:
    log = desk.start()
    log.append(b"a")

    class Meanwhile:
        def __enter__(self) -> None:
            log.written_lsn = 1

        def __exit__(self, *_: object) -> None:
            log._write_lock = lock

    lock, log._write_lock = log._write_lock, Meanwhile()  # type: ignore[assignment]  # a lock that does something in between
    desk.disk.done.clear()
    log.write(1)
    assert desk.disk.done == []


def test_nothing_new_needs_no_sync(desk: Desk) -> None:
    log = desk.start()
    log.append(b"a")
    log.sync()
    desk.disk.done.clear()
    assert log.sync() == 1
    assert desk.disk.done == []


def test_the_mark_is_written_behind_each_sync_and_not_synced(desk: Desk) -> None:
    log = desk.start()
    assert desk.marked() == 0
    log.append(b"a")
    desk.disk.done.clear()
    log.sync()
    assert desk.disk.done == ["pwrite", "fdatasync", "pwrite"]
    assert desk.marked() == 1


def test_a_record_testifies_what_was_durable_when_it_was_appended(desk: Desk) -> None:
    log = desk.start()
    log.append(b"a")
    log.append(b"b")
    log.sync()
    log.append(b"c")
    log.flush()
    records = list(Scan(desk.path(1).read_bytes(), desk.header(1)).records())
    assert [record.frame.durable_lsn for record in records] == [0, 0, 2]


def test_counters_count_records_bytes_and_syncs(desk: Desk) -> None:
    log = desk.start()
    before = log.syncs
    log.append(b"a")
    log.append(b"b" * 100)
    log.sync()
    assert log.records == 2
    assert log.bytes_written == frame_bytes(1) + frame_bytes(100)
    assert log.syncs == before + 1
    assert log.sizes == {1: desk.header(1).size + log.bytes_written}


# -- segments


def test_a_segment_header_carries_what_was_said(desk: Desk) -> None:
    desk.start()
    header = desk.header(1)
    assert (header.id, header.epoch, header.first_lsn, header.log_id) == (1, 1, 1, LOG_ID)
    assert (header.boot_id, header.boot_ms, header.now_ms, header.snapshot) == ("boot", 5, 7, SNAPSHOT)


def test_a_segment_links_to_the_last_record_of_the_one_before(desk: Desk) -> None:
    log = desk.start()
    log.append(b"a")
    log.append(b"b")
    desk.begin()
    log.append(b"c")
    log.sync()
    scan = Scan(desk.path(1).read_bytes(), desk.header(1))
    assert [record.body for record in scan.records()] == [b"a", b"b"]
    assert desk.header(2).previous_crc == scan.last_crc
    assert desk.header(2).first_lsn == 3
    assert desk.bodies(2) == [b"c"]
    assert max(log.sizes) == 2


def test_a_segment_behind_an_empty_one_links_to_its_header(desk: Desk) -> None:
    log = desk.start()
    desk.begin()
    log.flush()
    assert desk.header(2).previous_crc == desk.header(1).crc
    assert desk.header(2).first_lsn == desk.header(1).first_lsn == 1


def test_each_segment_has_a_salt_of_its_own(desk: Desk) -> None:
    log = desk.start()
    for _ in range(5):
        desk.begin()
    log.flush()
    assert len({desk.header(n).salt for n in range(1, 7)}) == 6


def test_a_log_goes_on_behind_the_last_record_that_counts(desk: Desk) -> None:
    log = desk.open(epoch=9)
    log.resume_after(4, 17, 0xABCD)
    desk.begin()
    log.append(b"a")
    log.flush()
    header = desk.header(5)
    assert (header.id, header.first_lsn, header.previous_crc, header.epoch) == (5, 18, 0xABCD, 9)
    assert (log.durable_lsn, log.written_lsn) == (17, 18)


def test_a_tail_is_empty_until_its_first_record(desk: Desk) -> None:
    log = desk.start()
    assert log.tail_is_empty
    log.append(b"a")
    assert not log.tail_is_empty
    desk.begin()
    assert log.tail_is_empty


def test_all_before_a_segment_is_on_disk_before_it_has_its_name(desk: Desk) -> None:
    log = desk.start()
    log.append(b"a")
    desk.begin()
    log.append(b"b")
    desk.disk.done.clear()
    log.flush()
    assert desk.disk.done == [
        "pwrite", "fdatasync", "truncate",  # the old tail: whole, durable, and no longer than it is full
        "pwrite", "pwrite", "fdatasync", f"rename to {segment_name(2)}", "sync_directory",
    ]  # fmt: skip
    assert log.durable_lsn == 1
    assert desk.path(1).stat().st_size == log.sizes[1]


def test_what_a_recovery_writes_again_is_in_the_segment_before_it_has_its_name(desk: Desk) -> None:
    log = desk.open()
    desk.begin()
    log.append(b"again")

    def look() -> None:
        (spare,) = [path for path in desk.directory.iterdir() if path.name.startswith("spare")]
        header = read_header(SegmentFile.open(SystemDisk(), str(spare)))
        assert [record.body for record in Scan(spare.read_bytes(), header).records()] == [b"again"]

    desk.disk.before[f"rename to {segment_name(1)}"] = look
    log.flush()
    assert desk.bodies(1) == [b"again"]


def test_several_segments_in_one_buffer_are_written_in_order(desk: Desk) -> None:
    log = desk.open()
    for body in (b"a", b"b", b"c"):
        desk.begin()
        log.append(body)
    log.flush()
    assert [desk.bodies(n) for n in (1, 2, 3)] == [[b"a"], [b"b"], [b"c"]]
    renames = [name for name in desk.disk.done if name.startswith("rename to 0")]
    assert renames == [f"rename to {segment_name(n)}" for n in (1, 2, 3)]


def test_segments_are_listed_by_number(desk: Desk) -> None:
    for name in ("0000000000000010.log", "0000000000000009.log", "mark", "spare-3", "notes.log"):
        (desk.directory / name).touch()
    assert list_segments(SystemDisk(), str(desk.directory)) == [9, 10]
    assert list_segments(SystemDisk(), str(desk.directory / "none")) == []


# -- the mark


def mark_of(desk: Desk) -> bytes:
    log = desk.start()
    log.append(b"a")
    log.sync()
    return (desk.directory / "mark").read_bytes()


def test_a_mark_testifies_the_synced_lsn(desk: Desk) -> None:
    assert read_mark(mark_of(desk), LOG_ID) == 1


def test_a_damaged_missing_or_foreign_mark_testifies_nothing(desk: Desk) -> None:
    mark = mark_of(desk)
    assert read_mark(None, LOG_ID) == 0
    assert read_mark(mark, bytes(16)) == 0
    for end in range(len(mark)):
        assert read_mark(mark[:end], LOG_ID) == 0
    for bit in range(8 * len(mark)):
        rotten = bytearray(mark)
        rotten[bit // 8] ^= 1 << bit % 8
        assert read_mark(bytes(rotten), LOG_ID) == 0


def test_an_existing_mark_is_taken_over(desk: Desk) -> None:
    mark_of(desk)
    desk.log.close()
    log = desk.open(epoch=2)
    log.resume_after(1, 1, 0)
    desk.begin()
    log.flush()
    log.open_mark()
    assert desk.marked() == 1
    assert (desk.directory / "mark").stat().st_mode & 0o777 == 0o600


# -- room


def test_a_record_fits_up_to_the_last_byte_of_the_tail(desk: Desk) -> None:
    log = desk.start()
    left = SEGMENT_BYTES - desk.header(1).size - frame_bytes(0)
    assert log.space.fits(left)
    assert not log.space.fits(left + 1)
    log.append(b"x" * left)
    assert not log.space.fits(1)
    log.sync()
    assert len(desk.bodies(1)[0]) == left


def test_nothing_fits_before_there_is_a_segment(desk: Desk) -> None:
    log = desk.open()
    assert not log.space.fits(1)
    assert not log.space.has_room(1, None, keep_reserve=False)
    assert not log.space.has_room(1, 100, keep_reserve=False)


def test_enqueues_leave_the_reserve_and_others_may_use_it(desk: Desk) -> None:
    log = desk.start()
    assert log.space.has_room(1000, None, keep_reserve=False)
    assert not log.space.has_room(1000, None, keep_reserve=True), "no spare there yet"
    log.space.refill()
    assert log.space.has_room(1000, None, keep_reserve=True)


def test_the_reserve_counts_the_rest_of_the_tail_and_the_spares(desk: Desk) -> None:
    log = desk.start(1 << 20)
    desk.disk.space = FIRST_BYTES - 1
    with pytest.raises(DiskFullError):
        log.space.refill()
    left = FIRST_BYTES - log.space.tail_offset
    body = left - RESERVE_BYTES - frame_bytes(0)
    body -= body % 8
    assert log.space.has_room(body, None, keep_reserve=True)
    assert not log.space.has_room(body + 8, None, keep_reserve=True)
    assert log.space.has_room(body + 8, None, keep_reserve=False)


def test_room_for_a_record_in_a_new_segment_is_that_of_a_spare(desk: Desk) -> None:
    log = desk.start()
    assert not log.space.has_room(1, 100, keep_reserve=False)
    log.space.make_room(1, 100, keep_reserve=False)
    assert log.space.has_room(1, 100, keep_reserve=False)
    assert not log.space.has_room(SEGMENT_BYTES, 100, keep_reserve=False)
    assert not log.space.has_room(1, 100, keep_reserve=True)
    log.space.make_room(1, 100, keep_reserve=True)
    assert log.space.has_room(1, 100, keep_reserve=True)


def test_a_large_record_gets_a_segment_of_its_size(desk: Desk) -> None:
    log = desk.start()
    body = b"x" * (3 * SEGMENT_BYTES)
    assert not log.space.can_extend(len(body))
    desk.begin(body_length=len(body))
    assert log.space.fits(len(body))
    log.append(body)
    log.sync()
    assert desk.bodies(2) == [body]


def test_the_tail_grows_in_steps_up_to_the_size_of_a_segment(desk: Desk) -> None:
    log = desk.start(4 * FIRST_BYTES)
    sizes = {FIRST_BYTES}
    body = b"x" * 50_000
    while log.space.can_extend(len(body)):
        if not log.space.has_room(len(body), None, keep_reserve=False):
            log.space.make_room(len(body), None, keep_reserve=False)
        sizes.add(desk.path(1).stat().st_size)
        log.append(body)
    assert sorted(sizes) == [FIRST_BYTES, 2 * FIRST_BYTES, 4 * FIRST_BYTES]
    log.sync()
    assert len(desk.bodies(1)) == log.records


def test_a_record_larger_than_a_step_gets_what_it_needs(desk: Desk) -> None:
    log = desk.start(4 * STEP_BYTES)
    body_length = 2 * STEP_BYTES
    log.space.make_room(body_length, None, keep_reserve=False)
    assert log.space.fits(body_length)
    assert desk.path(1).stat().st_size < body_length + STEP_BYTES


def test_growing_where_it_fits_changes_nothing(desk: Desk) -> None:
    log = desk.start(4 * FIRST_BYTES)
    log.space.make_room(100, None, keep_reserve=False)
    assert desk.path(1).stat().st_size == FIRST_BYTES


def test_growing_before_there_is_a_segment_is_the_callers_next_question(desk: Desk) -> None:
    log = desk.open()
    log.space.make_room(100, None, keep_reserve=False)
    assert desk.files() == set()


def test_a_tail_that_cannot_grow_so_far_is_left_to_the_caller(desk: Desk) -> None:
    log = desk.start()
    log.space.make_room(2 * SEGMENT_BYTES, None, keep_reserve=True)
    assert not log.space.fits(2 * SEGMENT_BYTES)
    assert len(desk.files()) == 2, "no spare was made for it: the next try begins one of its size"


def test_room_with_the_reserve_makes_spares_beside_the_tail(desk: Desk) -> None:
    log = desk.start()
    log.space.make_room(100, None, keep_reserve=True)
    assert log.space.has_room(100, None, keep_reserve=True)
    assert any(name.startswith("spare-") for name in desk.files())


def test_a_refill_makes_spares_for_one_segment_and_the_reserve(desk: Desk) -> None:
    log = desk.start()
    assert log.space.is_wanted()
    log.space.refill()
    assert not log.space.is_wanted()
    assert desk.files() == {segment_name(1), "mark", *(f"spare-{n + 2}" for n in range(SPARES))}
    for n in range(SPARES):
        assert (desk.directory / f"spare-{n + 2}").stat().st_size == SEGMENT_BYTES


def test_a_refill_lengthens_a_tail_that_is_three_quarters_full(desk: Desk) -> None:
    log = desk.start(2 * FIRST_BYTES)
    log.space.refill()
    log.append(b"x" * (FIRST_BYTES * 3 // 4 - 1000))
    assert not log.space.is_wanted()
    log.append(b"x" * 2000)
    assert log.space.is_wanted()
    log.space.refill()
    assert desk.path(1).stat().st_size == 2 * FIRST_BYTES
    assert not log.space.is_wanted()
    fill(log)
    assert not log.space.is_wanted(), "a segment that has its size does not grow"


def test_a_refill_before_there_is_a_segment_makes_spares_alone(desk: Desk) -> None:
    log = desk.open()
    log.space.refill()
    assert len(desk.files()) == SPARES


def test_a_tail_that_is_gone_while_space_is_made_is_not_lengthened(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    log = desk.start()
    log.space.refill()
    answers = iter([True, False])
    monkeypatch.setattr(log.space, "is_wanted", lambda: next(answers))
    log.space.tail = None
    log.space.refill()
    assert desk.path(1).stat().st_size == SEGMENT_BYTES


def test_spares_are_used_oldest_first_and_made_under_a_name_of_their_own(desk: Desk) -> None:
    log = desk.open()
    log.space.refill()
    desk.begin()
    log.flush()
    assert "spare-1" not in desk.files()
    log.space.refill()
    assert f"spare-{SPARES + 1}" in desk.files()
    assert not any(name.endswith(".new") for name in desk.files())


# -- a full disk


def test_without_space_for_the_tail_the_next_try_begins_the_spare(desk: Desk) -> None:
    log = desk.start(4 * FIRST_BYTES)
    log.space.refill()
    fill(log)
    desk.disk.space = 0
    assert log.space.can_extend(4000)
    log.space.make_room(4000, None, keep_reserve=False)
    assert not log.space.can_extend(4000), "the caller comes back with a snapshot"
    assert log.space.has_room(4000, len(SNAPSHOT), keep_reserve=False)
    desk.begin()
    log.append(b"in the spare")
    log.sync()
    assert desk.bodies(2) == [b"in the spare"]


def test_a_full_disk_is_a_typed_error_that_names_the_directory(desk: Desk) -> None:
    log = desk.start()
    desk.disk.space = 0
    with pytest.raises(DiskFullError, match="no space for more of the log") as caught:
        log.space.make_room(100, len(SNAPSHOT), keep_reserve=False)
    assert caught.value.path == str(desk.directory)
    assert isinstance(caught.value.__cause__, OSError)
    assert not any(name.startswith("spare-") for name in desk.files())


def test_a_disk_that_stays_full_is_an_error_for_the_tail_too(desk: Desk) -> None:
    log = desk.start()
    desk.disk.space = 0
    log.space.make_room(100, None, keep_reserve=True)
    with pytest.raises(DiskFullError):
        log.space.make_room(100, None, keep_reserve=True)
    assert log.space.fits(100), "who may not be refused goes on"
    log.append(b"an ack")
    log.sync()
    assert desk.bodies(1) == [b"an ack"]


@pytest.mark.parametrize("by", ["make_room", "refill"])
def test_with_space_again_the_tail_grows_again(desk: Desk, by: str) -> None:
    log = desk.start(4 * FIRST_BYTES)
    fill(log)
    desk.disk.space = 0
    log.space.make_room(4000, None, keep_reserve=False)
    assert not log.space.can_extend(4000)
    desk.disk.space = 1 << 30
    if by == "refill":
        log.space.refill()
    else:
        log.space.make_room(4000, len(SNAPSHOT), keep_reserve=False)
    assert log.space.can_extend(4000)


def test_a_refill_without_space_says_so(desk: Desk) -> None:
    log = desk.start()
    desk.disk.space = SEGMENT_BYTES
    with pytest.raises(DiskFullError):
        log.space.refill()
    assert sum(name.startswith("spare-") for name in desk.files()) == 1, "what was made is kept"


# -- the spares of the former owner


def test_spares_are_adopted(desk: Desk) -> None:
    log = desk.open()
    log.space.refill()
    log.abandon()
    log = desk.open(epoch=2)
    log.space.adopt()
    assert not log.space.is_wanted()
    desk.disk.done.clear()
    desk.begin()
    log.flush()
    assert "allocate" not in desk.disk.done
    log.space.refill()
    assert f"spare-{SPARES + 1}" in desk.files(), "a new one gets a number that is free"


def test_unusable_spares_are_removed(desk: Desk) -> None:
    (desk.directory / "spare-1").write_bytes(bytes(SEGMENT_BYTES - 1))
    (desk.directory / "spare-2").write_bytes(bytes(SEGMENT_BYTES + 1))
    (desk.directory / "spare-3.new").write_bytes(bytes(SEGMENT_BYTES))
    (desk.directory / "spare-4").write_bytes(bytes(SEGMENT_BYTES))
    (desk.directory / "mark").touch()
    log = desk.open()
    log.space.adopt()
    assert desk.files() == {"spare-4", "mark"}


def test_a_spare_that_was_begun_and_never_named_is_used_again(desk: Desk) -> None:
    """Its old header and frames are overwritten, or are of another salt."""
    log = desk.open()
    desk.begin()
    log.append(b"old")
    log.append(b"older" * 1000)
    desk.disk.faults[f"rename to {segment_name(1)}"] = input_output_error()
    with pytest.raises(OSError, match="Input/output"):
        log.flush()
    log.abandon()
    desk.disk.faults.clear()
    log = desk.open()
    log.space.adopt()
    desk.begin()
    log.append(b"new")
    log.flush()
    assert desk.files() == {segment_name(1)}
    assert desk.bodies(1) == [b"new"]


# -- reading and dropping


def test_a_payload_that_is_not_what_was_written_is_damage(desk: Desk) -> None:
    log = desk.start()
    place = log.append(b"payload")
    log.sync()
    with desk.path(1).open("r+b") as file:
        file.seek(place.body_offset + 3)
        file.write(b"L")
    with pytest.raises(CorruptLogError, match="payload of 7 bytes") as caught:
        log.read(1, place.body_offset, 7, crc32c(b"payload"))
    assert (caught.value.file, caught.value.offset) == (str(desk.path(1)), place.body_offset)


def test_a_payload_behind_the_end_of_the_file_is_damage(desk: Desk) -> None:
    log = desk.start()
    place = log.append(b"payload")
    log.sync()
    os.truncate(desk.path(1), place.body_offset + 3)
    with pytest.raises(CorruptLogError, match="payload"):
        log.read(1, place.body_offset, 7, crc32c(b"payload"))


def appended(log: Log, bodies: Iterable[bytes]) -> list[tuple[int, int, int, int]]:
    """Records, and where each body is: segment, offset, length, crc."""
    places = [(log.append(body), body) for body in bodies]
    return [(place.segment, place.body_offset, len(body), crc32c(body)) for place, body in places]


def test_neighbouring_payloads_are_read_at_once_and_each_is_what_was_written(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = desk.start()
    bodies = [b"%d" % n * 20 for n in range(50)]
    places = appended(log, bodies)
    log.sync()
    reads: list[int] = []
    read = SegmentFile.read
    monkeypatch.setattr(SegmentFile, "read", lambda file, size, at: reads.append(size) or read(file, size, at))
    assert log.read_many(places) == bodies
    assert len(reads) == 1
    assert log.read_many([]) == []


@pytest.mark.parametrize("order", ["backwards", "far apart", "too much", "two segments"])
def test_payloads_that_are_no_neighbours_are_read_one_after_another(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, order: str
) -> None:
    log = desk.start(segment_bytes=1 << 20)
    bodies = [b"a" * 50, b"b" * 50]
    if order == "far apart":
        bodies.insert(1, bytes(READ_GAP_BYTES + 1))
    if order == "too much":
        bodies[0] = b"c" * (READ_BYTES + 1)
    places = appended(log, bodies[:1])
    if order == "two segments":
        desk.begin()
    places += appended(log, bodies[1:])
    log.sync()
    wanted = [0, len(bodies) - 1]
    if order == "backwards":
        wanted.reverse()
    reads: list[int] = []
    read = SegmentFile.read
    monkeypatch.setattr(SegmentFile, "read", lambda file, size, at: reads.append(size) or read(file, size, at))
    assert log.read_many([places[i] for i in wanted]) == [bodies[i] for i in wanted]
    assert reads == [len(bodies[i]) for i in wanted]


def test_one_damaged_payload_among_neighbours_is_named(desk: Desk) -> None:
    log = desk.start()
    places = appended(log, [b"first", b"second", b"third"])
    log.sync()
    with desk.path(1).open("r+b") as file:
        file.seek(places[1][1])
        file.write(b"S")
    with pytest.raises(CorruptLogError, match="payload of 6 bytes") as caught:
        log.read_many(places)
    assert caught.value.offset == places[1][1]


def test_of_many_payloads_those_of_a_dropped_segment_are_none(desk: Desk) -> None:
    log = desk.start()
    places = appended(log, [b"gone", b""])
    desk.begin()
    places += appended(log, [b"here", b""])
    log.sync()
    log.drop(1)
    assert log.read_many(places) == [None, None, b"here", b""]


def test_dropped_segments_are_removed_oldest_first_and_durably(desk: Desk) -> None:
    log = desk.start()
    for _ in range(3):
        log.append(b"x")
        desk.begin()
    log.flush()
    desk.disk.done.clear()
    log.drop(2)
    assert desk.disk.done == [f"unlink {segment_name(1)}", f"unlink {segment_name(2)}", "sync_directory"]
    assert list(log.sizes) == [3, 4]
    assert list_segments(desk.disk, str(desk.directory)) == [3, 4]


def test_dropping_nothing_does_nothing(desk: Desk) -> None:
    log = desk.start()
    desk.disk.done.clear()
    log.drop(0)
    assert desk.disk.done == []


def test_dropping_a_segment_that_is_gone_is_fine(desk: Desk) -> None:
    log = desk.start()
    desk.begin()
    log.flush()
    desk.path(1).unlink()
    log.drop(1)
    assert list(log.sizes) == [2]


def test_a_payload_of_a_dropped_segment_is_none(desk: Desk) -> None:
    log = desk.start()
    place = log.append(b"payload")
    desk.begin()
    log.flush()
    log.drop(1)
    assert log.read(1, place.body_offset, 7, crc32c(b"payload")) is None


def test_a_reader_that_holds_a_dropped_segment_reads_on(desk: Desk) -> None:
    log = desk.start()
    place = log.append(b"payload")
    desk.begin()
    log.flush()
    file = log.open_segment(1)
    log.drop(1)
    assert file.read(7, place.body_offset) == b"payload"


def test_a_sealed_segment_is_opened_when_it_is_read_and_once(desk: Desk) -> None:
    log = desk.start()
    place = log.append(b"payload")
    log.close()
    log = desk.open(epoch=2)
    assert log.read(1, place.body_offset, 7, crc32c(b"payload")) == b"payload"
    assert log.open_segment(1) is log.open_segment(1)


# -- failures


@pytest.mark.parametrize("error", [OSError, Interrupted, KeyboardInterrupt])
def test_a_write_that_was_cut_short_breaks_the_log_for_good(desk: Desk, error: type[BaseException]) -> None:
    log = desk.start()
    log.append(b"a")
    assert not log.broken
    desk.disk.faults["pwrite"] = error(errno.EIO, "broken")
    with pytest.raises(error):
        log.write(1)
    assert log.broken
    desk.disk.faults.clear()
    for call in (lambda: log.write(1), log.flush, log.sync):
        with pytest.raises(OSError, match="earlier write"):
            call()
    assert (log.written_lsn, log.durable_lsn) == (0, 0)


@pytest.mark.parametrize("error", [OSError, Interrupted, KeyboardInterrupt])
def test_a_failed_sync_breaks_the_log_and_is_never_repeated(desk: Desk, error: type[BaseException]) -> None:
    log = desk.start()
    log.append(b"a")
    desk.disk.faults["fdatasync"] = error(errno.EIO, "broken")
    with pytest.raises(error):
        log.sync()
    assert log.broken
    desk.disk.faults.clear()
    desk.disk.done.clear()
    with pytest.raises(OSError, match="earlier sync"):
        log.sync()
    assert "fdatasync" not in desk.disk.done
    assert log.durable_lsn == 0
    assert desk.marked() == 0


def test_without_the_note_of_its_success_a_sync_counts_for_nothing(desk: Desk) -> None:
    """The call is made inside of `map`, which takes a StopIteration for its end."""
    log = desk.start()
    log.append(b"a")
    desk.disk.faults["fdatasync"] = StopIteration()
    assert log.sync() == 0
    assert log.broken
    assert desk.marked() == 0


def test_a_mark_that_cannot_be_written_is_an_error_and_the_record_is_durable(desk: Desk) -> None:
    log = desk.start()
    log.append(b"a")
    log.write(1)
    desk.disk.faults["pwrite"] = input_output_error()
    with pytest.raises(OSError, match="Input/output"):
        log.sync()
    assert not log.broken
    assert log.durable_lsn == 1


@pytest.mark.parametrize("step", ["pwrite", "fdatasync", "truncate", f"rename to {segment_name(2)}", "sync_directory"])
def test_a_segment_that_cannot_be_begun_breaks_the_log(desk: Desk, step: str) -> None:
    log = desk.start()
    log.append(b"a")
    desk.begin()
    log.append(b"b")
    desk.disk.faults[step] = input_output_error()
    with pytest.raises(OSError, match="Input/output"):
        log.flush()
    assert log.broken
    desk.disk.faults.clear()
    with pytest.raises(OSError, match="earlier write"):
        log.sync()


# -- the end


def test_closing_syncs_and_gives_back_the_rest_of_the_tail(desk: Desk) -> None:
    log = desk.start()
    log.space.refill()
    log.append(b"a")
    log.close()
    assert desk.bodies(1) == [b"a"]
    assert desk.marked() == 1
    assert desk.path(1).stat().st_size == log.sizes[1]
    assert open_files(desk.directory) == []


def test_closing_a_log_that_was_never_begun_does_nothing(desk: Desk) -> None:
    desk.open().close()
    assert desk.files() == set()


def test_a_close_that_fails_lets_go_of_all_files(desk: Desk) -> None:
    log = desk.start()
    log.append(b"a")
    desk.disk.faults["fdatasync"] = input_output_error()
    with pytest.raises(OSError, match="Input/output"):
        log.close()
    desk.disk.faults.clear()  # its traceback holds on to them
    assert open_files(desk.directory) == []


def test_an_abandoned_log_leaves_the_files_as_they_are(desk: Desk) -> None:
    log = desk.start()
    log.append(b"written")
    log.flush()
    log.append(b"in the buffer")
    log.abandon()
    log.abandon()
    assert desk.bodies(1) == [b"written"]
    assert desk.path(1).stat().st_size == SEGMENT_BYTES
    assert open_files(desk.directory) == []


def test_names_that_cannot_be_synced_are_an_error_and_a_forked_log_writes_nothing() -> None:
    disk = mock.Mock()
    disk.sync_directory.side_effect = OSError(5, "EIO")
    log = Log(disk, "directory", log_id=b"0" * 16, epoch=1, segment_bytes=65_536)
    with pytest.raises(OSError, match="EIO"):
        log._sync_names()
    locks = log._write_lock, log.space._lock
    log.forked()
    disk.forked.assert_called_once_with()
    assert (log._write_lock, log.space._lock) != locks
