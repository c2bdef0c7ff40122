"""What is particular to asyncio: no thread a call, cancelling, durability before the answer, leases without end."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from inside import inside

from rivetq import Broker, BrokerClosedError, BrokerFailedError, LeaseLostError, RateLimit, UsageError
from rivetq.aio import THREADS, AsyncBroker, _Answer, _Mailbox

PATIENCE_S = 20.0


def test_calls_at_the_same_time_share_their_syncs_and_one_thread(tmp_path: Path) -> None:
    async def main() -> None:
        async with AsyncBroker(tmp_path / "data") as broker:
            await broker.enqueue("q", b"first")  # the threads that there will be are there
            threads, before = threading.active_count(), (await broker.metrics())["fsyncs"]
            ids = await asyncio.gather(*(broker.enqueue("q", b"") for _ in range(400)))
            assert sorted(ids) == list(range(2, 402))
            leases = await broker.lease_many("q", 400)
            await asyncio.gather(*(lease.ack() for lease in leases))
            assert threading.active_count() <= threads + 1  # + 1: `metrics` above took one
            assert (await broker.metrics())["fsyncs"] - before < 80

    asyncio.run(main())


def test_an_answer_is_awaited_until_it_is_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with AsyncBroker(tmp_path / "data") as broker:
            disk, may_sync = inside(broker.broker)._disk, threading.Event()
            sync = disk.fdatasync

            def slow(fd: int) -> None:
                may_sync.wait(20)
                sync(fd)

            monkeypatch.setattr(disk, "fdatasync", slow, raising=False)
            enqueued = asyncio.create_task(broker.enqueue("q", b""))
            leased = asyncio.create_task(broker.lease("q", wait=20))
            await asyncio.sleep(0.1)
            assert not enqueued.done()
            assert not leased.done()  # a power cut could still take the job back
            assert inside(broker.broker)._log.durable_lsn < inside(broker.broker)._last_lsn()
            may_sync.set()
            lease = await leased
            assert lease is not None
            assert lease.id == await enqueued

    asyncio.run(main())


@pytest.mark.parametrize("fsync", ["interval", "never"])
def test_in_a_relaxed_mode_an_id_is_told_when_its_block_is_on_disk_and_the_loop_does_not_wait_for_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fsync: Any
) -> None:
    async def main() -> None:
        async with AsyncBroker(tmp_path / "data", fsync=fsync, fsync_interval=3600) as broker:
            engine = inside(broker.broker)
            syncing: list[int] = []
            sync = engine._disk.fdatasync

            def recording(fd: int) -> None:
                syncing.append(threading.get_ident())
                sync(fd)

            monkeypatch.setattr(engine._disk, "fdatasync", recording, raising=False)
            await broker.enqueue("q", b"")
            assert syncing
            assert threading.get_ident() not in syncing
            assert engine._must_sync
            assert engine._log.durable_lsn >= max(engine._must_sync)

    asyncio.run(main())


def test_a_failed_sync_reaches_everybody_who_awaits_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with AsyncBroker(tmp_path / "data") as broker:
            may_fail = threading.Event()

            def fails(fd: int) -> None:
                may_fail.wait(20)
                raise OSError("no disk")

            monkeypatch.setattr(inside(broker.broker)._disk, "fdatasync", fails, raising=False)
            calls = (broker.enqueue("q", b""), broker.enqueue("q", b""), broker.lease("p", wait=None))
            asyncio.get_running_loop().call_later(0.1, may_fail.set)
            answers = await asyncio.gather(*calls, return_exceptions=True)
            assert [type(answer) for answer in answers] == [BrokerFailedError] * 3
            assert all(isinstance(a, BrokerFailedError) and a.outcome == "unknown" for a in answers[:2])
            assert (await broker.health()).state == "failed"

    asyncio.run(main())


@pytest.mark.parametrize("seed", range(4))
def test_cancelling_a_waiting_lease_loses_no_job(tmp_path: Path, seed: int) -> None:
    random_ = random.Random(seed)

    async def impatient(broker: AsyncBroker, got: list[int]) -> None:
        while True:
            taking = asyncio.create_task(broker.lease("q", wait=None))
            for _ in range(random_.randrange(6)):
                await asyncio.sleep(random_.choice([0, 0, 0.001, 0.003]))
            taking.cancel()
            await asyncio.wait([taking])
            if taking.cancelled():
                continue
            lease = taking.result()
            assert lease is not None
            assert lease.attempt == 1  # whoever gave it back had it for nothing
            await lease.ack()
            got.append(lease.id)

    async def main() -> None:
        got: list[int] = []
        async with AsyncBroker(tmp_path / "data") as broker:
            tasks = [asyncio.create_task(impatient(broker, got)) for _ in range(8)]
            ids: list[int] = []
            for _ in range(100):
                ids.append(await broker.enqueue("q", b""))
                await asyncio.sleep(0)
            deadline = asyncio.get_running_loop().time() + 30
            while len(got) < len(ids) and asyncio.get_running_loop().time() < deadline:
                await asyncio.sleep(0.01)
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            assert sorted(got) == ids
            stats = await broker.stats("q")
            assert (stats.acked, stats.ready, stats.leased) == (100, 0, 0)

    asyncio.run(main())


@pytest.mark.parametrize("told", ["before", "after"])
def test_what_is_on_its_way_when_a_lease_is_cancelled_comes_back_though_its_loop_ends(
    monkeypatch: pytest.MonkeyPatch, told: str
) -> None:
    monkeypatch.setattr(_Mailbox, "_wake", lambda self: None)  # the loop does not come to it any more
    handing_out, cancelled = threading.Event(), threading.Event()

    def tell(self: _Answer, *answer: Any) -> None:
        if told == "after":
            handing_out.set()
            assert cancelled.wait(PATIENCE_S)
        found(self, *answer)
        handing_out.set()

    found = _Answer.tell
    monkeypatch.setattr(_Answer, "tell", tell)

    async def main(broker: AsyncBroker) -> None:
        waiting = asyncio.create_task(broker.lease("q", wait=None))
        await asyncio.sleep(0)
        enqueuing = threading.Thread(target=broker.broker.enqueue, args=("q", b""))
        enqueuing.start()
        await asyncio.to_thread(handing_out.wait, PATIENCE_S)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        cancelled.set()
        await asyncio.to_thread(enqueuing.join)

    with Broker(":memory:") as broker:
        asyncio.run(main(AsyncBroker(broker)))
        until = time.monotonic() + PATIENCE_S
        while broker.stats().leased and time.monotonic() < until:
            time.sleep(0.01)
        [job] = broker.jobs("q")
        assert (job.state, job.attempts) == ("ready", 0)


def test_leases_without_end_wait_for_more_and_leave_no_job_held() -> None:
    async def main() -> None:
        async with AsyncBroker(":memory:") as broker:
            await broker.enqueue_many("q", [0, 1])

            async def more() -> None:
                await asyncio.sleep(0.05)
                await broker.enqueue_many("q", [2, 3])

            adding = asyncio.create_task(more())
            got = []
            async for lease in broker.leases("q"):
                async with lease:
                    got.append(lease.json())
                if len(got) == 3:
                    break
            await adding
            assert got == [0, 1, 2]
            stats = await broker.stats("q")
            assert (stats.ready, stats.leased, stats.acked) == (1, 0, 3)

    asyncio.run(main())


def test_a_lease_waits_as_long_as_it_is_told() -> None:
    async def main() -> None:
        async with AsyncBroker(":memory:") as broker:
            started = asyncio.get_running_loop().time()
            assert await broker.lease("q", wait=0.1) is None
            assert asyncio.get_running_loop().time() - started >= 0.1
            assert await broker.lease("q") is None

    asyncio.run(main())


def test_a_block_that_is_cancelled_is_a_failed_attempt() -> None:
    async def main() -> None:
        async with AsyncBroker(":memory:") as broker:
            job_id = await broker.enqueue("q", b"")

            async def work() -> None:
                async for lease in broker.leases("q"):
                    async with lease:
                        await asyncio.sleep(60)

            task = asyncio.create_task(work())
            while not (await broker.stats("q")).leased:
                await asyncio.sleep(0.001)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            job = await broker.get(job_id)
            assert job is not None
            assert (job.attempts, job.last_error) == (1, "CancelledError: ")

    asyncio.run(main())


def test_close_ends_what_waits_and_refuses_what_comes_later() -> None:
    async def main() -> None:
        broker = await AsyncBroker.open(":memory:")
        waiting = asyncio.create_task(broker.lease("q", wait=None))
        await asyncio.sleep(0.01)
        await broker.close()
        await broker.close()
        for call in (waiting, broker.enqueue("q", b""), broker.stats()):
            with pytest.raises(BrokerClosedError):
                await call
        assert (await broker.health()).state == "closed"

    asyncio.run(main())


def test_a_close_that_is_cancelled_while_all_threads_are_busy_closes_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    busy, may_go_on, closed = list[int](), threading.Event(), threading.Event()
    close = Broker.close

    def slow(self: Broker) -> list[str]:
        busy.append(1)
        may_go_on.wait(PATIENCE_S)
        return []

    def closing(self: Broker) -> None:
        close(self)
        closed.set()

    async def main() -> None:
        broker = await AsyncBroker.open(tmp_path / "data")
        monkeypatch.setattr(Broker, "queues", slow)
        monkeypatch.setattr(Broker, "close", closing)
        looks = [asyncio.ensure_future(broker.queues()) for _ in range(THREADS)]
        while len(busy) < THREADS:
            await asyncio.sleep(0.001)
        ending = asyncio.ensure_future(broker.close())
        await asyncio.sleep(0)  # it stands in line for a thread
        ending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await ending
        may_go_on.set()
        await asyncio.gather(*looks)

    asyncio.run(main())
    assert closed.wait(PATIENCE_S)
    Broker(tmp_path / "data").close()


def test_a_broker_that_was_given_open_stays_open() -> None:
    async def main(broker: Broker) -> None:
        async with AsyncBroker(broker) as mine:
            await mine.enqueue("q", b"")

    with Broker(":memory:") as broker:
        asyncio.run(main(broker))
        asyncio.run(main(broker))  # in another loop
        assert broker.stats("q").ready == 2


def test_a_broker_that_is_not_open_says_so() -> None:
    async def main() -> None:
        broker = AsyncBroker(":memory:")
        with pytest.raises(UsageError, match="not open"):
            await broker.enqueue("q", b"")
        await broker.close()

    asyncio.run(main())


def test_an_opening_that_is_cancelled_frees_the_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, may_go_on = threading.Event(), threading.Event()
    opened = Broker.__init__

    def slow(self: Broker, *args: Any, **kwargs: Any) -> None:
        begun.set()
        may_go_on.wait(20)
        opened(self, *args, **kwargs)

    async def main() -> None:
        monkeypatch.setattr(Broker, "__init__", slow)
        opening = asyncio.create_task(AsyncBroker.open(tmp_path / "data"))
        while not begun.is_set():
            await asyncio.sleep(0.001)
        opening.cancel()
        with pytest.raises(asyncio.CancelledError):
            await opening
        may_go_on.set()
        monkeypatch.undo()

    asyncio.run(main())
    for thread in threading.enumerate():
        if thread.name in ("rivetq-close", "rivetq-aio_0"):
            thread.join(20)
    with Broker(tmp_path / "data") as broker:
        assert broker.stats().enqueued == 0


def test_an_opening_that_is_cancelled_when_it_is_through_frees_the_directory_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def in_thread(self: AsyncBroker, call: Any) -> Any:
        call()
        return asyncio.get_running_loop().create_future()  # it is open, and the loop has not heard of it yet

    async def main() -> None:
        with monkeypatch.context() as patched:
            patched.setattr(AsyncBroker, "_in_thread", in_thread)
            opening = asyncio.create_task(AsyncBroker.open(tmp_path / "data"))
            await asyncio.sleep(0)
            opening.cancel()
            with pytest.raises(asyncio.CancelledError):
                await opening

    asyncio.run(main())
    for thread in threading.enumerate():
        if thread.name == "rivetq-close":
            thread.join(PATIENCE_S)
    Broker(tmp_path / "data").close()


def test_no_thread_outlives_a_close_and_none_begins_behind_it() -> None:
    def threads() -> list[threading.Thread]:
        return [thread for thread in threading.enumerate() if thread.name.startswith("rivetq-aio")]

    async def main() -> None:
        broker = await AsyncBroker.open(":memory:")
        await broker.stats()
        assert threads()
        await broker.close()
        for thread in threads():
            await asyncio.to_thread(thread.join, PATIENCE_S)
        with pytest.raises(BrokerClosedError):
            await broker.stats()
        assert threads() == []

    asyncio.run(main())


def test_a_lease_that_got_its_job_leaves_no_timer_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        loop, timers = asyncio.get_running_loop(), list[asyncio.TimerHandle]()
        call_later = loop.call_later

        def recording(*args: Any) -> asyncio.TimerHandle:
            timers.append(call_later(*args))
            return timers[-1]

        async with AsyncBroker(":memory:") as broker:
            with monkeypatch.context() as patched:
                patched.setattr(loop, "call_later", recording)
                waiting = asyncio.create_task(broker.lease("q", wait=3600))
                await asyncio.sleep(0)
                await broker.enqueue("q", b"")
                assert await waiting is not None
                cancelled = asyncio.create_task(broker.lease("q", wait=3600))
                await asyncio.sleep(0)
                cancelled.cancel()
                await asyncio.wait([cancelled])
            assert [timer.cancelled() for timer in timers] == [True, True]

    asyncio.run(main())


# -- The way of an answer into the loop


class _Loop:
    """Of an event loop what a mailbox asks for; it calls when it is told to."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def create_future(self) -> asyncio.Future[Any]:
        loop = asyncio.new_event_loop()
        loop.close()  # it calls nothing: nobody awaits this one
        return loop.create_future()

    def call_soon_threadsafe(self, call: Any) -> None:
        self.calls.append(call)


