"""What a worker leases, in which order, what it gives back, and how it keeps its leases."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from patience import PATIENCE_S, until

from rivetq import Broker
from rivetq.engines.local import LocalEngine
from rivetq.tasks import App, current_job
from rivetq.tasks.running import Delivery
from rivetq.testing import ManualClock
from rivetq.worker import Settled, Worker
from rivetq.worker.order import PREFETCH_JOBS, Room
from rivetq.worker.pools import ThreadPool


def test_looking_for_calls_in_other_queues_reads_no_payload(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[object] = []
    payloads = LocalEngine._payloads

    def reading(self: LocalEngine, entries: Sequence[Any]) -> list[bytes | None]:
        read.extend(entries)
        return payloads(self, entries)

    with App(tmp_path / "data") as app:
        app.task(name="other", queue="own")(lambda: None)
        app.broker.enqueue_many("elsewhere", [b"{}"] * 30)
        for _ in range(2):
            app.broker.enqueue("calls", {"args": []}, delay=1000, headers={"rivetq-task": "other"})
        monkeypatch.setattr(LocalEngine, "_payloads", reading)
        worker = Worker(app, concurrency=1)
        with worker:
            until(lambda: "calls" in worker._queues.order)
    assert "elsewhere" not in worker._queues.order
    assert read == []


class Gate:
    """A task whose jobs are quick, or wait in their handlers until they are let through."""

    def __init__(self, app: App, kind: str = "sync", **options: Any) -> None:
        self.begun: list[str] = []
        self.open = threading.Event()

        def sync(name: str) -> None:
            self.begun.append(name)
            if name.startswith("slow"):
                self.open.wait(PATIENCE_S)

        async def asynchronous(name: str) -> None:
            self.begun.append(name)
            while name.startswith("slow") and not self.open.is_set():
                await asyncio.sleep(0.005)

        function: Any = sync if kind == "sync" else asynchronous
        self.task = app.task(name="gate", **options)(function)
        self.app = app

    def fill(self, quick: int, slow: int) -> list[int]:
        """Quick jobs, which make a worker lease ahead, and slow ones behind them; the ids of the latter."""
        self.task.enqueue_many([(f"quick {n}",) for n in range(quick)])
        return list(self.task.enqueue_many([(f"slow {n}",) for n in range(slow)]))

    def is_shut(self, slots: int, slow: int, queue: str = "default") -> Callable[[], bool]:
        """Slow jobs run in all slots, and all others wait in their queue."""

        def holds() -> bool:
            stats = self.app.broker.stats(queue)
            return (stats.leased, stats.ready) == (slots, slow - slots)

        return holds


# -- What did not begin


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_jobs_that_do_not_begin_in_time_are_given_back_with_their_attempt(app: App, kind: str) -> None:
    told: list[Settled] = []
    gate = Gate(app, kind)
    ids = gate.fill(2000, 300)
    with Worker(app, concurrency=2, on_settled=told.append):
        until(gate.is_shut(2, 300))
        assert [job.attempts for job in app.broker.jobs("default", state="ready", limit=400)] == [0] * 298
        gate.open.set()
        until(lambda: app.broker.stats().acked == 2300)
    assert Counter(gate.begun).most_common(1)[0][1] == 1
    assert app.broker.get(ids[-1]) is None
    until(lambda: len(told) == 2300)  # of those that were given back a listener hears nothing
    assert {settled.ending for settled in told} == {"ack"}


def test_an_urgent_job_is_the_next_to_begin_though_many_were_leased_in_advance(app: App) -> None:
    gate = Gate(app)
    gate.fill(2000, 300)
    with Worker(app, concurrency=2, grace=5):
        until(gate.is_shut(2, 300))
        begun = len(gate.begun)
        gate.task.options(priority=9).enqueue("slow and urgent")
        gate.open.set()
        until(lambda: len(gate.begun) > begun + 2)
        # Two slots may be given jobs at once.
        assert "slow and urgent" in gate.begun[begun : begun + 3]
        app.broker.purge("default")


def test_a_job_in_its_last_attempt_is_not_leased_in_advance(app: App) -> None:
    gate = Gate(app, max_attempts=1)
    gate.fill(2000, 100)
    with Worker(app, concurrency=2) as worker:
        until(gate.is_shut(2, 100))
        assert worker.running == 2
        gate.open.set()
        until(lambda: app.broker.stats().acked == 2100)
        # They are known as such when the first batch is there; what is too much of it goes back.
        assert app.broker.deliveries().leased <= 2100 + 2 * PREFETCH_JOBS
        gate.task.options(max_attempts=2).enqueue("quick")
        until(lambda: not worker._fetcher._careful)  # the queue had no more
        assert not any(room.careful for room in worker._held.rooms.values())


@pytest.fixture
def ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundred jobs are leased in advance, once: until the first are handed over."""
    ahead, took = [100], Room.took

    def hand_over(room: Room, batch: Sequence[Delivery]) -> None:
        took(room, batch)
        ahead[0] = 0

    monkeypatch.setattr(Room, "ahead", lambda room: ahead[0])
    monkeypatch.setattr(Room, "took", hand_over)


