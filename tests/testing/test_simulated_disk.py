"""The simulated disk: what is durable, what a power cut may leave, and that one seed gives one state."""

from __future__ import annotations

import errno
import itertools
from collections.abc import Callable
from pathlib import Path

import pytest

from rivetq.testing.disk import SECTOR_BYTES, WAYS, PowerCut, SimulatedDisk

SEEDS = range(300)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    path = tmp_path / "root"
    path.mkdir()
    return path


@pytest.fixture
def states(tmp_path: Path) -> Callable[[SimulatedDisk], list[dict[str, bytes]]]:
    """What the disk may hold after a power cut now: the files of each seed's state."""

    def after(disk: SimulatedDisk) -> list[dict[str, bytes]]:
        found = []
        for seed in SEEDS:
            target = tmp_path / "after" / str(disk.operations) / str(seed)
            target.mkdir(parents=True)
            disk.crash(target, seed)
            files = (path for path in target.rglob("*") if path.is_file())
            found.append({str(path.relative_to(target)): path.read_bytes() for path in files})
        return found

    return after


States = Callable[[SimulatedDisk], list[dict[str, bytes]]]


def durable(disk: SimulatedDisk, root: Path, name: str, data: bytes) -> int:
    fd = disk.create(str(root / name))
    disk.pwrite(fd, data, 0)
    disk.fdatasync(fd)
    disk.sync_directory(str(root))
    return fd


def test_what_is_there_at_the_beginning_is_durable(root: Path, states: States) -> None:
    (root / "sub").mkdir()
    (root / "sub" / "file").write_bytes(b"old")
    disk = SimulatedDisk(root)
    assert all(state == {"sub/file": b"old"} for state in states(disk))


def test_synced_data_under_a_synced_name_survives(root: Path, states: States) -> None:
    disk = SimulatedDisk(root)
    durable(disk, root, "file", b"data")
    assert all(state == {"file": b"data"} for state in states(disk))


def test_a_name_that_was_not_synced_may_be_missing_though_its_data_was(root: Path, states: States) -> None:
    disk = SimulatedDisk(root)
    disk.fdatasync(disk.create(str(root / "file")))
    assert {tuple(state) for state in states(disk)} == {(), ("file",)}


def test_data_that_was_not_synced_may_be_there_or_not_or_torn_or_zeros(root: Path, states: States) -> None:
    disk = SimulatedDisk(root)
    fd = durable(disk, root, "file", b"a" * 1024)
    disk.pwrite(fd, b"b" * 1024, 0)
    disk.pwrite(fd, b"c" * 600, 1024)
    found = {state["file"] for state in states(disk)}
    old, new, more = b"a" * 1024, b"b" * 1024, b"c" * 600
    assert {old, new, new + more, old + more} <= found, "none, all, a beginning, only the second"
    assert b"a" * 512 + b"b" * 512 in found, "torn between two sectors"
    assert old + bytes(600) in found, "the size without the data"
    assert all(len(set(data[at : at + SECTOR_BYTES])) == 1 for data in found for at in range(0, 1024, SECTOR_BYTES))


def test_a_rename_is_one_step_and_needs_a_sync_of_its_directory(root: Path, states: States) -> None:
    disk = SimulatedDisk(root)
    durable(disk, root, "new", b"new")
    durable(disk, root, "name", b"old")
    disk.rename(str(root / "new"), str(root / "name"))
    either = ({"new": b"new", "name": b"old"}, {"name": b"new"})
    found = states(disk)
    assert all(state in either for state in found)
    assert all(state in found for state in either)
    disk.sync_directory(str(root))
    assert all(state == {"name": b"new"} for state in states(disk))


def test_an_unlink_may_come_undone_until_its_directory_is_synced(root: Path, states: States) -> None:
    disk = SimulatedDisk(root)
    durable(disk, root, "file", b"data")
    disk.unlink(str(root / "file"))
    assert {tuple(state) for state in states(disk)} == {(), ("file",)}
    disk.sync_directory(str(root))
    assert all(state == {} for state in states(disk))


def test_a_cut_off_end_may_come_back_until_it_is_synced(root: Path, states: States) -> None:
    disk = SimulatedDisk(root)
    fd = durable(disk, root, "file", b"long data")
    disk.truncate(fd, 4)
    assert {state["file"] for state in states(disk)} == {b"long data", b"long"}
    disk.fdatasync(fd)
    disk.allocate(fd, 4, 4)
    assert {state["file"] for state in states(disk)} == {b"long", b"long\0\0\0\0"}
    assert disk.size(fd) == 8
    assert disk.pread(fd, 100, 0) == b"long\0\0\0\0"


@pytest.mark.parametrize("first_name", ["file", "other"], ids=["its name", "a name it got since"])
def test_a_failed_sync_loses_the_data_and_the_next_one_says_ok(root: Path, states: States, first_name: str) -> None:
    disk = SimulatedDisk(root)
    fd = durable(disk, root, first_name, b"old")
    disk.rename(str(root / first_name), str(root / "file"))
    disk.sync_directory(str(root))
    disk.pwrite(fd, b"new", 0)
    disk.fail(disk.operations + 1, errno.EIO, calls=("fdatasync",))
    with pytest.raises(OSError, match="Input/output") as caught:
        disk.fdatasync(fd)
    assert caught.value.errno == errno.EIO
    disk.fdatasync(fd)
    assert disk.pread(fd, 3, 0) == b"new", "its caller still sees it"
    assert all(state == {"file": b"old"} for state in states(disk))


