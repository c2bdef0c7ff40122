"""What can still be read of a damaged log, written into a new directory. The damaged one is not touched.

An opening refuses a damaged log, since it cannot know what was lost. Salvage takes every whole record, in order, also
behind a gap; the state is what these records give. It reports the missing part as exactly as it is known: which bytes,
which records. If the end of a job was in a missing record, the job comes again.
"""

from __future__ import annotations

import json
import os
import secrets
from collections import Counter
from collections.abc import Collection, Iterator, Sequence

import attrs
from crc32c import crc32c

from ..clock import Clock
from ..engines.compaction import copied
from ..engines.local import LocalEngine
from ..errors import CorruptLogError, StorageError
from ..machine import look, saving
from ..machine.advance import advance
from ..machine.apply import apply
from ..machine.entry import Entry
from ..machine.events import (
    Acked,
    Buried,
    Copied,
    Event,
    Extended,
    KeyCopied,
    Leased,
    QueueConfigured,
    QueueCopied,
    QueueCreated,
    Released,
    Retried,
)
from ..machine.machine import Machine
from ..machine.queue import STATES
from ..machine.sessions import load_sessions
from ..machine.snapshot import Place, Snapshot
from ..storage.backup import under_another_name
from ..storage.codec import decode_record, decode_snapshot, encode_snapshot
from ..storage.disk import Disk, read_file, replace_file
from ..storage.header import HEADER_SALT_AT, Header, corrupt
from ..storage.index import Index
from ..storage.layout import INDEX, LOG, MARK, list_segments, read_mark, segment_name
from ..storage.log import Log
from ..storage.record import ALIGN, HEADER_BYTES, SALT_AT, Frame, body_of, decode_frame, frame_bytes
from ..storage.recovery import queues_of, time_line
from ..storage.segment import SegmentFile, SegmentFiles, read_header

REPORT = "salvage.json"
SKIPPED_IDS = 2**40
"""How many ids are skipped if a record is missing: callers may have been told them."""
_BATCH_JOBS, _BATCH_BYTES = 256, 1 << 20
_SEGMENT_BYTES = 64 * 2**20
_SECTOR_BYTES = 4096


@attrs.define
class Stretch:
    """Bytes of a file that could not be read as what they should be."""

    file: str
    start: int
    end: int
    what: str


@attrs.define(kw_only=True)
class Salvage:
    """What was saved, and what could not be."""

    path: str
    segments: int = 0
    records: int = 0
    """That could be read."""
    missing: list[tuple[int, int]] = attrs.Factory(list)
    """Records, from and to, that cannot be read or are not there."""
    unreadable: list[Stretch] = attrs.Factory(list)
    jobs: dict[str, dict[str, int]] = attrs.Factory(dict)
    """By queue and state."""

    @property
    def is_whole(self) -> bool:
        """Nothing was missing."""
        return not (self.missing or self.unreadable)


def salvage(disk: Disk, directory: str, out: str, clock: Clock) -> Salvage:
    """Save into the new directory `out`, the report (`salvage.json`) included.

    Raises:
        StorageError: there is no log, or something at `out`, or it cannot be written.
        FormatError: an intact header names another version of the format.
    """
    wreck = _Wreck(disk, os.path.join(directory, LOG))
    wreck.read()
    if stale := wreck.stale():
        wreck = _Wreck(disk, os.path.join(directory, LOG), without=stale)
        wreck.read()
    with under_another_name(disk, out, directory) as partial:
        report = wreck.report
        report.path = out
        _write(disk, wreck, partial, clock)
        text = json.dumps(attrs.asdict(report), indent=2).encode()
        replace_file(disk, os.path.join(partial, REPORT), text)
    return report


class _Part:
    """One segment file, its header if that can be read."""

    def __init__(self, files: SegmentFiles, number: int) -> None:
        self._files = files
        self.number = number
        self.path = files.path(number)
        self.size = self.file.size
        self.header: Header | None = None
        self.snapshot: Snapshot | None = None
        self.upto_lsn: int | None = None
        """Records from this one on are those of a later segment. None: unknown."""

    @property
    def file(self) -> SegmentFile:
        """Open."""
        return self._files.get(self.number)


