"""A close at every step of every kind of waiting: all are told, nothing hangs, nothing opens again by itself.

A sweep of sweeps.py: `python tests/sweeps.py closing`.

A scene is a broker, a loop, an app or a worker with threads that use it and wait. It is played once to note the lines
that its threads run, and then once for each line: there another thread closes, while the one that reached the line
waits for it, or for as long as it takes to see that the closing waits for this one.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import random
import shutil
import sys
import threading
import time
import warnings
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import worker_tasks
from simulation import ViolationError

import rivetq
from rivetq import Broker, BrokerClosedError, RateLimit
from rivetq.aio import AsyncBroker
from rivetq.tasks import App, every
from rivetq.worker import Settled, Worker

if TYPE_CHECKING:
    from sweeps import Sweep

PACKAGE = os.path.dirname(rivetq.__file__)
ENGINE = (
    "aio", "broker/broker", "broker/requests", "engines/lessees", "engines/clockwork", "engines/leasing",
    "engines/live", "engines/durable", "engines/checkpoint",
    "engines/notifier", "storage/ahead", "storage/group_commit",
)  # fmt: skip
RUNTIME = (
    "schedules/scheduler", "storage/ahead", "worker/children", "worker/fetcher", "worker/held", "worker/limits",
    "worker/order", "worker/pools", "worker/queues", "worker/renewer", "worker/settler",
    "worker/worker",
)  # fmt: skip
PATIENCE_S = 15.0
"""For what must come true by itself; far longer than it takes."""
STEP_S = 0.01
"""For the closing, until the thread that is at the line goes on: by then it is done, or waits for this thread."""
JOBS = 6


class Tracer:
    """Notes lines of all threads that begin while it is set; before one of them it lets another thread close."""

    def __init__(self, files: tuple[str, ...], place: tuple[str, int, int] | None, close: Callable[[], None]) -> None:
        self.visits: Counter[tuple[str, int]] = Counter()
        self.reached = threading.Event()
        self._files = {os.path.join(PACKAGE, f"{name}.py") for name in files}
        self._place = place
        self._lock = threading.Lock()
        self._done = threading.Event()
        self.trouble: BaseException | None = None
        self._closer = threading.Thread(target=self._close, args=(close,), daemon=True)
        self._closer.start()  # before the trace is set: its own lines are not traced

    def _close(self, close: Callable[[], None]) -> None:
        self.reached.wait()
        try:
            close()
        except BaseException as error:
            self.trouble = error
        self._done.set()

    def __call__(self, frame: FrameType, event: str, arg: object) -> Any:
        if frame.f_code.co_filename not in self._files:
            return None
        if event == "line":
            place = frame.f_code.co_filename, frame.f_lineno
            with self._lock:
                self.visits[place] += 1
                hit = (*place, self.visits[place]) == self._place and not self.reached.is_set()
            if hit:
                self.reached.set()
                self._done.wait(STEP_S)
        return self

    @contextlib.contextmanager
    def tracing(self) -> Iterator[None]:
        before, before_here = threading.gettrace(), sys.gettrace()
        threading.settrace(self)
        sys.settrace(self)
        try:
            yield
        finally:
            sys.settrace(before_here)
            threading.settrace(before)

    def end(self, what: str) -> None:
        """Close, if the line was not reached; returns when it is closed."""
        self.reached.set()
        if not self._done.wait(PATIENCE_S):
            raise ViolationError(f"{what}: the closing hangs")
        if self.trouble is not None:
            raise ViolationError(f"{what}: the closing raises {self.trouble!r}") from self.trouble


class Scene(ABC):
    """Something that is closed, and threads that use it. `actors` run at the same time, each in a thread of its own."""

    files: tuple[str, ...] = ENGINE

    def __init__(self, path: Path) -> None:
        self.path = path
        self.errors: list[BaseException] = []

    @abstractmethod
    def actors(self) -> list[Callable[[], None]]:
        """What they raise, BrokerClosedError apart, is a violation."""

    @abstractmethod
    def close(self) -> None: ...

    @abstractmethod
    def check(self) -> None:
        """When all has ended. Raises AssertionError."""

    def begin(self) -> threading.Event:
        """Start the actors; the event is set when they have done their part, and wait for ever."""
        self._threads = [threading.Thread(target=self._act, args=(actor,), daemon=True) for actor in self.actors()]
        self._busy, self._count = len(self._threads), threading.Lock()
        self._all_wait = threading.Event()
        for thread in self._threads:
            thread.start()
        return self._all_wait

    def waits_now(self) -> None:
        """An actor has done its part."""
        with self._count:
            self._busy -= 1
            if not self._busy:
                self._all_wait.set()

    def _act(self, actor: Callable[[], None]) -> None:
        try:
            actor()
        except BrokerClosedError:
            pass
        except BaseException as error:
            self.errors.append(error)
            self._all_wait.set()

    def join(self) -> None:
        for thread in self._threads:
            thread.join(PATIENCE_S)
            assert not thread.is_alive(), "a caller waits for ever"
        assert not self.errors, f"a caller was told {self.errors!r}"


class OfBroker(Scene):
    """Threads, callbacks and an event loop wait on one broker, which is closed."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.broker = Broker(path)
        self.broker.configure_queue("slow", rate_limit=RateLimit(200, 1))
        self.sent: set[int] = set()
        self.taken: set[int] = set()
        """Leased by one who acks: it may be gone."""
        self.told: Counter[str] = Counter()
        self.wanted: set[str] = set()

    def actors(self) -> list[Callable[[], None]]:
        return [self._send, self._work, self._call_back, lambda: asyncio.run(self._await())]

    def _send(self) -> None:
        for number in range(JOBS):
            self.sent.add(self.broker.enqueue("mail", b"x"))
            self.sent.update(self.broker.enqueue_many("slow", [b"y"] * 2, delay=0.002 * number))
            with self.broker.transaction() as tx:
                found = {tx.enqueue("soon", b"z"), tx.enqueue("loop", b"z")}
            self.sent |= found
        self.waits_now()
        self.broker.lease("nothing", wait=None)

    def _work(self) -> None:
        for _ in range(JOBS):
            lease = self.broker.lease(["mail", "slow"], wait=0.2)
            if lease is not None:
                self.taken.add(lease.id)
                lease.ack()
        self.waits_now()
        self.broker.lease_many(["nothing", "empty"], 3, wait=None)

    def _call_back(self) -> None:
        for number in range(JOBS):
            name = str(number)

            def told(leases: object, error: BaseException | None, name: str = name) -> None:
                self.told[name] += 1

            waiting = self.broker.lease_soon(["soon", "slow"], 1, told)
            self.wanted.add(name)
            if number % 3 == 2 and waiting.cancel():
                self.wanted.remove(name)
        self.waits_now()
        self.broker.lease("nothing", wait=None)

    async def _await(self) -> None:
        aio = AsyncBroker(self.broker)
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: None)  # of those awaited no more
        waiting = [asyncio.create_task(aio.lease(name, wait=None)) for name in ("loop", "nothing", "nothing")]
        self.sent.add(await aio.enqueue("loop", b"1"))
        lease = await waiting[0]
        assert lease is not None
        self.taken.add(lease.id)
        await lease.extend(30)
        await lease.ack()
        waiting[1].cancel()
        await aio.lease("nothing", wait=0.005)
        self.waits_now()
        await waiting[2]

    def close(self) -> None:
        self.broker.close()

    def check(self) -> None:
        assert self.broker.health().state == "closed"
        until(lambda: self.told.keys() >= self.wanted, "a callback is not told")
        assert set(self.told.values()) <= {1}, f"told more than once: {self.told}"
        for verb in (
            lambda: self.broker.enqueue("mail", b""),
            lambda: self.broker.lease("nothing", wait=None),
            lambda: self.broker.stats(),
        ):
            with contextlib.suppress(BrokerClosedError):
                raise AssertionError(f"a closed broker answers {verb()!r}")
        with Broker(self.path) as again:
            lost = [job_id for job_id in self.sent - self.taken if again.get(job_id) is None]
            assert not lost, f"lost: {lost}"


