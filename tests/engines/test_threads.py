"""Many threads on one broker: nothing lost, nothing twice, one sync for many, nobody forgotten, an end that ends."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import signal
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
from inside import inside
from model import Model, Policy

import rivetq.engines.durable
import rivetq.engines.leasing
import rivetq.engines.lessees
import rivetq.engines.live
import rivetq.engines.local
from rivetq import (
    Broker,
    BrokerClosedError,
    BrokerFailedError,
    BrokerLockedError,
    ForkedBrokerError,
    Lease,
    LeaseLostError,
    LeaseRef,
    RateLimit,
    RetryPolicy,
    StorageError,
)
from rivetq.engine import Enqueue, Reserve
from rivetq.machine.advance import next_wakeup_ms
from rivetq.storage.disk import SystemDisk
from rivetq.storage.lock import DirectoryLock
from rivetq.testing import ManualClock

AT_ONCE = RetryPolicy(max_attempts=None, base=0, jitter="none")
PATIENCE = 20.0
"""Seconds after which a thread counts as hung."""


@pytest.fixture
def restless() -> Iterator[None]:
    """Threads are switched every microsecond."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def in_threads(count: int, work: Callable[[int], object]) -> None:
    """Run `work(number)` in so many threads that start together; raises what the first of them raised."""
    errors: list[BaseException] = []
    start = threading.Barrier(count)

    def run(number: int) -> None:
        try:
            start.wait()
            work(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,), daemon=True) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive(), "a thread hangs"
    if errors:
        raise errors[0]


def opened(tmp_path: Path, fsync: str, **options: Any) -> Broker:
    if fsync == ":memory:":
        return Broker(":memory:")
    chosen: Any = fsync
    return Broker(tmp_path / "q", fsync=chosen, segment_bytes=65_536, **options)


def await_waiting(broker: Broker, queue: str, count: int) -> None:
    """Return once so many leases wait for the queue."""
    end = time.monotonic() + PATIENCE
    while len(inside(broker)._lessees.lines.get(queue, ())) < count:
        assert time.monotonic() < end, "nobody waits"
        time.sleep(0.001)


# -- The order of the log is an order that explains every answer


class Call(NamedTuple):
    """One call that changed something: its record, when it began and ended, and how the model makes it again."""

    lsn: int
    began: int
    ended: int
    again: Callable[[Model], object]
    answer: object


