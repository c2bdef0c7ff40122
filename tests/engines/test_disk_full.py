"""No space is a refusal that ends when there is space; any other failed write or sync ends the broker, and no more."""

from __future__ import annotations

import ctypes
import errno
import functools
import math
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from inside import inside

import rivetq.engines.local
from rivetq import (
    Broker,
    BrokerClosedError,
    BrokerFailedError,
    CorruptLogError,
    DiskFullError,
    Lease,
    LeaseLostError,
    RetryPolicy,
)
from rivetq.storage.disk import SystemDisk
from rivetq.storage.space import RESERVE_BYTES
from rivetq.testing import ManualClock

AGAIN = RetryPolicy(max_attempts=None, base=0, jitter="none")
SIZES = pytest.mark.parametrize("segment_bytes", [65_536, 64 * 2**20], ids=["small segments", "the default"])


class TroubledDisk(SystemDisk):
    """A real disk whose space can run out, and whose writes and syncs can be made to fail."""

    def __init__(self) -> None:
        self.left = math.inf  # bytes that can still be allocated
        self.fail_write: Callable[[], None] | None = None  # raises in place of the next write
        self.fail_sync: Callable[[], None] | None = None
        self.fail_read: Callable[[], None] | None = None
        self.most_per_write = 2**40
        self.failed_inode = 0
        self.syncs_after_failure = 0

    def allocate(self, fd: int, offset: int, size: int) -> None:
        if size > self.left:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        super().allocate(fd, offset, size)
        self.left -= size

    def pwrite(self, fd: int, data: bytes, offset: int) -> int:  # type: ignore[override]  # a method in place of a builtin
        if self.fail_write is not None:
            self.fail_write()
        return os.pwrite(fd, data[: self.most_per_write], offset)

    def fdatasync(self, fd: int) -> None:  # type: ignore[override]  # a method in place of a builtin
        inode = os.fstat(fd).st_ino
        self.syncs_after_failure += inode == self.failed_inode
        if self.fail_sync is not None:
            self.failed_inode = inode
            self.fail_sync()
        os.fdatasync(fd)

    def pread(self, fd: int, size: int, offset: int) -> bytes:
        if self.fail_read is not None:
            self.fail_read()
        return super().pread(fd, size, offset)


def eio() -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> TroubledDisk:
    """The disk of every broker that is opened from here on."""
    disk = TroubledDisk()
    monkeypatch.setattr(rivetq.engines.local, "SystemDisk", lambda: disk)
    return disk


def dump(broker: Broker) -> dict[str, Any]:
    found: dict[str, Any] = inside(broker).dump()
    return found


def run_out(broker: Broker, disk: TroubledDisk) -> int:
    """There is no space any more; fill what the broker has. How many jobs it holds then in all."""
    broker.enqueue("q", b"x" * 3000, retry=AGAIN)  # that it is taken says that the reserve is there
    disk.left = 0
    return 1 + fill(broker)


def fill(broker: Broker, size: int = 3000) -> int:
    """Enqueue until there is no space; how many jobs went in."""
    for count in range(100_000):
        try:
            broker.enqueue("q", b"x" * size, retry=AGAIN)
        except DiskFullError:
            return count
    raise AssertionError("the disk never fills")


def lease(broker: Broker, queue: str = "q") -> Lease:
    lease = broker.lease(queue, visibility_timeout=3600)
    assert lease is not None
    return lease


# -- No space


@SIZES
def test_without_space_what_would_add_a_job_is_refused_and_nothing_changes(
    tmp_path: Path, disk: TroubledDisk, segment_bytes: int
) -> None:
    with Broker(tmp_path / "q", segment_bytes=segment_bytes) as broker:
        assert run_out(broker, disk) > 1
        held = lease(broker)
        before = dump(broker)

        def in_a_transaction() -> None:
            with broker.transaction() as tx:
                tx.ack(held)
                tx.enqueue("q", b"x" * 3000)

        for call in (
            lambda: broker.enqueue("q", b"x" * 3000),
            lambda: broker.enqueue_many("other", [b"x" * 1000] * 10, idempotency_keys=[f"k{i}" for i in range(10)]),
            in_a_transaction,
        ):
            with pytest.raises(DiskFullError) as caught:
                call()
            error = caught.value
            assert error.outcome == "not_done"
            assert error.path.startswith(str(tmp_path / "q"))
            assert isinstance(error.__cause__, OSError)
            assert error.__cause__.errno == errno.ENOSPC
            assert dump(broker) == before
        assert broker.find("other", "k1") is None
        broker.ack(held)
        after = dump(broker)
    disk.left = math.inf
    with Broker(tmp_path / "q", segment_bytes=segment_bytes) as broker:
        assert dump(broker) == after


