"""Opening a directory: from the index and the tail, or from the log alone; both give the same state.

Nothing in the directory is changed here. Everything is read and judged first; a refusal leaves all as it was.

Torn or damaged? Frames are read in order until there is no good one. Let n be the lsn that should come there. If any
witness says that record n was on disk once (the mark file, the durable lsn in any whole frame of the segment, also
behind the gap, or a later segment), the log is damaged: `CorruptLogError`. If none does, the record was being written
when the power went: the tail is torn, and the log ends there. (Measured on one flipped bit in every byte: without
witnesses every flip loses data silently; with them none does.)
"""

from __future__ import annotations

import logging
import os
import secrets
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import attrs
import lmdb

from ..clock import Clock, read_together
from ..errors import CorruptLogError, FormatError, StorageError
from ..machine import saving
from ..machine.advance import advance
from ..machine.apply import apply
from ..machine.events import Event, KeyCopied, Leased, SegmentsDropped
from ..machine.machine import Machine
from ..machine.snapshot import Place
from .codec import decode_record, decode_snapshot
from .disk import Disk, read_file
from .header import Header, corrupt
from .index import Index
from .layout import INDEX, LOG, MANIFEST, MARK, list_segments, read_mark, segment_name
from .record import frame_bytes
from .segment import OPEN_SEGMENTS, OPEN_TO_READ, Record, Scan, SegmentFile, SegmentFiles, read_header

logger = logging.getLogger("rivetq")

ROUNDS, TAIL_ROUNDS = 20, 3
"""How often a log that another process writes is read again: if segments went, and if the tail looked damaged."""
T = TypeVar("T")


@attrs.define(kw_only=True)
class Recovered:
    """The state of a directory, and where its log goes on."""

    machine: Machine
    log_id: bytes
    epoch: int
    """The number of the opening that is under way: one above the last."""
    last_segment: int = 0
    first_lsn: int = 1
    """The first record that is there."""
    end_lsn: int = 0
    """The last record that is surely on disk; the machine has all up to it."""
    end_crc: int = 0
    end_offset: int = 0
    """Where that record ends in the last segment."""
    surplus: list[bytes] = attrs.Factory(list)
    """Bodies of the whole records behind `end_lsn`. They may not be on disk, so they are written again."""
    sizes: dict[int, int] = attrs.Factory(dict)
    """Bytes per segment."""
    applied_lsn: int = 0
    """What the index holds; 0 without a usable one."""
    now_ms: int = 0
    """The moment on the time line, when all was read."""
    boot_ms: int = 0
    """The boot-time clock at that moment."""


def recover(
    disk: Disk, directory: str, index: Index | None, clock: Clock, new_machine: Callable[[], Machine]
) -> Recovered:
    """Read a directory; without an index all of its log.

    Raises CorruptLogError or FormatError; damage to the index is never an error.
    """
    log_directory = os.path.join(directory, LOG)
    numbers = list_segments(disk, log_directory)
    mark = read_file(disk, os.path.join(log_directory, MARK))
    if not numbers:
        if mark is not None or os.path.exists(os.path.join(directory, INDEX, MANIFEST)):
            raise corrupt(os.path.join(log_directory, segment_name(1)), 0, "all segments of the log are missing")
        now_ms, boot_ms = time_line(clock, None, 0)
        log_id = secrets.token_bytes(16)
        return Recovered(machine=new_machine(), log_id=log_id, epoch=1, now_ms=now_ms, boot_ms=boot_ms)
    reader = _Reader(disk, log_directory, numbers)
    reader.check_links()
    found = reader.recovered(index, new_machine, read_mark(mark, reader.headers[-1].log_id))
    found.now_ms, found.boot_ms = time_line(clock, reader.headers[-1], found.machine.now_ms)
    return found


