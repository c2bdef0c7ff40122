"""Where handlers run: threads and an event loop here, child processes in `children`. One shape for all three.

A pool is given deliveries and tells each one's ending to `done`, in whatever thread it happens. It knows no broker:
what an ending means for the job is the worker's business.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AsyncExitStack, ExitStack, suppress
from functools import partial
from typing import Any, Literal, NoReturn, Protocol

import attrs

from rivetq import Broker, Lease, RivetQError

from ..tasks.app import App, CurrentJob, Outcome, Reject, Retry, Snooze, Task, running, seconds_of
from ..texts import ERROR_CHARS, MESSAGE_CHARS, cut

logger = logging.getLogger("rivetq.worker")

TIME_LIMIT = "time limit exceeded"
SHUTDOWN = "the worker is shutting down"
LOOP_THREADS = min(32, (os.cpu_count() or 1) + 4)
"""For what handlers give to `asyncio.to_thread`: as many as Python's own executors have."""


class TimeLimitError(TimeoutError):
    """A handler took longer than the time limit of its task."""


@attrs.frozen
class Ending:
    """How a delivery ended, and so what becomes of its job."""

    verb: Literal["ack", "nack", "release", "reject"]
    error: str | None = None
    delay: float | None = None
    """Seconds."""


ACK = Ending("ack")
GIVEN_BACK = Ending("release")


class Delivery:
    """A leased job on its way through a pool."""

    __slots__ = (
        "args", "broker", "ending", "error", "is_answered", "is_in_pool", "is_removed", "is_told", "is_untouched",
        "job", "kind", "kwargs", "lease", "renew_at", "seconds", "started_at", "task", "visibility",
    )  # fmt: skip

    def __init__(self, lease: Lease, task: Task[..., Any], args: list[Any], kwargs: dict[str, Any]) -> None:
        self.lease = lease
        self.task = task
        self.args = args
        self.kwargs = kwargs
        self.job = CurrentJob(lease, task.name, task.app, args, kwargs)
        self.started_at: float | None = None  # monotonic
        self.seconds = 0.0  # that the handler ran
        self.ending: Ending | None = None
        self.is_told = False  # the worker knows the ending
        self.is_answered = False  # and the broker, too
        self.is_removed: bool | None = None  # because it was cancelled; None: the worker is not through with it yet
        self.kind = "thread"  # of its pool
        self.is_in_pool = False  # it was handed over and counts there
        self.is_untouched = False  # it did not begin and is given back
        self.broker: Broker | None = None  # to ask before it begins
        self.error: BaseException | None = None  # that the handler raised, in this process
        self.visibility = 0.0  # seconds that its lease is extended by
        self.renew_at = 0.0  # monotonic


class Pool(Protocol):
    """Something that runs handlers."""

    slots: int
    """Handlers at a time."""

    def start(self) -> None: ...
    def submit(self, deliveries: Sequence[Delivery]) -> None: ...

    def cancel(self, delivery: Delivery) -> None:
        """The job was told to stop (`CurrentJob.cancel`): whatever more can be done here."""
        ...

    def take_back(self) -> list[Delivery]:
        """Those that have not begun; they never will."""
        ...

    def stop(self, seconds: float) -> None:
        """Nothing comes any more. Ends what runs if that can be ended; returns after so many seconds at the latest."""
        ...


Done = Callable[[Delivery], None]


def ending_of(error: BaseException) -> Ending:
    """What an exception of a handler means."""
    match error:
        case Retry():
            return Ending("nack", str(error), None if error.delay is None else seconds_of(error.delay, "delay"))
        case Snooze():
            return Ending("release", None, seconds_of(error.delay, "delay"))
        case Reject():
            return Ending("reject", str(error))
        case _:
            return Ending("nack", text_of(error))


def stopped(delivery: Delivery) -> Ending:
    """That of a job that was told to stop, and did."""
    return Ending("nack", delivery.job.reason)


def text_of(error: BaseException | None) -> str:
    """ "TypeName: message", also if the message cannot be made; of a long one the beginning. A job keeps 4 KiB."""
    try:
        return f"{type(error).__name__}: {str(error)[:MESSAGE_CHARS]}"
    except Exception as trouble:
        return f"{type(error).__name__}: (its text cannot be made: {type(trouble).__name__})"


def _returned(value: Any) -> Ending:
    if inspect.isawaitable(value) or inspect.isgenerator(value) or inspect.isasyncgen(value):
        return Ending("nack", f"TypeError: the handler returned a {type(value).__name__}, which nobody runs")
    if isinstance(value, type) and issubclass(value, Outcome):  # as `raise` makes an instance of a class
        value = value()
    return ending_of(value) if isinstance(value, Outcome) else ACK