@SIZES
def test_without_space_leases_answers_and_looks_go_on_from_the_reserve(
    tmp_path: Path, disk: TroubledDisk, segment_bytes: int
) -> None:
    with Broker(tmp_path / "q", segment_bytes=segment_bytes) as broker:
        count = run_out(broker, disk)
        before = broker.metrics()["log_bytes_written"]
        # Four fifths of it: each segment there has a header, and an end that the next record does not fit into.
        while broker.metrics()["log_bytes_written"] < before + 0.8 * RESERVE_BYTES:
            held = lease(broker)
            assert held.payload == b"x" * 3000
            broker.extend(held, 7200)
            broker.nack(held, error="e" * 1000)
        assert broker.stats("q").ready == count
        assert len(broker.jobs("q", limit=10)) == 10
        broker.ack(lease(broker))
        assert broker.stats("q").acked == 1


@SIZES
def test_a_reserve_that_is_used_up_ends_nothing(tmp_path: Path, disk: TroubledDisk, segment_bytes: int) -> None:
    with Broker(tmp_path / "q", segment_bytes=segment_bytes) as broker:
        run_out(broker, disk)
        held = lease(broker)
        with pytest.raises(DiskFullError) as caught:
            while True:
                broker.nack(held, error="e" * 4000)
                held = lease(broker)
        assert caught.value.outcome == "not_done"
        assert broker.stats("q").enqueued > 0
        disk.left = math.inf
        broker.enqueue("q", b"x" * 3000)
        state = dump(broker)
    with Broker(tmp_path / "q", segment_bytes=segment_bytes) as broker:
        assert [job[0] for job in dump(broker)["jobs"]] == [job[0] for job in state["jobs"]]


@SIZES
def test_enqueue_goes_on_without_reopening_once_there_is_space(
    tmp_path: Path, disk: TroubledDisk, segment_bytes: int
) -> None:
    with Broker(tmp_path / "q", segment_bytes=segment_bytes) as broker:
        ids = list(broker.enqueue_many("q", [b"first"] * 3))
        for _ in range(3):
            run_out(broker, disk)
            disk.left = 4 * 2**20
            ids.append(broker.enqueue("q", b"y" * 3000))
        disk.left = math.inf
        assert all(broker.get(job_id) is not None for job_id in ids)
        inside(broker).audit()
        state = dump(broker)
    with Broker(tmp_path / "q", segment_bytes=segment_bytes) as broker:
        assert dump(broker) == state


def test_a_compaction_makes_room_on_a_full_disk(tmp_path: Path, disk: TroubledDisk) -> None:
    with Broker(tmp_path / "q", segment_bytes=65_536) as broker:
        broker.enqueue_many("q", [b"x" * 3000] * 10)
        run_out(broker, disk)
        while leases := broker.lease_many("q", 50):
            broker.ack_many(leases)
        segments = broker.metrics()["log_segments"]
        broker.compact()
        assert broker.metrics()["log_segments"] < segments


def test_a_lease_that_expires_without_space_ends_when_there_is_space(tmp_path: Path, disk: TroubledDisk) -> None:
    clock = ManualClock()
    with Broker(tmp_path / "q", clock=clock, segment_bytes=65_536) as broker:
        job_id = broker.enqueue("q", b"x", priority=9, retry=AGAIN)
        held = broker.lease("q", visibility_timeout=10)
        assert held is not None
        other = broker.enqueue("other", b"x", retry=AGAIN)
        run_out(broker, disk)
        with pytest.raises(DiskFullError):
            while True:
                broker.nack(lease(broker, "other"), error="e" * 4000)
        clock.advance(11)
        with pytest.raises(LeaseLostError):  # from its deadline on, noticed or not
            broker.ack(held)
        disk.left = math.inf
        broker.enqueue("q", b"x")
        job = broker.get(job_id)
        assert job is not None
        assert (job.state, job.last_error) == ("ready", "lease expired")
        assert broker.get(other) is not None


def test_an_opening_without_space_takes_the_spare_that_is_there(tmp_path: Path, disk: TroubledDisk) -> None:
    with Broker(tmp_path / "q", segment_bytes=65_536) as broker:
        count = run_out(broker, disk)
    with Broker(tmp_path / "q", segment_bytes=65_536) as broker:
        broker.ack(lease(broker))
        assert broker.stats("q").ready == count - 1