class OfLoop(Scene):
    """An event loop ends, without a word to its tasks; the broker stays. What was on its way to them comes back."""

    files = ("aio", "engines/lessees", "engines/clockwork", "engines/leasing", "engines/live", "engines/notifier")

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.broker = Broker(path, fsync="never")
        self.loop = asyncio.new_event_loop()
        self.received: set[int] = set()
        self.over = threading.Event()

    def actors(self) -> list[Callable[[], None]]:
        return [self._send, self._run]

    def _send(self) -> None:
        for _ in range(JOBS):
            self.broker.enqueue("loop", b"x")
        self.waits_now()

    def _run(self) -> None:
        try:
            with contextlib.suppress(RuntimeError):  # it is stopped before its future is done
                self.loop.run_until_complete(self._await())
        finally:
            self.loop.close()
            self.over.set()

    async def _take(self, aio: AsyncBroker) -> None:
        lease = await aio.lease("loop", wait=None)
        assert lease is not None
        self.received.add(lease.id)
        await aio.enqueue("other", b"", delay=0.001)

    async def _await(self) -> None:
        aio = AsyncBroker(self.broker)
        await asyncio.gather(*(self._take(aio) for _ in range(JOBS - 1)))
        self.waits_now()
        await aio.lease("nothing", wait=None)

    def close(self) -> None:
        with contextlib.suppress(RuntimeError):  # it is closed already
            self.loop.call_soon_threadsafe(self.loop.stop)
        if not self.over.wait(PATIENCE_S):
            raise AssertionError("the loop does not end")

    def check(self) -> None:
        def is_back() -> bool:
            gc.collect()  # what is awaited no more
            return self.broker.stats("loop").leased == len(self.received)

        until(is_back, "a job that was on its way to a loop does not come back")
        assert self.broker.health().state == "open"
        self.broker.enqueue("loop", b"x")
        assert self.broker.lease("loop", wait=PATIENCE_S) is not None
        self.broker.close()


