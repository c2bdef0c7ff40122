"""The worker: what becomes of jobs by how their handlers end, of leases while they run, and of all when it stops."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import logging
import os
import signal
import subprocess
import sys
import threading
import time
import zlib
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import worker_tasks
from inside import inside
from patience import PATIENCE_S, job_of, until

from rivetq import (
    Broker,
    BrokerFailedError,
    DiskFullError,
    Lease,
    LeaseLostError,
    LeaseRef,
    QueueStats,
    RetryPolicy,
    SystemClock,
    Transaction,
    UsageError,
    logs,
)
from rivetq.tasks import App, CurrentJob, Outcome, Reject, Retry, Snooze, current_job, every, running
from rivetq.worker import Concurrency, Settled, Worker, pools
from rivetq.worker.children import ProcessPool, _Child
from rivetq.worker.fetcher import Fetcher
from rivetq.worker.held import Held
from rivetq.worker.order import Order, Room
from rivetq.worker.settler import Settler, _ending
from rivetq.worker.worker import _margin


def drained(app: App) -> Callable[[], bool]:
    def is_drained() -> bool:
        stats = app.broker.stats()
        return stats.enqueued > 0 and not (stats.ready or stats.leased)

    return is_drained


@pytest.fixture
def children() -> Iterator[App]:
    """The app of the tasks that run in child processes, with an empty broker."""
    worker_tasks.ends.clear()
    with worker_tasks.app as app:
        yield app


# -- What runs


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_every_job_runs_once_and_is_acked(app: App, kind: str) -> None:
    runs: Counter[int] = Counter()

    @app.task
    def sync(n: int) -> None:
        runs[n] += 1

    @app.task
    async def asynchronous(n: int) -> None:
        await asyncio.sleep(0)
        runs[n] += 1

    task: Any = sync if kind == "sync" else asynchronous
    with Worker(app, concurrency=4):
        task.enqueue_many([(n,) for n in range(500)])
        until(drained(app))
    assert runs == dict.fromkeys(range(500), 1)
    assert app.broker.stats().acked == 500


def test_handlers_run_at_the_same_time_up_to_the_concurrency(app: App) -> None:
    most: Counter[str] = Counter()
    now: Counter[str] = Counter()
    lock = threading.Lock()

    def count(kind: str, change: int) -> None:
        with lock:
            now[kind] += change
            most[kind] = max(most[kind], now[kind])

    @app.task
    def sync() -> None:
        count("sync", 1)
        time.sleep(0.02)
        count("sync", -1)

    @app.task
    async def asynchronous() -> None:
        count("async", 1)
        await asyncio.sleep(0.02)
        count("async", -1)

    sync.enqueue_many([()] * 20)
    asynchronous.enqueue_many([()] * 40)
    with Worker(app, concurrency={"threads": 3, "tasks": 7}):
        until(drained(app))
    assert most == {"sync": 3, "async": 7}


def test_jobs_that_come_later_are_run_at_once(app: App) -> None:
    ran = threading.Event()

    @app.task
    def task() -> None:
        ran.set()

    with Worker(app):
        for _ in range(5):
            ran.clear()
            task.enqueue()
            assert ran.wait(PATIENCE_S)
            time.sleep(0.01)


def test_the_more_urgent_job_comes_first(app: App) -> None:
    order: list[int] = []

    @app.task
    def task(n: int) -> None:
        order.append(n)

    for n in range(10):
        task.options(priority=n).enqueue(n)
    with Worker(app, concurrency=1):
        until(drained(app))
    assert order == list(range(9, -1, -1))


def test_current_job_tells_which_and_which_attempt(app: App) -> None:
    seen: list[tuple[int, str, int, str, str]] = []

    def note() -> None:
        now = current_job()
        seen.append((now.id, now.queue, now.attempt, now.task, now.headers["a"]))
        if now.attempt == 1:
            raise Retry(0)

    @app.task(queue="one")
    def sync() -> None:
        note()

    @app.task(queue="two")
    async def asynchronous() -> None:
        await asyncio.sleep(0)
        note()

    ids = [task.options(headers={"a": "b"}).enqueue() for task in (sync, asynchronous)]
    with Worker(app):
        until(drained(app))
    assert sorted(seen) == [
        (ids[0], "one", 1, "sync", "b"), (ids[0], "one", 2, "sync", "b"),
        (ids[1], "two", 1, "asynchronous", "b"), (ids[1], "two", 2, "asynchronous", "b"),
    ]  # fmt: skip


# -- How handlers end

AFTER: dict[str, tuple[Any, str, int, str | None]] = {
    "an error": (ZeroDivisionError("by zero"), "scheduled", 1, "ZeroDivisionError: by zero"),
    "Retry": (Retry(), "scheduled", 1, "the task asked for a retry"),
    "Retry with a delay": (Retry(1000, error="busy"), "scheduled", 1, "busy"),
    "Snooze": (Snooze(1000), "scheduled", 0, None),
    "Snooze for a timedelta": (Snooze(timedelta(seconds=1000)), "scheduled", 0, None),
    "Reject": (Reject("never"), "dead", 1, "never"),
    "the class Retry": (Retry, "scheduled", 1, "the task asked for a retry"),
    "the class Reject": (
        Reject,
        "scheduled",
        1,
        "TypeError: Reject.__init__() missing 1 required positional argument: 'reason'",
    ),
    "SystemExit": (SystemExit(1), "scheduled", 1, "SystemExit: 1"),
    "KeyboardInterrupt": (KeyboardInterrupt(), "scheduled", 1, "KeyboardInterrupt: "),
}


@pytest.mark.parametrize("kind", ["sync", "async"])
@pytest.mark.parametrize("way", ["raised", "returned"])
@pytest.mark.parametrize("end", AFTER)
def test_the_end_of_a_handler_decides_what_becomes_of_its_job(app: App, kind: str, way: str, end: str) -> None:
    error, state, attempts, last_error = AFTER[end]
    if way == "returned" and not isinstance(error, Outcome | type):
        pytest.skip("only outcomes are returned")

    @app.task(retry=RetryPolicy(base=500, jitter="none"))
    def sync() -> Any:
        if way == "raised":
            raise error
        return error

    @app.task(retry=RetryPolicy(base=500, jitter="none"))
    async def asynchronous() -> Any:
        return sync()

    task: Any = sync if kind == "sync" else asynchronous
    with Worker(app, concurrency=2):
        job_id = task.enqueue()
        until(lambda: job_of(app, job_id).state in ("scheduled", "dead"))
    found = job_of(app, job_id)
    assert (found.state, found.attempts, found.last_error) == (state, attempts, last_error)
    if state == "scheduled":
        assert found.due_at is not None
        delay = 1000 if "delay" in end or "Snooze" in end else 500
        assert abs((found.due_at - found.enqueued_at).total_seconds() - delay) < 30


class UnspeakableError(Exception):
    def __str__(self) -> str:
        raise ValueError("no text")


@pytest.mark.parametrize("kind", ["sync", "async"])
@pytest.mark.parametrize(
    ("end", "last_error"),
    [
        (lambda: UnspeakableError(), "UnspeakableError: (its text cannot be made: ValueError)"),
        (lambda: Retry(-1), "UsageError: delay: 0 seconds to 100 years expected, got -1"),
        (lambda: Snooze("soon"), "UsageError: delay: seconds (int, float) or a timedelta expected, got str 'soon'"),
        (lambda: Reject(7), "UsageError: reason: a str expected, got 7"),
        (lambda: ValueError("x" * 5000), "ValueError: " + "x" * (4096 - 12)),
        (lambda: ValueError("\ud800"), "ValueError: \\ud800"),
    ],
)
def test_a_handler_that_ends_strangely_fails_its_own_job_only(
    app: App, kind: str, end: Callable[[], Exception], last_error: str
) -> None:
    @app.task(max_attempts=1)
    def sync() -> None:
        raise end()

    @app.task(max_attempts=1)
    async def asynchronous() -> None:
        raise end()

    @app.task
    def fine() -> None: ...

    task: Any = sync if kind == "sync" else asynchronous
    job_id = task.enqueue()
    with Worker(app, concurrency=1) as worker:
        until(drained(app))
        fine.enqueue()
        until(drained(app))
    assert worker.failure is None
    assert (job_of(app, job_id).state, job_of(app, job_id).last_error) == ("dead", last_error)


def test_a_job_that_fails_for_good_is_a_dead_letter_with_its_error(app: App, caplog: pytest.LogCaptureFixture) -> None:
    @app.task(retry=RetryPolicy(max_attempts=3, base=0))
    def task() -> None:
        raise ValueError("bad")

    job_id = task.enqueue()
    with caplog.at_level(logging.WARNING, "rivetq.worker"), Worker(app):
        until(drained(app))
    found = job_of(app, job_id)
    assert (found.state, found.attempts, found.last_error) == ("dead", 3, "ValueError: bad")
    record = caplog.records[0]
    assert (record.job_id, record.task, record.attempt) == (job_id, "task", 1)  # type: ignore[attr-defined]  # extra
    assert record.exc_info


def test_what_is_no_call_of_a_task_is_a_dead_letter(app: App) -> None:
    ran = threading.Event()

    @app.task
    def task() -> None:
        ran.set()

    job_id = app.broker.enqueue("default", b"\xff", headers={"rivetq-task": "gone"})
    task.enqueue()
    with Worker(app):
        assert ran.wait(PATIENCE_S)
        until(drained(app))
    assert (job_of(app, job_id).state, job_of(app, job_id).last_error) == (
        "dead",
        "unknown task 'gone': this app has task",
    )


def test_mixed_endings_are_answered_in_one_commit(app: App, monkeypatch: pytest.MonkeyPatch) -> None:
    ready = threading.Barrier(4)

    @app.task(retry=RetryPolicy(base=500))
    def task(n: int) -> Any:
        ready.wait(PATIENCE_S)
        return [None, Retry(), Snooze(500), Reject("no")][n]

    task.enqueue_many([(n,) for n in range(4)])
    with Worker(app, concurrency=4):
        until(lambda: not app.broker.stats().leased and not app.broker.stats().ready)
    stats = app.broker.stats()
    assert (stats.acked, stats.scheduled, stats.dead) == (1, 2, 1)


def test_a_job_that_comes_again_before_its_answer_is_noted_is_answered_again(
    app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempts: list[int] = []

    @app.task(retry=RetryPolicy(max_attempts=4, base=0))
    def task() -> None:
        attempts.append(current_job().attempt)
        raise Retry(0)

    worker = Worker(app, concurrency=2)
    commit = worker._settler._commit

    def slow(held: Any) -> Any:
        fates = commit(held)
        number = next(iter(held)).lease.attempt
        if number < 4:  # the fetcher has it again before this returns
            until(lambda: any(each.lease.attempt == number + 1 for each in list(worker._held.deliveries.values())))
        return fates

    monkeypatch.setattr(worker._settler, "_commit", slow)
    job_id = task.enqueue()
    with worker:
        until(lambda: job_of(app, job_id).state == "dead")
    assert attempts == [1, 2, 3, 4]


class OddRetryError(Retry):
    def __init__(self) -> None:
        pass


@pytest.mark.parametrize("end", ["odd outcome", "too long", "generator", "coroutine", "dead loop", "hook"])
def test_a_worker_outlives_a_job_that_goes_wrong_in_an_odd_way(app: App, end: str) -> None:
    async def nothing() -> None: ...

    async def exits() -> None:
        raise SystemExit(3)

    @app.around
    def hook(job: CurrentJob) -> Iterator[None]:
        if job.task == "bad" and end == "hook":
            raise ValueError("hook")
        yield

    def bad() -> Any:
        if end == "odd outcome":
            raise OddRetryError
        if end == "too long":
            raise Snooze(9e9)
        if end == "coroutine":
            made = nothing()
            made.close()
            return made
        return (n for n in ())

    async def bad_async() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(exits())

    is_async = end in ("dead loop", "hook")
    task: Any = app.task(name="bad", max_attempts=1, time_limit=20)(bad_async if is_async else bad)

    @app.task
    async def fine_async() -> None: ...

    @app.task
    def fine() -> None: ...

    job_id = task.enqueue()
    with Worker(app, concurrency=1) as worker:
        until(lambda: job_of(app, job_id).state == "dead")
        (fine_async if is_async else fine).enqueue()
        until(lambda: app.broker.stats().acked == 1)
        assert worker.failure is None


def test_an_async_job_that_is_cancelled_before_its_first_step_is_removed(app: App) -> None:
    blocked, go = threading.Event(), threading.Event()

    @app.task
    async def task(blocks: bool) -> None:
        if blocks:
            blocked.set()
            go.wait(PATIENCE_S)

    with Worker(app) as worker:
        task.enqueue(True)
        assert blocked.wait(PATIENCE_S)
        job_id = task.enqueue(False)
        until(lambda: worker.running == 2)
        assert app.cancel(job_id)
        go.set()
        until(lambda: app.broker.get(job_id) is None)
        until(lambda: not worker.running)


def test_a_handler_that_stops_its_own_worker_is_told_that_it_cannot(app: App) -> None:
    @app.task(max_attempts=1)
    def task() -> None:
        worker.stop()

    worker = Worker(app)
    job_id = task.enqueue()
    with worker:
        until(lambda: job_of(app, job_id).state == "dead")
    assert (job_of(app, job_id).last_error or "").startswith("UsageError: stop")


def test_a_listener_that_exits_ends_nothing(app: App) -> None:
    def exits(settled: Settled) -> None:
        raise SystemExit(1)

    @app.task
    def task() -> None: ...

    with Worker(app, on_settled=exits) as worker:
        task.enqueue_many([(), ()])
        until(lambda: app.broker.stats().acked == 2)
        assert worker.failure is None


def test_a_worker_whose_threads_cannot_begin_can_be_stopped(app: App, monkeypatch: pytest.MonkeyPatch) -> None:
    @app.task
    def task() -> None: ...

    def refuses(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    worker = Worker(app)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuses)
        with pytest.raises(RuntimeError):
            worker.start()
    worker.stop()


def test_run_is_for_the_main_thread(app: App) -> None:
    caught: list[BaseException] = []

    def run() -> None:
        try:
            Worker(app).run()
        except UsageError as error:
            caught.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(PATIENCE_S)
    assert len(caught) == 1


class SteppedClock(SystemClock):
    step_ms = 0

    def wall_ms(self) -> int:
        return super().wall_ms() + self.step_ms


@pytest.mark.parametrize("whose", ["job", "task", "queue", "worker"])
@pytest.mark.parametrize("step_ms", [-3_600_000, 3_600_000])
def test_leases_are_renewed_in_time_after_a_step_of_the_wall_clock(step_ms: int, whose: str) -> None:
    clock = SteppedClock()
    runs: list[int] = []
    with Broker(":memory:", clock=clock) as broker:
        app = App(broker)

        @app.task(visibility_timeout=0.5 if whose == "task" else None)
        def task() -> None:
            runs.append(1)
            time.sleep(1.3)

        if whose == "queue":
            broker.configure_queue("default", visibility_timeout=0.5)
        with Worker(app, visibility_timeout=0.5 if whose == "worker" else None):
            clock.step_ms = step_ms
            task.options(visibility_timeout=0.5 if whose == "job" else None).enqueue()
            until(lambda: broker.stats().acked == 1)
    assert runs == [1]


# -- Hooks


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_hooks_are_around_each_job_in_their_order(app: App, kind: str) -> None:
    seen: list[str] = []

    @app.around
    def outer(job: CurrentJob) -> Iterator[None]:
        seen.append(f"outer {job.task}")
        try:
            yield
        except ValueError as error:
            seen.append(f"outer saw {error}")
            raise

    @app.around
    def inner(job: CurrentJob) -> Iterator[None]:
        assert current_job() is job
        seen.append("inner")
        yield
        seen.append("inner end")

    @app.task
    def sync(n: int) -> None:
        if n:
            raise ValueError("bad")

    @app.task
    async def asynchronous(n: int) -> None:
        sync(n)

    task: Any = sync if kind == "sync" else asynchronous
    with Worker(app, concurrency=1):
        task.enqueue(0)
        until(lambda: app.broker.stats().acked == 1)
        task.enqueue(1)
        until(drained(app))
    assert seen == [f"outer {task.name}", "inner", "inner end", f"outer {task.name}", "inner", "outer saw bad"]


@pytest.mark.parametrize("made", [True, False])
def test_an_async_hook_is_around_async_handlers_alone(app: App, made: bool) -> None:
    seen: list[str] = []

    @app.around
    def plain(job: CurrentJob) -> Iterator[None]:
        seen.append(f"plain {job.args} {dict(job.kwargs)} {job.max_attempts}")
        yield

    async def hook(job: CurrentJob) -> AsyncIterator[None]:
        await asyncio.sleep(0)
        seen.append("async")
        try:
            yield
        except ValueError as error:
            seen.append(f"saw {error}")
            raise

    app.around(contextlib.asynccontextmanager(hook) if made else hook)

    @app.task
    def sync(n: int) -> None: ...

    @app.task(max_attempts=2, time_limit=10)
    async def asynchronous(n: int, m: int = 0) -> None:
        assert current_job().task == "asynchronous"
        seen.append("runs")
        if n:
            raise ValueError("bad")

    with Worker(app, concurrency=1):
        once = asynchronous.options(max_attempts=1)
        for enqueue in (lambda: sync.enqueue(0), lambda: asynchronous.enqueue(0, m=1), lambda: once.enqueue(1)):
            enqueue()
            until(drained(app))
    assert seen == [
        "plain [0] {} 5", "plain [0] {'m': 1} 2", "async", "runs", "plain [1] {} 1", "async", "runs", "saw bad",
    ]  # fmt: skip


@pytest.mark.parametrize("hook", [5, None, "log"])
def test_what_is_no_hook_is_refused(app: App, hook: Any) -> None:
    async def coroutine(job: CurrentJob) -> None: ...

    for wrong in (hook, coroutine):
        with pytest.raises(UsageError, match="around"):
            app.around(wrong)


def test_what_a_hook_raises_fails_the_job(app: App) -> None:
    @app.around
    def hook(job: CurrentJob) -> Iterator[None]:
        raise Reject("not today")
        yield

    @app.task
    def task() -> None:
        raise AssertionError("it ran")

    job_id = task.enqueue()
    with Worker(app):
        until(drained(app))
    assert job_of(app, job_id).last_error == "not today"


def test_on_settled_is_told_each_ending(app: App) -> None:
    told: list[Settled] = []

    @app.task(queue="q")
    def task(n: int) -> Any:
        return Reject("no") if n else time.sleep(0.01)

    def bad(settled: Settled) -> None:
        raise ValueError("a listener's own trouble")

    task.enqueue_many([(0,), (1,)])
    with Worker(app, on_settled=told.append) as worker:
        worker.on_settled.insert(0, bad)
        until(lambda: len(told) == 2)
    assert sorted((s.queue, s.task, s.ending) for s in told) == [("q", "task", "ack"), ("q", "task", "reject")]
    assert max(s.seconds for s in told) >= 0.01


# -- Leases


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_leases_are_renewed_while_handlers_run(app: App, kind: str) -> None:
    @app.task(visibility_timeout=0.4, max_attempts=1)
    def sync() -> None:
        time.sleep(1.3)

    @app.task(visibility_timeout=0.4, max_attempts=1)
    async def asynchronous() -> None:
        await asyncio.sleep(1.3)

    task: Any = sync if kind == "sync" else asynchronous
    task.enqueue_many([()] * 3)
    with Worker(app, concurrency=2):  # the third waits in the worker meanwhile
        until(drained(app))
    assert app.broker.stats().acked == 3
    assert app.broker.deliveries().expired == 0


@pytest.mark.parametrize("why", ["lost", "cancelled"])
@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_handler_is_told_when_its_lease_is_lost_or_its_job_cancelled(app: App, kind: str, why: str) -> None:
    begun, ended = threading.Event(), threading.Event()
    jobs: list[CurrentJob] = []

    @app.task(visibility_timeout=0.4)
    def sync() -> None:
        jobs.append(current_job())
        begun.set()
        assert not current_job().cancelled
        if current_job().wait_cancelled(PATIENCE_S):
            ended.set()
            raise TimeoutError("stopped")

    @app.task(visibility_timeout=0.4)
    async def asynchronous() -> None:
        jobs.append(current_job())
        begun.set()
        try:
            await asyncio.sleep(PATIENCE_S)
        except asyncio.CancelledError:
            ended.set()
            raise

    task: Any = sync if kind == "sync" else asynchronous
    with Worker(app) as worker:
        job_id = task.enqueue()
        assert begun.wait(PATIENCE_S)
        if why == "lost":
            app.broker.ack(LeaseRef(job_id, jobs[0].lease.token))  # by somebody else
        else:
            assert app.cancel(job_id)
        assert ended.wait(PATIENCE_S)
        assert jobs[0].cancelled
        assert jobs[0].reason == ("the lease was lost" if why == "lost" else "cancelled")
        until(lambda: not worker.running)
        assert app.broker.get(job_id) is None
    stats = app.broker.stats()
    assert (stats.acked, stats.cancelled) == ((1, 0) if why == "lost" else (0, 1))


@pytest.mark.parametrize("is_removed", [True, False])
def test_a_call_that_cancels_hears_of_a_job_that_is_answered_in_the_same_moment(
    app: App, monkeypatch: pytest.MonkeyPatch, is_removed: bool
) -> None:
    begun, let_go = threading.Event(), threading.Event()
    tell, remove = Held.tell_handler, Settler._remove_cancelled

    @app.task
    async def task() -> None:
        begun.set()
        await asyncio.sleep(PATIENCE_S)

    def slow_to_look(self: Held, delivery: Any, reason: str) -> None:
        tell(self, delivery, reason)
        until(lambda: delivery.lease.token not in self.deliveries)
        if is_removed:
            until(lambda: app.broker.get(delivery.lease.id) is None)
        let_go.set()

    def slow_to_remove(self: Settler, deliveries: Any) -> None:
        assert is_removed or let_go.wait(PATIENCE_S)
        remove(self, deliveries)

    monkeypatch.setattr(Held, "tell_handler", slow_to_look)
    monkeypatch.setattr(Settler, "_remove_cancelled", slow_to_remove)
    with Worker(app):
        job_id = task.enqueue()
        assert begun.wait(PATIENCE_S)
        assert app.cancel(job_id)
        assert app.broker.get(job_id) is None


def test_a_call_that_cancels_hears_of_a_job_whose_lease_was_lost_in_the_same_moment(
    app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, asked = threading.Event(), threading.Event()
    tell, remove, wait = Held.tell_handler, Settler._remove_cancelled, Held.wait_for_fetcher
    this = threading.current_thread()

    @app.task
    def task() -> None:
        begun.set()
        current_job().wait_cancelled(PATIENCE_S)
        raise ValueError

    def lost(self: Held, delivery: Any, reason: str) -> None:
        app.broker.release(LeaseRef(delivery.lease.id, delivery.lease.token), delay=100)
        tell(self, delivery, reason)
        until(lambda: delivery.lease.token not in self.deliveries)

    def slow_to_remove(self: Settler, deliveries: Any) -> None:
        asked.wait(0.2)  # the call that cancels waits for this, or has gone on
        remove(self, deliveries)

    def slow_to_ask(self: Held) -> None:
        if threading.current_thread() is this:
            asked.set()
            until(lambda: app.broker.get(job_id) is None)
        wait(self)

    monkeypatch.setattr(Held, "tell_handler", lost)
    monkeypatch.setattr(Settler, "_remove_cancelled", slow_to_remove)
    monkeypatch.setattr(Held, "wait_for_fetcher", slow_to_ask)
    with Worker(app):
        job_id = task.enqueue()
        assert begun.wait(PATIENCE_S)
        assert app.cancel(job_id)
        assert app.broker.get(job_id) is None


def test_a_cancelled_handler_that_goes_on_to_its_end_is_done(app: App) -> None:
    begun, may_end = threading.Event(), threading.Event()

    @app.task
    def task() -> None:
        begun.set()
        may_end.wait(PATIENCE_S)

    with Worker(app) as worker:
        job_id = task.enqueue()
        assert begun.wait(PATIENCE_S)
        assert worker.cancel(job_id)
        may_end.set()
        until(lambda: app.broker.stats().acked == 1)
        assert not worker.cancel(job_id)


def test_a_lease_lost_at_the_answer_leaves_the_other_answers_alone(app: App) -> None:
    refs: list[CurrentJob] = []
    settling, go = threading.Event(), threading.Event()
    told: list[str] = []

    @app.task
    def first() -> None: ...

    @app.task
    def task(n: int) -> None:
        if n == 0:
            refs.append(current_job())

    def note(settled: Settled) -> None:
        told.append(settled.ending)
        settling.set()
        go.wait(PATIENCE_S)  # the endings of the others gather meanwhile

    with Worker(app, on_settled=note) as worker:
        first.enqueue()
        assert settling.wait(PATIENCE_S)
        task.enqueue_many([(0,), (1,), (2,)])
        until(lambda: len(worker._held.endings) == 3)
        app.broker.reject(LeaseRef(refs[0].id, refs[0].lease.token), error="by somebody else")
        go.set()
        until(lambda: len(told) == 4)
    assert (app.broker.stats().acked, app.broker.stats().dead) == (3, 1)
    assert sorted(told) == ["ack", "ack", "ack", "lost"]


# -- Time limits


@pytest.mark.parametrize("then", ["returns", "raises", "runs on"])
def test_a_handler_may_finish_its_job_together_with_what_it_enqueues(app: App, then: str) -> None:
    told: list[bool] = []
    endings: list[Settled] = []

    @app.task(queue="next")
    def step(n: int) -> None: ...

    @app.task(max_attempts=1, visibility_timeout=0.3)
    def begin(n: int) -> None:
        with pytest.raises(ZeroDivisionError), current_job().finish() as tx:
            step.options(transaction=tx).enqueue(0)
            n // 0
        assert not current_job().finished
        with current_job().finish() as tx:
            step.options(transaction=tx).enqueue(n)
        with pytest.raises(UsageError, match="before"), current_job().finish():
            pass
        assert app.broker.get(current_job().id) is None
        if then == "runs on":  # nobody renews what is done, or takes it for lost
            told.append(current_job().wait_cancelled(0.5))
        if then == "raises":
            raise RuntimeError("behind it")

    with Worker(app, ["default"], on_settled=endings.append):
        begin.enqueue(7)
        until(lambda: endings)
    assert [(each.task, each.ending) for each in endings] == [("begin", "ack")]
    assert [job.json()["args"] for job in app.broker.jobs("next")] == [[7]]
    assert (app.broker.stats().acked, app.broker.stats().dead, True in told) == (1, 0, False)


def test_a_job_whose_lease_is_lost_cannot_be_finished_and_enqueues_nothing(app: App) -> None:
    errors: list[BaseException] = []

    @app.task(queue="next")
    def step() -> None: ...

    @app.task
    def begin() -> None:
        if current_job().attempt == 1:
            current_job().lease.nack(delay=0)
        try:
            with current_job().finish() as tx:
                step.options(transaction=tx).enqueue()
        except LeaseLostError as error:
            errors.append(error)

    with Worker(app, ["default"], concurrency=1):
        begin.enqueue()
        until(lambda: app.broker.stats("default").acked)
    assert (len(errors), app.broker.stats("next").enqueued) == (1, 1)


def test_a_time_limit_cancels_an_async_handler_and_its_attempt_failed(app: App) -> None:
    @app.task(time_limit=timedelta(seconds=0.1), max_attempts=1, visibility_timeout=timedelta(seconds=9))
    async def task() -> None:
        await asyncio.sleep(PATIENCE_S)

    reasons: list[str | None] = []

    @app.around
    def note(job: CurrentJob) -> Iterator[None]:
        try:
            yield
        finally:
            reasons.append(job.reason)

    job_id = task.enqueue()
    with Worker(app):
        until(drained(app))
    assert job_of(app, job_id).last_error == "TimeLimitError: time limit exceeded (0.1 s)"
    assert reasons == ["time limit exceeded"]


def test_a_time_limit_tells_a_handler_in_a_thread(app: App) -> None:
    @app.task(time_limit=0.1, max_attempts=1)
    def task() -> None:
        assert current_job().wait_cancelled(PATIENCE_S)
        raise TimeoutError(current_job().reason)

    ids = task.enqueue_many([()] * 3)
    with Worker(app, concurrency=1):
        until(drained(app))
    assert {job_of(app, i).last_error for i in ids} == {"TimeoutError: time limit exceeded"}


# -- Child processes


def test_a_task_runs_in_a_child_process_and_may_enqueue_others(children: App) -> None:
    worker_tasks.tell_pid.enqueue_many([()] * 4)
    with Worker(children, concurrency=2):
        until(lambda: len(worker_tasks.ends) == 4)
    pids = {end.split()[1] for end in worker_tasks.ends}
    assert 1 <= len(pids) <= 2
    assert children.broker.stats("children").acked == 4


@pytest.mark.parametrize("end", ["error", "retry", "snooze", "reject", "finish", "none"])
def test_the_end_of_a_handler_in_a_child_is_that_of_one_here(children: App, end: str) -> None:
    job_id = worker_tasks.end.options(retry=RetryPolicy(base=500)).enqueue(end)
    with Worker(children, concurrency=1):
        until(lambda: not children.broker.stats().ready and not children.broker.stats().leased)
    expected: Any = {
        "error": ("scheduled", 1, "ZeroDivisionError: by zero"),
        "retry": ("scheduled", 1, "not yet"),
        "snooze": ("scheduled", 0, None),
        "reject": ("dead", 1, "never"),
        "none": None,
    }.get(end)
    found = children.broker.get(job_id)
    if end == "finish":
        assert found is not None
        assert str(found.last_error).startswith("UsageError: the broker belongs to the worker's own process")
        return
    assert (found and (found.state, found.attempts, found.last_error)) == expected


def test_a_child_that_dies_fails_its_own_job_only_and_the_attempt_counts(children: App) -> None:
    ids = [worker_tasks.die.options(retry=RetryPolicy(base=500)).enqueue(how) for how in ("exit", "signal")]
    worker_tasks.tell_pid.enqueue_many([()] * 4)
    with Worker(children, concurrency=2):
        until(lambda: len(worker_tasks.ends) == 4 and children.broker.stats().scheduled == 2)
    jobs = [job_of(children, job_id) for job_id in ids]
    assert [(j.attempts, j.last_error) for j in jobs] == [
        (1, "ChildDied: the process of the job ended with exit code 7"),
        (1, "ChildDied: the process of the job ended with exit code -9"),
    ]
    assert {end.split()[0] for end in worker_tasks.ends} == {"1"}


def test_a_time_limit_kills_a_child_that_holds_its_interpreter(children: App) -> None:
    job_id = worker_tasks.hang.options(max_attempts=1).enqueue()
    with Worker(children, concurrency=1):
        worker_tasks.tell_pid.enqueue()
        until(lambda: len(worker_tasks.ends) == 1)
    found = job_of(children, job_id)
    assert (found.state, found.attempts) == ("dead", 1)
    assert found.last_error == "TimeLimitError: time limit exceeded (0.5 s), its process was killed"


def test_a_grandchild_that_holds_the_pipe_does_not_hold_up_the_time_limit(children: App, tmp_path: Path) -> None:
    job_id = worker_tasks.hang_with_a_grandchild.enqueue(str(tmp_path / "pid"))
    with Worker(children, concurrency=1):
        until(lambda: job_of(children, job_id).state == "dead")
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)  # it is there still: it would have slept for longer
    assert (job_of(children, job_id).last_error or "").startswith("TimeLimitError")


def test_a_handler_that_forks_and_returns_twice_does_not_answer_for_the_next_job(children: App) -> None:
    worker_tasks.return_twice.enqueue()
    worker_tasks.tell_pid.enqueue_many([()] * 4)
    with Worker(children, concurrency=1):
        until(lambda: len(worker_tasks.ends) == 4)
        until(lambda: children.broker.stats("children").acked == 5)


def test_a_payload_of_many_megabytes_comes_to_a_child_as_it_is(children: App) -> None:
    data = bytes(range(256)) * 40_960  # 10 MiB, 13 as stored
    worker_tasks.measure.enqueue(data)
    with Worker(children, concurrency=1):
        until(lambda: worker_tasks.ends == [f"{len(data)} {zlib.crc32(data)}"])


def test_many_children_begin_at_once(children: App) -> None:
    worker_tasks.tell_pid.enqueue_many([()] * 24)
    with Worker(children, concurrency={"processes": 8}):
        until(lambda: len(worker_tasks.ends) == 24)
    assert {end.split()[0] for end in worker_tasks.ends} == {"1"}


def test_a_child_that_answers_for_another_job_is_replaced_and_its_own_job_failed(children: App) -> None:
    job_id = worker_tasks.answer_for_another.enqueue()
    worker_tasks.tell_pid.enqueue_many([()] * 3)
    with Worker(children, concurrency=1):
        until(lambda: len(worker_tasks.ends) == 3)
    assert "the end of another job" in (job_of(children, job_id).last_error or "")
    assert children.broker.stats("children").acked == 3


def test_time_limits_of_jobs_that_ended_take_no_memory(app: App) -> None:
    @app.task(time_limit=3600)
    def task() -> None: ...

    with Worker(app) as worker:
        for _ in range(5):
            task.enqueue_many([()] * 400)
            until(drained(app))
        assert len(worker._fetcher._limits._heap) < 2000


def test_a_lease_outlives_a_child_that_holds_its_interpreter_for_three_visibility_timeouts(children: App) -> None:
    worker_tasks.compute.enqueue(3 * 0.6 + 0.2)
    with Worker(children, concurrency=1):
        until(drained(children))
    assert children.broker.stats("children").acked == 1
    assert children.broker.deliveries("children").expired == 0


def test_a_cancelled_job_is_killed_in_its_child(children: App) -> None:
    job_id = worker_tasks.sleep.enqueue(60)
    with Worker(children, concurrency=1) as worker:
        until(lambda: worker_tasks.ends == ["begun"])
        assert worker.cancel(job_id)
        until(lambda: children.broker.get(job_id) is None)
    assert children.broker.stats().cancelled == 1


def test_a_child_has_no_broker(children: App) -> None:
    job_id = worker_tasks.use_broker.options(max_attempts=1).enqueue()
    with Worker(children, concurrency=1):
        until(drained(children))
    assert "in a process pool a handler can enqueue tasks" in (job_of(children, job_id).last_error or "")


@pytest.mark.parametrize("limits", [{"child_max_jobs": 1}, {"child_max_memory": 1}])
def test_a_child_is_replaced_when_it_is_spent(children: App, limits: dict[str, int]) -> None:
    worker_tasks.tell_pid.enqueue_many([()] * 2)
    with Worker(children, concurrency=1, **limits):  # type: ignore[arg-type]  # a dict of ints fits no single keyword
        until(lambda: len(worker_tasks.ends) == 2)
    assert len({end.split()[1] for end in worker_tasks.ends}) == 2


# -- Queues


def test_only_the_queues_that_it_was_given_are_worked_on(app: App) -> None:
    @app.task(queue="mine")
    def task() -> None: ...

    task.enqueue()
    task.options(queue="other").enqueue()
    with Worker(app, queues=["mine"]):
        until(lambda: app.broker.stats("mine").acked == 1)
        time.sleep(0.05)
    assert app.broker.stats("other").ready == 1


def test_weights_give_each_queue_its_share(app: App) -> None:
    order: list[str] = []

    @app.task
    def task(queue: str) -> None:
        order.append(queue)

    for queue in ("a", "b"):
        task.options(queue=queue).enqueue_many([(queue,)] * 400)
    with Worker(app, queues={"a": 3, "b": 1}, concurrency=1, prefetch=0):
        until(drained(app))
    assert Counter(order[:200]) == {"a": 150, "b": 50}
    assert Counter(order) == {"a": 400, "b": 400}


def test_a_sequence_is_in_order_of_preference(app: App) -> None:
    order: list[str] = []

    @app.task
    def task(queue: str) -> None:
        order.append(queue)

    for queue in ("b", "a"):
        task.options(queue=queue).enqueue_many([(queue,)] * 5)
    with Worker(app, queues=["a", "b"], concurrency=1):
        until(drained(app))
    assert order == ["a"] * 5 + ["b"] * 5


def test_a_pool_that_is_busy_holds_up_its_own_queue_only(app: App) -> None:
    may_end, ran = threading.Event(), threading.Event()

    @app.task(queue="slow")
    def slow() -> None:
        may_end.wait(PATIENCE_S)

    @app.task(queue="quick")
    async def quick() -> None:
        ran.set()

    slow.enqueue_many([()] * 10)
    with Worker(app, concurrency=2):
        until(lambda: app.broker.stats("slow").leased >= 2)
        for _ in range(3):
            ran.clear()
            quick.enqueue()
            assert ran.wait(PATIENCE_S)
        may_end.set()


# -- Stopping


def stop_while_it_runs(app: App, task: Any, begun: Callable[[], bool], grace: float) -> tuple[float, QueueStats]:
    worker = Worker(app, concurrency=2)
    worker.start()
    until(begun)
    started = time.monotonic()
    worker.stop(grace)
    seconds = time.monotonic() - started
    worker.stop()
    assert not worker.running
    return seconds, app.broker.stats()


def test_stop_lets_run_what_runs_and_gives_back_the_rest(app: App) -> None:
    running: list[CurrentJob] = []

    @app.task
    def task() -> None:
        running.append(current_job())
        while not current_job().stopping:
            time.sleep(0.005)
        time.sleep(0.1)

    task.enqueue_many([()] * 20)
    _, stats = stop_while_it_runs(app, task, lambda: len(running) == 2, 30)
    assert (stats.acked, stats.ready, stats.leased) == (2, 18, 0)
    assert {j.attempts for j in app.broker.jobs("default")} == {0}
    assert not running[0].cancelled


@pytest.mark.parametrize("kind", ["sync", "async", "process"])
def test_what_still_runs_after_the_grace_time_is_given_back_with_its_attempt(children: App, kind: str) -> None:
    may_end, begun = threading.Event(), threading.Event()
    app = children if kind == "process" else App(children.broker)

    def sync() -> None:
        begun.set()
        may_end.wait(PATIENCE_S)

    async def asynchronous() -> None:
        begun.set()
        await asyncio.sleep(PATIENCE_S)

    if kind == "process":
        job_id = worker_tasks.sleep.enqueue(PATIENCE_S)
    else:
        job_id = app.task(sync if kind == "sync" else asynchronous).enqueue()
    seconds, stats = stop_while_it_runs(app, None, lambda: begun.is_set() or bool(worker_tasks.ends), 0.5)
    assert seconds < 0.5 + 2  # the machine may be busy
    found = job_of(app, job_id)
    assert (found.state, found.attempts, stats.leased) == ("ready", 0, 0)
    may_end.set()


def test_a_handler_that_ends_after_the_worker_gave_its_job_back_changes_nothing(app: App) -> None:
    may_end, begun, ended = threading.Event(), threading.Event(), threading.Event()

    @app.task
    def task() -> None:
        begun.set()
        may_end.wait(PATIENCE_S)
        ended.set()

    job_id = task.enqueue()
    stop_while_it_runs(app, task, begun.is_set, 0)
    may_end.set()
    assert ended.wait(PATIENCE_S)
    time.sleep(0.02)
    assert (job_of(app, job_id).state, job_of(app, job_id).attempts) == ("ready", 0)


def test_a_job_that_ends_while_it_is_given_back_is_answered_once(app: App) -> None:
    begun, go, settling = threading.Event(), threading.Event(), threading.Event()

    @app.task
    def first() -> None: ...

    @app.task
    def task() -> None:
        begun.set()
        go.wait(PATIENCE_S)

    def note(settled: Settled) -> None:
        if not settling.is_set():
            settling.set()
            until(lambda: len(worker._held.endings) == 2)  # the same job, twice, in one batch

    worker = Worker(app, concurrency=2, on_settled=note)
    worker.start()
    job_id = task.enqueue()
    assert begun.wait(PATIENCE_S)
    first.enqueue()
    assert settling.wait(PATIENCE_S)
    stopping = threading.Thread(target=worker.stop, args=(0,))
    stopping.start()
    until(lambda: len(worker._held.endings) == 1)
    go.set()
    stopping.join(PATIENCE_S)
    assert app.broker.stats().leased == 0
    found = app.broker.get(job_id)
    assert found is None or (found.state, found.attempts) == ("ready", 0)


@pytest.mark.parametrize("jobs", [1, 50, 1500])
def test_it_stops_by_itself_after_max_jobs_and_begins_no_more(app: App, jobs: int) -> None:
    runs: list[int] = []

    @app.task
    def task() -> None:
        runs.append(1)

    @app.task
    async def asynchronous() -> None:
        runs.append(1)

    task.enqueue_many([()] * 1000)
    asynchronous.enqueue_many([()] * 1000)
    app.broker.enqueue("default", b"no call of a task", priority=9)
    assert run_in_main_thread(Worker(app, max_jobs=jobs)) == 0
    stats = app.broker.stats()
    assert (len(runs), stats.acked, stats.leased, stats.ready) == (jobs, jobs, 0, 2000 - jobs)


def test_it_stops_by_itself_when_it_occupies_too_much_memory(app: App) -> None:
    @app.task
    def task() -> None: ...

    task.enqueue()
    assert run_in_main_thread(Worker(app, max_memory=1)) == 0


def run_in_main_thread(worker: Worker) -> int:
    """`run` closes the app; these tests look at its broker, so it is given open."""
    broker = worker.app.broker
    worker.app._path = broker
    return worker.run()


def test_a_broker_that_fails_or_is_closed_ends_the_worker_with_status_1(tmp_path: Path) -> None:
    with App(tmp_path / "data") as app:

        @app.task
        def task() -> None: ...

        worker = Worker(app)
        threading.Timer(0.1, app.broker.close).start()
        assert worker.run() == 1
        assert worker.failure is not None


def test_a_failed_sync_ends_the_worker_with_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(fd: int) -> None:
        raise OSError("no disk")

    with App(tmp_path / "data") as app:

        @app.task
        def task() -> None: ...

        with Worker(app) as worker:
            task.enqueue()
            until(lambda: app.broker.stats().acked == 1)
            monkeypatch.setattr(inside(app.broker)._disk, "fdatasync", fails, raising=False)
            with pytest.raises(BrokerFailedError):
                task.enqueue()
            until(lambda: worker.failure is not None)
        assert isinstance(worker.failure, BrokerFailedError)
        monkeypatch.undo()
    with Broker(tmp_path / "data") as broker:
        assert broker.stats().acked == 1


def test_a_full_disk_is_waited_out_and_holds_up_no_stop(app: App, monkeypatch: pytest.MonkeyPatch) -> None:
    for part in ("fetcher", "settler"):
        monkeypatch.setattr(f"rivetq.worker.{part}.RETRY_S", 0.01)
    broker, refusals = app.broker, iter(range(6))
    lease_soon, settle_many = broker.lease_soon, broker.settle_many
    full = DiskFullError("no space", path="data")

    def leases(*args: Any, **kwargs: Any) -> Any:
        if next(refusals, None) is not None:
            raise full
        return lease_soon(*args, **kwargs)

    def settle(answers: Any) -> Any:
        if next(refusals, None) is not None:
            raise full
        return settle_many(answers)

    @app.task
    def task() -> None: ...

    monkeypatch.setattr(broker, "lease_soon", leases)
    monkeypatch.setattr(broker, "settle_many", settle)
    task.enqueue()
    with Worker(app) as worker:
        until(lambda: broker.stats().acked == 1)
        refusals = iter(range(3))
        task.enqueue()
        until(lambda: broker.stats().acked == 2)
        assert worker.failure is None

        def never(answers: Any) -> None:
            raise full

        monkeypatch.setattr(broker, "settle_many", never)
        task.enqueue()
        until(lambda: broker.stats().leased == 1)
        started = time.monotonic()
        worker.stop(0.2)
        assert time.monotonic() - started < 5
    assert broker.stats().leased == 1  # it expires


# -- Told before it began


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_job_leased_in_advance_that_is_cancelled_does_not_begin(app: App, kind: str) -> None:
    begun: list[str] = []
    go_on = threading.Event()

    @app.task
    def sync(name: str) -> None:
        begun.append(name)
        if name == "slow":
            go_on.wait(PATIENCE_S)

    @app.task
    async def asynchronous(name: str) -> None:
        begun.append(name)
        while name == "slow" and not go_on.is_set():
            await asyncio.sleep(0.005)

    task: Any = sync if kind == "sync" else asynchronous
    with Worker(app, concurrency=1) as worker:
        task.enqueue_many([(f"quick {n}",) for n in range(100)])  # from now on jobs are leased in advance
        until(drained(app))
        begun.clear()
        _, victim = task.enqueue_many([("slow",), ("victim",)])
        until(lambda: begun and worker.running == 2)
        assert app.cancel(victim)
        go_on.set()
        until(drained(app))
        until(lambda: not worker.running)
    assert begun == ["slow"]
    assert app.broker.stats().acked == 101
    assert app.broker.get(victim) is None


def test_async_handlers_that_wait_for_a_place_get_it_one_after_the_other(app: App) -> None:
    done: list[running.Delivery] = []
    begun: list[int] = []

    @app.task
    async def task(n: int) -> None:
        begun.append(n)
        await asyncio.sleep(0.001)
        assert begun[-1] == n  # no other has begun

    task.enqueue_many([(n,) for n in range(20)])
    pool = pools.LoopPool(app, 1, done.append)
    pool.start()
    pool.submit([running.Delivery(*found) for found in map(_found(app), app.broker.lease_many("default", 20))])
    until(lambda: len(done) == 20)
    pool.stop(PATIENCE_S)
    assert [delivery.ending for delivery in done] == [running.ACK] * 20
    assert begun == list(range(20))


def _found(app: App) -> Callable[[Lease], Any]:
    return lambda lease: (lease, *app.find(lease))


def test_a_job_that_was_told_to_stop_gets_no_child(children: App, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rivetq.worker.children._Child", None)
    done: list[running.Delivery] = []
    pool = ProcessPool(children, 1, done.append)
    worker_tasks.sleep.enqueue(0)
    lease = children.broker.lease("children")
    assert lease is not None
    delivery = running.Delivery(lease, worker_tasks.sleep, [0], {})
    delivery.job.cancel("cancelled")
    pool.submit([delivery])
    pool.start()
    until(lambda: done)
    pool.stop(PATIENCE_S)
    assert done == [delivery]
    assert delivery.ending == running.Ending("nack", "cancelled")


# -- The grace time


@pytest.mark.parametrize("way", ["blocks", "swallows"])
def test_an_async_handler_that_cannot_be_ended_does_not_prolong_the_grace_time(app: App, way: str) -> None:
    begun, end, ended = threading.Event(), threading.Event(), list[bool]()

    @app.task
    async def stubborn() -> None:
        begun.set()
        while not end.is_set():
            if way == "blocks":
                end.wait(PATIENCE_S)
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(0.01)
        ended.append(True)

    worker = Worker(app, grace=2)
    worker.start()
    job_id = stubborn.enqueue()
    assert begun.wait(PATIENCE_S)
    started = time.monotonic()
    worker.stop()
    seconds = time.monotonic() - started
    [loop] = [thread for thread in threading.enumerate() if thread.name == "rivetq-worker-loop"]
    end.set()
    assert seconds < 3.5  # and not after the seconds that the loop may take to end
    assert (job_of(app, job_id).state, job_of(app, job_id).attempts) == ("ready", 0)
    loop.join(PATIENCE_S)  # it ends with the handler, and leaves no task to the garbage collector
    assert not loop.is_alive()
    assert ended == [True]


def test_a_program_that_a_child_starts_ends_when_it_is_told_to(children: App) -> None:
    with Worker(children, concurrency=1):
        worker_tasks.start_a_program.enqueue()
        until(drained(children))
    assert worker_tasks.ends == [f"ended with {-signal.SIGTERM}"]


def test_a_handler_in_a_child_may_have_children_of_its_own(children: App) -> None:
    with Worker(children, concurrency=1):
        worker_tasks.use_multiprocessing.enqueue()
        until(drained(children))
    assert worker_tasks.ends == ["exit code 7"]


def test_a_child_that_takes_its_time_to_end_holds_up_no_answer(children: App, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[running.Delivery] = []
    answered: list[int] = []
    end = _Child.end

    def note(child: _Child) -> None:
        answered.append(len(done))
        end(child)

    monkeypatch.setattr(_Child, "end", note)
    pool = ProcessPool(children, 1, done.append, max_jobs=1)
    for _ in range(2):
        worker_tasks.sleep.enqueue(0)
    leases = children.broker.lease_many("children", 2)
    pool.start()
    pool.submit([running.Delivery(lease, worker_tasks.sleep, [0], {}) for lease in leases])
    until(lambda: len(answered) == 2)
    pool.stop(PATIENCE_S)
    assert answered == [1, 2]


def test_a_job_that_is_cancelled_while_its_child_is_made_is_killed_in_it(
    children: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[running.Delivery] = []
    said: list[str] = []

    class Child:
        def __init__(self, app: App) -> None:
            delivery.job.cancel("cancelled")
            pool.cancel(delivery)  # too early: the job is in no child yet

        def is_alive(self) -> bool:
            return True

        def is_spent(self, *limits: object) -> bool:
            return False

        def run(self, delivery: running.Delivery) -> running.Ending:
            said.append("ran")
            return pools.stopped(delivery)

        def kill(self) -> None:
            said.append("killed")

        def end(self) -> None: ...

    monkeypatch.setattr("rivetq.worker.children._Child", Child)
    pool = ProcessPool(children, 1, done.append)
    worker_tasks.sleep.enqueue(0)
    lease = children.broker.lease("children")
    assert lease is not None
    delivery = running.Delivery(lease, worker_tasks.sleep, [0], {})
    pool.submit([delivery])
    pool.start()
    until(lambda: done)
    pool.stop(PATIENCE_S)
    assert said == ["killed", "ran"]


def test_a_thread_that_outlives_its_handler_in_a_child_asks_for_nothing(children: App) -> None:
    with Worker(children, concurrency=1):
        worker_tasks.ask_late.enqueue()
        until(drained(children))
        time.sleep(0.5)
        worker_tasks.tell_refused.enqueue()
        until(lambda: children.broker.stats("children").acked == 2)
        until(drained(children))
    assert worker_tasks.ends == ["enqueue: no job runs in this child process any more"]
    assert children.broker.stats().dead == 0


@pytest.mark.parametrize("first", ["short", "long"])
def test_two_tasks_of_one_function_are_two_in_a_child(children: App, first: str) -> None:
    tasks = [worker_tasks.short_pause, worker_tasks.long_pause]
    for task in tasks if first == "short" else tasks[::-1]:
        task.enqueue(0.8)
    with Worker(children, concurrency=1):
        until(drained(children))
    [dead] = children.broker.dead_letters("children")
    assert dead.headers["rivetq-task"] == "short"
    assert str(dead.last_error).startswith("TimeLimitError")
    assert children.broker.stats("children").acked == 1


def test_a_child_that_logs_without_end_is_killed_by_its_time_limit(children: App) -> None:
    class SlowHandler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            time.sleep(0.001)

    slow, logger = SlowHandler(), logging.getLogger("shop")
    logger.addHandler(slow)
    try:
        with Worker(children, concurrency=1):
            job_id = worker_tasks.log_without_end.enqueue()
            until(lambda: job_of(children, job_id).state == "dead")
    finally:
        logger.removeHandler(slow)
    assert str(job_of(children, job_id).last_error).startswith("TimeLimitError")


def test_a_record_of_a_child_is_written_by_the_levels_of_its_parent(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "shop")
    for level in (logging.INFO, logging.ERROR):
        logs.take(vars(logging.makeLogRecord({"name": "shop", "levelno": level, "msg": f"level {level}"})))
    assert [record.getMessage() for record in caplog.records] == ["level 40"]


def test_a_child_whose_program_sets_up_logging_forwards_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[dict[str, Any]] = []
    record = logging.makeLogRecord({"name": "shop", "levelno": logging.ERROR, "msg": "once"})
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    logs.forward(sent.append, {})
    [forward] = root.handlers
    forward.handle(record)
    assert [each["msg"] for each in sent] == ["once"]
    root.addHandler(logging.NullHandler())  # as its module does when it is imported
    forward.handle(record)
    assert len(sent) == 1
    logs.forward(sent.append, {})
    assert len(root.handlers) == 2


def test_what_a_child_forks_ends_when_it_is_told_to_and_its_calls_are_worked_on(children: App) -> None:
    with Worker(children, concurrency=1):
        worker_tasks.end_a_fork.enqueue()
        until(lambda: worker_tasks.ends)
    assert worker_tasks.ends == [f"exit code {-signal.SIGTERM}"]


def test_a_filter_of_the_parent_that_raises_fails_no_job_of_a_child(children: App) -> None:
    filtered: list[logging.LogRecord] = []

    def fail(record: logging.LogRecord) -> bool:
        filtered.append(record)
        raise OSError("no space for logs")

    logger = logging.getLogger("shop")
    logger.addFilter(fail)
    logger.setLevel("INFO")
    try:
        with Worker(children, concurrency=1):
            worker_tasks.short_pause.enqueue(0)
            worker_tasks.measure.enqueue(b"")
            made = children.tasks.get("log once") or children.task(name="log once", queue="children", pool="process")(
                worker_tasks.work
            )
            made.enqueue(worker_tasks.Work(0))
            until(lambda: children.broker.stats("children").acked == 3)
            assert children.broker.deliveries().nacked == 0
    finally:
        logger.removeFilter(fail)
    assert [record.getMessage() for record in filtered] == ["at work"]


def test_a_program_that_ends_without_stopping_its_worker_ends(tmp_path: Path) -> None:
    (tmp_path / "shop.py").write_text(
        """
