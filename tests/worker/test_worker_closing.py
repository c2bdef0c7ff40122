"""A worker, its app or its broker is ended at every step of every kind of work: all is told, and nothing goes on."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import worker_tasks
from patience import PATIENCE_S, job_of, until

from rivetq import Broker, BrokerClosedError, BrokerFailedError, BrokerLockedError, UsageError
from rivetq.tasks import App, every, running
from rivetq.worker import Settled, Worker, children, pools


def threads() -> set[threading.Thread]:
    """Of workers and their pools."""
    names = ("rivetq-fetch", "rivetq-settle", "rivetq-renew", "rivetq-schedule", "rivetq-worker", "rivetq-loop")
    return {each for each in threading.enumerate() if each.name.startswith((*names, "rivetq-child-"))}


@pytest.fixture
def before() -> set[threading.Thread]:
    """Threads that other tests left behind."""
    return threads()


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
    if how == "start":
        worker.stop()
    until(lambda: not threads() - before)
    worker.stop()
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
    assert {(job_of(app, job_id).state, job_of(app, job_id).attempts) for job_id in ids} == {("ready", 0)}
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
        until(lambda: [each.job.stopping for each in list(worker._held.deliveries.values())] == [True])
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
            until(lambda: worker._held.endings)

    worker = Worker(app, on_settled=note)
    worker.start()
    task.enqueue()
    assert begun.wait(PATIENCE_S)
    worker.stop(0)
    assert told == ["release"]
    assert worker._settler.jobs == 1
    assert worker._held.rooms["thread"].jobs == 0


# -- Ended at every step


class Step:
    """The first who comes to a call stops there, in front of it or behind it, until the test goes on."""

    def __init__(self) -> None:
        self.reached, self.go_on = threading.Event(), threading.Event()

    def wait(self) -> None:
        if not self.reached.is_set():
            self.reached.set()
            assert self.go_on.wait(PATIENCE_S)

    def around(self, call: Callable[..., Any], where: str) -> Callable[..., Any]:
        def stepped(*args: Any, **options: Any) -> Any:
            if where == "before":
                self.wait()
            answer = call(*args, **options)
            if where == "after":
                self.wait()
            return answer

        return stepped


class Closing:
    """A worker of a directory, with work of one kind, and the ways to end it."""

    def __init__(self, path: Path, kind: str) -> None:
        self.path = path
        self.app = App(path, fsync="never")
        self.kind = kind
        self.running, self.end = threading.Event(), threading.Event()
        self.refused: list[BaseException] = []
        self.told: list[str] = []
        self.blocks = False

        def left_behind() -> None:
            """The end of a handler: it enqueues once more, whatever has become of the app."""
            try:
                self.late.enqueue()
            except BaseException as error:
                self.refused.append(error)

        @self.app.task(queue="late")
        def late() -> None: ...

        @self.app.task(queue="work")
        def thread() -> None:
            self.running.set()
            if self.blocks:
                assert self.end.wait(PATIENCE_S)
                left_behind()

        @self.app.task(queue="work")
        async def loop() -> None:
            self.running.set()
            while self.blocks and not self.end.is_set():
                await asyncio.sleep(0.005)

        self.late = late
        process = self.app.task(name="process", queue="work", pool="process")(worker_tasks.pause)
        self.task: Any = {"thread": thread, "loop": loop, "process": process}[kind]
        if kind == "thread":  # these know no pool
            self.app.periodic(every(0.1), name="tick")(self.app.task(queue="ticks", name="tick")(lambda: None))
        self.worker = Worker(
            self.app,
            ["work"],
            concurrency=1,
            grace=1,
            prefetch=4,
            on_settled=lambda each: self.told.append(each.ending),
        )

    def enqueue(self) -> None:
        seconds = PATIENCE_S if self.blocks else 0
        self.task.enqueue_many([(seconds,) if self.kind == "process" else ()] * 3)

    def close(self, way: str) -> list[threading.Thread]:
        ends: dict[str, list[Callable[[], object]]] = {
            "stop": [self.worker.stop],
            "stop at once": [lambda: self.worker.stop(0)],
            "two stops": [self.worker.stop, lambda: self.worker.stop(0)],
            "close": [self.app.close],
            "close and stop": [self.app.close, self.worker.stop],
        }
        closing = [threading.Thread(target=end) for end in ends[way]]
        for each in closing:
            each.start()
        return closing

    def check(self, way: str, before: set[threading.Thread]) -> None:
        """Nothing hangs, goes on or opens again; no job is lost, and none paid for being given back."""
        stopping = threading.Thread(target=self.worker.stop)
        stopping.start()
        stopping.join(PATIENCE_S)
        assert not stopping.is_alive()
        assert not self.app.workers
        assert self.worker.failure is None or isinstance(self.worker.failure, BrokerClosedError)
        if "close" not in way:
            assert self.worker.failure is None
            assert self.app.broker.stats().leased == 0
        self.app.close()
        self.end.set()
        until(lambda: not threads() - before)
        assert all(isinstance(error, BrokerClosedError) for error in self.refused), self.refused
        with Broker(self.path, release_on_open=False) as broker:
            stats = broker.stats("work")
            assert stats.dead == 0
            assert stats.enqueued == stats.acked + stats.ready + stats.leased + stats.scheduled
            if "close" not in way:
                assert (stats.leased, {job.attempts for job in broker.jobs("work")} - {0}) == (0, set())
                assert self.told.count("ack") == stats.acked
        with pytest.raises(BrokerClosedError):
            self.late.enqueue()


WAYS = ["stop", "stop at once", "two stops", "close", "close and stop"]
CALLS = [
    (verb, where)
    for verb in ("queues", "lease_soon", "settle_many", "renewal", "configure_queue", "transaction")
    for where in ("before", "after")
]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("verb", "where"), CALLS, ids=lambda each: str(each))
def test_a_worker_that_is_ended_at_any_call_of_its_broker_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: set[threading.Thread], verb: str, where: str, way: str
) -> None:
    """`queues` is of its start, a renewal is a `settle_many`, the last two are of its schedules."""
    closing, step = Closing(tmp_path / "data", "thread"), Step()
    broker = closing.app.broker
    closing.blocks = verb == "renewal"
    for part in ("fetcher", "renewer"):
        monkeypatch.setattr(f"rivetq.worker.{part}.RENEWALS", 100)  # soon, of a lease that is long
    closing.enqueue()
    name = "settle_many" if verb == "renewal" else verb
    monkeypatch.setattr(broker, name, step.around(getattr(broker, name), where))
    failed: list[BaseException] = []

    def start() -> None:
        try:
            closing.worker.start()
        except BrokerClosedError as error:
            failed.append(error)

    starting = threading.Thread(target=start)
    starting.start()
    assert step.reached.wait(PATIENCE_S)
    ends = closing.close(way)
    if verb != "queues":  # there `stop` waits for the start
        until(lambda: closing.worker._held.is_stopping or broker.health().state != "open")
    step.go_on.set()
    if verb == "renewal":
        closing.end.set()
    for each in (starting, *ends):
        each.join(PATIENCE_S)
        assert not each.is_alive()
    closing.check(way, before)
    assert not failed or (verb == "queues" and "close" in way)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("where", ["before it begins", "while it runs", "when it has ended"])
@pytest.mark.parametrize("kind", ["thread", "loop", "process"])
def test_a_worker_that_is_ended_at_any_step_of_a_handler_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: set[threading.Thread], kind: str, where: str, way: str
) -> None:
    closing, step = Closing(tmp_path / "data", kind), Step()
    broker, worker = closing.app.broker, closing.worker
    closing.blocks = where == "while it runs"
    closing.enqueue()
    if where == "before it begins":
        for module in (pools, children):
            monkeypatch.setattr(module, "may_begin", step.around(pools.may_begin, "before"))
    elif where == "when it has ended":
        monkeypatch.setattr(worker._held, "done", step.around(worker._held.done, "before"))
    elif kind == "process":
        monkeypatch.setattr(children._Child, "run", step_in_child(step))
    worker.start()
    assert (closing.running if where == "while it runs" and kind != "process" else step.reached).wait(PATIENCE_S)
    ends = closing.close(way)
    until(lambda: worker._held.is_stopping or broker.health().state != "open")
    step.go_on.set()
    for each in ends:
        each.join(PATIENCE_S)
        assert not each.is_alive()
    closing.check(way, before)


def step_in_child(step: Step) -> Any:
    """It is reached when a job was sent to a child."""
    original = children._Child.run

    def run(self: Any, delivery: running.Delivery) -> Any:
        send = self._pipe.send

        def told(content: Any) -> None:
            send(content)
            step.go_on.set()  # nobody waits here
            step.reached.set()

        self._pipe.send = told
        return original(self, delivery)

    return run


def test_a_handler_that_run_left_behind_opens_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: set[threading.Thread]
) -> None:
    closing = Closing(tmp_path / "data", "thread")
    closing.blocks = True
    closing.enqueue()

    def signal_it() -> None:
        assert closing.running.wait(PATIENCE_S)
        for _ in range(2):
            closing.worker._signalled(signal.SIGTERM, None)

    monkeypatch.setattr(threading, "main_thread", threading.current_thread)
    signalling = threading.Thread(target=signal_it)
    signalling.start()
    assert closing.worker.run() == 0
    signalling.join()
    closing.end.set()
    until(lambda: closing.refused)
    assert isinstance(closing.refused[0], BrokerClosedError)
    closing.check("close", before)


def test_a_directory_that_run_could_not_open_may_be_tried_again(tmp_path: Path) -> None:
    app = App(tmp_path / "data", fsync="never")
    with Broker(tmp_path / "data"), pytest.raises(BrokerLockedError):
        Worker(app).run()
    assert app.broker.stats().enqueued == 0
    app.close()


def test_run_gives_back_the_signal_handlers_that_it_found(app: App) -> None:
    found = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    during: list[Any] = []

    @app.task
    def task() -> None:
        during.extend(signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT))

    worker = Worker(app, max_jobs=1)
    task.enqueue()
    assert worker.run() == 0
    assert during == [worker._signalled] * 2
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == found
    app.use()
    with pytest.raises(UsageError, match="once"):
        worker.run()
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == found


def test_the_first_failure_of_a_worker_is_the_one_that_is_told(app: App) -> None:
    worker = Worker(app)
    for error in (BrokerFailedError("the disk is gone"), BrokerClosedError("closed")):

        def fail(error: Exception = error) -> None:
            raise error

        worker._guarded(fail)
    assert isinstance(worker.failure, BrokerFailedError)
    assert worker._held.wanted.is_set()
