"""What the broker does by itself: names on disk, small segments swept up, one old job pins nothing."""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path

import pytest
from inside import inside, shrink_runs

import rivetq.engines.checkpoint
import rivetq.engines.local
from rivetq import Broker, CorruptLogError, RateLimit, tools
from rivetq.engine import Enqueue, Once
from rivetq.engines.compaction import MANY_SEGMENTS
from rivetq.engines.local import LocalEngine
from rivetq.machine import saving
from rivetq.machine.events import Cancelled, KeyCopied
from rivetq.machine.keys import Keys
from rivetq.storage.codec import encode_snapshot
from rivetq.storage.disk import SystemDisk
from rivetq.storage.recovery import queues_of
from rivetq.testing import ManualClock


def test_the_names_of_new_directories_are_on_disk_before_an_enqueue_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []

    class Recording(SystemDisk):
        def sync_directory(self, path: str) -> None:
            super().sync_directory(path)
            synced.append(os.path.relpath(path, tmp_path))

    monkeypatch.setattr(rivetq.engines.local, "SystemDisk", Recording)
    with Broker(tmp_path / "new" / "parent" / "data") as broker:
        broker.enqueue("q", b"job")
        # each holds the name of the next; the last one holds the segment's
        assert {".", "new", "new/parent", "new/parent/data", "new/parent/data/log"} <= set(synced)


def test_many_openings_do_not_leave_many_segments(tmp_path: Path) -> None:
    clock = ManualClock()
    for _ in range(3 * MANY_SEGMENTS):
        with Broker(tmp_path / "data", clock=clock, fsync="never") as broker:
            if not broker.stats().enqueued:
                broker.enqueue("q", b"old", delay=86_400)
            inside(broker)._keep(overdue=False)
    assert len(list((tmp_path / "data" / "log").glob("*.log"))) <= MANY_SEGMENTS + 2
    with Broker(tmp_path / "data", clock=clock) as broker:
        assert [job.payload for job in broker.jobs("q")] == [b"old"]
        inside(broker).audit()


def test_one_old_job_never_pins_the_log(tmp_path: Path) -> None:
    with Broker(tmp_path / "data", clock=ManualClock(), fsync="never", segment_bytes=65_536) as broker:
        broker.enqueue("q", b"old", delay=86_400)
        for _ in range(200):
            broker.enqueue("q", b"x" * 5_000)
            lease = broker.lease("q")
            assert lease is not None
            lease.ack()
            inside(broker)._keep(overdue=False)
        metrics = broker.metrics()
        assert metrics["log_bytes_written"] > 1_000_000
        assert metrics["log_bytes"] <= 2 * 65_536 + 2.5 * metrics["live_bytes"] + 10_000
        assert [job.payload for job in broker.jobs("q")] == [b"old"]


def test_a_loop_of_releases_and_extends_does_not_grow_the_log(tmp_path: Path) -> None:
    with Broker(tmp_path / "data", clock=ManualClock(), fsync="never", segment_bytes=65_536) as broker:
        broker.enqueue("q", b"x" * 1_000)
        for _ in range(3_000):
            lease = broker.lease("q")
            assert lease is not None
            lease.extend(60)
            lease.release()
        inside(broker)._keep(overdue=False)
        assert broker.metrics()["log_bytes_written"] > 400_000
        assert broker.metrics()["log_bytes"] <= 3 * 65_536


