"""The tools for the bad day: what they find, what they save, what they leave alone."""

from __future__ import annotations

import errno
import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest
from inside import inside

import rivetq.engines.view
import rivetq.storage.backup
from rivetq import Broker, BrokerLockedError, CorruptLogError, RetryPolicy, StorageError, UsageError, tools
from rivetq.__main__ import main
from rivetq.machine.events import Acked, Buried, Cancelled, Enqueued, Leased, Purged
from rivetq.storage.codec import decode_record
from rivetq.storage.header import decode_header
from rivetq.storage.index import Index
from rivetq.storage.segment import Record, Scan
from rivetq.storage.space import Space
from rivetq.tools import directory, looking, verifying

SEGMENT_BYTES = 65_536
NO_WAIT = RetryPolicy(base=0, max_attempts=3)


def fill(broker: Broker) -> None:
    """Something of everything, over several segments."""
    broker.configure_queue("mail", idempotency_ttl=1000, visibility_timeout=500)
    broker.enqueue_many("mail", [b"m%d" % n for n in range(60)], idempotency_keys=[f"k{n}" for n in range(60)])
    broker.enqueue("mail", b"later", delay=1000, headers={"a": "ä"}, priority=9)
    broker.enqueue_many("bulk", [b"x" * 5000] * 40, retry=NO_WAIT)
    broker.checkpoint()
    broker.ack_many(broker.lease_many("mail", 10))
    broker.rotate()
    for lease in broker.lease_many("mail", 3):
        broker.nack(lease, error="no", delay=0)
    for lease in broker.lease_many("mail", 2):
        broker.reject(lease, error="never")
    broker.rotate()
    broker.cancel(broker.jobs("mail")[5].id)
    broker.lease_many("mail", 4)
    broker.enqueue("last", b"the last one")
    broker.sync()


@pytest.fixture
def busy(tmp_path: Path) -> Iterator[Broker]:
    """A broker in the middle of its work."""
    with Broker(tmp_path / "data", segment_bytes=SEGMENT_BYTES) as broker:
        fill(broker)
        yield broker


@pytest.fixture
def closed(busy: Broker) -> Path:
    busy.close()
    return Path(busy.path)


@pytest.fixture
def killed(busy: Broker, tmp_path: Path) -> Path:
    """What a killed process would leave."""
    return Path(shutil.copytree(busy.path, tmp_path / "killed", ignore=shutil.ignore_patterns("LOCK", "spare-*")))


def contents(directory: Path) -> dict[str, bytes]:
    """All but the lock, which comes and goes."""
    paths = [path for path in sorted(directory.rglob("*")) if path.is_file() and path.name != "LOCK"]
    return {str(path.relative_to(directory)): path.read_bytes() for path in paths}


def state(directory: Path) -> dict[str, Any]:
    """What a broker finds there; leases as they were."""
    copy = directory.with_name(directory.name + " looked at")
    shutil.copytree(directory, copy)
    try:
        with Broker(copy, segment_bytes=SEGMENT_BYTES, release_on_open=False) as broker:
            inside(broker).audit()
            return inside(broker).dump()
    finally:
        shutil.rmtree(copy)


def segments(directory: Path) -> list[Path]:
    return sorted((directory / "log").glob("*.log"))


def records(path: Path) -> list[Record]:
    data = path.read_bytes()
    return list(Scan(data, decode_header(data, str(path))).records())


def rot(path: Path, at: int, size: int = 1) -> None:
    data = bytearray(path.read_bytes())
    for i in range(at, at + size):
        data[i] ^= 0xFF
    path.write_bytes(bytes(data))


# verify


@pytest.mark.parametrize("which", ["closed", "killed"])
def test_verify_finds_a_healthy_directory_whole_and_changes_nothing(which: str, request: pytest.FixtureRequest) -> None:
    directory: Path = request.getfixturevalue(which)
    before = contents(directory)
    found = tools.verify(directory)
    assert found.is_whole, found
    assert found.jobs == len(state(directory)["jobs"]) == 91
    assert found.segments == len(segments(directory)) >= 4
    assert found.records > 12
    assert contents(directory) == before


@pytest.mark.parametrize("note", [b"", b'{"pid": 7, "since_ms": 8}', None])
def test_verify_leaves_the_lock_as_it_was(closed: Path, note: bytes | None) -> None:
    lock = closed / "LOCK"
    if note is None:
        lock.unlink()
    else:
        lock.write_bytes(note)
    assert tools.verify(closed).is_whole
    assert (lock.read_bytes() if lock.exists() else None) == note


