"""Opening a directory after anything that can happen to it: an equal state, or an error that names file and offset."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import lmdb
import pytest
from conftest import Extent

import rivetq.storage.recovery
from rivetq import (
    Broker,
    CorruptLogError,
    FormatError,
    JobState,
    Lease,
    LeaseLostError,
    RetryPolicy,
    StorageError,
    tools,
)
from rivetq.engine import EndSession, Enqueue, Once, Reserve
from rivetq.machine import saving
from rivetq.machine.advance import resume
from rivetq.machine.apply import apply
from rivetq.machine.check import check, dump
from rivetq.machine.events import Acked, Enqueued, Event, Leased, QueueCreated, SegmentsDropped
from rivetq.machine.machine import Machine
from rivetq.machine.snapshot import Place
from rivetq.storage import recovery
from rivetq.storage.codec import decode_record, encode_record, encode_snapshot
from rivetq.storage.disk import SystemDisk
from rivetq.storage.header import Header, decode_header
from rivetq.storage.index import Index
from rivetq.storage.layout import segment_name
from rivetq.storage.log import Log
from rivetq.storage.record import frame_bytes
from rivetq.storage.recovery import Recovered, beside_its_owner, recover
from rivetq.storage.segment import Record, Scan
from rivetq.testing import ManualClock

SEGMENT_BYTES = 65_536
"""Bits flipped, one at a time, in each byte: 1 to 8."""
CHILD = Path(__file__).parent.with_name("flip_child.py")
NO_RETRY = RetryPolicy(base=0)


class Ledger:
    """A broker in a directory, and the state behind every record of its log."""

    def __init__(self, path: Path, clock: ManualClock | None = None, **options: Any) -> None:
        self.path = path
        self.clock = clock or ManualClock()
        options = {"fsync": "never", "segment_bytes": SEGMENT_BYTES, "release_on_open": False} | options
        self.broker = Broker(path, clock=self.clock, **options)
        self.engine: Any = self.broker._engine
        self.states: dict[int, dict[str, Any]] = {self.engine._last_lsn(): self.engine.dump()}
        record = self.engine._record

        def record_and_note(*arguments: Any, **options: Any) -> int:
            lsn: int = record(*arguments, **options)
            self.states[lsn] = dump(self.engine._machine)
            return lsn

        self.engine._record = record_and_note
        self.sealed = b""  # the first segment, before it was dropped

    def state(self) -> dict[str, Any]:
        """As it is now."""
        return dict(self.engine.dump())

    def lease(self, queue: str = "q", **options: Any) -> Lease:
        lease = self.broker.lease(queue, **options)
        assert lease is not None
        return lease

    def crash(self, to: Path) -> Path:
        """What a killed process leaves: all that it handed to the operating system."""
        shutil.copytree(self.path, to, ignore=shutil.ignore_patterns("spare-*", "LOCK"))
        return to

    def still_clock(self) -> ManualClock:
        """On the same boot, and no time has passed since the last record."""
        clock = ManualClock(start=0)
        clock.boot_id = self.clock.boot_id
        return clock


@contextmanager
def open_ledger(path: Path, clock: ManualClock | None = None, **options: Any) -> Iterator[Ledger]:
    ledger = Ledger(path, clock, **options)
    try:
        yield ledger
    finally:
        ledger.broker.close()


def be_busy(ledger: Ledger) -> None:
    """Every kind of event: in the end all of them are in the last segment."""
    broker, clock = ledger.broker, ledger.clock
    broker.configure_queue("q", retry=NO_RETRY)
    for n in range(8):
        broker.enqueue("q", f"first {n}".encode(), idempotency_key=f"k{n}", headers={"n": str(n)} if n % 2 else None)
    broker.enqueue("q", b"later", delay=500, idempotency_key="later")
    broker.ack(ledger.lease())
    broker.nack(ledger.lease(), error="boom", delay=0)
    broker.reject(ledger.lease(), error="no")
    held = ledger.lease(visibility_timeout=1000)
    broker.ack_many(broker.lease_many("q", 3))
    broker.rotate()
    ledger.sealed = segment(ledger.path, 1).read_bytes()
    broker.compact()

    broker.configure_queue("p", visibility_timeout=5, max_jobs=100)
    broker.pause("p")
    broker.resume("p")
    ids = broker.enqueue_many("p", [b"a" * 7, b"", {"json": 1}], idempotency_keys=["x", None, "y"], priority=9)
    clock.advance(1)
    leases = broker.lease_many(["p", "q"], 5, visibility_timeout=60)
    broker.extend(leases[0], 90)
    broker.ack(leases[0])
    broker.nack(leases[1], error="ünlucky", delay=7)
    broker.release(leases[2], delay=3)
    broker.reject(leases[3], error=None)
    clock.advance(10)
    broker.redrive("q", limit=1)
    broker.cancel(ids[1])
    broker.commit([Enqueue("r", [b"once"])], once=Once(7, 1))
    broker.commit([Enqueue("r", [b"only"])], once=Once(8, 1))
    ledger.engine.call(EndSession(7))
    with broker.transaction() as tx:
        tx.ack(leases[4])
        tx.enqueue("r", b"from the transaction", delay=30, max_attempts=2, visibility_timeout=2)
        tx.enqueue("q", b"also", priority=0, retry=RetryPolicy(base=2, jitter="none"))
    ledger.engine.call(Reserve("q", 70_000))  # more than is set aside at once
    broker.sync()
    broker.ack(held)
    clock.advance(30)
    ledger.lease("r")
    clock.advance(2)  # the lease ends: a retry
    broker.enqueue("q", b"last but two", idempotency_key="k0")
    broker.reject(ledger.lease("q"), error="again")
    broker.purge("q", state="dead")
    broker.cancel(broker.enqueue("gone", b""))
    broker.remove_queue("gone")
    clock.advance(100)
    ledger.lease("r")
    clock.advance(2)  # and a dead letter
    broker.enqueue("q", b"the last")


def log_of(directory: Path) -> Path:
    return directory / "log"


def segment(directory: Path, number: int) -> Path:
    return log_of(directory) / segment_name(number)


def segments(directory: Path) -> list[Path]:
    return sorted(log_of(directory).glob("*.log"))


def numbers(directory: Path) -> list[int]:
    return [int(path.stem) for path in segments(directory)]


def header_of(path: Path) -> Header:
    return decode_header(path.read_bytes(), str(path))


def records_of(path: Path) -> list[Record]:
    return list(Scan(path.read_bytes(), header_of(path)).records())


def end_of(record: Record) -> int:
    return record.at + frame_bytes(record.frame.length)


def kinds_of(record: Record) -> set[type[Event]]:
    return {type(event) for event in decode_record(record.body)[1]}


def flip_byte(path: Path, at: int, bits: int = 0xFF) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        (value,) = file.read(1)
        file.seek(at)
        file.write(bytes((value ^ bits,)))


def rewrite(path: Path, data: bytes) -> None:
    """Quicker than `write_bytes`: some file systems sync a file that was emptied and written again."""
    with path.open("r+b") as file:
        file.write(data)
        file.truncate()


def tear(path: Path, record: Record) -> None:
    """The sectors of this record never reached the disk; those behind it did."""
    with path.open("r+b") as file:
        file.seek(record.at)
        file.write(bytes(frame_bytes(record.frame.length)))


def lose_index(directory: Path) -> None:
    shutil.rmtree(directory / "index", ignore_errors=True)


def lose_mark(directory: Path) -> None:
    (log_of(directory) / "mark").unlink(missing_ok=True)


def recovered(directory: Path, clock: ManualClock | None = None) -> Recovered:
    """Read the directory as an opening does, up to the first change of it."""
    index = Index(SystemDisk(), str(directory / "index"))
    return recover(SystemDisk(), str(directory), index, clock or ManualClock(), Machine)


def state_of(found: Recovered) -> dict[str, Any]:
    """The state that an opening serves: with the surplus, and with what the clock has done meanwhile."""
    machine = found.machine
    for lsn, body in enumerate(found.surplus, found.end_lsn + 1):
        now_ms, events = decode_record(body)
        machine.now_ms = max(machine.now_ms, now_ms)
        for event in events:
            apply(machine, event, now_ms, Place(found.last_segment + 1, 0, lsn))
    resume(machine, max(found.now_ms, machine.now_ms), found.epoch << 32)
    check(machine)
    return dump(machine)


def everything(directory: Path) -> dict[str, tuple[int, int, bytes]]:
    """Every file and directory below: mode, time of change, content."""
    return {
        str(path.relative_to(directory)): (
            path.stat().st_mode,
            0 if path.name == "LOCK" or path == directory else path.stat().st_mtime_ns,  # the lock comes and goes
            path.read_bytes() if path.is_file() else b"",
        )
        for path in [directory, *directory.rglob("*")]
    }


@pytest.fixture(scope="module")
def busy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ledger]:
    """A broker in the middle of its work, its directory as a killed process would leave it."""
    path = tmp_path_factory.mktemp("busy")
    with open_ledger(path / "live") as ledger:
        be_busy(ledger)
        ledger.path = ledger.crash(path / "crashed")
        yield ledger


# -- the log of a busy directory, cut after every byte


def test_the_busy_directory_has_every_kind_of_event_in_its_last_segment(busy: Ledger) -> None:
    last = segments(busy.path)[-1]
    assert set().union(*map(kinds_of, records_of(last))) == set(Event.__args__)
    assert 3_000 < end_of(records_of(last)[-1]) < 6_000
    assert state_of(recovered(busy.path, busy.still_clock())) == busy.state()


class Cuts:
    """The last segment of a busy directory, to be cut anywhere, without index and mark: what a power cut leaves."""

    def __init__(self, busy: Ledger, directory: Path) -> None:
        self.directory = shutil.copytree(busy.path, directory)
        lose_index(self.directory)
        lose_mark(self.directory)
        self._busy = busy
        self._last = segments(self.directory)[-1]
        self._data = self._last.read_bytes()
        self._header = header_of(self._last)
        self._records = records_of(self._last)
        (self._dropped_lsn,) = [
            record.frame.lsn for record in self._records if SegmentsDropped in kinds_of(record)
        ]  # fmt: skip
        self.places = range(self._header.size, end_of(self._records[-1]) + 1)

    def cut(self, at: int, *, rest: bytes = b"", keep_dropped: bool = False) -> dict[str, Any]:
        """Cut there; the state behind the last whole record."""
        data = self._data[:at] + rest  # a body may end in zeros of its own
        rewrite(self._last, data)
        whole = [r for r in self._records if data[r.at :].startswith(self._data[r.at : r.body_offset + r.frame.length])]
        lsn = whole[-1].frame.lsn if whole else self._header.first_lsn - 1
        first = segment(self.directory, 1)
        if not keep_dropped and lsn >= self._dropped_lsn:
            first.unlink(missing_ok=True)
        elif not first.exists():
            first.write_bytes(self._busy.sealed)
        return self._busy.states[lsn]


def test_a_log_cut_after_any_byte_opens_to_the_state_behind_its_last_whole_record(busy: Ledger, tmp_path: Path) -> None:
    cuts = Cuts(busy, tmp_path / "cut")
    clock = busy.still_clock()
    for at in cuts.places:
        state = cuts.cut(at)
        assert state_of(recovered(cuts.directory, clock)) == state, f"cut at {at}"


def test_a_log_whose_tail_is_zeros_opens_to_the_state_behind_its_last_whole_record(
    busy: Ledger, tmp_path: Path
) -> None:
    """The size of a file reaches the disk before its data; and a dropped segment may still be there."""
    cuts = Cuts(busy, tmp_path / "cut")
    clock = busy.still_clock()
    for at in cuts.places[::5]:
        state = cuts.cut(at, rest=bytes(2000), keep_dropped=True)
        assert state_of(recovered(cuts.directory, clock)) == state, f"cut at {at}"


def test_a_cut_log_opens_in_earnest_and_goes_on(busy: Ledger, tmp_path: Path) -> None:
    cuts = Cuts(busy, tmp_path / "source")
    for at in [*cuts.places[::53], cuts.places[-1]]:
        state = cuts.cut(at)
        directory = shutil.copytree(cuts.directory, tmp_path / f"cut at {at}")
        with open_ledger(directory, busy.still_clock()) as ledger:
            assert ledger.state() == state, f"cut at {at}"
            assert ledger.broker.enqueue("new", b"after the cut")
            after = ledger.state()
        with open_ledger(directory, busy.still_clock()) as ledger:
            assert ledger.state() == after
        shutil.rmtree(directory)


def test_a_cut_log_beside_its_mark_opens_to_an_equal_state_or_is_refused(busy: Ledger, tmp_path: Path) -> None:
    directory = shutil.copytree(busy.path, tmp_path / "cut")
    lose_index(directory)
    last = segments(directory)[-1]
    data, header, records = last.read_bytes(), header_of(last), records_of(last)
    mark_lsn = rivetq.storage.recovery.read_mark((log_of(directory) / "mark").read_bytes(), header.log_id)
    assert records[5].frame.lsn < mark_lsn < records[-5].frame.lsn
    clock = busy.still_clock()
    opened = refused = 0
    for cut in range(header.size, end_of(records[-1]) + 1):
        rewrite(last, data[:cut])
        whole = [record for record in records if record.body_offset + record.frame.length <= cut]
        lsn = whole[-1].frame.lsn if whole else header.first_lsn - 1
        if lsn >= mark_lsn:
            assert state_of(recovered(directory, clock)) == busy.states[lsn], f"cut at {cut}"
            opened += 1
            continue
        with pytest.raises(CorruptLogError, match=f"record {lsn + 1} is not there") as caught:
            recovered(directory, clock)
        assert caught.value.file == str(last)
        assert caught.value.offset == min(cut, end_of(whole[-1]) if whole else header.size), f"cut at {cut}"
        refused += 1
    assert opened > 500
    assert refused > 500


def test_a_segment_that_was_dropped_before_a_power_cut_is_not_missed(busy: Ledger, tmp_path: Path) -> None:
    """It went when the word of its going was on disk; that nobody else testifies to this does not make it a loss."""
    cuts = Cuts(busy, tmp_path / "cut")
    directory = cuts.directory
    (dropped,) = [r for r in records_of(segments(directory)[-1]) if SegmentsDropped in kinds_of(r)]
    state = cuts.cut(end_of(dropped), keep_dropped=False)
    assert numbers(directory) == [2]
    with open_ledger(directory, busy.still_clock()) as ledger:
        assert ledger.state() == state


def test_a_log_cut_inside_its_header_is_refused(busy: Ledger, tmp_path: Path) -> None:
    """The header is on disk before the file has its name: no power cut leaves this."""
    directory = shutil.copytree(busy.path, tmp_path / "cut")
    last = segments(directory)[-1]
    data = last.read_bytes()
    for cut in range(header_of(last).size):
        rewrite(last, data[:cut])
        with pytest.raises(CorruptLogError, match="header") as caught:
            recovered(directory)
        assert caught.value.file == str(last)
        assert caught.value.offset == (cut if cut < 20 else 0)


# -- damage in every byte, and every cut: `make rot` for all of it


class Outcome(NamedTuple):
    """What an opening, in a process of its own, made of one damaged byte or one cut."""

    file: str
    offset: int
    which: int
    kind: str
    error: str = ""
    named: str = ""
    named_offset: int = 0


def damage_everywhere(
    directory: Path, boot_id: str, places: Sequence[tuple[str, int, int, int]], mutations: int
) -> list[Outcome]:
    """So many mutations of each byte, or (0) a cut there. Two children share the places; a signal, a hang or a place
    without an outcome fails the test."""
    before = {name: content for name, (_, _, content) in everything(directory).items()}
    children, files, found = [], [], []
    for n, part in enumerate((places[::2], places[1::2])):
        copy = shutil.copytree(directory, directory.with_name(f"{directory.name}-{n}"))
        task = {"directory": str(copy), "boot_id": boot_id, "mutations": mutations, "places": part}
        output = copy.with_suffix(".out").open("w+")
        child = subprocess.Popen([sys.executable, CHILD], stdin=subprocess.PIPE, stdout=output, stderr=output)
        assert child.stdin is not None
        child.stdin.write(json.dumps(task).encode())
        child.stdin.close()
        children.append((child, copy, part))
        files.append(output)
    for (child, copy, part), output in zip(children, files, strict=True):
        code = child.wait(3600)
        output.seek(0)
        lines = output.read().splitlines()
        output.close()
        assert code == 0, f"ended by {code} behind {lines[-20:]}"
        found += [Outcome(*json.loads(line)) for line in lines]
        assert len(lines) == max(1, mutations) * sum(len(range(*place[1:])) for place in part)
        assert {name: content for name, (_, _, content) in everything(copy).items()} == before, "opening wrote"
    kinds = Counter(outcome.kind for outcome in found)
    print(f"\n{len(found):,} {'damaged bytes' if mutations else 'cuts'}: {dict(kinds)}")
    return found


def in_chunks(name: str, stop: int, step: int = 1) -> list[tuple[str, int, int, int]]:
    step = max(1, step)
    return [(name, at, min(stop, at + 256 * step), step) for at in range(0, stop, 256 * step)]


@pytest.fixture(scope="module")
def closed(tmp_path_factory: pytest.TempPathFactory) -> Ledger:
    """A small directory of three segments and an index, closed."""
    path = tmp_path_factory.mktemp("closed") / "directory"
    with open_ledger(path) as ledger:
        be_busy(ledger)
        ledger.broker.rotate()
        ledger.broker.enqueue_many("q", [b"one more", b"and another"])
    with open_ledger(path, ledger.clock) as ledger:
        ledger.broker.ack(ledger.lease("q"))
        ledger.broker.rotate()
        ledger.broker.enqueue("q", b"after the rotation")
        state = ledger.state()
    assert state_of(recovered(path, ledger.still_clock())) == state
    return ledger


def frames_and_padding(path: Path) -> tuple[dict[int, int], set[int]]:
    """Where the frame that holds a byte begins (0: the header), and the bytes that hold nothing."""
    begins = dict.fromkeys(range(header_of(path).size), 0)
    padding = set()
    for record in records_of(path):
        begins |= dict.fromkeys(range(record.at, end_of(record)), record.at)
        padding |= set(range(record.body_offset + record.frame.length, end_of(record)))
    return begins, padding


def test_a_damaged_byte_in_the_log_is_refused_by_file_and_offset_or_harmless(
    closed: Ledger, tmp_path: Path, extent: Extent
) -> None:
    """Without an index: every byte of every segment is read."""
    directory = shutil.copytree(closed.path, tmp_path / "directory")
    lose_index(directory)
    places = [place for path in segments(directory) for place in in_chunks(f"log/{path.name}", path.stat().st_size)]
    places += in_chunks("log/mark", 28)
    found = damage_everywhere(directory, closed.clock.boot_id, places, extent.mutations)
    parts = {f"log/{path.name}": frames_and_padding(path) for path in segments(closed.path)}
    for flip in found:
        begins, padding = parts.get(flip.file, ({}, set(range(28))))
        if flip.offset in padding:
            assert flip.kind == "equal", flip
        else:
            assert (flip.kind, flip.error) == ("refused", "CorruptLogError"), flip
            assert flip.named.endswith(flip.file), flip
            assert flip.named_offset == begins[flip.offset], flip
    assert len(found) > 4_000 * extent.mutations


def test_a_damaged_byte_in_a_log_with_an_index_never_gives_another_state(
    closed: Ledger, tmp_path: Path, extent: Extent
) -> None:
    """What the index saves from reading is checked when it is read: payloads in older segments."""
    directory = shutil.copytree(closed.path, tmp_path / "directory")
    places = [
        place
        for path in segments(directory)
        for place in in_chunks(f"log/{path.name}", path.stat().st_size, 3 * extent.step)
    ]
    found = damage_everywhere(directory, closed.clock.boot_id, places, extent.mutations)
    last = segments(directory)[-1].name
    for flip in found:
        assert flip.kind in {"equal", "refused", "payload"}, flip
        if flip.kind != "equal":
            assert flip.error == "CorruptLogError", flip
            assert flip.named.endswith(flip.file), flip
            assert flip.named_offset <= flip.offset, flip
        if flip.kind == "payload":
            assert not flip.file.endswith(last), flip
    assert {flip.kind for flip in found} == {"equal", "refused", "payload"}


def test_a_damaged_byte_in_the_index_changes_nothing(tmp_path: Path, extent: Extent) -> None:
    directory = tmp_path / "directory"
    with open_ledger(directory) as ledger:
        for n in range(6):
            ledger.broker.enqueue("q", f"job {n}", idempotency_key=f"key {n}", headers={"n": str(n)})
        ledger.broker.ack(ledger.lease())
        ledger.broker.reject(ledger.lease(), error="no")
    sizes = {path.name: path.stat().st_size for path in (directory / "index").iterdir()}
    assert {"data.mdb", "manifest"} <= sizes.keys()
    places = [place for name, size in sizes.items() for place in in_chunks(f"index/{name}", size)]
    for flip in damage_everywhere(directory, ledger.clock.boot_id, places, extent.mutations):
        assert flip.kind == "equal", flip


def test_a_cut_of_any_file_is_refused_by_file_and_offset_or_harmless(
    closed: Ledger, tmp_path: Path, extent: Extent
) -> None:
    """With its mark and its index, and without the index. What is behind the last record may go."""
    for index in (True, False):
        directory = shutil.copytree(closed.path, tmp_path / f"directory {index}")
        if not index:
            lose_index(directory)
        places = [p for path in segments(directory) for p in in_chunks(f"log/{path.name}", path.stat().st_size)]
        places += in_chunks("log/mark", 28)
        for path in (directory / "index").glob("*"):
            places += in_chunks(f"index/{path.name}", path.stat().st_size, 131 * extent.step)
        found = damage_everywhere(directory, closed.clock.boot_id, places, 0)
        for cut in found:
            if cut.kind == "equal":
                continue
            assert (cut.kind, cut.error) in {("refused", "CorruptLogError"), ("payload", "CorruptLogError")}, cut
            assert cut.file.endswith(".log"), cut
            assert cut.named.endswith(cut.file), cut
            assert cut.named_offset <= cut.offset if cut.kind == "refused" else index, cut
        assert {cut.kind for cut in found} >= {"equal", "refused"}


def test_damage_in_what_is_not_used_yet_changes_nothing(tmp_path: Path, extent: Extent) -> None:
    """The zeros behind the last frame, and the spares."""
    with open_ledger(tmp_path / "live", fsync="always") as ledger:
        ledger.broker.enqueue("q", b"payload")
        ledger.engine._log.space.refill()
        state = ledger.state()
        directory = shutil.copytree(ledger.path, tmp_path / "directory")
    clock = ledger.still_clock()
    assert state_of(recovered(directory, clock)) == state
    used = end_of(records_of(segment(directory, 1))[-1])
    spares = [path.name for path in log_of(directory).glob("spare-*")]
    assert spares
    places = [(f"log/{segment_name(1)}", used, used + 64, 1), (f"log/{segment_name(1)}", used, SEGMENT_BYTES, 997)]
    places += [(f"log/{name}", 0, SEGMENT_BYTES, 7919) for name in spares]
    for flip in damage_everywhere(directory, clock.boot_id, places, extent.mutations):
        assert flip.kind == "equal", flip


def test_a_damaged_directory_opens_in_earnest_or_is_refused(closed: Ledger, tmp_path: Path) -> None:
    """Through the broker, a sample: the outcome is that of reading alone."""
    state = state_of(recovered(closed.path, closed.still_clock()))
    opened = refused = 0
    for path in [*segments(closed.path), *(closed.path / "index").iterdir(), log_of(closed.path) / "mark"]:
        size = path.stat().st_size
        for at in range(size // 5, size, size // 4):
            directory = shutil.copytree(closed.path, tmp_path / "directory")
            flip_byte(directory / path.relative_to(closed.path), at)
            error: CorruptLogError | None = None
            try:
                with open_ledger(directory, closed.still_clock()) as ledger:
                    assert ledger.state() == state, f"{path.name} at {at}"
            except CorruptLogError as caught:
                error = caught
            if error is None:
                opened += 1
            else:
                assert path.suffix == ".log"
                assert error.file == str(directory / path.relative_to(closed.path))
                assert error.offset <= at
                refused += 1
            shutil.rmtree(directory)
    assert opened >= 10
    assert refused >= 4


# -- deleted, swapped, old and empty segments


def refusal_of(directory: Path) -> CorruptLogError:
    """Opening the directory is refused, and that changes nothing in it and leaves it free for the next."""
    before = everything(directory)
    for _ in range(2):
        with pytest.raises(CorruptLogError, match="nothing was changed") as caught:
            Broker(directory, segment_bytes=SEGMENT_BYTES, clock=ManualClock())
        assert everything(directory) == before
    assert str(caught.value).startswith(f"{caught.value.file}: damaged at byte {caught.value.offset}: ")
    return caught.value


@pytest.fixture
def directory(closed: Ledger, tmp_path: Path) -> Path:
    """A copy of the closed directory, to be damaged: segments 2, 3, 4 ..., the first was dropped."""
    return shutil.copytree(closed.path, tmp_path / "directory")


@pytest.fixture
def bare(directory: Path) -> Path:
    """The same without its index."""
    lose_index(directory)
    return directory


def test_the_closed_directory_has_enough_segments_to_damage(closed: Ledger) -> None:
    assert numbers(closed.path) == [2, 3, 4, 5]
    assert all(records_of(path) for path in segments(closed.path))


@pytest.mark.parametrize("index", ["with its index", "without an index"])
@pytest.mark.parametrize("number", [2, 3, 4])
def test_a_deleted_segment_is_missed_by_name(directory: Path, number: int, index: str) -> None:
    if index == "without an index":
        lose_index(directory)
    segment(directory, number).unlink()
    error = refusal_of(directory)
    assert (error.file, error.offset) == (str(segment(directory, number)), 0)
    assert "the segment is missing" in str(error)


@pytest.mark.parametrize("index", ["with its index", "without an index"])
def test_a_deleted_last_segment_is_missed_where_the_log_ends_now(directory: Path, index: str) -> None:
    if index == "without an index":
        lose_index(directory)
    end = end_of(records_of(segment(directory, 4))[-1])
    segment(directory, 5).unlink()
    error = refusal_of(directory)
    assert (error.file, error.offset) == (str(segment(directory, 4)), end)


@pytest.mark.parametrize("left", ["mark", "manifest"])
def test_a_log_without_any_segment_is_missed(directory: Path, left: str) -> None:
    for path in segments(directory):
        path.unlink()
    if left == "mark":
        lose_index(directory)
    else:
        lose_mark(directory)
    error = refusal_of(directory)
    assert (error.file, error.offset) == (str(segment(directory, 1)), 0)
    assert "all segments" in str(error)


@pytest.mark.parametrize("content", [b"", bytes(SEGMENT_BYTES), b"RivetQ\0\n", b"something else" * 100])
@pytest.mark.parametrize("number", [2, 3, 5])
def test_a_segment_that_is_empty_or_something_else_is_refused(directory: Path, number: int, content: bytes) -> None:
    segment(directory, number).write_bytes(content)
    error = refusal_of(directory)
    assert error.file == str(segment(directory, number))


@pytest.mark.parametrize(("one", "other"), [(2, 3), (3, 4), (4, 5)])
def test_swapped_segments_are_refused(directory: Path, one: int, other: int) -> None:
    spare = directory / "spare"
    segment(directory, one).rename(spare)
    segment(directory, other).rename(segment(directory, one))
    spare.rename(segment(directory, other))
    error = refusal_of(directory)
    assert (error.file, error.offset) == (str(segment(directory, one)), 0)
    assert f"this is segment {other}" in str(error)


@pytest.mark.parametrize("number", [2, 3, 4])
def test_a_segment_of_another_log_is_refused(directory: Path, tmp_path: Path, number: int) -> None:
    with open_ledger(tmp_path / "other") as other:
        for _ in range(4):
            other.broker.enqueue("q", b"payload")
            other.broker.rotate()
        shutil.copy(segment(other.path, number), segment(directory, number))
    error = refusal_of(directory)
    assert error.file == str(segment(directory, number))


def test_an_older_copy_of_the_last_segment_is_refused(bare: Path) -> None:
    last = segment(bare, 5)
    first, second = records_of(last)[:2]
    os.truncate(last, second.at)
    error = refusal_of(bare)
    assert (error.file, error.offset) == (str(last), end_of(first))
    assert f"record {second.frame.lsn} is not there, but was on disk" in str(error)


def test_an_older_copy_of_a_sealed_segment_is_refused(bare: Path) -> None:
    sealed = segment(bare, 3)
    last = records_of(sealed)[-1]
    os.truncate(sealed, last.at)
    error = refusal_of(bare)
    assert (error.file, error.offset) == (str(sealed), last.at)
    assert f"record {last.frame.lsn} cannot be read" in str(error)


def test_a_segment_of_another_history_of_the_same_log_is_refused(tmp_path: Path) -> None:
    """Two copies of a directory went on: right log, right number, as many records, but other ones."""
    with open_ledger(tmp_path / "one") as one:
        one.broker.enqueue("q", b"common")
    shutil.copytree(one.path, tmp_path / "two")
    for name in ("one", "two"):
        with open_ledger(tmp_path / name, one.clock) as ledger:
            ledger.broker.enqueue("q", name.encode())
            ledger.broker.rotate()
            ledger.broker.enqueue("q", b"behind it")
        lose_index(ledger.path)
    shutil.copy(segment(tmp_path / "two", 2), segment(tmp_path / "one", 2))
    error = refusal_of(tmp_path / "one")
    assert error.file == str(segment(tmp_path / "one", 2))
    assert "another history" in str(error)
    assert error.offset == segment(tmp_path / "one", 2).stat().st_size


def test_a_refused_directory_opens_once_it_is_mended(directory: Path, closed: Ledger) -> None:
    saved = segment(directory, 3).read_bytes()
    segment(directory, 3).unlink()
    refusal_of(directory)
    segment(directory, 3).write_bytes(saved)
    with open_ledger(directory, closed.still_clock()) as ledger:
        assert ledger.state() == state_of(recovered(closed.path, closed.still_clock()))


def test_a_refused_opening_makes_no_files_of_its_own(bare: Path) -> None:
    (bare / "LOCK").unlink()
    segment(bare, 3).unlink()
    refusal_of(bare)
    assert not (bare / "LOCK").exists()
    assert not (bare / "index").exists()


def test_another_format_version_is_refused_as_such(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = everything(directory)
    monkeypatch.setattr("rivetq.storage.header.VERSION", 3)
    with pytest.raises(FormatError, match=r"\.log: format version 2, this RivetQ reads version 3"):
        Broker(directory, clock=ManualClock())
    assert everything(directory) == before


def test_a_directory_of_the_time_before_the_first_release_is_refused_with_what_to_do(tmp_path: Path) -> None:
    """`version1.log` was written by a RivetQ of that time: two jobs, one of them acked."""
    (tmp_path / "log").mkdir()
    shutil.copy(Path(__file__).with_name("version1.log"), tmp_path / "log" / "0000000000000001.log")
    before = everything(tmp_path)
    message = r"format version 1, .* reads version 2\. Let the RivetQ that wrote it finish its jobs, then begin a new"
    for refused in (Broker, tools.verify, partial(tools.salvage, out=tmp_path.with_name("out"))):
        with pytest.raises(FormatError, match=message):
            refused(tmp_path)
    assert everything(tmp_path) == before


def test_files_that_are_no_segments_are_left_alone(directory: Path, closed: Ledger) -> None:
    for name in ("notes.log", "5.log", "0000000000000005.log.bak"):
        (log_of(directory) / name).write_bytes(b"mine")
    with open_ledger(directory, closed.still_clock()):
        pass
    for name in ("notes.log", "5.log", "0000000000000005.log.bak"):
        assert (log_of(directory) / name).read_bytes() == b"mine"


# -- torn or damaged


@pytest.fixture
def torn(tmp_path: Path) -> Ledger:
    """Ten records, none of them known to be on disk, as a power cut may leave them."""
    with open_ledger(tmp_path / "live") as ledger:
        ledger.broker.sync()
        for n in range(10):
            ledger.broker.enqueue("q", f"job {n}")
        ledger.path = ledger.crash(tmp_path / "torn")
        lose_index(ledger.path)
        lose_mark(ledger.path)
    return ledger


def test_a_torn_tail_with_a_later_page_on_disk_is_cut_silently(torn: Ledger) -> None:
    last = segments(torn.path)[-1]
    records = records_of(last)
    tear(last, records[6])
    assert len(records_of(last)) == 6
    with open_ledger(torn.path, torn.still_clock()) as ledger:
        assert ledger.state() == torn.states[records[5].frame.lsn]
        ledger.broker.enqueue("q", "goes on")
        after = ledger.state()
    assert last.stat().st_size <= end_of(records[5]), "the rest is gone from the old file"
    with open_ledger(torn.path, torn.still_clock()) as ledger:
        assert ledger.state() == after


@pytest.mark.parametrize("witness", ["the mark", "a later frame", "the index"])
def test_a_gap_that_a_witness_knows_of_is_refused(tmp_path: Path, witness: str) -> None:
    with open_ledger(tmp_path / "live") as ledger:
        for n in range(10):
            ledger.broker.enqueue("q", f"job {n}")
            if n == 5:
                ledger.broker.sync()
        if witness == "the index":
            ledger.broker.checkpoint()
        directory = ledger.crash(tmp_path / "crashed")
    if witness != "the mark":
        lose_mark(directory)
    if witness != "the index":
        lose_index(directory)
    last = segments(directory)[-1]
    records = records_of(last)
    if witness == "the mark":
        os.truncate(last, end_of(records[5]))
    tear(last, records[4])
    error = refusal_of(directory)
    assert (error.file, error.offset) == (str(last), records[4].at)


def test_records_behind_the_last_one_known_to_be_on_disk_are_written_again(torn: Ledger) -> None:
    old = segments(torn.path)[-1]
    records = records_of(old)
    found = recovered(torn.path, torn.still_clock())
    assert found.surplus == [record.body for record in records if record.frame.lsn > found.end_lsn]
    assert len(found.surplus) >= 9
    with open_ledger(torn.path, torn.still_clock()) as ledger:
        assert ledger.state() == torn.state()
        crashed = ledger.crash(torn.path.with_name("again"))
    new = segment(torn.path, found.last_segment + 1)
    assert [r.body for r in records_of(new)][: len(found.surplus)] == found.surplus
    assert records_of(new)[0].frame.lsn == found.end_lsn + 1 == header_of(new).first_lsn
    assert [r.frame.lsn for r in records_of(old)] == list(range(1, found.end_lsn + 1))
    assert old.stat().st_size == found.end_offset
    with open_ledger(crashed, torn.still_clock()) as ledger:
        assert ledger.state() == torn.state()


def test_payloads_that_were_written_again_are_read_from_their_new_place(torn: Ledger) -> None:
    with open_ledger(torn.path, torn.still_clock()) as ledger:
        payloads = [lease.payload for lease in ledger.broker.lease_many("q", 20)]
    assert payloads == [f'"job {n}"'.encode() for n in range(10)]


def test_a_crash_between_writing_again_and_cutting_the_old_segment_is_no_damage(torn: Ledger) -> None:
    old = segments(torn.path)[-1]
    whole = old.read_bytes()
    with open_ledger(torn.path, torn.still_clock()) as ledger:
        crashed = ledger.crash(torn.path.with_name("again"))
    segment(crashed, int(old.stem)).write_bytes(whole)
    lose_index(crashed)
    with open_ledger(crashed, torn.still_clock()) as ledger:
        assert ledger.state() == torn.state()


def test_where_there_is_no_log_there_are_no_records(tmp_path: Path) -> None:
    assert list(rivetq.storage.recovery.records(SystemDisk(), str(tmp_path))) == []


def test_a_missing_mark_is_fine(directory: Path, closed: Ledger) -> None:
    lose_mark(directory)
    with open_ledger(directory, closed.still_clock()) as ledger:
        assert ledger.state() == state_of(recovered(closed.path, closed.still_clock()))


# -- segments, epochs, dropping


def test_every_opening_begins_a_segment_and_an_epoch(tmp_path: Path) -> None:
    for n in range(1, 6):
        with open_ledger(tmp_path / "directory"):
            pass
        assert numbers(tmp_path / "directory") == list(range(1, n + 1))
    headers = [header_of(path) for path in segments(tmp_path / "directory")]
    assert [header.epoch for header in headers] == [1, 2, 3, 4, 5]
    assert len({header.log_id for header in headers}) == 1
    assert len({header.salt for header in headers}) == 5


def test_a_new_directory_is_the_first_epoch_of_a_new_log(tmp_path: Path) -> None:
    clock = ManualClock()
    found = [recovered(tmp_path / "nothing", clock) for _ in range(2)]
    assert [(f.epoch, f.last_segment, f.end_lsn, f.now_ms) for f in found] == [(1, 0, 0, clock.wall_ms())] * 2
    assert found[0].log_id != found[1].log_id
    assert list(tmp_path.iterdir()) == []


def test_tokens_go_on_above_those_that_a_power_cut_took(torn: Ledger) -> None:
    """The lease was told and not synced: its token must not fit the job's next delivery."""
    with open_ledger(torn.path, torn.still_clock()) as ledger:
        ledger.broker.sync()
        before = ledger.crash(torn.path.with_name("before the lease"))
        lost = ledger.lease()
    with open_ledger(before, torn.still_clock()) as ledger:
        again = ledger.lease()
        assert again.id == lost.id
        assert again.token > lost.token
        with pytest.raises(LeaseLostError):
            ledger.broker.ack(lost)
        ledger.broker.ack(again)