class _Wreck:
    """A log, all of it that can be read applied to a machine."""

    def __init__(self, disk: Disk, directory: str, without: Collection[int] = ()) -> None:
        numbers = [number for number in list_segments(disk, directory) if number not in without]
        if not numbers:
            raise StorageError(f"{directory}: there is no log")
        self.report = Salvage(path="", segments=len(numbers))
        self.machine = Machine()
        self._disk = disk
        self._directory = directory
        files = SegmentFiles(disk, directory)
        self._parts = {number: _Part(files, number) for number in numbers}
        self._last_lsn = 0
        self._configured: dict[int, int] = {}  # in which record each queue was configured last

    def read(self) -> None:
        """Fill the machine and the report."""
        first, last = min(self._parts), max(self._parts)
        for number in range(first, last):
            if number not in self._parts:
                self._note(os.path.join(self._directory, segment_name(number)), 0, 0, "the file is missing")
        self._read_headers()
        order = self._in_order()
        start = order[0].header
        if start is not None:
            self._last_lsn = start.first_lsn - 1
        for part in order:
            self._replay(part)
        self._name_all()
        header = self.newest_header()
        for number in range(self.machine.oldest_segment, first):
            self._note(os.path.join(self._directory, segment_name(number)), 0, 0, "the file is missing")
        if header is not None:
            mark = read_file(self._disk, os.path.join(self._directory, MARK))
            self._skip_to(read_mark(mark, header.log_id) + 1)

    def stale(self) -> list[int]:
        """Segments before a gap that the log knows of: they were dropped, and a power cut brought them back."""
        gone = [n for n in range(min(self._parts), self.machine.oldest_segment) if n not in self._parts]
        return [number for number in self._parts if gone and number < gone[-1]]

    def newest_header(self) -> Header | None:
        """The last one that can be read."""
        return next((part.header for part in reversed(self._parts.values()) if part.header is not None), None)

    def payload(self, entry: Entry) -> bytes:
        """Of a job. Its record was whole when it was replayed."""
        file = self._parts[entry.segment].file
        data = file.read(entry.length, entry.offset)
        if len(data) != entry.length or crc32c(data) != entry.crc:
            raise corrupt(file.path, entry.offset, "what was read a moment ago is another thing now")
        return data

    def _note(self, file: str, start: int, end: int, what: str) -> None:
        self.report.unreadable.append(Stretch(file, start, end, what))

    def _skip_to(self, lsn: int) -> None:
        """The records before this one are not there."""
        if lsn > self._last_lsn + 1:
            self.report.missing.append((self._last_lsn + 1, lsn - 1))
            self._last_lsn = lsn - 1

    def _read_headers(self) -> None:
        for part in self._parts.values():
            try:
                part.header = read_header(part.file)
                part.snapshot = decode_snapshot(part.header.snapshot)
            except (CorruptLogError, ValueError, OSError) as error:
                self._note(part.path, 0, 0, f"the header cannot be read: {error}")

    def _in_order(self) -> list[_Part]:
        """The files as their headers say that they follow each other; those of another log are left out."""
        logs = Counter(part.header.log_id for part in self._parts.values() if part.header is not None)
        log_id = logs.most_common(1)[0][0] if logs else b""
        order = []
        for part in self._parts.values():
            header = part.header
            original = None if header is None else self._parts.get(header.id)
            if header is not None and header.log_id != log_id:
                self._note(part.path, 0, part.size, "this is a file of another log")
            elif header is not None and original not in (None, part) and _same(header, original):
                self._note(part.path, 0, part.size, f"this is a copy of segment {header.id}")
            else:
                order.append(part)
                continue
            part.header = None
        order.sort(key=lambda part: part.number if part.header is None else part.header.id)
        upto_lsn: int | None = None
        for part in reversed(order):
            part.upto_lsn = upto_lsn
            if part.header is not None:
                upto_lsn = part.header.first_lsn
            elif (first := next(_frames(self._data(part), None), None)) is not None:
                upto_lsn = first[1].lsn
        return order

    def _data(self, part: _Part) -> bytes:
        """All bytes of a segment; zeros where the disk gives none."""
        try:
            return part.file.read_all()
        except OSError:
            pieces = []
            for at in range(0, part.size, _SECTOR_BYTES):
                size = min(_SECTOR_BYTES, part.size - at)
                try:
                    pieces.append(part.file.read(size, at))
                except OSError as error:
                    self._note(part.path, at, at + size, f"the disk does not give these bytes: {error.strerror}")
                    pieces.append(bytes(size))
            return b"".join(pieces)

    def _replay(self, part: _Part) -> None:
        data, path = self._data(part), part.path
        if part.snapshot is not None:
            self._resume(part.snapshot)
        at = 0 if part.header is None else part.header.size
        for found, frame in _frames(data, part.header):
            if part.upto_lsn is not None and frame.lsn >= part.upto_lsn:
                break  # it was written again in the next segment
            if frame.lsn <= self._last_lsn:
                continue
            if any(data[at:found]):
                self._note(path, at, found, f"no record can be read here; the next is number {frame.lsn}")
            self._skip_to(frame.lsn)
            self._last_lsn = frame.lsn
            at = found + frame_bytes(frame.length)
            self._apply(part, found, frame, body_of(data, found, frame))
        if part.upto_lsn is None:
            if any(data[at:]):
                self._note(path, at, len(data), "no record can be read here; an end may be torn")
            return
        if self._last_lsn < part.upto_lsn - 1 and any(data[at:]):
            self._note(path, at, len(data), "no record can be read here")
        self._skip_to(part.upto_lsn)

    def _resume(self, snapshot: Snapshot) -> None:
        """At the head of a segment: what was in force, and the totals."""
        machine = self.machine
        machine.next_id = max(machine.next_id, snapshot.next_id)
        machine.reserved_id = max(machine.reserved_id, snapshot.reserved_id)
        machine.oldest_segment = max(machine.oldest_segment, snapshot.oldest_segment)
        advance(machine, max(machine.now_ms, snapshot.now_ms))
        load_sessions(machine, snapshot.sessions)

    def _apply(self, part: _Part, at: int, frame: Frame, body: bytes) -> None:
        try:
            now_ms, events = decode_record(body)
        except ValueError as error:
            self._note(part.path, at, at + frame_bytes(frame.length), f"record {frame.lsn}: {error}")
            return
        self.report.records += 1
        machine = self.machine
        now_ms = max(machine.now_ms, now_ms)
        advance(machine, now_ms)
        place = Place(part.number, at + HEADER_BYTES, frame.lsn)
        for event in events:
            for number in queues_of(event):
                if number not in machine.numbers:
                    machine.add_queue(number)
            if isinstance(event, QueueCreated | QueueCopied):
                event.name = self._free_name(event.number, event.name)
                self._configured[event.number] = frame.lsn
            elif isinstance(event, QueueConfigured):
                self._configured[event.queue] = frame.lsn
            for job_id in _delivered(event):
                self._deliver(job_id, now_ms, place)
            apply(machine, event, now_ms, place)

    def _free_name(self, number: int, name: str) -> str:
        """The name, if no other queue has it: the record of that one's removal may be missing."""
        while name in self.machine.queues and self.machine.queues[name].number != number:
            name += "'"
        return name

    def _name_all(self) -> None:
        """Queues whose names or configurations cannot be read in the log, as the index has them if that is whole."""
        header, machine = self.newest_header(), self.machine
        index = Index(self._disk, os.path.join(os.path.dirname(self._directory), INDEX))
        manifest = None if header is None else index.manifest(header.log_id)
        known = {} if manifest is None else {queue.number: queue for queue in index.queues()}
        for queue in list(machine.numbers.values()):
            saved = known.get(queue.number)
            if not queue.name:
                name = f"salvaged queue {queue.number}" if saved is None else saved.name
                machine.name_queue(queue.number, self._free_name(queue.number, name), 0)
            if saved is not None and manifest is not None and saved.name == queue.name:
                if manifest.applied_lsn > self._configured.get(queue.number, 0):
                    queue.configure(saved.config, machine.now_ms)

    def _deliver(self, job_id: int, now_ms: int, place: Place) -> None:
        """A delivery of the job is about to end; if the record of its beginning is missing, that is made up for."""
        machine = self.machine
        if job_id not in machine.jobs and (entry := look.job(machine, job_id)) is not None:
            leased = Leased([job_id], [machine.next_token], [entry.attempts + 1], [now_ms])
            apply(machine, leased, now_ms, place)


