"""The real disk: complete reads and writes, modes whatever the umask, durable replacement of a small file."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rivetq.storage.disk import SystemDisk, read_file, replace_file, write_all

PERMISSIONS = stat.S_IRWXU | stat.S_IRWXG | stat.S_IRWXO


class Recorder(SystemDisk):
    """Notes the order of what changes the disk; may be told to fail or to write short."""

    def __init__(self, most: int | None = None, fails_at: str | None = None) -> None:
        self.done: list[str] = []
        self._most = most
        self._fails_at = fails_at

    def _note(self, name: str) -> None:
        if name == self._fails_at:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        self.done.append(name)

    def pwrite(self, fd: int, data: bytes, offset: int) -> int:  # type: ignore[override]  # a method for a builtin
        self._note("pwrite")
        return os.pwrite(fd, data[: self._most], offset)

    def fdatasync(self, fd: int) -> None:  # type: ignore[override]  # a method in place of a builtin
        self._note("fdatasync")
        os.fsync(fd)

    def rename(self, old: str, new: str) -> None:
        self._note("rename")
        super().rename(old, new)

    def sync_directory(self, path: str) -> None:
        self._note("sync_directory")
        super().sync_directory(path)


def mode_of(path: Path) -> int:
    return path.stat().st_mode & PERMISSIONS


def blocks_of(path: Path) -> int:
    return path.stat().st_blocks * 512


def open_files(directory: Path) -> list[str]:
    """What this process holds open below a directory."""
    found = []
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            name = os.readlink(f"/proc/self/fd/{fd}")
            if name.startswith(f"{directory}"):
                found.append(name)
    return found


@pytest.fixture(params=[0o000, 0o077, 0o777], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[None]:
    former = os.umask(request.param)
    yield
    os.umask(former)


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    fd = SystemDisk().create(str(tmp_path / "file"))
    yield fd
    os.close(fd)


# -- reads


def test_a_read_ends_at_the_end_of_the_file(fd: int) -> None:
    os.pwrite(fd, b"0123456789", 0)
    disk = SystemDisk()
    assert disk.pread(fd, 4, 3) == b"3456"
    assert disk.pread(fd, 100, 3) == b"3456789"
    assert disk.pread(fd, 100, 10) == b""
    assert disk.pread(fd, 0, 0) == b""


def test_a_short_read_is_completed(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    os.pwrite(fd, b"0123456789", 0)
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, size, offset: pread(fd, min(size, 3), offset))
    assert SystemDisk().pread(fd, 8, 1) == b"12345678"
    assert SystemDisk().pread(fd, 100, 1) == b"123456789"


def test_a_missing_file_reads_as_none(tmp_path: Path) -> None:
    assert read_file(SystemDisk(), str(tmp_path / "file")) is None


def test_a_small_file_is_read_whole_and_closed(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    assert read_file(SystemDisk(), str(tmp_path / "file")) == b"content"
    assert open_files(tmp_path) == []


# -- writes


@pytest.mark.parametrize("most", [1, 3, 9, 10, None])
def test_a_short_write_is_completed(fd: int, most: int | None) -> None:
    write_all(Recorder(most), fd, b"0123456789", 5)
    assert os.pread(fd, 100, 0) == bytes(5) + b"0123456789"


def test_a_file_open_for_reading_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    fd = SystemDisk().open(str(tmp_path / "file"))
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.pwrite(fd, b"x", 0)
    os.close(fd)
    fd = SystemDisk().open(str(tmp_path / "file"), write=True)
    os.pwrite(fd, b"C", 0)
    os.close(fd)
    assert (tmp_path / "file").read_bytes() == b"Content"


def test_syncing_and_writing_are_builtins() -> None:
    """No bytecode between the system call and the note of its success (see Log.sync)."""
    disk = SystemDisk()
    for call in (disk.pwrite, disk.fdatasync):
        assert type(call).__name__ == "builtin_function_or_method"


# -- names and modes


@pytest.mark.usefixtures("umask")
def test_a_new_file_is_its_owners_alone(tmp_path: Path) -> None:
    disk = SystemDisk()
    disk.close(disk.create(str(tmp_path / "file")))
    assert mode_of(tmp_path / "file") == 0o600


def test_a_file_that_is_there_is_not_created(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    with pytest.raises(FileExistsError):
        SystemDisk().create(str(tmp_path / "file"))
    assert (tmp_path / "file").read_bytes() == b"content"


def test_descriptors_are_not_inherited(fd: int, tmp_path: Path) -> None:
    disk = SystemDisk()
    other = disk.open(str(tmp_path / "file"))
    assert not os.get_inheritable(fd)
    assert not os.get_inheritable(other)
    disk.close(other)


@pytest.mark.usefixtures("umask")
def test_a_new_directory_is_its_owners_alone(tmp_path: Path) -> None:
    SystemDisk().make_directory(str(tmp_path / "directory"))
    assert mode_of(tmp_path / "directory") == 0o700


def test_missing_parents_are_made(tmp_path: Path) -> None:
    SystemDisk().make_directory(str(tmp_path / "a" / "b" / "c"))
    assert (tmp_path / "a" / "b" / "c").is_dir()


def test_the_names_of_new_directories_are_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    disk = SystemDisk()
    monkeypatch.setattr(disk, "sync_directory", synced.append)
    disk.make_directory(str(tmp_path / "a" / "b" / "c"))
    assert synced == [str(tmp_path), str(tmp_path / "a"), str(tmp_path / "a" / "b")]
    disk.make_directory(str(tmp_path / "a" / "b" / "c"))
    assert len(synced) == 3


def test_a_directory_that_another_process_makes_meanwhile_is_fine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mkdir = os.mkdir

    def be_late(path: str, mode: int = 0o777) -> None:
        mkdir(path, mode)
        mkdir(path, mode)

    monkeypatch.setattr(os, "mkdir", be_late)
    SystemDisk().make_directory(str(tmp_path / "a" / "b" / "c"))
    assert (tmp_path / "a" / "b" / "c").is_dir()


def test_a_directory_that_is_there_stays_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "directory").mkdir()
    (tmp_path / "directory").chmod(0o750)
    SystemDisk().make_directory(str(tmp_path / "directory"))
    assert mode_of(tmp_path / "directory") == 0o750


def test_a_file_in_place_of_a_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "directory").write_bytes(b"content")
    with pytest.raises(NotADirectoryError, match="directory"):
        SystemDisk().make_directory(str(tmp_path / "directory"))


def test_a_missing_directory_lists_as_empty(tmp_path: Path) -> None:
    assert SystemDisk().list(str(tmp_path / "nowhere")) == []
    (tmp_path / "file").touch()
    assert SystemDisk().list(str(tmp_path)) == ["file"]


def test_a_directory_sync_leaves_no_descriptor(tmp_path: Path) -> None:
    SystemDisk().sync_directory(str(tmp_path))
    assert open_files(tmp_path) == []
    with pytest.raises(NotADirectoryError):
        (tmp_path / "file").touch()
        SystemDisk().sync_directory(str(tmp_path / "file"))


def test_rename_replaces_and_unlink_removes(tmp_path: Path) -> None:
    (tmp_path / "old").write_bytes(b"old")
    (tmp_path / "new").write_bytes(b"new")
    disk = SystemDisk()
    disk.rename(str(tmp_path / "old"), str(tmp_path / "new"))
    assert (tmp_path / "new").read_bytes() == b"old"
    disk.unlink(str(tmp_path / "new"))
    assert disk.list(str(tmp_path)) == []


# -- space


def test_allocated_bytes_have_blocks_and_are_zeros(fd: int, tmp_path: Path) -> None:
    disk = SystemDisk()
    disk.allocate(fd, 0, 100_000)
    disk.allocate(fd, 100_000, 50_000)
    assert disk.size(fd) == 150_000
    assert not any((tmp_path / "file").read_bytes())
    assert blocks_of(tmp_path / "file") >= 150_000
    disk.truncate(fd, 10)
    assert disk.size(fd) == 10


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS, None])
def test_a_file_system_that_cannot_allocate_gets_zeros(
    fd: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int | None
) -> None:
    def refuse(*_: Any) -> None:
        assert code is not None
        raise OSError(code, os.strerror(code))

    if code is None:
        monkeypatch.delattr(os, "posix_fallocate")
    else:
        monkeypatch.setattr(os, "posix_fallocate", refuse)
    os.pwrite(fd, b"x" * 1000, 0)
    SystemDisk().allocate(fd, 1000, 150_001)
    assert (tmp_path / "file").read_bytes() == b"x" * 1000 + bytes(150_001)


def test_without_space_allocating_says_so(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(OSError, match="No space") as caught:
        SystemDisk().allocate(fd, 0, 4096)
    assert caught.value.errno == errno.ENOSPC
    assert SystemDisk().size(fd) == 0


def test_zeros_that_stand_for_an_allocation_are_written_to_the_last(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that fills up cuts a write short before it refuses one: what was not written has no block."""
    monkeypatch.delattr(os, "posix_fallocate")
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: pwrite(fd, data[:40_000], offset))
    SystemDisk().allocate(fd, 0, 120_000)
    assert SystemDisk().size(fd) == 120_000


