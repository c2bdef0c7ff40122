"""What works on a directory instead of on a broker."""

from __future__ import annotations

import base64
import contextlib
import errno
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from types import TracebackType
from typing import Any, Self, TypeVar

import attrs

from ..broker.arguments import checked_path, checked_state
from ..broker.broker import Broker
from ..clock import SystemClock
from ..engine import Backup
from ..engines.view import MovedError, ViewEngine, copy_index, served
from ..errors import BrokerLockedError, CorruptLogError, StorageError
from ..machine.advance import advance
from ..machine.check import facts
from ..machine.events import Copied, Enqueued, Event
from ..machine.look import everything, job
from ..machine.machine import Machine
from ..model import Job, JobState, QueueConfig, QueueStats, checked_int, moment
from ..storage.backup import copy_log, take
from ..storage.codec import decode_record
from ..storage.disk import CountingDisk, SystemDisk, read_file
from ..storage.index import Index
from ..storage.layout import DATA, INDEX, LOG, MANIFEST, MARK, list_segments, log_bytes, read_mark
from ..storage.lock import DirectoryLock
from ..storage.recovery import records, recover
from .salvage import Salvage
from .salvage import salvage as _salvage

Path = str | os.PathLike[str]
Progress = Callable[[int, int], None]
"""Called now and then with how many bytes of a log were read, and of how many; (0, 0): nobody knows."""
T = TypeVar("T")
LOOKS = 10
"""So often a look begins anew because what it reads was moved meanwhile."""
VERIFY_ROUNDS, VERIFY_PATIENCE_S, VERIFY_PAUSE_S = 3, 5.0, 0.05
"""An index that does not match is looked at so often, and for so long, while somebody writes it."""


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


def check(path: Path) -> str:
    """The absolute path of a directory that has a log; StorageError if there is none."""
    return _directory(path)


def verify(path: Path, *, progress: Progress | None = None) -> Verification:
    """Read every byte of a directory, check every checksum, compare the index with the log. Nothing in it is changed.

    A directory that was never closed may have no index, or one whose last checkpoint was cut short by the crash: the
    second is a `Verification.index` problem, the first is none. If a broker has it open, a copy is read, which is taken
    beside it (links where the file system can) and removed again; the mark is not judged then, since its owner writes
    it anew with each sync.

    Raises:
        StorageError: there is no log, or a copy cannot be made.
    """
    directory = _directory(path)
    with _readable(directory):
        try:
            with _owned(directory):
                return _verified(directory, progress)
        except BrokerLockedError:
            return _verified_open(directory, progress)


def rebuild_index(path: Path, *, progress: Progress | None = None) -> int:
    """Build the index anew from the log; how many jobs there are. Leases stay as they are.

    Raises:
        CorruptLogError: the log is damaged; the index stays as it is.
        StorageError: the index cannot be written (a full disk, say); the next opening tries it again.
        BrokerLockedError: a broker has it open.
    """
    directory = _directory(path)
    index = Index(SystemDisk(), os.path.join(directory, INDEX))
    with _owned(directory), _readable(directory):
        log_id = recover(_disk(directory, progress), directory, None, SystemClock(), Machine).log_id
        index.clear()
    if progress is not None:
        progress(0, 0)
    with Broker(directory, release_on_open=False) as broker:
        stats = broker.stats()
    if index.manifest(log_id) is None:
        raise StorageError(f"{directory}: the index could not be written, see the log of this program")
    return stats.ready + stats.scheduled + stats.leased + stats.dead


def salvage(path: Path, out: Path, *, progress: Progress | None = None) -> Salvage:
    """Write all that can be read of a damaged log into the new directory `out`, which a broker can open.

    The damaged one is only read. See `Salvage` for what it tells; the same is in `out` as `salvage.json`. Where records
    are missing, jobs are missing, and jobs whose end was in such a record come again.

    Raises:
        StorageError: there is no log, or something at `out`, or it cannot be written.
        BrokerLockedError: a broker has it open.
    """
    directory = _directory(path)
    with _owned(directory), _readable(directory):
        disk = _disk(directory, progress, passes=2)  # what is saved of it is read once more
        return _salvage(disk, directory, os.path.abspath(checked_path(out)), SystemClock())


def backup(path: Path, out: Path, *, link: bool = True, progress: Progress | None = None) -> Backup:
    """Copy a directory, whether a broker has it open or not; see `Broker.backup`."""
    directory = _directory(path)
    with _readable(directory):
        disk = _disk(directory, progress, passes=1 if link else 2)  # the copy is read back
        return take(disk, directory, os.path.abspath(checked_path(out)), SystemClock(), link=link)


def dump(path: Path, *, payloads: bool = False) -> Iterator[dict[str, Any]]:
    """The records of a log in order, each as values that JSON knows. A broker may have it open.

    Args:
        payloads: with the payloads, in base64.

    Raises:
        CorruptLogError: behind the last record that can be read.
    """
    directory = _directory(path)
    with _readable(directory):
        for file, record in records(SystemDisk(), directory):
            now_ms, events = decode_record(record.body)
            yield {
                "lsn": record.frame.lsn,
                "file": os.path.basename(file.path),
                "offset": record.at,
                "at_ms": now_ms,
                "events": [_event(event, record.body if payloads else None) for event in events],
            }