def beside_its_owner(directory: str, read: Callable[[], T]) -> T:
    """Read a log that its owner may be writing. `read` is repeated if the files change under it.

    Raises:
        StorageError: the files changed each time.
        CorruptLogError: a file was damaged each time.
    """
    turn = 1
    while True:
        try:
            return read()
        except FileNotFoundError as error:  # a compaction dropped it meanwhile
            if turn == ROUNDS:
                raise StorageError(f"{directory}: its segments go quicker than they are read; again") from error
        except CorruptLogError:  # the tail was written while it was read, or it really is damaged
            if turn >= TAIL_ROUNDS:
                raise
        turn += 1


def time_line(clock: Clock, last: Header | None, latest_ms: int) -> tuple[int, int]:
    """The moment at which the time line goes on, or begins, and the boot-time clock at it.

    Within one boot it goes on by the boot-time clock, else by the wall clock, and never back. A step of the wall clock
    changes nothing within a boot. After a reboot with the clock set back, no wait is longer than the one that was
    granted.
    """
    boot_ms, now_ms = read_together(clock)
    if last is not None and last.boot_id == clock.boot_id:
        now_ms = last.now_ms + boot_ms - last.boot_ms
    return max(latest_ms, now_ms), boot_ms


def records(disk: Disk, directory: str) -> Iterator[tuple[SegmentFile, Record]]:
    """All records in order, each with its file. Raises CorruptLogError, at the latest behind the last good one."""
    log_directory = os.path.join(directory, LOG)
    # The owner may be writing. Records that the mark covers are in the files; a segment may go before it is opened.
    mark = read_file(disk, os.path.join(log_directory, MARK))
    numbers = list_segments(disk, log_directory)
    if not numbers:
        return
    try:
        reader = _Reader(disk, log_directory, numbers, OPEN_SEGMENTS)
    except FileNotFoundError:
        reader = _Reader(disk, log_directory, list_segments(disk, log_directory), OPEN_SEGMENTS)
    reader.check_links()
    try:
        reader.open_oldest()
        for i in range(len(reader.numbers) - 1):
            for record in reader.read_sealed(i):
                yield reader.file(i), record
        for record in reader.read_tail(read_mark(mark, reader.headers[-1].log_id))[1]:
            yield reader.file(-1), record
    except FileNotFoundError as error:
        raise StorageError(f"{directory}: its owner dropped segments before they were read; again") from error


