"""The LMDB checkpoint of the machine: a cache that makes opening quick. Losing it costs time at the next open.

LMDB checks nothing that it reads, and a flipped bit in a page can make it return wrong data or kill the process. So two
checksums stand before it: `manifest` holds size and CRC32C of the whole data file as of the last commit, and is
compared before LMDB sees the file; and every value carries a CRC over key and value. A file that does not match its
manifest (a crash fell between the commit and the writing of the manifest, or something was damaged) is not opened: the
caller rebuilds from the log.

Loading opens the environment read-only, so that a refused opening changes nothing. One thread at a time writes (the
engine's keeper lock), one process owns the directory, and nobody reads after the loading: LMDB's own lock file is not
used. It is written through a memory map, and on a full disk that is not an error but a SIGBUS (seen on a tmpfs).
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import lmdb
from crc32c import crc32c

from .codec import decode_entry, decode_key_value, decode_snapshot, encode_snapshot, seal, unseal
from .io import DIRECTORY_MODE, FILE_MODE, Disk, read_file, replace_file
from .machine import Machine
from .state import Snapshot

FORMAT = 1
MAP_BYTES = 2**40  # address space, not memory; halved until the system grants it
_CHUNK_BYTES = 1 << 22
_SNAPSHOT_KEY = b"snapshot"


class Manifest(NamedTuple):
    """What the manifest file says of the data file."""

    format: int
    log_id: str
    applied_lsn: int
    size: int
    crc: int


class Index:
    """The index directory of a broker."""

    def __init__(self, disk: Disk, path: str) -> None:
        self._disk = disk
        self._path = path
        self._data = os.path.join(path, "data.mdb")
        self._env: lmdb.Environment | None = None

    # Reading, at open

    def manifest(self, log_id: bytes) -> Manifest | None:
        """The manifest, if it is this log's and the data file matches it bit for bit."""
        try:
            sealed = read_file(self._disk, os.path.join(self._path, "manifest"))
            if sealed is None:
                return None
            found = Manifest(**json.loads(unseal(b"manifest", sealed)))
        except (ValueError, TypeError, OSError):
            return None
        if found.format != FORMAT or found.log_id != log_id.hex():
            return None
        return found if self._fingerprint() == (found.size, found.crc) else None

    def load(self, machine: Machine) -> None:
        """Fill an empty machine. Raises ValueError or lmdb.Error if the index is not whole."""
        env = _open(self._path, readonly=True)
        # A hundred thousand new objects, none of which is garbage: the collector would look at them again and again.
        collecting = gc.isenabled()
        gc.disable()
        try:
            with env.begin() as txn:
                sealed = txn.get(_SNAPSHOT_KEY)
                if sealed is None:
                    raise ValueError("the index has no snapshot")
                machine.load(decode_snapshot(unseal(_SNAPSHOT_KEY, sealed)))
                queues = machine.numbers
                machine.load_entries(decode_entry(key, value, queues) for key, value in _items(env, txn, b"jobs"))
                for key, value in _items(env, txn, b"keys"):
                    number, text = int.from_bytes(key[:4], "big"), key[4:].decode()
                    machine.load_key(number, text, *decode_key_value(key, value))
        finally:
            if collecting:
                gc.enable()
            env.close()

    # Writing, at checkpoints

    def write(
        self,
        log_id: bytes,
        applied_lsn: int,
        snapshot: Snapshot,
        jobs: Iterable[tuple[bytes, bytes | None]],
        keys: Iterable[tuple[bytes, bytes | None]],
    ) -> None:
        """One transaction: put, or delete where the value is None; then the manifest. Raises lmdb.Error, OSError."""
        env = self._writable()
        with env.begin(write=True) as txn:
            for name, items in ((b"jobs", jobs), (b"keys", keys)):
                db = env.open_db(name, txn=txn)
                for key, value in items:
                    if value is None:
                        txn.delete(key, db=db)
                    else:
                        txn.put(key, value, db=db)
            txn.put(_SNAPSHOT_KEY, seal(_SNAPSHOT_KEY, encode_snapshot(snapshot)))
        size, crc = self._fingerprint()
        manifest = Manifest(FORMAT, log_id.hex(), applied_lsn, size, crc)
        text = json.dumps(manifest._asdict()).encode()
        replace_file(self._disk, os.path.join(self._path, "manifest"), seal(b"manifest", text))

    def clear(self) -> None:
        """Remove the index: the next `write` begins an empty one."""
        self.close()
        with contextlib.suppress(FileNotFoundError):
            if os.path.isdir(self._path) and not os.path.islink(self._path):
                shutil.rmtree(self._path)
            else:
                os.unlink(self._path)

    def close(self) -> None:
        env, self._env = self._env, None
        if env is not None:
            env.close()

    def forget(self) -> None:
        """In a forked child: let go of the environment without touching it."""
        _LEFT_ALONE.append(self._env)
        self._env = None

    def _writable(self) -> lmdb.Environment:
        if self._env is None:
            if not os.path.isdir(self._path):
                os.mkdir(self._path, DIRECTORY_MODE)
                os.chmod(self._path, DIRECTORY_MODE)
            with contextlib.suppress(FileExistsError):
                # LMDB opens its file twice: made by itself under a strict umask it could not open it again.
                self._disk.close(self._disk.create(self._data))
            self._env = _open(self._path, readonly=False)
        return self._env

    def _fingerprint(self) -> tuple[int, int]:
        """Size and CRC32C of the data file; (0, 0) if there is none."""
        try:
            fd = self._disk.open(self._data)
        except OSError:
            return 0, 0
        try:
            size = at = crc = 0
            while data := self._disk.pread(fd, _CHUNK_BYTES, at):
                crc = crc32c(data, crc)
                at += len(data)
            size = at
        finally:
            self._disk.close(fd)
        return size, crc


_LEFT_ALONE: list[Any] = []  # environments of a parent process: closing one in the child would touch its files


def _open(path: str, *, readonly: bool) -> lmdb.Environment:
    map_bytes = MAP_BYTES
    while True:
        try:
            return lmdb.open(
                path,
                map_size=map_bytes,
                max_dbs=2,
                readonly=readonly,
                lock=False,
                sync=True,
                metasync=True,
                writemap=False,
                mode=FILE_MODE,
                create=not readonly,
                lib_version=0,
            )
        except (lmdb.MemoryError, MemoryError):
            # An address space limit (ulimit -v, a small container): a smaller map serves as well.
            map_bytes //= 2
            if map_bytes < 2**24:
                raise


def _items(env: lmdb.Environment, txn: lmdb.Transaction, name: bytes) -> Iterator[tuple[bytes, bytes]]:
    try:
        db = env.open_db(name, txn=txn, create=False)
    except lmdb.NotFoundError:
        return
    with txn.cursor(db=db) as cursor:
        for key, value in cursor:
            yield bytes(key), bytes(value)