class OfWorker(Scene):
    """A worker works and schedules; it is stopped, or its app or its broker is closed."""

    how: str
    pools: tuple[str, ...]

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.broker = Broker(path, fsync="never")
        if self.how != "broker":
            self.broker.close()  # the app opens it
        self.app = app = App(self.broker) if self.how == "broker" else App(path, fsync="never")
        self.ran: Counter[str] = Counter()
        self.done = 0
        self.is_over = threading.Event()  # all is done, or it is closed
        self.children, self.threads = children_of_this_process(), threads_of_workers()

        @app.task
        def in_thread(number: int) -> None:
            self.ran["thread"] += 1

        @app.task
        async def in_loop(number: int) -> None:
            await asyncio.sleep(0)
            self.ran["loop"] += 1

        in_process = app.task(name="in_process", pool="process", queue="children")(worker_tasks.pause)

        @app.periodic(every(0.1))
        @app.task(queue="ticks")
        def tick() -> None:
            pass

        tasks: dict[str, Any] = {"thread": in_thread, "loop": in_loop, "process": in_process}
        for kind in self.pools:
            tasks[kind].enqueue_many([(0,)] * JOBS)
        self.worker = Worker(app, concurrency=2, grace=PATIENCE_S, on_settled=self._note)

    def _note(self, settled: Settled) -> None:
        self.done += settled.ending == "ack" and settled.queue != "ticks"
        if self.done == len(self.pools) * JOBS:
            self.is_over.set()

    def actors(self) -> list[Callable[[], None]]:
        return [self._run]

    def _run(self) -> None:
        self.worker.start()
        assert self.is_over.wait(PATIENCE_S), f"only {self.done} jobs are done"
        self.waits_now()

    def close(self) -> None:
        if self.how == "worker":
            self.worker.stop()
        elif self.how == "app":
            self.app.close()
        else:
            self.broker.close()
        self.is_over.set()

    def check(self) -> None:
        self.worker.stop()  # as a program does that sees its broker closed
        until(lambda: threads_of_workers() <= self.threads, "threads of the worker's go on")
        until(lambda: children_of_this_process() <= self.children, "a child goes on")
        assert not self.app.workers, "the app still has its worker"
        if self.how == "worker":
            assert self.worker.failure is None, repr(self.worker.failure)
            stats, done = self.app.broker.stats(), self.app.broker.stats("default").acked
            assert (stats.leased, stats.dead) == (0, 0), f"jobs stay leased, or died: {stats}"
            assert done == self.ran.total(), f"{self.ran} ran, {done} are done"
            waiting = self.app.broker.jobs("default") + self.app.broker.jobs("children")
            assert not any(each.attempts for each in waiting), "what never began has paid"
            self.app.close()
        with contextlib.suppress(BrokerClosedError):
            raise AssertionError(f"the app opened again: {self.app.broker.stats()}")
        with Broker(self.path) as again:  # the directory is free, and all jobs are done or there
            found = [again.stats(name) for name in ("default", "children")]
            assert sum(each.ready + each.scheduled + each.acked + each.dead for each in found) == JOBS * len(self.pools)