def test_an_answer_that_comes_while_the_loop_looks_is_not_left_lying() -> None:
    loop: Any = _Loop()
    mailbox = _Mailbox(loop)
    first, second = _Answer(mailbox), _Answer(mailbox)

    def tell(answer: _Answer) -> None:  # as an engine does, in a thread of its own
        thread = threading.Thread(target=answer.tell, args=("told", None))
        thread.start()
        thread.join(PATIENCE_S)

    deliver = mailbox._deliver

    def deliver_and_be_told() -> None:
        deliver()
        mailbox._deliver = deliver  # type: ignore[method-assign]  # to see what passes
        tell(second)  # the loop has looked, and has not gone on yet

    tell(first)
    mailbox._deliver = deliver_and_be_told  # type: ignore[method-assign]  # to see what passes
    while loop.calls:
        loop.calls.pop(0)()
    assert (first.future.done(), second.future.done()) == (True, True)


def test_each_answer_for_a_loop_that_was_closed_is_given_back() -> None:
    loop, given_back = asyncio.new_event_loop(), list[Any]()
    mailbox = _Mailbox(loop)
    answers = [_Answer(mailbox, given_back.append) for _ in range(2)]
    loop.close()
    for number, answer in enumerate(answers):  # one after the other: the first must not keep the second
        thread = threading.Thread(target=answer.tell, args=(number, None))
        thread.start()
        thread.join(PATIENCE_S)
    assert given_back == [0, 1]


