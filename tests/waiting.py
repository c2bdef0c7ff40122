"""Histories of lessees that wait: whenever a job could be leased and somebody waits for its queue, it is leased.

    python tests/waiting.py --histories 2000 --seed 0

Threads, callbacks and tasks of an event loop wait for several queues each, with and without a limit of time. Jobs come,
come back and go; queues are paused, limited and purged; waits are cancelled or end; time passes. After each step the
invariant must come true, without any further step. At the end everybody is told that the broker is closed.

The clock is moved by the history. Unlike a `ManualClock`, which wakes all lessees at each jump, it only does what the
engine's timer would: at the moment for which that was set it lets it look. Some histories run on a `ManualClock`, and
some on the real clock, where milliseconds pass by themselves.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import multiprocessing
import os
import random
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

from simulation import ViolationError, fast_directory

from rivetq import Broker, BrokerClosedError, JobNotFoundError, Lease, LeaseLostError, RateLimit, RetryPolicy
from rivetq.aio import AsyncBroker
from rivetq.clock import SystemClock
from rivetq.engines import leasing
from rivetq.engines.lessees import SleepingLessee
from rivetq.engines.live import LiveEngine
from rivetq.machine.decide import lease as could_lease
from rivetq.machine.machine import Machine
from rivetq.testing import ManualClock

STEPS = 30
QUEUES = ("a", "b", "c")
PATIENCE_S = 20.0
"""For what must come true by itself; far longer than it takes."""
LOOK_S = 0.02
"""The longest between two looks: some of what is waited for has no event."""
MOST_WAITING = 6
MOST_MOVES = 1000
"""Moments at which the timer looks, in one step: there are some dozens of jobs, leases and tokens."""
WEIGHTS = {
    "wait": 10,
    "poll": 1,
    "cancel_wait": 2,
    "end_of_time": 3,
    "enqueue": 8,
    "transaction": 1,
    "awaited": 1,
    "answer": 6,
    "busy": 3,
    "redrive": 2,
    "pause": 1,
    "resume": 3,
    "limit": 2,
    "purge": 1,
    "cancel": 1,
    "time": 8,
}
"""Of the steps."""
KINDS = ("thread", "thread", "soon", "task")


class StillClock(ManualClock):
    """It stands still, and nobody is told when it is moved: the engine has to know by its timer."""

    def subscribe(self, moved: Callable[[], None]) -> Callable[[], None]:
        return lambda: None


class NotedEvent(threading.Event):
    """The timer's: tells whether the timer waits."""

    def __init__(self) -> None:
        super().__init__()
        self.waits = threading.Event()

    def wait(self, timeout: float | None = None) -> bool:
        self.waits.set()
        return super().wait(timeout)

    def set(self) -> None:
        self.waits.clear()
        super().set()


class Waiter:
    """One who waits, in one of three ways."""

    def __init__(self, history: History, kind: str, queues: list[str], limited: bool) -> None:
        self.kind = kind
        self.queues = queues
        self.is_limited = limited
        self.is_over = False  # by its time
        self.told = threading.Event()
        self.error: BaseException | None = None
        self.cancel: Callable[[], object] = lambda: None
        self._history = history
        getattr(self, f"_as_{kind}")(history.broker)

    def _tell(self, leases: list[Lease] | None, error: BaseException | None) -> None:
        self.error = error
        self._history.held.extend(leases or [])
        self.told.set()
        self._history.moved.set()

    def _as_thread(self, broker: Broker) -> None:
        def run() -> None:
            _own.waiter = self
            try:
                found = broker.lease(self.queues, wait=60 if self.is_limited else None)
            except BaseException as error:
                self._tell(None, error)
            else:
                self._tell([] if found is None else [found], None)

        threading.Thread(target=run, daemon=True).start()

    def _as_soon(self, broker: Broker) -> None:
        waiting = broker.lease_soon(self.queues, 1, self._tell)

        def cancel() -> None:
            if waiting.cancel():
                self.told.set()

        self.cancel = cancel

    def _as_task(self, broker: Broker) -> None:
        async def run() -> None:
            task = asyncio.current_task()
            assert task is not None
            self.cancel = lambda: loop.call_soon_threadsafe(task.cancel)
            try:
                found = await self._history.aio.lease(self.queues, wait=None)
            except BaseException as error:
                self._tell(None, error)
            else:
                self._tell([] if found is None else [found.lease], None)

        loop = event_loop()
        asyncio.run_coroutine_threadsafe(run(), loop)

    def end_of_time(self) -> None:
        """The limit of time is over: its thread gets up as it would then."""
        self.is_over = True
        for lessee in self._history.lessees():
            if getattr(lessee, "waiter", None) is self:
                lessee.wake()