import time
from rivetq.tasks import App
from rivetq.worker import Worker
app = App(":memory:")
@app.task(pool="process")
def work(): ...
if __name__ == "__main__":
    Worker(app, concurrency=1).start()
    work.enqueue()
    while not app.broker.stats().acked:
        time.sleep(0.01)
    raise SystemExit(3)
"""
    )
    done = subprocess.run([sys.executable, "shop.py"], cwd=tmp_path, timeout=60, check=False)
    assert done.returncode == 3


# -- Which queues, and which pools


def test_a_worker_without_queues_takes_all_in_which_calls_of_its_tasks_are(app: App) -> None:
    ran: list[int] = []

    @app.task(queue="own")
    def task(n: int) -> None:
        ran.append(n)

    task.options(queue="before").enqueue(1)
    app.broker.enqueue("somebody's", {"args": [9]})
    del app.queues["before"]  # as after a restart
    app.broker.enqueue("before", b"", priority=0)  # and something else, but behind it
    worker, kept = Worker(app), Worker(app, ["kept"])

    @app.task(queue="between")
    def between() -> None:
        ran.append(0)

    with worker, kept:
        between.enqueue()
        until(lambda: 0 in ran)
        ran.remove(0)
        task.options(queue="meanwhile").enqueue(2)
        until(lambda: sorted(ran) == [1, 2])

        @app.task(queue="late")
        async def late() -> None:
            ran.append(3)

        @app.task(queue="own")
        async def late_too() -> None:
            ran.append(4)

        late.enqueue()
        late_too.enqueue()
        until(lambda: sorted(ran) == [1, 2, 3, 4])
    assert app.broker.stats("somebody's").ready == 1
    assert str(kept._queues.order) == "kept"


def test_a_queue_of_calls_is_known_as_one_behind_an_old_dead_letter(app: App) -> None:
    ran: list[int] = []

    @app.task(queue="own")
    def task(n: int) -> None:
        ran.append(n)

    app.broker.enqueue("other", b"of another program")
    lease = app.broker.lease("other")
    assert lease is not None
    lease.reject()
    task.options(queue="other").enqueue(1)
    del app.queues["other"]  # as after a restart
    with Worker(app):
        until(lambda: ran == [1])


def test_many_queues_are_told_in_few_words() -> None:
    assert str(Order([f"q{n}" for n in range(12)])).endswith("q8, q9 and 2 more queues")


def test_tasks_of_new_kinds_may_come_after_the_start(children: App) -> None:
    with Worker(children, ["default", "x", "y"], concurrency=1) as worker:
        until(lambda: len(worker._held.rooms) == 2)
        for room in list(worker._held.rooms):  # as if no task of these had been there
            if room != "thread":
                del worker._held.rooms[room]
        worker._queues._grouped = None
        worker_tasks.tell_pid.options(queue="x").enqueue()
        until(lambda: worker_tasks.ends)
    assert worker.failure is None


def test_a_pool_that_becomes_free_gets_work_while_another_becomes_full(app: App) -> None:
    began: list[float] = []

    @app.task(queue="a")
    def a(seconds: float) -> None:
        time.sleep(seconds)

    @app.task(queue="b")
    async def b(seconds: float) -> None:
        began.append(time.monotonic())
        await asyncio.sleep(seconds)

    with Worker(app, concurrency={"threads": 1, "tasks": 1}):
        a.enqueue_many([(0,)] * 3000)  # so that very many are leased in advance
        until(drained(app))
        b.enqueue(0.4)
        until(lambda: began)
        a.enqueue_many([(0.2,)] * 50)
        time.sleep(0.6)
        waited_from = time.monotonic()
        b.enqueue(0)
        until(lambda: len(began) == 2)
        app.broker.purge("a")
    assert began[1] - waited_from < 3  # and not after all of a


def test_a_room_that_becomes_smaller_while_others_are_asked_ends_nothing(
    app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    @app.task
    def task() -> None: ...

    free = Room.free
    turns = iter(range(10**9))
    monkeypatch.setattr(Room, "free", lambda self: 0 if next(turns) % 3 else free(self))
    with Worker(app, concurrency=1) as worker:
        for _ in range(20):
            task.enqueue()
        until(drained(app))
    assert worker.failure is None
    assert app.broker.stats().acked == 20


def test_the_records_of_schedules_are_no_jobs_for_a_worker(app: App) -> None:
    @app.periodic(every(1000))
    @app.task
    def tick() -> None: ...

    with Worker(app):
        until(lambda: app.broker.stats("rivetq.schedules").scheduled)
    tick.enqueue()
    with Worker(app, app.broker.queues()):
        until(lambda: app.broker.stats("default").acked)
    [record] = app.broker.jobs("rivetq.schedules")
    assert record.state == "scheduled"
    app.broker.cancel(record.id)
    app.broker.enqueue("rivetq.schedules", record.payload)
    taken = app.broker.lease("rivetq.schedules")
    assert taken is not None
    taken.reject(error="somebody took it for a job")
    with Worker(app):
        until(lambda: app.broker.stats("rivetq.schedules").scheduled)  # no tick is forgotten
    assert not app.broker.stats("rivetq.schedules").dead
    with pytest.raises(UsageError, match="queues"):
        Worker(app, ["rivetq.schedules"])
    with pytest.raises(UsageError, match="records of schedules"):
        app.task(queue="rivetq.schedules")


# -- Endings that are not told at once


def test_handlers_that_ended_before_their_loop_was_blocked_are_done(app: App) -> None:
    ran: list[int] = []
    blocked, end = threading.Event(), threading.Event()

    @app.task(max_attempts=1)
    async def block(n: int) -> None:
        ran.append(n)
        if n:
            blocked.set()
            end.wait(PATIENCE_S)

    block.enqueue_many([(0,), (1,)])
    worker = Worker(app)
    worker.start()
    assert blocked.wait(PATIENCE_S)
    worker.stop(0.5)
    end.set()
    states = [app.broker.get(job_id) for job_id in (1, 2)]
    assert states[0] is None
    assert states[1] is not None
    assert (states[1].state, states[1].attempts, ran) == ("ready", 0, [0, 1])


def test_a_handler_that_ends_while_its_job_is_being_given_back_leaves_no_lease(
    app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, end, ended = threading.Event(), threading.Event(), threading.Event()
    runs: list[int] = []

    @app.task
    def task() -> None:
        begun.set()
        end.wait(PATIENCE_S)

    @app.around
    def tell(job: CurrentJob) -> Iterator[None]:
        runs.append(1)
        yield

    settle_many, run = Broker.settle_many, running.run_here

    def settle_and_end(self: Broker, answers: Any) -> Any:
        end.set()  # in the middle of the answers
        assert ended.wait(PATIENCE_S)
        return settle_many(self, answers)

    def run_and_tell(delivery: Any, app: App) -> None:
        run(delivery, app)
        ended.set()

    monkeypatch.setattr(Broker, "settle_many", settle_and_end)
    monkeypatch.setattr(pools, "run_here", run_and_tell)
    job_id = task.enqueue()
    worker = Worker(app)
    worker.start()
    assert begun.wait(PATIENCE_S)
    worker.stop(0)
    assert (job_of(app, job_id).state, job_of(app, job_id).attempts, runs) == ("ready", 0, [1])


def test_an_answer_for_a_lost_lease_leaves_the_next_delivery_of_the_job_alone(app: App) -> None:
    @app.task(queue="later", retry=RetryPolicy(base=0))
    def task() -> None: ...

    job_id = task.enqueue()
    with Worker(app, ["default"]) as worker:
        deliveries = []
        for _ in range(2):
            if deliveries:
                deliveries[0].lease.nack(delay=0)  # it is lost, and the job there again
            lease = app.broker.lease("later")
            assert lease is not None
            delivery = running.Delivery(lease, app.tasks["task"], [], {})
            delivery.ending = running.ACK
            worker._held.deliveries[lease.token] = delivery
            deliveries.append(delivery)
        worker._held.rooms["thread"].jobs += 2
        for delivery in deliveries:
            worker._held.done(delivery)
        until(lambda: not worker._held.deliveries)
        assert app.broker.get(job_id) is None


def test_a_disk_that_is_full_when_a_job_is_rejected_ends_no_worker(app: App, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rivetq.worker.fetcher.RETRY_S", 0.01)
    reject, tries = Broker.reject, iter(range(10**6))

    def full(self: Broker, *args: Any, **kwargs: Any) -> None:
        if next(tries) < 3:
            raise DiskFullError("full", path="d")
        reject(self, *args, **kwargs)

    monkeypatch.setattr(Broker, "reject", full)
    job_ids = [app.broker.enqueue("default", b"no call") for _ in range(2)]
    with Worker(app) as worker:
        until(lambda: app.broker.stats().dead == 2)
    assert worker.failure is None
    assert job_of(app, job_ids[0]).attempts == 1


def test_a_finish_that_fails_leaves_the_job_to_its_worker(app: App, monkeypatch: pytest.MonkeyPatch) -> None:
    @app.task(max_attempts=1)
    def task() -> None:
        def full(*args: Any) -> None:
            raise DiskFullError("full", path="d")

        with monkeypatch.context() as patch, current_job().finish():
            patch.setattr(app.broker, "_commit", full)

    with Worker(app):
        job_id = task.enqueue()
        until(lambda: job_of(app, job_id).state == "dead")
    assert job_of(app, job_id).last_error == "DiskFullError: full"


@pytest.mark.parametrize("is_under_way", [False, True])
def test_a_job_that_its_handler_finished_before_it_was_given_back_is_told_as_done(
    app: App, monkeypatch: pytest.MonkeyPatch, is_under_way: bool
) -> None:
    begun, give_up, finished, told = threading.Event(), threading.Event(), threading.Event(), threading.Event()
    transact, commit = Transaction.__exit__, Settler._commit
    settled: list[str] = []
    too_early: list[bool] = []

    def slow(self: Transaction, *args: Any) -> None:
        transact(self, *args)
        is_the_handler = not finished.is_set()
        finished.set()
        if is_under_way and is_the_handler:  # it is on disk, and the handler does not know yet
            too_early.append(told.wait(0.1))

    @app.task
    def task() -> None:
        begun.set()
        assert give_up.wait(PATIENCE_S)
        monkeypatch.setattr(Transaction, "__exit__", slow)
        with current_job().finish():
            pass

    def late(self: Settler, *args: Any) -> Any:
        give_up.set()
        assert finished.wait(PATIENCE_S)
        return commit(self, *args)

    def note(event: Settled) -> None:
        settled.append(event.ending)
        told.set()

    monkeypatch.setattr(Settler, "_commit", late)
    worker = Worker(app, grace=0, on_settled=note)
    worker.start()
    task.enqueue()
    assert begun.wait(PATIENCE_S)
    worker.stop()
    until(lambda: settled)
    assert settled == ["ack"]
    assert too_early == [False] * is_under_way
    assert app.broker.stats().acked == 1


def test_a_job_that_is_finished_when_its_answer_is_decided_is_told_as_done(
    app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, decided, finished = threading.Event(), threading.Event(), threading.Event()
    settled: list[str] = []

    @app.task
    def task() -> None:
        begun.set()
        assert decided.wait(PATIENCE_S)
        with current_job().finish():
            pass
        finished.set()

    def slow(delivery: Any) -> Any:
        found = _ending(delivery)
        decided.set()
        assert finished.wait(PATIENCE_S)
        return found

    monkeypatch.setattr("rivetq.worker.settler._ending", slow)
    worker = Worker(app, grace=0, on_settled=lambda event: settled.append(event.ending))
    worker.start()
    task.enqueue()
    assert begun.wait(PATIENCE_S)
    worker.stop()
    until(lambda: settled)
    assert (settled, app.broker.stats().acked) == (["ack"], 1)


def test_a_finish_that_fails_while_its_job_is_given_back_leaves_it_ready(
    app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, may_fail, failed, told = threading.Event(), threading.Event(), threading.Event(), threading.Event()
    settled: list[str] = []
    jobs: list[CurrentJob] = []
    answer, exit_ = Settler._answer, Transaction.__exit__

    @app.task
    def task() -> None:
        jobs.append(current_job())
        begun.set()
        assert may_fail.wait(PATIENCE_S)
        monkeypatch.setattr(Transaction, "__exit__", full)
        with pytest.raises(DiskFullError), current_job().finish():
            pass
        failed.set()
        assert told.wait(PATIENCE_S)  # so that it does not end before it is given back

    def full(self: Transaction, *args: Any) -> None:
        if threading.current_thread().name.startswith("rivetq-worker"):
            time.sleep(0.1)  # so that the answer has to wait for it
            exit_(self, DiskFullError, DiskFullError("full", path="d"), None)
            raise DiskFullError("full", path="d")
        exit_(self, *args)

    def beside(self: Settler, batch: Any) -> None:
        may_fail.set()
        until(lambda: jobs[0].finishing or failed.is_set())
        answer(self, batch)

    monkeypatch.setattr(Settler, "_answer", beside)
    worker = Worker(app, grace=0, on_settled=lambda event: settled.append(event.ending))
    worker.start()
    task.enqueue()
    assert begun.wait(PATIENCE_S)
    worker.stop()
    assert failed.wait(PATIENCE_S)
    told.set()
    stats = app.broker.stats()
    assert (settled, stats.acked, stats.ready, stats.leased) == (["release"], 0, 1, 0)


# -- The grace time


@pytest.mark.parametrize(("grace", "margin"), [(0, 0), (0.4, 0.2), (1, 0.5), (2, 0.5), (5, 1), (30, 2)])
def test_of_a_grace_time_enough_is_kept_to_end_in_it(grace: float, margin: float) -> None:
    assert _margin(grace) == margin


@contextlib.contextmanager
def occupied(app: App) -> Iterator[Worker]:
    """A worker with a handler that outlasts the test."""
    begun, end = threading.Event(), threading.Event()

    @app.task
    def task() -> None:
        begun.set()
        end.wait(PATIENCE_S)

    worker = Worker(app, grace=PATIENCE_S)
    worker.start()
    task.enqueue()
    assert begun.wait(PATIENCE_S)
    yield worker
    end.set()


def test_the_grace_time_counts_from_the_signal(app: App) -> None:
    with occupied(app) as worker:
        worker._signalled(signal.SIGTERM, None)
        assert worker._signalled_at is not None
        worker._signalled_at -= PATIENCE_S  # it came so long ago
        before = time.monotonic()
        worker.stop()
        assert time.monotonic() - before < PATIENCE_S / 3


def test_a_worker_that_failed_waits_for_no_handler(app: App) -> None:
    with occupied(app) as worker:
        app.broker.close()
        until(lambda: worker.failure)
        before = time.monotonic()
        worker.stop()
        assert time.monotonic() - before < PATIENCE_S / 2


def test_a_start_that_fails_leaves_its_schedules_to_others(app: App, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(self: Fetcher, kind: str) -> None:
        raise RuntimeError("no threads")

    apps = [app, App(app.broker)]
    for each in apps:
        each.periodic(every(60), name="tick")(each.task(lambda: None))
    with monkeypatch.context() as patch:
        patch.setattr(Fetcher, "add_room", none)
        with pytest.raises(RuntimeError):
            Worker(apps[0]).start()
    assert not app.workers
    with Worker(apps[1]):
        pass


def test_the_last_schedule_that_a_program_gave_up_ends(app: App, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rivetq.schedules.scheduler.LOOK_MS", 200)
    monkeypatch.setattr("rivetq.schedules.scheduler.AGAIN_S", 0.05)
    before = App(app.broker)
    before.periodic(every(1000))(before.task(lambda: None))
    with Worker(before):
        until(lambda: app.broker.stats("rivetq.schedules").scheduled)
    with Worker(app):
        until(lambda: not app.broker.jobs("rivetq.schedules"))


def test_a_lease_is_renewed_until_its_ending_is_told(app: App) -> None:
    class SlowHandler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            time.sleep(1.5)

    @app.task(max_attempts=2, visibility_timeout=0.4, retry=RetryPolicy(base=500))
    def fail() -> None:
        raise ValueError("once")

    slow = SlowHandler()
    logger = logging.getLogger("rivetq.worker")
    logger.addHandler(slow)
    try:
        with Worker(app):
            job_id = fail.enqueue()
            until(lambda: job_of(app, job_id).state == "scheduled")
    finally:
        logger.removeHandler(slow)
    assert (job_of(app, job_id).attempts, job_of(app, job_id).last_error) == (1, "ValueError: once")


def test_a_worker_that_is_stopped_while_it_starts_leaves_nothing_behind(app: App) -> None:
    @app.periodic(every(1000))
    @app.task
    def tick() -> None: ...

    for _ in range(30):
        worker = Worker(app)
        starting = threading.Thread(target=worker.start)
        starting.start()
        while not worker._started and starting.is_alive():
            pass
        worker.stop()
        starting.join()
        worker.stop()
    assert not app.workers
    names = [thread.name for thread in threading.enumerate()]
    assert not [name for name in names if name in ("rivetq-schedule", "rivetq-fetch", "rivetq-renew")]


# -- Tasks that are made beside their broker


@pytest.fixture
def made(app: App) -> Any:
    return app.task(pool="process", max_attempts=1, name="made here")(worker_tasks.work)


def test_a_child_runs_a_function_of_which_its_module_makes_no_task(app: App, made: Any) -> None:
    ids = [made.enqueue(worker_tasks.Work(number)) for number in (0, 3)]
    with Worker(app, concurrency=1):
        until(drained(app))
    assert app.broker.get(ids[0]) is None
    assert job_of(app, ids[1]).last_error == "ZeroDivisionError: 3 by zero"


def test_hooks_that_a_child_cannot_find_fail_the_job_with_the_reason(app: App, made: Any) -> None:
    app.around(lambda job: contextlib.nullcontext())
    job_id = made.enqueue(worker_tasks.Work(0))
    with Worker(app, concurrency=1):
        until(drained(app))
    assert "'made here': its app has hooks" in str(job_of(app, job_id).last_error)


def test_what_a_child_logs_its_parent_logs_with_the_fields_of_the_job(
    app: App, made: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    job_id = made.enqueue(worker_tasks.Work(3))
    with Worker(app, concurrency=1):
        until(drained(app))
    said = {record.name: record for record in caplog.records if getattr(record, "job_id", None) == job_id}
    assert said["shop"].getMessage() == "at work"
    assert vars(said["shop"])["number"] == 3
    assert vars(said["shop"])["odd"] == str(object)
    assert vars(said["shop"])["task"] == "made here"
    assert "3 by zero" in said["rivetq.worker"].getMessage()
    assert "Traceback" in str(said["rivetq.worker"].exc_text)


def test_a_program_whose_import_opens_its_broker_is_told_why_its_children_end(tmp_path: Path) -> None:
    (tmp_path / "shop.py").write_text(
        """
