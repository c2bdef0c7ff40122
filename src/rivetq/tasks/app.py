"""The app and its tasks."""

from __future__ import annotations

import asyncio
import functools
import importlib
import inspect
import os
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    asynccontextmanager,
    contextmanager,
)
from contextvars import ContextVar
from datetime import datetime, timedelta, tzinfo
from types import EllipsisType, TracebackType
from typing import TYPE_CHECKING, Any, Generic, Literal, ParamSpec, Protocol, Self, TypeVar, overload

import attrs

from rivetq import Broker, BrokerClosedError, Duration, Lease, RetryPolicy, Transaction, UsageError

from ..schedules.scheduler import SCHEDULES, TICK_HEADER, Every, Misfire, Schedule, key, spec_of
from ..texts import quoted, shown
from ..typedjson import Codec, TypedJson, hints

if TYPE_CHECKING:
    from ..testing.tasks import TestingApp

P = ParamSpec("P")
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)

TASK_HEADER = "rivetq-task"
MOST_S = 100 * 366 * 86_400
"""The longest duration, as for a broker."""
Pool = Literal["thread", "process"]
Context = AbstractContextManager[Any] | AbstractAsyncContextManager[Any]
Around = Callable[["CurrentJob"], Context | Iterator[Any] | AsyncIterator[Any]]


# What a handler may end with


class Outcome(Exception):  # it is no error, it is raised to get out of the handler
    """What a handler raises, or returns, to say how its job ends."""


class Retry(Outcome):
    """The attempt failed: again by the retry policy, or after `delay` seconds; a dead letter at max_attempts."""

    def __init__(self, delay: Duration | None = None, *, error: str | None = None) -> None:
        super().__init__(delay, error)
        if delay is not None:
            seconds_of(delay, "delay")
        if error is not None and not isinstance(error, str):
            raise UsageError(f"error: a str expected, got {quoted(error)}")
        self.delay = delay
        self.error = error

    def __str__(self) -> str:
        return self.error or "the task asked for a retry"


class Snooze(Outcome):
    """Not now: again after `delay` seconds, and this attempt is not counted."""

    def __init__(self, delay: Duration) -> None:
        super().__init__(delay)
        seconds_of(delay, "delay")
        self.delay = delay

    def __str__(self) -> str:
        return "the task asked to come later"