def test_an_opening_without_any_space_is_refused_and_changes_nothing(tmp_path: Path, disk: TroubledDisk) -> None:
    with Broker(tmp_path / "q") as broker:
        broker.enqueue("q", b"x")
    for spare in (tmp_path / "q" / "log").glob("spare-*"):
        spare.unlink()
    before = {path: path.read_bytes() for path in (tmp_path / "q").rglob("*") if path.is_file()}
    disk.left = 0
    with pytest.raises(DiskFullError):
        Broker(tmp_path / "q")
    assert {path: path.read_bytes() for path in (tmp_path / "q").rglob("*") if path.is_file()} == before
    disk.left = math.inf
    with Broker(tmp_path / "q") as broker:
        assert broker.stats("q").ready == 1


@pytest.fixture
def small_disk(file_system: Callable[[str], Path]) -> Path:
    return file_system("6m")


@pytest.mark.root
@SIZES
def test_a_full_file_system_refuses_jobs_until_something_is_removed(small_disk: Path, segment_bytes: int) -> None:
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(2**20))
    with Broker(small_disk / "q", segment_bytes=segment_bytes) as broker:
        count = fill(broker)
        started = time.perf_counter()
        with pytest.raises(DiskFullError):
            broker.enqueue("q", b"x" * 3000)
        print(f"refused after {1000 * (time.perf_counter() - started):.1f} ms")
        assert count > 100
        for _ in range(50):
            broker.nack(lease(broker), error="e" * 1000)
        broker.ack(lease(broker))
        assert broker.stats("q").ready == count - 1
        ballast.unlink()
        broker.enqueue("q", b"x" * 3000)
        state = dump(broker)
    with Broker(small_disk / "q", segment_bytes=segment_bytes) as broker:
        assert dump(broker) == state
        while leases := broker.lease_many("q", 100):
            broker.ack_many(leases)
        broker.compact()
        assert fill(broker) > count // 2, "what was acked does not make room"


# -- Failing writes and syncs


def every_call(broker: Broker, held: Lease) -> dict[str, Callable[[], object]]:
    return {
        "enqueue": lambda: broker.enqueue("q", b"x"),
        "enqueue_many": lambda: broker.enqueue_many("q", [b"x"]),
        "lease": lambda: broker.lease("q"),
        "waiting lease": lambda: broker.lease("empty", wait=None),
        "ack": lambda: broker.ack(held),
        "nack": lambda: held.nack(),
        "extend": lambda: held.extend(5),
        "configure_queue": lambda: broker.configure_queue("q", max_jobs=5),
        "pause": lambda: broker.pause("q"),
        "purge": lambda: broker.purge("q"),
        "cancel": lambda: broker.cancel(1),
        "redrive": lambda: broker.redrive("q"),
        "transaction": lambda: broker.transaction().__enter__().enqueue("q", b"x"),
        "get": lambda: broker.get(1),
        "jobs": lambda: broker.jobs("q"),
        "find": lambda: broker.find("q", "k"),
        "queues": lambda: broker.queues(),
        "stats": lambda: broker.stats(),
        "config": lambda: broker.configure_queue("q"),
        "sync": lambda: broker.sync(),
        "checkpoint": lambda: broker.checkpoint(),
        "compact": lambda: broker.compact(),
        "rotate": lambda: broker.rotate(),
        "metrics": lambda: broker.metrics(),
        "backup": lambda: broker.backup("nowhere"),
    }


def assert_failed(broker: Broker, held: Lease, cause: BaseException | None) -> None:
    """It takes no call any more, looking included, and names the cause."""
    for name, call in every_call(broker, held).items():
        with pytest.raises(BrokerFailedError) as caught:
            call()
        assert caught.value.outcome == "not_done", name
        assert caught.value.__cause__ is cause, name


CHANGES: dict[str, Callable[[Broker, Lease], object]] = {
    "enqueue": lambda broker, held: broker.enqueue("q", b"in doubt", idempotency_key="in doubt"),
    "enqueue_many": lambda broker, held: broker.enqueue_many("q", [b"in doubt"] * 3),
    "lease": lambda broker, held: broker.lease("q"),
    "ack": lambda broker, held: held.ack(),
    "nack": lambda broker, held: held.nack(),
    "extend": lambda broker, held: held.extend(7200),
    "configure_queue": lambda broker, held: broker.configure_queue("q", max_jobs=50),
    "purge": lambda broker, held: broker.purge("other"),
    "cancel": lambda broker, held: broker.cancel(broker.jobs("other")[0].id),
    "rotate": lambda broker, held: broker.rotate(),
    "compact": lambda broker, held: broker.compact(),
}


