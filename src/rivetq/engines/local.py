"""The durable engine: machine, codec, log, index and group commit, called in turn from here; none knows another.

Threads besides the timer: `rivetq-keeper` makes spare segments, checkpoints and compacts; `rivetq-sync`, with
``fsync="interval"`` only, syncs. A failure in one of them fails the broker: the next call raises it.

Lock order: _keeper_lock, then the engine's _lock, then the log's own.
"""

from __future__ import annotations

import logging
import os
import shutil
import stat
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import lmdb

from ..clock import Clock
from ..engine import Backup, Capabilities, FsyncMode
from ..errors import DiskFullError, ForkedBrokerError, StorageError, UsageError
from ..histogram import Histogram
from ..machine import decide
from ..machine.entry import Entry
from ..machine.events import (
    Acked,
    Buried,
    Cancelled,
    Copied,
    Enqueued,
    Event,
    Extended,
    IdsReserved,
    KeyCopied,
    Leased,
    Purged,
    Redriven,
    Released,
    Retried,
    SegmentsDropped,
)
from ..machine.machine import Machine
from ..machine.queue import LEASED
from ..machine.run import Columns, Run
from ..machine.snapshot import Changes, Place
from ..model import Health
from ..storage.ahead import Ahead, read_ahead
from ..storage.backup import take
from ..storage.codec import decode_record, encode_record, encode_snapshot
from ..storage.disk import Disk, SystemDisk
from ..storage.group_commit import GroupCommit
from ..storage.header import corrupt
from ..storage.index import Index
from ..storage.index_values import encode_entry, encode_run
from ..storage.layout import AHEAD, INDEX, LOG
from ..storage.lock import DirectoryLock
from ..storage.log import Log
from ..storage.record import MAX_BODY_BYTES, frame_bytes
from ..storage.recovery import Recovered, recover, replay
from ..storage.segment import Record, Scan, read_header
from .live import LiveEngine, NeedRoomError
from .notifier import Tell

logger = logging.getLogger("rivetq")

RELAXED_ID_BLOCK = 65_536
"""Without a sync per call a power cut can forget ids that were told; so many are written down, synced, at a time."""
CHECKPOINT_BYTES = 64 * 2**20
"""Log that a recovery may have to replay, about; a smaller segment lowers it."""
CHECKPOINT_S = 30.0
SLICE = 50
"""Jobs per hold of the lock during a checkpoint: some 200 us."""
WORK_S, REST_S = 0.001, 0.0001
"""A background thread that computes without a pause makes every other thread wait for the interpreter's 5 ms switch
interval after each of its system calls; one that rests for a moment after each millisecond of work does not. It does
not rest more often, since it may wait that long itself to go on."""
SWEEP_KEYS = 100_000
"""Ended keys that one checkpoint removes at most."""
PACK_SLICE = 128
"""Loose jobs that are put into a run per hold of the lock."""
LOOK_RECORDS, LOOK_BYTES = 8, 4096
"""One record in so many, and every large one, looks whether the keeper has something to do."""
RESIDENT_RUNS = 2
"""Runs at the head of a window that stay in memory: the one that is leased from, and the next."""
LOOSE_SHARE = 8
"""A job or key that is an object weighs some eight times as much as one in a run."""
RUNS_READ = 64
"""Runs read back from the index after which those not at a head are put away again."""
MANY_SEGMENTS, SMALL_SEGMENT_BYTES = 16, 2**20
"""Every opening begins a segment. More than so many, and one more for each so many bytes of log, are swept up though
they hold little."""
SWEEP_BYTES, SWEEP_BYTES_MOST = 2**20, 16 * 2**20
"""Log that an opening sweeps up for each MANY_SEGMENTS that there are, and at most: a program that opens, makes one
call and closes gives the keeper no turn."""
COPY_JOBS, COPY_BYTES = 32, 256 * 1024
"""Jobs and payload bytes per record of a compaction."""
WORTH_COPYING = 0.75
"""On demand, a segment with a larger share of live bytes than this is left alone."""


_Prepared = tuple[bytes, bytes | None, bool, int]
"""A record's body, the snapshot of the segment that it begins, whether it is synced in every mode, its jobs."""


