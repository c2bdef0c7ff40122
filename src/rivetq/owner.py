"""One owner per directory: an flock on `LOCK`, with a note of who holds it.

The lock belongs to the open file description: it ends with the last descriptor, however the process dies. A forked
child closes its copy and never unlocks, which would take the lock from the parent.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import weakref
from datetime import datetime

from .errors import BrokerLockedError
from .io import FILE_MODE
from .model import moment


class DirectoryLock:
    """Held until `release`. Raises BrokerLockedError if another live broker has it."""

    _fd = -1

    def __init__(self, directory: str, wall_ms: int) -> None:
        self._path = os.path.join(directory, "LOCK")
        self._created = False
        self._fd = self._acquire(directory)
        _held.add(self)
        self._former = os.pread(self._fd, 4096, 0)
        self._write(json.dumps({"pid": os.getpid(), "since_ms": wall_ms}).encode())

    def _acquire(self, directory: str) -> int:
        while True:
            self._created = not os.path.exists(self._path)
            fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, FILE_MODE)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                note = os.pread(fd, 4096, 0)
                os.close(fd)
                raise _locked(directory, note) from None
            except BaseException:
                os.close(fd)
                raise
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(fd), os.stat(self._path)):
                    if self._created:
                        os.fchmod(fd, FILE_MODE)
                    return fd
            os.close(fd)  # a refused opening removed the file under us: try the one that is there now

    def _write(self, note: bytes) -> None:
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, note, 0)

    def release(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __del__(self) -> None:  # Ctrl-C, before anybody else knew of it
        self.release()

    def refuse(self) -> None:
        """Release after an opening that was refused: the directory is as it was before."""
        if self._created:
            os.unlink(self._path)
        else:
            self._write(self._former)
        self.release()


_held: weakref.WeakSet[DirectoryLock] = weakref.WeakSet()


def _let_go_in_child() -> None:
    for lock in list(_held):
        lock.release()


os.register_at_fork(after_in_child=_let_go_in_child)  # also of a fork while a directory is being opened


def _locked(directory: str, note: bytes) -> BrokerLockedError:
    pid: int | None = None
    since: datetime | None = None
    with contextlib.suppress(ValueError, TypeError, KeyError):  # the owner is just writing it
        value = json.loads(note)
        pid, since = int(value["pid"]), moment(int(value["since_ms"]))
    return BrokerLockedError(
        f"{directory}: another broker has it open (pid {pid}, since {since}); one process owns a directory at a time, "
        f"close that broker or use another directory",
        path=directory,
        pid=pid,
        since=since,
    )