@pytest.mark.parametrize("index", ["with its index", "without an index"])
def test_segments_that_the_log_said_were_dropped_may_be_there_or_not(busy: Ledger, tmp_path: Path, index: str) -> None:
    """The process died in the middle of removing them: the next opening removes the rest."""
    directory = shutil.copytree(busy.path, tmp_path / "directory")
    if index == "without an index":
        lose_index(directory)
    assert numbers(directory) == [2]
    segment(directory, 1).write_bytes(busy.sealed)
    with open_ledger(directory, busy.still_clock()) as ledger:
        assert ledger.state() == busy.state()
    assert numbers(directory) == [2, 3]
    with open_ledger(directory, busy.still_clock()) as ledger:
        assert ledger.state() == busy.state()


# -- the index


def served_by_index(directory: Path) -> bool:
    return recovered(directory).applied_lsn > 0


def test_an_index_that_fits_is_used(directory: Path, closed: Ledger) -> None:
    found = recovered(directory, closed.still_clock())
    assert found.applied_lsn == found.end_lsn == records_of(segments(directory)[-1])[-1].frame.lsn
    rebuilt = recovered(directory.with_name("none"))
    assert rebuilt.applied_lsn == 0


def test_index_and_tail_give_the_state_that_the_log_alone_gives(tmp_path: Path) -> None:
    with open_ledger(tmp_path / "live") as ledger:
        be_busy(ledger)
        ledger.broker.checkpoint()
        ledger.broker.enqueue("q", b"in the same segment")
        ledger.broker.rotate()
        ledger.broker.enqueue("q", b"in the tail", idempotency_key="t")
        ledger.broker.ack(ledger.lease("q"))
        directory = ledger.crash(tmp_path / "crashed")
    clock = ledger.still_clock()
    found = recovered(directory, clock)
    assert 0 < found.applied_lsn < found.end_lsn + len(found.surplus)
    state = state_of(found)
    lose_index(directory)
    rebuilt = recovered(directory, clock)
    assert rebuilt.applied_lsn == 0
    assert state_of(rebuilt) == state == ledger.states[max(ledger.states) - 1]


