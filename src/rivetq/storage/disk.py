"""The few system calls that the log makes, one method each: the seam that a simulated disk replaces.

`pwrite` and `fdatasync` are the builtins themselves, not Python functions around them, so that
``done.extend(map(disk.fdatasync, (fd,)))`` cannot be cut between the call's return and the note of its success by an
exception from a signal handler (KeyboardInterrupt): see `log.Log.sync`.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import random
import weakref
from collections.abc import Callable
from typing import Any, NoReturn, Protocol

from ..errors import ForkedBrokerError

FILE_MODE = 0o600
DIRECTORY_MODE = 0o700
_ZEROS = bytes(1 << 16)


class Disk(Protocol):
    """What a log needs of a disk. Every method raises OSError as the system call does."""

    def pwrite(self, fd: int, data: bytes, offset: int, /) -> int: ...
    def fdatasync(self, fd: int, /) -> None: ...
    def pread(self, fd: int, size: int, offset: int) -> bytes: ...
    def create(self, path: str) -> int: ...
    def open(self, path: str, *, write: bool = False) -> int: ...
    def close(self, fd: int) -> None: ...
    def size(self, fd: int) -> int: ...
    def allocate(self, fd: int, offset: int, size: int) -> None: ...
    def truncate(self, fd: int, size: int) -> None: ...
    def rename(self, old: str, new: str) -> None: ...
    def unlink(self, path: str) -> None: ...
    def list(self, directory: str) -> list[str]: ...
    def make_directory(self, path: str) -> None: ...
    def sync_directory(self, path: str) -> None: ...
    def forked(self) -> None: ...


class SystemDisk:
    """The operating system's disk."""

    pwrite = staticmethod(os.pwrite)
    fdatasync = staticmethod(getattr(os, "fdatasync", os.fsync))  # macOS has no fdatasync
    _os: Any = os  # where the calls below come from; looked up in the line that makes the call

    def forked(self) -> None:
        """In a forked child, whose files are its parent's: from here on nothing changes one.

        A call that was under way in the thread that forked goes on in the child as well, and must not repeat what the
        parent does. Descriptors stay open: a number that was freed could soon be another file's.
        """
        self._os = REFUSING
        for name in ("pwrite", "fdatasync"):
            setattr(self, name, _refuse)

    def pread(self, fd: int, size: int, offset: int) -> bytes:
        """`size` bytes, fewer only at the end of the file."""
        data = os.pread(fd, size, offset)
        if len(data) == size or not data:
            return data
        parts = [data]  # a read of more than 2 GiB, or one cut by a signal
        got = len(data)
        while got < size and (data := os.pread(fd, size - got, offset + got)):
            parts.append(data)
            got += len(data)
        return b"".join(parts)

    def create(self, path: str) -> int:
        """Create a file with mode 0600, regardless of the umask. FileExistsError if there is one."""
        fd: int = self._os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, FILE_MODE)
        os.fchmod(fd, FILE_MODE)
        return fd

    def open(self, path: str, *, write: bool = False) -> int:
        """A file that is there. Not through a symbolic link: what is written would go into another file."""
        try:
            fd: int = self._os.open(path, (os.O_RDWR if write else os.O_RDONLY) | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise OSError(errno.ELOOP, "a symbolic link, which is not followed here", path) from None
            raise
        return fd

    def close(self, fd: int) -> None:
        os.close(fd)

    def size(self, fd: int) -> int:
        return os.fstat(fd).st_size

    def allocate(self, fd: int, offset: int, size: int) -> None:
        """Give `size` bytes from `offset`, the end of the file, blocks of their own: writes there need no space."""
        try:
            self._os.posix_fallocate(fd, offset, size)
            return
        except AttributeError:  # macOS
            pass
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
        for at in range(offset, offset + size, len(_ZEROS)):
            write_all(self, fd, _ZEROS[: offset + size - at], at)

    def truncate(self, fd: int, size: int) -> None:
        self._os.ftruncate(fd, size)

    def rename(self, old: str, new: str) -> None:
        self._os.rename(old, new)

    def unlink(self, path: str) -> None:
        self._os.unlink(path)

    def list(self, directory: str) -> list[str]:
        """Names in a directory; none if it does not exist."""
        with contextlib.suppress(FileNotFoundError):
            return os.listdir(directory)
        return []

    def make_directory(self, path: str) -> None:
        """Create it with mode 0700, regardless of the umask, and missing parents as the umask says. An old one stays.

        The names of new directories are synced: a file in them is not durable while they are not.
        """
        parent = os.path.dirname(os.path.abspath(path))
        if not os.path.isdir(parent):
            self._make_parent(parent)
        try:
            self._os.mkdir(path, DIRECTORY_MODE)
        except FileExistsError:
            if not os.path.isdir(path):
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path) from None
            return
        os.chmod(path, DIRECTORY_MODE)
        self.sync_directory(parent)

    def _make_parent(self, path: str) -> None:
        parent = os.path.dirname(path)
        if not os.path.isdir(parent):
            self._make_parent(parent)
        with contextlib.suppress(FileExistsError):  # another process was quicker
            self._os.mkdir(path)
        self.sync_directory(parent)

    def sync_directory(self, path: str) -> None:
        """Make the names in it durable."""
        fd = self._os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


