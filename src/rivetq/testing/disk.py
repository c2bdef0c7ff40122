"""A disk that knows what a power cut would leave of it, for tests of code that writes files that must last.

`SimulatedDisk` has the calls that a log needs of a disk. What its caller sees is in real files below one directory, so
that anything may read them. Beside that it keeps, for every file and directory, what is durable and what was done
since, and `crash` writes one of the states that a power cut may leave into another directory. The same seed gives the
same state.

What a power cut may do (each of it is seen on real disks): of the changes since the last sync of a file none is left,
or all, or a beginning, or any of them, or some of their 512-byte sectors, or the size without the data. The same for
the names in a directory since its last sync, where a rename is one step. A sync that fails (see `fail`) drops the
changes that it should have made durable, and the caller goes on to see them: the next sync says OK (what Linux does).
"""

from __future__ import annotations

import errno
import os
import random
import shutil
from collections.abc import Callable, Collection, Iterator
from typing import Any

SECTOR_BYTES = 512
WAYS = ("none", "all", "moment", "each")
"""What is left of the changes since the last syncs: none, all, those up to one moment, or some of each file and
directory by itself."""
FILE_MODE, DIRECTORY_MODE = 0o600, 0o700


class PowerCut(BaseException):
    """The machine is dead: nothing that the program still does reaches the disk."""


class _File:
    """What is durable of a file, and what was done to it since: (number, offset, data), or (number, size, None)."""

    def __init__(self, durable: bytes = b"") -> None:
        self.durable = durable
        self.since: list[tuple[int, int, bytes | None]] = []
        self.size = len(durable)

    def keep(self, changes: list[tuple[int, int, bytes | None]]) -> bytes:
        """The durable bytes with these changes."""
        data = bytearray(self.durable)
        for _, at, new in changes:
            if new is None:
                del data[at:]
                data.extend(bytes(at - len(data)))
            else:
                data.extend(bytes(max(0, at - len(data))))
                data[at : at + len(new)] = new
        return bytes(data)


class _Directory:
    """The names that are there, those that are durable, and the steps in between: (number, what became of which name).

    None: the name is gone."""

    def __init__(self) -> None:
        self.durable: dict[str, _File | _Directory] = {}
        self.names: dict[str, _File | _Directory] = {}
        self.since: list[tuple[int, dict[str, _File | _Directory | None]]] = []

    def change(self, number: int, changes: dict[str, _File | _Directory | None]) -> None:
        """One step, of which all or nothing is left."""
        self.since.append((number, changes))
        _apply(self.names, changes)


def _apply(names: dict[str, Any], changes: dict[str, Any]) -> None:
    for name, node in changes.items():
        if node is None:
            names.pop(name, None)
        else:
            names[name] = node