def test_a_log_that_ends_before_its_index_is_damage(torn: Ledger, tmp_path: Path) -> None:
    """The log lost records that the index has, and nobody else knows of them: the index was written after them."""
    with open_ledger(tmp_path / "live2", torn.clock) as ledger:
        ledger.broker.enqueue("q", b"kept")
        lsn = max(ledger.states)
        ledger.broker.enqueue("q", b"lost")
        ledger.broker.checkpoint()
        directory = ledger.crash(tmp_path / "crashed")
    lose_mark(directory)
    last = segments(directory)[-1]
    os.truncate(last, next(r.at for r in records_of(last) if r.frame.lsn == lsn + 1))
    error = refusal_of(directory)
    assert (error.file, error.offset) == (str(last), last.stat().st_size)
    assert f"record {lsn + 1} is not there" in str(error)


def test_an_index_behind_the_oldest_segment_is_rebuilt(tmp_path: Path) -> None:
    """It is of before a compaction: the records from there on are gone."""
    with open_ledger(tmp_path / "live") as ledger:
        for _ in range(5):
            ledger.broker.enqueue("q", b"payload")
        ledger.broker.checkpoint()
        old = ledger.crash(tmp_path / "old")
        ledger.broker.ack_many(ledger.broker.lease_many("q", 4))
        ledger.broker.compact()
        assert numbers(ledger.path)[0] > 1
    lose_index(ledger.path)
    shutil.copytree(old / "index", ledger.path / "index")
    assert not served_by_index(ledger.path)
    with open_ledger(ledger.path, ledger.still_clock()) as again:
        assert again.state() == ledger.states[max(ledger.states)]


