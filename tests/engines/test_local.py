"""What a directory keeps: over a close, over a crash, without its index, through rotation and compaction."""

from __future__ import annotations

import logging
import math
import shutil
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import lmdb
import pytest
from inside import inside, waiting_of

import rivetq.engines.checkpoint
import rivetq.engines.local
from rivetq import Broker, LeaseLostError, LeaseRef, QueueFullError, RateLimit, RetryPolicy, UsageError
from rivetq.engine import Commit, Enqueue, Reserve
from rivetq.engines.local import LocalEngine
from rivetq.machine import decide
from rivetq.machine.columns import RUN_JOBS
from rivetq.machine.queue import LEASED, READY
from rivetq.storage import index_values as values
from rivetq.storage.index import Index
from rivetq.storage.space import Space
from rivetq.testing import ManualClock
from rivetq.testing.disk import SimulatedDisk

SMALL = 65_536
AT_ONCE = RetryPolicy(base=0, jitter="none")
SLOW = RetryPolicy(max_attempts=3, base=60, factor=1, jitter="none")
AGAIN = pytest.mark.parametrize("again", ["closed", "crashed", "crashed, without the index"])


def dump(broker: Broker) -> dict[str, Any]:
    found: dict[str, Any] = inside(broker).dump()
    return found


def check(broker: Broker) -> None:
    inside(broker).audit()


def crash(broker: Broker) -> Path:
    """What the disk would hold if the process died now: a copy, made while the housekeeping stands still."""
    engine: Any = broker._engine
    path = Path(broker.path)
    copy = path.with_name(path.name + "'")
    with engine._keeper_lock, engine._log.space._lock:
        shutil.copytree(path, copy)
    return copy


def come_back(broker: Broker, again: str) -> Path:
    """End the broker one way or another; where to open what is left."""
    path = Path(broker.path)
    if again == "closed":
        broker.close()
        return path
    left = crash(broker)
    broker.close()
    if again.endswith("index"):
        shutil.rmtree(left / "index", ignore_errors=True)
    return left


# -- What survives


@AGAIN
@pytest.mark.parametrize("fsync", ["always", "never"])
@pytest.mark.parametrize("checkpointed", [True, False], ids=["checkpoint", "no checkpoint"])
def test_all_of_a_queue_survives(tmp_path: Path, again: str, fsync: Any, checkpointed: bool) -> None:
    clock = ManualClock()
    broker = Broker(tmp_path / "q", clock=clock, segment_bytes=SMALL, fsync=fsync)
    config = broker.configure_queue(
        "q",
        retry=RetryPolicy(max_attempts=7, base=3, factor=1.5, max_delay=100, jitter="equal"),
        rate_limit=RateLimit(1000, 500, on="enqueue"),
        visibility_timeout=77,
        max_jobs=400,
        idempotency_ttl=3600,
    )
    broker.pause("paused")
    acked = broker.enqueue("q", b"acked", idempotency_key="of the acked")
    lease = broker.lease("q")
    assert lease is not None
    if checkpointed:
        broker.checkpoint()
    lease.ack()
    dead = broker.enqueue("q", {"n": 1}, headers={"a": "b"}, priority=9, idempotency_key="of the dead")
    lease = broker.lease("q")
    assert lease is not None
    lease.reject(error="no good")
    scheduled = broker.enqueue("q", b"later", delay=100)
    ready = broker.enqueue("q", b"ready", idempotency_key="of the ready", max_attempts=2)
    cancelled = broker.enqueue("q", b"cancelled")
    assert broker.cancel(cancelled)
    broker.enqueue_many("purged", [b"x"] * 3)
    assert broker.purge("purged") == 3
    state = dump(broker)

    with Broker(come_back(broker, again), clock=clock, segment_bytes=SMALL) as broker:
        assert dump(broker) == state
        check(broker)
        assert broker.configure_queue("q") == config
        broker.enqueue("paused", b"x")
        assert broker.lease("paused") is None
        stats = broker.stats("q")
        assert (stats.ready, stats.scheduled, stats.leased, stats.dead) == (1, 1, 0, 1)
        assert (stats.enqueued, stats.acked, stats.cancelled, stats.purged) == (5, 1, 1, 0)
        assert broker.stats("purged").purged == 3
        letters = broker.dead_letters("q")
        assert [(job.id, job.json(), job.last_error, dict(job.headers)) for job in letters] == [
            (dead, {"n": 1}, "no good", {"a": "b"})
        ]
        assert letters[0].died_at is not None
        keys = ("of the acked", "of the dead", "of the ready")
        assert [broker.find("q", key) for key in keys] == [acked, dead, ready]
        assert broker.enqueue("q", b"again", idempotency_key="of the acked") == acked
        clock.advance(99)
        assert broker.stats("q").scheduled == 1
        clock.advance(1)
        assert [lease.id for lease in broker.lease_many("q", 5)] == [scheduled, ready]
        clock.advance(3600 - 100)  # the window began with the ack
        assert broker.find("q", "of the acked") is None
        assert broker.enqueue("q", b"new", idempotency_key="of the acked") > cancelled