def _delivered(event: Event) -> Sequence[int]:
    """Ids of the jobs that the event takes for leased, or has a newer word of."""
    match event:
        case Acked():
            return event.ids
        case Retried() | Released() | Buried() | Extended() | Copied():
            return [event.id]
        case _:
            return []


def _same(header: Header, other: _Part | None) -> bool:
    """The other file has this header."""
    return other is not None and other.header is not None and other.header.crc == header.crc


def _frames(data: bytes, header: Header | None) -> Iterator[tuple[int, Frame]]:
    """Whole frames with their places, also behind bytes that are none.

    Without a header the salt is what the damaged one says, if there is a frame with it; else that of the first frame.
    """
    if header is not None:
        yield from _frames_with(data, header.size, header.salt)
        return
    claimed = int.from_bytes(data[HEADER_SALT_AT : HEADER_SALT_AT + 4], "little")
    found = next(_frames_with(data, 0, claimed), None) if claimed else None
    yield from _frames_with(data, 0, None if found is None else claimed)


def _frames_with(data: bytes, at: int, salt: int | None) -> Iterator[tuple[int, Frame]]:
    end = len(data.rstrip(b"\0"))
    while at < end:
        tried = int.from_bytes(data[at + SALT_AT : at + SALT_AT + 4], "little") if salt is None else salt
        frame = decode_frame(data, at, tried)
        if frame is not None:
            salt = tried
            yield at, frame
            at += frame_bytes(frame.length)
        elif salt is None:
            at += ALIGN
        else:
            at += ALIGN
            while (found := data.find(salt.to_bytes(4, "little"), at + SALT_AT)) >= 0 and (found - SALT_AT) % ALIGN:
                at = found - SALT_AT + 1
            if found < 0:
                return
            at = found - SALT_AT