import sys
from rivetq import Broker
from rivetq.tasks import App
from rivetq.worker import Worker
app = App(Broker("data"))
@app.task(pool="process", max_attempts=1)
def work(): ...
if __name__ == "__main__":
    work.enqueue()
    Worker(app, concurrency=1, max_jobs=1).run()
    print(app.broker.dead_letters("default")[0].last_error)
"""
    )
    done = subprocess.run(
        [sys.executable, "shop.py"], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert "before it was ready" in done.stdout, done.stderr
    assert "BrokerLockedError" in done.stderr


def test_what_an_async_handler_began_is_cancelled_with_it(app: App) -> None:
    ended: list[str] = []
    begun = threading.Event()

    async def aside() -> None:
        try:
            begun.set()
            await asyncio.sleep(PATIENCE_S)
        finally:
            ended.append("aside")

    @app.task
    async def task() -> None:
        task_.append(asyncio.create_task(aside()))
        await asyncio.sleep(0.05)

    task_: list[asyncio.Task[None]] = []
    with Worker(app):
        task.enqueue()
        assert begun.wait(PATIENCE_S)
        until(lambda: app.broker.stats().acked)
        assert ended == []
    assert ended == ["aside"]


# -- Children that begin slowly, or not at all


def module_of_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> Any:
    """A module of its own, which children import as this process does."""
    name = f"tasks_of_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    return importlib.import_module(name)


def test_the_time_a_child_needs_to_begin_is_not_of_the_time_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = """
import multiprocessing, time
from rivetq.tasks import App
app = App(":memory:")
if multiprocessing.parent_process() is not None:
    time.sleep(1)