def test_a_short_write_writes_its_first_half(root: Path) -> None:
    disk = SimulatedDisk(root)
    fd = durable(disk, root, "file", b"")
    disk.shorten(disk.operations + 1, times=2)
    assert disk.pwrite(fd, b"12345", 0) == 2
    assert disk.pwrite(fd, b"345", 2) == 1
    assert disk.pwrite(fd, b"45", 3) == 2
    assert disk.pread(fd, 10, 0) == b"12345"
    disk.shorten(disk.operations + 1, times=100)
    disk.mend()
    assert disk.pwrite(fd, b"67", 5) == 2


def test_a_mended_disk_works_again(root: Path) -> None:
    disk = SimulatedDisk(root)
    fd = durable(disk, root, "file", b"old")
    disk.fail(0, errno.EIO, times=1000)
    disk.cut_power(0)
    with pytest.raises(PowerCut):
        disk.pwrite(fd, b"new", 0)
    disk.mend()
    assert disk.pwrite(fd, b"new", 0) == 3


def test_each_way_of_a_power_cut_may_be_asked_for(root: Path, tmp_path: Path) -> None:
    disk = SimulatedDisk(root)
    fd = durable(disk, root, "file", b"old")
    disk.pwrite(fd, b"new", 0)
    found: dict[str, set[bytes]] = {way: set() for way in WAYS}
    for way, seed in itertools.product(WAYS, range(30)):
        target = tmp_path / way / str(seed)
        target.mkdir(parents=True)
        disk.crash(target, seed, way)
        found[way].add((target / "file").read_bytes())
    assert found == {"none": {b"old"}, "all": {b"new"}, "moment": {b"old", b"new"}, "each": {b"old", b"new"}}


def test_a_call_fails_as_often_as_was_asked_and_changes_nothing(root: Path) -> None:
    disk = SimulatedDisk(root)
    fd = durable(disk, root, "file", b"old")
    disk.fail(disk.operations + 1, errno.EIO, times=2)
    for _ in range(2):
        with pytest.raises(OSError, match="Input/output"):
            disk.pwrite(fd, b"new", 0)
    assert disk.pread(fd, 3, 0) == b"old"
    assert disk.pwrite(fd, b"new", 0) == 3


def test_space_ends_and_comes_back_with_what_is_removed(root: Path) -> None:
    disk = SimulatedDisk(root, space=1000)
    fd = durable(disk, root, "file", bytes(900))
    with pytest.raises(OSError, match="No space"):
        disk.pwrite(fd, bytes(101), 900)
    with pytest.raises(OSError, match="No space"):
        disk.allocate(fd, 900, 101)
    assert disk.size(fd) == 900
    disk.pwrite(fd, bytes(900), 0)
    other = durable(disk, root, "other", bytes(100))
    disk.unlink(str(root / "other"))
    disk.close(other)
    disk.allocate(fd, 900, 100)
    disk.truncate(fd, 0)
    durable(disk, root, "another", bytes(1000))


@pytest.mark.parametrize("behind", [False, True])
def test_nothing_reaches_the_disk_after_a_power_cut(root: Path, behind: bool) -> None:
    disk = SimulatedDisk(root)
    fd = durable(disk, root, "file", b"old")
    disk.cut_power(disk.operations + 1, behind=behind)
    with pytest.raises(PowerCut):
        disk.pwrite(fd, b"new", 0)
    assert disk.pread(fd, 3, 0) == (b"new" if behind else b"old")
    with pytest.raises(PowerCut):
        disk.fdatasync(fd)


def test_one_seed_gives_one_state_and_the_trace_tells_what_was_done(root: Path, tmp_path: Path) -> None:
    disk = SimulatedDisk(root)
    disk.make_directory(str(root / "sub"))
    fd = disk.create(str(root / "sub" / "file"))
    for number in range(20):
        disk.pwrite(fd, bytes([number]) * 700, 700 * number)
    disk.abandon()
    contents = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        disk.crash(tmp_path / name, 7)
        contents.append({p.name: p.read_bytes() for p in (tmp_path / name).rglob("*") if p.is_file()})
    assert contents[0] == contents[1]
    assert disk.trace[:4] == [
        ("make_directory", "sub"), ("sync_directory", "."), ("create", "sub/file"), ("pwrite", "sub/file", 0, 700)
    ]  # fmt: skip
    assert disk.operations == len(disk.trace) == 23


def test_what_somebody_else_writes_is_left_as_it_is_or_damaged_or_gone(root: Path, states: States) -> None:
    disk = SimulatedDisk(root, opaque=("index",))
    (root / "index").mkdir()
    (root / "index" / "data").write_bytes(b"x" * 2000)
    disk.close(disk.create(str(root / "index" / "more")))
    disk.fail(disk.operations + 1, errno.ENOSPC)
    with pytest.raises(OSError, match="No space"):
        disk.elsewhere(str(root / "index" / "data"))
    disk.elsewhere(str(root / "index" / "data"))
    assert disk.trace[-1] == ("elsewhere", "index/data")
    found = [state.get("index/data") for state in states(disk)]
    assert {None, b"x" * 2000} < set(found)
    assert all(data is None or len(data) == 2000 for data in found)
    assert not disk.list(str(root / "nowhere"))
    assert disk.list(str(root / "index")) == ["data", "more"]