@AGAIN
def test_a_delay_goes_on_where_it_was(tmp_path: Path, again: str) -> None:
    clock = ManualClock()
    broker = Broker(tmp_path / "q", clock=clock)
    job_id = broker.enqueue("q", b"x", delay=100)
    clock.advance(40)
    broker.checkpoint()
    with Broker(come_back(broker, again), clock=clock) as broker:
        clock.advance(59)
        assert broker.lease("q") is None
        clock.advance(1)
        lease = broker.lease("q")
        assert lease is not None
        assert lease.id == job_id


@AGAIN
def test_ids_and_tokens_go_on_above_the_former_ones(tmp_path: Path, again: str) -> None:
    broker = Broker(tmp_path / "q")
    ids, tokens = [], []
    for life in range(4):
        ids += [broker.enqueue("q", b"x", retry=AT_ONCE), *broker.enqueue_many("q", [b"x"] * 2)]
        lease = broker.lease("q")
        assert lease is not None
        tokens.append(lease.token)
        lease.release()
        path = come_back(broker, again)
        if life < 3:
            broker = Broker(path)
    assert ids == sorted(set(ids))
    assert tokens == sorted(set(tokens))


def test_a_lease_that_a_power_cut_took_back_is_not_taken_for_a_later_one(tmp_path: Path) -> None:
    with Broker(tmp_path / "q") as broker:
        broker.enqueue("q", b"x")
        left = crash(broker)  # the record of a lease is not synced: the disk may not have it
        lost = broker.lease("q")
        assert lost is not None
    with Broker(left) as broker:
        lease = broker.lease("q")
        assert lease is not None
        assert (lease.id, lease.attempt) == (lost.id, lost.attempt)
        assert lease.token > lost.token
        with pytest.raises(LeaseLostError):
            broker.ack(LeaseRef(lost.id, lost.token))
        broker.ack(lease)


@pytest.mark.parametrize("fsync", ["always", "interval", "never"])
@AGAIN
def test_ids_that_a_rolled_back_transaction_told_are_not_used_again(tmp_path: Path, again: str, fsync: Any) -> None:
    broker = Broker(tmp_path / "q", fsync=fsync)
    broker.enqueue("q", b"x")
    told: list[int] = []
    with pytest.raises(ZeroDivisionError), broker.transaction() as tx:
        told += [tx.enqueue("q", b"never"), *tx.enqueue_many("q", [b"never"] * 5)]
        raise ZeroDivisionError
    with Broker(come_back(broker, again), fsync=fsync) as broker:
        assert broker.enqueue("q", b"y") > max(told)
        assert all(broker.get(job_id) is None for job_id in told)


@pytest.mark.parametrize("verb", ["ack", "cancel", "purge"])
def test_a_key_whose_job_ends_during_a_checkpoint_survives_a_crash_behind_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    with Broker(tmp_path / "q") as broker:
        engine: Any = broker._engine
        job_id = broker.enqueue("q", b"x", idempotency_key="key")
        lease = broker.lease("q") if verb == "ack" else None
        take = engine._take_jobs

        def take_behind_the_end(ids: list[int]) -> Any:
            if lease is not None:
                lease.ack()
            elif verb == "cancel":
                broker.cancel(job_id)
            else:
                broker.purge("q")
            return take(ids)

        monkeypatch.setattr(engine, "_take_jobs", take_behind_the_end)
        broker.checkpoint()
        monkeypatch.undo()
        state = dump(broker)
        with Broker(crash(broker)) as copy:
            assert copy.find("q", "key") == job_id
            assert copy.enqueue("q", b"x", idempotency_key="key") == job_id
            assert dump(copy) == state
            check(copy)


# -- Leases of the former owner


@AGAIN
def test_leases_of_the_former_owner_end_at_open(tmp_path: Path, again: str) -> None:
    clock = ManualClock()
    broker = Broker(tmp_path / "q", clock=clock)
    first = broker.enqueue("q", b"first", retry=SLOW)
    lease = broker.lease("q", visibility_timeout=600)
    assert lease is not None
    for attempt in (1, 2, 3):
        assert (lease.id, lease.attempt) == (first, attempt)
        broker = Broker(come_back(broker, again), clock=clock)
        job = broker.get(first)
        assert job is not None
        assert (job.attempts, job.last_error) == (attempt, "owner gone")
        if attempt == 1:  # at once: it may not have been its fault
            assert job.state == "ready"
        elif attempt == 2:  # a poison job must not take its neighbours along again and again
            assert job.state == "scheduled"
            assert job.due_at == clock.now() + timedelta(seconds=60)
            clock.advance(60)
        else:
            assert job.state == "dead"
            assert job.died_at == clock.now()
            break
        again_leased = broker.lease("q", visibility_timeout=600)
        assert again_leased is not None
        assert again_leased.token > lease.token
        lease = again_leased
    broker.close()


@AGAIN
def test_with_release_on_open_false_leases_keep_their_deadlines(tmp_path: Path, again: str) -> None:
    clock = ManualClock()
    broker = Broker(tmp_path / "q", clock=clock)
    broker.enqueue("q", b"x", retry=AT_ONCE)
    lease = broker.lease("q", visibility_timeout=600)
    assert lease is not None
    clock.advance(100)
    with Broker(come_back(broker, again), clock=clock, release_on_open=False) as broker:
        assert broker.lease("q") is None
        clock.advance(499)
        assert broker.stats("q").leased == 1
        broker.extend(lease, 10)  # its token still counts
        clock.advance(9)
        assert broker.stats("q").leased == 1
        clock.advance(1)
        job = broker.get(lease.id)
        assert job is not None
        assert (job.state, job.last_error) == ("ready", "lease expired")
        again_leased = broker.lease("q")
        assert again_leased is not None
        assert again_leased.attempt == 2
        broker.ack(again_leased)


