"""A log behind the running machine: every change is a record, and is answered when the record is as safe as promised.

The mode `fsync` says when a record is safe: after a sync ("always"), or as soon as the operating system has it
("interval", "never"). In a relaxed mode a few records are synced all the same, such as those that promise ids.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from ..clock import Clock
from ..engine import Capabilities, FsyncMode
from ..errors import ForkedBrokerError, StorageError, UsageError
from ..machine import look, saving
from ..machine.entry import Entry
from ..machine.events import (
    Acked,
    Buried,
    Cancelled,
    Enqueued,
    Event,
    Extended,
    IdsReserved,
    Leased,
    Purged,
    Redriven,
    Released,
    Retried,
)
from ..machine.machine import Machine
from ..machine.queue import LEASED
from ..storage.ahead import Ahead
from ..storage.codec import encode_record, encode_snapshot
from ..storage.disk import Disk
from ..storage.group_commit import GroupCommit
from ..storage.lock import DirectoryLock
from ..storage.log import Log
from ..storage.record import MAX_BODY_BYTES
from .clockwork import NeedRoomError
from .live import LiveEngine
from .notifier import Tell

LOOK_RECORDS, LOOK_BYTES = 8, 4096
"""Every so many records, and after a large one, the engine checks whether the keeper has something to do."""


class DurableEngine(LiveEngine):
    """A machine whose changes are in a log.

    Args:
        machine: as it was recovered.
        clock, now_ms, boot_ms: see `Clockwork`.
        path: the directory.
        disk: where its files are.
        owner: the lock of the directory, which is held.
        log: positioned behind the last record.
        fsync: when a record is safe enough.
        fsync_interval: seconds between two syncs, with "interval".
    """

    capabilities = Capabilities(durable=True, shared=False, strict_order=True)
    _ahead: Ahead
    """Notes which leases were taken in advance. Set once the former owner's leases have been examined."""

    def __init__(
        self,
        machine: Machine,
        clock: Clock,
        now_ms: int,
        boot_ms: int,
        *,
        path: str,
        disk: Disk,
        owner: DirectoryLock,
        log: Log,
        fsync: FsyncMode,
        fsync_interval: float,
    ) -> None:
        # Set all of this before `super().__init__` makes the engine known to the fork handlers.
        self._path = path
        self._disk = disk
        self._owner = owner
        self._log = log
        self._group = GroupCommit(log)
        self._fsync = fsync
        self._fsync_interval = fsync_interval
        self._sync_poked = threading.Event()
        self._must_sync: tuple[int, ...] = ()  # records that are synced in every mode, and may not be yet
        self._snapshot_bytes = 0  # in the header of the tail
        self._unsaved_bytes = 0  # log written since the last checkpoint began
        self._keeper_poked = threading.Event()
        super().__init__(machine, clock, now_ms, boot_ms)

    def start(self) -> None:
        super().start()
        if self._fsync == "interval":
            self._start_thread("rivetq-sync", self._run_sync)

    def _is_due(self) -> bool:
        """Whether a checkpoint is due; the keeper is poked then."""
        raise NotImplementedError

    # Records (see Clockwork, "With files")

    def _record(self, events: Sequence[Event], now_ms: int, keep_reserve: bool = False) -> int:
        # Caller holds self._lock. Every change passes here, so this code calls as little as it can.
        body = encode_record(events, now_ms)
        length, log = len(body), self._log
        if length > MAX_BODY_BYTES:
            raise UsageError(f"{length} bytes in one record, {MAX_BODY_BYTES} is the most: split the batch")
        snapshot = None if log.space.is_roomy(length) else self._room_for(length, keep_reserve)
        try:
            if snapshot is not None:
                self._begin_segment(snapshot, now_ms, length)
            place = log.append(body)
            lsn = place.lsn
            if IdsReserved in map(type, events):
                self._must_sync = (*(each for each in self._must_sync if each > log.durable_lsn), lsn)
            log.jobs += _jobs(events[0]) if len(events) == 1 else sum(map(_jobs, events))
            self._unsaved_bytes += length
            if (lsn % LOOK_RECORDS == 0 or length > LOOK_BYTES) and (self._is_due() or log.space.is_wanted()):
                self._keeper_poked.set()
            self._apply(events, now_ms, place)
        except BaseException as error:
            self._fail(error)
            raise
        return lsn

    def _room_for(self, length: int, keep_reserve: bool) -> bytes | None:
        """The snapshot for a new segment, if a record of this length needs one; None: the record fits into the tail."""
        space = self._log.space
        snapshot = snapshot_length = None
        if not space.fits(length) and not space.can_extend(length):
            snapshot = encode_snapshot(saving.snapshot(self._machine))
            snapshot_length = len(snapshot)
        if not space.has_room(length, snapshot_length, keep_reserve=keep_reserve):
            raise NeedRoomError(length, snapshot_length, keep_reserve)
        return snapshot

    def _begin_segment(self, snapshot: bytes, now_ms: int, body_length: int = 1) -> None:
        self._snapshot_bytes = len(snapshot)
        boot_id, boot_ms = self.clock.boot_id, now_ms - self._offset_ms  # at that moment, not now
        try:
            self._log.begin_segment(snapshot, boot_id=boot_id, boot_ms=boot_ms, now_ms=now_ms, body_length=body_length)
        except BaseException as error:
            # The log may be half in the old segment and half in the new one: the engine must not go on.
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

    def _settle_enqueues(self, lsn: int) -> None:
        if lsn > self._log.durable_lsn and self._is_to_sync(lsn):
            self._settle(lsn)

    def _settle_reservation(self) -> None:
        if not self._is_reservation_settled():
            self._settle(self._must_sync[-1])

    def _is_reservation_settled(self) -> bool:
        return not self._must_sync or self._must_sync[-1] <= self._log.durable_lsn

    def _is_to_sync(self, lsn: int) -> bool:
        """Whether the answer waits for a sync. In a relaxed mode: only if a record up to this one must be synced."""
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

    def record(self, events: Sequence[Event]) -> None:
        """Record events that were decided elsewhere, without a sync (see salvage)."""
        self._change(lambda now_ms: (list(events), None), sync=False)

    def _flush(self) -> None:
        """Write the log's buffer, including the header of a segment that has no records yet."""
        with self._or_fail():
            self._log.flush()

    @contextmanager
    def _or_fail(self) -> Iterator[None]:
        """An error of the disk stops the broker, and so does an exception that interrupts a write or a sync."""
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
        """Return when the record is on disk, in every mode."""
        with self._or_fail():
            self._group.wait(lsn)

    def _rotate(self) -> None:
        while True:
            try:
                with self._lock:
                    now_ms = self._tick()
                    if self._log.tail_is_empty:
                        return
                    snapshot = encode_snapshot(saving.snapshot(self._machine))
                    if not self._log.space.has_room(1, len(snapshot), keep_reserve=True):
                        raise NeedRoomError(1, len(snapshot), keep_reserve=True)
                    self._begin_segment(snapshot, now_ms)
                break
            except NeedRoomError as need:
                self._make_room(need)
        self._flush()
        self._sync_all()

    def _run_sync(self) -> None:
        while self._ended is None:
            self._sync_poked.wait(self._fsync_interval)
            try:
                if self._ended is None and self._log.written_lsn > self._log.durable_lsn:
                    self._group.wait(self._log.written_lsn)
            except BaseException as error:
                self._fail(error)

    # Leases that are taken in advance

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

    # Payloads

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
        """Payloads from the log; None for a job that was copied elsewhere meanwhile."""
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
                    entry = look.job(self._machine, entry.id)
        return None

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """A log that cannot be read stops the broker."""
        try:
            yield
        except (StorageError, OSError) as error:
            self._check()  # if the broker was closed meanwhile, that is the reason
            self._fail(error)
            if isinstance(error, StorageError):
                raise
            raise self._failed_error("unknown") from error
        except BaseException as error:
            if self._log.broken:
                self._fail(error)
            raise

    # Ending

    def _stop(self) -> None:
        self._sync_poked.set()

    def _check_files(self) -> None:
        """Raises OSError if the program closed files of ours.

        Then the lock is gone, and LMDB's own descriptor, the index, may belong to another file as well.
        """
        self._owner.check()
        self._log.check()

    def forked(self) -> None:
        super().forked()
        self._keeper_poked, self._sync_poked = threading.Event(), threading.Event()
        self._disk.forked()
        self._log.forked()
        self._group.forked(ForkedBrokerError("this broker belongs to the process that was forked"))
        if hasattr(self, "_ahead"):  # a fork in the middle of the opening, by a signal handler say
            self._ahead.forked()


def _jobs(event: Event) -> int:
    """How many jobs an event is about, for the histogram of jobs per sync."""
    kind = type(event)
    if kind in _OF_MANY:
        return len(getattr(event, _OF_MANY[kind]))
    return int(kind in _OF_ONE)


_OF_MANY: dict[type[Event], str] = {
    Enqueued: "lengths", Leased: "ids", Acked: "ids", Purged: "ids", Redriven: "ids",
}  # fmt: skip
_OF_ONE = {Retried, Released, Buried, Extended, Cancelled}
