"""A task: a function, how its calls are enqueued, and what puts them into a queue."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from datetime import datetime
from types import EllipsisType
from typing import Any, Generic, Literal, ParamSpec, Protocol, TypeVar

import attrs

from rivetq import Broker, Duration, Lease, RetryPolicy, Transaction, UsageError

from ..schedules.when import SCHEDULES
from ..texts import quoted
from ..typedjson import Codec
from ..units import seconds_of
from .current import CurrentJob
from .outcomes import is_name

P = ParamSpec("P")
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)

TASK_HEADER = "rivetq-task"
Pool = Literal["thread", "process"]


Hook = Callable[[CurrentJob], AbstractContextManager[Any] | AbstractAsyncContextManager[Any]]
"""What is around each handler of an app."""


class Puts(Protocol):
    """An app, as its tasks see it, and what runs them elsewhere."""

    codec: Codec
    tasks: dict[str, Task[..., Any]]
    around_hooks: list[Hook]

    @property
    def broker(self) -> Broker: ...

    def find(self, lease: Lease) -> tuple[Task[..., Any], list[Any], dict[str, Any]]: ...

    def put(self, task: Task[..., Any], calls: Sequence[Call]) -> Sequence[int]: ...

    async def aput(self, task: Task[..., Any], calls: Sequence[Call]) -> Sequence[int]: ...


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

    def __init__(self, app: Puts, name: str, function: Callable[P, R_co], options: Options) -> None:
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


def _misfit(signature: inspect.Signature, args: Sequence[Any], kwargs: Mapping[str, Any]) -> TypeError | None:
    """Why these are no arguments of such a function; None: they are."""
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        return error
    return None


def _plain_arguments(signature: inspect.Signature) -> tuple[int, int]:
    """How many arguments, at least and at most, fit if all of them are positional; (1, 0): ask the signature."""
    least = most = 0
    for parameter in signature.parameters.values():
        if parameter.kind not in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            return 1, 0
        most += 1
        least += parameter.default is parameter.empty
    return least, most


class MakesTask(Protocol):
    """What ``app.task(...)`` gives: it makes a task of a function and keeps the types of its arguments."""

    def __call__(self, function: Callable[P, R], /) -> Task[P, R]: ...
