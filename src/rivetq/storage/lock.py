"""One owner per directory: an flock on `LOCK`, with a note of who holds it.

The lock belongs to the open file description: it ends with the last descriptor, however the process dies. A forked
child closes its copy and never unlocks, which would take the lock from the parent.

The directory may be reached through symbolic links, but nothing in it is followed: who may write there could have
planted a link to any file that the owner may overwrite.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import weakref
from datetime import datetime

from ..errors import BrokerLockedError, StorageError
from ..units import moment
from .disk import FILE_MODE, OwnFile, SystemDisk
from .layout import INDEX, LOCK, LOG

_OWN = (LOCK, LOG, INDEX)


class DirectoryLock:
    """Held until `release`.

    Raises BrokerLockedError if another live broker has it, and StorageError if a link stands where its files belong.
    """

    def __init__(self, directory: str, wall_ms: int) -> None:
        self._path = os.path.join(directory, LOCK)
        self._created = False
        for name in _OWN:
            if os.path.islink(path := os.path.join(directory, name)):
                raise StorageError(
                    f"{path}: a symbolic link, which is not followed here; nothing was changed. Remove it; to keep the "
                    f"files elsewhere, make the whole directory a link"
                )
        # An object that closes itself: after any exception, the lock is released with the last reference.
        self._file = self._acquire(directory)
        _held.add(self)
        self._former = os.pread(self._file.fileno(), 4096, 0)
        self._write(json.dumps({"pid": os.getpid(), "since_ms": wall_ms}).encode())

    def _acquire(self, directory: str) -> OwnFile:
        while True:
            self._created = not os.path.exists(self._path)
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            file = OwnFile(SystemDisk(), self._path, os.open(self._path, flags, FILE_MODE))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if self._is_there(file):
                    if self._created:
                        os.fchmod(file.fileno(), FILE_MODE)
                    return file
                file.close()  # a refused opening removed the file under us: try the one that is there now
            except BlockingIOError:
                note = os.pread(file.fileno(), 4096, 0)
                file.close()
                raise _locked(directory, note) from None
            except BaseException:
                file.close()
                raise

    def _is_there(self, file: OwnFile) -> bool:
        with contextlib.suppress(FileNotFoundError):
            return os.path.samestat(os.fstat(file.fileno()), os.stat(self._path))
        return False

    def _write(self, note: bytes) -> None:
        self._file.check()
        os.ftruncate(self._file.fileno(), 0)
        os.pwrite(self._file.fileno(), note, 0)

    def check(self) -> None:
        """Raises OSError if the program closed the lock's file, and so let go of the lock."""
        self._file.check()

    def release(self) -> None:
        self._file.close()

    def __del__(self) -> None:  # Ctrl-C, before anybody else knew of it
        if hasattr(self, "_file"):
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