def test_an_error_that_nobody_waits_for_is_not_given_back() -> None:
    loop: Any = _Loop()
    given_back: list[Any] = []
    answer = _Answer(_Mailbox(loop), given_back.append)
    answer.drop()
    answer.tell(None, BrokerClosedError("the broker is closed"))  # in a thread that others wait for: it must not raise
    assert given_back == []


def test_what_cannot_be_given_back_any_more_disturbs_nobody() -> None:
    with Broker(":memory:") as broker:
        broker.enqueue("q", b"")
        lease = broker.lease("q")
        assert lease is not None
        lease.ack()
        AsyncBroker(broker)._give_back([lease])
        broker.close()
        AsyncBroker(broker)._give_back([lease])


def test_a_transaction_is_all_or_nothing_and_a_lost_fence_says_so() -> None:
    async def main() -> None:
        async with AsyncBroker(":memory:") as broker:
            await broker.enqueue("in", b"")
            lease = await broker.lease("in")
            assert lease is not None
            with pytest.raises(ZeroDivisionError):
                async with broker.transaction() as tx:
                    await tx.ack(lease)
                    raise ZeroDivisionError
            async with broker.transaction() as tx:
                await tx.ack(lease)
                first = await tx.enqueue("out", b"")
                assert list(await tx.enqueue_many("out", [b"", b""])) == [first + 1, first + 2]
            assert ((await broker.stats("in")).acked, (await broker.stats("out")).ready) == (1, 3)
            with pytest.raises(LeaseLostError):
                await broker.ack(lease)

    asyncio.run(main())