# -- The index


@pytest.mark.parametrize("damage", ["removed", "no manifest", "garbage", "cut", "a file in its place", "empty"])
def test_without_a_usable_index_the_log_gives_the_same_state(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "q"
    clock = ManualClock()
    with Broker(path, segment_bytes=SMALL, clock=clock) as broker:
        for n in range(300):
            broker.enqueue("q", bytes(500), idempotency_key=f"k{n}", delay=n % 2 * 100)
        broker.ack_many(broker.lease_many("q", 50))
        for lease in broker.lease_many("q", 50):
            lease.reject(error="bad")
        state = dump(broker)
    index, data = path / "index", path / "index" / "data.mdb"
    match damage:
        case "removed":
            shutil.rmtree(index)
        case "no manifest":
            (index / "manifest").unlink()
        case "garbage":
            data.write_bytes(b"garbage" * 1000)
        case "cut":
            data.write_bytes(data.read_bytes()[:-4096])
        case "empty":
            shutil.rmtree(index)
            index.mkdir()
        case _:
            shutil.rmtree(index)
            index.write_bytes(b"")
    with caplog.at_level(logging.INFO, "rivetq"), Broker(path, segment_bytes=SMALL, clock=clock) as broker:
        assert dump(broker) == state
        check(broker)
    lines = [record.getMessage() for record in caplog.records if "rebuilding" in record.getMessage()]
    assert "no usable index" in lines[0]
    assert any("segment 2 of " in line and " jobs" in line for line in lines[1:]), lines
    caplog.clear()
    with caplog.at_level(logging.INFO, "rivetq"), Broker(path, segment_bytes=SMALL, clock=clock) as broker:
        assert dump(broker) == state
    assert not caplog.records, "the index was not written again"


@pytest.mark.parametrize("error", [lmdb.Error("broken"), lmdb.MapFullError("full"), OSError(28, "no space")])
def test_an_error_of_the_index_in_a_checkpoint_leaves_it_as_it_was_and_the_broker_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    path = tmp_path / "q"
    clock = ManualClock()
    with Broker(path, clock=clock) as broker:
        keys = [f"k{n}" for n in range(20)]
        broker.enqueue_many("q", [b"x"] * 20, idempotency_keys=keys)
        broker.ack_many(broker.lease_many("q", 5))
        broker.checkpoint()
        broker.enqueue("q", b"y")

        def fail(*args: object, **items: object) -> None:
            raise error

        saved = (path / "index" / "data.mdb").read_bytes()
        monkeypatch.setattr(Index, "write", fail)
        broker.checkpoint()
        assert "could not be written, it is tried again" in caplog.text
        assert (path / "index" / "data.mdb").read_bytes() == saved
        broker.enqueue("q", b"z")
        monkeypatch.undo()
        state = dump(broker)
        with Broker(crash(broker), clock=clock) as copy:
            assert dump(copy) == state
        broker.checkpoint()  # what that one was to write
    caplog.clear()
    with caplog.at_level(logging.INFO, "rivetq"), Broker(path, clock=clock) as broker:
        assert dump(broker) == state
        check(broker)
    assert not caplog.records


def reopened_and_drained(broker: Broker, clock: ManualClock) -> list[int]:
    """The jobs that a crash right now leaves to be leased."""
    with Broker(crash(broker), clock=clock) as copy:
        check(copy)
        assert dump(copy) == dump(broker)
        return [lease.id for lease in copy.lease_many("q", 5000)]


def fail_a_checkpoint(broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **items: object) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(Index, "write", fail)
        broker.checkpoint()


def test_after_a_checkpoint_that_failed_the_next_one_takes_acked_jobs_of_saved_runs_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = ManualClock()
    with Broker(tmp_path / "q", clock=clock) as broker:
        broker.enqueue_many("q", [b"x"] * 3000)
        broker.checkpoint()  # the index has them, in runs
        broker.ack_many(broker.lease_many("q", 3000))
        left = broker.enqueue("q", b"y")
        fail_a_checkpoint(broker, monkeypatch)
        broker.checkpoint()
        assert reopened_and_drained(broker, clock) == [left]


def test_after_a_checkpoint_that_failed_the_next_one_takes_acked_single_jobs_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The index knows them one by one; the checkpoint that fails puts them into a run."""
    clock = ManualClock()
    with Broker(tmp_path / "q", clock=clock) as broker:
        broker.enqueue_many("q", [b"x"] * 200)
        for lease in broker.lease_many("q", 200):
            lease.release()
        broker.checkpoint()
        inside(broker)._not_before_s = math.inf  # none by itself
        monkeypatch.setattr(rivetq.engines.checkpoint, "LOOSE_SHARE", 2**30)
        left = broker.enqueue("q", b"y")
        fail_a_checkpoint(broker, monkeypatch)
        assert len(inside(broker)._machine.jobs) < 200  # those at the head stay single
        broker.ack_many(broker.lease_many("q", 200))
        broker.checkpoint()
        assert reopened_and_drained(broker, clock) == [left]


def test_jobs_that_come_while_a_checkpoint_writes_their_run_are_in_it_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Index.write
    clock = ManualClock()
    with Broker(tmp_path / "q", clock=clock) as broker:
        ids = list(broker.enqueue_many("q", [b"x"] * 100))

        def write_behind_more(*args: Any, **items: Any) -> None:
            ids.extend(broker.enqueue_many("q", [b"y"] * 100))  # into the same run, which is still open
            write(*args, **items)

        with monkeypatch.context() as patched:
            patched.setattr(Index, "write", write_behind_more)
            broker.checkpoint()
        assert reopened_and_drained(broker, clock) == ids


def test_a_run_that_is_used_up_while_a_checkpoint_fails_is_gone_with_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = ManualClock()
    with Broker(tmp_path / "q", clock=clock) as broker:
        broker.enqueue_many("q", [b"x"] * 100)
        broker.checkpoint()
        broker.enqueue_many("q", [b"x"] * 10)  # it has changed since

        def fail(*args: object, **items: object) -> None:
            broker.ack_many(broker.lease_many("q", 110))
            raise OSError(5, "Input/output error")

        with monkeypatch.context() as patched:
            patched.setattr(Index, "write", fail)
            broker.checkpoint()
        left = broker.enqueue("q", b"y")
        broker.checkpoint()
        assert reopened_and_drained(broker, clock) == [left]


def test_after_a_checkpoint_that_failed_its_log_is_still_to_be_replayed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Broker(tmp_path / "q") as broker:
        broker.checkpoint()
        broker.enqueue("q", bytes(10_000))
        lag = broker.health().checkpoint_lag_bytes
        assert lag is not None
        assert lag > 10_000
        fail_a_checkpoint(broker, monkeypatch)
        assert broker.health().checkpoint_lag_bytes == lag
        broker.checkpoint()
        assert broker.health().checkpoint_lag_bytes == 0


def test_a_run_that_has_changed_stays_in_memory_until_it_is_in_the_index(tmp_path: Path) -> None:
    with Broker(tmp_path / "q", cache_bytes=0) as broker:
        engine: Any = broker._engine
        ids = [job_id for _ in range(5) for job_id in broker.enqueue_many("q", [b"x"] * RUN_JOBS)]
        broker.checkpoint()
        gone = ids.pop(2 * RUN_JOBS + 10)  # of a run that is neither at the head nor still growing
        assert broker.cancel(gone)
        with engine._keeper_lock:
            engine._put_away_all()
        check(broker)
        assert [lease.id for lease in broker.lease_many("q", 10_000)] == ids


def test_keys_whose_window_is_over_leave_the_index(tmp_path: Path) -> None:
    clock = ManualClock()
    with Broker(tmp_path / "q", clock=clock) as broker:
        broker.configure_queue("q", idempotency_ttl=60)
        broker.enqueue_many("q", [b""] * 300, idempotency_keys=[f"k{n}" for n in range(300)])
        living = broker.enqueue("q", b"", priority=0, idempotency_key="of a living job")
        broker.ack_many(broker.lease_many("q", 300))
        broker.checkpoint()
        assert len(set(inside(broker)._index.key_names())) == 301
        clock.advance(60)
        broker.checkpoint()
        assert len(set(inside(broker)._index.key_names())) == 1
        assert broker.find("q", "of a living job") == living


def test_a_payload_whose_segment_goes_while_it_is_read_is_read_from_its_new_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Broker(tmp_path / "q", cache_bytes=0, segment_bytes=SMALL) as broker:
        job_id = broker.enqueue("q", b"moved")
        log = inside(broker)._log
        read, is_first = log.read, [True]

        def read_late(*place: Any) -> Any:
            if is_first.pop() if is_first else False:
                broker.rotate()
                broker.enqueue_many("other", [bytes(1000)] * 100)
                broker.ack_many(broker.lease_many("other", 100))
                broker.compact()
            return read(*place)

        monkeypatch.setattr(log, "read", read_late)
        job = broker.get(job_id)
        assert job is not None
        assert job.payload == b"moved"
        assert not is_first


@pytest.mark.parametrize("fsync", ["interval", "never"])
def test_a_clean_end_in_a_relaxed_mode_skips_no_ids(tmp_path: Path, fsync: Any) -> None:
    for n in (1, 2, 3):
        with Broker(tmp_path / "q", fsync=fsync) as broker:
            assert broker.enqueue("q", b"") == n


# -- Rotation and compaction


def test_checkpoint_compact_and_rotate_leave_the_state_as_it_is(tmp_path: Path) -> None:
    clock = ManualClock()
    with Broker(tmp_path / "q", segment_bytes=SMALL, clock=clock) as broker:
        for n in range(400):
            broker.enqueue("q", bytes([n % 256]) * 500, idempotency_key=f"k{n}", priority=n % 10)
        leases = broker.lease_many("q", 300)
        broker.ack_many(leases[:200])
        for lease in leases[200:230]:
            lease.reject(error="bad")
        for lease in leases[230:260]:
            lease.nack(delay=50)
        state = dump(broker)
        for verb in (
            broker.rotate,
            broker.checkpoint,
            broker.compact,
            broker.rotate,
            broker.compact,
            broker.checkpoint,
        ):
            verb()
            assert dump(broker) == state
            check(broker)
        assert broker.metrics()["copied_bytes"] > 0
        for job in broker.jobs("q", limit=1000):
            assert len(set(job.payload)) == 1
            assert len(job.payload) == 500


@pytest.mark.parametrize("without_index", [False, True])
def test_compaction_drops_segments_and_keeps_all_that_counts(tmp_path: Path, without_index: bool) -> None:
    path = tmp_path / "q"
    clock = ManualClock()
    with Broker(path, segment_bytes=SMALL, clock=clock, cache_bytes=0) as broker:
        broker.configure_queue("q", visibility_timeout=9, idempotency_ttl=10_000)
        old = broker.enqueue("q", b"old" * 100, delay=5000, idempotency_key="of the delayed")
        broker.enqueue("q", b"dead" * 100, idempotency_key="of the dead", headers={"h": "v"})
        dead = broker.lease("q")
        assert dead is not None
        dead.reject(error="bad")
        acked = broker.enqueue("q", b"acked", idempotency_key="of the acked")
        broker.ack_many(broker.lease_many("q", 1))
        for _ in range(20):
            broker.enqueue_many("q", [bytes(1000)] * 60)
            broker.ack_many(broker.lease_many("q", 60))
        broker.compact()
        segments = len(list((path / "log").glob("*.log")))
        assert segments <= 3, "an old delayed job pins the log"
        assert broker.metrics()["log_segments"] == segments
        assert broker.metrics()["log_bytes"] < 3 * SMALL
        state = dump(broker)
    if without_index:
        shutil.rmtree(path / "index")
    with Broker(path, segment_bytes=SMALL, clock=clock, cache_bytes=0) as broker:
        assert dump(broker) == state
        check(broker)
        assert [job.payload for job in broker.dead_letters("q")] == [b"dead" * 100]
        assert broker.find("q", "of the acked") == acked
        assert broker.find("q", "of the dead") == dead.id
        assert broker.stats("q").enqueued == 20 * 60 + 3
        clock.advance(5000)
        lease = broker.lease("q")
        assert lease is not None
        assert (lease.id, lease.payload) == (old, b"old" * 100)
        clock.advance(5000)
        assert broker.find("q", "of the acked") is None


def test_the_log_is_compacted_by_itself(tmp_path: Path) -> None:
    with Broker(tmp_path / "q", segment_bytes=SMALL, fsync="never") as broker:
        old = broker.enqueue("q", b"old", delay=5000)
        end = time.monotonic() + 20
        while inside(broker)._machine.oldest_segment < 10:
            broker.enqueue_many("q", [bytes(1000)] * 20)
            broker.ack_many(broker.lease_many("q", 20))
            assert time.monotonic() < end, "nothing is compacted"
        assert broker.get(old) is not None
        check(broker)


# -- Sizes


@pytest.mark.parametrize("cache_bytes", [0, 2**26])
def test_a_record_larger_than_a_segment_gets_one_of_its_own(tmp_path: Path, cache_bytes: int) -> None:
    path = tmp_path / "q"
    large = bytes(range(256)) * 1000
    with Broker(path, segment_bytes=SMALL, cache_bytes=cache_bytes) as broker:
        ids = [broker.enqueue("q", payload) for payload in (b"a", large, b"b", large + large, b"c")]
        assert [job.payload for job in broker.jobs("q")] == [b"a", large, b"b", large + large, b"c"]
        state = dump(broker)
    for damage in (False, True):
        if damage:
            shutil.rmtree(path / "index")
        with Broker(path, segment_bytes=SMALL, cache_bytes=cache_bytes) as broker:
            assert dump(broker) == state
            broker.compact()
            assert [job.payload for job in broker.jobs("q")] == [b"a", large, b"b", large + large, b"c"]
            assert [job.id for job in broker.jobs("q")] == ids


@pytest.mark.parametrize("segment_bytes", [SMALL, 64 * 2**20])
def test_a_payload_of_16_mib_comes_back_as_it_was(tmp_path: Path, segment_bytes: int) -> None:
    payload = bytes(range(256)) * 2**16
    with Broker(tmp_path / "q", segment_bytes=segment_bytes, cache_bytes=0) as broker:
        job_id = broker.enqueue("q", payload)
        with pytest.raises(UsageError):
            broker.enqueue("q", payload + b"x")
    with Broker(tmp_path / "q", segment_bytes=segment_bytes, cache_bytes=0) as broker:
        lease = broker.lease("q")
        assert lease is not None
        assert lease.id == job_id
        assert lease.payload == payload
        lease.ack()


# -- Syncs


@pytest.mark.parametrize("fsync", ["interval", "never"])
def test_sync_makes_durable_in_a_relaxed_mode(tmp_path: Path, fsync: Any) -> None:
    with Broker(tmp_path / "q", fsync=fsync, fsync_interval=3600) as broker:
        broker.enqueue("q", b"the first reserves ids, which is synced in every mode")
        log = inside(broker)._log
        for _ in range(3):
            before = broker.metrics()["fsyncs"]
            broker.enqueue_many("q", [b"x"] * 5)
            broker.ack_many(broker.lease_many("q", 2))
            assert log.durable_lsn < log.written_lsn
            broker.sync()
            assert broker.metrics()["fsyncs"] > before
            assert log.durable_lsn == log.next_lsn - 1


def test_interval_syncs_by_itself_and_never_does_not(tmp_path: Path) -> None:
    with (
        Broker(tmp_path / "i", fsync="interval", fsync_interval=0.02) as often,
        Broker(tmp_path / "n", fsync="never") as never,
    ):
        for broker in (often, never):
            broker.enqueue("q", b"x")
            broker.sync()
            broker.enqueue("q", b"y")
        log = inside(often)._log
        end = time.monotonic() + 10
        while log.durable_lsn < log.written_lsn:
            assert time.monotonic() < end, "nobody syncs"
            time.sleep(0.005)
        log = inside(never)._log
        assert log.durable_lsn < log.written_lsn


# -- The broker itself


def test_the_repr_names_the_directory(tmp_path: Path) -> None:
    with Broker(tmp_path / "q") as broker:
        assert repr(broker) == f"Broker({str(tmp_path / 'q')!r})"
    with Broker(":memory:") as broker:
        assert repr(broker) == "Broker(':memory:')"


def test_a_relative_path_stays_where_it_was_when_the_program_goes_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with Broker("q", segment_bytes=SMALL) as broker:
        monkeypatch.chdir("/")
        broker.enqueue_many("q", [bytes(1000)] * 100)
        broker.rotate()
        broker.checkpoint()
    with Broker(tmp_path / "q") as broker:
        assert broker.stats("q").ready == 100


@pytest.mark.parametrize(
    "options",
    [
        {"fsync": "sometimes"}, {"fsync": True}, {"fsync": None},
        {"fsync_interval": 0}, {"fsync_interval": -1}, {"fsync_interval": float("nan")}, {"fsync_interval": True},
        {"fsync_interval": "0.1"}, {"fsync_interval": None}, {"fsync_interval": float("inf")},
        {"segment_bytes": SMALL - 1}, {"segment_bytes": 0}, {"segment_bytes": -1}, {"segment_bytes": 1e6},
        {"segment_bytes": True}, {"segment_bytes": None}, {"segment_bytes": "65536"},
        {"release_on_open": 1}, {"release_on_open": None}, {"release_on_open": "yes"},
        {"max_payload_bytes": 0}, {"max_payload_bytes": -1}, {"max_payload_bytes": 2**40}, {"max_payload_bytes": 1.5},
        {"max_payload_bytes": True}, {"cache_bytes": -1}, {"cache_bytes": 1.5},
        {"clock": "now"}, {"clock": 7}, {"clock": time.time},
    ],
    ids=repr,
)  # fmt: skip
def test_a_bad_option_is_refused_and_nothing_is_created(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError) as caught:
        Broker(tmp_path / "q", **options)
    assert next(iter(options)).split("_")[0] in str(caught.value)
    assert not list(tmp_path.iterdir())
    with pytest.raises(UsageError):
        Broker(":memory:", **options)


@pytest.mark.parametrize("path", [None, 7, "", "a\0b", ["q"], 1.5], ids=repr)
def test_a_bad_path_is_refused(path: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError):
        Broker(path)
    assert not list(tmp_path.iterdir())


def test_an_unknown_option_is_refused(tmp_path: Path) -> None:
    options: dict[str, Any] = {"fsnyc": "always"}
    with pytest.raises(TypeError, match="fsnyc"):
        Broker(tmp_path / "q", **options)
    assert not list(tmp_path.iterdir())


def test_a_program_that_forgets_to_close_leaves_a_checkpoint(tmp_path: Path) -> None:
    script = "import sys, rivetq; b = rivetq.Broker(sys.argv[1]); b.enqueue('q', b'x'); sys.exit(0)"
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "q")], check=True, timeout=30)
    assert (tmp_path / "q" / "index" / "manifest").exists()
    with Broker(tmp_path / "q") as broker:
        assert broker.stats("q").ready == 1


# -- For tests of users

PLUGIN_TEST = """
import pytest
from rivetq import Broker, BrokerClosedError
from rivetq.testing import ManualClock

kept = []

def test_a_broker_on_a_clock(rivetq_broker, rivetq_clock, tmp_path):
    assert isinstance(rivetq_broker, Broker) and isinstance(rivetq_clock, ManualClock)
    assert rivetq_broker.clock is rivetq_clock
    assert rivetq_broker.path.startswith(str(tmp_path))
    rivetq_broker.enqueue("q", b"x", delay=60)
    assert rivetq_broker.lease("q") is None
    rivetq_clock.advance(60)
    assert rivetq_broker.lease("q").payload == b"x"
    kept.append(rivetq_broker)

def test_another_one(rivetq_broker):
    assert rivetq_broker.queues() == []
    with pytest.raises(BrokerClosedError):
        kept[0].queues()
"""


def test_the_pytest_plugin_gives_a_broker_and_its_clock(tmp_path: Path) -> None:
    (tmp_path / "test_users.py").write_text(PLUGIN_TEST)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "error", "--basetemp", "base"]
    done = subprocess.run([*command, "test_users.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 passed" in done.stdout


# The clock of a live broker


@pytest.mark.parametrize("step_s", [-10 * 365 * 86_400, -86_400, 86_400, 10 * 365 * 86_400])
def test_a_step_of_the_wall_clock_changes_nothing_for_a_live_broker(tmp_path: Path, step_s: float) -> None:
    clock = ManualClock()
    clock.advance(5000)
    with Broker(tmp_path / "q", clock=clock) as broker:
        ready, later, held = (
            broker.enqueue("q", b"r"),
            broker.enqueue("later", b"l", delay=60),
            broker.enqueue("h", b"h"),
        )
        lease = broker.lease("h", visibility_timeout=60)
        assert lease is not None
        clock.step_wall(step_s)
        clock.advance(59.999)
        assert broker.stats("q").ready == 1
        assert broker.stats("later").scheduled == 1
        assert broker.stats("h").leased == 1
        broker.checkpoint()
        clock.advance(0.001)
        found = [broker.lease(name) for name in ("q", "later")]
        assert [each.id for each in found if each is not None] == [ready, later]
        with pytest.raises(LeaseLostError):
            lease.ack()
        job = broker.get(held)
        assert job is not None
        assert job.last_error == "lease expired"


def test_the_time_of_a_suspend_counts(tmp_path: Path) -> None:
    """The machine wakes up eight hours later, and nobody was told."""
    clock = ManualClock()
    with Broker(tmp_path / "q", clock=clock) as broker:
        later = broker.enqueue("q", b"l", delay=3600)
        broker.enqueue("h", b"h")
        lease = broker.lease("h")
        assert lease is not None
        clock._elapsed_ms += 8 * 3_600_000
        found = broker.lease("q")
        assert found is not None
        assert found.id == later
        with pytest.raises(LeaseLostError):
            lease.ack()


def test_jobs_for_a_paused_queue_wake_nobody(tmp_path: Path) -> None:
    with Broker(tmp_path / "q") as broker:
        broker.enqueue("q", b"first")
        broker.pause("q")
        machine = inside(broker)._machine
        machine.woken.clear()
        broker.enqueue("q", b"second")
        assert not machine.woken
        assert broker.lease("q") is None
        broker.resume("q")
        assert len(broker.lease_many("q", 5)) == 2


def test_the_histogram_of_jobs_per_sync_counts_jobs_and_not_events(tmp_path: Path) -> None:
    with Broker(tmp_path / "data") as broker:
        before = broker.histograms()["jobs_per_fsync"].sum
        broker.enqueue_many("new", [b""] * 100)  # the queue, which is no job, and a hundred jobs
        with broker.transaction() as tx:
            tx.enqueue_many("new", [b""] * 10)
            tx.enqueue("other", b"")
        found = broker.histograms()
        assert found["jobs_per_fsync"].sum - before == 111
        assert found["fsync_seconds"].count == found["jobs_per_fsync"].count > 0


# -- What a second look found


def test_ids_that_were_told_in_a_relaxed_mode_stay_told_whoever_reserves_next(tmp_path: Path) -> None:
    """The second reservation is appended while the first caller is on its way to the disk."""
    root = tmp_path / "live"
    root.mkdir()
    disk, clock = SimulatedDisk(root, opaque=("index",)), ManualClock()
    engine = LocalEngine(
        str(root / "q"), fsync="never", fsync_interval=1.0, segment_bytes=2**20, release_on_open=True, cache_bytes=0,
        window_jobs=10**9, clock=clock, disk=disk,
    )  # fmt: skip
    settle, told = engine._settle, list[int]()

    def late(lsn: int, *, sync: bool = True) -> None:
        engine._settle = settle  # type: ignore[method-assign]  # to see what passes
        with engine._lock:
            now_ms = engine._tick()
            engine._record([decide.ids(engine._machine, 200_000, 65_536)], now_ms)  # type: ignore[list-item]  # no such operation
        settle(lsn, sync=sync)

    engine._settle = late  # type: ignore[method-assign]  # to see what passes
    told += engine.call(Commit([Enqueue("q", [b""] * 70_000)]))[0]  # type: ignore[arg-type]  # ids
    after = tmp_path / "after"
    after.mkdir()
    disk.crash(after, 1, "none")
    engine.close()
    disk.abandon()
    with Broker(after / "q", clock=ManualClock()) as broker:
        assert broker.enqueue("q", b"new") > told[-1]


def test_leases_that_end_get_the_room_that_their_record_needs(tmp_path: Path) -> None:
    """A snapshot of many queues is longer than a spare: nobody else asks for room meanwhile."""
    with Broker(tmp_path / "q", fsync="never", segment_bytes=SMALL) as broker:
        for i in range(300):
            broker.configure_queue(f"queue number {i}", visibility_timeout=5)
        broker.enqueue_many("q", [b""] * 1500, retry=RetryPolicy(max_attempts=None, base=0))
        broker.lease_many("q", 1500, visibility_timeout=0.5)
        log: Any = inside(broker)._log
        while log.space.tail.size - log.space.tail_offset > 20_000:
            broker.enqueue("fill", bytes(2000))
        end = time.monotonic() + 20
        while inside(broker)._machine.queues["q"].counts[LEASED]:  # no call of the broker: only its timer acts
            assert time.monotonic() < end, "they never end"
            time.sleep(0.01)
        check(broker)


def test_what_single_looks_read_does_not_stay_in_memory(tmp_path: Path) -> None:
    with Broker(tmp_path / "q", fsync="never") as broker:
        for _ in range(300):
            broker.enqueue_many("q", [b""] * 1024)
    with Broker(tmp_path / "q", fsync="never") as broker:
        window = waiting_of(inside(broker)._machine, "q").window(READY, 5)
        for job_id in range(500, 300 * 1024, 1024):
            assert broker.get(job_id) is not None
        end = time.monotonic() + 20
        while sum(run.columns is not None for run in window.runs) > 100:
            assert time.monotonic() < end, "the columns of all runs are in memory"
            time.sleep(0.01)


def test_what_is_read_while_runs_are_put_away_is_put_away_the_next_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Broker(tmp_path / "q", fsync="never") as broker:
        for _ in range(300):
            broker.enqueue_many("q", [b""] * 1024)
    with Broker(tmp_path / "q", fsync="never") as broker:
        window = waiting_of(inside(broker)._machine, "q").window(READY, 5)
        slices, meanwhile = LocalEngine._slices, iter([range(150 * 1024 + 500, 300 * 1024, 1024)])

        def reading(self: LocalEngine, items: Any) -> Any:
            for job_id in next(meanwhile, ()):
                assert broker.get(job_id) is not None
            return slices(self, items)

        monkeypatch.setattr(LocalEngine, "_slices", reading)
        for job_id in range(500, 150 * 1024, 1024):
            assert broker.get(job_id) is not None
        end = time.monotonic() + 20
        while meanwhile.__length_hint__() or sum(run.columns is not None for run in window.runs) > 100:
            assert time.monotonic() < end, "what was read meanwhile stays in memory"
            time.sleep(0.01)


def test_the_time_line_shows_the_wall_clock_however_long_openings_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, read, make_room = ManualClock(), rivetq.engines.local.recover, Space.make_room

    def slow_to_read(*args: Any) -> Any:
        found = read(*args)
        clock.advance(1)
        return found

    def slow_to_make_room(*args: Any, **kwargs: Any) -> None:
        clock.advance(1)
        make_room(*args, **kwargs)

    monkeypatch.setattr(rivetq.engines.local, "recover", slow_to_read)
    monkeypatch.setattr(Space, "make_room", slow_to_make_room)
    for _ in range(3):
        with Broker(tmp_path / "q", clock=clock) as broker:
            job = broker.get(broker.enqueue("q", b""))
            assert job is not None
            assert job.enqueued_at == clock.now()
        clock.advance(10)


@pytest.mark.parametrize("path", [":memory:", "q"])
def test_ids_are_given_to_whom_they_were_promised_and_once(tmp_path: Path, path: str) -> None:
    with Broker(path if path == ":memory:" else tmp_path / path) as broker:
        engine = inside(broker)
        mine = broker.enqueue("q", b"mine")
        first = engine.call(Reserve("q", 2))
        for promised, count in ((first, 1), (first + 1, 1), (first + 2, 1), (10**6, 2)):
            with pytest.raises(UsageError, match="never promised"):
                engine.call(Commit([Enqueue("q", [b"yours"] * count, promised=promised)]))
        with pytest.raises(UsageError, match="never promised"):
            engine.call(Commit([Enqueue("other", [b"yours"], promised=mine)]))
        assert engine.call(Commit([Enqueue("q", [b"a", b"b"], promised=first)])) == [[first, first + 1]]
        assert engine.call(Commit([Enqueue("q", [b"a", b"b"], promised=first)])) == [[first, first + 1]], (
            "once more: no change"
        )
        assert engine.call(Commit([Enqueue("q", [b"yours"], promised=mine)])) == [[mine]]
        assert [lease.payload for lease in broker.lease_many("q", 10)] == [b"mine", b"a", b"b"]
        engine.audit()
        twice = engine.call(Reserve("q", 1))
        with pytest.raises(UsageError, match="never promised"):
            engine.call(Commit([Enqueue("q", [b"a"], promised=twice), Enqueue("q", [b"b"], promised=twice)]))


def test_a_transaction_that_ends_without_its_jobs_leaves_no_promise_behind() -> None:
    with Broker(":memory:") as broker:
        broker.configure_queue("full", max_jobs=1)
        for _ in range(3):
            with pytest.raises(ZeroDivisionError), broker.transaction() as tx:
                tx.enqueue("q", b"")
                raise ZeroDivisionError
            with pytest.raises(QueueFullError), broker.transaction() as tx:
                tx.enqueue_many("full", [b"", b""])
        with broker.transaction() as tx:
            tx.enqueue("q", b"")
        assert inside(broker)._machine.promised == {}


def test_headers_of_many_jobs_do_not_stay_when_these_are_gone(tmp_path: Path) -> None:
    with Broker(tmp_path / "q", fsync="never") as broker:
        for i in range(50):
            broker.enqueue("q", b"", headers={"h": chr(65 + i % 26) * 50_000 + str(i)}, max_attempts=1)
        for lease in broker.lease_many("q", 50):
            lease.reject()
    values._spec.cache_clear()
    with Broker(tmp_path / "q", fsync="never") as broker:
        assert len(broker.dead_letters("q")) == 50
    assert values._spec.cache_info().currsize < 10
