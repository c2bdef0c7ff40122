"""The durable engine: a directory that this process owns. It is opened, kept in order and closed here.

Threads in addition to the timer: `rivetq-keeper` makes spare segments, checkpoints and compacts; `rivetq-sync` syncs,
with ``fsync="interval"`` only. A failure in one of them fails the broker: the next call raises it.

Lock order: _keeper_lock, then the engine's _lock, then the log's own.
"""

from __future__ import annotations

import logging
import os
import shutil
import stat
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from functools import partial

from ..clock import Clock
from ..engine import Backup, FsyncMode, Keeping
from ..errors import DiskFullError, StorageError
from ..histogram import Histogram
from ..machine import decide, look, saving
from ..machine.advance import resume
from ..machine.apply import tally_expired
from ..machine.events import Event, IdsReserved
from ..machine.machine import Machine
from ..model import Health
from ..storage.ahead import Ahead, read_ahead
from ..storage.backup import take
from ..storage.codec import encode_snapshot
from ..storage.disk import Disk, SystemDisk
from ..storage.index import Index
from ..storage.layout import AHEAD, INDEX, LOG
from ..storage.lock import DirectoryLock
from ..storage.log import Log
from ..storage.record import frame_bytes
from ..storage.recovery import Recovered, recover, replay
from .checkpoint import CHECKPOINT_S
from .clockwork import NeedRoomError
from .compaction import CompactingEngine

logger = logging.getLogger("rivetq")

RELAXED_ID_BLOCK = 65_536
"""Without a sync per call, a power cut can lose ids that callers were told. A synced record reserves this many."""


class LocalEngine(CompactingEngine):
    """A directory, owned by this process."""

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
        self._cache_bytes = cache_bytes
        self._window_jobs = window_jobs
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
                    # An opening may stop at any point and be repeated, as after a crash. This time without the index.
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
        except BaseException as error:  # end the threads that run, and free the directory
            self.close()
            if isinstance(error, RuntimeError):  # "can't start new thread"
                raise StorageError(f"{path}: cannot be used as a broker's directory: {error}") from error
            raise

    def _open(self, clock: Clock, release_on_open: bool) -> None:
        found = recover(self._disk, self._path, self._index, clock, self._new_machine)
        super().__init__(
            found.machine,
            clock,
            found.now_ms,
            found.boot_ms,
            path=self._path,
            disk=self._disk,
            owner=self._owner,
            log=self._new_log(found),
            index=self._index,
            fsync=self._fsync,
            fsync_interval=self._fsync_interval,
            segment_bytes=self._segment_bytes,
            window_jobs=self._window_jobs,
        )
        self._open_log(found)
        self._take_over(found, release_on_open)
        with suppress(DiskFullError):  # the keeper tries it again
            self._sweep()

    def _new_machine(self) -> Machine:
        return Machine(cache_bytes=self._cache_bytes, id_block=0 if self._fsync == "always" else RELAXED_ID_BLOCK)

    def _new_log(self, found: Recovered) -> Log:
        directory = os.path.join(self._path, LOG)
        self._disk.make_directory(directory)
        log = Log(self._disk, directory, log_id=found.log_id, epoch=found.epoch, segment_bytes=self._segment_bytes)
        log.sizes = found.sizes
        log.resume_after(found.last_segment, found.end_lsn, found.end_crc)
        return log

    def _open_log(self, found: Recovered) -> None:
        """Begin a new segment and epoch. Records that may not be on disk yet are written again first."""
        log = self._log
        log.space.adopt()
        snapshot = encode_snapshot(saving.snapshot(self._machine))
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

    def _take_over(self, found: Recovered, release_on_open: bool) -> None:
        """End the former owner's leases, or keep them. From here on this engine serves."""
        machine = self._machine
        ahead = os.path.join(self._path, AHEAD)
        machine.unbegun = read_ahead(ahead)
        resume(machine, max(found.now_ms, machine.now_ms), found.epoch << 32)
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
        self._log.drop(machine.oldest_segment - 1)

    def _end_leases(self) -> None:
        """The former owner is gone. A crash between two records leaves the other leases to the next opening."""
        machine = self._machine

        def plan(job_ids: Sequence[int], now_ms: int) -> tuple[list[Event], list[Event]]:
            # A lease whose deadline passed meanwhile ends as expired: in every call the clock acts first.
            events = decide.owner_gone(machine, now_ms, job_ids)
            return events, events

        held = decide.held_jobs(machine)
        for start in range(0, len(held), decide.PART_JOBS):
            ended = self._change(partial(plan, held[start : start + decide.PART_JOBS]), sync=False)
            tally_expired(machine, ended)
        self._change(lambda now_ms: ([], None))

    def start(self) -> None:
        super().start()
        self._start_thread("rivetq-keeper", self._run_keeper)

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
            self._log.space.refill()  # first: a caller may soon wait for this space
        finally:  # on a full disk too: a compaction makes room
            with self._keeper_lock:
                wanted = self._is_due() or (overdue and self._unsaved_bytes)
                if wanted and time.monotonic() >= self._not_before_s:
                    self._checkpoint()
                elif self._keeps_much():
                    self._put_away_all()
                self._compact(self._garbage_upto())

    @property
    def keeping(self) -> Keeping:
        return self

    def sync(self) -> None:
        self._check()
        self._sync_all()

    def checkpoint(self) -> None:
        self._check()
        with self._keeper_lock:
            self._checkpoint()

    def compact(self) -> None:
        self._check()
        with suppress(DiskFullError):  # then compact without the tail: dropped segments make room
            self._rotate()
        with self._keeper_lock:
            self._compact(self._copyable_upto())

    def rotate(self) -> None:
        self._check()
        self._rotate()

    def backup(self, out: str, *, link: bool) -> Backup:
        self._check()
        self._sync_all()
        return take(self._disk, self._path, out, self.clock, link=link, least_lsn=self._log.durable_lsn)

    # Ending

    def _stop(self) -> None:
        super()._stop()
        self._keeper_poked.set()

    def _finish(self, save: bool) -> None:
        with ExitStack() as last:  # each runs, even if another one raises
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
            except OSError:  # LMDB would close a descriptor that may belong to another file by now
                self._index.forget()

    def _save(self) -> None:
        machine = self._machine
        with self._lock:
            try:
                # A clean end: no caller was told an id above this one.
                self._record([IdsReserved(machine.next_id)], machine.now_ms)
            except NeedRoomError:
                logger.warning("rivetq: %s: no space to note a clean end", self._path)
        with self._keeper_lock:
            self._checkpoint(last=True)  # waits until all records are on disk
        self._group.close()
        self._log.close()

    # What it tells

    def metrics(self) -> dict[str, int]:
        self._check()
        log = self._log
        with self._lock:
            segments, log_bytes = len(log.sizes), sum(log.sizes.values())
            live = look.live_bytes(self._machine), look.queue_bytes(self._machine)
            live_bytes = sum(sum(each.values()) for each in live)
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
