"""An app under test: its jobs in memory, its time by hand, its tasks run when the test says so. See `App.testing`."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from types import TracebackType
from typing import Any, Protocol, Self

import attrs

from rivetq import Broker, Duration, Job, JobState, Lease, LeaseLostError, UsageError

from ..schedules.scheduler import Scheduler
from ..schedules.when import SCHEDULES, Schedule
from ..testing import ManualClock
from ..typedjson import Codec
from .outcomes import Outcome, Reject
from .running import Delivery, Ending, run_async, run_here
from .task import TASK_HEADER, Hook, Puts, Task

MANY_JOBS = 10_000


class Swaps(Puts, Protocol):
    """An app, whose broker is another one while it is under test."""

    schedules: dict[str, Schedule]
    _path: Any
    _broker: Broker | None
    _async: Any
    _runner: Callable[[int], None] | None
    _is_testing: bool

    def _known_codec(self) -> Codec: ...


@attrs.define
class Drained:
    """What `drain` ran."""

    acked: int = 0
    failed: int = 0
    """Attempts that ended in a retry or a dead letter."""
    released: int = 0
    errors: list[BaseException] = attrs.Factory(list)
    """The exceptions that handlers raised, in order, except `Retry`, `Snooze` and `Reject`."""

    @property
    def jobs(self) -> int:
        """Handlers that ran."""
        return self.acked + self.failed + self.released


@attrs.frozen
class EnqueuedCall:
    """A waiting job as the call that it is."""

    task: str
    args: list[Any]
    kwargs: dict[str, Any]
    job: Job


class TestingApp:
    """What ``with app.testing() as testing`` gives. Until the block ends the app's jobs are in memory."""

    __test__ = False  # for pytest: this is no test class

    def __init__(self, app: Swaps, *, inline: bool, start: datetime | float | None) -> None:
        self.app = app
        self.inline = inline
        self.clock = ManualClock() if start is None else ManualClock(start=start)
        """Moves by `advance` alone."""
        self._before: Any = None

    def __enter__(self) -> Self:
        if self._before is not None:
            raise UsageError("app.testing() is entered once; call it again for another")
        app = self.app
        if app._runner is not None or app._is_testing:
            raise UsageError("the app is under test already")
        self._before = app._path, app._broker, app._async
        app._is_testing = True
        app._path = app._broker = Broker(":memory:", clock=self.clock)
        app._async = None
        app._runner = self._run_inline if self.inline else None
        self._scheduler = Scheduler(app.broker, app.schedules)
        self._scheduler.reconcile()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        app = self.app
        self._scheduler.close()
        app.broker.close()
        app._path, app._broker, app._async = self._before
        app._runner, app._is_testing = None, False

    @property
    def broker(self) -> Broker:
        """The app's broker in this block."""
        if not self.app._is_testing or self._before is None:
            raise UsageError("app.testing() is for a block: with app.testing() as testing")
        return self.app.broker

    def drain(self, *, raise_errors: bool = True) -> Drained:
        """Run all ready jobs of all queues in this thread, and those that they enqueue; what became of them.

        What a pause or a rate limit holds back waits on.

        Jobs end as in a worker: a failed one is retried (after its delay: see `advance`) or is a dead letter.

        Args:
            raise_errors: raise the first error of a handler, behind the last job; False: they are in `Drained.errors`.
        """
        done = Drained()
        while lease := self._next():
            if done.jobs >= MANY_JOBS:
                self.broker.release(lease)
                raise UsageError(f"drain: {MANY_JOBS} jobs were run and there are more: does a task enqueue itself?")
            self._run(lease, done)
        if raise_errors and done.errors:
            raise done.errors[0]
        return done

    def advance(self, seconds: Duration) -> None:
        """Let time pass, and schedules enqueue what they are due for, tick by tick. Runs no task: see `drain`."""
        end_ms = self.clock.wall_ms() + _ms(seconds)
        while (left_ms := end_ms - self.clock.wall_ms()) > 0:
            next_ms = min(self._scheduler.moments_ms(), default=end_ms)
            step_ms = next_ms - self.clock.wall_ms()
            if step_ms <= 0:  # the wall clock was set, and says nothing about when the record comes
                step_ms = 1000
            self.clock.advance(min(left_ms, step_ms) / 1000)
            self._scheduler.step()

    def enqueued(self, task: Task[..., Any] | None = None, *, queue: str | None = None) -> list[EnqueuedCall]:
        """The calls that wait, scheduled ones included, by id; all, or those of a task, or of a queue."""
        found = []
        for name in self.broker.queues():
            if name == SCHEDULES or (queue is not None and name != queue):
                continue
            for job in [*self._jobs(name, "ready"), *self._jobs(name, "scheduled")]:
                task_name = job.headers.get(TASK_HEADER)
                if task_name is not None and (task is None or task.name == task_name):
                    content = self.app.codec.loads(job.payload)
                    if not isinstance(content, dict):  # enqueued by hand
                        continue
                    found.append(EnqueuedCall(task_name, content.get("args", []), content.get("kwargs", {}), job))
        return sorted(found, key=lambda call: call.job.id)

    def assert_enqueued(
        self,
        task: Task[..., Any],
        *,
        args: Sequence[Any] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        queue: str | None = None,
        count: int | None = None,
    ) -> list[EnqueuedCall]:
        """Fail unless a call of the task waits; the calls that match.

        Args:
            args, kwargs: its arguments, whether they were given by position or by name; None: any.
            queue: in which it waits; None: any.
            count: so many calls, neither more nor fewer; None: one at least.
        """
        __tracebackhide__ = True
        if not isinstance(task, Task):
            raise UsageError(f"task: a task expected, got {task!r}")
        wanted_args = None if args is None else self._passed(list(args))
        wanted_kwargs = None if kwargs is None else self._passed(dict(kwargs))
        calls = self.enqueued(task, queue=queue)
        found = [call for call in calls if _is_like(task, call, wanted_args, wanted_kwargs)]
        if (count is None and not found) or (count is not None and len(found) != count):
            others = "".join(f"\n  {call.job.queue}: {_call(call)}" for call in self.enqueued())
            wanted = "no call" if count is None else f"{len(found)} calls, not {count},"
            raise AssertionError(
                f"{wanted} of {task.name!r} with args={args!r} kwargs={kwargs!r} queue={queue!r} wait; these do:"
                f"{others or ' none'}"
            )
        return found

    def _passed(self, value: Any) -> Any:
        """As the codec brings it back. What it cannot say, mock.ANY perhaps, as it is."""
        codec = self.app._known_codec()
        try:
            return codec.loads(codec.dumps(value))
        except UsageError:
            return value

    def _jobs(self, queue: str, state: JobState | str) -> Iterator[Job]:
        after = 0
        while found := self.broker.jobs(queue, state=state, after=after, limit=MANY_JOBS):
            yield from found
            after = found[-1].id

    def _next(self) -> Lease | None:
        """From the queue with the oldest job, so that jobs of several queues run in the order of their enqueues."""
        names = [name for name in self.broker.queues() if name != SCHEDULES]
        first = {name: jobs[0].id for name in names if (jobs := self.broker.jobs(name, state="ready", limit=1))}
        # Of all of them: the first may be paused, or its rate limit may say no.
        return self.broker.lease(sorted(first, key=first.__getitem__)) if first else None

    def _run(self, lease: Lease, done: Drained) -> None:
        try:
            task, args, kwargs = self.app.find(lease)
        except Reject as error:
            self.broker.reject(lease, error=str(error))
            done.failed += 1
            return
        delivery = Delivery(lease, task, args, kwargs)
        if task.is_async:
            _in_a_loop(delivery, self.app.around_hooks)
        else:
            run_here(delivery, self.app.around_hooks)
        if delivery.job.finished:
            done.acked += 1
        else:
            with suppress(LeaseLostError):  # a handler let the time pass: it comes again
                self._answer(lease, delivery.ending, done)
        if delivery.error is not None and not isinstance(delivery.error, Outcome):
            if not isinstance(delivery.error, Exception):
                raise delivery.error  # Ctrl-C, say
            done.errors.append(delivery.error)

    def _run_inline(self, job_id: int) -> None:
        """In `Task.enqueue`: the job at once, if it is not for later."""
        job = self.broker.get(job_id)
        if job is None or job.state != "ready":
            return
        done, passed = Drained(), []
        while (lease := self.broker.lease(job.queue)) is not None and lease.id != job_id:
            passed.append(lease)
        for other in passed:
            self.broker.release(other)
        if lease is not None:
            self._run(lease, done)
        if done.errors:
            raise done.errors[0]

    def _answer(self, lease: Lease, ending: Ending | None, done: Drained) -> None:
        assert ending is not None
        match ending.verb:
            case "ack":
                self.broker.ack(lease)
                done.acked += 1
            case "release":
                self.broker.release(lease, delay=ending.delay or 0)
                done.released += 1
            case "nack":
                self.broker.nack(lease, error=ending.error, delay=ending.delay)
                done.failed += 1
            case "reject":
                self.broker.reject(lease, error=ending.error)
                done.failed += 1