@pytest.mark.usefixtures("ahead")
@pytest.mark.parametrize("kind", ["sync", "async"])
def test_when_pause_has_returned_no_job_of_the_queue_begins(
    app: App, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rivetq.worker.renewer.PREFETCH_S", PATIENCE_S)  # they stay in the pool
    gate = Gate(app, kind)
    gate.fill(0, 150)
    with Worker(app, concurrency=2) as worker:
        until(lambda: len(gate.begun) == 2)
        assert app.broker.stats().leased == 102
        app.broker.pause("default")
        gate.open.set()
        until(lambda: app.broker.stats().leased == 0)
        assert len(gate.begun) == 2
        until(lambda: not any(room.jobs for room in worker._held.rooms.values()))
        app.broker.resume("default")
        until(lambda: app.broker.stats().acked == 150)


@pytest.mark.usefixtures("ahead")
def test_what_is_leased_in_advance_has_a_limit_of_bytes(app: App, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rivetq.worker.renewer.PREFETCH_S", PATIENCE_S)
    monkeypatch.setattr("rivetq.worker.order.PREFETCH_BYTES", 40_000)
    gate = Gate(app)
    gate.task.enqueue_many([("slow " + "x" * 9000,)] * 150)
    with Worker(app, concurrency=2):
        until(lambda: len(gate.begun) == 2)
        assert app.broker.stats().leased == 4
        gate.open.set()
        until(lambda: app.broker.stats().acked == 150)


@pytest.mark.usefixtures("ahead")
def test_what_is_taken_back_while_a_batch_is_handed_over_is_all_of_it(
    app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit = ThreadPool.submit

    def slowly(pool: ThreadPool, batch: Sequence[Delivery]) -> None:
        submit(pool, batch[:50])
        time.sleep(0.1)  # as if the thread had no processor: the first are late meanwhile
        submit(pool, batch[50:])

    monkeypatch.setattr(ThreadPool, "submit", slowly)
    gate = Gate(app)
    gate.fill(0, 150)
    with Worker(app, concurrency=2):
        until(gate.is_shut(2, 150))
        gate.open.set()


@pytest.mark.usefixtures("ahead")
def test_a_last_attempt_in_the_first_batch_waits_in_its_queue_too(app: App, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing was known of the queue when the batch was leased."""
    submit, handed_over = ThreadPool.submit, list[int]()

    def watch(pool: ThreadPool, batch: Sequence[Delivery]) -> None:
        handed_over.append(len(batch))
        submit(pool, batch)

    monkeypatch.setattr(ThreadPool, "submit", watch)
    gate = Gate(app, max_attempts=1)
    gate.fill(0, 100)
    with Worker(app, concurrency=2):
        until(gate.is_shut(2, 100))
        assert handed_over == [2]
        gate.open.set()
        until(lambda: app.broker.stats().acked == 100)


@pytest.mark.usefixtures("ahead")
def test_jobs_that_were_given_back_do_not_count_against_max_jobs(app: App) -> None:
    gate = Gate(app)
    gate.fill(0, 150)
    with Worker(app, concurrency=2, max_jobs=140) as worker:
        until(gate.is_shut(2, 150))
        assert app.broker.deliveries().released == 100
        gate.open.set()
        until(worker._held.wanted.is_set)
    assert app.broker.stats().acked == 140


@pytest.mark.usefixtures("ahead")
def test_the_share_of_a_queue_is_refunded_what_did_not_begin(app: App, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(app)
    gate.fill(0, 150)
    refunded: Counter[str] = Counter()
    worker = Worker(app, concurrency=2)
    monkeypatch.setattr(worker._queues.order, "took_back", lambda name, count, pools: refunded.update({name: count}))
    with worker:
        until(gate.is_shut(2, 150))
        gate.open.set()
        until(lambda: app.broker.stats().acked == 150)
    assert refunded == {"default": 100}


def test_jobs_with_attempts_left_are_leased_in_advance_again(app: App) -> None:
    gate = Gate(app)
    gate.task.options(max_attempts=1).enqueue_many([("quick",)] * 50)
    gate.fill(1000, 0)
    with Worker(app, concurrency=2) as worker:
        until(lambda: app.broker.stats().acked == 1050)
        assert not worker._fetcher._careful


KILLED = """
import asyncio, os, sys, time
import rivetq.worker
from rivetq.tasks import App
from rivetq.worker import Worker

rivetq.worker.renewer.PREFETCH_S = 60.0  # what is leased in advance stays so until the process is killed
app = App(sys.argv[1], fsync="never")

def sync(n):
    os.write(1, f"{n}\\n".encode())
    time.sleep(0 if n < 2000 else 60)

async def asynchronous(n):
    os.write(1, f"{n}\\n".encode())
    await asyncio.sleep(0 if n < 2000 else 60)

task = app.task(name="task", max_attempts=int(sys.argv[2]))(globals()[sys.argv[3]])
task.enqueue_many([(n,) for n in range(3000)])
Worker(app, concurrency=8).run()
"""


@pytest.mark.parametrize("kind", ["sync", "asynchronous"])
@pytest.mark.parametrize("max_attempts", [1, 2])
def test_a_job_that_had_not_begun_when_its_worker_was_killed_keeps_its_attempt(
    tmp_path: Path, max_attempts: int, kind: str
) -> None:
    program = tmp_path / "program.py"
    program.write_text(KILLED)
    command = [sys.executable, str(program), str(tmp_path / "data"), str(max_attempts), kind]
    begun: set[int] = set()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            while len(begun) < 2008 and (line := process.stdout.readline()):
                begun.add(int(line))
        finally:
            process.kill()
    with Broker(tmp_path / "data") as broker:
        jobs = broker.jobs("default", limit=3000)
    paid = {job.json()["args"][0] for job in jobs if job.attempts or job.state == "dead"}
    assert set(range(2000, 2008)) <= paid <= begun
    assert {job.json()["args"][0] for job in jobs} - begun == set(range(2008, 3000))


# -- Cancelling what is just being leased


def test_a_job_that_is_cancelled_while_it_is_being_leased_does_not_begin(
    app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(app)
    leased, go_on = threading.Event(), threading.Event()
    find = app.find

    def find_slowly(lease: Any) -> Any:
        leased.set()
        go_on.wait(PATIENCE_S)
        return find(lease)

    monkeypatch.setattr(app, "find", find_slowly)
    answers: list[bool] = []
    with Worker(app, concurrency=1) as worker:
        _, job_id = gate.task.enqueue_many([("slow",), ("victim",)])
        until(leased.is_set)
        go_on.set()
        until(lambda: gate.begun == ["slow"])
        go_on.clear()
        leased.clear()
        gate.open.set()  # so that the other one is leased
        until(leased.is_set)
        canceller = threading.Thread(target=lambda: answers.append(app.cancel(job_id)))
        canceller.start()
        until(lambda: worker._held.asked)
        assert not answers
        go_on.set()
        canceller.join(PATIENCE_S)
        until(lambda: app.broker.get(job_id) is None)
    assert answers == [True]
    assert gate.begun == ["slow"]


@pytest.mark.usefixtures("ahead")
def test_a_job_that_is_cancelled_while_it_is_given_back_does_not_begin(
    app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(app)
    victim = gate.fill(0, 150)[101]  # the last one of those that are leased in advance
    answers: list[bool] = []
    worker = Worker(app, concurrency=2)
    commit = worker._settler._commit

    def commit_behind_a_cancel(endings: Any) -> Any:
        if any(delivery.is_untouched and delivery.lease.id == victim for delivery in endings):
            answers.append(app.cancel(victim))
        return commit(endings)

    monkeypatch.setattr(worker._settler, "_commit", commit_behind_a_cancel)
    with worker:
        until(lambda: app.broker.get(victim) is None)
        gate.open.set()
        until(lambda: app.broker.stats().acked == 149)
    assert answers == [True]
    assert "slow 101" not in gate.begun


def test_a_cancel_of_what_is_leased_elsewhere_or_gone_says_false(app: App) -> None:
    gate = Gate(app)
    with Worker(app, ["default"]) as worker:
        job_id = app.broker.enqueue("elsewhere", b"")
        lease = app.broker.lease("elsewhere")
        assert lease is not None
        assert not app.cancel(job_id)
        lease.ack()
        assert not app.cancel(job_id)
        assert not worker._held.cancels
        done = gate.task.enqueue("quick")
        until(lambda: app.broker.stats("default").acked)
        assert not app.cancel(done)
    assert not app.cancel(done)


# -- Queues and pools


def test_a_queue_of_its_own_waits_for_no_pool_that_its_tasks_do_not_use(app: App) -> None:
    end, ran = threading.Event(), threading.Event()

    @app.task(queue="slow")
    def slow() -> None:
        end.wait(PATIENCE_S)

    @app.task(queue="web")
    async def fetch() -> None:
        ran.set()

    with Worker(app, concurrency=2) as worker:
        slow.enqueue_many([()] * 2)
        until(lambda: app.broker.stats("slow").leased == 2)
        fetch.options(queue="tenant-7").enqueue()
        assert ran.wait(PATIENCE_S)
        # Nor if its tasks are known by its jobs alone: one waits for both pools only until its first job came.
        ran.clear()
        with worker._held.changed:
            worker._queues._grouped = None
            app.queues.clear()
        fetch.options(queue="tenant-7").enqueue()
        assert ran.wait(PATIENCE_S)
        end.set()


def test_a_job_that_came_for_a_full_pool_unawaited_is_given_back(app: App) -> None:
    end = threading.Event()
    ran: list[str] = []

    @app.task(queue="slow")
    def slow(name: str) -> None:
        ran.append(name)
        end.wait(PATIENCE_S)

    @app.task(queue="web")
    async def fetch() -> None: ...

    with Worker(app, concurrency=1) as worker:
        slow.enqueue("first")
        fetch.options(queue="shared").enqueue()
        until(lambda: ran == ["first"] and app.broker.stats("shared").acked == 1)
        headers = {"rivetq-task": slow.name}  # put there by another program
        surprise = app.broker.enqueue("shared", {"args": ["surprise"]}, headers=headers)
        until(lambda: app.broker.deliveries("shared").released == 1)
        until(lambda: app.broker.stats("shared").ready == 1)
        assert worker._queues.pools_of("shared") == {"loop", "thread"}
        end.set()
        until(lambda: app.broker.get(surprise) is None)
    assert ran == ["first", "surprise"]
    assert app.broker.deliveries("shared").leased == 3


@pytest.mark.parametrize("idle", [0, 1, 8])
def test_shares_are_equal_whatever_queues_are_idle(app: App, idle: int) -> None:
    order: list[str] = []
    for name in ("a", *(f"idle {n}" for n in range(idle)), "z"):
        app.task(name=name, queue=name)(lambda: order.append(current_job().queue))
    for name in ("a", "z"):
        app.tasks[name].enqueue_many([()] * 600)
    with Worker(app, concurrency=2):
        until(lambda: len(order) == 1200)
    got = Counter(order[:800])
    assert abs(got["a"] - 400) <= 64


# -- Calls in further queues


@pytest.fixture
def quick_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rivetq.worker.queues.LOOK_S", 0.05)
    monkeypatch.setattr("rivetq.worker.queues.LOOK_SHARE", 0.5)


@pytest.mark.usefixtures("quick_looks")
@pytest.mark.parametrize("how", ["redriven", "by another program", "behind jobs of others", "scheduled behind others"])
def test_calls_in_further_queues_are_found_however_they_came_there(
    app: App, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[int] = []

    @app.task(queue="own")
    def task(n: int) -> None:
        ran.append(n)

    broker, headers = app.broker, {"rivetq-task": task.name}
    if how == "redriven":
        broker.enqueue("tenant", {"args": [1]}, headers=headers)
        lease = broker.lease("tenant")
        assert lease is not None
        lease.reject()
    elif how != "by another program":
        delay = 0.3 if how == "scheduled behind others" else 0
        broker.enqueue_many("tenant", [b"of another consumer"] * 250, delay=delay)
        broker.enqueue("tenant", {"args": [1]}, headers=headers, delay=delay)
    broker.enqueue_many("foreign", [b""] * 50)
    with Worker(app) as worker:
        if how == "redriven":
            until(lambda: worker._queues._looked_at)
            assert broker.redrive("tenant") == 1
        elif how == "by another program":
            until(lambda: worker._queues._looked_at)
            broker.enqueue("tenant", {"args": [1]}, headers=headers)
        until(lambda: ran == [1])
        assert str(worker._queues.order) == "own, tenant"
    assert broker.stats("foreign").ready == 50
    assert worker.failure is None


@pytest.mark.usefixtures("quick_looks")
def test_a_worker_that_was_given_its_queues_looks_for_no_others(app: App) -> None:
    @app.task(queue="own")
    def task() -> None: ...

    app.broker.enqueue("tenant", {}, headers={"rivetq-task": task.name})
    with Worker(app, ["own"]) as worker:
        task.enqueue()
        until(lambda: app.broker.stats("own").acked)
        assert not worker._queues._looked_at
    assert app.broker.stats("tenant").ready == 1


# -- Keeping leases


def test_the_loss_of_all_leases_at_once_is_told_to_every_handler() -> None:
    clock = ManualClock()
    with Broker(":memory:", clock=clock) as broker:
        app = App(broker)
        begun: list[int] = []
        cancelled: list[int] = []

        @app.task(max_attempts=1)
        async def wait() -> None:
            begun.append(current_job().id)
            try:
                await asyncio.sleep(PATIENCE_S)
            except asyncio.CancelledError:
                cancelled.append(current_job().id)
                raise

        ids = wait.enqueue_many([()] * 500)
        with Worker(app, concurrency={"tasks": 500}, visibility_timeout=0.5) as worker:
            until(lambda: len(begun) == 500)
            clock.advance(100)
            until(lambda: sorted(cancelled) == list(ids))
            until(lambda: not worker.running)


def test_leases_that_will_soon_be_due_are_renewed_with_those_that_are(app: App) -> None:
    end = asyncio.Event()

    @app.task
    async def wait() -> None:
        await end.wait()

    with Worker(app, grace=0.1) as worker:
        deliveries = []
        for n in range(4):
            wait.enqueue()
            until(lambda n=n: worker.running == n + 1)  # type: ignore[misc]  # bound now
        deliveries = list(worker._held.deliveries.values())
        now = time.monotonic()
        for delivery, seconds in zip(deliveries, (-1, 4, 9, 2), strict=True):
            delivery.visibility, delivery.renew_at = 30.0, now + seconds
        deliveries[3].visibility = 12.0  # another group, in which none is due
        worker._renewer._renew_due(now)
        later = time.monotonic() + 10
        assert deliveries[0].renew_at == deliveries[1].renew_at
        assert later - 1 < deliveries[0].renew_at <= later
        assert [delivery.renew_at for delivery in deliveries[2:]] == [now + 9, now + 2]