class SimulatedDisk:
    """The disk below one directory, which exists; what is in it counts as durable.

    Args:
        root: where the files are that its caller sees.
        space: bytes that all files together may take; a call that needs more raises ENOSPC. None: no limit.
        opaque: names of directories whose files other code writes, past this disk. A power cut leaves them as they
            are, or without some of their bytes, or takes them away.
    """

    def __init__(self, root: str | os.PathLike[str], *, space: int | None = None, opaque: tuple[str, ...] = ()) -> None:
        self.root = os.path.abspath(root)
        self.space = space
        self.operations = 0
        """How many changing calls there were."""
        self.before: Callable[[int], None] | None = None
        """Called before each of these calls, with its number: the moment to look at what a power cut would leave."""
        self.trace: list[tuple[Any, ...]] = []
        """These calls: name, path below the root, offsets and sizes (not of opaque files)."""
        self._opaque = opaque
        self._files: dict[int, tuple[_File, str]] = {}  # by descriptor
        self._cut_at: int | None = None
        self._cut_behind = False
        self._faults: list[tuple[int, int, int, frozenset[str]]] = []
        self._short = range(0)
        self._tree = self._adopt(self.root)

    def _adopt(self, path: str) -> _Directory:
        found = _Directory()
        with os.scandir(path) as entries:
            for entry in entries:
                if entry.name in self._opaque:
                    continue
                if entry.is_dir(follow_symlinks=False):
                    found.durable[entry.name] = self._adopt(entry.path)
                else:
                    with open(entry.path, "rb") as file:
                        found.durable[entry.name] = _File(file.read())
        found.names = dict(found.durable)
        return found

    # What goes wrong

    def cut_power(self, at: int, *, behind: bool = False) -> None:
        """Raise `PowerCut` in place of the `at`th changing call since the beginning, or behind it, and ever after."""
        self._cut_at, self._cut_behind = at, behind

    def fail(self, at: int, error: int, *, times: int = 1, calls: Collection[str] = ()) -> None:
        """Let the `at`th changing call, and the next ones if `times` is more, raise OSError(error).

        Args:
            calls: only calls of these names fail ("pwrite", "fdatasync", ...); none: all.
        """
        self._faults.append((at, at + times, error, frozenset(calls)))

    def shorten(self, at: int, *, times: int = 1) -> None:
        """Let a pwrite that is the `at`th changing call, or one of the next `times`, write only its first half."""
        self._short = range(at, at + times)

    def mend(self) -> None:
        """From here on nothing goes wrong any more. Data of failed syncs is still lost."""
        self._cut_at = None
        self._faults.clear()
        self._short = range(0)

    def _operate(
        self, call: str, path: str, *numbers: int, act: Callable[[], Any], fail: Callable[[], None] | None = None
    ) -> Any:
        if self.before is not None:
            self.before(self.operations + 1)
        self.operations += 1
        number = self.operations
        self.trace.append((call, os.path.relpath(path, self.root), *(() if self._is_opaque(path) else numbers)))
        if self._cut_at is not None and (number > self._cut_at or (number == self._cut_at and not self._cut_behind)):
            raise PowerCut
        for first, end, error, calls in self._faults:
            if first <= number < end and (not calls or call in calls):
                if fail is not None:
                    fail()
                raise OSError(error, os.strerror(error), path)
        result = act()
        if number == self._cut_at:
            raise PowerCut
        return result

    # Where things are

    def _parent(self, path: str) -> tuple[_Directory, str]:
        parts = os.path.relpath(os.path.abspath(path), self.root).split(os.sep)
        found = self._tree
        for part in parts[:-1]:
            node = found.names.get(part)
            if not isinstance(node, _Directory):
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
            found = node
        return found, parts[-1]

    def _find(self, path: str) -> _File | _Directory | None:
        if os.path.abspath(path) == self.root:
            return self._tree
        directory, name = self._parent(path)
        return directory.names.get(name)

    def _is_opaque(self, path: str) -> bool:
        return any(part in self._opaque for part in os.path.relpath(os.path.abspath(path), self.root).split(os.sep))

    # The calls

    def pwrite(self, fd: int, data: bytes, offset: int, /) -> int:
        """As os.pwrite."""
        file, path = self._files[fd]

        def act() -> int:
            part = data[: len(data) // 2] if self.operations in self._short and len(data) > 1 else data
            self._take(max(0, offset + len(part) - file.size))
            file.since.append((self.operations, offset, bytes(part)))
            file.size = max(file.size, offset + len(part))
            return os.pwrite(fd, part, offset)

        written: int = self._operate("pwrite", path, offset, len(data), act=act)
        return written

    def fdatasync(self, fd: int, /) -> None:
        """What was written is durable; the file's name is not."""
        file, path = self._files[fd]

        def act() -> None:
            file.durable = file.keep(file.since)
            file.since.clear()

        # Failed: what it should have written is clean in the cache, and nowhere else.
        self._operate("fdatasync", path, act=act, fail=file.since.clear)

    def pread(self, fd: int, size: int, offset: int) -> bytes:
        """`size` bytes, fewer only at the end of the file."""
        return os.pread(fd, size, offset)

    def create(self, path: str) -> int:
        """A new file, open for writing."""

        def act() -> int:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, FILE_MODE)
            file = _File()
            if not self._is_opaque(path):
                directory, name = self._parent(path)
                directory.change(self.operations, {name: file})
            self._files[fd] = file, path
            return fd

        fd: int = self._operate("create", path, act=act)
        return fd

    def open(self, path: str, *, write: bool = False) -> int:
        """An existing file."""
        fd = os.open(path, (os.O_RDWR if write else os.O_RDONLY) | os.O_CLOEXEC)
        node = None if self._is_opaque(path) else self._find(path)
        self._files[fd] = node if isinstance(node, _File) else _File(), path
        return fd

    def close(self, fd: int) -> None:
        """Forget the descriptor, which `abandon` may have closed before. Makes nothing durable."""
        if self._files.pop(fd, None) is not None:
            os.close(fd)

    def size(self, fd: int) -> int:
        """Bytes of the file as its caller sees it."""
        return os.fstat(fd).st_size

    def allocate(self, fd: int, offset: int, size: int) -> None:
        """Make it `offset + size` bytes long, with blocks of its own."""
        file, path = self._files[fd]

        def act() -> None:
            self._take(max(0, offset + size - file.size))
            file.since.append((self.operations, max(file.size, offset + size), None))
            file.size = max(file.size, offset + size)
            os.truncate(fd, max(os.fstat(fd).st_size, offset + size))

        self._operate("allocate", path, offset, size, act=act)

    def truncate(self, fd: int, size: int) -> None:
        """Cut it off, or make it longer by zeros."""
        file, path = self._files[fd]

        def act() -> None:
            self._take(size - file.size)
            file.since.append((self.operations, size, None))
            file.size = size
            os.ftruncate(fd, size)

        self._operate("truncate", path, size, act=act)

    def _take(self, size: int) -> None:
        if self.space is not None:
            if size > self.space:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self.space -= size

    def rename(self, old: str, new: str) -> None:
        """One step, within one directory. A file that had the new name is gone."""

        def act() -> None:
            os.rename(old, new)
            if not self._is_opaque(new):
                directory, name = self._parent(old)
                target, new_name = self._parent(new)
                assert target is directory, "a rename to another directory is not simulated"
                self._give_back(directory.names.get(new_name))
                directory.change(self.operations, {name: None, new_name: directory.names[name]})

        self._operate("rename", new, act=act)

    def unlink(self, path: str) -> None:
        """Remove a name."""

        def act() -> None:
            os.unlink(path)
            if not self._is_opaque(path):
                directory, name = self._parent(path)
                self._give_back(directory.names.get(name))
                directory.change(self.operations, {name: None})

        self._operate("unlink", path, act=act)

    def _give_back(self, node: _File | _Directory | None) -> None:
        if self.space is not None and isinstance(node, _File):
            self.space += node.size

    def elsewhere(self, path: str) -> None:
        """Other code is about to change an opaque file, past this disk. Like any other call, this may fail."""
        self._operate("elsewhere", path, act=lambda: None)

    def list(self, directory: str) -> list[str]:
        """Names in a directory, sorted; none if it does not exist."""
        try:
            return sorted(os.listdir(directory))
        except FileNotFoundError:
            return []

    def make_directory(self, path: str) -> None:
        """Create it if it is missing, and sync the directory that holds its name."""
        if os.path.isdir(path):
            return

        def act() -> None:
            os.mkdir(path, DIRECTORY_MODE)
            directory, name = self._parent(path)
            directory.change(self.operations, {name: _Directory()})

        self._operate("make_directory", path, act=act)
        self.sync_directory(os.path.dirname(os.path.abspath(path)))

    def sync_directory(self, path: str) -> None:
        """The names in it are durable; what is in the files is not."""

        def act() -> None:
            if not self._is_opaque(path):
                node = self._find(path)
                assert isinstance(node, _Directory), f"{path} is no directory"
                node.durable = dict(node.names)
                node.since.clear()

        self._operate("sync_directory", path, act=act)

    def forked(self) -> None:
        """In a forked child: what it is told from here on fails."""
        self.cut_power(0)

    # The power cut

    def abandon(self) -> None:
        """Close what the dead program left open."""
        for fd in list(self._files):
            self.close(fd)

    def crash(self, target: str | os.PathLike[str], seed: int | str, way: str | None = None) -> None:
        """Write what the disk may hold after a power cut now into the empty directory `target`.

        Args:
            way: what becomes of the changes since the last syncs: one of `WAYS`; None: by the seed.
        """
        _Aftermath(self, seed, way).write(self._tree, os.fspath(target), self.root)