def may_begin(delivery: Delivery, *, later: bool = False) -> bool:
    """In every pool, when there is a slot for the job: its handler begins now. False: it must not; its end is set.

    Args:
        later: something else must be ready first, and this is asked once more then.
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


def run_here(delivery: Delivery, app: App) -> None:
    """Run a sync handler in this thread; sets how it ended."""
    started, own = time.perf_counter(), _copies
    try:
        with running(delivery.job):
            if app.around_hooks:
                value = _hooked(delivery, app)
            else:
                value = delivery.task.function(*delivery.args, **delivery.kwargs)
            if _copies != own:
                _end_copy(delivery, None)
        delivery.ending = ACK if value is None else _returned(value)
    except BaseException as error:
        if _copies != own:
            _end_copy(delivery, error)
        delivery.error = error
        delivery.ending = ending_of(error)
        _log_failure(delivery, error)
    delivery.seconds = time.perf_counter() - started


def _hooked(delivery: Delivery, app: App) -> Any:
    """What the handler returns, with the hooks that are not async around it."""
    own = _copies
    failures: list[BaseException] = []  # the last one that came out of the handler or a hook
    with ExitStack() as stack:
        stack.push(_noted(failures))
        for hook in app.around_hooks:
            made: Any = hook(delivery.job)
            if not hasattr(made, "__aenter__") or hasattr(made, "__enter__"):
                stack.enter_context(made)
                stack.push(_noted(failures))
        try:
            value = delivery.task.function(*delivery.args, **delivery.kwargs)
        except BaseException as error:
            if _copies != own:
                _end_copy(delivery, error)
            raise
        if _copies != own:
            _end_copy(delivery, None)
    if failures:
        raise failures[0]
    return value


_copies = 0
"""How many forks lie between the first process of the program and this one."""


def _note_copy() -> None:
    global _copies  # of the process, as the fork is
    _copies += 1


os.register_at_fork(after_in_child=_note_copy)  # a question for the process at each job would be a system call


def _end_copy(delivery: Delivery, error: BaseException | None) -> NoReturn:
    """In what a handler forked, at its end: neither the job is its own, nor the hooks, nor what comes next here."""
    status = 0
    if isinstance(error, SystemExit):
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    elif error is not None:
        with suppress(BaseException):
            _log_failure(delivery, error)
        status = 1
    os._exit(status & 0xFF)


def _noted(failures: list[BaseException]) -> Callable[..., None]:
    """For around a hook: notes what comes out of what is inside, since the hook may swallow it.

    The job failed all the same: it is acked if the handler returned, and no hook raised anything behind it.
    """

    def note(kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        if error is not None:
            failures[:] = [error]

    return note


async def run_async(delivery: Delivery, app: App) -> None:
    """Run an async handler in this event loop; sets how it ended. Raises nothing, whatever happens."""
    started, own = time.perf_counter(), _copies
    delivery.started_at = time.monotonic()
    try:
        with running(delivery.job):
            value = await (_hooked_async(delivery, app) if app.around_hooks else _limited(delivery))
            if _copies != own:
                _end_copy(delivery, None)
        delivery.ending = ACK if value is None else _returned(value)
    except BaseException as error:
        if _copies != own:
            _end_copy(delivery, error)
        delivery.error = error
        delivery.ending = ending_of(error)
        if not isinstance(error, asyncio.CancelledError):
            _log_failure(delivery, error)
    delivery.seconds = time.perf_counter() - started


async def _hooked_async(delivery: Delivery, app: App) -> Any:
    """As `_hooked`, with the async ones too."""
    own = _copies
    failures: list[BaseException] = []
    async with AsyncExitStack() as stack:
        stack.push(_noted(failures))
        for hook in app.around_hooks:
            made: Any = hook(delivery.job)
            if hasattr(made, "__aenter__"):
                await stack.enter_async_context(made)
            else:
                stack.enter_context(made)
            stack.push(_noted(failures))
        try:
            value = await _limited(delivery)
        except BaseException as error:
            if _copies != own:
                _end_copy(delivery, error)
            raise
        if _copies != own:
            _end_copy(delivery, None)
    if failures:
        raise failures[0]
    return value


async def _limited(delivery: Delivery) -> Any:
    """What the handler returns, within the time limit of its task."""
    task, limit = delivery.task, delivery.task.time_limit
    if limit is None:
        return await task.function(*delivery.args, **delivery.kwargs)
    timer = asyncio.timeout(limit)
    try:
        async with timer:
            return await task.function(*delivery.args, **delivery.kwargs)
    except BaseException as error:
        if timer.expired():
            delivery.job.cancel(TIME_LIMIT)
            raise TimeLimitError(f"{TIME_LIMIT} ({limit:g} s)") from error
        raise


def _log_failure(delivery: Delivery, error: BaseException) -> None:
    if not isinstance(error, Outcome):
        logger.warning(
            "job %s: task %s failed in attempt %s: %s", delivery.lease.id, delivery.task.name, delivery.lease.attempt,
            cut(text_of(error), ERROR_CHARS), exc_info=error, extra=fields(delivery),
        )  # fmt: skip


def fields(delivery: Delivery) -> dict[str, Any]:
    """What a log record says about a job, besides its text."""
    lease = delivery.lease
    return {"job_id": lease.id, "queue": lease.queue, "task": delivery.task.name, "attempt": lease.attempt}


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
                    run_here(delivery, app)
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
    """What nobody has taken yet."""
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
        """Cancel what runs; whether all of it ended. Otherwise the loop goes on until that has, and nobody waits."""
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
        """Start as many as there is room for."""
        tasks, waiting = self._tasks, self._waiting
        while waiting and len(tasks) < self.slots and not program_ends():
            try:
                delivery = waiting.popleft()
            except IndexError:  # they were taken back meanwhile
                break
            if not may_begin(delivery):
                self._done(delivery)
                continue
            tasks[delivery] = task = self._loop.create_task(run_async(delivery, self._app))
            task.add_done_callback(partial(self._ended, delivery))

    def _ended(self, delivery: Delivery, task: asyncio.Task[None]) -> None:
        # A callback and not the end of the coroutine: a task that is cancelled before its first step never runs.
        del self._tasks[delivery]
        if delivery.ending is None:
            delivery.ending = Ending("nack", "CancelledError: " if task.cancelled() else text_of(task.exception()))
        self._done(delivery)
        if self._waiting:
            self._begin()