class _Reader:
    """The segments of a directory, headers first."""

    def __init__(self, disk: Disk, directory: str, numbers: list[int], most: int = OPEN_TO_READ) -> None:
        # A power cut may bring back some of the segments that were just dropped, and others not. What counts is behind
        # the last gap, if the log says that the others may be missing (see _check_oldest).
        first = max((i for i in range(1, len(numbers)) if numbers[i] != numbers[i - 1] + 1), default=0)
        self.numbers, self.dropped = numbers[first:], numbers[:first]
        self._most = most
        self._files = SegmentFiles(disk, directory, most)
        self.headers: list[Header] = []
        self.sizes: list[int] = []
        for i in range(len(self.numbers)):
            header = read_header(self.file(i))
            # Only the first one's is ever loaded, and with many queues each is long.
            self.headers.append(header if i == 0 else attrs.evolve(header, snapshot=b""))
            self.sizes.append(self.file(i).size)

    def file(self, i: int) -> SegmentFile:
        """The file of a segment, open. Raises FileNotFoundError if it was dropped meanwhile."""
        return self._files.get(self.numbers[i])

    def path(self, i: int) -> str:
        return self._files.path(self.numbers[i])

    def open_oldest(self) -> None:
        """As many as may be open: what is open can be read to its end, and the oldest are the first to go."""
        for i in reversed(range(min(self._most, len(self.numbers)))):
            self.file(i)

    def check_links(self) -> None:
        """Every segment is in place, and of one log."""
        for i, header in enumerate(self.headers):
            if header.id != self.numbers[i] or header.log_id != self.headers[-1].log_id:
                raise corrupt(
                    self.path(i), 0, f"this is segment {header.id} of log {header.log_id.hex()}, not of this place"
                )

    def recovered(self, index: Index | None, new_machine: Callable[[], Machine], mark_lsn: int) -> Recovered:
        last = self.headers[-1]
        scan, tail = self.read_tail(mark_lsn)
        end_lsn = max(mark_lsn, scan.witness_lsn)
        machine, applied_lsn = self._from_index(index, new_machine, last.log_id, scan)
        end_lsn = max(end_lsn, applied_lsn)  # the index is never ahead of the disk: one more witness
        if machine is None:
            machine = new_machine()
            self._load_snapshot(machine)
            applied_lsn = self.headers[0].first_lsn - 1
            logger.info("rivetq: no usable index, rebuilding from %d log segments", len(self.numbers))
            rebuilding = True
        else:
            rebuilding = False
        without_head = rebuilding and self.headers[0].first_lsn > 1
        start = max(i for i, header in enumerate(self.headers) if header.first_lsn <= applied_lsn + 1)
        for i in range(start, len(self.numbers) - 1):
            for record in self.read_sealed(i):
                if record.frame.lsn > applied_lsn:
                    apply_record(machine, self.path(i), record, self.numbers[i], without_head=without_head)
            if rebuilding:
                logger.info(
                    "rivetq: rebuilding, segment %d of %d done, %d jobs", i + 1, len(self.numbers), len(machine.jobs)
                )
        found = Recovered(
            machine=machine,
            log_id=last.log_id,
            epoch=last.epoch + 1,
            last_segment=last.id,
            first_lsn=self.headers[0].first_lsn,
            end_lsn=end_lsn,
            end_crc=last.crc,
            end_offset=last.size,
            applied_lsn=0 if rebuilding else applied_lsn,
        )
        oldest = 0
        for record in tail:
            if record.frame.lsn > end_lsn:
                found.surplus.append(record.body)
                oldest = max(oldest, _dropped_upto(self.path(-1), record) + 1)
                continue
            found.end_crc = record.frame.crc
            found.end_offset = record.at + frame_bytes(record.frame.length)
            if record.frame.lsn > applied_lsn:
                apply_record(machine, self.path(-1), record, last.id, without_head=without_head)
        self._check_oldest(max(oldest, machine.oldest_segment))
        self._check_names(machine)
        assert found.applied_lsn <= end_lsn, f"the index has record {found.applied_lsn}, the log ends with {end_lsn}"
        found.sizes = dict(zip(self.numbers, self.sizes, strict=True))
        found.sizes.update(dict.fromkeys(self.dropped, 0))  # so that the log drops them once more
        return found

    def read_tail(self, mark_lsn: int) -> tuple[Scan, list[Record]]:
        """The last segment up to its end; CorruptLogError if a record that was synced is not there."""
        scan = Scan(self.file(-1).read_all(), self.headers[-1])
        records = list(scan.records())
        witness_lsn = max(mark_lsn, scan.later_witness_lsn())
        if witness_lsn >= scan.next_lsn:
            raise self._lost(scan, witness_lsn)
        return scan, records

    def _lost(self, scan: Scan, witness_lsn: int) -> CorruptLogError:
        what = f"record {scan.next_lsn} is not there, but was on disk (up to {witness_lsn} were)"
        return corrupt(self.path(-1), scan.end_in_file, what)

    def read_sealed(self, i: int) -> list[Record]:
        """All records of a segment that has a successor."""
        upto_lsn = self.headers[i + 1].first_lsn - 1
        scan = Scan(self.file(i).read_all(), self.headers[i])
        records = list(scan.records(upto_lsn))
        if scan.next_lsn <= upto_lsn:
            raise corrupt(self.path(i), scan.end_in_file, f"record {scan.next_lsn} cannot be read")
        if scan.last_crc != self.headers[i + 1].previous_crc:
            raise corrupt(self.path(i), scan.end_in_file, "the next segment continues another history")
        return records

    def _from_index(
        self, index: Index | None, new_machine: Callable[[], Machine], log_id: bytes, scan: Scan
    ) -> tuple[Machine | None, int]:
        if index is None:
            return None, 0
        manifest = index.manifest(log_id)
        if manifest is not None and manifest.applied_lsn >= scan.next_lsn:  # it is written when these are on disk
            raise self._lost(scan, manifest.applied_lsn)
        if manifest is None or manifest.applied_lsn < self.headers[0].first_lsn - 1:
            return None, 0
        machine = new_machine()
        try:
            index.load(machine)
        except (ValueError, LookupError, TypeError, struct.error, lmdb.Error) as error:
            logger.warning("rivetq: the index cannot be used (%s), rebuilding it from the log", error)
            return None, 0
        return machine, manifest.applied_lsn

    def _load_snapshot(self, machine: Machine) -> None:
        try:
            saving.load(machine, decode_snapshot(self.headers[0].snapshot))
        except ValueError as error:
            raise corrupt(self.path(0), 0, f"the snapshot in the header cannot be read: {error}") from error

    def _check_names(self, machine: Machine) -> None:
        """Before a segment goes, the queues that were written there last are copied behind it."""
        nameless = [queue.number for queue in machine.numbers.values() if not queue.name]
        if nameless:
            raise corrupt(self.path(0), 0, f"the log has jobs of queue {nameless[0]}, but not its name")
        machine.woken.discard("")

    def _check_oldest(self, oldest: int) -> None:
        """Segments go oldest first and only after the log said so: without its word a missing one is a loss."""
        if self.numbers[0] > oldest:
            missing = next(n for n in range(oldest, self.numbers[0]) if n not in self.dropped)
            raise corrupt(self._files.path(missing), 0, "the segment is missing")