class Reject(Outcome):
    """It will never work: a dead letter now."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        if not isinstance(reason, str):
            raise UsageError(f"reason: a str expected, got {quoted(reason)}")
        self.reason = reason

    def __str__(self) -> str:
        return self.reason


# The job that runs


class CurrentJob:
    """The job that a handler is running, and whether it should end early. See `current_job`."""

    def __init__(
        self, lease: Lease, task: str, app: App, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> None:
        self.lease = lease
        self.task = task
        """Name of the task."""
        self.args = args
        self.kwargs: Mapping[str, Any] = {} if kwargs is None else kwargs
        self._app = app
        self.finished = False
        """It was acked, by `finish`."""
        self.finishing = False  # the commit of that is under way: it may still fail
        self._waiting: tuple[Callable[[], object], ...] = ()  # told when it is over
        self.stopping = False
        """The worker is shutting down: a handler that can end soon, or raise `Snooze`, should."""
        self.reason: str | None = None
        """Why it was cancelled."""
        self._is_cancelled = False
        self._cancelled: threading.Event | None = None  # made for the first who waits: most jobs need none

    @property
    def id(self) -> int:
        return self.lease.id

    @property
    def queue(self) -> str:
        return self.lease.queue

    @property
    def attempt(self) -> int:
        """1 is the first delivery."""
        return self.lease.attempt

    @property
    def max_attempts(self) -> int | None:
        """None: no end."""
        return self.lease.max_attempts

    @property
    def headers(self) -> Mapping[str, str]:
        return self.lease.headers

    @property
    def cancelled(self) -> bool:
        """Stop as soon as you can: the lease was lost, somebody cancelled it, or its time limit is over.

        A handler in a thread cannot be stopped from outside; one that runs for long should look here now and then. In
        a child process neither this nor `stopping` is ever set: the child is killed.
        """
        return self._is_cancelled

    def wait_cancelled(self, seconds: float | None = None) -> bool:
        """Sleep for so long, but not longer than until it is cancelled; whether it is."""
        if self._cancelled is None:
            self._cancelled = threading.Event()
        if self._is_cancelled:  # before there was an event to set
            return True
        return self._cancelled.wait(seconds)

    @contextmanager
    def finish(self) -> Iterator[Transaction]:
        """Ack this job together with what the block enqueues, all or nothing: ``with current_job().finish() as tx``.

        So a step and the one that follows it cannot come apart: ``next_step.options(transaction=tx).enqueue(...)``.
        When the block has ended the job is done, whatever becomes of the handler. On an exception in it nothing
        happened.

        It waits for the disk; an async handler calls it in a thread (`asyncio.to_thread`) where that matters.

        Raises:
            UsageError: it was finished before; or it runs in a process pool, which has no broker.
            LeaseLostError: the lease was lost meanwhile, and nothing was enqueued.
        """
        self._check_unfinished()
        is_mine = False
        try:
            with self._app.broker.transaction() as tx:
                tx.ack(self.lease)
                yield tx
                with _finishes:  # another thread of the handler's may do the same
                    self._check_unfinished()
                    # Before the commit: from here on its lease is not renewed, and until it is over not answered.
                    is_mine = self.finished = self.finishing = True
        except BaseException:
            if is_mine:
                self.finished = False
            raise
        finally:
            if is_mine:
                with _finishes:
                    self.finishing = False
                    waiting, self._waiting = self._waiting, ()
                for each in waiting:
                    each()

    def _check_unfinished(self) -> None:
        if self.finished:
            raise UsageError(f"job {self.id}: it was finished before")

    def when_finished(self, call: Callable[[], object]) -> None:
        """For workers: call this when no commit of `finish` is under way; at once if none is."""
        with _finishes:
            if self.finishing:
                self._waiting += (call,)
                return
        call()

    def cancel(self, reason: str) -> None:
        """For workers: tell the handler. The first reason stays."""
        if not self._is_cancelled:
            self.reason = reason
            self._is_cancelled = True
        if (event := self._cancelled) is not None:
            event.set()


_finishes = threading.Lock()
"""Guards, of all jobs, whether a `finish` is under way and who waits for its end: it is held for a moment only."""
_current: ContextVar[CurrentJob] = ContextVar("rivetq_current_job")


def here() -> CurrentJob | None:
    """The job that runs in this thread or asyncio task, if one does."""
    return _current.get(None)


def current_job() -> CurrentJob:
    """The job that runs here; UsageError outside of a handler."""
    found = here()
    if found is None:
        raise UsageError("current_job: no job runs here; it works in a handler that a worker called")
    return found


@contextmanager
def running(job: CurrentJob) -> Iterator[None]:
    """For workers: `job` is the current one in this block."""
    token = _current.set(job)
    try:
        yield
    finally:
        _current.reset(token)


# Tasks


@attrs.frozen(kw_only=True)
class Options:
    """How the jobs of a task are enqueued and run. What is None is left to the queue."""

    queue: str = "default"
    priority: int = 5
    retry: RetryPolicy | None = None
    max_attempts: int | None = None
    visibility_timeout: Duration | None = None
    time_limit: Duration | None = None
    idempotency_key: Callable[..., str | None] | str | None = None
    pool: Pool = "thread"
    delay: Duration = 0
    eta: datetime | float | None = None
    headers: Mapping[str, str] | None = None
    on_duplicate: Literal["return", "raise"] = "return"
    transaction: Transaction | None = None

    def __attrs_post_init__(self) -> None:
        if not is_name(self.queue) or len(self.queue.encode()) > 255:
            raise UsageError(f"queue: a str of 1 to 255 bytes expected, got {quoted(self.queue)}")
        if self.queue == SCHEDULES:
            raise UsageError(f"queue: {SCHEDULES!r} is for the records of schedules")
        if not _is_int(self.priority) or not 0 <= self.priority <= 9:
            raise UsageError(f"priority: an int from 0 to 9 expected, got {quoted(self.priority)}")
        if self.retry is not None and not isinstance(self.retry, RetryPolicy):
            raise UsageError(f"retry: a RetryPolicy expected, got {quoted(self.retry)}")
        if self.max_attempts is not None and (not _is_int(self.max_attempts) or self.max_attempts < 1):
            raise UsageError(f"max_attempts: an int of at least 1 expected, got {quoted(self.max_attempts)}")
        if self.visibility_timeout is not None and not seconds_of(self.visibility_timeout, "visibility_timeout"):
            raise UsageError("visibility_timeout: above 0 seconds expected")
        seconds_of(self.delay, "delay")
        if self.on_duplicate not in ("return", "raise"):
            raise UsageError(f"on_duplicate: 'return' or 'raise' expected, got {quoted(self.on_duplicate)}")
        if self.pool not in ("thread", "process"):
            raise UsageError(f"pool: 'thread' or 'process' expected, got {quoted(self.pool)}")
        if self.time_limit is not None and not seconds_of(self.time_limit, "time_limit"):
            raise UsageError("time_limit: above 0 seconds expected")
        if self.headers is not None and not isinstance(self.headers, Mapping):
            raise UsageError(f"headers: a mapping expected, got {quoted(self.headers)}")
        if self.transaction is not None and not isinstance(self.transaction, Transaction):
            raise UsageError(f"transaction: one of the app's broker expected, got {quoted(self.transaction)}")
        key = self.idempotency_key
        if key is not None and not callable(key) and not isinstance(key, str):
            raise UsageError(f"idempotency_key: a str or a callable expected, got {type(key).__name__}")


def is_name(value: object) -> bool:
    """A str that is not empty and can be written as UTF-8."""
    try:
        return isinstance(value, str) and bool(value.encode())
    except UnicodeEncodeError:
        return False


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@attrs.frozen
class Call:
    """One call of a task, not made yet: what `enqueue_many` takes."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


