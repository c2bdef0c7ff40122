"""The LMDB checkpoint of the machine: a cache that makes opening quick. Losing it costs time at the next open.

LMDB checks nothing that it reads, and a flipped bit in a page can make it return wrong data or kill the process. So two
checksums stand before it: `manifest` holds size and CRC32C of the whole data file as of the last commit, and is
compared before LMDB sees the file; and every value carries a CRC over key and value. A file that does not match its
manifest (a crash fell between the commit and the writing of the manifest, or something was damaged) is not opened: the
caller rebuilds from the log.

Five databases: `runs` (the backlog, some thousand jobs a value; an opening reads only their heads), `jobs` (those that
are not in a run), `keys` (idempotency keys), `ends` (the keys by the end of their window) and `queues`.

Loading opens the environment read-only, so that a refused opening changes nothing. One thread at a time writes (the
engine's keeper lock), one process owns the directory, and reads are short and under the engine's lock, so none spans
two commits: LMDB's own lock file is not used. It is written through a memory map, and on a full disk that is not an
error but a SIGBUS (seen on a tmpfs).
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import lmdb
from crc32c import crc32c

from ..errors import StorageError
from ..machine import saving
from ..machine.columns import Columns
from ..machine.events import QueueCopied
from ..machine.keys import Key
from ..machine.machine import Machine
from ..machine.snapshot import Snapshot
from .codec import decode_snapshot, encode_snapshot
from .disk import DIRECTORY_MODE, FILE_MODE, Disk, read_file, replace_file
from .index_values import (
    decode_columns,
    decode_entry,
    decode_key_value,
    decode_queue,
    decode_run,
    encode_key_value,
    seal,
    unseal,
)
from .layout import DATA, MANIFEST

FORMAT = 3
MAP_BYTES = 2**40  # address space, not memory; halved until the system grants it
_CHUNK_BYTES = 1 << 22
_SNAPSHOT_KEY = b"snapshot"
_COUNTS_KEY = b"keys per segment"
_NAMES = (b"jobs", b"runs", b"keys", b"ends", b"queues")


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
        self._data = os.path.join(path, DATA)
        self._env: lmdb.Environment | None = None
        self._dbs: dict[bytes, Any] = {}
        self._may_write = False
        self._is_forgotten = False  # this is a forked child
        self._applied_lsn = 0  # of the last write
        self.distrusted = False
        """Damage was met: no manifest vouches for this file any more."""
        self.reads = 0
        """Runs that were read back; the engine looks at it to know when to put some away again."""

    # Reading, at open

    def manifest(self, log_id: bytes) -> Manifest | None:
        """The manifest, if it is this log's and the data file matches it bit for bit."""
        try:
            sealed = read_file(self._disk, os.path.join(self._path, MANIFEST))
            if sealed is None:
                return None
            found = Manifest(**json.loads(unseal(b"manifest", sealed)))
        except (ValueError, TypeError, OSError):
            return None
        if self.distrusted or found.format != FORMAT or found.log_id != log_id.hex():
            return None
        return found if self._fingerprint() == (found.size, found.crc) else None

    def load(self, machine: Machine) -> None:
        """Fill an empty machine; runs and keys stay here and are read when they are asked for.

        Raises ValueError or lmdb.Error if the index is not whole.
        """
        self._env = env = self._open(readonly=True)
        try:
            with env.begin(buffers=True) as txn:
                sealed = txn.get(_SNAPSHOT_KEY)
                if sealed is None:
                    raise ValueError("the index has no snapshot")
                saving.load(machine, decode_snapshot(unseal(_SNAPSHOT_KEY, bytes(sealed))))
                for key, value in _items(env, txn, b"queues"):
                    saving.load_queue(machine, *decode_queue(bytes(key), bytes(value)))
                queues = machine.numbers
                for key, value in _items(env, txn, b"jobs"):
                    saving.load_entry(machine, *decode_entry(bytes(key), bytes(value), queues))
                for key, value in _items(env, txn, b"runs"):
                    saving.load_run(machine, *decode_run(bytes(key), value, queues, self))
                counts = unseal(_COUNTS_KEY, bytes(txn.get(_COUNTS_KEY) or b""))
                machine.keys.load_counts(json.loads(counts))
            self._dbs = _handles(env)
            machine.keys.shelf = self
        except BaseException:
            self.close()
            raise

    def queues(self) -> list[QueueCopied]:
        """The queues, for a salvage; none if the index cannot be read."""
        found: list[QueueCopied] = []
        with contextlib.suppress(ValueError, lmdb.Error, OSError):
            env = self._open(readonly=True)
            try:
                with env.begin() as txn:
                    found = [decode_queue(key, value)[0] for key, value in _items(env, txn, b"queues")]
            finally:
                env.close()
        return found

    # The shelf of the machine (see run.Shelf). The engine's lock is held; no transaction here outlives a call, so none
    # can meet a page that two commits later is used again.

    def columns(self, number: int) -> Columns:
        """The columns of a saved run. Raises StorageError if they are damaged: the next opening rebuilds them."""
        self.reads += 1
        key = number.to_bytes(8, "big")
        try:
            value = self._get(b"runs", key)
            if value is None:
                raise ValueError("it is not there")
            return decode_columns(key, value)
        except (ValueError, lmdb.Error) as error:
            raise self._damaged(f"run {number}", error) from error

    def key(self, queue: int, text: str) -> tuple[int, int, int] | None:
        """Job id, end of the window, segment of a saved key. Raises StorageError if it is damaged."""
        name = queue.to_bytes(4, "big") + text.encode()
        try:
            value = self._get(b"keys", name)
            return None if value is None else decode_key_value(name, value)
        except (ValueError, lmdb.Error) as error:
            raise self._damaged(f"key {text!r}", error) from error

    def key_names(self) -> list[tuple[int, str]]:
        """All saved keys, for checks."""
        env = self._env
        if env is None:
            return []
        with env.begin() as txn:
            return [(int.from_bytes(key[:4], "big"), key[4:].decode()) for key, _ in _items(env, txn, b"keys")]

    def keys_of(self, queue: int) -> Iterator[tuple[str, int]]:
        """Text and end of the window of each saved key of a queue."""
        env, prefix = self._env, queue.to_bytes(4, "big")
        if env is None:
            return
        with env.begin() as txn:
            cursor = txn.cursor(self._dbs[b"keys"])
            more = cursor.set_range(prefix)
            while more and cursor.key().startswith(prefix):
                try:
                    yield cursor.key()[4:].decode(), decode_key_value(cursor.key(), cursor.value())[1]
                except ValueError as error:
                    raise self._damaged(f"a key of queue {queue}", error) from error
                more = cursor.next()

    def ended_keys(self, now_ms: int, limit: int) -> list[tuple[int, str]]:
        """Up to `limit` saved keys whose window is over."""
        env, found = self._env, list[tuple[int, str]]()
        if env is None:
            return found
        with env.begin() as txn:
            for key, _ in _items(env, txn, b"ends"):
                if len(found) == limit or int.from_bytes(key[:8], "big") > now_ms:
                    break
                found.append((int.from_bytes(key[8:12], "big"), key[12:].decode()))
        return found

    def _get(self, name: bytes, key: bytes) -> bytes | None:
        env = self._env
        db = self._dbs.get(name)
        if env is None or db is None:
            return None
        with env.begin(db=db) as txn:
            value: bytes | None = txn.get(key)
        return value

    def _damaged(self, what: str, error: Exception) -> StorageError:
        self.distrusted = True
        if self._may_write:  # else an opening is under way, which goes on without the index or changes nothing
            self._withdraw()
        return StorageError(
            f"{self._path}: {what} cannot be read ({error}); open the directory again, that rebuilds the index"
        )

    def _withdraw(self) -> None:
        """Without a manifest the next opening rebuilds."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(self._path, MANIFEST))

    # Writing, at checkpoints

    def write(
        self,
        log_id: bytes,
        applied_lsn: int,
        snapshot: Snapshot,
        *,
        jobs: Iterable[tuple[bytes, bytes | None]] = (),
        runs: Iterable[tuple[bytes, bytes | None]] = (),
        queues: Iterable[tuple[bytes, bytes | None]] = (),
        keys: Iterable[tuple[tuple[int, str], Key]] = (),
        key_counts: Mapping[int, int] | None = None,
    ) -> None:
        """One transaction: put, or delete where the value is None; then the manifest. Raises lmdb.Error, OSError."""
        if self.distrusted:
            self._withdraw()
            raise OSError("the index is damaged; the next opening rebuilds it")
        assert applied_lsn >= self._applied_lsn, f"an index of {self._applied_lsn} is to go back to {applied_lsn}"
        env = self._writable()
        with env.begin(write=True) as txn:
            dbs = {name: env.open_db(name, txn=txn) for name in _NAMES}
            for db, items in ((dbs[b"jobs"], jobs), (dbs[b"runs"], runs), (dbs[b"queues"], queues)):
                for key, value in items:
                    if value is None:
                        txn.delete(key, db=db)
                    else:
                        txn.put(key, value, db=db)
            for name, held in keys:
                self._write_key(txn, dbs, *name, held)
            txn.put(_SNAPSHOT_KEY, seal(_SNAPSHOT_KEY, encode_snapshot(snapshot)))
            counts = json.dumps([item for item in (key_counts or {}).items() if item[1]]).encode()
            txn.put(_COUNTS_KEY, seal(_COUNTS_KEY, counts))
            # In one line, wherever a fork may come: in the child LMDB would write into its parent's file.
            txn.abort() if self._is_forgotten else txn.commit()
        self._dbs = dbs
        size, crc = self._fingerprint()
        manifest = Manifest(FORMAT, log_id.hex(), applied_lsn, size, crc)
        text = json.dumps(manifest._asdict()).encode()
        replace_file(self._disk, os.path.join(self._path, MANIFEST), seal(b"manifest", text))
        self._applied_lsn = applied_lsn

    @staticmethod
    def _write_key(txn: lmdb.Transaction, dbs: dict[bytes, Any], number: int, text: str, held: Key) -> None:
        name = number.to_bytes(4, "big") + text.encode()
        old = txn.get(name, db=dbs[b"keys"])
        if old is not None and (old_ms := decode_key_value(name, bytes(old))[1]):
            txn.delete(old_ms.to_bytes(8, "big") + name, db=dbs[b"ends"])
        if not held.job_id:
            txn.delete(name, db=dbs[b"keys"])
            return
        txn.put(name, encode_key_value(name, held.job_id, held.expires_ms, held.segment), db=dbs[b"keys"])
        if held.expires_ms:
            txn.put(held.expires_ms.to_bytes(8, "big") + name, b"", db=dbs[b"ends"])

    def reopen(self) -> None:
        """After the opening succeeded: from here on the index may be written."""
        if self._env is not None:
            self._env.close()
            self._env = None
            self._dbs = _handles(self._writable())

    def clear(self) -> None:
        """Remove the index: the next `write` begins an empty one."""
        self.close()
        self.distrusted = False
        with contextlib.suppress(FileNotFoundError):
            if os.path.isdir(self._path) and not os.path.islink(self._path):
                shutil.rmtree(self._path)
            else:
                os.unlink(self._path)

    def close(self) -> None:
        env, self._env = self._env, None
        self._dbs = {}
        if env is not None:
            env.close()

    def forget(self) -> None:
        """In a forked child: let go of the environment without touching it."""
        _LEFT_ALONE.append(self._env)
        self._env = None
        self._is_forgotten = True
        self._path = os.devnull

    def _open(self, *, readonly: bool) -> lmdb.Environment:
        options: dict[str, Any] = {
            "max_dbs": len(_NAMES), "readonly": readonly, "lock": False, "sync": True, "metasync": True,
            "writemap": False, "mode": FILE_MODE, "create": not readonly, "lib_version": 0,
        }  # fmt: skip
        map_bytes = MAP_BYTES
        while True:
            try:
                # In one line, wherever a fork may come: in the child this path leads nowhere.
                return lmdb.open(self._path, map_size=map_bytes, **options)
            except (lmdb.MemoryError, MemoryError):
                # An address space limit (ulimit -v, a small container): a smaller map serves as well.
                map_bytes //= 2
                if map_bytes < 2**24:
                    raise

    def _writable(self) -> lmdb.Environment:
        self._may_write = True
        env = self._env  # once: a fork in between forgets it
        if env is None:
            if not os.path.isdir(self._path):
                os.mkdir(self._path, DIRECTORY_MODE)
                os.chmod(self._path, DIRECTORY_MODE)
            with contextlib.suppress(FileExistsError):
                # LMDB opens its file twice: made by itself under a strict umask it could not open it again.
                self._disk.close(self._disk.create(self._data))
            env = self._env = self._open(readonly=False)
        return env

    def _fingerprint(self) -> tuple[int, int]:
        """Size and CRC32C of the data file; (0, 0) if there is none."""
        try:
            fd = self._disk.open(self._data)
        except OSError:
            return 0, 0
        try:
            at = crc = 0
            while data := self._disk.pread(fd, _CHUNK_BYTES, at):
                crc = crc32c(data, crc)
                at += len(data)
            return at, crc
        except OSError:  # a bad sector, a directory: no data file either
            return 0, 0
        finally:
            self._disk.close(fd)


_LEFT_ALONE: list[Any] = []  # environments of a parent process: closing one in the child would touch its files


def _handles(env: lmdb.Environment) -> dict[bytes, Any]:
    """For reading later: a handle outlives its transaction only if that is committed, which this does."""
    found: dict[bytes, Any] = {}
    for name in _NAMES:
        with contextlib.suppress(lmdb.NotFoundError):
            found[name] = env.open_db(name, create=False)
    return found


def _database(env: lmdb.Environment, txn: lmdb.Transaction, name: bytes) -> Any:
    try:
        return env.open_db(name, txn=txn, create=False)
    except lmdb.NotFoundError:
        return None


def _items(env: lmdb.Environment, txn: lmdb.Transaction, name: bytes) -> Iterator[tuple[Any, Any]]:
    db = _database(env, txn, name)
    if db is None:
        return
    with txn.cursor(db=db) as cursor:
        yield from cursor
