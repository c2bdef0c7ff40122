"""Where handlers run: threads and an event loop here, child processes in `children`. One shape for all three.

A pool is given deliveries and tells each one's ending to `done`, in the thread where it ended. It knows no broker: the
worker decides what an ending means for the job.
"""

from __future__ import annotations

import asyncio
import logging
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any, Protocol

from rivetq import RivetQError

from ..tasks.app import App
from ..tasks.running import GIVEN_BACK, Delivery, Ending, run_async, run_here, stopped, text_of

logger = logging.getLogger("rivetq.worker")

SHUTDOWN = "the worker is shutting down"
LOOP_THREADS = min(32, (os.cpu_count() or 1) + 4)
"""For what handlers give to `asyncio.to_thread`: as many as Python's own executors have."""


class Pool(Protocol):
    """Something that runs handlers."""

    slots: int
    """Handlers at a time."""

    def start(self) -> None: ...
    def submit(self, deliveries: Sequence[Delivery]) -> None: ...

    def cancel(self, delivery: Delivery) -> None:
        """The job was told to stop (`CurrentJob.cancel`). Do what else the pool can do to stop it."""
        ...

    def take_back(self) -> list[Delivery]:
        """Take out the deliveries that have not begun. They never will."""
        ...

    def stop(self, seconds: float) -> None:
        """No more jobs come. End running handlers if possible; return after this many seconds at the latest."""
        ...


Done = Callable[[Delivery], None]


def may_begin(delivery: Delivery, *, later: bool = False) -> bool:
    """Called in every pool when there is a slot for the job. False: its handler must not begin, and its ending is set.

    Args:
        later: something else must be ready first; then this is called once more.
    """
    if delivery.job.cancelled:  # before it began, so it does not begin
        delivery.ending = stopped(delivery)
        return False
    try:
        broker, lease = delivery.broker, delivery.lease
        if broker is None:
            return True
        if not broker.is_paused(lease.queue):
            if not later:
                broker.begin(lease)  # from here on a death of the process costs the job its attempt
            return True
    except RivetQError:  # it was closed or failed, and the worker ends
        pass
    delivery.is_untouched, delivery.ending = True, GIVEN_BACK
    return False


class ThreadPool:
    """Handlers in threads of this process. They share the interpreter: one that computes holds up the others."""

    def __init__(self, app: App, slots: int, done: Done) -> None:
        self.slots = slots
        self._app = app
        self._done = done
        self._waiting: queue.SimpleQueue[Delivery | None] = queue.SimpleQueue()

    def start(self) -> None:
        # Daemons: a handler that never ends does not keep the program from ending.
        for number in range(self.slots):
            threading.Thread(target=self._run, name=f"rivetq-worker-{number}", daemon=True).start()

    def submit(self, deliveries: Sequence[Delivery]) -> None:
        for delivery in deliveries:
            self._waiting.put(delivery)

    def cancel(self, delivery: Delivery) -> None:
        """A thread cannot be stopped from outside; its handler was told."""

    def take_back(self) -> list[Delivery]:
        return drained(self._waiting)

    def stop(self, seconds: float) -> None:
        for _ in range(self.slots):
            self._waiting.put(None)

    def _run(self) -> None:
        app, get, done = self._app, self._waiting.get, self._done
        while (delivery := get()) is not None:
            if program_ends():
                self._waiting.put(delivery)  # for `take_back`
                return
            delivery.started_at = time.monotonic()
            try:
                if may_begin(delivery):
                    run_here(delivery, app.around_hooks)
            except BaseException as error:  # an outcome of a class of its own that cannot be read, a log filter
                delivery.ending = delivery.ending or Ending("nack", f"{type(error).__name__}: the end cannot be told")
            done(delivery)


def program_ends() -> bool:
    """Python ends this process: the main thread has ended, and so have the others that it waits for.

    No job begins any more then: the executors are shut, threads cannot be started, and a worker that is stopped is
    stopped by an `atexit` function. A program goes on, though, as long as a thread that is no daemon does.
    """
    main = threading.main_thread()
    return not main.is_alive() and all(each.daemon or each is main for each in threading.enumerate())


def drained(waiting: queue.SimpleQueue[Delivery | None]) -> list[Delivery]:
    """The deliveries that no thread has taken yet."""
    found: list[Delivery] = []
    while True:
        try:
            delivery = waiting.get_nowait()
        except queue.Empty:
            return found
        if delivery is not None:
            found.append(delivery)