def test_an_index_of_another_log_is_rebuilt(directory: Path, tmp_path: Path, closed: Ledger) -> None:
    with open_ledger(tmp_path / "other") as other:
        for n in range(20):
            other.broker.enqueue("q", n)
    lose_index(directory)
    shutil.copytree(other.path / "index", directory / "index")
    assert not served_by_index(directory)
    with open_ledger(directory, closed.still_clock()) as ledger:
        assert ledger.state() == state_of(recovered(closed.path, closed.still_clock()))
    assert served_by_index(directory), "closing wrote a new one"


@pytest.mark.parametrize(
    "error", [ValueError("a value"), KeyError("a queue"), IndexError(), TypeError(), struct.error(), lmdb.Error("x")]
)
def test_an_index_that_cannot_be_loaded_is_rebuilt_with_a_warning(
    directory: Path,
    closed: Ledger,
    error: Exception,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(index: Index, machine: Machine) -> None:
        apply(machine, QueueCreated(9, "half loaded"), 0, Place())
        raise error

    monkeypatch.setattr(Index, "load", fail)
    found = recovered(directory, closed.still_clock())
    assert found.applied_lsn == 0
    assert "index cannot be used" in caplog.text
    monkeypatch.undo()
    assert state_of(found) == state_of(recovered(closed.path, closed.still_clock()))


# -- records and snapshots whose checksum is right and whose content makes no sense


def write_log(directory: Path, *bodies: bytes, snapshot: bytes | None = None) -> None:
    """A log as a broken writer would leave it."""
    log_of(directory).mkdir(parents=True)
    log = Log(SystemDisk(), str(log_of(directory)), log_id=bytes(16), epoch=1, segment_bytes=SEGMENT_BYTES)
    snapshot = encode_snapshot(saving.snapshot(Machine())) if snapshot is None else snapshot
    log.space.make_room(1, len(snapshot), keep_reserve=False)
    log.begin_segment(snapshot, boot_id="boot", boot_ms=0, now_ms=0)
    for body in bodies:
        log.append(body)
    log.flush()
    log.open_mark()
    log.close()


def enqueued(priority: int = 5, queue: int = 1) -> Enqueued:
    return Enqueued(queue, 1, priority, 0, None, RetryPolicy(), None, [1], [b"x"])


SENSELESS = {
    "half an event": encode_record([Acked(1, [1, 2])], 0)[:-1],
    "no moment": b"short",
    "an unknown queue": encode_record([Acked(7, [1])], 0),
    "an enqueue into an unknown queue": encode_record([enqueued(queue=7)], 0),
    "a lease of nothing": encode_record([Leased([], [], [], [])], 0),
    "a priority that there is not": encode_record([QueueCreated(1, "q"), enqueued(priority=200)], 0),
}


@pytest.mark.parametrize("body", SENSELESS.values(), ids=SENSELESS.keys())
def test_a_record_that_makes_no_sense_is_damage_at_its_place(tmp_path: Path, body: bytes) -> None:
    write_log(tmp_path / "directory", encode_record([QueueCreated(1, "q")], 0), body)
    error = refusal_of(tmp_path / "directory")
    path = segment(tmp_path / "directory", 1)
    assert (error.file, error.offset) == (str(path), records_of(path)[1].at)
    assert "record 2 " in str(error)


@pytest.mark.parametrize("is_known", [True, False])
def test_a_record_of_a_newer_format_is_no_damage(tmp_path: Path, is_known: bool) -> None:
    write_log(tmp_path / "directory", encode_record([QueueCreated(1, "q")], 0), encode_record([], 0) + b"\xff")
    if not is_known:
        lose_mark(tmp_path / "directory")
    before = everything(tmp_path / "directory")
    with pytest.raises(FormatError, match=r"\.log: record 2 at byte \d+: event 255 is unknown in format version 2"):
        Broker(tmp_path / "directory", clock=ManualClock())
    assert everything(tmp_path / "directory") == before


@pytest.mark.parametrize("body", [SENSELESS["half an event"], SENSELESS["no moment"]], ids=["event", "moment"])
def test_a_record_that_makes_no_sense_is_damage_though_nobody_knows_it_to_be_on_disk(
    tmp_path: Path, body: bytes
) -> None:
    write_log(tmp_path / "directory", encode_record([QueueCreated(1, "q")], 0), body)
    lose_mark(tmp_path / "directory")
    error = refusal_of(tmp_path / "directory")
    path = segment(tmp_path / "directory", 1)
    assert (error.file, error.offset) == (str(path), records_of(path)[1].at)


@pytest.mark.parametrize(
    "snapshot", [b"", b"{}", b"[]", b"nonsense", b'{"sessions":[{}]}', b'{"sessions":[],"more":1}']
)
def test_a_snapshot_that_makes_no_sense_is_damage_of_the_header(tmp_path: Path, snapshot: bytes) -> None:
    write_log(tmp_path / "directory", encode_record([QueueCreated(1, "q")], 0), snapshot=snapshot)
    error = refusal_of(tmp_path / "directory")
    assert (error.file, error.offset) == (str(segment(tmp_path / "directory", 1)), 0)
    assert "snapshot" in str(error)


# -- the wall clock


DAY_S, TEN_YEARS_S = 86_400.0, 10 * 365.25 * 86_400
STEPS = [-TEN_YEARS_S, -DAY_S, -1.0, 0.0, 1.0, DAY_S, TEN_YEARS_S]


@contextmanager
def reopened_after(
    tmp_path: Path, step_s: float, *, reboot: bool, crash: bool = False, down_s: float = 0
) -> Iterator[tuple[Broker, ManualClock, Lease]]:
    """One job is ready, one has 100 s to wait, one is leased for 200 s, one key ends in 300 s; then the clock steps."""
    clock = ManualClock()
    clock.advance(5000)
    with open_ledger(tmp_path / "live", clock) as ledger:
        broker = ledger.broker
        broker.configure_queue("keys", idempotency_ttl=300)
        broker.enqueue("ready", b"ready")
        broker.enqueue("later", b"later", delay=100)
        broker.enqueue("leased", b"leased", retry=NO_RETRY)
        broker.enqueue("keys", b"key", idempotency_key="k")
        broker.ack(ledger.lease("keys"))
        lease = ledger.lease("leased", visibility_timeout=200)
        broker.sync()
        path = ledger.crash(tmp_path / "crashed") if crash else ledger.path
    clock.step_wall(step_s)
    clock.advance(down_s)
    if reboot:
        clock.reboot()
    with open_ledger(path, clock) as ledger:
        yield ledger.broker, clock, lease


@pytest.mark.parametrize("crash", [False, True], ids=["closed", "crashed"])
@pytest.mark.parametrize("step_s", STEPS)
def test_within_a_boot_a_step_of_the_wall_clock_changes_nothing(tmp_path: Path, step_s: float, crash: bool) -> None:
    with reopened_after(tmp_path, step_s, reboot=False, crash=crash, down_s=10) as (broker, clock, _):
        assert broker.lease("ready") is not None
        clock.advance(89.999)
        assert broker.lease("later") is None
        clock.advance(0.001)
        assert broker.lease("later") is not None
        clock.advance(99.999)
        assert broker.lease("leased") is None
        clock.advance(0.001)
        assert broker.lease("leased") is not None
        clock.advance(99.999)
        assert broker.find("keys", "k") is not None
        clock.advance(0.001)
        assert broker.find("keys", "k") is None


@pytest.mark.parametrize("step_s", [step for step in STEPS if step <= 0])
def test_after_a_reboot_with_the_clock_set_back_what_was_granted_is_the_most_that_is_left(
    tmp_path: Path, step_s: float
) -> None:
    with reopened_after(tmp_path, step_s, reboot=True) as (broker, clock, lease):
        assert broker.lease("ready") is not None
        assert broker.lease("later") is None
        assert broker.lease("leased") is None
        job = broker.get(lease.id)
        assert job is not None
        assert job.state == JobState.LEASED
        clock.advance(99.999)
        assert broker.lease("later") is None
        clock.advance(0.001)
        assert broker.lease("later") is not None
        clock.advance(99.999)
        assert broker.lease("leased") is None
        broker.extend(lease, 1)
        clock.advance(1)
        assert broker.lease("leased") is not None


@pytest.mark.parametrize("step_s", [step for step in STEPS if step > 0])
def test_after_a_reboot_a_clock_ahead_counts_as_time_that_passed(tmp_path: Path, step_s: float) -> None:
    with reopened_after(tmp_path, step_s, reboot=True) as (broker, clock, _):
        assert broker.lease("ready") is not None
        for queue, granted_s in (("later", 100), ("leased", 200)):
            if step_s < granted_s:
                assert broker.lease(queue) is None
                clock.advance(granted_s - step_s - 0.001 if queue == "later" else 99.999)
                assert broker.lease(queue) is None
                clock.advance(0.001)
            assert broker.lease(queue) is not None


@pytest.mark.parametrize("step_s", STEPS)
def test_the_time_line_never_steps_back_over_many_boots(tmp_path: Path, step_s: float) -> None:
    clock = ManualClock()
    latest_ms = 0
    for _ in range(4):
        with open_ledger(tmp_path / "live", clock) as ledger:
            ledger.broker.enqueue("q", b"payload")
            now_ms = ledger.engine._machine.now_ms
            assert now_ms >= latest_ms
            latest_ms = now_ms
        clock.step_wall(step_s / 4)
        clock.reboot()
    with open_ledger(tmp_path / "live", clock) as ledger:
        assert len(ledger.broker.lease_many("q", 10)) == 4


def test_a_dropped_segment_that_a_power_cut_brought_back_is_dropped_again(tmp_path: Path) -> None:
    """Of the names that were removed last any may come back, if their directory was not synced yet."""
    path, before = tmp_path / "directory", tmp_path / "before"
    before.mkdir()
    with Broker(path, segment_bytes=SEGMENT_BYTES) as broker:
        for _ in range(20):
            broker.enqueue("q", bytes(15_000))
            for each in segments(path):
                with contextlib.suppress(FileNotFoundError):  # the keeper was quicker
                    shutil.copy(each, before)
            broker.ack(broker.lease("q") or pytest.fail("nothing to lease"))
        kept = broker.enqueue("q", b"kept")
        broker.compact()
        dropped = sorted(p.name for p in before.glob("*.log") if not (path / "log" / p.name).exists())
    assert len(dropped) > 2
    shutil.copy(before / dropped[0], path / "log" / dropped[0])
    for index in ("with its index", "without an index"):
        if index == "without an index":
            lose_index(path)
            shutil.copy(before / dropped[0], path / "log" / dropped[0])
        with Broker(path, segment_bytes=SEGMENT_BYTES) as broker:
            assert [job.id for job in broker.jobs("q")] == [kept]
            assert not (path / "log" / dropped[0]).exists()


@pytest.mark.parametrize(
    ("trouble", "rounds", "error"),
    [
        (FileNotFoundError(), 20, StorageError),
        (CorruptLogError("torn", file="f", offset=0), 3, CorruptLogError),
    ],
)
def test_a_log_that_moves_while_it_is_read_is_read_anew_and_not_for_ever(
    trouble: Exception, rounds: int, error: type[Exception]
) -> None:
    tries: list[int] = []

    def read() -> str:
        tries.append(1)
        if len(tries) < most:
            raise trouble
        return "read"

    most = rounds
    assert beside_its_owner("d", read) == "read"
    tries.clear()
    most = rounds + 1
    with pytest.raises(error):
        beside_its_owner("d", read)
    assert len(tries) == rounds


def test_segments_that_the_owner_drops_while_they_are_read_are_a_storage_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Broker(tmp_path / "q") as broker:
        broker.enqueue("q", b"")
        broker.rotate()
    reader = recovery.records(SystemDisk(), str(tmp_path / "q"))

    def gone(self: object) -> None:
        raise FileNotFoundError

    monkeypatch.setattr(recovery._Reader, "open_oldest", gone)
    with pytest.raises(StorageError, match="dropped segments"):
        next(reader)
