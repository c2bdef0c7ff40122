"""The app: it knows the tasks, puts their calls into queues, and finds them again."""

from __future__ import annotations

import asyncio
import functools
import inspect
import os
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    asynccontextmanager,
    contextmanager,
)
from datetime import datetime, tzinfo
from types import TracebackType
from typing import TYPE_CHECKING, Any, ParamSpec, Protocol, Self, TypeVar, overload

from rivetq import Broker, BrokerClosedError, Duration, Lease, RetryPolicy, Transaction, UsageError

from ..schedules.when import TICK_HEADER, Every, Misfire, Schedule, key, spec_of
from ..texts import quoted, shown
from ..typedjson import Codec, TypedJson, hints
from ..units import seconds_of
from .current import CurrentJob
from .outcomes import Reject, is_name
from .task import TASK_HEADER, Call, Hook, MakesTask, Options, Pool, Task

if TYPE_CHECKING:
    from .under_test import TestingApp

P = ParamSpec("P")
R = TypeVar("R")

Context = AbstractContextManager[Any] | AbstractAsyncContextManager[Any]
Around = Callable[[CurrentJob], Context | Iterator[Any] | AsyncIterator[Any]]


class Remote(Protocol):
    """The broker of an app in the child of a process pool: calls go to the parent."""

    def put(self, queue: str, payloads: list[bytes], options: dict[str, Any]) -> Sequence[int]: ...