Arguments = Call | tuple[Any, ...] | Mapping[str, Any]


class Task(Generic[P, R_co]):
    """A function of an app. Calling it calls the function; `enqueue` puts the call into a queue."""

    def __init__(self, app: App, name: str, function: Callable[P, R_co], options: Options) -> None:
        self.app = app
        self.name = name
        self.function = function
        self.opts = options
        self.is_async = inspect.iscoroutinefunction(function)
        limit = options.time_limit
        self.time_limit = None if limit is None else seconds_of(limit, "time_limit")
        self._signature = inspect.signature(function)
        self._plain = _plain_arguments(self._signature)
        functools.update_wrapper(self, function)

    def __call__(self, /, *args: P.args, **kwargs: P.kwargs) -> R_co:
        return self.function(*args, **kwargs)

    def __repr__(self) -> str:
        return f"<task {self.name!r} of queue {self.opts.queue!r}>"

    def enqueue(self, /, *args: P.args, **kwargs: P.kwargs) -> int:
        """Put a call into the queue; the job's id, once it is durable (in inline mode: once it has run).

        Raises:
            UsageError: the arguments do not fit the function, or the codec cannot say them.
            DuplicateJobError, QueueFullError, RateLimitedError, DiskFullError: nothing was enqueued.
        """
        return self.app.put(self, [self.call(*args, **kwargs)])[0]

    async def aenqueue(self, /, *args: P.args, **kwargs: P.kwargs) -> int:
        """`enqueue` for asyncio: the event loop goes on while the disk is waited for."""
        return (await self.app.aput(self, [self.call(*args, **kwargs)]))[0]

    def enqueue_many(self, calls: Iterable[Arguments]) -> Sequence[int]:
        """Put many calls into the queue, all or nothing, one record of the log; their ids in order.

        Args:
            calls: each is a tuple of positional arguments, a mapping of keyword arguments, or what `call` gives, whose
                arguments a type checker checks.
        """
        if not isinstance(calls, Iterable) or isinstance(calls, str | bytes | Mapping):
            raise UsageError(f"enqueue_many: calls expected, such as a list of tuples, got {quoted(calls)}")
        checked = [self._checked(call) for call in calls]
        if len(checked) > 1 and isinstance(self.opts.idempotency_key, str):
            raise UsageError(
                "enqueue_many: one idempotency_key for all would leave out all but the first; give a function"
            )
        return self.app.put(self, checked)

    def call(self, /, *args: P.args, **kwargs: P.kwargs) -> Call:
        """A call for `enqueue_many`. Raises UsageError if the arguments do not fit the function."""
        self.bind(args, kwargs)
        return Call(args, kwargs)

    def options(
        self,
        *,
        queue: str | EllipsisType = ...,
        priority: int | EllipsisType = ...,
        retry: RetryPolicy | EllipsisType | None = ...,
        max_attempts: int | EllipsisType | None = ...,
        visibility_timeout: Duration | EllipsisType | None = ...,
        idempotency_key: Callable[P, str | None] | str | EllipsisType | None = ...,
        delay: Duration | EllipsisType = ...,
        eta: datetime | float | EllipsisType | None = ...,
        headers: Mapping[str, str] | EllipsisType | None = ...,
        on_duplicate: Literal["return", "raise"] | EllipsisType = ...,
        transaction: Transaction | EllipsisType | None = ...,
    ) -> Task[P, R_co]:
        """The same task, enqueued otherwise: ``send.options(delay=60).enqueue("ada@example.org")``.

        Args:
            transaction: the call is enqueued in it, so it exists when its block ends, or never.
            idempotency_key: a key, or a function of the task's arguments that gives one.

        The others are those of `Broker.enqueue`.
        """
        given = {
            "queue": queue, "priority": priority, "retry": retry, "max_attempts": max_attempts,
            "visibility_timeout": visibility_timeout, "idempotency_key": idempotency_key, "delay": delay, "eta": eta,
            "headers": headers, "on_duplicate": on_duplicate, "transaction": transaction,
        }  # fmt: skip
        changes: dict[str, Any] = {name: value for name, value in given.items() if value is not ...}
        return Task(self.app, self.name, self.function, attrs.evolve(self.opts, **changes))

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Raise UsageError if these are no arguments of the function."""
        if not kwargs and self._plain[0] <= len(args) <= self._plain[1]:
            return  # the signature's own answer takes as long as all else of a short job
        if (error := _misfit(self._signature, args, kwargs)) is not None:
            raise UsageError(f"task {self.name!r}: the arguments do not fit {self._signature}: {error}") from error

    def bound(self, args: Sequence[Any], kwargs: Mapping[str, Any], *, some: bool = False) -> dict[str, Any]:
        """Arguments by the names of the parameters, with the defaults; none if they do not fit.

        some: these are not all of them, and so without defaults.
        """
        try:
            if some:
                return dict(self._signature.bind_partial(*args, **kwargs).arguments)
            found = self._signature.bind(*args, **kwargs)
        except TypeError:
            return {}
        found.apply_defaults()
        return dict(found.arguments)

    def key(self, call: Call) -> str | None:
        """The idempotency key of a call."""
        key = self.opts.idempotency_key
        if not callable(key):
            return key
        try:
            return key(*call.args, **call.kwargs)
        except TypeError as error:
            if _misfit(inspect.signature(key), call.args, call.kwargs) is None:
                raise  # it is the function's own
            raise UsageError(
                f"task {self.name!r}: idempotency_key is called as the task is, and needs its defaults: {error}"
            ) from error

    def _checked(self, call: object) -> Call:
        if isinstance(call, tuple | list):
            call = Call(tuple(call), {})
        elif isinstance(call, Mapping):
            call = Call((), call)
        elif not isinstance(call, Call):
            raise UsageError(f"enqueue_many: tuples, mappings or {self.name}.call(...) expected, got {quoted(call)}")
        self.bind(call.args, call.kwargs)
        return call

    def __reduce__(self) -> tuple[Any, ...]:
        place = self.function.__module__, self.function.__qualname__, self.name
        if _task_at(*place) is not None:
            return _find, place
        # It was made of a function of a module, but not there: in another process another app has to stand for its own.
        if self.app.around_hooks:
            raise UsageError(
                f"task {self.name!r}: its app has hooks; a child process finds them if the module has the task"
            )
        return _make, (*place, self.time_limit, self.app.codec)


def _misfit(signature: inspect.Signature, args: Sequence[Any], kwargs: Mapping[str, Any]) -> TypeError | None:
    """Why these are no arguments of such a function; None: they are."""
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        return error
    return None


def _is_method(function: Callable[..., Any]) -> bool:
    """It stands in the body of a class and begins with a self."""
    place = function.__qualname__.rpartition(".")[0]
    first = next(iter(inspect.signature(function).parameters), "")
    return bool(place) and not place.endswith("<locals>") and first in ("self", "cls")


def _plain_arguments(signature: inspect.Signature) -> tuple[int, int]:
    """How many arguments, at least and at most, fit if all of them are positional; (1, 0): ask the signature."""
    least = most = 0
    for parameter in signature.parameters.values():
        if parameter.kind not in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            return 1, 0
        most += 1
        least += parameter.default is parameter.empty
    return least, most


def _task_at(module: str, function: str, name: str) -> Task[..., Any] | None:
    """The task of this name that a module makes of this function of its own."""
    found = _part_of(module, function)
    known = [found] if isinstance(found, Task) else list(vars(importlib.import_module(module)).values())
    for each in known:
        if isinstance(each, Task) and (each is found or each.function is found):
            task = each.app.tasks.get(name)
            if task is not None and task.function is each.function:
                return task
    return None


def _part_of(module: str, name: str) -> Any:
    found: Any = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    return found


def _find(module: str, function: str, name: str) -> Task[..., Any]:
    """A task by its function and name, in another process."""
    found = _task_at(module, function, name)
    if found is None:
        raise UsageError(f"{module}.{function} is no task {name!r} there")
    return found


def _make(module: str, function: str, name: str, time_limit: float | None, codec: Codec) -> Task[..., Any]:
    """The same for one that its module does not make."""
    key = module, function, name
    if key not in _made:
        app = App(":memory:", codec=codec)
        _made[key] = app.task(name=name, time_limit=time_limit, pool="process")(_part_of(module, function))
    return _made[key]


_made: dict[tuple[str, str, str], Task[..., Any]] = {}


def _check_options(options: Mapping[str, Any]) -> None:
    if unknown := options.keys() - (inspect.signature(Broker).parameters.keys() - {"path", "unknown"}):
        raise UsageError(f"{', '.join(sorted(unknown))}: no such option of a broker")


class MakesTask(Protocol):
    """What ``app.task(...)`` gives: it makes a task of a function and keeps the types of its arguments."""

    def __call__(self, function: Callable[P, R], /) -> Task[P, R]: ...


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
        self.around_hooks: list[Callable[[CurrentJob], Context]] = []
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
            if isinstance(function, Task):
                raise UsageError(f"task: {function.name!r} is one already; app.periodic stands above app.task")
            if not inspect.isroutine(function) or isinstance(function, staticmethod | classmethod):
                raise UsageError(
                    f"task: a function expected, got {quoted(function)}; options are given by name, queue=..."
                )
            try:
                inspect.signature(function)
            except (TypeError, ValueError) as error:
                raise UsageError(f"task: {function!r} does not tell its arguments: {error}") from error
            if _is_method(function):
                raise UsageError(f"task: {function.__qualname__} is a method; jobs are for functions, without a self")
            if inspect.iscoroutinefunction(function) and checked.pool == "process":
                raise UsageError("pool: 'process' is for sync functions")
            if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
                raise UsageError("task: a generator function is never run by a call of it")
            if checked.pool == "process" and "<" in function.__qualname__:  # <locals>, <lambda>
                raise UsageError("pool: 'process' is for functions of a module, which a child process can import")
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
        from ..testing.tasks import TestingApp

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
            with self._lock:  # whoever comes second finds all of them known
                while self._unhinted:
                    task = self._unhinted[-1]
                    if isinstance(self.codec, TypedJson):
                        self.codec.register_annotations(hints(task.function))
                    self._unhinted.remove(task)  # another may have come behind it
        return self.codec


def seconds_of(value: Duration, name: str) -> float:
    """Seconds of a duration that a caller gave. Raises UsageError."""
    seconds = value.total_seconds() if isinstance(value, timedelta) else value
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 <= seconds <= MOST_S:
        raise UsageError(f"{name}: seconds or a timedelta expected, got {quoted(value)}")
    return float(seconds)