def _dropped_upto(path: str, record: Record) -> int:
    """The last segment that this record, which is to be written again, allows to be missing; 0 if it is no such word.

    It was synced before a file was removed, even if every witness of that is gone.
    """
    _, events = _decoded(path, record)
    return max((event.upto for event in events if isinstance(event, SegmentsDropped)), default=0)


def apply_record(machine: Machine, path: str, record: Record, segment: int, *, without_head: bool = False) -> None:
    """Replay one record. Raises CorruptLogError if its checksum is right and its content makes no sense."""
    place = Place(segment, record.body_offset, record.frame.lsn)
    try:
        replay(machine, record.body, place, without_head=without_head)
    except FormatError as error:
        raise _newer(path, record, error) from error
    except (ValueError, LookupError) as error:
        raise corrupt(path, record.at, f"record {record.frame.lsn} cannot be understood: {error!r}") from error


def _newer(path: str, record: Record, error: FormatError) -> FormatError:
    return FormatError(f"{path}: record {record.frame.lsn} at byte {record.at}: {error}")


def replay(machine: Machine, body: bytes, place: Place, *, without_head: bool = False) -> None:
    """Apply the events of one record, as the call that wrote it did. Raises ValueError or LookupError if it is none.

    Args:
        without_head: the log's oldest segments went, so that the copy of a queue may stand behind what happened in it.
    """
    now_ms, events = decode_record(body)
    advance(machine, max(machine.now_ms, now_ms))
    for event in events:
        for number in queues_of(event) if without_head else ():
            if number not in machine.numbers:
                machine.add_queue(number)
        apply(machine, event, now_ms, place)


def queues_of(event: Event) -> Sequence[int]:
    """Numbers of the queues that must exist for the event to be applied."""
    match event:
        case Leased():
            return [number for number, _, _ in event.places]
        case KeyCopied():
            return ()
        case _:
            number = getattr(event, "queue", None)
            return () if number is None else (number,)


def _decoded(path: str, record: Record) -> tuple[int, list[Event]]:
    try:
        return decode_record(record.body)
    except FormatError as error:
        raise _newer(path, record, error) from error
    except ValueError as error:
        raise corrupt(path, record.at, f"record {record.frame.lsn} cannot be understood: {error}") from error