_own = threading.local()


class OwnLessee(SleepingLessee):
    """Knows whose it is."""

    def __init__(self) -> None:
        super().__init__()
        self.waiter: Waiter | None = getattr(_own, "waiter", None)


class OwnTime:
    """In place of the module `time`: for a waiter a minute is over when the history says so."""

    @staticmethod
    def monotonic() -> float:
        waiter: Waiter | None = getattr(_own, "waiter", None)
        return 1000.0 if waiter is not None and waiter.is_over else 0.0


class History:
    """One broker, and what happens to it."""

    def __init__(self, seed: str, directory: Path) -> None:
        self.seed = seed
        self.rng = random.Random(seed)
        self.done: list[str] = []
        self.held: list[Lease] = []
        self.waiters: list[Waiter] = []
        self.moved = threading.Event()
        self._held_for, self._go_on = 0, threading.Event()
        self.clock = self.rng.choice((StillClock, StillClock, StillClock, ManualClock, SystemClock))()
        self.unit_s = 0.001 if isinstance(self.clock, SystemClock) else 1.0
        path: Path | str = directory / str(seed) if self.rng.random() < 0.1 else ":memory:"
        start = LiveEngine._start_thread

        def begin(engine: LiveEngine, name: str, target: Callable[[], None]) -> None:
            if name == "rivetq-timer":
                engine._timer_poked = NotedEvent()
            start(engine, name, target)

        with mock.patch.object(LiveEngine, "_start_thread", begin):
            self.broker = Broker(path, clock=self.clock, fsync="never")
        assert isinstance(self.broker._engine, LiveEngine)
        self.engine: LiveEngine = self.broker._engine
        self.aio = AsyncBroker(self.broker)
        register = self.engine._lessees.add

        def noted(*args: Any) -> None:
            register(*args)
            self.moved.set()

        self.engine._lessees.add = noted  # type: ignore[method-assign]  # to see what passes
        for queue in QUEUES:
            policy = RetryPolicy(base=2 * self.unit_s, jitter="none", max_attempts=3)
            self.broker.configure_queue(queue, retry=policy, rate_limit=self._limit())

    def _limit(self) -> RateLimit | None:
        per_second = self.rng.choice((0.01, 0.2, 0.2, 1)) / self.unit_s
        return RateLimit(per_second, self.rng.choice((1, 1, 2))) if self.rng.random() < 0.7 else None

    def live(self) -> None:
        for _ in range(STEPS):
            (step,) = self.rng.choices(list(WEIGHTS), list(WEIGHTS.values()))
            self.done.append(step)
            with contextlib.suppress(LeaseLostError, JobNotFoundError):
                getattr(self, f"step_{step}")()
            if self._held_for:
                self._held_for -= 1
                if not self._held_for:
                    self._go_on.set()
            self.settle()
        self._go_on.set()
        self.end()

    # The invariant

    def lessees(self) -> list[Any]:
        with self.engine._lock:
            return list(dict.fromkeys(each for waiting in self.engine._lessees.lines.values() for each in waiting))

    def settle(self) -> None:
        """Wait until what could be leased is."""
        if self._held_for:
            return
        end = time.monotonic() + PATIENCE_S
        while True:
            self.moved.clear()
            if not (owed := self.owed()):
                self.waiters = [waiter for waiter in self.waiters if not waiter.told.is_set()]
                return
            if time.monotonic() > end:
                raise ViolationError(f"history {self.seed}, {type(self.clock).__name__}: {self.done}: {owed}")
            self.moved.wait(LOOK_S)

    def owed(self) -> str:
        """What has to happen by itself, and has not yet; else nothing."""
        engine, machine = self.engine, self.engine._machine
        with engine._lock:
            waiting: dict[Any, list[str]] = {}
            for name, each in engine._lessees.lines.items():
                for lessee in each:
                    waiting.setdefault(lessee, []).append(name)
            now_ms = self.clock.boot_ms() + engine._offset_ms
            for lessee, names in waiting.items():
                event, _ = could_lease(machine, names, 1, None, now_ms)
                if event is not None:
                    return f"job {event.ids[0]} could be leased, and {type(lessee).__name__} waits for {names}"
                if due := self._due(machine, names, now_ms):
                    return due
            known = {id(lessee) for lessee in waiting}
        for waiter in self.waiters:
            if not waiter.told.is_set() and (waiter.is_over or len(known) < self._untold()):
                return f"a {waiter.kind} that waits for {waiter.queues} neither waits nor was told"
        return ""

    def _untold(self) -> int:
        return sum(not waiter.told.is_set() for waiter in self.waiters)

    def _due(self, machine: Machine, names: list[str], now_ms: int) -> str:
        # Caller holds the engine's lock.
        for name in names:
            queue = machine.queues.get(name)
            if (
                queue is None
                or queue.config.paused
                or (queue.bucket is not None and not queue.bucket.available(now_ms))
            ):
                continue
            for window in machine.waiting[queue.number].scheduled:
                first = None if window is None else window.first()
                if first is not None and first[0] + machine.grain_ms <= now_ms:
                    return f"job {first[1]} of {name} was due {now_ms - first[0]} ms ago"
        return ""

    # What happens

    def queue(self) -> str:
        return self.rng.choice(QUEUES)

    def step_wait(self) -> None:
        if len(self.waiters) < MOST_WAITING:
            queues = self.rng.sample(QUEUES, self.rng.choice((1, 1, 2, 3)))
            kind = self.rng.choice(KINDS)
            limited = kind == "thread" and self.rng.random() < 0.5
            self.waiters.append(Waiter(self, kind, queues, limited))

    def step_poll(self) -> None:
        if (found := self.broker.lease(self.queue())) is not None:
            self.held.append(found)

    def step_cancel_wait(self) -> None:
        if able := [waiter for waiter in self.waiters if waiter.kind != "thread"]:
            self.rng.choice(able).cancel()

    def step_end_of_time(self) -> None:
        if able := [waiter for waiter in self.waiters if waiter.is_limited]:
            self.rng.choice(able).end_of_time()

    def step_enqueue(self) -> None:
        payloads = [b"x"] * self.rng.choice((1, 2, 4, 6))
        delay = self.rng.choice((0, 0, 0, 1, 3)) * self.unit_s
        self.broker.enqueue_many(self.queue(), payloads, delay=delay, priority=self.rng.choice((5, 9)))

    def step_transaction(self) -> None:
        with self.broker.transaction() as tx:
            if self.held:
                tx.nack(self.held.pop())
            for queue in self.rng.sample(QUEUES, 2):
                tx.enqueue(queue, b"t")

    def step_awaited(self) -> None:
        self._go_on.set()  # that thread may have to tell the answer
        self._held_for = 0
        asyncio.run_coroutine_threadsafe(self.aio.enqueue(self.queue(), b"y"), event_loop()).result(PATIENCE_S)

    def step_answer(self) -> None:
        if self.held:
            lease = self.held.pop(self.rng.randrange(len(self.held)))
            verb = self.rng.choice(("ack", "nack", "release", "reject", "nack at once", "release later"))
            if verb == "nack at once":
                self.broker.nack(lease, delay=0)
            elif verb == "release later":
                self.broker.release(lease, delay=2 * self.unit_s)
            else:
                getattr(self.broker, verb)(lease)

    def step_busy(self) -> None:
        """For some steps the thread that looks for all without one has something else to do."""
        if not self._held_for:
            self._held_for, self._go_on = self.rng.randint(2, 4), threading.Event()
            self.engine._notifier.start()
            self.engine._notifier.call(self._go_on.wait)  # type: ignore[arg-type]  # what it returns is not looked at

    def step_redrive(self) -> None:
        self.broker.redrive(self.queue())

    def step_pause(self) -> None:
        self.broker.pause(self.queue())

    def step_resume(self) -> None:
        for queue in QUEUES:
            self.broker.resume(queue)

    def step_limit(self) -> None:
        self.broker.configure_queue(self.queue(), rate_limit=self._limit())

    def step_purge(self) -> None:
        self.broker.purge(self.queue(), state=self.rng.choice((None, "ready", "scheduled")))

    def step_cancel(self) -> None:
        if jobs := self.broker.jobs(self.queue(), limit=3):
            self.broker.cancel(self.rng.choice(jobs).id)

    def step_time(self) -> None:
        seconds = self.rng.choice((1, 1, 5, 40, 200))
        if isinstance(self.clock, StillClock):
            self._move(self.clock, seconds)
        elif isinstance(self.clock, ManualClock):
            self.clock.advance(seconds)

    def _move(self, clock: StillClock, seconds: float) -> None:
        """The timer gets up at each of its moments, and at no other."""
        engine = self.engine
        target_ms, moves = clock.boot_ms() + engine._offset_ms + round(seconds * 1000), 0
        while True:
            self._timer_rests()
            at_ms = engine._timer_at_ms
            now_ms = clock.boot_ms() + engine._offset_ms
            clock._elapsed_ms += max(0, min(at_ms, target_ms) - now_ms)
            if at_ms > target_ms:
                return
            if (moves := moves + 1) > MOST_MOVES:
                raise ViolationError(f"history {self.seed}: {self.done}: the timer does not sleep")
            engine._timer_poked.set()
            self._timer_rests()
            self.settle()

    def _timer_rests(self) -> None:
        poked = self.engine._timer_poked
        assert isinstance(poked, NotedEvent)
        while poked.is_set() or not poked.waits.is_set():
            if not poked.waits.wait(PATIENCE_S):
                raise ViolationError(f"history {self.seed}: {self.done}: the timer does not come to rest")

    # The end

    def end(self) -> None:
        self.broker.close()
        for waiter in self.waiters:
            if not waiter.told.wait(PATIENCE_S):
                raise ViolationError(f"history {self.seed}: {self.done}: a {waiter.kind} was not told of the end")
            if waiter.error is not None and not isinstance(waiter.error, BrokerClosedError | asyncio.CancelledError):
                raise ViolationError(f"history {self.seed}: {self.done}: a {waiter.kind} ended by {waiter.error!r}")