class LoopThreads(ThreadPoolExecutor):
    """The threads of an event loop's `run_in_executor`, `asyncio.to_thread` and `getaddrinfo`.

    Python shuts all executors of its own before it calls `atexit` functions. A worker may be stopped in one of these,
    and handlers then still have their grace time: these threads go on until the process is gone. They are daemons, as
    the threads of handlers are.
    """

    def __init__(self, slots: int) -> None:
        super().__init__(slots)  # of which nothing is used: an event loop insists on the class
        self._slots = slots
        self._calls: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        self._guard = threading.Lock()  # guards the following three
        self._begun = 0
        self._waiting = 0  # threads without a call; below 0: calls without a thread
        self._is_shut = False

    def start(self) -> None:
        """Begin with one thread: while Python ends the process, no other can be started."""
        with self._guard:
            self._start_one()

    def _start_one(self) -> None:
        # Caller holds self._guard.
        threading.Thread(target=self._run, name=f"rivetq-loop-{self._begun}", daemon=True).start()
        self._begun += 1
        self._waiting += 1

    def submit(self, call: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """See `Executor.submit`."""
        future: Future[Any] = Future()
        with self._guard:
            if self._is_shut:
                raise RuntimeError("cannot schedule new futures after shutdown")
            if self._waiting <= 0 and self._begun < self._slots:
                try:
                    self._start_one()
                except RuntimeError:
                    if not self._begun:
                        raise
            self._waiting -= 1
            self._calls.put((future, partial(call, *args, **kwargs)))
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Let the threads end behind the calls that were made. It waits for none: see the class."""
        with self._guard:
            if not self._is_shut:
                self._is_shut = True
                for _ in range(self._begun):
                    self._calls.put(None)

    def _run(self) -> None:
        while (made := self._calls.get()) is not None:
            future, call = made
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(call())
                except BaseException as error:
                    future.set_exception(error)
            del future, call, made  # what they refer to is not kept while this waits
            with self._guard:
                self._waiting += 1


class LoopPool:
    """Async handlers, as tasks of one event loop in a thread of its own."""

    def __init__(self, app: App, slots: int, done: Done) -> None:
        self.slots = slots
        self._app = app
        self._done = done
        self._loop = asyncio.new_event_loop()
        self._threads = LoopThreads(LOOP_THREADS)
        self._loop.set_default_executor(self._threads)
        self._thread = threading.Thread(target=self._run_loop, name="rivetq-worker-loop", daemon=True)
        self._waiting: deque[Delivery] = deque()
        self._tasks: dict[Delivery, asyncio.Task[None]] = {}
        self._is_stopped = False
        self._last: asyncio.Task[None] | None = None  # waits for handlers that swallow their cancellation

    def start(self) -> None:
        try:
            self._threads.start()
            self._thread.start()
        except BaseException:
            with suppress(RuntimeError):  # it runs: then `stop` ends it
                self._loop.close()
            raise

    def submit(self, deliveries: Sequence[Delivery]) -> None:
        self._waiting.extend(deliveries)
        self._loop.call_soon_threadsafe(self._begin)

    def cancel(self, delivery: Delivery) -> None:
        def cancel() -> None:
            task = self._tasks.get(delivery)
            if task is not None:
                task.cancel()

        self._loop.call_soon_threadsafe(cancel)

    def take_back(self) -> list[Delivery]:
        found: list[Delivery] = []
        while self._waiting:
            try:
                found.append(self._waiting.popleft())
            except IndexError:  # the loop was quicker
                break
        return found

    def stop(self, seconds: float) -> None:
        if self._thread.is_alive():
            until = time.monotonic() + seconds
            ended = asyncio.run_coroutine_threadsafe(self._end(seconds / 2), self._loop)
            with suppress(TimeoutError):  # a handler blocks the loop: then it is left behind, until that ends
                if ended.result(seconds):
                    self._thread.join(max(0.0, until - time.monotonic()))

    def _run_loop(self) -> None:
        asyncio.set_event_loop(self._loop)
        while not self._is_stopped:
            try:
                self._loop.run_forever()
            except BaseException:  # a task that a handler began raised SystemExit, say: the others go on
                logger.exception("the event loop of the worker was broken into; it goes on")
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        self._loop.close()

    async def _end(self, seconds: float) -> bool:
        """Cancel all tasks. Returns whether all ended; else the loop goes on until they have, without a waiter."""
        tasks = asyncio.all_tasks() - {asyncio.current_task()}  # handlers, and what these began
        for task in tasks:
            task.cancel()
        if tasks and (await asyncio.wait(tasks, timeout=seconds))[1]:
            self._last = self._loop.create_task(self._end_with(tasks))
            return False
        self._stop_loop()
        return True

    async def _end_with(self, tasks: set[asyncio.Task[Any]]) -> None:
        await asyncio.wait(tasks)
        self._stop_loop()

    def _stop_loop(self) -> None:
        self._is_stopped = True
        self._loop.stop()

    def _begin(self) -> None:
        """Start as many handlers as there is room for."""
        tasks, waiting = self._tasks, self._waiting
        while waiting and len(tasks) < self.slots and not program_ends():
            try:
                delivery = waiting.popleft()
            except IndexError:  # they were taken back meanwhile
                break
            if not may_begin(delivery):
                self._done(delivery)
                continue
            tasks[delivery] = task = self._loop.create_task(run_async(delivery, self._app.around_hooks))
            task.add_done_callback(partial(self._ended, delivery))

    def _ended(self, delivery: Delivery, task: asyncio.Task[None]) -> None:
        # A callback and not the end of the coroutine: a task that is cancelled before its first step never runs.
        del self._tasks[delivery]
        if delivery.ending is None:
            delivery.ending = Ending("nack", "CancelledError: " if task.cancelled() else text_of(task.exception()))
        self._done(delivery)
        if self._waiting:
            self._begin()