class Look:
    """A directory as it is on disk, while a broker may have it open; see `look`. Its methods are those of `Broker`.

    It shows one moment. Only if the owner moved a payload that is asked for, or its job ended, does it read the files
    again, and goes on with a later moment, `as_of`: what one call returns is always of one moment.
    """

    def __init__(self, directory: str, engine: ViewEngine) -> None:
        self._directory = directory
        self._show(engine)

    def _show(self, engine: ViewEngine) -> None:
        self._engine = engine
        self.as_of: datetime = engine.as_of
        """The moment of the last record that was read."""
        self.record: int = engine.record
        """Its number."""

    def _with_payloads(self, read: Callable[[ViewEngine], T]) -> T:
        """What is read of the engine, or of a later one if payloads were moved."""
        for _ in range(LOOKS):
            try:
                return read(self._engine)
            except MovedError:
                with _readable(self._directory):
                    later = ViewEngine(SystemDisk(), self._directory)
                self._engine.close()
                self._show(later)
        try:
            return read(self._engine)
        except MovedError as error:
            raise StorageError(
                f"{self._directory}: job {error}: its payload was moved {LOOKS + 1} times while it was read; ask for "
                f"fewer jobs at a time"
            ) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Remove the copy of the index that it reads from."""
        self._engine.close()

    def queues(self) -> list[str]:
        """See `Broker.queues`."""
        return self._engine.queues()

    def stats(self, queue: str | None = None) -> QueueStats:
        """See `Broker.stats`; `oldest_age` is that at `as_of`."""
        return self._engine.stats(queue)

    def config(self, queue: str) -> QueueConfig:
        """The configuration in force, with `paused`."""
        return self._engine.config(queue)

    def jobs(
        self,
        queue: str,
        *,
        state: JobState | str | None = None,
        after: int = 0,
        limit: int = 100,
        payloads: bool = True,
    ) -> list[Job]:
        """See `Broker.jobs`."""
        page = checked_state(state), checked_int(after, "after", 0), checked_int(limit, "limit", 1, 10_000)
        if not payloads:
            return self._engine.jobs(queue, *page, payloads=False)
        return self._with_payloads(lambda engine: engine.jobs(queue, *page))

    def get(self, job_id: int) -> Job | None:
        """See `Broker.get`."""
        number = checked_int(job_id, "job_id", 0)
        return self._with_payloads(lambda engine: engine.get(number))


def look(path: Path, *, progress: Progress | None = None) -> Look:
    """Look into a directory, whether a broker has it open or not: ``with look("data") as found``. Nothing is changed.

    It shows the state after the last record that is in the files: the index of the last checkpoint, copied to a
    temporary directory, and the log behind it. Delays and deadlines that passed since are for the owner to notice.

    Raises:
        StorageError: there is no log, or it cannot be read.
        CorruptLogError, FormatError: as at an opening.
    """
    directory = _directory(path)
    with _readable(directory):
        return Look(directory, ViewEngine(_disk(directory, progress), directory))


def _disk(directory: str, progress: Progress | None, passes: int = 1) -> SystemDisk:
    """One that tells how far the log was read."""
    if progress is None:
        return SystemDisk()
    most = passes * log_bytes(SystemDisk(), directory)
    return CountingDisk(lambda read: progress(min(read, most), most))


def _event(event: Event, body: bytes | None) -> dict[str, Any]:
    value: dict[str, Any] = {"event": type(event).__name__}
    for name, item in attrs.asdict(event, recurse=False).items():
        if name not in ("payload", "payloads", "payload_at"):
            value[name] = _plain(item)
    if body is not None and isinstance(event, Enqueued | Copied):
        at, found = event.payload_at, []
        for length in event.lengths if isinstance(event, Enqueued) else (event.length,):
            found.append(base64.b64encode(body[at : at + length]).decode())
            at += length
        value["payloads"] = found
    return value


def _plain(item: Any) -> Any:
    if attrs.has(type(item)):
        return attrs.asdict(item)
    if isinstance(item, Mapping):
        return dict(item)
    return [_plain(each) for each in item] if isinstance(item, list | tuple) else item


def _directory(path: Path) -> str:
    directory = os.path.abspath(checked_path(path))
    with _readable(directory):
        if not list_segments(SystemDisk(), os.path.join(directory, LOG)):
            raise StorageError(f"{directory}: there is no log; the directory of a broker has one")
    return directory


@contextlib.contextmanager
def _readable(directory: str) -> Iterator[None]:
    """What the system refuses is a StorageError."""
    try:
        yield
    except OSError as error:
        raise StorageError(f"{directory}: cannot be used: {error}") from error


@contextlib.contextmanager
def _owned(directory: str) -> Iterator[None]:
    """No broker has it, or gets it meanwhile. What cannot be written nobody else can open either."""
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


def _verified(directory: str, progress: Progress | None) -> Verification:
    found = Verification(path=directory)
    disk, log = _disk(directory, progress), os.path.join(directory, LOG)
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