@pytest.mark.parametrize(
    ("trouble", "verb"), [("write", v) for v in CHANGES] + [("sync", v) for v in CHANGES if v != "lease"]
)
def test_a_failed_write_or_sync_fails_the_call_that_met_it_and_every_later_one(
    tmp_path: Path, disk: TroubledDisk, trouble: str, verb: str
) -> None:
    broker = Broker(tmp_path / "q", segment_bytes=65_536)
    ids = set(broker.enqueue_many("q", [b"answered"] * 5, idempotency_keys=[f"k{i}" for i in range(5)]))
    ids.add(broker.enqueue("other", b"answered"))
    held = lease(broker)
    broker.sync()
    cause = OSError(errno.EIO, os.strerror(errno.EIO))

    def fail() -> None:
        raise cause

    if trouble == "write":
        disk.fail_write = fail
    else:
        disk.fail_sync = fail
    with pytest.raises(BrokerFailedError) as caught:
        CHANGES[verb](broker, held)
    assert caught.value.outcome == "unknown"
    assert caught.value.__cause__ is cause
    disk.fail_write = disk.fail_sync = None  # it was once; that does not mend anything
    assert_failed(broker, held, cause)
    broker.close()
    assert disk.syncs_after_failure == 0, "a failed sync was tried again"
    with pytest.raises(BrokerClosedError):
        broker.stats()
    in_doubt = {"ack": {held.id}, "purge": ids, "cancel": ids}.get(verb, set())
    with Broker(tmp_path / "q", segment_bytes=65_536) as broker:
        present = {job.id for queue in ("q", "other") for job in broker.jobs(queue)}
        assert ids - in_doubt <= present
        assert len(present - ids) in ((0, 1, 3) if verb.startswith("enqueue") else (0,))
        if verb == "enqueue":  # after "unknown" the key makes it safe
            job_id = broker.enqueue("q", b"in doubt", idempotency_key="in doubt")
            assert [job.id for job in broker.jobs("q") if job.payload == b"in doubt"] == [job_id]
        inside(broker).audit()


def test_the_end_of_a_transaction_that_meets_a_failed_sync_is_unknown(tmp_path: Path, disk: TroubledDisk) -> None:
    with Broker(tmp_path / "q") as broker:
        first = broker.enqueue("q", b"x")
        held = lease(broker)
        with pytest.raises(BrokerFailedError) as caught, broker.transaction() as tx:
            tx.ack(held)
            tx.enqueue("next", b"x")
            disk.fail_sync = eio
        assert caught.value.outcome == "unknown"
        disk.fail_sync = None
    with Broker(tmp_path / "q") as broker:
        assert (broker.get(first) is None) == (broker.stats("next").ready == 1)


@pytest.mark.parametrize("trouble", ["write", "sync"])
def test_of_many_threads_that_meet_a_failure_none_is_told_ok(tmp_path: Path, disk: TroubledDisk, trouble: str) -> None:
    broker = Broker(tmp_path / "q", segment_bytes=65_536)
    answered: list[int] = []
    errors: list[BaseException] = []
    enough = threading.Semaphore(0)

    def work() -> None:
        try:
            while True:
                answered.append(broker.enqueue("q", b"x" * 100))
                enough.release()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for _ in range(100):
        enough.acquire()
    if trouble == "write":
        disk.fail_write = eio
    else:
        disk.fail_sync = eio
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive(), "a thread waits for ever for a sync that failed"
    disk.fail_write = disk.fail_sync = None
    assert [type(error) for error in errors] == [BrokerFailedError] * 8
    assert {error.outcome for error in errors} <= {"unknown", "not_done"}  # type: ignore[attr-defined]  # all of them are from the error tree
    assert disk.syncs_after_failure == 0
    broker.close()
    with Broker(tmp_path / "q", segment_bytes=65_536) as broker:
        present = {job.id for job in broker.jobs("q", limit=10_000)}
        assert set(answered) <= present
        assert len(present) <= len(answered) + 8