# Writing


def _write(disk: Disk, wreck: _Wreck, directory: str, clock: Clock) -> None:
    """A log with queues, jobs and keys, as if a compaction had copied them."""
    machine, report, header = wreck.machine, wreck.report, wreck.newest_header()
    now_ms, boot_ms = time_line(clock, header, machine.now_ms)
    _begin(disk, directory, _counters(machine, report), clock.boot_id, boot_ms, now_ms)
    engine = LocalEngine(
        directory, fsync="never", fsync_interval=1.0, segment_bytes=_SEGMENT_BYTES, release_on_open=False,
        cache_bytes=0, window_jobs=200_000, clock=clock, disk=disk,
    )  # fmt: skip
    try:
        for part in _batches([*_queues(machine)]):
            engine.record(part)
        batch: list[Event] = []
        size = 0
        for entry in sorted(look.everything(machine), key=lambda entry: entry.id):
            payload = wreck.payload(entry)
            batch.append(copied(entry, payload))
            size += len(payload)
            counts = report.jobs.setdefault(entry.queue.name, {})
            counts[STATES[entry.state].value] = counts.get(STATES[entry.state].value, 0) + 1
            if len(batch) == _BATCH_JOBS or size > _BATCH_BYTES:
                engine.record(batch)
                batch, size = [], 0
        ended = [(name, key) for name, key in machine.keys.all().items() if key.expires_ms > machine.now_ms]
        keys = [KeyCopied(number, text, key.job_id, key.expires_ms) for (number, text), key in ended]
        for part in _batches([*batch, *keys]):
            engine.record(part)
        engine.sync()  # close() would not raise
    finally:
        engine.close()


def _batches(events: list[Event]) -> Iterator[list[Event]]:
    for start in range(0, len(events), _BATCH_JOBS):
        yield events[start : start + _BATCH_JOBS]


def _queues(machine: Machine) -> Iterator[QueueCopied]:
    """Of each queue as many jobs came in as are there or have ended, by what is known."""
    for queue in machine.numbers.values():
        queue.enqueued = sum(queue.counts) + queue.acked + queue.cancelled + queue.purged
        yield saving.queue_copied(queue)


def _counters(machine: Machine, report: Salvage) -> Snapshot:
    """What the new log begins with."""
    snapshot = saving.snapshot(machine)
    snapshot.oldest_segment = 1
    snapshot.next_id = max(snapshot.next_id, snapshot.reserved_id) + (0 if report.is_whole else SKIPPED_IDS)
    return snapshot


def _begin(disk: Disk, directory: str, snapshot: Snapshot, boot_id: str, boot_ms: int, now_ms: int) -> None:
    """The first segment, without a record."""
    path = os.path.join(directory, LOG)
    disk.make_directory(path)
    log = Log(disk, path, log_id=secrets.token_bytes(16), epoch=1, segment_bytes=_SEGMENT_BYTES)
    try:
        data = encode_snapshot(snapshot)
        log.space.make_room(1, len(data), keep_reserve=False)
        log.begin_segment(data, boot_id=boot_id, boot_ms=boot_ms, now_ms=now_ms)
        log.flush()
        log.close()
    finally:
        log.abandon()