def test_records_that_need_room_made_are_awaited_like_any_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Larger than a segment, and a lease that finds none ready: the disk makes room, not the event loop."""

    async def main() -> None:
        async with AsyncBroker(tmp_path / "data", segment_bytes=65_536) as broker:
            waiting = asyncio.create_task(broker.lease_many("q", 100, wait=20))
            payloads = [bytes([n]) * 300_000 for n in range(12)]
            ids = await asyncio.gather(*(broker.enqueue("q", payload) for payload in payloads))
            leases = await waiting
            log = inside(broker.broker)._log
            has_room, refused = log.space.has_room, iter([False])
            monkeypatch.setattr(log.space, "is_roomy", lambda length: False)
            monkeypatch.setattr(log.space, "has_room", lambda *a, **k: next(refused, True) and has_room(*a, **k))
            leases += await broker.lease_many("q", 100)
            monkeypatch.undo()
            assert sorted((lease.id, lease.payload) for lease in leases) == sorted(zip(ids, payloads, strict=True))
            await broker.ack_many(leases)
            assert (await broker.stats("q")).acked == 12

    asyncio.run(main())


@pytest.mark.parametrize("ends", ["cancelled", "failed"])
def test_who_ends_just_as_it_was_woken_leaves_the_job_to_the_next_in_line(ends: str) -> None:
    told: list[Any] = []
    with Broker(":memory:") as broker:
        held, go = threading.Event(), threading.Event()
        first: Any = broker.lease_soon("q", 1, lambda leases, error: told.append("first"))
        broker.lease_soon("q", 1, lambda leases, error: told.append(leases))
        notifier: Any = inside(broker)._notifier
        notifier.call(lambda: (held.set(), go.wait(PATIENCE_S)))
        assert held.wait(PATIENCE_S)
        if ends == "cancelled":
            job_id = broker.enqueue("q", b"")  # the first will look when the thread is free
            assert first.cancel()
        else:  # it met a full disk, say
            first._call._end(UsageError("the disk is full"))
            job_id = broker.enqueue("q", b"")
        go.set()
        until = time.monotonic() + PATIENCE_S
        while len(told) < (1 if ends == "cancelled" else 2):
            assert time.monotonic() < until, "the next in line was forgotten"
            time.sleep(0.001)
        assert [lease.id for lease in told[-1]] == [job_id]


@pytest.mark.parametrize("first", ["jobs", "lessees"])
def test_who_waits_for_a_token_is_woken_when_there_is_one_whatever_came_first(first: str) -> None:
    """On a real clock: a manual one wakes all who wait at each step."""
    told: list[Any] = []

    def tell(leases: Any, error: BaseException | None) -> None:
        told.append(leases or error)

    with Broker(":memory:") as broker:
        broker.configure_queue("q", rate_limit=RateLimit(per_second=20, burst=1))
        if first == "jobs":
            broker.enqueue_many("q", [b""] * 3)
        for _ in range(3):
            broker.lease_soon("q", 1, tell)
        if first == "lessees":
            broker.enqueue_many("q", [b""] * 3)
        until = time.monotonic() + PATIENCE_S
        while len(told) < 3:
            assert time.monotonic() < until, f"{3 - len(told)} were forgotten"
            time.sleep(0.001)
        assert sorted(lease.id for leases in told for lease in leases) == [1, 2, 3]


class Settled:
    """Notes what an engine waits for: (record, whether until it is on disk)."""

    def __init__(self, broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
        self.waits: list[tuple[int, bool]] = []
        engine = inside(broker)
        settle, settle_soon, settle_enqueues = engine._settle, engine._settle_soon, engine._settle_enqueues

        def wait(lsn: int, *, sync: bool = True) -> None:
            self.waits.append((lsn, sync))
            settle(lsn, sync=sync)

        def wait_soon(lsn: int, tell: Any) -> bool:
            self.waits.append((lsn, True))
            return settle_soon(lsn, tell)

        def wait_for_enqueues(lsn: int) -> None:
            self.waits.append((lsn, True))
            settle_enqueues(lsn)

        monkeypatch.setattr(engine, "_settle", wait)
        monkeypatch.setattr(engine, "_settle_soon", wait_soon)
        monkeypatch.setattr(engine, "_settle_enqueues", wait_for_enqueues)


@pytest.mark.parametrize("way", ["called", "awaited"])
def test_the_answer_to_a_duplicate_waits_for_the_record_of_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """It may be on its way to the disk: the first enqueue has not returned yet."""
    with Broker(tmp_path / "data") as broker:
        job_id = broker.enqueue("q", b"", idempotency_key="k")
        lsn = inside(broker)._last_lsn()
        settled = Settled(broker, monkeypatch)
        if way == "called":
            assert broker.enqueue("q", b"", idempotency_key="k") == job_id
        else:
            assert asyncio.run(AsyncBroker(broker).enqueue("q", b"", idempotency_key="k")) == job_id
        assert settled.waits[0] == (lsn, True)


def test_a_lease_waits_for_the_records_of_its_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a power cut takes back what somebody works on."""
    with Broker(tmp_path / "data") as broker:
        broker.enqueue_many("q", [b""] * 2)
        lsn = inside(broker)._last_lsn()
        settled = Settled(broker, monkeypatch)
        assert len(broker.lease_many("q", 2)) == 2
        assert (lsn, True) in settled.waits
        assert (lsn + 1, False) in settled.waits  # its own is handed to the system


