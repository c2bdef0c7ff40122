"""Whether log, mark and index of a directory are whole."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from datetime import datetime

import attrs

from ..clock import SystemClock
from ..engines.view import copy_index, served
from ..errors import BrokerLockedError, CorruptLogError, StorageError
from ..machine.advance import advance
from ..machine.check import facts
from ..machine.look import everything, job
from ..machine.machine import Machine
from ..storage.backup import copy_log
from ..storage.disk import SystemDisk, read_file
from ..storage.index import Index
from ..storage.layout import DATA, INDEX, LOG, MANIFEST, MARK, list_segments, log_bytes, read_mark
from ..storage.recovery import recover
from ..units import moment
from .directory import Path, Progress, directory_of, disk_of, owned, readable

VERIFY_ROUNDS, VERIFY_PATIENCE_S, VERIFY_PAUSE_S = 3, 5.0, 0.05
"""How often, and for how long, an index that does not match is read again while its owner writes it."""


@attrs.define(kw_only=True)
class Problem:
    """Something that is not as it should be."""

    file: str
    offset: int | None
    what: str


@attrs.define(kw_only=True)
class Verification:
    """What reading every byte of a directory showed."""

    path: str
    segments: int = 0
    bytes: int = 0
    """Of the log."""
    records: int = 0
    jobs: int = 0
    as_of: datetime | None = None
    """The moment of the last record; None if the log is damaged."""
    log: Problem | None = None
    """Damage of the log: an opening is refused, see `salvage`. What comes behind it was not looked at."""
    index: Problem | None = None
    """The index does not match: nothing is lost, the next opening or `rebuild_index` builds it anew."""
    mark: Problem | None = None
    """The mark, which testifies how far the log was on disk, cannot be read: the next opening writes it anew."""

    @property
    def is_whole(self) -> bool:
        """Nothing is damaged."""
        return self.log is None and self.index is None and self.mark is None


def verify(path: Path, *, progress: Progress | None = None) -> Verification:
    """Read every byte of a directory, check every checksum, compare the index with the log. Nothing in it is changed.

    A directory that was never closed may have no index, or one whose last checkpoint was cut short by the crash: the
    second is a `Verification.index` problem, the first is none. If a broker has it open, a copy is read, which is taken
    beside it (links where the file system can) and removed again; the mark is not judged then, since its owner writes
    it anew with each sync.

    Raises:
        StorageError: there is no log, or a copy cannot be made.
    """
    directory = directory_of(path)
    with readable(directory):
        try:
            with owned(directory):
                return _verified(directory, progress)
        except BrokerLockedError:
            return _verified_open(directory, progress)


def _verified(directory: str, progress: Progress | None) -> Verification:
    found = Verification(path=directory)
    disk, log = disk_of(directory, progress), os.path.join(directory, LOG)
    found.segments = len(list_segments(disk, log))
    found.bytes = log_bytes(disk, directory)
    try:
        whole = recover(disk, directory, None, SystemClock(), Machine)
        served(whole)
    except CorruptLogError as error:
        found.log = _damage(error)
        return found
    found.records = whole.end_lsn + len(whole.surplus) - whole.first_lsn + 1
    found.jobs = sum(sum(queue.counts) for queue in whole.machine.queues.values())
    found.as_of = moment(whole.machine.now_ms)
    mark = os.path.join(log, MARK)
    if not read_mark(read_file(disk, mark), whole.log_id) and whole.end_lsn:
        found.mark = Problem(file=mark, offset=None, what="is missing, damaged or of another log")
    found.index = _compare(directory, whole.machine)
    return found


def _verified_open(directory: str, progress: Progress | None) -> Verification:
    """While the owner works: an index that a checkpoint or a compaction overtook is copied once more."""
    until, rounds = time.monotonic() + VERIFY_PATIENCE_S, 0
    while True:
        found, rounds = _verified_copy(directory, progress), rounds + 1
        if found.index is None or (rounds >= VERIFY_ROUNDS and time.monotonic() >= until):
            return found
        time.sleep(VERIFY_PAUSE_S)


def _verified_copy(directory: str, progress: Progress | None) -> Verification:
    prefix = ".rivetq-verify-"
    try:
        copy = tempfile.mkdtemp(prefix=prefix, dir=os.path.dirname(directory))
    except OSError:  # it may not be written: then elsewhere, where nothing can be linked
        copy = tempfile.mkdtemp(prefix=prefix)
    try:
        copy_index(os.path.join(directory, INDEX), os.path.join(copy, INDEX))  # first: the log has what it holds
        copy_log(SystemDisk(), os.path.join(directory, LOG), os.path.join(copy, LOG))
        found = _verified(copy, progress)
    except CorruptLogError as error:
        return Verification(path=directory, log=_damage(error))
    finally:
        shutil.rmtree(copy, ignore_errors=True)
    found.path = directory
    for problem in (found.log, found.index):
        if problem is not None:
            problem.file = problem.file.replace(copy, directory)
    return found


def _damage(error: CorruptLogError) -> Problem:
    return Problem(file=error.file, offset=error.offset, what=str(error).removeprefix(f"{error.file}: "))


def _compare(directory: str, whole: Machine) -> Problem | None:
    """The index, with what the log has behind it, against the log alone."""
    path = os.path.join(directory, INDEX)
    if not os.path.exists(os.path.join(path, MANIFEST)):
        return None
    disk = SystemDisk()
    index = Index(disk, path)
    try:
        found = recover(disk, directory, index, SystemClock(), Machine)
        if not found.applied_lsn:
            return Problem(
                file=os.path.join(path, DATA), offset=None,
                what="does not match its manifest: a crash cut a checkpoint short, one is under way, or it is damaged",
            )  # fmt: skip
        machine = served(found)
        now_ms = max(machine.now_ms, whole.now_ms)
        for each in (machine, whole):
            advance(each, now_ms)
        what = _difference(whole, machine)
    except StorageError as error:
        what = str(error)
    finally:
        index.close()
    return None if what is None else Problem(file=os.path.join(path, DATA), offset=None, what=what)


def _difference(whole: Machine, machine: Machine) -> str | None:
    """What the index says otherwise than the log."""
    for queue in whole.numbers.values():
        other = machine.numbers.get(queue.number)
        totals = (queue.name, queue.config, queue.counts, queue.enqueued, queue.acked, queue.cancelled, queue.purged)
        if other is None or totals != (
            other.name, other.config, other.counts, other.enqueued, other.acked, other.cancelled, other.purged
        ):  # fmt: skip
            return f"queue {queue.name!r} has other totals or another configuration than the log says"
    for entry in everything(whole):
        found = job(machine, entry.id, entry.queue.number, entry.spec.priority)
        if found is None or facts(found) != facts(entry):
            return f"job {entry.id} is not what the log says"
    keys = [{name: (key.job_id, key.expires_ms) for name, key in each.keys.all().items()} for each in (whole, machine)]
    for name in {*keys[0], *keys[1]}:
        one, other_key = keys[0].get(name), keys[1].get(name)
        if one != other_key and not _has_ended(one or other_key, whole.now_ms):
            return f"key {name[1]!r} stands for something else than the log says"
    return None


def _has_ended(key: tuple[int, int] | None, now_ms: int) -> bool:
    """A key whose window is over may be there or not."""
    return key is not None and 0 < key[1] <= now_ms