class LocalEngine(LiveEngine):
    """A directory, owned by this process."""

    capabilities = Capabilities(durable=True, shared=False, strict_order=True)

    def __init__(
        self,
        path: str,
        *,
        fsync: FsyncMode,
        fsync_interval: float,
        segment_bytes: int,
        release_on_open: bool,
        cache_bytes: int,
        window_jobs: int,
        clock: Clock,
        disk: Disk | None = None,
    ) -> None:
        path = os.path.abspath(path)  # the program may change its directory later
        self._disk = disk or SystemDisk()
        self._path = path
        self._fsync = fsync
        self._fsync_interval = fsync_interval
        self._segment_bytes = segment_bytes
        self._checkpoint_bytes = min(CHECKPOINT_BYTES, segment_bytes)
        self._cache_bytes = cache_bytes
        self._window_jobs = window_jobs
        self._runs_read = 0  # what the index had read back when runs were last put away
        self._must_sync: tuple[int, ...] = ()  # records that are synced in every mode and are not known to be
        self._keeper_lock = threading.Lock()  # one checkpoint or compaction at a time
        self._keeper_poked = threading.Event()
        self._sync_poked = threading.Event()
        self._unsaved_bytes = 0  # log written since the last checkpoint began
        self._not_before_s = 0.0  # no checkpoint by itself before this: the last one failed, and each takes all anew
        self._rested_s = 0.0  # when the keeper last gave way to others
        self._short_of_space = False
        self._checkpoints = self._copied_bytes = 0
        self._index = Index(self._disk, os.path.join(path, INDEX))
        started = time.monotonic()
        try:
            self._disk.make_directory(path)
            self._owner = DirectoryLock(path, clock.wall_ms())
            try:
                if os.stat(path).st_mode & stat.S_IWOTH:
                    logger.warning("rivetq: %s: every user of this machine may replace its files: chmod o-w", path)
                try:
                    self._open(clock, release_on_open)
                except StorageError as error:
                    if not self._index.distrusted:
                        raise
                    # An opening may end at any point and be made again, as after a crash; now without the index.
                    logger.warning("rivetq: %s: the index cannot be used, rebuilding it: %s", path, error)
                    self._index.close()
                    self._open(clock, release_on_open)
            except BaseException:
                self._index.close()
                self._owner.refuse()
                raise
        except OSError as error:
            raise StorageError(f"{path}: cannot be used as a broker's directory: {error}") from error
        self._recovery_ms = round((time.monotonic() - started) * 1000)
        try:
            self.start()
        except BaseException as error:  # the threads that run end, and the directory is free
            self.close()
            if isinstance(error, RuntimeError):  # "can't start new thread"
                raise StorageError(f"{path}: cannot be used as a broker's directory: {error}") from error
            raise

    def _open(self, clock: Clock, release_on_open: bool) -> None:
        found = recover(self._disk, self._path, self._index, clock, self._new_machine)
        super().__init__(found.machine, clock, found.now_ms, found.boot_ms)
        self._open_log(found, release_on_open)
        with suppress(DiskFullError):  # the keeper tries it again
            self._sweep()

    def _new_machine(self) -> Machine:
        return Machine(cache_bytes=self._cache_bytes, id_block=0 if self._fsync == "always" else RELAXED_ID_BLOCK)

    def _open_log(self, found: Recovered, release_on_open: bool) -> None:
        """A new segment and epoch; what recovery found but nobody knows to be on disk is written again first."""
        directory = os.path.join(self._path, LOG)
        self._disk.make_directory(directory)
        self._log = log = Log(
            self._disk, directory, log_id=found.log_id, epoch=found.epoch, segment_bytes=self._segment_bytes
        )
        self._log_id = found.log_id
        self._group = GroupCommit(log)
        log.sizes = found.sizes
        log.resume_after(found.last_segment, found.end_lsn, found.end_crc)
        log.space.adopt()
        snapshot = encode_snapshot(self._machine.snapshot())
        again = sum(frame_bytes(len(body)) for body in found.surplus) + 1  # all of it into this one segment
        log.space.make_room(again, len(snapshot), keep_reserve=False)
        self._begin_segment(snapshot, found.now_ms, again)
        machine = self._machine
        for body in found.surplus:
            replay(machine, body, log.append(body))
        log.flush()
        log.open_mark()
        log.sync()
        if found.last_segment:
            old = log.open_segment(found.last_segment)
            if old.size > found.end_offset:
                old.truncate(found.end_offset)
            log.sizes[found.last_segment] = found.end_offset
        if found.applied_lsn:
            self._index.reopen()
        else:
            self._index.clear()
        ahead = os.path.join(self._path, AHEAD)
        machine.unbegun = read_ahead(ahead)
        machine.start(max(found.now_ms, machine.now_ms), found.epoch << 32)
        self._unsaved_bytes = sum(found.sizes.values()) if not found.applied_lsn else found.end_offset
        self._keeper_poked.set()
        if release_on_open:
            self._end_leases()
        held = (machine.jobs[job_id] for queue in machine.queues.values() for job_id in queue.leased)
        kept = [(entry.token, entry.id) for entry in held if entry.token in machine.unbegun]
        machine.unbegun = {token for token, _ in kept}
        self._ahead = Ahead(ahead, kept)
        if kept:  # a holder that lives on may begin one of them
            self._ahead.make()
        log.drop(machine.oldest_segment - 1)

    def _end_leases(self) -> None:
        """The former owner is gone. A crash between two records leaves the other leases to the next opening."""
        machine = self._machine

        def plan(job_ids: Sequence[int], now_ms: int) -> tuple[list[Event], list[Event]]:
            # Leases whose deadline passed meanwhile end as such: in every call the clock comes first.
            events = decide.owner_gone(machine, now_ms, job_ids)
            return events, events

        held = decide.held_jobs(machine)
        for start in range(0, len(held), decide.PART_JOBS):
            ended = self._change(partial(plan, held[start : start + decide.PART_JOBS]), sync=False)
            machine.tally_expired(ended)
        self._change(lambda now_ms: ([], None))

    def start(self) -> None:
        super().start()
        self._start_thread("rivetq-keeper", self._run_keeper)
        if self._fsync == "interval":
            self._start_thread("rivetq-sync", self._run_sync)

    # The log behind the machine (see LiveEngine, "With files")

    def _prepare(self, events: Sequence[Event], now_ms: int, keep_reserve: bool) -> _Prepared:
        body = encode_record(events, now_ms)
        length = len(body)
        if length > MAX_BODY_BYTES:
            raise UsageError(f"{length} bytes in one record, {MAX_BODY_BYTES} is the most: split the batch")
        must_sync = IdsReserved in map(type, events)
        jobs = _jobs(events[0]) if len(events) == 1 else sum(map(_jobs, events))
        if self._log.space.is_roomy(length):
            return body, None, must_sync, jobs
        snapshot = snapshot_length = None
        if not self._log.space.fits(length) and not self._log.space.can_extend(length):
            snapshot = encode_snapshot(self._machine.snapshot())
            snapshot_length = len(snapshot)
        if not self._log.space.has_room(length, snapshot_length, keep_reserve=keep_reserve):
            raise NeedRoomError(length, snapshot_length, keep_reserve)
        return body, snapshot, must_sync, jobs

    def _append(self, prepared: _Prepared, now_ms: int) -> Place:
        body, snapshot, must_sync, jobs = prepared
        if snapshot is not None:
            self._begin_segment(snapshot, now_ms, len(body))
        place = self._log.append(body)
        if must_sync:
            durable_lsn = self._log.durable_lsn
            self._must_sync = (*(lsn for lsn in self._must_sync if lsn > durable_lsn), place.lsn)
        self._log.jobs += jobs
        self._unsaved_bytes += len(body)
        if (place.lsn % LOOK_RECORDS == 0 or len(body) > LOOK_BYTES) and (
            self._is_due() or self._log.space.is_wanted()
        ):
            self._keeper_poked.set()
        return place

    def _begin_segment(self, snapshot: bytes, now_ms: int, body_length: int = 1) -> None:
        boot_id, boot_ms = self.clock.boot_id, now_ms - self._offset_ms  # at that moment, not now
        try:
            self._log.begin_segment(snapshot, boot_id=boot_id, boot_ms=boot_ms, now_ms=now_ms, body_length=body_length)
        except BaseException as error:
            # The log may be half in the old segment and half in the new one: nobody may go on from here.
            self._fail(error)
            raise

    def _make_room(self, need: NeedRoomError) -> None:
        try:
            self._log.space.make_room(need.body_length, need.snapshot_length, keep_reserve=need.keep_reserve)
        except OSError as error:
            self._fail(error)
            raise self._failed_error("not_done") from error

    def _last_lsn(self) -> int:
        return self._log.next_lsn - 1

    def _settle(self, lsn: int, *, sync: bool = True) -> None:
        log = self._log
        try:
            if sync and self._is_to_sync(lsn):
                self._group.wait(lsn)
            else:
                log.write(lsn)
        except Exception as error:
            self._fail(error)
            raise self._failed_error("unknown") from error
        except BaseException as error:
            if log.broken:
                self._fail(error)
            raise

    def _settle_reservation(self) -> None:
        must_sync = self._must_sync
        if must_sync and must_sync[-1] > self._log.durable_lsn:
            self._settle(must_sync[-1])

    def _is_to_sync(self, lsn: int) -> bool:
        """Who answers for this record waits for the disk: in a relaxed mode, for one up to it that must not go."""
        if self._fsync == "always":
            return True
        must_sync, durable_lsn = self._must_sync, self._log.durable_lsn  # ascending
        if not must_sync or must_sync[-1] <= durable_lsn:
            return False
        return any(durable_lsn < each <= lsn for each in must_sync)

    def _settle_soon(self, lsn: int, tell: Tell) -> bool:
        if not self._is_to_sync(lsn) or (self._log.durable_lsn >= lsn and self._ended is None):
            return False
        self._notifier.when_durable(lsn, tell)
        return True

    def _fail(self, error: BaseException) -> None:
        super()._fail(error)
        self._group.fail(error)

    def begin(self, token: int) -> None:
        if self._ended is not None:
            self._check()
        self._ahead.begin(token)
        if self._machine.unbegun:
            self._machine.unbegun.discard(token)

    def _ready_for_unbegun(self) -> None:
        self._ahead.make()

    def _note_unbegun(self, event: Leased) -> None:
        self._ahead.note(zip(event.tokens, event.ids, strict=True), self._is_held)

    def _forget_unbegun(self, event: Leased) -> None:
        for token in event.tokens:
            self._ahead.begin(token)

    def _is_held(self, token: int, job_id: int) -> bool:
        # Caller holds self._lock.
        entry = self._machine.jobs.get(job_id)
        return entry is not None and entry.token == token and entry.state == LEASED

    def _look(self, read: Callable[[int], Any]) -> Any:
        value = super()._look(read)
        if self._index.reads - self._runs_read > RUNS_READ:
            self._keeper_poked.set()  # what was looked at does not stay in memory
        return value

    def _payloads(self, entries: Sequence[Entry]) -> list[bytes | None]:
        if len(entries) == 1:
            entry = entries[0]
            payload, entry.payload = entry.payload, None  # a later delivery reads it from the log
            return [self._read(entry) if payload is None else payload]
        payloads = [entry.payload for entry in entries]
        missing = []
        for i, entry in enumerate(entries):
            entry.payload = None
            if payloads[i] is None:
                missing.append(i)
        if len(missing) > 1:
            for i, payload in zip(missing, self._read_many([entries[i] for i in missing]), strict=True):
                payloads[i] = payload
        return [
            self._read(entry) if payload is None else payload for entry, payload in zip(entries, payloads, strict=True)
        ]

    def _read_many(self, entries: Sequence[Entry]) -> list[bytes | None]:
        """Payloads from the log; None for those that are somewhere else by now."""
        with self._reading():
            self._log.write(max(entry.lsn for entry in entries))
            return self._log.read_many([(entry.segment, entry.offset, entry.length, entry.crc) for entry in entries])

    def _read(self, entry: Entry | None) -> bytes | None:
        """A payload from the log; None if the job is gone."""
        with self._reading():
            while entry is not None:
                self._log.write(entry.lsn)
                payload = self._log.read(entry.segment, entry.offset, entry.length, entry.crc)
                if payload is not None:
                    return payload
                with self._lock:  # the job was copied and its segment dropped since
                    self._check()
                    entry = self._machine.look(entry.id)
        return None

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """A log that cannot be read stops the broker."""
        try:
            yield
        except (StorageError, OSError) as error:
            self._check()  # closed meanwhile: that is the reason
            self._fail(error)
            if isinstance(error, StorageError):
                raise
            raise self._failed_error("unknown") from error
        except BaseException as error:
            if self._log.broken:
                self._fail(error)
            raise

    # The keeper: spares, checkpoints, compaction

    def _run_keeper(self) -> None:
        while self._ended is None:
            poked = self._keeper_poked.wait(CHECKPOINT_S)
            self._keeper_poked.clear()
            try:
                if self._ended is None:
                    self._keep(overdue=not poked)
            except DiskFullError as error:
                if not self._short_of_space:
                    logger.warning("rivetq: %s: housekeeping waits for disk space: %s", self._path, error)
                self._short_of_space = True
            except BaseException as error:
                if self._ended is None:
                    self._fail(error)
            else:
                self._short_of_space = False

    def _keep(self, *, overdue: bool) -> None:
        try:
            self._log.space.refill()  # first: somebody may soon wait for it
        finally:  # on a full disk too: a compaction makes room
            with self._keeper_lock:
                wanted = self._is_due() or (overdue and self._unsaved_bytes)
                if wanted and time.monotonic() >= self._not_before_s:
                    self._checkpoint()
                elif self._index.reads - self._runs_read > RUNS_READ:
                    self._put_away_all()
                self._compact(self._garbage_upto())

    def _is_due(self) -> bool:
        """A checkpoint: the log to replay, or what waits in memory for one, got long."""
        machine = self._machine
        changes = machine.changes
        return changes is not None and (
            self._unsaved_bytes > self._checkpoint_bytes
            or changes.cells > self._window_jobs
            or len(changes.jobs) + len(machine.keys.changed) > self._window_jobs // LOOSE_SHARE
        )

    def _run_sync(self) -> None:
        while self._ended is None:
            self._sync_poked.wait(self._fsync_interval)
            try:
                if self._ended is None and self._log.written_lsn > self._log.durable_lsn:
                    self._group.wait(self._log.written_lsn)
            except BaseException as error:
                self._fail(error)

    def maintain(self, verb: str) -> None:
        self._check()
        match verb:
            case "sync":
                self._sync_all()
            case "checkpoint":
                with self._keeper_lock:
                    self._checkpoint()
            case "compact":
                with suppress(DiskFullError):  # then without the tail: what is dropped makes room
                    self._rotate()
                with self._keeper_lock:
                    self._compact(self._copyable_upto())
            case "rotate":
                self._rotate()
            case _:
                raise UsageError(f"maintain: unknown verb {verb!r}")

    def backup(self, out: str, *, link: bool) -> Backup:
        self._check()
        self._sync_all()
        return take(self._disk, self._path, out, self.clock, link=link, least_lsn=self._log.durable_lsn)

    def record(self, events: Sequence[Event]) -> None:
        """Write down what was decided elsewhere; not synced (see salvage)."""
        self._change(lambda now_ms: (list(events), None), sync=False)

    def _flush(self) -> None:
        """Write the log's buffer, a begun segment without records included."""
        with self._or_fail():
            self._log.flush()

    @contextmanager
    def _or_fail(self) -> Iterator[None]:
        """What the disk refuses stops the broker, and so does what breaks into a write or a sync."""
        try:
            yield
        except Exception as error:
            self._fail(error)
            raise self._failed_error("unknown") from error
        except BaseException as error:
            if self._log.broken:
                self._fail(error)
            raise

    def _sync_all(self) -> None:
        with self._lock:
            self._check()
            lsn = self._last_lsn()
        self._wait_durable(lsn)

    def _wait_durable(self, lsn: int) -> None:
        """Whatever the mode."""
        with self._or_fail():
            self._group.wait(lsn)

    def _rotate(self) -> None:
        while True:
            try:
                with self._lock:
                    now_ms = self._tick()
                    if self._log.tail_is_empty:
                        return
                    snapshot = encode_snapshot(self._machine.snapshot())
                    if not self._log.space.has_room(1, len(snapshot), keep_reserve=True):
                        raise NeedRoomError(1, len(snapshot), keep_reserve=True)
                    self._begin_segment(snapshot, now_ms)
                break
            except NeedRoomError as need:
                self._make_room(need)
        self._flush()
        self._sync_all()

    def _checkpoint(self, *, last: bool = False) -> None:
        """Write what changed since the last one into the index. Caller holds _keeper_lock, not _lock.

        Runs are written as they were at `lsn`: their columns are shared, nobody changes what was taken. Loose jobs and
        keys are taken in slices while calls go on; replay from `lsn` makes them whole (see events).
        """
        if not last:
            self._check()  # whoever waited for _keeper_lock while close() had it comes too late
        with self._or_fail():
            self._check_files()
        machine = self._machine
        self._tidy()
        taken, unsaved = Changes(), 0
        try:
            with self._lock:
                changes = machine.changes
                assert changes is not None
                snapshot, lsn = machine.snapshot(), self._last_lsn()
                runs = [self._take_run(run) for run in changes.runs]
                # What is in a run now is written with it, whoever takes it out before its slice.
                loose = changes.jobs & machine.jobs.keys()
                unsaved = self._unsaved_bytes
                # Last, and at once: whatever breaks in finds them in one place or in the other.
                taken, machine.changes, self._unsaved_bytes = changes, Changes(), 0
            jobs = [item for part in self._slices(sorted(loose)) for item in self._take_jobs(part)]
            jobs += [(job_id.to_bytes(8, "big"), None) for job_id in taken.jobs - loose]
            with self._lock:
                # Last: a job that ended after `lsn` and before its slice is gone from the index, and replay skips the
                # end of a job that it does not know: the key that it left behind must be in the index as well.
                keys = machine.keys.freeze()
                key_counts = dict(machine.keys.counts)
                last_lsn = self._last_lsn()
            self._wait_durable(last_lsn)  # the index is never ahead of the disk
            with self._or_fail():
                self._check_files()  # once more: it took a while
            try:
                self._index.write(
                    self._log_id,
                    lsn,
                    snapshot,
                    jobs=self._paced(jobs),
                    runs=chain(
                        self._paced([(number.to_bytes(8, "big"), None) for number in sorted(taken.gone)]),
                        map(_encode_run, self._paced(runs)),
                    ),
                    keys=self._paced(list(keys.items())),
                    key_counts=key_counts,
                )
                self._checkpoints += 1
            except (lmdb.Error, OSError, ValueError) as error:
                # The transaction did not happen; what the index holds is as it was, and still needed.
                logger.warning("rivetq: %s: the index could not be written, it is tried again: %s", self._path, error)
                self._not_before_s = time.monotonic() + CHECKPOINT_S
                self._take_back(taken, unsaved)
                return
            with self._lock:
                machine.keys.written(self._index)
        except BaseException:  # also behind a write that succeeded: then the same is written once more
            self._take_back(taken, unsaved)
            raise
        self._put_away_all()

    def _tidy(self) -> None:
        """Before a checkpoint: ended keys go, and what lies about loose is put into runs."""
        machine = self._machine
        for part in self._slices(self._index.ended_keys(machine.now_ms, SWEEP_KEYS)):
            with self._lock:
                machine.keys.sweep(part, machine.now_ms)
        with self._lock:
            crowded = machine.crowded(self._window_jobs // LOOSE_SHARE)
        for state, window in crowded:
            more = True
            while more:
                self._rest()
                with self._lock:
                    more = machine.pack(state, window, PACK_SLICE)

    # The pace of the keeper. Caller holds _keeper_lock.

    def _rest(self) -> None:
        if time.monotonic() - self._rested_s > WORK_S:
            time.sleep(REST_S)
            self._rested_s = time.monotonic()

    def _slices(self, items: list[Any]) -> Iterator[list[Any]]:
        for start in range(0, len(items), SLICE):
            yield items[start : start + SLICE]
            self._rest()

    def _paced(self, items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            yield item
            self._rest()

    def _take_run(self, run: Run) -> _TakenRun:
        # Caller holds self._lock.
        if not run.number:
            run.number, self._machine.next_run = self._machine.next_run, self._machine.next_run + 1
        columns = run.load()
        return _TakenRun(run, run.state, columns, run.at, len(columns))

    def _put_away_all(self) -> None:
        """Let go of the columns of runs that are in the index as they are: not of the head of a window, nor of one
        that still grows or has payloads in memory."""
        machine = self._machine
        self._runs_read = self._index.reads  # first: what is read meanwhile is put away the next time
        with self._lock:
            windows = [window for waiting in machine.waiting.values() for _, window in waiting.each()]
        loaded: list[Run] = []
        for window in windows:
            with self._lock:
                loaded += [
                    run
                    for run in window.runs[RESIDENT_RUNS:]
                    if run.columns is not None and run.columns.payloads is None and run not in window.opens
                ]
        for part in self._slices(loaded):
            with self._lock:
                changes = machine.changes
                assert changes is not None
                for run in part:
                    if run.left and run.number and run not in changes.runs:
                        run.put_away(self._index)

    def _take_jobs(self, ids: list[int]) -> list[tuple[bytes, bytes | None]]:
        items: list[tuple[bytes, bytes | None]] = []
        with self._lock:
            for job_id in ids:
                entry = self._machine.jobs.get(job_id)
                if entry is not None:
                    entry.indexed = True
                items.append((job_id.to_bytes(8, "big"), None if entry is None else encode_entry(entry)))
        return items

    def _take_back(self, taken: Changes, unsaved: int) -> None:
        """The checkpoint did not happen: what it took is still to be written."""
        machine = self._machine
        with self._lock:
            changes = machine.changes
            assert changes is not None
            self._unsaved_bytes += unsaved
            changes.jobs |= taken.jobs
            changes.packed |= taken.packed
            changes.cells += taken.cells
            changes.gone |= taken.gone
            for run in taken.runs:
                (changes.runs.add if run.left else changes.runs.discard)(run)
            machine.thaw_keys()

    def _garbage_upto(self) -> int:
        """The last segment that is worth dropping now, 0 if none: oldest first, until half of the log is live.

        A segment without anything live goes for nothing. The total rewritten stays below what is reclaimed, hence
        write amplification below 2.
        """
        with self._lock:
            sizes, live = dict(self._log.sizes), self._machine.live_bytes()
        slack = 0 if self._short_of_space else self._segment_bytes  # on a full disk every byte counts
        total, limit = sum(sizes.values()), 2 * sum(live.values()) + slack
        upto = 0
        if total > slack:
            for segment in sorted(sizes)[:-1]:
                if total <= limit and live.get(segment, 0):
                    break
                total -= sizes[segment] - live.get(segment, 0)
                upto = segment
        return upto or self._small_upto(sizes, max(self._segment_bytes, sizes[min(sizes)]))

    def _small_upto(self, sizes: dict[int, int], room: int) -> int:
        """If many segments hold little: the last of the oldest ones that have no more than `room` bytes, 0 if none.

        What is large and lies before them has to be copied first, a segment at a time. That is why so many bytes allow
        one segment more: sweeping goes on until the small ones are one, and not before it is worth its while.
        """
        small = min(SMALL_SEGMENT_BYTES, self._segment_bytes // 4)
        upto = 0
        if len(sizes) > MANY_SEGMENTS + sum(sizes.values()) // small:
            for segment in sorted(sizes)[:-1]:
                room -= sizes[segment]
                if room < 0:
                    break
                upto = segment
        return upto

    def _sweep(self) -> None:
        """At an opening: if many segments hold little, put what lives in the oldest of them into the new one.

        The more there are, the more it may copy: what an opening pays on average has a limit, and so has their number.
        Damage is left for the keeper to meet: no opening is refused, after it changed something, for the sake of this.
        """
        sizes = dict(self._log.sizes)
        upto = self._small_upto(sizes, min(SWEEP_BYTES_MOST, SWEEP_BYTES * len(sizes) // MANY_SEGMENTS))
        if upto and all(map(self._is_whole, (s for s in sizes if s <= upto))):
            with self._keeper_lock:
                self._compact(upto)

    def _is_whole(self, segment: int) -> bool:
        """All records of a sealed segment can be read."""
        try:
            file, upto_lsn = self._log.open_segment(segment), self._last_lsn_in(segment)
            scan = Scan(file.read_all(), read_header(file))
            for _ in scan.records(upto_lsn):
                pass
        except (StorageError, OSError):
            return False
        return scan.next_lsn > upto_lsn

    def _last_lsn_in(self, segment: int) -> int:
        """Of a sealed segment."""
        return read_header(self._log.open_segment(segment + 1)).first_lsn - 1

    def _copyable_upto(self) -> int:
        """On demand: the last segment with a fair share of garbage; all before it must go first."""
        with self._lock:
            sizes, live = dict(self._log.sizes), self._machine.live_bytes()
        return max((s for s in sorted(sizes)[:-1] if live.get(s, 0) <= WORTH_COPYING * sizes[s]), default=0)

    def _compact(self, upto: int) -> None:
        """Drop the segments up to this one, after what lives in them was copied. Caller holds _keeper_lock."""
        if not upto:
            return
        self._flush()  # the successor's header must be in its file
        for segment in [s for s in sorted(self._log.sizes) if s <= upto]:
            self._copy_segment(segment)
            if self._is_due():
                self._checkpoint()  # so that memory stays bounded
            else:
                self._put_away_all()
        self._checkpoint()  # which syncs the copies; the index now points at them
        self._change(lambda now_ms: ([SegmentsDropped(upto)], None), sync=False)
        self._sync_all()
        with self._lock:
            self._check()
        with self._or_fail():
            self._log.drop(upto)

    def _copy_segment(self, segment: int) -> None:
        with self._lock:
            if not self._machine.live_bytes().get(segment, 0):
                return
        batch: list[_Live] = []
        size = 0
        with self._reading():
            for item in self._contents(segment):
                batch.append(item)
                size += len(item.payload)
                if len(batch) == COPY_JOBS or size >= COPY_BYTES:
                    self._copy(segment, batch)
                    batch, size = [], 0
            if batch:
                self._copy(segment, batch)

    def _copy(self, segment: int, batch: list[_Live]) -> None:
        """Rewrite at the tail those of the batch that still live in this segment."""

        def plan(now_ms: int) -> tuple[list[Event], None]:
            events = [event for item in batch for event in self._copies(segment, item)]
            return events, None

        self._change(plan, keep_reserve=True, sync=False)
        self._copied_bytes += sum(len(item.payload) for item in batch)

    def _copies(self, segment: int, item: _Live) -> Iterator[Event]:
        # Caller holds self._lock.
        entry = self._machine.look(item.job_id, item.queue, item.priority)
        if entry is not None and entry.segment == segment:
            yield copied(entry, item.payload)
        elif item.key is not None:
            key = self._machine.keys.get(item.queue, item.key)
            if key is not None and key.expires_ms and key.segment == segment and key.job_id == item.job_id:
                yield KeyCopied(item.queue, item.key, key.job_id, key.expires_ms)

    def _contents(self, segment: int) -> Iterator[_Live]:
        """The jobs and keys that were written in a sealed segment; CorruptLogError if it cannot be read whole."""
        file, upto_lsn = self._log.open_segment(segment), self._last_lsn_in(segment)
        scan = Scan(file.read_all(), read_header(file))
        for record in scan.records(upto_lsn):
            yield from self._live_in(record)
            self._rest()
        if scan.next_lsn <= upto_lsn:
            raise corrupt(file.path, scan.end_in_file, f"record {scan.next_lsn} cannot be read")

    def _live_in(self, record: Record) -> Iterator[_Live]:
        _, events = decode_record(record.body)
        for event in events:
            if isinstance(event, Enqueued):
                first_id, at = event.first_id, event.payload_at
                with self._lock:
                    alive = self._machine.alive(
                        event.queue, event.priority, first_id, first_id + len(event.lengths) - 1
                    )
                for i, length in enumerate(event.lengths):
                    key = event.keys[i] if event.keys is not None else None
                    if first_id + i in alive or key is not None:
                        payload = record.body[at : at + length]
                        yield _Live(first_id + i, event.queue, event.priority, key, payload)
                    at += length
            elif isinstance(event, Copied):
                payload = record.body[event.payload_at : event.payload_at + event.length]
                yield _Live(event.id, event.queue, event.priority, event.key, payload)
            elif isinstance(event, KeyCopied):
                yield _Live(event.job_id, event.queue, 0, event.key, b"")

    # Ending

    def _stop(self) -> None:
        self._keeper_poked.set()
        self._sync_poked.set()

    def _finish(self, save: bool) -> None:
        with ExitStack() as last:  # each of them, whatever becomes of the others
            last.callback(self._owner.release)
            last.callback(self._index.close)
            last.callback(self._ahead.close)
            last.callback(self._log.abandon)
            try:
                if save:
                    self._save()
            except BaseException:  # close() never raises; the log holds everything that was answered
                logger.exception("rivetq: %s: closing could not save all", self._path)
            try:
                self._check_files()
            except OSError:  # LMDB would close a number that may be another file's
                self._index.forget()

    def _check_files(self) -> None:
        """Raises OSError if the program closed files of ours.

        Then that of the index, whose descriptor is LMDB's own, may be another's as well, and the lock is gone.
        """
        self._owner.check()
        self._log.check()

    def _save(self) -> None:
        machine = self._machine
        with self._lock:
            try:
                # A clean end: no id was told above this one.
                self._record([IdsReserved(machine.next_id)], machine.now_ms)
            except NeedRoomError:
                logger.warning("rivetq: %s: no space to note a clean end", self._path)
        with self._keeper_lock:
            self._checkpoint(last=True)  # which waits for all records to be on disk
        self._group.close()
        self._log.close()

    def forked(self) -> None:
        super().forked()
        self._keeper_lock, self._keeper_poked, self._sync_poked = threading.Lock(), threading.Event(), threading.Event()
        # Also of a fork in the middle of an opening or a call, by a signal handler say: there may be less than all.
        self._disk.forked()
        if hasattr(self, "_log"):
            self._log.forked()
        if hasattr(self, "_group"):
            self._group.forked(ForkedBrokerError("this broker belongs to the process that was forked"))
        if hasattr(self, "_ahead"):
            self._ahead.forked()
        self._index.forget()

    def metrics(self) -> dict[str, int]:
        self._check()
        log = self._log
        with self._lock:
            segments, log_bytes = len(log.sizes), sum(log.sizes.values())
            live_bytes = sum(self._machine.live_bytes().values())
        return {
            "records": log.records,
            "fsyncs": log.syncs,
            "log_bytes_written": log.bytes_written,
            "log_segments": segments,
            "log_bytes": log_bytes,
            "live_bytes": live_bytes,
            "copied_bytes": self._copied_bytes,
            "checkpoints": self._checkpoints,
            "recovery_ms": self._recovery_ms,
            "checkpoint_lag_bytes": self._unsaved_bytes,
        }

    def histograms(self) -> dict[str, Histogram]:
        self._check()
        return {
            "fsync_seconds": self._log.sync_seconds.histogram(),
            "jobs_per_fsync": self._log.sync_jobs.histogram(),
        }

    def _vitals(self) -> Health:
        try:
            free: int | None = shutil.disk_usage(self._path).free
        except OSError:
            free = None
        return Health(
            state="open",
            last_error="housekeeping waits for disk space" if self._short_of_space else None,
            checkpoint_lag_bytes=self._unsaved_bytes,
            disk_free_bytes=free,
        )


def _jobs(event: Event) -> int:
    """How many jobs an event is about, for the histogram of jobs per sync."""
    if isinstance(event, Enqueued):
        return len(event.lengths)
    if isinstance(event, _OF_MANY):
        return len(event.ids)
    return int(isinstance(event, _OF_ONE))


# Once, not in each call: they are made for every record.
_OF_MANY = Leased | Acked | Purged | Redriven
_OF_ONE = Retried | Released | Buried | Extended | Cancelled


class _TakenRun(NamedTuple):
    """A run as it was when a checkpoint began: cells `start` to `stop` of its columns."""

    run: Run
    state: int
    columns: Columns
    start: int
    stop: int


class _Live(NamedTuple):
    """A job or key written in a segment that may live there still."""

    job_id: int
    queue: int
    priority: int
    key: str | None
    payload: bytes


def copied(entry: Entry, payload: bytes) -> Copied:
    """The word that a job is as it is, with its payload."""
    spec = entry.spec
    return Copied(
        entry.id, entry.queue.number, entry.state, spec.priority, entry.attempts, entry.token, spec.max_attempts,
        spec.retry, spec.visibility_ms, entry.enqueued_at_ms, entry.due_ms, entry.deadline_ms, entry.died_at_ms,
        entry.last_error, spec.headers, entry.key, entry.length, entry.crc, payload,
    )  # fmt: skip


def _encode_run(taken: _TakenRun) -> tuple[bytes, bytes]:
    run, state, columns, start, stop = taken
    columns = columns.picked(slice(start, stop))  # others may append to it meanwhile
    return run.number.to_bytes(8, "big"), encode_run(run.number, run.queue, run.priority, state, columns)
