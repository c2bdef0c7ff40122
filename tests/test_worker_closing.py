"""A worker, its app or its broker is ended at every step of every kind of work: all is told, and nothing goes on."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import worker_tasks

from rivetq import Job
from rivetq.tasks import App, every
from rivetq.worker import Settled, Worker

PATIENCE_S = 30.0


def until(holds: Callable[[], Any], seconds: float = PATIENCE_S) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.002)


def job(app: App, job_id: int) -> Job:
    found = app.broker.get(job_id)
    assert found is not None
    return found


def threads() -> set[threading.Thread]:
    """Of workers and their pools."""
    names = ("rivetq-fetch", "rivetq-settle", "rivetq-renew", "rivetq-schedule", "rivetq-worker", "rivetq-loop")
    return {each for each in threading.enumerate() if each.name.startswith((*names, "rivetq-child-"))}


@pytest.fixture
def before() -> set[threading.Thread]:
    """Threads that other tests left behind."""
    return threads()


@pytest.fixture
def app() -> Iterator[App]:
    with App(":memory:") as app:
        yield app


# -- A start that fails


STEPS = [
    "rivetq-worker-2", "rivetq-loop-0", "rivetq-worker-loop", "rivetq-child-1", "rivetq-settle", "rivetq-renew",
    "rivetq-schedule", "rivetq-fetch",
]  # fmt: skip


@pytest.mark.parametrize("how", ["start", "with"])
@pytest.mark.parametrize("name", STEPS)
def test_a_start_that_raises_leaves_nothing_behind(
    app: App, monkeypatch: pytest.MonkeyPatch, before: set[threading.Thread], name: str, how: str
) -> None:
    ran: list[int] = []

    @app.periodic(every(0.1))
    @app.task
    def sync() -> None:
        ran.append(1)

    @app.task
    async def asynchronous() -> None:
        ran.append(1)

    app.task(pool="process", queue="children")(worker_tasks.pause)
    original = threading.Thread.start

    def start(self: threading.Thread) -> None:
        if self.name == name:
            raise RuntimeError("can't start new thread")
        original(self)

    for task in (sync, asynchronous):
        task.enqueue()
    worker = Worker(app, concurrency=4, grace=PATIENCE_S)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        with pytest.raises(RuntimeError, match="new thread"):
            if how == "start":
                worker.start()
            else:
                with worker:
                    raise AssertionError("it began")
    worker.stop()
    until(lambda: not threads() - before)
    stats = app.broker.stats("default")
    assert (ran, stats.ready, stats.leased, worker.failure) == ([], 2, 0, None)
    assert not app.workers
    with Worker(app):  # another one may begin, with the same schedules
        until(lambda: app.broker.stats("default").acked >= 2)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, MemoryError])
def test_a_start_that_is_broken_into_when_jobs_are_leased_gives_them_back(
    app: App, monkeypatch: pytest.MonkeyPatch, before: set[threading.Thread], kind: type[BaseException]
) -> None:
    """Ctrl-C, just when the fetcher has begun."""
    begun, may_end = threading.Event(), threading.Event()

    @app.task
    def task() -> None:
        begun.set()
        may_end.wait(PATIENCE_S)

    original = threading.Thread.start

    def start(self: threading.Thread) -> None:
        original(self)
        if self.name == "rivetq-fetch":
            assert begun.wait(PATIENCE_S)
            raise kind

    ids = [task.enqueue() for _ in range(3)]
    worker = Worker(app, concurrency=1, grace=PATIENCE_S)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        with pytest.raises(kind):
            worker.start()
    assert {(job(app, job_id).state, job(app, job_id).attempts) for job_id in ids} == {("ready", 0)}
    may_end.set()
    until(lambda: not threads() - before)


def test_a_stop_in_the_middle_of_a_start_by_the_same_thread_does_not_hang_and_leaves_no_thread(
    app: App, before: set[threading.Thread]
) -> None:
    class Eager(Worker):
        def _begin(self, names: list[str]) -> None:
            self.stop(0)  # as a signal handler may
            super()._begin(names)

    @app.task
    async def task() -> None: ...

    worker = Eager(app)
    worker.start()
    until(lambda: not threads() - before)


def test_a_listener_may_stop_its_worker(app: App, before: set[threading.Thread]) -> None:
    """In the thread that answers, which nobody can wait for there."""

    @app.task
    def task() -> None: ...

    stopped: list[bool] = []

    def stop(settled: Settled) -> None:
        worker.stop(0)
        stopped.append(True)

    worker = Worker(app, on_settled=stop)
    worker.start()
    task.enqueue()
    until(lambda: stopped)
    until(lambda: not threads() - before)
    assert worker._ended.is_set()


# -- Signals, and answers that come twice


@contextlib.contextmanager
def run(app: App, grace: float) -> Iterator[Worker]:
    """A worker whose handler outlasts the block, in `run`, as if in the main thread of a program."""
    begun, end = threading.Event(), threading.Event()

    @app.task
    def task() -> None:
        begun.set()
        end.wait(PATIENCE_S)

    worker = Worker(app, grace=grace)
    worker.start()
    task.enqueue()
    assert begun.wait(PATIENCE_S)
    try:
        yield worker
    finally:
        end.set()


def test_a_second_signal_ends_the_grace_time(app: App) -> None:
    with run(app, 10 * PATIENCE_S) as worker:
        worker._signalled(signal.SIGTERM, None)
        stopping = threading.Thread(target=worker.stop)
        stopping.start()
        until(lambda: [each.job.stopping for each in list(worker._held.values())] == [True])
        assert stopping.is_alive()
        worker._signalled(signal.SIGTERM, None)
        stopping.join(PATIENCE_S)
        assert not stopping.is_alive()
        assert (app.broker.stats().ready, app.broker.stats().leased) == (1, 0)


def test_a_handler_left_behind_that_ends_before_its_settler_is_told_of_once(app: App) -> None:
    """Its job was given back in one batch, and its own end comes in the next one."""
    begun, go, told = threading.Event(), threading.Event(), list[str]()

    @app.task
    def task() -> None:
        begun.set()
        go.wait(PATIENCE_S)

    def note(settled: Settled) -> None:
        told.append(settled.ending)
        if len(told) == 1:
            go.set()
            until(lambda: worker._endings)

    worker = Worker(app, on_settled=note)
    worker.start()
    task.enqueue()
    assert begun.wait(PATIENCE_S)
    worker.stop(0)
    assert told == ["release"]
    assert worker._jobs == 1
    assert worker._rooms["thread"].jobs == 0