def test_a_lease_of_a_job_whose_record_is_on_its_way_waits_for_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Broker(tmp_path / "data", fsync="never") as broker:
        engine = inside(broker)
        for _ in range(2):  # with the first a block of ids is written down, and synced in every mode
            broker.enqueue("q", b"")
        engine._fsync = "always"  # as if another caller still waited for the second one
        settled = Settled(broker, monkeypatch)
        assert len(broker.lease_many("q", 2)) == 2
        lsn = engine._last_lsn() - 1
        assert settled.waits == [(lsn + 1, False), (lsn, True), (lsn, True)]
        assert engine._log.durable_lsn >= lsn


@pytest.mark.parametrize("way", ["called", "awaited"])
def test_an_enqueue_leaves_the_reserve_of_space_to_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    with Broker(tmp_path / "data") as broker:
        engine = inside(broker)
        record, kept = engine._record, list[bool]()

        def note(events: Any, now_ms: int, keep_reserve: bool = False) -> int:
            kept.append(keep_reserve)
            return record(events, now_ms, keep_reserve)

        monkeypatch.setattr(engine, "_record", note)

        async def main() -> None:
            mine = AsyncBroker(broker)
            await mine.enqueue("q", b"")
            lease = await mine.lease("q")
            assert lease is not None
            await lease.ack()

        if way == "awaited":
            asyncio.run(main())
        else:
            broker.enqueue("q", b"")
            lease = broker.lease("q")
            assert lease is not None
            lease.ack()
        assert kept == [True, False, False]


