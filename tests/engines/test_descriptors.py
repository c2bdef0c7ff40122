"""How many files a broker leaves and opens: many segments need few descriptors, short openings leave few segments."""

from __future__ import annotations

import errno
import os
import random
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from inside import inside

import rivetq.engines.compaction
import rivetq.engines.local
import rivetq.storage.log
from rivetq import Broker, CorruptLogError
from rivetq.engines.compaction import MANY_SEGMENTS
from rivetq.engines.local import LocalEngine
from rivetq.storage.disk import SystemDisk
from rivetq.storage.layout import list_segments, segment_name
from rivetq.storage.segment import SegmentFile, SegmentFiles

SEGMENTS, LIMIT = 150, 110
"""More segments than descriptors; so many more than 64 are for the interpreter, LMDB and the files beside the log."""

CHILD = """
import os, resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (DESCRIPTORS, DESCRIPTORS))
from rivetq import Broker, tools
from rivetq.storage.disk import SystemDisk

most = 0
class Disk(SystemDisk):
    def open(self, path, *, write=False):
        global most
        fd = super().open(path, write=write)
        names = [os.path.realpath(f"/proc/self/fd/{each}") for each in os.listdir("/proc/self/fd")]
        most = max(most, sum(name.endswith(".log") or "spare-" in name for name in names))
        return fd

import rivetq.engines.local, rivetq.tools
for module in ("engines.local", "tools.directory", "tools.dumping", "tools.looking", "tools.repair", "tools.verifying"):
    assert sys.modules[f"rivetq.{module}"].SystemDisk
    sys.modules[f"rivetq.{module}"].SystemDisk = Disk
directory = sys.argv[1]
"""