def _is_like(task: Task[..., Any], call: EnqueuedCall, args: list[Any] | None, kwargs: dict[str, Any] | None) -> bool:
    """The call has these arguments, given in this way or in the other; of what is None it may have any."""
    if args in (None, call.args) and kwargs in (None, call.kwargs):
        return True
    found = task.bound(call.args, call.kwargs)
    if args is not None and kwargs is not None:
        return bool(found) and found == task.bound(args, kwargs)
    wanted = task.bound(args or [], kwargs or {}, some=True)
    return bool(wanted) and all(name in found and found[name] == value for name, value in wanted.items())


def _in_a_loop(delivery: Delivery, hooks: Sequence[Hook]) -> None:
    """Run an async handler to its end; in a thread of its own if this one has a loop already."""

    def run() -> None:
        asyncio.run(run_async(delivery, hooks))

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        run()
        return
    thread = threading.Thread(target=run, name="rivetq-testing")
    thread.start()
    thread.join()


def _call(call: EnqueuedCall) -> str:
    given = [repr(arg) for arg in call.args] + [f"{name}={value!r}" for name, value in call.kwargs.items()]
    return f"{call.task}({', '.join(given)})"


def _ms(seconds: Duration) -> int:
    """Checked as `ManualClock.advance` checks it."""
    probe = ManualClock(start=0)
    probe.advance(seconds)
    return probe.wall_ms()