def test_a_lease_that_is_given_up_after_it_was_woken_takes_nothing() -> None:
    told: list[Any] = []
    with Broker(":memory:") as broker:
        held, go = threading.Event(), threading.Event()
        waiting = broker.lease_soon("q", 1, lambda leases, error: told.append((leases, error)))
        notifier: Any = inside(broker)._notifier
        notifier.call(lambda: (held.set(), go.wait(20)))
        assert held.wait(20)
        broker.enqueue("q", b"")  # it will look when the thread is free
        assert waiting.cancel()
        go.set()
        notifier.call(held.clear)
        while held.is_set():
            time.sleep(0.001)
        assert told == []
        assert broker.stats("q").ready == 1


def test_a_limit_that_is_changed_is_the_one_that_is_waited_for() -> None:
    async def main() -> None:
        async with AsyncBroker(":memory:") as broker:
            await broker.configure_queue("q", rate_limit=RateLimit(1 / 3600, 1))
            await broker.enqueue_many("q", [b""] * 3)
            assert await broker.lease("q") is not None  # the only token
            waits = [asyncio.create_task(broker.lease("q", wait=PATIENCE_S)) for _ in range(2)]
            await asyncio.sleep(0)
            await broker.configure_queue("q", rate_limit=RateLimit(20, 1))
            assert all(await asyncio.gather(*waits))

    asyncio.run(main())


