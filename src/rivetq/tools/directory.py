"""The directory that a tool works on: is it one, is it free, and how far is the work."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterator

from ..broker.arguments import checked_path
from ..clock import SystemClock
from ..errors import StorageError
from ..storage.disk import CountingDisk, SystemDisk
from ..storage.layout import LOG, list_segments, log_bytes
from ..storage.lock import DirectoryLock

Path = str | os.PathLike[str]
Progress = Callable[[int, int], None]
"""Called now and then with how many bytes of a log were read, and of how many; (0, 0): unknown."""


def check(path: Path) -> str:
    """The absolute path of a directory that has a log; StorageError if there is none."""
    return directory_of(path)


def disk_of(directory: str, progress: Progress | None, passes: int = 1) -> SystemDisk:
    """One that tells how far the log was read."""
    if progress is None:
        return SystemDisk()
    most = passes * log_bytes(SystemDisk(), directory)
    return CountingDisk(lambda read: progress(min(read, most), most))


def directory_of(path: Path) -> str:
    directory = os.path.abspath(checked_path(path))
    with readable(directory):
        if not list_segments(SystemDisk(), os.path.join(directory, LOG)):
            raise StorageError(f"{directory}: there is no log; the directory of a broker has one")
    return directory


@contextlib.contextmanager
def readable(directory: str) -> Iterator[None]:
    """What the system refuses is a StorageError."""
    try:
        yield
    except OSError as error:
        raise StorageError(f"{directory}: cannot be used: {error}") from error


@contextlib.contextmanager
def owned(directory: str) -> Iterator[None]:
    """Keep brokers out of the directory. If it cannot be written, no other process can open it either."""
    try:
        lock = DirectoryLock(directory, SystemClock().wall_ms())
    except OSError as error:
        if error.errno not in (errno.EROFS, errno.EACCES):
            raise StorageError(f"{directory}: cannot be locked: {error}") from error
        yield
        return
    try:
        yield
    finally:
        lock.refuse()