def test_verify_does_not_go_on_without_the_lock_because_descriptors_are_used_up(
    closed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_descriptor(directory: str, wall_ms: int) -> Any:
        raise OSError(errno.EMFILE, "too many open files")

    monkeypatch.setattr(directory, "DirectoryLock", no_descriptor)
    with pytest.raises(StorageError, match="cannot be locked"):
        tools.verify(closed)


@pytest.mark.parametrize(("key", "has_ended"), [(None, False), ((1, 0), False), ((1, 99), True), ((1, 101), False)])
def test_a_key_that_an_index_may_lack_is_one_whose_window_is_over(key: tuple[int, int] | None, has_ended: bool) -> None:
    assert verifying._has_ended(key, 100) == has_ended


def test_verify_counts_what_a_crash_left_unsynced(tmp_path: Path) -> None:
    with Broker(tmp_path / "live", fsync="never") as broker:
        broker.enqueue_many("q", [b"x"] * 7)
        shutil.copytree(broker.path, tmp_path / "killed", ignore=shutil.ignore_patterns("spare-*"))
    found = tools.verify(tmp_path / "killed")
    assert found.is_whole
    assert found.jobs == 7


def test_verify_sees_damage_in_every_segment(closed: Path) -> None:
    """Also where an opening would not look, since the index has it."""
    for path in segments(closed):
        for record in records(path)[:3]:
            rot(path, record.body_offset)
            found = tools.verify(closed)
            assert found.log is not None
            assert (found.log.file, found.log.offset) == (str(path), record.at)
            assert not found.is_whole
            rot(path, record.body_offset)
    assert tools.verify(closed).is_whole


def test_verify_sees_an_index_that_does_not_match(closed: Path) -> None:
    rot(closed / "index" / "data.mdb", 5000)
    found = tools.verify(closed)
    assert found.log is None
    assert found.index is not None
    assert found.index.file == str(closed / "index" / "data.mdb")
    shutil.rmtree(closed / "index")
    assert tools.verify(closed).is_whole, "no index is no damage"


@pytest.mark.parametrize("what", ["a job", "a total", "a key", "nothing"])
def test_verify_compares_an_intact_index_with_the_log(closed: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """An index with right checksums that says something else: a bug would make one."""
    honest = verifying.served
    seen: list[object] = []

    def serving(found: Any) -> Any:
        machine = honest(found)
        seen.append(machine)
        if len(seen) == 2:
            if what == "a job":
                next(iter(machine.jobs.values())).attempts += 1
            elif what == "a total":
                machine.queues["mail"].acked += 1
            elif what == "a key":
                machine.keys.forget(machine.queues["mail"].number, "k30")
        return machine

    monkeypatch.setattr(verifying, "served", serving)
    found = tools.verify(closed)
    assert len(seen) == 2
    assert (found.index is None) == (what == "nothing")


def test_a_look_begins_with_the_index_and_looks_again_when_the_tail_moved(
    closed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[Index] = []
    load, real, faults = (
        Index.load,
        rivetq.engines.view.recover,
        [CorruptLogError("moved", file="f", offset=0), FileNotFoundError()],
    )

    def loads(self: Index, machine: Any) -> None:
        loaded.append(self)
        load(self, machine)

    def moving(*args: Any) -> Any:
        if faults:
            raise faults.pop()
        return real(*args)

    monkeypatch.setattr(Index, "load", loads)
    monkeypatch.setattr(rivetq.engines.view, "recover", moving)
    with tools.look(closed) as found:
        assert found.stats().enqueued > 0
    assert (faults, len(loaded)) == ([], 1)


def test_a_look_finds_payloads_that_the_owner_moved_since(tmp_path: Path) -> None:
    with Broker(tmp_path / "data", segment_bytes=SEGMENT_BYTES) as broker:
        ids = broker.enqueue_many("q", [b"%d" % n * 1000 for n in range(200)])
        with tools.look(broker.path) as found, tools.look(broker.path) as another:
            before = found.as_of, found.record
            assert len(found.jobs("q", payloads=False, limit=1000)) == 200
            broker.ack_many(broker.lease_many("q", 190))
            broker.compact()
            assert {job.payload for job in found.jobs("q", payloads=False)} == {b""}
            assert (found.as_of, found.record) == before  # no payload was asked for
            assert [job.payload for job in found.jobs("q", limit=1000)] == [b"%d" % n * 1000 for n in range(190, 200)]
            assert found.stats().acked == 190
            assert (found.as_of, found.record) > before
            assert another.get(ids[0]) is None
            assert another.stats().acked == 190


def test_a_look_begins_anew_a_few_times_and_then_says_so(closed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[Any] = []

    def moved(self: Any, entry: Any) -> Any:
        looks.append(self)
        raise rivetq.engines.view.MovedError(entry.id)

    with tools.look(closed) as found:
        [job] = found.jobs("last")
        monkeypatch.setattr(rivetq.engines.view.ViewEngine, "_segment", moved)
        with pytest.raises(StorageError, match=f"job {job.id}: its payload was moved {looking.LOOKS + 1} times"):
            found.get(job.id)
    assert len({id(each) for each in looks}) == len(looks) == looking.LOOKS + 1
    assert [name for name in os.listdir(tempfile.gettempdir()) if name == os.path.basename(looks[0]._copy)] == []


def test_the_copy_of_a_look_goes_with_it(closed: Path) -> None:
    gc.disable()  # nothing that it holds holds it
    try:
        look = tools.look(closed)
        copy = Path(look._engine._copy)
        assert copy.is_dir()
        del look
        assert not copy.exists()
    finally:
        gc.enable()


def test_a_look_that_is_never_closed_leaves_nothing_behind(closed: Path, tmp_path: Path) -> None:
    program = """
import os, sys
from rivetq import tools
look = tools.look(sys.argv[1])
if not os.fork():
    sys.exit(0)
assert os.waitstatus_to_exitcode(os.wait()[1]) == 0
print(os.listdir(os.environ["TMPDIR"]), look.get(1))  # a copy that a child took along is not its own to remove
"""
    place = tmp_path / "tmp"
    place.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", program, closed], env=os.environ | {"TMPDIR": str(place)}, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("['rivetq-view-")
    assert list(place.iterdir()) == []


def test_a_listing_without_payloads_reads_none(closed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with tools.look(closed) as found:
        jobs = found.jobs("mail", limit=1000)
        monkeypatch.setattr(rivetq.engines.view, "read_payload", lambda *args: pytest.fail("a payload was read"))
        bare = found.jobs("mail", limit=1000, payloads=False)
        assert [attrs.evolve(job, payload=b"") for job in jobs] == bare
        assert any(job.payload for job in jobs)
        some = found.jobs("mail", state="ready", after=jobs[0].id, limit=2, payloads=False)
        assert [job.id for job in some] == [job.id for job in jobs if job.state == "ready" and job.id > jobs[0].id][:2]


def with_a_rotten_payload(directory: Path) -> int:
    """Three jobs in a segment that an opening does not read; the second one's payload rots. Its id."""
    with Broker(directory, segment_bytes=SEGMENT_BYTES, cache_bytes=0) as broker:
        ids = broker.enqueue_many("q", [bytes([letter]) * 3000 for letter in b"abc"])
        broker.rotate()
        broker.checkpoint()
    (path,) = [path for path in segments(directory) if b"b" * 3000 in path.read_bytes()]
    rot(path, path.read_bytes().index(b"b" * 3000) + 17)
    return ids[1]


def test_a_look_at_a_rotten_payload_is_refused_as_a_broker_refuses_it(tmp_path: Path) -> None:
    job_id = with_a_rotten_payload(tmp_path / "data")
    with tools.look(tmp_path / "data") as found:
        calls: list[Callable[[], object]] = [lambda: found.get(job_id), lambda: found.jobs("q")]
        for call in calls:
            with pytest.raises(CorruptLogError, match="salvage"):
                call()
        assert [job.payload[:1] for job in found.jobs("q", limit=1)] == [b"a"]
    with Broker(tmp_path / "data", cache_bytes=0) as broker, pytest.raises(CorruptLogError, match="salvage"):
        broker.get(job_id)


def test_a_look_that_meets_damage_each_time_says_so(closed: Path) -> None:
    segment = sorted((closed / "log").glob("*.log"))[0]
    rot(segment, 5)
    with pytest.raises(CorruptLogError):
        tools.look(closed)


def test_verify_of_an_open_directory_reads_a_copy_of_one_moment(busy: Broker, tmp_path: Path) -> None:
    def verified() -> tools.Verification:
        found = tools.verify(busy.path)
        assert found.path == busy.path
        assert os.listdir(tmp_path) == ["data"], "the copy is removed"
        return found

    def kept() -> dict[str, bytes]:  # spares come as the owner needs them
        files = [*Path(busy.path, "log").glob("*.log"), *Path(busy.path, "index").iterdir()]
        return {str(path): path.read_bytes() for path in files}

    before = kept()
    found = verified()
    assert kept() == before
    assert found.is_whole
    stats = busy.stats()
    jobs = stats.ready + stats.scheduled + stats.leased + stats.dead
    assert found.jobs == jobs > 0
    assert found.as_of is not None
    busy.checkpoint()
    busy.enqueue("one", b"behind the index")
    found = verified()
    assert (found.is_whole, found.jobs) == (True, jobs + 1)


def test_verify_of_an_open_directory_sees_damage_to_its_log_and_its_index(
    busy: Broker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verifying, "VERIFY_PATIENCE_S", 0)
    busy.checkpoint()
    index = Path(busy.path) / "index" / "data.mdb"
    rot(index, 5000)
    found = tools.verify(busy.path)
    assert found.log is None
    assert found.index is not None
    assert (found.index.file, found.is_whole) == (str(index), False)
    segment = sorted((Path(busy.path) / "log").glob("*.log"))[0]
    rot(segment, 5)
    found = tools.verify(busy.path)
    assert found.log is not None
    assert (found.log.file, found.as_of) == (str(segment), None)
    assert os.listdir(tmp_path) == ["data"]


def test_verify_looks_again_while_a_checkpoint_is_under_way(busy: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    busy.checkpoint()
    manifest = Path(busy.path) / "index" / "manifest"
    whole, looks = manifest.read_bytes(), 0
    manifest.write_bytes(bytes(len(whole)))

    def copied(path: str, out: str) -> None:
        nonlocal looks
        looks += 1
        if looks == 4:
            manifest.write_bytes(whole)
        rivetq.engines.view.copy_index(path, out)

    monkeypatch.setattr("rivetq.tools.verifying.copy_index", copied)
    assert tools.verify(busy.path).is_whole
    assert looks == 4


def test_verify_of_an_open_directory_whose_parent_cannot_be_written_copies_elsewhere(
    busy: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, made = tempfile.mkdtemp, []

    def refuse(prefix: str, **place: str) -> str:
        if place:
            raise PermissionError(errno.EACCES, "no", place["dir"])
        made.append(make(prefix=prefix))
        return made[-1]

    monkeypatch.setattr("rivetq.tools.verifying.tempfile.mkdtemp", refuse)
    assert tools.verify(busy.path).is_whole
    assert len(made) == 1
    assert not os.path.exists(made[0])


def test_verify_beside_an_owner_that_works_and_compacts_finds_it_whole(tmp_path: Path) -> None:
    with Broker(tmp_path / "data", segment_bytes=SEGMENT_BYTES, fsync="never") as broker:
        over = threading.Event()

        def work() -> None:
            turn = 0
            while not over.is_set():
                broker.enqueue_many("q", [b"x" * 500] * 50)
                broker.ack_many(broker.lease_many("q", 45))
                broker.compact() if turn % 3 else broker.checkpoint()
                turn += 1

        thread = threading.Thread(target=work)
        thread.start()
        try:
            found = [tools.verify(broker.path) for _ in range(10)]
        finally:
            over.set()
            thread.join()
    assert [each for each in found if not each.is_whole] == []
    assert found[-1].records > found[0].records


def test_the_tools_tell_how_far_they_are(killed: Path, busy: Broker, tmp_path: Path) -> None:
    calls: dict[str, Callable[[tools.Progress], object]] = {
        "verify": lambda tell: tools.verify(killed, progress=tell),
        "verify beside its owner": lambda tell: tools.verify(busy.path, progress=tell),
        "backup": lambda tell: tools.backup(busy.path, tmp_path / "out", progress=tell),
        "copy": lambda tell: tools.backup(busy.path, tmp_path / "copy", link=False, progress=tell),
        "salvage": lambda tell: tools.salvage(killed, tmp_path / "saved", progress=tell),
        "rebuild": lambda tell: tools.rebuild_index(killed, progress=tell),
    }
    for name, call in calls.items():
        told: list[tuple[int, ...]] = []
        call(lambda *how_far: told.append(how_far))  # noqa: B023  # it is called in this turn
        known = [(done, most) for done, most in told if most]
        assert (told[-1] == (0, 0)) == (name == "rebuild"), name
        assert known[0][0] == 0, name
        assert known == sorted(known), name
        assert {most for _, most in known} == {known[0][1]}, name
        assert 0.5 < known[-1][0] / known[-1][1] <= 1, name


def test_tools_that_write_refuse_what_a_broker_has_open(busy: Broker, tmp_path: Path) -> None:
    with pytest.raises(BrokerLockedError):
        tools.rebuild_index(busy.path)
    with pytest.raises(BrokerLockedError):
        tools.salvage(busy.path, tmp_path / "out")
    assert os.listdir(tmp_path) == ["data"]


def test_verify_refuses_what_is_no_directory(tmp_path: Path) -> None:
    for nothing in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(StorageError, match="there is no log"):
            tools.verify(nothing)
    with pytest.raises(UsageError):
        tools.verify(3)  # type: ignore[arg-type]  # wrong, as a caller may be
    assert not (tmp_path / "nowhere").exists()
    assert not (tmp_path / "LOCK").exists()


def test_verify_looks_at_the_mark(closed: Path) -> None:
    mark = closed / "log" / "mark"
    whole = mark.read_bytes()
    for at in range(len(whole)):
        rot(mark, at)
        found = tools.verify(closed)
        assert found.mark is not None
        assert found.log is found.index is None
        mark.write_bytes(whole)
    mark.unlink()
    assert tools.verify(closed).mark is not None


@pytest.mark.root
def test_the_tools_read_what_cannot_be_written(
    closed: Path, tmp_path: Path, file_system: Callable[[str], Path]
) -> None:
    """A failing disk is mounted read-only first."""
    place = file_system("20m")
    shutil.copytree(closed, place / "data")
    (place / "data" / "LOCK").unlink()
    subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
    assert tools.verify(place / "data").is_whole
    assert list(tools.dump(place / "data"))
    assert tools.salvage(place / "data", tmp_path / "saved").is_whole
    assert tools.backup(place / "data", tmp_path / "copied").jobs == 91
    with pytest.raises(StorageError, match="Read-only"):
        tools.rebuild_index(place / "data")


@pytest.mark.parametrize("tool", ["verify", "rebuild_index", "dump", "salvage", "backup"])
def test_what_the_system_refuses_is_a_storage_error(closed: Path, tmp_path: Path, tool: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (closed / "log" / "0000000000000009.log").mkdir()
    for place in (tmp_path / "file", tmp_path / "loop", tmp_path / ("n" * 300), closed):
        out = (tmp_path / "out",) if tool in ("salvage", "backup") else ()
        with pytest.raises(StorageError):
            answer = getattr(tools, tool)(place, *out)
            list(answer)  # dump


# rebuild_index


def test_rebuild_index_says_if_there_is_none_in_the_end(closed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **items: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(rivetq.storage.index.Index, "write", full)
    with pytest.raises(StorageError, match="could not be written"):
        tools.rebuild_index(closed)


def test_rebuild_index_makes_an_index_that_says_what_the_log_says(killed: Path) -> None:
    before = state(killed)
    rot(killed / "index" / "data.mdb", 5000)
    assert tools.rebuild_index(killed) == 91
    assert tools.verify(killed).is_whole
    assert (killed / "index" / "manifest").exists()
    assert state(killed) == before, "leases stay as they are"


def test_rebuild_index_leaves_the_index_alone_if_the_log_is_damaged(closed: Path) -> None:
    path = segments(closed)[0]
    rot(path, records(path)[1].body_offset)
    before = contents(closed)
    with pytest.raises(CorruptLogError):
        tools.rebuild_index(closed)
    assert contents(closed) == before


# salvage


@pytest.mark.parametrize("which", ["closed", "killed"])
def test_salvage_of_a_healthy_log_is_all_of_it(which: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    directory: Path = request.getfixturevalue(which)
    before, was = contents(directory), state(directory)
    report = tools.salvage(directory, tmp_path / "out")
    assert report.is_whole, report
    assert contents(directory) == before
    assert state(tmp_path / "out") == was
    assert sum(count for states in report.jobs.values() for count in states.values()) == 91
    assert json.loads((tmp_path / "out" / "salvage.json").read_text())["records"] == report.records


def test_salvage_saves_what_is_before_and_behind_any_damaged_record(closed: Path, tmp_path: Path) -> None:
    """Each record in turn: the others are there, the job states are what they say, and a broker can work with it."""
    was = {job[0]: job for job in state(closed)["jobs"]}
    count = 0
    for path in segments(closed):
        for record in records(path):
            rot(path, record.body_offset + 3, 2)
            out = tmp_path / f"out {count}"
            report = tools.salvage(closed, out)
            assert report.missing == [(record.frame.lsn, record.frame.lsn)]
            (stretch,) = report.unreadable
            assert (stretch.file, stretch.start) == (str(path), record.at)
            assert record.at < stretch.end <= path.stat().st_size
            found = {job[0]: job for job in state(out)["jobs"]}
            lost = was.keys() - found.keys()
            assert len(lost) in (0, 1, 40, 49), "only the jobs of one enqueue"
            assert tools.verify(out).is_whole
            with Broker(out, segment_bytes=SEGMENT_BYTES) as broker:
                assert broker.enqueue("new", b"x") > max(was), "ids are not given twice"
            shutil.rmtree(out)
            rot(path, record.body_offset + 3, 2)
            count += 1
    assert count > 12


@pytest.mark.parametrize("what", ["header", "missing", "zeros", "cut"])
@pytest.mark.parametrize("which", [0, 1, 2, -1])
def test_salvage_goes_on_without_a_whole_segment(closed: Path, tmp_path: Path, what: str, which: int) -> None:
    path = segments(closed)[which]
    size = path.stat().st_size
    inside_header = records(path)[0].at
    expected = alive(closed, without=None if what == "header" else path)
    if what == "header":
        rot(path, 30, 4)
    elif what == "missing":
        path.unlink()
    elif what == "zeros":
        path.write_bytes(bytes(size))
    else:
        os.truncate(path, inside_header + 10)
    report = tools.salvage(closed, tmp_path / "out")
    assert not report.is_whole
    assert tools.verify(tmp_path / "out").is_whole
    found = state(tmp_path / "out")
    assert expected <= {job[0] for job in found["jobs"]}
    assert {queue[0] for queue in found["queues"]} <= {"mail", "bulk", "last"}


def test_salvage_puts_exchanged_files_in_order(closed: Path, tmp_path: Path) -> None:
    was = state(closed)
    one, other = segments(closed)[1:3]
    one.rename(tmp_path / "away")
    other.rename(one)
    (tmp_path / "away").rename(other)
    with pytest.raises(CorruptLogError):
        Broker(closed)
    tools.salvage(closed, tmp_path / "out")
    assert state(tmp_path / "out") == was


def test_salvage_leaves_a_file_of_another_log_out(closed: Path, tmp_path: Path) -> None:
    with Broker(tmp_path / "other") as broker:
        broker.enqueue("stranger", b"x")
    lost = segments(closed)[1]
    expected = alive(closed, without=lost)
    shutil.copy(segments(tmp_path / "other")[0], lost)
    report = tools.salvage(closed, tmp_path / "out")
    assert [stretch.what for stretch in report.unreadable] == ["this is a file of another log"]
    found = state(tmp_path / "out")
    assert expected <= {job[0] for job in found["jobs"]}
    assert "stranger" not in {queue[0] for queue in found["queues"]}


def test_salvage_takes_a_copy_of_a_segment_for_one(closed: Path, tmp_path: Path) -> None:
    expected = alive(closed, without=None)
    for original, lost in ((0, -1), (1, -1)):
        copy = Path(shutil.copytree(closed, tmp_path / f"damaged {original}"))
        shutil.copy(segments(copy)[original], segments(copy)[lost])
        report = tools.salvage(copy, tmp_path / f"out {original}")
        assert any("copy of segment" in stretch.what for stretch in report.unreadable)
        found = {job[0] for job in state(tmp_path / f"out {original}")["jobs"]}
        assert expected - found <= {102}, "only what was in the lost one"


def test_salvage_does_not_mix_up_queues_whose_names_it_makes_up(tmp_path: Path) -> None:
    with Broker(tmp_path / "data") as broker:
        for name in ("first", "salvaged queue 1", "first"):
            broker.enqueue(name, name.encode())
    (path,) = segments(tmp_path / "data")
    rot(path, records(path)[0].body_offset)
    shutil.rmtree(tmp_path / "data/index")
    report = tools.salvage(tmp_path / "data", tmp_path / "out")
    assert report.jobs == {"salvaged queue 1": {"ready": 1}, "salvaged queue 1'": {"ready": 1}}
    assert len(state(tmp_path / "out")["jobs"]) == 2


def test_salvage_asks_the_index_for_names_and_configurations_that_the_log_lost(tmp_path: Path) -> None:
    data = tmp_path / "data"
    with Broker(data) as broker:
        broker.enqueue("first", b"")
        broker.enqueue("first", b"left")
        broker.configure_queue("second", max_jobs=7)
        broker.configure_queue("second", visibility_timeout=9)
        broker.checkpoint()
        broker.configure_queue("third", max_jobs=3)
        broker.configure_queue("third", max_jobs=4)
    (path,) = segments(data)
    first, _, _, configured, _, third = (record.body_offset for record in records(path)[:6])
    for place in (first, configured, third):
        rot(path, place)
    tools.salvage(data, tmp_path / "out")
    with Broker(tmp_path / "out") as broker:
        assert [job.payload for job in broker.jobs("first")] == [b"left"]
        config = broker.configure_queue("second")
        assert (config.max_jobs, config.visibility_timeout) == (7, 9)
        assert broker.configure_queue("third").max_jobs == 4, "a clean close made the last checkpoint"


def test_salvage_of_many_queues_and_keys_goes_in_records_of_a_bounded_size(tmp_path: Path) -> None:
    with Broker(tmp_path / "data", fsync="never") as broker:
        for n in range(300):
            broker.enqueue_many(f"q{n}", [b""] * 3, idempotency_keys=[f"{n} {i}" for i in range(3)])
            broker.ack(broker.lease_many(f"q{n}", 1)[0])
    tools.salvage(tmp_path / "data", tmp_path / "out")
    assert max(len(record["events"]) for record in tools.dump(tmp_path / "out")) <= 256
    assert state(tmp_path / "out") == state(tmp_path / "data")


def test_salvage_leaves_out_a_dropped_segment_that_a_power_cut_brought_back(tmp_path: Path) -> None:
    with Broker(tmp_path / "data", segment_bytes=SEGMENT_BYTES) as broker:
        broker.enqueue_many("q", [b"x" * 500] * 60)
        broker.rotate()
        shutil.copy(segments(tmp_path / "data")[0], tmp_path / "first")
        broker.ack_many(broker.lease_many("q", 60))
        broker.rotate()
        broker.enqueue("q", b"last")
        broker.rotate()
        broker.compact()
    shutil.copy(tmp_path / "first", tmp_path / "data/log/0000000000000001.log")
    assert tools.verify(tmp_path / "data").is_whole
    report = tools.salvage(tmp_path / "data", tmp_path / "out")
    assert report.is_whole
    assert report.jobs == {"q": {"ready": 1}}


def test_salvage_believes_a_copied_job_more_than_what_it_knew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It died and was copied by a compaction; lease and death cannot be read, the copy can."""
    with Broker(tmp_path / "live", segment_bytes=SEGMENT_BYTES) as broker:
        bad = broker.enqueue("q", b"bad")
        broker.enqueue_many("q", [b"x" * 700] * 80)
        broker.rotate()
        for lease in broker.lease_many("q", 81):
            if lease.id == bad:
                broker.reject(lease, error="poison")
            else:
                broker.ack(lease)
        broker.rotate()
        monkeypatch.setattr(inside(broker)._log, "drop", lambda upto: None)  # killed before the files went
        broker.compact()
    for path in segments(tmp_path / "live"):
        for record in records(path):
            if isinstance(decode_record(record.body)[1][0], Leased | Buried):
                rot(path, record.body_offset)
    tools.salvage(tmp_path / "live", tmp_path / "out")
    with Broker(tmp_path / "out") as broker:
        job = broker.get(bad)
        assert job is not None
        assert (job.state, job.attempts, job.last_error) == ("dead", 1, "poison")


def test_salvage_takes_no_payload_for_the_log(tmp_path: Path) -> None:
    """Header and first record are lost; a payload holds a log of its own."""
    with Broker(tmp_path / "other") as broker:
        broker.enqueue("stranger", b"1")
        broker.enqueue("stranger", b"2")
    other = segments(tmp_path / "other")[0].read_bytes()
    for padding in range(8):
        with Broker(tmp_path / f"data {padding}") as broker:
            broker.enqueue("q", bytes(padding) + other)
            broker.enqueue("q", b"mine")
        (path,) = segments(tmp_path / f"data {padding}")
        rot(path, records(path)[0].body_offset)
        rot(path, 30)
        report = tools.salvage(tmp_path / f"data {padding}", tmp_path / f"out {padding}")
        assert sum(count for states in report.jobs.values() for count in states.values()) == 1
        assert "stranger" not in report.jobs


def alive(directory: Path, without: Path | None) -> set[int]:
    """Ids of the jobs that the records say are there; those of one segment left out."""
    born: set[int] = set()
    ended: set[int] = set()
    for path in segments(directory):
        for record in records(path) if path != without else ():
            for event in decode_record(record.body)[1]:
                match event:
                    case Enqueued():
                        born |= set(range(event.first_id, event.first_id + len(event.lengths)))
                    case Acked() | Purged():
                        ended |= set(event.ids)
                    case Cancelled():
                        ended.add(event.id)
    return born - ended


def test_salvage_gives_no_id_again_that_a_missing_record_may_have_told(tmp_path: Path) -> None:
    with Broker(tmp_path / "live") as broker:
        told = [broker.enqueue("q", b"x") for _ in range(20)]
        shutil.copytree(tmp_path / "live", tmp_path / "killed", ignore=shutil.ignore_patterns("spare-*", "LOCK"))
    (path,) = segments(tmp_path / "killed")
    for record in records(path)[3:]:
        rot(path, record.body_offset)
    assert not tools.salvage(tmp_path / "killed", tmp_path / "out").is_whole
    with Broker(tmp_path / "out") as broker:
        assert broker.enqueue("q", b"x") > max(told)


def test_salvage_takes_an_ack_for_one_though_the_lease_cannot_be_read(tmp_path: Path) -> None:
    with Broker(tmp_path / "data") as broker:
        acked, retried, buried = broker.enqueue_many("q", [b"a", b"b", b"c"], retry=NO_WAIT)
        first, second, third = broker.lease_many("q", 3)
        first.ack()
        second.nack(error="no", delay=0)
        third.reject(error="never")
    (path,) = segments(tmp_path / "data")
    (leased,) = [r for r in records(path) if isinstance(decode_record(r.body)[1][0], Leased)]
    rot(path, leased.body_offset)
    tools.salvage(tmp_path / "data", tmp_path / "out")
    with Broker(tmp_path / "out") as broker:
        assert broker.get(acked) is None
        jobs = {job.id: (job.state, job.attempts, job.last_error) for job in broker.jobs("q")}
    assert jobs == {retried: ("ready", 1, "no"), buried: ("dead", 1, "never")}


def test_salvage_reads_around_sectors_that_the_disk_does_not_give(
    closed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = max(segments(closed), key=lambda path: path.stat().st_size)
    honest = rivetq.storage.disk.SystemDisk.pread

    def bad_sector(disk: object, fd: int, size: int, offset: int) -> bytes:
        if os.readlink(f"/proc/self/fd/{fd}") == str(path) and offset <= 36_864 < offset + size:
            raise OSError(5, "Input/output error")
        return honest(disk, fd, size, offset)  # type: ignore[arg-type]  # the disk it stands in for

    monkeypatch.setattr(rivetq.storage.disk.SystemDisk, "pread", bad_sector)
    report = tools.salvage(closed, tmp_path / "out")
    assert any("does not give" in stretch.what and stretch.start == 36_864 for stretch in report.unreadable)
    monkeypatch.undo()
    assert tools.verify(tmp_path / "out").is_whole
    assert len(state(tmp_path / "out")["jobs"]) >= 50


def test_salvage_refuses_places_that_will_not_do(closed: Path, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="in the directory"):
        tools.salvage(closed, closed / "log" / "out")
    with pytest.raises(StorageError, match="there is no log"):
        tools.salvage(tmp_path / "nowhere", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# backup


def test_a_backup_of_a_running_broker_is_its_state(busy: Broker, tmp_path: Path) -> None:
    was = inside(busy).dump()
    found = busy.backup(tmp_path / "out")
    assert (found.jobs, found.segments) == (91, len(segments(tmp_path / "out")))
    assert found.linked == found.segments - 1
    assert tools.verify(tmp_path / "out").is_whole
    assert state(tmp_path / "out") == was
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o700
    busy.enqueue("q", b"not in it")
    assert state(tmp_path / "out") == was
    with Broker(tmp_path / "out", segment_bytes=SEGMENT_BYTES) as copy:
        copy.purge("bulk")
        copy.compact()
    assert busy.stats("bulk").ready == 40, "what happens to the copy happens to it alone"
    assert tools.verify(busy.backup(tmp_path / "another").path).is_whole


def test_a_backup_tells_the_moment_of_its_last_record(busy: Broker, tmp_path: Path) -> None:
    found = busy.backup(tmp_path / "out")
    with tools.look(tmp_path / "out") as copy:
        assert (copy.as_of, copy.record) == (found.as_of, found.records)


def test_a_backup_may_copy_all_bytes(busy: Broker, tmp_path: Path) -> None:
    assert busy.backup(tmp_path / "out", link=False).linked == 0
    assert {path.stat().st_nlink for path in segments(tmp_path / "out")} == {1}
    assert state(tmp_path / "out") == inside(busy).dump()


def test_where_nothing_can_be_linked_it_is_copied(
    busy: Broker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_link(old: str, new: str) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", no_link)
    assert busy.backup(tmp_path / "out").linked == 0
    assert state(tmp_path / "out") == inside(busy).dump()


def test_every_backup_amid_many_calls_and_compactions_is_one_past_state(tmp_path: Path) -> None:
    """By the broker, and by somebody else who only sees its files."""
    with Broker(tmp_path / "data", segment_bytes=SEGMENT_BYTES, fsync="never") as broker:
        over = threading.Event()

        def work() -> None:
            while not over.is_set():
                broker.enqueue_many("q", [b"x" * 900] * 10)
                broker.ack_many(broker.lease_many("q", 10))

        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        try:
            for n in range(12):
                least = broker.stats("q").enqueued
                out = tmp_path / f"out {n}"
                found = broker.backup(out) if n % 2 else tools.backup(broker.path, out)
                assert tools.verify(out).is_whole
                with Broker(out, segment_bytes=SEGMENT_BYTES) as copy:
                    inside(copy).audit()
                    stats = copy.stats("q")
                    if n % 2:  # stats also count what is still on its way to the file
                        assert stats.enqueued >= least
                    assert stats.enqueued % 10 == stats.acked % 10 == 0, "batches are whole"
                    assert found.jobs == stats.ready + stats.scheduled + stats.leased + stats.dead
        finally:
            over.set()
            for thread in threads:
                thread.join()
        assert inside(broker)._machine.oldest_segment > 1, "no segment was dropped meanwhile"


def test_a_backup_that_cannot_be_made_leaves_nothing(
    busy: Broker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").touch()
    (tmp_path / "half.partial").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for out, message in (
        ("there", "there is something"),
        ("half", "another call"),
        ("there/file/x", "cannot be"),
        ("data/out", "in the directory"),
        ("link", "there is something"),
    ):
        with pytest.raises(StorageError, match=message):
            busy.backup(tmp_path / out)
    path = segments(Path(busy.path))[0]
    offset = records(path)[1].body_offset
    rot(path, offset)
    with pytest.raises(CorruptLogError) as caught:
        busy.backup(tmp_path / "out")
    assert caught.value.file == str(path), "the original, not the copy"
    assert str(path) in str(caught.value)
    rot(path, offset)

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(rivetq.storage.backup, "write_file", full)
    with pytest.raises(StorageError, match="No space"):
        busy.backup(tmp_path / "out")
    monkeypatch.undo()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "half.partial", "link", "there"]
    with pytest.raises(UsageError):
        busy.backup(tmp_path / "out", link=1)  # type: ignore[arg-type]  # wrong, as a caller may be
    (tmp_path / "empty").mkdir()
    assert busy.backup(tmp_path / "empty").jobs == 91


def test_a_backup_whose_tail_lacks_a_synced_record_is_damage(closed: Path, tmp_path: Path) -> None:
    path = segments(closed)[-1]
    os.truncate(path, records(path)[-1].at)
    with pytest.raises(CorruptLogError):
        tools.backup(closed, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_backup_whose_tail_rots_is_not_taken_for_a_torn_one(busy: Broker, tmp_path: Path) -> None:
    """The copy has a mark of its own."""
    busy.backup(tmp_path / "out")
    path = segments(tmp_path / "out")[-1]
    rot(path, records(path)[-1].body_offset)
    with pytest.raises(CorruptLogError):
        Broker(tmp_path / "out")


def test_segments_that_always_go_are_an_error_in_the_end(
    busy: Broker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*args: object) -> bool:
        raise FileNotFoundError

    monkeypatch.setattr(rivetq.storage.backup, "_link", gone)
    with pytest.raises(StorageError, match="quicker"):
        busy.backup(tmp_path / "out")
    assert not (tmp_path / "out.partial").exists()


def test_a_queue_in_memory_has_no_backup(tmp_path: Path) -> None:
    with Broker(":memory:") as broker, pytest.raises(UsageError, match="no files"):
        broker.backup(tmp_path / "out")


def test_the_time_line_of_a_salvaged_log_is_that_of_its_source(
    closed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_room = Space.make_room

    def slow(*args: Any, **kwargs: Any) -> None:
        time.sleep(0.02)
        make_room(*args, **kwargs)

    monkeypatch.setattr(Space, "make_room", slow)
    tools.salvage(closed, tmp_path / "out")
    source, salvaged = (sorted((path / "log").glob("*.log")) for path in (closed, tmp_path / "out"))
    last, first = (decode_header(path.read_bytes(), path.name) for path in (source[-1], salvaged[0]))
    assert first.boot_id == last.boot_id
    assert first.now_ms - first.boot_ms == last.now_ms - last.boot_ms


# dump


def test_dump_tells_every_record_of_a_log_also_of_a_running_broker(busy: Broker) -> None:
    found = list(tools.dump(busy.path, payloads=True))
    assert [record["lsn"] for record in found] == list(range(1, len(found) + 1))
    events = [event for record in found for event in record["events"]]
    assert {"QueueCreated", "QueueConfigured", "Enqueued", "Leased", "Acked", "Retried", "Buried", "Cancelled"} <= {
        event["event"] for event in events
    }
    last = [event for event in events if event["event"] == "Enqueued"][-1]
    assert last["payloads"] == ["dGhlIGxhc3Qgb25l"]
    assert all("payloads" not in event for record in tools.dump(busy.path) for event in record["events"])
    assert json.loads(json.dumps(found)) == found


def test_dump_ends_with_the_damage(closed: Path) -> None:
    path = segments(closed)[1]
    rot(path, records(path)[0].body_offset)
    seen = []
    with pytest.raises(CorruptLogError) as caught:
        seen.extend(tools.dump(closed))
    assert caught.value.file == str(path)


# The commands


def run(*arguments: object) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-m", "rivetq", *map(str, arguments)], capture_output=True, text=True, timeout=60, check=False
    )
    return done.returncode, done.stdout, done.stderr


def test_the_commands_tell_by_their_exit_status(
    closed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def status(*arguments: object) -> int:
        return main([str(argument) for argument in arguments])

    assert status("verify", closed) == 0
    assert status("backup", closed, tmp_path / "copy", "--copy") == 0
    rot(closed / "index" / "data.mdb", 5000)
    assert status("verify", closed) == 3
    assert status("rebuild-index", closed) == 0
    assert status("verify", closed) == 0
    assert status("salvage", closed, tmp_path / "whole") == 0
    path = segments(closed)[1]
    offset = records(path)[0].at
    rot(path, offset + 40)
    capsys.readouterr()
    assert status("verify", closed) == 1
    out, err = capsys.readouterr()
    assert json.loads(out)["log"]["offset"] == offset
    assert str(path) in err
    assert status("rebuild-index", closed) == 1
    assert status("dump", closed) == 1
    assert status("backup", closed, tmp_path / "no") == 1
    assert status("salvage", closed, tmp_path / "saved") == 1
    assert status("verify", tmp_path / "saved") == 0
    assert status("salvage", closed, tmp_path / "saved") == 2
    assert status("verify", tmp_path / "nowhere") == 2


def test_the_commands_run_from_a_shell(closed: Path, tmp_path: Path) -> None:
    code, out, err = run("verify", closed)
    assert (code, err) == (0, "")
    assert json.loads(out)["jobs"] == 91
    code, out, _ = run("dump", closed)
    assert code == 0
    assert len([json.loads(line) for line in out.splitlines()]) == json.loads(run("verify", closed)[1])["records"]
    assert run("verify")[0] == 2
    assert run("nonsense", closed)[0] == 2
    with Broker(tmp_path / "open"):
        code, _, err = run("rebuild-index", tmp_path / "open")
        assert code == 2
        assert "another broker has it open" in err


def test_the_commands_end_in_words_not_in_a_traceback(
    closed: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for error, status in ((KeyboardInterrupt(), 130), (OSError(28, "No space left on device"), 2)):

        def fail(*args: object, error: BaseException = error, **options: object) -> None:
            raise error

        monkeypatch.setattr("rivetq.tools.commands.verify", fail)
        assert main(["verify", str(closed)]) == status
        assert capsys.readouterr().err.startswith("rivetq: ")


@pytest.mark.parametrize("gone", [False, True], ids=["a rotation", "and the files that were listed are gone"])
def test_a_dump_of_a_log_that_moves_is_no_damage(busy: Broker, monkeypatch: pytest.MonkeyPatch, gone: bool) -> None:
    """Just then: what the mark says afterwards is of files that were not listed yet."""
    honest = rivetq.storage.recovery.list_segments
    turns = iter([True])

    def rotated(disk: Any, directory: str) -> list[int]:
        found = honest(disk, directory)
        if next(turns, False):
            busy.rotate()
            busy.enqueue("last", b"more")
            return [number + 1000 * gone for number in found]
        return found

    monkeypatch.setattr(rivetq.storage.recovery, "list_segments", rotated)
    assert len(list(tools.dump(busy.path))) > 12


def test_a_reader_that_goes_away_ends_a_dump(closed: Path) -> None:
    child = subprocess.Popen(
        [sys.executable, "-m", "rivetq", "dump", "--payloads", str(closed)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert child.stdout is not None
    child.stdout.readline()
    child.stdout.close()
    assert child.stderr is not None
    assert child.stderr.read() == b""
    child.stderr.close()
    assert child.wait(60) == 0