@pytest.fixture
def without_keeper(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if every opening were too short for a turn of it."""
    monkeypatch.setattr(LocalEngine, "_keep", lambda self, *, overdue: None)


@pytest.fixture
def many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, without_keeper: None) -> Path:
    """A directory with a job in each of many segments, of which none was swept up."""
    with monkeypatch.context() as patched:
        patched.setattr(rivetq.engines.compaction, "MANY_SEGMENTS", 10**6)
        with Broker(tmp_path / "data", fsync="never") as broker:
            for n in range(SEGMENTS):
                broker.enqueue("q", b"job %d" % n)
                broker.rotate()
    return tmp_path / "data"


def in_child(program: str, directory: Path) -> str:
    """Run it with few descriptors; what it prints."""
    code = CHILD.replace("DESCRIPTORS", str(LIMIT)) + program + '\nassert 0 < most <= 64, f"{most} at once"\n'
    result = subprocess.run([sys.executable, "-c", code, str(directory)], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout


def segments(directory: Path) -> int:
    return len(list_segments(SystemDisk(), str(directory / "log")))


# Many segments


def test_the_tools_work_on_more_segments_than_there_are_descriptors(many: Path) -> None:
    out = in_child(
        """
assert tools.verify(directory).is_whole
with tools.look(directory) as found:
    assert len(found.jobs("q", limit=1000)) == 150
print(sum(event["event"] == "Enqueued" for record in tools.dump(directory) for event in record["events"]))
assert tools.backup(directory, directory + "-copy").segments > 150
assert tools.backup(directory, directory + "-linked", link=False).jobs == 150
assert tools.salvage(directory, directory + "-saved").is_whole
with Broker(directory + "-saved") as broker:
    assert broker.stats().ready == 150
assert tools.rebuild_index(directory) == 150
""",
        many,
    )
    assert int(out) == SEGMENTS


@pytest.mark.parametrize("swept", [False, True])
def test_a_broker_works_on_more_segments_than_there_are_descriptors(many: Path, swept: bool) -> None:
    in_child(
        f"""
rivetq.engines.compaction.MANY_SEGMENTS = {MANY_SEGMENTS if swept else 10**6}
with Broker(directory, fsync="never", cache_bytes=0) as broker:
    assert (broker.metrics()["log_segments"] < 20) == {swept}
    assert [job.payload for job in broker.jobs("q", limit=1000)] == [b"job %d" % n for n in range(150)]
    if not {swept}:
        for _ in range(150):  # what is read while a backup reads as well
            broker.enqueue("q", b"more")
            broker.rotate()
        assert broker.backup(directory + "-copy").jobs == 300
    broker.compact()
    leases = broker.lease_many("q", 1000)
    assert [lease.payload for lease in leases][:150] == [b"job %d" % n for n in range(150)]
    broker.ack_many(leases)
""",
        many,
    )


def test_a_backlog_of_more_segments_than_descriptors_is_put_in_and_taken_out(tmp_path: Path) -> None:
    in_child(
        """
import socket
with Broker(directory, fsync="never", segment_bytes=64 * 1024, cache_bytes=0) as broker:
    for n in range(200):
        broker.enqueue_many("q", [b"%5d" % (n * 50 + i) + bytes(1000) for i in range(50)])
    assert broker.metrics()["log_segments"] > 150
    socket.socket().close()  # the program has descriptors left
    seen = 0
    while leases := broker.lease_many("q", 100):
        for lease in leases:
            assert int(lease.payload[:5]) == seen
            seen += 1
        broker.ack_many(leases)
    assert seen == 10_000
""",
        tmp_path / "data",
    )


def test_readers_in_many_threads_read_right_while_files_come_and_go(
    many: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rivetq.storage.log, "OPEN_SEGMENTS", 2)
    monkeypatch.setattr(rivetq.engines.compaction, "MANY_SEGMENTS", 10**6)
    wrong: list[object] = []

    def read(broker: Broker, seed: int) -> None:
        rng = random.Random(seed)
        try:
            for _ in range(200):
                after = rng.randrange(SEGMENTS - 3)
                found = [job.payload for job in broker.jobs("q", after=after, limit=3)]
                if found != [b"job %d" % n for n in range(after, after + 3)]:
                    wrong.append(found)
        except BaseException as error:
            wrong.append(error)

    with Broker(many, fsync="never", cache_bytes=0) as broker:
        threads = [threading.Thread(target=read, args=(broker, seed)) for seed in range(8)]
        for thread in threads:
            thread.start()
        broker.compact()
        for thread in threads:
            thread.join()
    assert not wrong


# The files that are kept open


def put_segments(directory: Path, count: int) -> SegmentFiles:
    """Files of one byte, their number, of which two are kept open."""
    for number in range(1, count + 1):
        (directory / segment_name(number)).write_bytes(bytes([number]))
    return SegmentFiles(SystemDisk(), str(directory), 2)


def opened(directory: Path) -> set[int]:
    """Which of them this process has open."""
    found = set()
    for fd in os.listdir("/proc/self/fd"):
        name = os.path.realpath(f"/proc/self/fd/{fd}")
        if name.startswith(f"{directory}{os.sep}"):
            found.add(int(os.path.basename(name).removesuffix(".log")))
    return found


def test_the_file_that_was_not_used_for_longest_is_closed(tmp_path: Path) -> None:
    files = put_segments(tmp_path, 3)
    assert [files.get(n).read(1, 0) for n in (1, 2, 1, 3)] == [b"\1", b"\2", b"\1", b"\3"]
    assert opened(tmp_path) == {1, 3}
    files.put(2, SegmentFile.open(SystemDisk(), files.path(2)))
    assert opened(tmp_path) == {2, 3}
    files.forget(3)
    assert opened(tmp_path) == {2}


def test_a_file_is_not_closed_under_its_reader(tmp_path: Path) -> None:
    files = put_segments(tmp_path, 3)
    reader = files.get(1)
    for number in (2, 3):
        files.get(number)
    assert opened(tmp_path) == {1, 2, 3}
    assert reader.read(1, 0) == b"\1"
    del reader
    assert opened(tmp_path) == {2, 3}


def test_no_file_is_kept_after_the_end(tmp_path: Path) -> None:
    files = put_segments(tmp_path, 2)
    files.get(1)
    files.close()
    assert opened(tmp_path) == set()
    assert files.get(2).read(1, 0) == b"\2"
    assert opened(tmp_path) == set()


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENFILE])
def test_files_that_are_kept_make_room_for_one_that_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """The program has used up its descriptors."""
    files = put_segments(tmp_path, 3)
    for number in (1, 2):
        files.get(number)

    def refuse(self: SystemDisk, path: str, *, write: bool = False) -> int:
        if opened(tmp_path):
            raise OSError(code, os.strerror(code))
        return os.open(path, os.O_RDONLY)

    monkeypatch.setattr(SystemDisk, "open", refuse)
    assert files.get(3).read(1, 0) == b"\3"
    assert opened(tmp_path) == {3}
    files.forget(3)
    held = SegmentFile(SystemDisk(), "", os.open(files.path(1), os.O_RDONLY), 1, 0)
    with pytest.raises(OSError, match=os.strerror(code)):  # it has none to give
        files.get(2)
    held.close()


@pytest.mark.parametrize("step", ["rotate", "compact"])
def test_a_directory_is_synced_with_the_descriptor_of_a_segment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, without_keeper: None, step: str
) -> None:
    with Broker(tmp_path / "data", fsync="never", cache_bytes=0) as broker:
        for n in range(3):
            broker.enqueue("q", b"job %d" % n)
            broker.rotate()
        sync, refused = SystemDisk.sync_directory, list[str]()

        def sync_directory(self: SystemDisk, path: str) -> None:
            if path.endswith("log") and not refused:
                refused.append(path)
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            sync(self, path)

        broker.enqueue("q", b"last")
        monkeypatch.setattr(SystemDisk, "sync_directory", sync_directory)
        if step == "rotate":
            broker.rotate()
        else:
            inside(broker)._compact(2)
        assert refused
        assert len(broker.jobs("q")) == 4
        assert broker.health().state == "open"
    with Broker(tmp_path / "data") as broker:
        assert len(broker.jobs("q")) == 4


# Short openings


def test_short_openings_leave_a_handful_of_files(tmp_path: Path, without_keeper: None) -> None:
    """The keeper gets no turn in a program that opens, makes one call and closes."""
    for n in range(5 * MANY_SEGMENTS):
        with Broker(tmp_path / "data", fsync="never") as broker:
            broker.enqueue("q", b"job %d" % n)
        assert segments(tmp_path / "data") <= MANY_SEGMENTS + 1
    with Broker(tmp_path / "data") as broker:
        assert [job.payload for job in broker.jobs("q", limit=1000)] == [
            b"job %d" % n for n in range(5 * MANY_SEGMENTS)
        ]
        inside(broker).audit()


def test_every_opening_begins_a_segment_and_an_epoch(tmp_path: Path, without_keeper: None) -> None:
    before = 0
    for _ in range(2 * MANY_SEGMENTS):
        with Broker(tmp_path / "data", fsync="never") as broker:
            last = list_segments(SystemDisk(), str(tmp_path / "data" / "log"))[-1]
            assert last > before
            before = last
            broker.enqueue("q", b"job")
            lease = broker.lease("q")
            assert lease is not None
            lease.ack()
            assert lease.token >> 32 == inside(broker)._log._epoch


def test_an_opening_sweeps_no_more_than_the_number_of_segments_is_worth(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, without_keeper: None
) -> None:
    """What is large and oldest is copied when there are many small ones behind it, and not before."""
    monkeypatch.setattr(rivetq.engines.compaction, "SWEEP_BYTES", 20_000)
    with Broker(tmp_path / "data", fsync="never") as broker:
        broker.enqueue("q", bytes(30_000))
        broker.rotate()
    counts = []
    for _ in range(3 * MANY_SEGMENTS):
        with Broker(tmp_path / "data", fsync="never") as broker:
            copied = broker.metrics()["copied_bytes"]
            assert copied <= 20_000 * (1 + (counts or [0])[-1] / MANY_SEGMENTS)
        counts.append(segments(tmp_path / "data"))
    assert MANY_SEGMENTS < max(counts) <= 2 * MANY_SEGMENTS
    assert counts[-1] < MANY_SEGMENTS


def test_large_segments_are_not_many_small_ones(tmp_path: Path, without_keeper: None) -> None:
    for _ in range(2 * MANY_SEGMENTS):
        with Broker(tmp_path / "data", fsync="never", segment_bytes=65_536) as broker:
            broker.enqueue_many("q", [bytes(1000)] * 50)
            assert broker.metrics()["copied_bytes"] == 0
            assert inside(broker)._garbage_upto() == 0


def test_an_opening_is_not_refused_for_the_sake_of_a_sweep(tmp_path: Path, without_keeper: None) -> None:
    """Damage in a segment that it need not read is found by who reads it."""
    for n in range(MANY_SEGMENTS):
        with Broker(tmp_path / "data", fsync="never") as broker:
            broker.enqueue("q", b"job %d" % n)
    path = tmp_path / "data" / "log" / segment_name(3)
    data = bytearray(path.read_bytes())
    data[data.index(b"job 2")] ^= 1
    path.write_bytes(data)
    for _ in range(2):
        with Broker(tmp_path / "data", fsync="never", cache_bytes=0) as broker:
            assert broker.enqueue("q", b"more")
            assert broker.metrics()["copied_bytes"] == 0
            assert segments(tmp_path / "data") > MANY_SEGMENTS
    with Broker(tmp_path / "data", fsync="never", cache_bytes=0) as broker, pytest.raises(CorruptLogError):
        broker.jobs("q")


def test_an_opening_on_a_full_disk_sweeps_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, without_keeper: None
) -> None:
    for n in range(MANY_SEGMENTS):
        with Broker(tmp_path / "data", fsync="never") as broker:
            broker.enqueue("q", b"job %d" % n)
    with monkeypatch.context() as patched:
        full = rivetq.DiskFullError("full", path=str(tmp_path))
        patched.setattr(LocalEngine, "_copy", lambda self, segment, batch: (_ for _ in ()).throw(full))
        with Broker(tmp_path / "data", fsync="never") as broker:
            assert broker.stats().ready == MANY_SEGMENTS
    assert segments(tmp_path / "data") == MANY_SEGMENTS + 1
    with Broker(tmp_path / "data", fsync="never") as broker:
        assert broker.stats().ready == MANY_SEGMENTS
        assert segments(tmp_path / "data") == 1