def quick(): pass
renamed = app.task(pool="process", time_limit=0.5, max_attempts=1)(quick)
"""
    found = module_of_tasks(tmp_path, monkeypatch, text)
    with found.app, Worker(found.app, concurrency={"processes": 1}):
        found.renamed.enqueue()
        until(drained(found.app))
        assert found.app.broker.stats().acked == 1


@pytest.mark.parametrize("size", [1, 2**21])
def test_a_child_that_never_comes_up_is_killed(size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rivetq.worker.children.START_S", 0.3)
    text = """
import multiprocessing, time
from rivetq.tasks import App
app = App(":memory:")
if multiprocessing.parent_process() is not None:
    time.sleep(60)
@app.task(pool="process", time_limit=10, max_attempts=1)
def never(data): pass
"""
    found = module_of_tasks(tmp_path, monkeypatch, text)
    with found.app, Worker(found.app, concurrency={"processes": 1}):
        job_id = found.never.enqueue("x" * size)
        until(lambda: job_of(found.app, job_id).state == "dead")
        assert str(job_of(found.app, job_id).last_error).startswith("TimeLimitError: time limit exceeded (0.3 s)")


def test_a_child_that_cannot_import_a_task_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = """
import multiprocessing
from rivetq.tasks import App
app = App(":memory:")
if multiprocessing.parent_process() is not None:
    raise FileNotFoundError("no settings here")