def test_a_short_write_is_completed(tmp_path: Path, disk: TroubledDisk) -> None:
    with Broker(tmp_path / "q", segment_bytes=65_536, cache_bytes=0) as broker:
        disk.most_per_write = 7
        ids = [broker.enqueue("q", bytes([n]) * 500) for n in range(200)]
        disk.most_per_write = 1000
        ids.append(broker.enqueue("q", b"x" * 100_000))
        state = dump(broker)
    disk.most_per_write = 2**40
    with Broker(tmp_path / "q", segment_bytes=65_536) as broker:
        assert dump(broker) == state
        payloads = [lease.payload for lease in broker.lease_many("q", 300)]
        assert payloads == [bytes([n]) * 500 for n in range(200)] + [b"x" * 100_000]


def test_a_write_that_fails_half_way_leaves_what_was_answered(tmp_path: Path, disk: TroubledDisk) -> None:
    with Broker(tmp_path / "q") as broker:
        ids = [broker.enqueue("q", b"x" * 500) for _ in range(3)]
        pieces = iter(range(3))

        def fail_the_fourth() -> None:
            if next(pieces, None) is None:
                eio()

        disk.most_per_write, disk.fail_write = 100, fail_the_fourth
        with pytest.raises(BrokerFailedError):
            broker.enqueue("q", b"y" * 500)
        disk.most_per_write, disk.fail_write = 2**40, None
    for _ in range(2):
        with Broker(tmp_path / "q") as broker:
            assert [job.id for job in broker.jobs("q")] == ids


@pytest.mark.parametrize("fsync", ["interval", "never"])
def test_a_write_that_fails_in_a_relaxed_mode_fails_the_call(tmp_path: Path, disk: TroubledDisk, fsync: Any) -> None:
    with Broker(tmp_path / "q", fsync=fsync) as broker:
        broker.enqueue("q", b"x")
        disk.fail_write = eio
        with pytest.raises(BrokerFailedError) as caught:
            broker.enqueue("q", b"x")
        assert caught.value.outcome == "unknown"
        disk.fail_write = None


def test_a_sync_that_fails_behind_the_back_of_all_fails_the_next_call(tmp_path: Path, disk: TroubledDisk) -> None:
    with Broker(tmp_path / "q", fsync="interval", fsync_interval=0.01) as broker:
        broker.enqueue("q", b"x")
        broker.sync()
        failed = threading.Event()

        def fail() -> None:
            failed.set()
            eio()

        disk.fail_sync = fail
        broker.enqueue("q", b"y")
        assert failed.wait(10)
        deadline = time.monotonic() + 10
        with pytest.raises(BrokerFailedError) as caught:
            while time.monotonic() < deadline:
                broker.stats()
        assert isinstance(caught.value.__cause__, OSError)
        disk.fail_sync = None
    assert disk.syncs_after_failure == 0


def test_a_read_that_fails_is_a_typed_error(tmp_path: Path, disk: TroubledDisk) -> None:
    with Broker(tmp_path / "q", cache_bytes=0) as broker:
        broker.enqueue("q", b"x")
        disk.fail_read = eio
        with pytest.raises(BrokerFailedError) as caught:
            broker.lease("q")
        disk.fail_read = None
        assert isinstance(caught.value.__cause__, OSError)


@pytest.mark.parametrize("what", ["cannot be read", "is damaged"])
def test_a_segment_that_a_compaction_cannot_read_stops_the_broker(
    tmp_path: Path, disk: TroubledDisk, what: str
) -> None:
    with Broker(tmp_path / "q", segment_bytes=65_536, cache_bytes=0) as broker:
        broker.enqueue_many("q", [b"x" * 500] * 60)
        broker.rotate()
        broker.ack_many(broker.lease_many("q", 50))
        broker.rotate()
        if what == "is damaged":
            path = tmp_path / "q/log/0000000000000001.log"
            path.write_bytes(path.read_bytes()[:5000] + b"????" + path.read_bytes()[5004:])
        else:
            disk.fail_read = eio
        with pytest.raises(CorruptLogError if what == "is damaged" else BrokerFailedError):
            broker.compact()
        disk.fail_read = None
        with pytest.raises(BrokerFailedError):
            broker.enqueue("q", b"y")


