"""Reads a directory that another process may have open. It uses the files only: nothing is locked or changed.

First the index of the last checkpoint is copied and checked against its manifest. (LMDB files must not be read without
its locks while another process writes them.) Then the log behind it is replayed. Without a usable index the log alone
gives the same. Changes that the owner has not written yet are not seen.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from collections.abc import Sequence
from datetime import datetime

from ..clock import SystemClock
from ..errors import StorageError
from ..machine.entry import Entry
from ..machine.machine import Machine
from ..machine.snapshot import Place
from ..storage.disk import Disk
from ..storage.index import Index
from ..storage.layout import DATA, INDEX, LOG, MANIFEST, segment_name
from ..storage.log import read_payload
from ..storage.recovery import Recovered, beside_its_owner, recover, replay
from ..storage.segment import OPEN_SEGMENTS, SegmentFile
from ..units import moment
from .live import LiveEngine


class MovedError(Exception):
    """The owner moved a payload, or the job ended, since the state was read. The state must be read again."""


class ViewEngine(LiveEngine):
    """The reading half of an engine, over a state that stands still. It is never started."""

    def __init__(self, disk: Disk, directory: str) -> None:
        self._disk = disk
        self._log_path = os.path.join(directory, LOG)
        self._copy = tempfile.mkdtemp(prefix="rivetq-view-")
        self._index = Index(disk, self._copy)
        # The copy goes even if the engine is never closed, at the latest when the process ends.
        self._drop_copy = weakref.finalize(self, _drop, self._index, self._copy, os.getpid())
        try:
            found = self._read(directory)
            machine = served(found)
        except BaseException:
            self._drop_copy()
            raise
        super().__init__(machine, SystemClock(), machine.now_ms, 0)  # time stands still
        self.record = found.end_lsn + len(found.surplus)
        """The last record that was read."""

    @property
    def as_of(self) -> datetime:
        """The moment of the last record. The owner may have done more since; little of it is unwritten."""
        return moment(self._machine.now_ms)

    def _read(self, directory: str) -> Recovered:
        def read() -> Recovered:
            self._index.close()
            copy_index(os.path.join(directory, INDEX), self._copy)
            return recover(self._disk, directory, self._index, SystemClock(), Machine)

        return beside_its_owner(directory, read)

    def _payloads(self, entries: Sequence[Entry]) -> list[bytes | None]:
        """Raises MovedError."""
        files: dict[int, SegmentFile] = {}
        for entry in entries:  # first: the owner may drop a segment while the others are read
            if entry.segment not in files and len(files) < OPEN_SEGMENTS:
                files[entry.segment] = self._segment(entry)
        return [self._payload(entry, files.get(entry.segment) or self._segment(entry)) for entry in entries]

    def _segment(self, entry: Entry) -> SegmentFile:
        try:
            return SegmentFile.open(self._disk, os.path.join(self._log_path, segment_name(entry.segment)))
        except FileNotFoundError as error:
            raise MovedError(entry.id) from error
        except OSError as error:
            raise StorageError(f"job {entry.id}: its payload cannot be read: {error}") from error

    def _payload(self, entry: Entry, file: SegmentFile) -> bytes:
        try:
            return read_payload(file, entry.offset, entry.length, entry.crc)
        except OSError as error:
            raise StorageError(f"job {entry.id}: its payload cannot be read: {error}") from error

    def _tick(self) -> int:
        # Time stands still: only the owner decides which jobs are due and which leases expire.
        self._check()
        return self._machine.now_ms

    def _finish(self, save: bool) -> None:
        self._drop_copy()


def _drop(index: Index, copy: str, process: int) -> None:
    if os.getpid() == process:  # a forked child has this finalizer too, and must not delete the parent's copy
        index.close()
        shutil.rmtree(copy, ignore_errors=True)


def served(found: Recovered) -> Machine:
    """The state that an opening would serve, including the records that it would write again."""
    machine = found.machine
    for lsn, body in enumerate(found.surplus, found.end_lsn + 1):
        replay(machine, body, Place(lsn=lsn))
    return machine


def copy_index(path: str, out: str) -> None:
    """Copy the files that are there. A copy taken in the middle of a checkpoint does not match its manifest."""
    os.makedirs(out, exist_ok=True)
    for name in (MANIFEST, DATA):
        try:
            shutil.copyfile(os.path.join(path, name), os.path.join(out, name))
        except FileNotFoundError:
            return