def test_polls_of_a_limited_queue_leave_nothing_behind() -> None:
    async def main() -> None:
        async with AsyncBroker(":memory:") as broker:
            await broker.configure_queue("q", rate_limit=RateLimit(1 / 86_400, 1))
            await broker.enqueue_many("q", [b""] * 2)
            assert await broker.lease("q") is not None
            for _ in range(500):
                assert await broker.lease("q") is None
            engine = inside(broker.broker)
            assert not engine._lessees.lines
            assert len(engine._machine.tokens) <= 1
            assert not engine._notifier._later

    asyncio.run(main())


def test_an_answer_that_is_broken_into_where_it_wakes_its_loop_is_told(tmp_path: Path) -> None:
    async def main(broker: Broker) -> None:
        awaited, loop = AsyncBroker(broker), asyncio.get_running_loop()
        wake, breaks = loop.call_soon_threadsafe, [MemoryError(), MemoryError()]

        def waking(*args: Any) -> Any:
            if breaks and threading.current_thread().name == "rivetq-notifier":
                raise breaks.pop()
            return wake(*args)

        loop.call_soon_threadsafe = waking  # type: ignore[method-assign]  # it fails at first
        waiting = asyncio.create_task(awaited.lease("q", wait=None))
        await asyncio.sleep(0)
        await asyncio.to_thread(broker.enqueue, "q", b"x")
        await asyncio.wait({waiting}, timeout=0.05)  # both times: it is told with the next answer
        other = asyncio.create_task(awaited.enqueue("other", b""))
        done, _ = await asyncio.wait({waiting, other}, timeout=PATIENCE_S / 4)
        assert done == {waiting, other}, "an answer does not come"
        assert not breaks

    with Broker(tmp_path / "data") as broker:
        asyncio.run(main(broker))


def test_a_loop_that_is_closed_under_a_waiting_lease_leaves_no_lessee_behind() -> None:
    with Broker(":memory:") as broker:
        loop = asyncio.new_event_loop()
        task = loop.create_task(AsyncBroker(broker).lease("q", wait=None))
        loop.run_until_complete(asyncio.sleep(0))
        assert inside(broker)._lessees.lines
        task._log_destroy_pending = False  # type: ignore[attr-defined]  # it is the point
        loop.close()
        coroutine = task.get_coro()
        assert coroutine is not None
        with inside(broker)._lock:  # it may do so in the middle of a call
            coroutine.close()  # type: ignore[union-attr]  # what the garbage collector does
        end = time.monotonic() + PATIENCE_S
        while inside(broker)._lessees.lines:
            assert time.monotonic() < end, "a lessee that the test did not make"
            time.sleep(0.001)
        broker.enqueue("q", b"")
        assert broker.lease("q") is not None


def test_what_is_told_to_a_loop_that_was_closed_is_given_back() -> None:
    with Broker(":memory:") as broker:
        loop = asyncio.new_event_loop()
        task = loop.create_task(AsyncBroker(broker).lease("q", wait=None))
        loop.run_until_complete(asyncio.sleep(0))
        task._log_destroy_pending = False  # type: ignore[attr-defined]  # a warning of asyncio's
        loop.close()
        broker.enqueue("q", b"")
        end = time.monotonic() + PATIENCE_S
        while (lease := broker.lease("q")) is None:
            assert time.monotonic() < end, "a lease that nobody has"
            time.sleep(0.001)
        assert lease.attempt == 1


def test_an_async_broker_that_was_closed_is_not_entered() -> None:
    async def main() -> None:
        async with AsyncBroker(":memory:") as broker:
            pass
        with pytest.raises(BrokerClosedError):
            async with broker:
                pass

    asyncio.run(main())