def test_a_segment_that_cannot_be_removed_fails_the_broker_and_loses_nothing(
    tmp_path: Path, disk: TroubledDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Broker(tmp_path / "q", segment_bytes=65_536) as broker:
        kept = broker.enqueue("q", b"kept")
        broker.enqueue_many("q", [b"x" * 1000] * 50)
        broker.ack_many([job for job in broker.lease_many("q", 51) if job.id != kept])
        with monkeypatch.context() as patched, pytest.raises(BrokerFailedError) as caught:
            patched.setattr(disk, "unlink", lambda path: eio())
            broker.compact()
        assert isinstance(caught.value.__cause__, OSError)
        with pytest.raises(BrokerFailedError):
            broker.stats()
    with Broker(tmp_path / "q", segment_bytes=65_536) as broker:
        assert [job.id for job in broker.jobs("q")] == [kept]
        inside(broker).audit()


def test_a_disk_that_fails_while_space_is_got_fails_the_broker(tmp_path: Path, disk: TroubledDisk) -> None:
    with Broker(tmp_path / "q", segment_bytes=65_536) as broker:
        broker.enqueue("q", b"x")

        def fail(fd: int, offset: int, size: int) -> None:
            eio()

        disk.allocate = fail  # type: ignore[method-assign]  # a fault for one disk
        with pytest.raises(BrokerFailedError) as caught:
            for _ in range(1000):  # until the space that is ready is used up, by this thread or by the keeper
                broker.enqueue("q", b"x" * 3000)
        assert isinstance(caught.value.__cause__, OSError)
        assert caught.value.__cause__.errno == errno.EIO
        with pytest.raises(BrokerFailedError):
            broker.stats("q")


def test_an_interrupt_behind_a_sync_that_succeeded_leaves_the_broker_usable(
    tmp_path: Path, disk: TroubledDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The log relies on fdatasync being one call of C: so is this one, and it leaves a pending signal behind.
    interrupt = functools.partial(ctypes.CDLL(None).kill, os.getpid(), signal.SIGINT)
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with Broker(tmp_path / "q") as broker:
            engine = inside(broker)
            with engine._keeper_lock, engine._log.space._lock:  # the keeper's own syncs would interrupt as well
                monkeypatch.setattr(disk, "fdatasync", interrupt)
                with pytest.raises(KeyboardInterrupt):
                    broker.enqueue("q", b"x")
                monkeypatch.undo()
            assert broker.stats("q").ready == 1
            broker.enqueue("q", b"y")
            assert [job.payload for job in broker.jobs("q")] == [b"x", b"y"]
    finally:
        signal.signal(signal.SIGINT, handler)


def test_an_interrupt_in_the_middle_of_a_sync_fails_the_broker(tmp_path: Path, disk: TroubledDisk) -> None:
    with Broker(tmp_path / "q") as broker:
        broker.enqueue("q", b"x")

        def interrupt() -> None:
            raise KeyboardInterrupt

        disk.fail_sync = interrupt
        with pytest.raises(KeyboardInterrupt):
            broker.enqueue("q", b"y")
        disk.fail_sync = None
        with pytest.raises(BrokerFailedError) as caught:
            broker.stats()
        assert isinstance(caught.value.__cause__, KeyboardInterrupt)
    with Broker(tmp_path / "q") as broker:
        assert broker.stats("q").ready in (1, 2)


def open_files(directory: Path) -> list[str]:
    """What this process has open in a directory."""
    links = [
        os.readlink(f"/proc/self/fd/{fd}")
        for fd in os.listdir("/proc/self/fd")
        if os.path.islink(f"/proc/self/fd/{fd}")
    ]
    return [link for link in links if link.startswith(str(directory))]


def test_close_after_a_failure_returns_and_frees_everything(tmp_path: Path, disk: TroubledDisk) -> None:
    before = set(threading.enumerate())
    broker = Broker(tmp_path / "q")
    broker.enqueue("q", b"x")
    disk.fail_sync = eio
    with pytest.raises(BrokerFailedError):
        broker.enqueue("q", b"x")
    disk.fail_sync = None
    started = time.monotonic()
    broker.close()
    broker.close()
    assert time.monotonic() - started < 5
    assert set(threading.enumerate()) <= before
    assert not open_files(tmp_path)


def test_an_error_that_somebody_keeps_keeps_no_file_open(tmp_path: Path, disk: TroubledDisk) -> None:
    kept: list[BaseException] = []
    with Broker(tmp_path / "q") as broker:
        broker.enqueue("q", b"x")
        disk.left = 0
        for _ in range(100_000):
            try:
                broker.enqueue("q", b"x" * 3000)
            except DiskFullError as error:
                kept.append(error)
                break
        disk.left = math.inf
    assert kept
    assert not open_files(tmp_path)