class Witness:
    """Makes calls and remembers them with the number of their record."""

    def __init__(self, broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[Call] = []
        self._broker = broker
        self._moments = itertools.count()
        self._mine = threading.local()
        honest = rivetq.engines.durable.DurableEngine._record

        def record(engine: Any, *args: Any) -> int:
            self._mine.lsn = lsn = honest(engine, *args)
            return lsn

        monkeypatch.setattr(rivetq.engines.durable.DurableEngine, "_record", record)

    def call(self, verb: str, *args: Any, again: Callable[[Any], Callable[[Model], object]], **options: Any) -> Any:
        """`again` makes, of the broker's answer, the same call on the model: it returns what the answer should be."""
        self._mine.lsn = 0
        began = next(self._moments)
        answer = getattr(self._broker, verb)(*args, **options)
        ended = next(self._moments)
        if self._mine.lsn:
            self.calls.append(Call(self._mine.lsn, began, ended, again(answer), answer))
        return answer


def enqueued(
    payloads: list[bytes], keys: list[str | None], priority: int
) -> Callable[[Any], Callable[[Model], object]]:
    def again(answer: Any) -> Callable[[Model], object]:
        ids = [answer] if isinstance(answer, int) else list(answer)

        def on(model: Model) -> object:
            due = model.enqueue("q", list(zip(payloads, keys, strict=True)), ids, priority=priority)
            return due[0] if isinstance(answer, int) else due

        return on

    return again


def leased(most: int) -> Callable[[Any], Callable[[Model], object]]:
    def again(answer: list[Lease]) -> Callable[[Model], object]:
        def on(model: Model) -> object:
            jobs = model.lease(["q"], most, [lease.token for lease in answer])
            facts = [(job.id, job.token, job.payload, job.attempts, job.last_error) for job in jobs]
            assert facts == [(each.id, each.token, each.payload, each.attempt, each.last_error) for each in answer]
            return answer

        return on

    return again


def answered(verb: str, *args: Any, **options: Any) -> Callable[[Any], Callable[[Model], object]]:
    def again(answer: Any) -> Callable[[Model], object]:
        def on(model: Model) -> object:
            return getattr(model, verb)(*args, **options)

        return on

    return again


@pytest.mark.usefixtures("restless")
@pytest.mark.parametrize("fsync", ["always", "never"])
def test_the_order_of_the_log_is_the_order_in_time_and_explains_every_answer(
    tmp_path: Path, fsync: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """32 threads. (a) A call that ended before another began has the lower record. (b) One thread that makes the
    calls in the order of their records, on the model, gets every answer."""
    with opened(tmp_path, fsync, clock=ManualClock()) as broker:
        witness = Witness(broker, monkeypatch)
        broker.configure_queue("q", retry=AT_ONCE, visibility_timeout=3600)

        def work(number: int) -> None:
            rng = random.Random(number)
            for n in range(25):
                payload, priority = b"%d.%d" % (number, n), rng.choice((3, 5, 9))
                if rng.random() < 0.5:
                    key = f"k{rng.randrange(200)}" if rng.random() < 0.3 else None
                    witness.call(
                        "enqueue", "q", payload, priority=priority, idempotency_key=key,
                        again=enqueued([payload], [key], priority),
                    )  # fmt: skip
                else:
                    witness.call(
                        "enqueue_many", "q", [payload] * 3, priority=priority,
                        again=enqueued([payload] * 3, [None] * 3, priority),
                    )  # fmt: skip
                for lease in witness.call("lease_many", "q", 2, again=leased(2)):
                    settle(lease, rng)

        def settle(lease: Lease, rng: random.Random) -> None:
            ref = (lease.id, lease.token)
            match rng.randrange(5):
                case 0:
                    witness.call(
                        "nack", lease, error="no", delay=0, again=answered("nack", ref, error="no", delay_ms=0)
                    )
                case 1:
                    witness.call("release", lease, again=answered("release", ref))
                case 2:
                    witness.call("reject", lease, error="bad", again=answered("reject", ref, error="bad"))
                    witness.call("cancel", lease.id, again=answered("cancel", lease.id))
                case _:
                    witness.call("ack", lease, again=answered("ack", [ref]))

        in_threads(32, work)
        calls = sorted(witness.calls, key=lambda call: call.lsn)
        assert len(calls) > 32 * 60
        assert len({call.lsn for call in calls}) == len(calls)
        latest = 0
        for call in calls:
            assert call.ended > latest, f"record {call.lsn} came behind one whose call began after this had ended"
            latest = max(latest, call.began)
        model = Model(0)
        model.configure("q", retry=Policy(None, 0.0, 2.0, 3600.0, "none"), visibility_ms=3_600_000)
        for call in calls:
            assert call.again(model) == call.answer, f"record {call.lsn}"
        stats, expected = broker.stats("q"), model.stats("q")
        assert {name: getattr(stats, name) for name in expected if name != "oldest_age"} == {
            name: value for name, value in expected.items() if name != "oldest_age"
        }


# -- Lost and twice


@pytest.mark.usefixtures("restless")
@pytest.mark.parametrize(("fsync", "threads"), [("always", 32), ("never", 16), ("interval", 16), (":memory:", 16)])
def test_after_a_drain_every_job_was_acked_once_and_no_two_held_one_at_a_time(
    tmp_path: Path, fsync: str, threads: int
) -> None:
    per_thread = 40
    put: dict[int, bytes] = {}
    held: dict[int, int] = {}  # job -> token of the lease that somebody works on
    history: dict[int, list[int]] = defaultdict(list)
    acked: Counter[int] = Counter()
    guard = threading.Lock()
    with opened(tmp_path, fsync) as broker:

        def work(number: int) -> None:
            mine = itertools.count()
            for n in range(per_thread):
                payload = f"{number}.{n}".encode()
                if n % 4:
                    ids = [broker.enqueue("q", payload, priority=n % 10, retry=AT_ONCE)]
                else:
                    ids = list(broker.enqueue_many("q", [payload] * 2, retry=AT_ONCE))
                with guard:
                    put.update(dict.fromkeys(ids, payload))
                take(next(mine))
            while broker.stats("q").ready:
                take(next(mine))

        def take(turn: int) -> None:
            for lease in broker.lease_many("q", 1 + turn % 3):
                with guard:
                    assert lease.id not in held, f"job {lease.id} is leased twice at a time"
                    held[lease.id] = lease.token
                    history[lease.id].append(lease.token)
                again = turn % 7 == 0 and lease.attempt == 1
                stale = LeaseRef(lease.id, lease.token)
                with guard:  # given up before the broker is told: from then on somebody else may have it
                    del held[lease.id]
                if again:
                    lease.nack(error="again")
                elif turn % 5 == 0:
                    with broker.transaction() as tx:
                        tx.ack(lease)
                        tx.enqueue("done", lease.payload)
                else:
                    lease.ack()
                if not again:
                    with guard:
                        acked[lease.id] += 1
                with pytest.raises(LeaseLostError):
                    broker.ack(stale)

        in_threads(threads, work)
        while leases := broker.lease_many("q", 100):
            for lease in leases:
                acked[lease.id] += 1
            broker.ack_many(leases)
        lost, unexpected = put.keys() - acked.keys(), acked.keys() - put.keys()
        assert (len(lost), len(unexpected)) == (0, 0)
        assert set(acked.values()) == {1}
        for job_id, tokens in history.items():
            assert tokens == sorted(set(tokens)), f"job {job_id}: tokens {tokens} do not increase"
        stats = broker.stats("q")
        assert (stats.enqueued, stats.acked) == (len(put), len(put))
        inside(broker).audit()
        if fsync != ":memory:":
            state = inside(broker).dump()
    if fsync != ":memory:":
        with opened(tmp_path, fsync) as broker:
            assert inside(broker).dump() == state


@pytest.mark.usefixtures("restless")
def test_a_key_that_many_threads_enqueue_makes_one_job(tmp_path: Path) -> None:
    told: dict[str, set[int]] = defaultdict(set)
    with Broker(tmp_path / "q") as broker:

        def work(number: int) -> None:
            for n in range(30):
                told[f"k{n}"].add(broker.enqueue("q", b"x", idempotency_key=f"k{n}"))

        in_threads(16, work)
        assert all(len(ids) == 1 for ids in told.values())
        assert broker.stats("q").enqueued == 30


@pytest.mark.usefixtures("restless")
def test_calls_go_on_while_the_log_is_rotated_checkpointed_and_compacted(tmp_path: Path) -> None:
    over = threading.Event()
    acked: set[int] = set()
    put: set[int] = set()
    with Broker(tmp_path / "q", segment_bytes=65_536, fsync="never", cache_bytes=0) as broker:

        def work(number: int) -> None:
            if number < 3:
                verb = (broker.rotate, broker.checkpoint, broker.compact)[number]
                while not over.is_set():
                    verb()
                    broker.jobs("q", limit=20)
                return
            try:
                for n in range(60):
                    put.add(broker.enqueue("q", bytes([n]) * 700, retry=AT_ONCE, idempotency_key=f"{number}.{n}"))
                    if n % 3:
                        lease = broker.lease("q")
                        assert lease is not None
                        assert lease.payload == lease.payload[:1] * 700
                        lease.ack()
                        acked.add(lease.id)
            finally:
                if number == 3:
                    over.set()

        in_threads(8, work)
        inside(broker).audit()
        assert {job.id for job in broker.jobs("q", limit=10_000)} == put - acked
        assert all(broker.find("q", f"{number}.{n}") for number in range(3, 8) for n in range(60))
        state = inside(broker).dump()
    with Broker(tmp_path / "q", segment_bytes=65_536) as broker:
        assert inside(broker).dump() == state


# -- Group commit


class SlowDisk(SystemDisk):
    """Syncs take a millisecond at least: on a disk that answers at once there would be nobody to share one with."""

    def fdatasync(self, fd: int) -> None:  # type: ignore[override]  # a method in place of a builtin
        time.sleep(0.001)
        os.fdatasync(fd)


def test_many_threads_share_one_sync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rivetq.engines.local.SystemDisk", SlowDisk)
    with Broker(tmp_path / "q") as broker:
        before = broker.metrics()
        in_threads(16, lambda number: [broker.enqueue("q", b"x") for _ in range(40)])
        after = broker.metrics()
    records, syncs = (after[name] - before[name] for name in ("records", "fsyncs"))
    assert records == 16 * 40
    assert records / syncs > 2, f"{records} records in {syncs} syncs"


def test_a_lone_thread_has_a_sync_per_call_and_a_lease_has_none(tmp_path: Path) -> None:
    with Broker(tmp_path / "q") as broker:
        broker.enqueue("q", b"x")
        before = broker.metrics()["fsyncs"]
        for _ in range(10):
            broker.enqueue("q", b"x")
        assert broker.metrics()["fsyncs"] - before == 10
        leases = [broker.lease("q") for _ in range(5)]
        assert broker.metrics()["fsyncs"] - before == 10
        for lease in leases:
            assert lease is not None
            lease.ack()
        assert broker.metrics()["fsyncs"] - before == 15


# -- Waiting


@pytest.mark.parametrize("how", ["one by one", "a batch", "a transaction"])
@pytest.mark.parametrize("fsync", ["always", ":memory:"])
def test_of_n_waiting_leases_each_gets_one_of_n_jobs(tmp_path: Path, fsync: str, how: str) -> None:
    got: list[int] = []
    with opened(tmp_path, fsync) as broker:

        def work(number: int) -> None:
            if number:
                lease = broker.lease("q", wait=PATIENCE)
                assert lease is not None, "a waiting lease was forgotten"
                got.append(lease.id)
                return
            await_waiting(broker, "q", 16)
            if how == "one by one":
                for _ in range(16):
                    broker.enqueue("q", b"x")
            elif how == "a batch":
                broker.enqueue_many("q", [b"x"] * 16)
            else:
                with broker.transaction() as tx:
                    for _ in range(16):
                        tx.enqueue("q", b"x")

        in_threads(17, work)
        assert len(set(got)) == 16


def test_two_transactions_that_meet_in_one_reservation_get_ids_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """More ids than one reservation sets aside: who comes second has to reserve again."""
    with Broker(":memory:") as broker:
        engine = inside(broker)
        settle, both_have_reserved = engine._settle, threading.Barrier(2)
        turns = iter(range(2))

        def meet(*args: Any, **options: Any) -> None:
            settle(*args, **options)
            if next(turns, None) is not None:
                both_have_reserved.wait(PATIENCE)

        def put(number: int) -> None:
            with broker.transaction() as tx:
                tx.enqueue_many("q", [b""] * 3 * rivetq.engines.live.ID_BLOCK)

        monkeypatch.setattr(engine, "_settle", meet)
        in_threads(2, put)
        ids = [job.id for job in broker.jobs("q", limit=10_000)]
        assert len(ids) == 6 * rivetq.engines.live.ID_BLOCK


@pytest.mark.usefixtures("restless")
def test_leases_that_wait_for_several_queues_forget_no_job(tmp_path: Path) -> None:
    got: list[int] = []
    queues = ["a", "b", "c"]
    with Broker(tmp_path / "q", fsync="never") as broker:

        def work(number: int) -> None:
            if number < 3:
                for _ in range(80):
                    broker.enqueue(queues[number], b"x")
                return
            names = queues[number % 3 :] + queues[: number % 3]
            for _ in range(20):
                lease = broker.lease(names, wait=PATIENCE)
                assert lease is not None, "a waiting lease was forgotten"
                got.append(lease.id)

        in_threads(3 + 12, work)
        assert len(set(got)) == 240


@pytest.mark.parametrize("queues", [["q"], ["other", "q"]])
def test_a_waiter_killed_by_an_exception_hands_its_wake_up_on(
    tmp_path: Path, queues: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    got: list[int] = []
    died: list[str] = []
    with Broker(tmp_path / "q") as broker:
        park = rivetq.engines.lessees.SleepingLessee.park

        def park_and_die(lessee: rivetq.engines.lessees.SleepingLessee, timeout_s: float | None) -> None:
            park(lessee, timeout_s)
            if threading.current_thread() is first:
                raise KeyboardInterrupt  # just when the job below has woken it, and nobody else

        monkeypatch.setattr(rivetq.engines.lessees.SleepingLessee, "park", park_and_die)

        def wait_and_die() -> None:
            try:
                broker.lease(queues, wait=PATIENCE)
            except KeyboardInterrupt:
                died.append("first")

        def wait() -> None:
            lease = broker.lease("q", wait=PATIENCE)
            assert lease is not None
            got.append(lease.id)

        first = threading.Thread(target=wait_and_die, daemon=True)
        first.start()
        await_waiting(broker, "q", 1)
        second = threading.Thread(target=wait, daemon=True)
        second.start()
        await_waiting(broker, "q", 2)
        job_id = broker.enqueue("q", b"x")
        second.join(PATIENCE / 4)
        first.join(PATIENCE / 4)
        assert (died, got) == (["first"], [job_id])
        assert not inside(broker)._lessees.lines


def test_a_wait_that_ends_leaves_nobody_behind(tmp_path: Path) -> None:
    with Broker(tmp_path / "q") as broker:
        in_threads(8, lambda number: broker.lease(["q", "r"], wait=0.01))
        assert not inside(broker)._lessees.lines


@pytest.mark.parametrize("waits", ["in a thread", "soon"])
def test_who_was_woken_for_two_queues_and_takes_from_one_wakes_the_next_for_the_other(waits: str) -> None:
    got: list[tuple[str, str]] = []
    with Broker(":memory:") as broker:

        def wait(name: str, queues: list[str]) -> None:
            def take() -> None:
                lease = broker.lease(queues, wait=None)
                got.append((name, lease.queue if lease is not None else "nothing"))

            def told(leases: list[Lease] | None, error: BaseException | None) -> None:
                got.append((name, leases[0].queue if leases else repr(error)))

            if waits == "soon":
                broker.lease_soon(queues, 1, told)
            else:
                threading.Thread(target=take, daemon=True).start()

        wait("first", ["a", "b"])
        await_waiting(broker, "b", 1)
        wait("second", ["b"])
        await_waiting(broker, "b", 2)
        with broker.transaction() as tx:  # two jobs, and the first in line is woken for both
            tx.enqueue("a", b"")
            tx.enqueue("b", b"")
        _await(lambda: len(got) == 2)
        assert sorted(got) == [("first", "a"), ("second", "b")]


# -- The end


def open_files(directory: Path) -> list[str]:
    """What this process has open in a directory."""
    links = []
    for fd in Path("/proc/self/fd").iterdir():
        try:
            links.append(os.readlink(fd))
        except FileNotFoundError:
            continue  # the one that was open for this look
    return [link for link in links if link.startswith(str(directory))]


@pytest.mark.parametrize("fsync", ["always", "never", "interval", ":memory:"])
def test_close_amid_calls_ends_them_all_and_leaves_nothing_behind(tmp_path: Path, fsync: str) -> None:
    before = set(threading.enumerate())
    broker = opened(tmp_path, fsync, cache_bytes=0)
    broker.enqueue_many("q", [b"x" * 5000] * 50)
    begun: list[int] = []
    answered: list[int] = []

    def until_closed(call: Callable[[], object]) -> None:
        begun.append(1)
        with pytest.raises(BrokerClosedError):
            while True:
                call()

    def put() -> None:
        answered.append(broker.enqueue("put", b"x" * 500))

    def put_in_a_transaction() -> None:
        with broker.transaction() as tx:
            told = tx.enqueue("put", b"x")
        answered.append(told)

    def take() -> None:
        lease = broker.lease("q", visibility_timeout=100)
        if lease is not None:
            lease.release()

    calls: list[Callable[[], object]] = [
        put, put, put_in_a_transaction, take, take,
        lambda: broker.jobs("q"),
        lambda: broker.lease("empty", wait=None),
        lambda: broker.lease_many(["empty", "void"], 5, wait=PATIENCE * 3),
        broker.checkpoint, broker.compact, broker.sync,
    ]  # fmt: skip
    took: list[float] = []

    def work(number: int) -> None:
        if number < len(calls):
            return until_closed(calls[number])
        while len(begun) < len(calls) or len(answered) < 20:
            time.sleep(0.001)
        started = time.monotonic()
        broker.close()
        return took.append(time.monotonic() - started)

    in_threads(len(calls) + 3, work)
    assert len(took) == 3
    assert max(took) < 5
    assert set(threading.enumerate()) <= before
    if fsync == ":memory:":
        return
    assert not open_files(tmp_path)
    with opened(tmp_path, fsync) as broker:
        present: set[int] = set()
        while page := broker.jobs("put", after=max(present, default=0), limit=10_000):
            present |= {job.id for job in page}
        assert set(answered) <= present, "what was answered before the end is lost"
        assert broker.stats("q").ready == 50
        inside(broker).audit()


class HeldDisk(SystemDisk):
    """While `gate` is shut, a sync hangs in it."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.met = threading.Event()

    def fdatasync(self, fd: int) -> None:  # type: ignore[override]  # a method in place of a builtin
        if not self.gate.is_set():
            self.met.set()
        self.gate.wait(PATIENCE)
        os.fdatasync(fd)


def test_close_waits_for_the_sync_that_a_call_has_under_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    disk = HeldDisk()
    monkeypatch.setattr("rivetq.engines.local.SystemDisk", lambda: disk)
    broker = Broker(tmp_path / "q")
    broker.enqueue("q", b"x")
    disk.gate.clear()
    before_lsn = inside(broker)._last_lsn()

    def work(number: int) -> None:
        if number == 0:
            broker.enqueue("q", b"under way")
        elif number == 1:
            assert disk.met.wait(PATIENCE)
            while inside(broker)._last_lsn() == before_lsn:  # the keeper's own checkpoint may sync first
                time.sleep(0.001)
            broker.close()
        else:
            while inside(broker)._ended is None:
                time.sleep(0.001)
            time.sleep(0.1)  # for close() to come as far as it can
            disk.gate.set()

    in_threads(3, work)
    assert not [record.getMessage() for record in caplog.records if record.name == "rivetq"]
    with Broker(tmp_path / "q") as broker:
        assert broker.stats("q").ready == 2


def test_close_may_come_twice(tmp_path: Path) -> None:
    with Broker(tmp_path / "q") as broker:
        broker.enqueue("q", b"x")
        broker.close()
        broker.close()
    with Broker(tmp_path / "q") as broker:
        assert broker.stats("q").ready == 1


def interrupt(*args: object, **options: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("where", ["_stop", "_finish"])
def test_a_close_that_was_cut_short_is_finished_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Also by the one at the end of the program."""
    broker = Broker(tmp_path / "q", clock=ManualClock(), fsync="never")
    broker.enqueue("q", b"x")
    log = inside(broker)._log
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(rivetq.engines.local.LocalEngine, where, interrupt)
        broker.close()
    with pytest.raises(BrokerClosedError):
        broker.stats()
    broker.close()
    if where == "_stop":  # it had not begun to save
        assert log.durable_lsn == log.next_lsn - 1
    with Broker(tmp_path / "q") as broker:
        assert broker.stats("q").ready == 1


def test_an_interrupt_in_the_middle_of_a_rotation_stops_the_broker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The log knows of the new segment in one place and not in another."""
    with Broker(tmp_path / "q") as broker:
        broker.enqueue("q", b"x")
        monkeypatch.setattr(inside(broker)._log._files, "put", interrupt)
        with pytest.raises(KeyboardInterrupt):
            broker.rotate()
        with pytest.raises(BrokerFailedError):
            broker.enqueue("q", b"y")
    with Broker(tmp_path / "q") as broker:
        assert broker.stats("q").ready == 1


def test_what_a_close_lets_go_of_it_lets_go_of_whatever_becomes_of_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broker = Broker(tmp_path / "q")
    broker.enqueue("q", b"x")
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(inside(broker)._log, "abandon", interrupt)
        broker.close()
    with Broker(tmp_path / "q") as broker:  # though nobody called close() once more
        assert broker.stats("q").ready == 1


@pytest.mark.parametrize("name", ["rivetq-timer", "rivetq-keeper", "rivetq-sync"])
def test_an_opening_that_gets_no_thread_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    start = threading.Thread.start

    def limited(thread: threading.Thread) -> None:
        if thread.name == name:
            raise RuntimeError("can't start new thread")
        start(thread)

    with monkeypatch.context() as patched, pytest.raises(StorageError, match="can't start new thread"):
        patched.setattr(threading.Thread, "start", limited)
        Broker(tmp_path / "q", fsync="interval")
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("rivetq")]
    with Broker(tmp_path / "q") as broker:
        broker.enqueue("q", b"x")


def test_a_lock_that_nobody_knows_of_any_more_is_let_go(tmp_path: Path) -> None:
    lock = DirectoryLock(str(tmp_path), 0)
    with pytest.raises(BrokerLockedError):
        DirectoryLock(str(tmp_path), 0)
    del lock
    DirectoryLock(str(tmp_path), 0).release()


@pytest.mark.parametrize("path", ["q", ":memory:"])
def test_after_close_every_call_raises_and_says_that_nothing_was_done(tmp_path: Path, path: str) -> None:
    broker = Broker(path if path == ":memory:" else tmp_path / path)
    broker.enqueue_many("q", [b"x"] * 3)
    lease, other, entered = broker.lease_many("q", 3)
    tx = broker.transaction()
    tx.__enter__()
    tx.enqueue("q", b"never")
    entered.__enter__()
    broker.close()
    calls: dict[str, Callable[[], object]] = {
        "enqueue": lambda: broker.enqueue("q", b"x"),
        "enqueue_many": lambda: broker.enqueue_many("q", [b"x"]),
        "enqueue_many of none": lambda: broker.enqueue_many("q", []),
        "lease": lambda: broker.lease("q"),
        "lease, waiting": lambda: broker.lease("q", wait=None),
        "lease_many": lambda: broker.lease_many("q", 3),
        "ack": lambda: broker.ack(lease),
        "ack_many": lambda: broker.ack_many([lease]),
        "ack_many of none": lambda: broker.ack_many([]),
        "nack": lambda: broker.nack(lease),
        "release": lambda: broker.release(lease),
        "reject": lambda: broker.reject(lease),
        "extend": lambda: broker.extend(lease, 1),
        "extend by reference": lambda: broker.extend(LeaseRef(lease.id, lease.token), 1),
        "lease.ack": lambda: lease.ack(),
        "lease.nack": lambda: lease.nack(),
        "lease.release": lambda: lease.release(),
        "lease.reject": lambda: lease.reject(),
        "lease.extend": lambda: lease.extend(1),
        "end of a with block": lambda: entered.__exit__(None, None, None),
        "tx.enqueue": lambda: tx.enqueue("q", b"x"),
        "tx.ack": lambda: tx.ack(other),
        "end of a transaction": lambda: tx.__exit__(None, None, None),
        "configure_queue": lambda: broker.configure_queue("q", max_jobs=3),
        "configure_queue, looking": lambda: broker.configure_queue("q"),
        "pause": lambda: broker.pause("q"),
        "resume": lambda: broker.resume("q"),
        "purge": lambda: broker.purge("q"),
        "cancel": lambda: broker.cancel(1),
        "redrive": lambda: broker.redrive("q"),
        "redrive of none": lambda: broker.redrive("q", job_ids=[]),
        "find": lambda: broker.find("q", "key"),
        "get": lambda: broker.get(1),
        "jobs": lambda: broker.jobs("q"),
        "dead_letters": lambda: broker.dead_letters("q"),
        "queues": lambda: broker.queues(),
        "stats": lambda: broker.stats(),
        "sync": lambda: broker.sync(),
        "checkpoint": lambda: broker.checkpoint(),
        "compact": lambda: broker.compact(),
        "rotate": lambda: broker.rotate(),
        "metrics": lambda: broker.metrics(),
        "backup": lambda: broker.backup("nowhere"),
    }
    outcomes: dict[str, str] = {}
    for name, call in calls.items():
        try:
            call()
        except BrokerClosedError as error:
            outcomes[name] = error.outcome
        else:
            outcomes[name] = "no error"
    assert {name: outcome for name, outcome in outcomes.items() if outcome != "not_done"} == {}


# -- what a review found


class StalledDisk(SystemDisk):
    """Its next sync waits until it may go on."""

    def __init__(self) -> None:
        self.stalls = False
        self.begun, self.may_go_on = threading.Event(), threading.Event()

    def fdatasync(self, fd: int) -> None:  # type: ignore[override]  # a method in place of a builtin
        if self.stalls:
            self.stalls = False
            self.begun.set()
            assert self.may_go_on.wait(PATIENCE)
        os.fdatasync(fd)


def test_an_interrupt_of_a_parked_caller_leaves_the_sync_of_another_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = StalledDisk()
    monkeypatch.setattr(rivetq.engines.local, "SystemDisk", lambda: disk)
    with Broker(tmp_path / "q") as broker:
        broker.enqueue("q", b"")
        disk.stalls = True
        first = threading.Thread(target=broker.enqueue, args=("q", b""), daemon=True)
        first.start()
        assert disk.begun.wait(PATIENCE)
        parked = inside(broker)._group._join

        def interrupted(waiter: Any) -> None:
            with monkeypatch.context() as patch:
                patch.setattr(waiter, "lock", InterruptedLock())
                parked(waiter)

        monkeypatch.setattr(inside(broker)._group, "_join", interrupted)
        with pytest.raises(KeyboardInterrupt):
            broker.enqueue("q", b"")
        monkeypatch.setattr(inside(broker)._group, "_join", parked)
        disk.may_go_on.set()
        first.join(PATIENCE)
        broker.enqueue("q", b"")
        assert broker.stats("q").ready == 4, "the interrupted one is there too: its outcome was open"


class InterruptedLock:
    """Whoever waits for it is interrupted."""

    def acquire(self, timeout: float | None = None) -> None:
        raise KeyboardInterrupt

    def release(self) -> None:
        """Nobody waits any more."""

    def locked(self) -> bool:
        return True


@pytest.mark.parametrize("fsync", ["always", ":memory:"])
def test_a_forked_child_is_refused_though_a_lock_was_held_and_somebody_waited(tmp_path: Path, fsync: str) -> None:
    broker = opened(tmp_path, fsync)
    engine = inside(broker)

    def wait() -> None:
        with contextlib.suppress(BrokerClosedError):
            broker.lease("q", wait=None)

    waits = threading.Thread(target=wait, daemon=True)
    waits.start()
    _await(lambda: bool(engine._lessees.lines))
    before = engine._ended
    engine._lock.acquire()
    try:
        engine._ended = "forked"
        with pytest.raises(ForkedBrokerError):
            in_threads(1, lambda _: broker.enqueue("q", b""))
    finally:
        engine._ended = before
        engine._lock.release()
    broker.close()
    waits.join(PATIENCE)


def test_a_failure_while_a_lessee_lies_down_wakes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    broker = Broker(":memory:")
    engine = inside(broker)
    register = engine._lessees.add

    def register_late(*args: Any) -> None:
        engine._fail(OSError("meanwhile"))  # by a thread that needs no lock: nobody is registered yet
        register(*args)

    monkeypatch.setattr(engine._lessees, "add", register_late)
    with pytest.raises(BrokerFailedError):
        in_threads(1, lambda _: broker.lease("q", wait=None))
    broker.close()


def test_who_gets_up_too_early_keeps_its_place_in_the_line() -> None:
    with Broker(":memory:") as broker:
        engine = inside(broker)
        got: list[str] = []

        def wait(name: str) -> None:
            if broker.lease("q", wait=PATIENCE):
                got.append(name)

        threads = [threading.Thread(target=wait, args=(name,), daemon=True) for name in ("first", "second")]
        for count, thread in enumerate(threads, 1):
            thread.start()
            _await(lambda count=count: len(engine._lessees.lines.get("q", ())) == count)
        line = list(engine._lessees.lines["q"])
        with engine._lock:
            engine._lessees.wake_early(engine._machine, [Enqueue("q", [b""])])
        _await(line[0]._asleep.locked)
        assert list(engine._lessees.lines["q"]) == line
        broker.enqueue("q", b"")
        threads[0].join(PATIENCE)
        assert got == ["first"]
        broker.enqueue("q", b"")
        threads[1].join(PATIENCE)


def test_nobody_gets_up_for_a_job_of_a_paused_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    woken: list[object] = []
    wake = rivetq.engines.lessees.SleepingLessee.wake
    with Broker(":memory:") as broker:
        broker.pause("q")
        waits = threading.Thread(target=lambda: broker.lease("q", wait=PATIENCE), daemon=True)
        waits.start()
        _await(lambda: bool(inside(broker)._lessees.lines))
        monkeypatch.setattr(
            rivetq.engines.lessees.SleepingLessee, "wake", lambda self: (woken.append(self), wake(self))[1]
        )
        broker.enqueue("q", b"")
        assert woken == []
        broker.resume("q")
        waits.join(PATIENCE)
        assert not waits.is_alive()
        assert woken


def _await(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it never became true"
        time.sleep(0.001)


# -- tokens of a rate limit, and callbacks


def test_who_waits_behind_one_that_gave_up_gets_the_token(tmp_path: Path) -> None:
    """The first in the line is woken for a job, finds no token, and its own wait ends before there is one."""
    with opened(tmp_path, "never") as broker:
        broker.configure_queue("q", rate_limit=RateLimit(2, 1))
        broker.enqueue("q", b"")
        assert broker.lease("q") is not None
        took: dict[int, bool] = {}

        def work(number: int) -> None:
            if number == 0:
                took[number] = broker.lease("q", wait=0.2) is not None
            elif number == 1:
                waits_until(broker, 1)
                took[number] = broker.lease("q", wait=PATIENCE / 2) is not None
            else:
                waits_until(broker, 2)
                broker.enqueue("q", b"")

        started = time.monotonic()
        in_threads(3, work)
        assert took == {0: False, 1: True}
        assert time.monotonic() - started < PATIENCE / 2


def waits_until(broker: Broker, count: int) -> None:
    """So many wait for the queue "q"."""
    end = time.monotonic() + PATIENCE
    while len(inside(broker)._lessees.lines.get("q", ())) < count:
        assert time.monotonic() < end
        time.sleep(0.001)


def test_a_token_wakes_as_many_as_there_are_tokens_and_jobs() -> None:
    clock = ManualClock()
    with Broker(":memory:", clock=clock) as broker:
        broker.configure_queue("q", rate_limit=RateLimit(1, 1))
        broker.enqueue_many("q", [b"first", b"second", b"third"])
        assert broker.lease("q") is not None
        got: list[bytes] = []

        def done(leases: list[Lease] | None, error: BaseException | None) -> None:
            got.extend(lease.payload for lease in leases or ())

        for _ in range(3):
            broker.lease_soon("q", 1, done)
        for second, payload in enumerate((b"second", b"third"), 1):
            assert next_wakeup_ms(inside(broker)._machine) is not None
            clock.advance(1)
            settles(lambda second=second: len(got) == second)
            assert got[-1] == payload


def settles(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.001)


def test_a_callback_that_raises_disturbs_nobody_else(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with opened(tmp_path, "always") as broker:
        told: list[int] = []

        def mistake(leases: list[Lease] | None, error: BaseException | None) -> None:
            told.append(0)
            raise ZeroDivisionError

        broker.lease_soon("q", 1, mistake)
        broker.lease_soon("other", 1, lambda leases, error: told.append(1))
        broker.enqueue("q", b"")
        settles(lambda: told == [0])
        broker.enqueue("other", b"")
        settles(lambda: told == [0, 1])
        assert "a callback raised" in caplog.text
        assert broker.health().is_well


def test_a_callback_for_which_memory_runs_out_is_called_once_more(tmp_path: Path) -> None:
    with opened(tmp_path, "always") as broker:
        told: list[bytes] = []
        calls = itertools.count()

        def done(leases: list[Lease] | None, error: BaseException | None) -> None:
            if not next(calls):
                raise MemoryError
            told.extend(lease.payload for lease in leases or ())

        broker.lease_soon("q", 1, done)
        broker.enqueue("q", b"one")
        settles(lambda: told == [b"one"])
        assert next(calls) == 2
        assert broker.health().is_well


def test_a_notifier_that_cannot_go_on_fails_the_broker_and_tells_all(tmp_path: Path) -> None:
    """Out of memory in its own code, say."""
    with opened(tmp_path, "always") as broker:
        told: list[BaseException | None] = []
        broker.lease_soon("q", 1, lambda leases, error: told.append(error))
        notifier = inside(broker)._notifier
        turn = notifier._turn
        notifier._turn = mock.Mock(side_effect=[MemoryError("no memory"), *[True] * 3, False])  # type: ignore[method-assign]  # it fails once
        notifier._poked.set()
        settles(lambda: broker.health().state == "failed")
        notifier._turn = turn  # type: ignore[method-assign]  # as it was
        assert "no memory" in str(broker.health().last_error)
        with pytest.raises(BrokerFailedError):
            broker.enqueue("q", b"")


def test_a_lease_that_is_taken_while_the_broker_closes_tells_its_waiter_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the taking and the callback the notifier has ended: nothing may be left with it."""
    broker = opened(tmp_path, "always")
    broker.enqueue("q", b"")
    hand_out = rivetq.engines.leasing.SoonLease._hand_out

    def late(self: rivetq.engines.leasing.SoonLease, taken: Any) -> None:
        broker.close()
        hand_out(self, taken)

    monkeypatch.setattr(rivetq.engines.leasing.SoonLease, "_hand_out", late)
    told: list[BaseException | None] = []
    broker.lease_soon("q", 1, lambda leases, error: told.append(error))
    settles(lambda: bool(told))
    assert isinstance(told[0], BrokerClosedError)


def test_no_notifier_begins_behind_a_close(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broker = opened(tmp_path, "always")
    engine, before = inside(broker), set(threading.enumerate())
    check = engine._check

    def then_close() -> None:
        monkeypatch.setattr(engine, "_check", check)
        check()
        broker.close()

    monkeypatch.setattr(engine, "_check", then_close)  # of the call below: a close right behind its first look
    with pytest.raises(BrokerClosedError):
        broker.lease_soon("q", 1, lambda leases, error: None)
    settles(lambda: not {t for t in threading.enumerate() if t.name.startswith("rivetq")} - before)


def test_a_waiting_lease_in_a_child_that_was_forked_under_the_lock_is_refused_at_once(tmp_path: Path) -> None:
    with opened(tmp_path, "always") as broker:
        engine = inside(broker)
        waiting = broker.lease_soon("empty", 1, lambda leases, error: None)
        with engine._lock:  # as if another thread had it: it does not exist in the child
            child = os.fork()
            if not child:
                signal.alarm(5)  # the bar is a second; a machine may be slow, a hang is for ever
                refused = 0
                for call in (lambda: broker.lease("q", wait=None), lambda: broker.enqueue("q", b""), waiting.cancel):
                    try:
                        call()
                    except ForkedBrokerError:
                        refused += 1
                broker.close()
                os._exit(refused)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
        broker.enqueue("q", b"")


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_a_waiting_lease_that_is_broken_into_behind_its_take_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    with opened(tmp_path, "always") as broker:
        broker.enqueue("q", b"")

        def broken(self: object, taken: object) -> None:
            raise error

        monkeypatch.setattr(rivetq.engines.leasing.SoonLease, "_hand_out", broken)
        told: list[BaseException | None] = []
        with contextlib.suppress(KeyboardInterrupt):
            broker.lease_soon("q", 1, lambda leases, error: told.append(error))
        assert [type(each) for each in told] == [error]


def test_who_ends_by_an_error_hands_its_wake_up_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(tmp_path, "always") as broker:
        told: list[object] = []
        for _ in range(2):
            broker.lease_soon("q", 1, lambda leases, error: told.append(error or leases))
        attempt, calls = rivetq.engines.leasing.SoonLease._attempt, itertools.count()

        def first_fails(self: rivetq.engines.leasing.SoonLease) -> Any:
            if next(calls) == 0:
                raise MemoryError
            return attempt(self)

        monkeypatch.setattr(rivetq.engines.leasing.SoonLease, "_attempt", first_fails)
        broker.enqueue("q", b"")
        settles(lambda: len(told) == 2)
        assert isinstance(told[0], MemoryError)
        assert isinstance(told[1], list)


def test_a_lease_that_gets_in_line_while_the_broker_fails_is_told(tmp_path: Path) -> None:
    with opened(tmp_path, "always") as broker:
        engine = inside(broker)
        register = engine._lessees.add

        def fails(lessee: Any, queues: Any) -> None:
            engine._fail(OSError("a disk that went away"))
            register(lessee, queues)

        engine._lessees.add = fails  # type: ignore[method-assign]  # it fails
        told: list[BaseException | None] = []
        broker.lease_soon("q", 1, lambda leases, error: told.append(error))
        assert [type(each) for each in told] == [BrokerFailedError]


def test_a_told_id_waits_for_its_reservation_and_for_no_other_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = HeldDisk()
    monkeypatch.setattr("rivetq.engines.local.SystemDisk", lambda: disk)
    with Broker(tmp_path / "q") as broker, contextlib.ExitStack() as last:
        last.callback(disk.gate.set)  # a test that fails closes its broker, too
        engine = inside(broker)
        broker.enqueue("q", b"")  # the threads and files that there will be are there
        told: list[int] = []

        def reserve() -> None:
            told.append(engine.call(Reserve("q", 1)))

        before_lsn = engine._last_lsn()
        disk.gate.clear()
        first = threading.Thread(target=reserve, daemon=True)
        first.start()
        settles(lambda: engine._last_lsn() > before_lsn)  # written down, not on disk yet
        second = threading.Thread(target=reserve, daemon=True)
        second.start()
        settles(lambda: len(engine._machine.promised) == 1)
        second.join(0.2)
        assert told == [], "a power cut could still make these ids those of other jobs"
        disk.gate.set()
        for thread in (first, second):
            thread.join(PATIENCE)
        assert len(told) == 2
        before_lsn = engine._last_lsn()
        disk.gate.clear()
        enqueue = threading.Thread(target=broker.enqueue, args=("q", b""), daemon=True)
        enqueue.start()
        settles(lambda: engine._last_lsn() > before_lsn)
        reserve()  # which would hang with the other one's sync
        assert len(told) == 3
        disk.gate.set()
        enqueue.join(PATIENCE)