# -- replacing a small file


def test_a_replaced_file_is_synced_before_it_gets_its_name(tmp_path: Path) -> None:
    disk = Recorder(most=4)
    replace_file(disk, str(tmp_path / "file"), b"content")
    assert disk.done == ["pwrite", "pwrite", "fdatasync", "rename", "sync_directory"]
    assert (tmp_path / "file").read_bytes() == b"content"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert mode_of(tmp_path / "file") == 0o600


@pytest.mark.parametrize("step", ["pwrite", "fdatasync", "rename", "sync_directory"])
def test_a_failed_replacement_leaves_the_old_file_or_the_new_one(tmp_path: Path, step: str) -> None:
    (tmp_path / "file").write_bytes(b"old")
    with pytest.raises(OSError, match="Input/output error"):
        replace_file(Recorder(fails_at=step), str(tmp_path / "file"), b"new")
    assert (tmp_path / "file").read_bytes() == (b"new" if step == "sync_directory" else b"old")
    assert open_files(tmp_path) == []


def test_what_a_failed_replacement_left_is_in_nobodys_way(tmp_path: Path) -> None:
    (tmp_path / "file.tmp").write_bytes(b"longer than what comes")
    replace_file(SystemDisk(), str(tmp_path / "file"), b"new")
    assert (tmp_path / "file").read_bytes() == b"new"
    assert not (tmp_path / "file.tmp").exists()