SCENES: dict[str, type[Scene]] = {"broker": OfBroker, "loop": OfLoop} | {
    f"{how}, {' and '.join(pools)}": type("OfWorker", (OfWorker,), {"how": how, "pools": pools, "files": files})
    for how in ("worker", "app", "broker")
    for pools, files in ((("thread", "loop"), RUNTIME), (("process",), ("worker/children", "worker/pools")))
}


def threads_of_workers() -> set[threading.Thread]:
    names = ("rivetq-fetch", "rivetq-settle", "rivetq-renew", "rivetq-schedule", "rivetq-worker", "rivetq-loop")
    return {each for each in threading.enumerate() if each.name.startswith((*names, "rivetq-child-"))}


def children_of_this_process() -> set[str]:
    found: set[str] = set()
    for each in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):  # a thread that ends meanwhile
            found.update(each.read_text().split())
    return found


def until(holds: Callable[[], object], trouble: str) -> None:
    end = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < end, trouble
        time.sleep(0.001)


def play(kind: type[Scene], path: Path, place: tuple[str, int, int] | None, what: str) -> Tracer:
    """One trial. Raises ViolationError."""
    scene = kind(path)
    tracer = Tracer(kind.files, place, scene.close)
    try:
        with tracer.tracing():
            all_wait = scene.begin()
            until(lambda: all_wait.wait(0.001) or tracer.reached.is_set(), "the scene stands still")
            tracer.end(what)
        scene.join()
        scene.check()
    except AssertionError as error:
        raise ViolationError(f"{what}: {error}") from error
    shutil.rmtree(path)
    return tracer


def closing(sweep: Sweep) -> int:
    """A close before every line of every scene's threads: at its first visit and a later one."""
    resource_tracker.ensure_running()  # the first spawned child would begin it, and it stays
    warnings.simplefilter("ignore", RuntimeWarning)  # of coroutines that a loop leaves behind
    rng = random.Random(sweep.seed)
    trials = []
    for name, kind in SCENES.items():
        seen = play(kind, sweep.place(), None, f"{name}, closed when all wait")
        trials += [
            (name, kind, (file, line, visit))
            for (file, line), visits in sorted(seen.visits.items())
            for visit in sorted({1, rng.randint(1, visits)})
        ]
    rng.shuffle(trials)
    reached = made = 0
    for name, kind, place in trials:
        if sweep.share.is_over:
            break
        if sweep.share.takes():
            what = f"{name}, closed at {os.path.basename(place[0])}:{place[1]}, visit {place[2]}"
            tracer = play(kind, sweep.place(), place, what)
            made += 1
            reached += tracer.visits[place[:2]] >= place[2]
    if reached < made / 2:
        raise ViolationError(f"of {made} lines only {reached} were reached a second time")
    return sweep.share.made