class _Aftermath:
    """One state that a power cut may leave, by a seed."""

    def __init__(self, disk: SimulatedDisk, seed: int | str, way: str | None) -> None:
        self._random = random.Random(seed)
        self._opaque = disk._opaque
        chosen = self._random.choice(["none", "all", "moment", "each", "each", "each"])
        self.way = way or chosen
        self.moment = self._random.randint(0, disk.operations)

    def write(self, directory: _Directory, target: str, origin: str) -> None:
        """A directory and all that is in it."""
        names = dict(directory.durable)
        for _, changes in self._kept(directory.since):
            _apply(names, changes)
        for name, node in names.items():
            path = os.path.join(target, name)
            if isinstance(node, _Directory):
                os.mkdir(path, DIRECTORY_MODE)
                self.write(node, path, os.path.join(origin, name))
            else:
                with open(path, "wb") as file:
                    file.write(self._content(node))
        for name in self._opaque:
            if os.path.isdir(os.path.join(origin, name)):
                self._write_opaque(os.path.join(origin, name), os.path.join(target, name))

    def _kept(self, since: list[Any]) -> list[Any]:
        """Some of the steps since the last sync, in order."""
        way = self.way
        if way == "each":
            way = self._random.choice(["none", "all", "beginning", "any"])
        match way:
            case "none":
                return []
            case "all":
                return list(since)
            case "moment":
                return [step for step in since if step[0] <= self.moment]
            case "beginning":
                return since[: self._random.randint(0, len(since))]
            case _:
                return [step for step in since if self._random.random() < 0.5]

    def _content(self, file: _File) -> bytes:
        if self.way != "each" or not file.since or self._random.random() < 0.5:
            return file.keep(self._kept(file.since))
        if self._random.random() < 0.3:  # the size without the data
            return file.keep(
                [(n, at, None) if data is None else (n, at + len(data), b"") for n, at, data in file.since]
            )
        return file.keep([piece for step in file.since for piece in self._torn(step)])

    def _torn(self, step: tuple[int, int, bytes | None]) -> Iterator[tuple[int, int, bytes | None]]:
        number, at, data = step
        if data is None:
            yield step
            return
        start = at
        while start < at + len(data):
            end = min(at + len(data), (start // SECTOR_BYTES + 1) * SECTOR_BYTES)
            if self._random.random() < 0.5:
                yield number, start, data[start - at : end - at]
            start = end

    def _write_opaque(self, origin: str, target: str) -> None:
        way = self._random.choice(["as it is", "as it is", "gone", "torn"])
        if way == "gone":
            return
        shutil.copytree(origin, target)
        if way == "torn":
            for name in sorted(os.listdir(target)):
                path = os.path.join(target, name)
                size = os.path.getsize(path)
                at = self._random.randrange(size) if size else 0
                with open(path, "r+b") as file:
                    file.seek(at // SECTOR_BYTES * SECTOR_BYTES)
                    file.write(bytes(min(SECTOR_BYTES, size - at // SECTOR_BYTES * SECTOR_BYTES)))