@app.task(pool="process", max_attempts=1)
def never(): pass
"""
    found = module_of_tasks(tmp_path, monkeypatch, text)
    with found.app, Worker(found.app, concurrency={"processes": 1}):
        job_id = found.never.enqueue()
        until(lambda: job_of(found.app, job_id).state == "dead")
        assert "cannot import the task: FileNotFoundError: no settings here" in str(
            job_of(found.app, job_id).last_error
        )


def test_a_worker_is_started_once(app: App) -> None:
    worker = Worker(app)
    with worker, pytest.raises(UsageError, match="once"):
        worker.start()
    Worker(app).stop()  # one that never began


@pytest.mark.parametrize(
    "options",
    [
        {"concurrency": 0}, {"concurrency": True}, {"concurrency": {"forks": 1}}, {"concurrency": {"threads": 0}},
        {"grace": -1}, {"queues": "mail"}, {"queues": {"mail": 0}}, {"queues": 7}, {"prefetch": -1},
        {"visibility_timeout": "1"}, {"max_jobs": 0}, {"max_memory": 1.5}, {"child_max_jobs": 0},
        {"child_max_memory": "1"}, {"queues": []}, {"queues": [5]}, {"queues": [""]}, {"on_settled": "x"},
    ],
)  # fmt: skip
def test_a_worker_with_a_bad_option_is_refused(app: App, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(options))):
        Worker(app, **options)


def test_a_number_is_the_concurrency_of_each_kind() -> None:
    with pytest.raises(UsageError, match="threads"):
        Concurrency(threads=0)
    assert Concurrency.of(1) == Concurrency(threads=1, processes=1, tasks=1)
    assert Concurrency.of({"threads": 3}) == Concurrency(threads=3)
    assert Concurrency.of(Concurrency(tasks=5)).tasks == 5