_signs = itertools.count(random.randrange(2**29, 2**30))
_living: weakref.WeakValueDictionary[int, OwnFile] = weakref.WeakValueDictionary()  # by their descriptors


class OwnFile:
    """A descriptor that is closed with the last reference, so no reader ever meets a reused number.

    The program shares the table of descriptors. It may close descriptors that it did not open (`os.closerange`, a
    daemon that starts in a handler) and then open files, which get the numbers of the log's files. Records would go
    into these files, and closing would close them. For that reason each descriptor of ours has two signs:

    - its offset, which pread and pwrite neither use nor move. It is checked before a close.
    - O_NONBLOCK, which has no effect on a regular file. It is checked before each write and sync, since Python keeps
      the interpreter lock for this check. A check of the offset releases that lock, and with many busy threads it comes
      back only a switch interval later. A socket or a pipe may have the flag too, but refuses a pwrite by itself.

    A new file of ours that gets the number of an older one tells the older one. A program that closes a descriptor at
    the same moment in another thread is not noticed.
    """

    _fd = -1
    _sign = 0

    def __init__(self, disk: Disk, path: str, fd: int) -> None:
        self._disk = disk
        self._fd = fd
        self.path = path
        sign = next(_signs)
        os.lseek(fd, sign, os.SEEK_SET)
        os.set_blocking(fd, False)
        before = _living.get(fd)
        if before is not None and before._fd == fd:  # the program has closed it, else the number would not be free
            before._fd = -1
        _living[fd] = self
        self._sign = sign

    @property
    def fd(self) -> int:
        return self._fd

    def fileno(self) -> int:
        """As that of a file object."""
        return self._fd

    def check(self) -> None:
        """Raises OSError (EBADF) if the descriptor is closed, or another file's by now."""
        try:
            if not os.get_blocking(self._fd):
                return
        except OSError:
            pass
        raise OSError(errno.EBADF, "this file was closed by the program, not by RivetQ", self.path)

    def _is_own(self) -> bool:
        try:
            return os.lseek(self._fd, 0, os.SEEK_CUR) == self._sign
        except OSError:  # closed, or a pipe
            return False

    def close(self) -> None:
        """Close it now. Only at the end of all: a reader that is just about to use the descriptor meets an error.

        Raises nothing; what is not ours any more is left alone."""
        if self._fd >= 0:
            is_own, fd, self._fd = self._is_own(), self._fd, -1
            if is_own:
                with contextlib.suppress(OSError):
                    self._disk.close(fd)

    def __del__(self) -> None:
        self.close()


class _Refusing:
    """Stands in for the module `os`."""

    def __getattr__(self, name: str) -> Callable[..., NoReturn]:
        return _refuse


def _refuse(*arguments: object, **named: object) -> NoReturn:
    raise ForkedBrokerError("these files belong to the process that was forked; open a broker of your own")


REFUSING = _Refusing()


class CountingDisk(SystemDisk):
    """Tells before each read how many bytes were read so far, to show progress."""

    def __init__(self, tell: Callable[[int], None]) -> None:
        self._tell = tell
        self._bytes = 0

    def pread(self, fd: int, size: int, offset: int) -> bytes:
        """As that of a `SystemDisk`."""
        self._tell(self._bytes)
        data = super().pread(fd, size, offset)
        self._bytes += len(data)
        return data


def write_all(disk: Disk, fd: int, data: bytes, offset: int) -> None:
    """`pwrite` until all of it is written: a call may be short."""
    written = disk.pwrite(fd, data, offset)
    while written < len(data):
        written += disk.pwrite(fd, data[written:], offset + written)


def replace_file(disk: Disk, path: str, data: bytes) -> None:
    """Put a small file in place of another, durably: a crash leaves the old one or the new one."""
    temporary = path + ".tmp"
    with contextlib.suppress(FileNotFoundError):
        disk.unlink(temporary)
    write_file(disk, temporary, data)
    disk.rename(temporary, path)
    disk.sync_directory(os.path.dirname(path))


def write_file(disk: Disk, path: str, data: bytes) -> None:
    """A new file, on disk but for its name."""
    fd = disk.create(path)
    try:
        write_all(disk, fd, data, 0)
        disk.fdatasync(fd)
    finally:
        disk.close(fd)


def read_file(disk: Disk, path: str) -> bytes | None:
    """A whole small file; None if there is none."""
    try:
        fd = disk.open(path)
    except FileNotFoundError:
        return None
    try:
        return disk.pread(fd, disk.size(fd), 0)
    finally:
        disk.close(fd)