@pytest.mark.parametrize("ended", ["before its slice", "after its slice"])
def test_a_job_that_ends_while_a_checkpoint_is_taken_leaves_its_key(
    ended: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = ManualClock()
    with Broker(tmp_path / "data", clock=clock, fsync="never") as broker:
        job_id = broker.enqueue("q", b"job", idempotency_key="k")
        lease = broker.lease("q")
        assert lease is not None
        lease.release()  # a job that came back is taken by itself, not in a run
        engine = inside(broker)
        take_jobs = engine._take_jobs

        def end_meanwhile(ids: list[int]) -> object:
            items = take_jobs(ids) if ended == "after its slice" else None
            lease = broker.lease("q")
            assert lease is not None
            lease.ack()
            return items or take_jobs(ids)

        monkeypatch.setattr(engine, "_take_jobs", end_meanwhile)
        broker.checkpoint()
        monkeypatch.undo()
        shutil.copytree(tmp_path / "data", tmp_path / "killed", ignore=shutil.ignore_patterns("spare-*"))
    for _ in range(2):  # the second opening reads what the first one saved
        with Broker(tmp_path / "killed", clock=clock) as broker:
            assert broker.find("q", "k") == job_id
            assert broker.enqueue("q", b"again", idempotency_key="k") == job_id
            inside(broker).audit()
    clock.advance(86_400)
    with Broker(tmp_path / "killed", clock=clock) as broker:
        assert broker.find("q", "k") is None


def test_a_job_that_leaves_its_run_while_a_checkpoint_is_taken_is_in_the_index_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = ManualClock()
    with Broker(tmp_path / "data", clock=clock, fsync="never") as broker:
        engine = inside(broker)
        broker.enqueue_many("q", [b"job"] * 4)
        for lease in broker.lease_many("q", 4):
            lease.release()
        broker.checkpoint()  # four single jobs, and the index knows them
        engine._not_before_s = math.inf  # the keeper takes none of its own before the one below
        shrink_runs(monkeypatch, few_jobs=0)
        monkeypatch.setattr(rivetq.engines.checkpoint, "LOOSE_SHARE", 2**30)  # the next one packs them into a run
        broker.enqueue("q", b"another")
        lease = broker.lease("q")
        take_jobs = engine._take_jobs
        taken: list[rivetq.Lease] = []

        def lease_meanwhile(ids: list[int]) -> object:
            taken.extend(broker.lease_many("q", 4))
            return take_jobs(ids)

        monkeypatch.setattr(engine, "_take_jobs", lease_meanwhile)
        broker.checkpoint()
        monkeypatch.undo()
        assert len(taken) == 4
        state = engine.dump()
        shutil.copytree(tmp_path / "data", tmp_path / "killed", ignore=shutil.ignore_patterns("spare-*"))
    with Broker(tmp_path / "killed", clock=clock, release_on_open=False) as broker:
        inside(broker).audit()
        assert inside(broker).dump() == state


def test_a_checkpoint_that_failed_is_not_tried_again_at_every_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[int] = []

    def fail(*args: object, **items: object) -> None:
        tried.append(1)
        raise OSError(28, "No space left on device")

    with Broker(tmp_path / "data", clock=ManualClock(), fsync="never", segment_bytes=65_536) as broker:
        monkeypatch.setattr(inside(broker)._index, "write", fail)
        for _ in range(50):
            broker.enqueue("q", b"x" * 5_000)
            inside(broker)._keep(overdue=False)
        assert 1 <= len(tried) <= 2  # by this round, or by the keeper's own at the same time
        monkeypatch.undo()
        broker.checkpoint()  # on demand it is tried at once
        assert broker.metrics()["checkpoints"] == 1


@pytest.mark.parametrize("where", ["snapshot", "_take_run", "_take_jobs", "written"])
def test_an_interrupted_checkpoint_forgets_no_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """The next one writes all that this one had taken."""

    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    with Broker(tmp_path / "live", clock=ManualClock(), window_jobs=1024) as broker:
        broker.enqueue_many("q", [b"x"] * 1000)
        loose = broker.enqueue("q", b"loose", priority=9, idempotency_key="k")
        broker.lease("q")
        owner = {"snapshot": saving, "written": Keys}.get(where, LocalEngine)
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(owner, where, interrupt)
            broker.checkpoint()
        broker.checkpoint()
        state = inside(broker).dump()
        shutil.copytree(tmp_path / "live", tmp_path / "copy")
    with Broker(tmp_path / "copy", clock=broker.clock, release_on_open=False) as broker:
        inside(broker).audit()
        assert inside(broker).dump() == state
        assert broker.find("q", "k") == loose


def rot_a_run(path: Path) -> None:
    """A byte in the columns of a run in the index, while a broker has it open."""
    data = (path / "index/data.mdb").read_bytes()
    at = data.find((11).to_bytes(4, "little") + b"damage-2-77")
    assert at > 0
    with (path / "index/data.mdb").open("r+b") as file:
        file.seek(at + 5)
        file.write(b"?")


def enqueue_some_runs(broker: Broker) -> None:
    for i in range(8):
        broker.enqueue_many("q", [b"x"] * 1024, idempotency_keys=[f"damage-{i}-{j}" for j in range(1024)])
    broker.checkpoint()


def test_damage_in_the_index_that_a_call_meets_costs_a_rebuild_and_no_job(tmp_path: Path) -> None:
    clock, path = ManualClock(), tmp_path / "data"
    with Broker(path, clock=clock, fsync="never", cache_bytes=0) as broker:
        enqueue_some_runs(broker)
        rot_a_run(path)
        broker.enqueue("q", b"more")
        broker.checkpoint()  # the manifest vouches for the damage now
        for _ in range(2):
            with pytest.raises(rivetq.StorageError, match="open the directory again"):
                broker.cancel(2048 + 70)
        broker.enqueue("q", b"still at work")
    with Broker(path, clock=clock) as broker:
        inside(broker).audit()
        assert broker.cancel(2048 + 70)
        assert broker.stats("q").ready == 8 * 1024 + 1


@pytest.mark.parametrize("due", [False, True], ids=["a record needs it", "the clock needs it"])
def test_damage_in_the_index_that_an_opening_meets_costs_a_rebuild_and_no_job(
    due: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    clock, path = ManualClock(), tmp_path / "data"
    with Broker(path, clock=clock, fsync="never") as broker:
        for i in range(16):  # their payloads are cached, so that this broker does not read them back
            keys = [f"damage-{i // 2}-{j}" for j in (range(512) if i % 2 == 0 else range(512, 1024))]
            broker.enqueue_many("q", [b"x"] * 512, idempotency_keys=keys, delay=60 + i if due else 0)
        broker.checkpoint()
        rot_a_run(path)
        broker.enqueue("q", b"more")
        broker.checkpoint()
        if not due:
            broker.purge("q")
        shutil.copytree(path, tmp_path / "killed", ignore=shutil.ignore_patterns("spare-*"))
    clock.advance(60 + 4)  # a part of the damaged run is due
    with Broker(tmp_path / "killed", clock=clock) as broker:
        inside(broker).audit()
        stats = broker.stats("q")
        assert (stats.purged, stats.ready + stats.scheduled) == ((0, 8 * 1024 + 1) if due else (8 * 1024 + 1, 0))
        assert "rebuilding it" in caplog.text


# Queues in the log


def many_queues(broker: Broker, count: int) -> None:
    for n in range(count):
        broker.configure_queue(f"q{n}", max_jobs=n + 5, idempotency_ttl=100 + n)
        broker.enqueue_many(f"q{n}", [b"done", b"cancelled"], idempotency_keys=[f"k{n}", None])
        if n % 7 == 0:
            broker.pause(f"q{n}")
        else:
            broker.ack(broker.lease_many(f"q{n}", 1)[0])
        broker.cancel(broker.jobs(f"q{n}")[-1].id)


@pytest.mark.parametrize("count", [3, 300])
def test_queues_are_copied_before_the_segments_that_tell_of_them_go(tmp_path: Path, count: int) -> None:
    data = tmp_path / "data"
    with Broker(data, clock=ManualClock(), fsync="never", segment_bytes=65_536) as broker:
        many_queues(broker, count)
        for turn in range(3):
            broker.enqueue_many("garbage", [b"x" * 1000] * 100)
            broker.rotate()
            broker.enqueue("q1", b"between", idempotency_key=f"again {turn}")
            (lease,) = broker.lease_many("q1", 1)
            lease.ack()
            broker.purge("garbage")
            broker.compact()
        engine = inside(broker)
        engine.audit()
        assert min(queue.segment for queue in engine._machine.numbers.values()) >= min(engine._log.sizes) > 1
        before = engine.dump()
    for index in ("there", "gone"):
        if index == "gone":
            shutil.rmtree(data / "index")
        with Broker(data, clock=ManualClock()) as broker:
            inside(broker).audit()
            assert inside(broker).dump() == before
            assert broker.configure_queue("q2").max_jobs == 7


def test_what_happened_in_a_queue_before_its_copy_is_replayed(tmp_path: Path) -> None:
    """Enqueues, leases, acks with keys and redrives stand in the log before the record that tells the queue's name."""
    data = tmp_path / "data"
    with Broker(data, clock=ManualClock(), fsync="never", segment_bytes=65_536) as broker:
        broker.configure_queue("q", idempotency_ttl=50, rate_limit=RateLimit(1000, 1000))
        broker.enqueue_many("garbage", [b"x" * 1000] * 40)
        broker.rotate()
        broker.enqueue_many("q", [b"a", b"b", b"c", b"d"], idempotency_keys=["a", "b", "c", "d"])
        a, b, c = broker.lease_many("q", 3)
        a.ack()
        b.reject()
        broker.redrive("q")
        c.release(delay=5)
        broker.cancel(d := broker.jobs("q")[-1].id)
        broker.configure_queue("q", idempotency_ttl=7)
        assert d == 44
        broker.purge("garbage")
        engine = inside(broker)
        engine._compact(1)
        assert min(engine._log.sizes) == 2
        before = engine.dump()
        assert [key[3] for key in before["keys"] if key[3]] == [engine._machine.now_ms + 50_000]
    shutil.rmtree(data / "index")
    with Broker(data, clock=ManualClock()) as broker:
        inside(broker).audit()
        assert inside(broker).dump() == before


def test_a_log_whose_queue_was_never_copied_is_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tmp_path / "data"
    monkeypatch.setattr(LocalEngine, "_copy_queues", lambda self, upto: None)
    with Broker(data, clock=ManualClock(), fsync="never") as broker:
        broker.enqueue("q", b"x")
        broker.rotate()
        broker.enqueue("q", b"y")
        broker.purge("q")
        inside(broker)._compact(1)
    shutil.rmtree(data / "index")
    with pytest.raises(CorruptLogError, match="the log has jobs of queue 1, but not its name"):
        Broker(data, clock=ManualClock())


def test_copies_of_queues_do_not_call_for_more_of_them(tmp_path: Path) -> None:
    """With many queues and small segments the copies fill whole segments: these are no garbage."""
    with Broker(tmp_path / "data", clock=ManualClock(), fsync="never", segment_bytes=65_536) as broker:
        many_queues(broker, 1000)
        engine = inside(broker)
        for _ in range(5):
            broker.enqueue_many("garbage", [b"x" * 1000] * 300)
            broker.purge("garbage")
            for _ in range(3):
                engine._keep(overdue=False)
        metrics = broker.metrics()
        assert metrics["log_bytes"] <= 2 * metrics["live_bytes"] + 3 * 65_536
        written = metrics["log_bytes_written"]
        for _ in range(20):
            engine._keep(overdue=False)
        assert broker.metrics()["log_bytes_written"] == written


def test_a_queue_that_was_removed_leaves_the_index(tmp_path: Path) -> None:
    data = tmp_path / "data"
    with Broker(data, clock=ManualClock()) as broker:
        broker.cancel(broker.enqueue("gone", b""))
        broker.enqueue("kept", b"")
        broker.checkpoint()
        broker.remove_queue("gone")
        broker.checkpoint()
    with Broker(data, clock=ManualClock()) as broker:
        assert broker.queues() == ["kept"]


def test_what_changed_in_a_queue_while_a_checkpoint_failed_is_in_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "data"
    with Broker(data, clock=ManualClock()) as broker:
        broker.enqueue_many("q", [b"", b""])
        broker.checkpoint()
        broker.cancel(1)
        engine = inside(broker)
        with monkeypatch.context() as failing:
            failing.setattr(engine, "_write_index", lambda *args, **kwargs: False)
            broker.checkpoint()
        broker.checkpoint()
        crashed = shutil.copytree(data, tmp_path / "crashed", ignore=shutil.ignore_patterns("spare-*"))
    with Broker(crashed, clock=ManualClock()) as broker:
        assert (broker.stats("q").enqueued, broker.stats("q").cancelled) == (2, 1)


def test_a_segment_and_a_checkpoint_say_no_more_with_many_queues(tmp_path: Path) -> None:
    """What is not changed is not written again."""
    sizes = []
    for count in (5, 500):
        with Broker(tmp_path / str(count), clock=ManualClock(), fsync="never") as broker:
            for n in range(count):
                broker.configure_queue(f"q{n}", max_jobs=n + 1)
            broker.checkpoint()
            broker.enqueue("q1", b"")
            engine = inside(broker)
            changes = engine._machine.changes
            assert changes is not None
            assert len(changes.queues) == 1
            broker.rotate()
            with engine._lock:
                sizes.append(len(encode_snapshot(saving.snapshot(engine._machine))))
    assert max(sizes) - min(sizes) < 20


def test_a_job_that_left_from_the_middle_of_a_run_is_not_in_the_index(tmp_path: Path) -> None:
    data = tmp_path / "data"
    with Broker(data, clock=ManualClock()) as broker:
        ids = [*broker.enqueue_many("q", [b"x"] * 20), *broker.enqueue_many("q", [b"x"] * 20, delay=60)]
        gone = ids[1:40:7]
        for job_id in gone:
            assert broker.cancel(job_id)
        broker.checkpoint()
        crashed = shutil.copytree(data, tmp_path / "crashed", ignore=shutil.ignore_patterns("spare-*"))
    with Broker(crashed, clock=ManualClock()) as broker:
        inside(broker).audit()
        assert [job.id for job in broker.jobs("q")] == [job_id for job_id in ids if job_id not in gone]


def test_a_job_that_leaves_its_run_just_before_a_checkpoint_takes_it_is_in_the_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was single when the checkpoint before wrote it, was packed into a run for this one, and is leased again."""
    data = tmp_path / "data"
    with Broker(data, clock=ManualClock(), window_jobs=1024) as broker:

        def more_single_jobs() -> None:
            broker.enqueue_many("q", [b"x"] * 100)
            for lease in broker.lease_many("q", 1000):
                lease.release()

        engine = inside(broker)
        monkeypatch.setattr(engine, "_is_due", lambda: False)  # none but those below
        more_single_jobs()
        broker.checkpoint()
        more_single_jobs()
        tidy = engine._tidy

        def tidy_and_lease() -> None:
            tidy()
            changes = engine._machine.changes
            assert changes is not None
            packed = set(changes.packed)
            assert packed & {lease.id for lease in broker.lease_many("q", 100)}
            assert packed - changes.packed

        monkeypatch.setattr(engine, "_tidy", tidy_and_lease)
        broker.checkpoint()
        monkeypatch.undo()
        engine.audit()
        crashed = shutil.copytree(data, tmp_path / "crashed", ignore=shutil.ignore_patterns("spare-*"))
    with Broker(crashed, clock=ManualClock()) as broker:
        inside(broker).audit()
        assert [job.id for job in broker.jobs("q", limit=1000)] == list(range(1, 201))


def test_a_key_that_is_over_is_not_copied_behind_the_removal_of_its_queue(tmp_path: Path) -> None:
    data, clock = tmp_path / "data", ManualClock()
    with Broker(data, clock=clock) as broker:
        broker.enqueue("gone", b"x", idempotency_key="k")
        broker.ack(broker.lease_many("gone", 1)[0])
        broker.enqueue("other", b"y")
        broker.checkpoint()
        clock.advance(86_410)
        broker.remove_queue("gone")
        broker.rotate()
        inside(broker)._compact(1)
        assert min(inside(broker)._log.sizes) > 1
    shutil.rmtree(data / "index")
    with Broker(data, clock=clock) as broker:
        assert broker.queues() == ["other"]
        inside(broker).audit()


def test_long_answers_in_the_headers_do_not_call_for_compactions(tmp_path: Path) -> None:
    with Broker(tmp_path / "data", clock=ManualClock(), fsync="never", segment_bytes=65_536) as broker:
        broker.enqueue_many("live", [b"x" * 100] * 1000)
        for session in (1, 2):
            for number in range(1, 1001):
                broker.commit([Enqueue("q", [b""])], once=Once(session, number))
        broker.purge("q")
        engine = inside(broker)
        with engine._lock:
            assert len(encode_snapshot(saving.snapshot(engine._machine))) > 40_000
        for _ in range(30):
            engine._keep(overdue=False)
        written = broker.metrics()["log_bytes_written"]
        for _ in range(10):
            engine._keep(overdue=False)
        assert broker.metrics()["log_bytes_written"] == written


def test_keys_that_are_over_are_not_copied(tmp_path: Path) -> None:
    data, clock = tmp_path / "data", ManualClock()
    with Broker(data, clock=clock) as broker:
        broker.enqueue_many("q", [b"x"] * 3, idempotency_keys=["a", "b", None])
        broker.ack_many(broker.lease_many("q", 2))
        broker.checkpoint()
        broker.rotate()
        clock.advance(86_410)
        inside(broker)._compact(1)
    kinds = [event["event"] for record in tools.dump(data) for event in record["events"]]
    assert "Copied" in kinds
    assert "KeyCopied" not in kinds


def test_a_key_whose_queue_is_gone_is_replayed_without_it() -> None:
    assert list(queues_of(KeyCopied(7, "k", 1, 2))) == []
    assert list(queues_of(Cancelled(7, 1))) == [7]