class App:
    """Tasks, and the broker that keeps their jobs.

    Args:
        broker: an open Broker, which stays yours to close; or the path of one, which is opened when it is first needed,
            so that importing a module with an app touches no file.
        codec: how arguments become bytes; None: `TypedJson`.
        options: those of `Broker`, for a path.
    """

    def __init__(self, broker: Broker | str | os.PathLike[str], *, codec: Codec | None = None, **options: Any) -> None:
        if not isinstance(broker, Broker | str | os.PathLike):
            raise UsageError(f"broker: an open Broker or the path of one expected, got {quoted(broker)}")
        if isinstance(broker, Broker) and options:
            raise UsageError(f"{', '.join(options)}: options are for a path, this broker is open already")
        if codec is not None and not (
            callable(getattr(codec, "dumps", None)) and callable(getattr(codec, "loads", None))
        ):
            raise UsageError(f"codec: one with dumps and loads expected, got {quoted(codec)}")
        _check_options(options)
        self.codec = codec or TypedJson()
        self.tasks: dict[str, Task[..., Any]] = {}
        """By name."""
        self.queues: dict[str, set[str]] = {}
        """In order, the queues of the tasks, and others into which calls were put; with the names of these tasks."""
        self.schedules: dict[str, Schedule] = {}
        """By name."""
        self.around_hooks: list[Hook] = []
        self._path = broker
        self._options = options
        self._lock = threading.RLock()  # guards the opening of the broker
        self._broker: Broker | None = broker if isinstance(broker, Broker) else None
        self._is_closed = False  # so that what outlives the app, a handler say, does not open the directory again
        self._async: Any = None
        self._remote: Remote | None = None
        self._runner: Callable[[int], None] | None = None  # in tests: runs a job when it is enqueued
        self._is_testing = False
        self._unhinted: list[Task[..., Any]] = []  # tasks whose annotations the codec has not seen

    def __repr__(self) -> str:
        return f"App({self._path!r})"

    @property
    def broker(self) -> Broker:
        """The broker, opened now if it was not. Raises what `Broker` raises, and BrokerClosedError behind `close`."""
        if self._remote is not None:
            raise UsageError(
                "the broker belongs to the worker's own process; in a process pool a handler can enqueue tasks, and "
                "nothing else"
            )
        found = self._broker
        if found is None:
            with self._lock:
                if self._broker is None:
                    assert not isinstance(self._path, Broker)
                    if self._is_closed:
                        raise BrokerClosedError(
                            f"{self!r} was closed and does not open again by itself; `with app:` or app.use() lets it"
                        )
                    self._broker = Broker(self._path, **self._options)
                found = self._broker
        return found

    def use(self, path: str | os.PathLike[str] | None = None, **options: Any) -> None:
        """Another directory or other options of `Broker`, for an app that is not open; the others stay.

        An app that was closed may open again behind that, also if nothing is given here.
        """
        with self._lock:
            if self._broker is not None:
                raise UsageError("use: the app's broker is open already")
            _check_options(options)
            self._path = self._path if path is None else path
            self._options = {**self._options, **options}
            self._is_closed = False

    def close(self) -> None:
        """Close the broker, unless it was given open. May be repeated.

        What comes later, from a handler that was left behind say, gets BrokerClosedError, and the directory stays free,
        until `use` or a `with` block of the app lets it open again.
        """
        with self._lock:
            if isinstance(self._path, Broker):
                return
            self._is_closed = True
            if self._broker is not None:
                self._broker.close()
                self._broker = self._async = None

    def __enter__(self) -> Self:
        with self._lock:
            self._is_closed = False
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @overload
    def task(self, function: Callable[P, R], /) -> Task[P, R]: ...

    @overload
    def task(
        self,
        function: None = None,
        /,
        *,
        name: str | None = None,
        queue: str = "default",
        priority: int = 5,
        retry: RetryPolicy | None = None,
        max_attempts: int | None = None,
        visibility_timeout: Duration | None = None,
        time_limit: Duration | None = None,
        idempotency_key: Callable[..., str | None] | str | None = None,
        pool: Pool = "thread",
    ) -> MakesTask: ...

    def task(
        self,
        function: Callable[..., Any] | None = None,
        /,
        *,
        name: str | None = None,
        queue: str = "default",
        priority: int = 5,
        retry: RetryPolicy | None = None,
        max_attempts: int | None = None,
        visibility_timeout: Duration | None = None,
        time_limit: Duration | None = None,
        idempotency_key: Callable[..., str | None] | str | None = None,
        pool: Pool = "thread",
    ) -> Any:
        """Make a function, sync or async, a task: ``@app.task`` or ``@app.task(queue="mail")``.

        Args:
            name: unique in the app, the function's own by default; jobs are found by it, so it must not change while
                there are any.
            queue, priority, retry, max_attempts, visibility_timeout: for its jobs, as in `Broker.enqueue`.
            time_limit: seconds that one run may take. An async function is cancelled, a process is killed; a function
                in a thread is told (`current_job().cancelled`) and cannot be stopped: if it goes on to its end, its job
                is done. Otherwise the attempt failed.
            idempotency_key: a function of the task's arguments that gives the key of a call, or None for none.
            pool: where a sync function runs: "thread", or "process" for one that computes, or that must be killed when
                it hangs. Async functions run in an event loop.

        Raises:
            UsageError: an option is wrong, or the app has a task of this name.
        """
        checked = Options(
            queue=queue, priority=priority, retry=retry, max_attempts=max_attempts, idempotency_key=idempotency_key,
            visibility_timeout=visibility_timeout, time_limit=time_limit, pool=pool,
        )  # fmt: skip

        if name is not None and not is_name(name):
            raise UsageError(f"name: a str expected, got {quoted(name)}")

        def register(function: Callable[..., Any]) -> Task[..., Any]:
            _check_function(function, checked.pool)
            task = Task(self, name or function.__name__, function, checked)
            known = self.tasks.setdefault(task.name, task)
            if known is not task:
                raise UsageError(
                    f"task {task.name!r}: {known.__module__} has one of this name; give it a name= of its own"
                )
            self._unhinted.append(task)
            self.note_queue(task.opts.queue, task.name)
            return task

        return register if function is None else register(function)

    def periodic(
        self,
        when: str | Every,
        *,
        timezone: str | tzinfo = "UTC",
        misfire: Misfire = "once",
        grace: float = 60.0,
        name: str | None = None,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> MakesTask:
        """Enqueue a task by the clock: ``@app.periodic("*/5 * * * *")``, above ``@app.task(...)`` or instead of it.

        A worker of the app does it. What the schedule is due for is kept on disk, so that no tick fires twice and none
        is forgotten, over restarts too. The tick is in the job's headers, as "rivetq-tick".

        Args:
            when: a cron expression of five fields (six with seconds first), a word as "@daily", or `every(seconds)`.
            timezone: in which the expression is meant, by name or as a ZoneInfo; see `rivetq.schedules.Cron` for what
                happens when clocks change.
            misfire: what becomes of ticks that no worker fired in time. "once": the last of them is fired, however late
                it is. "all": each of them. "skip": none, and the last one only if it is not later than `grace`.
            grace: seconds; see "skip".
            name: of the schedule, that of the task by default; it must not change, or it is another schedule.
            args, kwargs: of the call.

        Raises:
            UsageError: an argument is wrong.
        """
        spec = spec_of(when, timezone)
        if misfire not in ("skip", "once", "all"):
            raise UsageError(f"misfire: 'skip', 'once' or 'all' expected, got {quoted(misfire)}")
        late = seconds_of(grace, "grace")
        if isinstance(args, str) or not isinstance(args, Sequence):
            raise UsageError(f"args: a sequence expected, got {quoted(args)}")
        if kwargs is not None and not (isinstance(kwargs, Mapping) and all(isinstance(key, str) for key in kwargs)):
            raise UsageError(f"kwargs: a mapping of names expected, got {quoted(kwargs)}")
        if name is not None and not is_name(name):
            raise UsageError(f"name: a str expected, got {quoted(name)}")

        def register(function: Any) -> Any:
            task: Task[..., Any] = function if isinstance(function, Task) else self.task(function)
            call, own = task.call(*args, **(kwargs or {})), name or task.name

            def put(tx: Transaction, tick: datetime) -> None:
                headers = {**(task.opts.headers or {}), TICK_HEADER: tick.isoformat()}
                task.options(transaction=tx, headers=headers, idempotency_key=key(own, tick)).enqueue_many([call])

            if own in self.schedules:
                raise UsageError(f"schedule {own!r} is there already; give this one a name= of its own")
            self.schedules[own] = Schedule(name=own, spec=spec, misfire=misfire, grace=late, put=put)
            return task

        return register

    def around(self, hook: Around) -> Around:
        """Call a hook around each job: a generator function with one yield, or what gives a context manager.

        It gets the `CurrentJob`, runs where the handler runs (in an event loop: in it, so it must not block), and sees
        the handler's exception. What it raises fails the job. Hooks are entered in the order in which they came. An
        async one (an async generator function, or what gives an async context manager) is for async handlers alone.

        >>> app = App(":memory:")
        >>> @app.around
        ... def log(job):
        ...     print("begin", job.task)
        ...     yield
        ...     print("end", job.task)
        """
        if not callable(hook) or inspect.iscoroutinefunction(hook):
            raise UsageError(
                f"around: a generator function, or one that gives a context manager, expected, got {quoted(hook)}"
            )
        made: Any = hook
        if inspect.isgeneratorfunction(hook):
            made = contextmanager(hook)
        elif inspect.isasyncgenfunction(hook):
            made = asynccontextmanager(hook)
        self.around_hooks.append(made)
        return hook

    def testing(self, *, inline: bool = False, start: datetime | float | None = None) -> TestingApp:
        """For tests: ``with app.testing() as testing``. Jobs are in memory, time stands still, and no worker is needed.

        See `rivetq.testing.tasks.TestingApp`: `drain`, `advance`, `assert_enqueued`.

        Args:
            inline: `enqueue` runs the job at once, unless it is for later, and raises what the handler raises.
            start: the first moment; an aware datetime or epoch seconds.
        """
        from .under_test import TestingApp

        return TestingApp(self, inline=inline, start=start)

    def cancel(self, job_id: int) -> bool:
        """Remove a waiting job, or tell one that runs in a worker of this app to stop; False if it is neither.

        A running job whose handler stops is removed then. One whose handler goes on to its end is done.
        """
        return self.broker.cancel(job_id) or any(worker.cancel(job_id) for worker in list(self.workers))

    @functools.cached_property
    def workers(self) -> set[Any]:
        """Workers that run now, in this process."""
        return set()

    # For tasks and workers

    def find(self, lease: Lease) -> tuple[Task[..., Any], list[Any], dict[str, Any]]:
        """The call that a job is. Raises Reject if there is no such task, or its arguments do not fit."""
        name = lease.headers.get(TASK_HEADER)
        if name is None:
            raise Reject(f"no task: the job has no header {TASK_HEADER!r}, so it was not enqueued by a task")
        task = self.tasks.get(name)
        if task is None:
            raise Reject(f"unknown task {quoted(name)}: this app has {', '.join(sorted(self.tasks)) or 'no tasks'}")
        try:
            content = self._known_codec().loads(lease.payload)
            if not isinstance(content, dict) or not content.keys() <= {"args", "kwargs"}:
                raise UsageError("an object with args and kwargs expected")
            args, kwargs = content.get("args", []), content.get("kwargs", {})
            if not isinstance(args, list) or not isinstance(kwargs, dict):
                raise UsageError("args: a list, and kwargs: an object expected")
            task.bind(args, kwargs)
        except Exception as error:  # a codec of the application's own may raise anything
            raise Reject(f"task {name!r} cannot be called: {shown(str(error))}") from error
        return task, args, kwargs

    def put(self, task: Task[..., Any], calls: Sequence[Call]) -> Sequence[int]:
        """Enqueue calls of a task; their ids."""
        payloads, options = self._prepared(task, calls)
        if self._remote is not None:
            return self._remote.put(task.opts.queue, payloads, options)
        ids = (task.opts.transaction or self.broker).enqueue_many(task.opts.queue, payloads, **options)
        if self._runner is not None and task.opts.transaction is None:
            for job_id in ids:
                self._runner(job_id)
        return ids

    async def aput(self, task: Task[..., Any], calls: Sequence[Call]) -> Sequence[int]:
        """`put`, awaited."""
        if self._remote is not None or self._runner is not None or task.opts.transaction is not None:
            return self.put(task, calls)
        from ..aio import AsyncBroker

        if self._broker is None:
            await asyncio.to_thread(lambda: self.broker)  # opening it reads the disk
        if self._async is None:
            self._async = AsyncBroker(self.broker)
        payloads, options = self._prepared(task, calls)
        ids: Sequence[int] = await self._async.enqueue_many(task.opts.queue, payloads, **options)
        return ids

    def note_queue(self, name: str, task: str) -> None:
        """For what enqueues calls: some of this task are in this queue, and workers that follow the app work on it."""
        known = self.queues.get(name, ())
        if task not in known:
            self.queues.setdefault(name, set()).add(task)
            for worker in list(self.workers):
                worker.follow(name)

    def _prepared(self, task: Task[..., Any], calls: Sequence[Call]) -> tuple[list[bytes], dict[str, Any]]:
        codec, opts = self._known_codec(), task.opts
        self.note_queue(opts.queue, task.name)
        payloads = [codec.dumps({"args": list(call.args), "kwargs": dict(call.kwargs)}) for call in calls]
        options: dict[str, Any] = {
            "priority": opts.priority, "delay": opts.delay, "eta": opts.eta, "retry": opts.retry,
            "headers": {**(opts.headers or {}), TASK_HEADER: task.name}, "max_attempts": opts.max_attempts,
            "visibility_timeout": opts.visibility_timeout, "on_duplicate": opts.on_duplicate,
        }  # fmt: skip
        if opts.idempotency_key is not None:
            options["idempotency_keys"] = [task.key(call) for call in calls]
        return payloads, options

    def _known_codec(self) -> Codec:
        """The codec, once it knows the classes of all tasks. Not before: annotations may name what comes later."""
        if self._unhinted:
            with self._lock:  # a second thread waits here until all of them are known
                while self._unhinted:
                    task = self._unhinted[-1]
                    if isinstance(self.codec, TypedJson):
                        self.codec.register_annotations(hints(task.function))
                    self._unhinted.remove(task)  # another may have come behind it
        return self.codec


def _check_options(options: Mapping[str, Any]) -> None:
    if unknown := options.keys() - (inspect.signature(Broker).parameters.keys() - {"path", "unknown"}):
        raise UsageError(f"{', '.join(sorted(unknown))}: no such option of a broker")


def _is_method(function: Callable[..., Any]) -> bool:
    """It stands in the body of a class and begins with a self."""
    place = function.__qualname__.rpartition(".")[0]
    first = next(iter(inspect.signature(function).parameters), "")
    return bool(place) and not place.endswith("<locals>") and first in ("self", "cls")


def _check_function(function: Callable[..., Any], pool: Pool) -> None:
    """Raises UsageError if it cannot be a task."""
    if isinstance(function, Task):
        raise UsageError(f"task: {function.name!r} is one already; app.periodic stands above app.task")
    if not inspect.isroutine(function) or isinstance(function, staticmethod | classmethod):
        raise UsageError(f"task: a function expected, got {quoted(function)}; options are given by name, queue=...")
    try:
        inspect.signature(function)
    except (TypeError, ValueError) as error:
        raise UsageError(f"task: {function!r} does not tell its arguments: {error}") from error
    if _is_method(function):
        raise UsageError(f"task: {function.__qualname__} is a method; jobs are for functions, without a self")
    if inspect.iscoroutinefunction(function) and pool == "process":
        raise UsageError("pool: 'process' is for sync functions")
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        raise UsageError("task: a generator function is never run by a call of it")
    if pool == "process" and "<" in function.__qualname__:  # <locals>, <lambda>
        raise UsageError("pool: 'process' is for functions of a module, which a child process can import")
