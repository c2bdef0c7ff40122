"""One call of a task, and how it ends. Worker, children and the app under test run calls by this."""

from __future__ import annotations

import asyncio
import inspect
import logging
import os
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack, ExitStack, suppress
from typing import Any, Literal, NoReturn

import attrs

from rivetq import Broker, Lease

from ..texts import ERROR_CHARS, MESSAGE_CHARS, cut
from ..units import seconds_of
from .current import CurrentJob, running
from .outcomes import Outcome, Reject, Retry, Snooze
from .task import Hook, Task

logger = logging.getLogger("rivetq.worker")

TIME_LIMIT = "time limit exceeded"


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
        return Ending("nack", f"TypeError: the handler returned a {type(value).__name__}, which does not run by itself")
    if isinstance(value, type) and issubclass(value, Outcome):  # as `raise` makes an instance of a class
        value = value()
    return ending_of(value) if isinstance(value, Outcome) else ACK


def run_here(delivery: Delivery, hooks: Sequence[Hook]) -> None:
    """Run a sync handler in this thread; sets how it ended."""
    started, own = time.perf_counter(), _copies
    try:
        with running(delivery.job):
            value = _hooked(delivery, hooks) if hooks else delivery.task.function(*delivery.args, **delivery.kwargs)
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


def _hooked(delivery: Delivery, hooks: Sequence[Hook]) -> Any:
    """What the handler returns, with the hooks that are not async around it."""
    own = _copies
    failures: list[BaseException] = []  # the last one that came out of the handler or a hook
    with ExitStack() as stack:
        stack.push(_noted(failures))
        for hook in hooks:
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


async def run_async(delivery: Delivery, hooks: Sequence[Hook]) -> None:
    """Run an async handler in this event loop and set how it ended. Never raises."""
    started, own = time.perf_counter(), _copies
    delivery.started_at = time.monotonic()
    try:
        with running(delivery.job):
            value = await (_hooked_async(delivery, hooks) if hooks else _limited(delivery))
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


async def _hooked_async(delivery: Delivery, hooks: Sequence[Hook]) -> Any:
    """As `_hooked`, with the async ones too."""
    own = _copies
    failures: list[BaseException] = []
    async with AsyncExitStack() as stack:
        stack.push(_noted(failures))
        for hook in hooks:
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
    """The fields about a job that a log record has in addition to its text."""
    lease = delivery.lease
    return {"job_id": lease.id, "queue": lease.queue, "task": delivery.task.name, "attempt": lease.attempt}