_loops: list[asyncio.AbstractEventLoop] = []


def event_loop() -> asyncio.AbstractEventLoop:
    """One for all histories, in a thread of its own."""
    if not _loops:
        _loops.append(asyncio.new_event_loop())
        threading.Thread(target=_loops[0].run_forever, daemon=True).start()
    return _loops[0]


@contextlib.contextmanager
def own_time() -> Iterator[None]:
    """Waits end when the history says so."""
    with (
        mock.patch.object(leasing, "SleepingLessee", OwnLessee),
        mock.patch.object(leasing, "time", OwnTime),
    ):
        yield


def run(histories: int, seed: int = 0, first: int = 0, of: int = 1) -> int:
    """How many steps there were. Raises ViolationError."""
    steps = 0
    with tempfile.TemporaryDirectory(prefix="rivetq-waiting-", dir=fast_directory()) as directory, own_time():
        for number in itertools.islice(range(histories), first, None, of):
            history = History(f"{seed}.{number}", Path(directory))
            try:
                history.live()
            finally:
                history.broker.close()
            steps += len(history.done)
    return steps


def _part(arguments: tuple[int, int, int, int]) -> int:
    return run(*arguments)


def main() -> None:
    parser = argparse.ArgumentParser(description="Whoever waits for a job that could be leased gets it.")
    parser.add_argument("--histories", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    given = parser.parse_args()
    started, n = time.monotonic(), given.processes
    with ProcessPoolExecutor(n, multiprocessing.get_context("spawn")) as pool:
        try:
            steps = sum(pool.map(_part, [(given.histories, given.seed, i, n) for i in range(n)]))
        except ViolationError as error:
            sys.exit(f"VIOLATION: {error}")
    seconds = time.monotonic() - started
    print(f"waiting: {given.histories:,} histories, {steps:,} steps (seed {given.seed}): 0 violations, {seconds:.0f} s")


if __name__ == "__main__":
    main()
