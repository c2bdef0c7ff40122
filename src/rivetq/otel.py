"""Traces by OpenTelemetry: a span for each enqueue, and one for each run of a job, joined through the job's headers.

>>> from rivetq.tasks import App
>>> app = App(":memory:")
>>> instrument(app)  # spans go to the global tracer provider
>>> uninstrument(app)

Needs the extra: ``pip install rivetq[otel]``. That is the API alone; a program that wants to see spans installs an SDK
and an exporter, as for everything else that it traces.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from contextvars import ContextVar
from datetime import timedelta
from typing import Any

try:
    from opentelemetry import context, propagate, trace
    from opentelemetry.trace import Link, Span, SpanKind, Status, StatusCode, TracerProvider
except ImportError as error:
    raise ImportError("rivetq.otel needs opentelemetry-api: pip install rivetq[otel]") from error

import rivetq

from .tasks.app import App
from .tasks.current import CurrentJob
from .tasks.outcomes import Outcome
from .tasks.running import text_of
from .tasks.task import Call, Task
from .texts import quoted

# Of the semantic conventions for messaging, which are still marked as in development.
SYSTEM = "messaging.system"
OPERATION_NAME = "messaging.operation.name"
OPERATION_TYPE = "messaging.operation.type"
DESTINATION = "messaging.destination.name"
MESSAGE_ID = "messaging.message.id"
BODY_SIZE = "messaging.message.body.size"
BATCH_COUNT = "messaging.batch.message_count"
ERROR_TYPE = "error.type"
# Of RivetQ.
TASK = "rivetq.task"
ATTEMPT = "rivetq.attempt"
OUTCOME = "rivetq.outcome"
"""What the handler raised to say how the job ends: "retry", "snooze" or "reject"."""
REASON = "rivetq.reason"
DELAY = "rivetq.delay_seconds"
CANCELLED = "rivetq.cancelled"
"""Why the handler was told to stop, if it was."""


def instrument(app: App, tracer_provider: TracerProvider | None = None, *, new_trace: bool = False) -> None:
    """Make spans of an app's enqueues and jobs. Nothing happens if it makes them already.

    An enqueue is a PRODUCER span "enqueue QUEUE". It ends when the call returns, so that it holds the wait for the
    disk, and its context goes into the headers of the job (of all jobs, for `enqueue_many`) by the global propagator:
    "traceparent" and "tracestate", and "baggage" if there is any. A job that is enqueued without this has none of them,
    and is traced all the same.

    Each run of a job is a CONSUMER span "process QUEUE" around the app's other hooks and the handler. An exception is
    recorded and makes its status ERROR. `Retry`, `Snooze` and `Reject` are no errors: they are in the attributes. That
    holds for those which are raised; one that the handler returns is not seen here.

    With tasks in a process pool the children trace too, if the module that they import the app from calls this and sets
    up a provider.

    Args:
        tracer_provider: None: the global one, also one that is set later.
        new_trace: False: a run is a child of the enqueue's span, in the same trace. True: each run begins a trace of
            its own, which suits jobs that wait for days. It links to the enqueue's span in both.
    """
    if not isinstance(app, App):
        raise rivetq.UsageError(f"instrument: an App expected, got {quoted(app)}")
    if _of(app) is None:
        tracing = _Tracing(app, trace.get_tracer("rivetq", rivetq.__version__, tracer_provider), new_trace)
        app.around_hooks.insert(0, tracing)  # first: the other hooks, and what they log, are in the span
        vars(app).update(tracing.methods)


def uninstrument(app: App) -> None:
    """Undo `instrument`; nothing happens if there is nothing to undo. What runs meanwhile ends its span."""
    tracing = _of(app)
    if tracing is not None:
        app.around_hooks.remove(tracing)
        for name, method in tracing.methods.items():
            if vars(app).get(name) == method:
                del vars(app)[name]


def _of(app: App) -> _Tracing | None:
    return next((hook for hook in app.around_hooks if isinstance(hook, _Tracing)), None)


_sending: ContextVar[Task[..., Any] | None] = ContextVar("rivetq_otel_sending", default=None)


class _Tracing:
    """The spans of one app: the hook around its jobs, and what its `put` and `aput` are meanwhile."""

    def __init__(self, app: App, tracer: trace.Tracer, new_trace: bool) -> None:
        self._tracer = tracer
        self._new_trace = new_trace
        self._put, self._aput = app.put, app.aput
        self.methods = {"put": self.put, "aput": self.aput}

    # Enqueueing

    def put(self, task: Task[..., Any], calls: Sequence[Call]) -> Sequence[int]:
        if not calls or _sending.get() is task:  # the span of `aput`, which left the rest to `put`
            return self._put(task, calls)
        with self._enqueueing(task, calls) as (span, traced):
            ids = self._put(traced, calls)
            _tell_ids(span, ids)
        return ids

    async def aput(self, task: Task[..., Any], calls: Sequence[Call]) -> Sequence[int]:
        if not calls:
            return await self._aput(task, calls)
        with self._enqueueing(task, calls) as (span, traced):
            token = _sending.set(traced)
            try:
                ids = await self._aput(traced, calls)
            finally:
                _sending.reset(token)
            _tell_ids(span, ids)
        return ids

    @contextmanager
    def _enqueueing(self, task: Task[..., Any], calls: Sequence[Call]) -> Iterator[tuple[Span, Task[..., Any]]]:
        attributes: dict[str, str | int] = {OPERATION_NAME: "enqueue", OPERATION_TYPE: "send", TASK: task.name}
        if len(calls) > 1:
            attributes[BATCH_COUNT] = len(calls)
        with self._span("enqueue", task.opts.queue, SpanKind.PRODUCER, attributes) as span:
            carrier: dict[str, str] = {}
            propagate.inject(carrier)
            # Without an SDK there is no context to hand on, and the headers stay as they are.
            yield span, task.options(headers={**(task.opts.headers or {}), **carrier}) if carrier else task

    # Running

    def __call__(self, job: CurrentJob) -> AbstractContextManager[None]:
        return self._running(job)

    @contextmanager
    def _running(self, job: CurrentJob) -> Iterator[None]:
        found = propagate.extract(job.headers, context.Context())
        created = trace.get_current_span(found).get_span_context()
        attributes: dict[str, str | int] = {
            OPERATION_NAME: "process", OPERATION_TYPE: "process", TASK: job.task, ATTEMPT: job.attempt,
            MESSAGE_ID: str(job.id), BODY_SIZE: len(job.lease.payload),
        }  # fmt: skip
        parent = found or context.get_current()
        if self._new_trace:
            parent = trace.set_span_in_context(trace.INVALID_SPAN, parent)
        token = context.attach(parent)  # with it, baggage is there for the handler
        try:
            links = [Link(created)] if created.is_valid else []
            with self._span("process", job.queue, SpanKind.CONSUMER, attributes, links) as span:
                try:
                    yield
                finally:
                    if job.reason is not None:
                        span.set_attribute(CANCELLED, job.reason)
        finally:
            context.detach(token)

    # Both

    @contextmanager
    def _span(
        self,
        operation: str,
        queue: str,
        kind: SpanKind,
        attributes: Mapping[str, str | int],
        links: Sequence[Link] = (),
    ) -> Iterator[Span]:
        all_attributes = {SYSTEM: "rivetq", DESTINATION: queue, **attributes}
        with self._tracer.start_as_current_span(
            f"{operation} {queue}", None, kind, all_attributes, links,
            record_exception=False, set_status_on_exception=False,
        ) as span:  # fmt: skip
            try:
                yield span
            except Outcome as outcome:
                _tell_outcome(span, outcome)
                raise
            except asyncio.CancelledError:  # it was told to stop, which is no fault of the handler's
                raise
            except BaseException as error:
                _tell_error(span, error)
                raise


def _tell_ids(span: Span, ids: Sequence[int]) -> None:
    if len(ids) == 1:
        span.set_attribute(MESSAGE_ID, str(ids[0]))


def _tell_outcome(span: Span, outcome: Outcome) -> None:
    span.set_attribute(OUTCOME, type(outcome).__name__.lower())
    span.set_attribute(REASON, str(outcome))
    delay = getattr(outcome, "delay", None)
    if delay is not None:
        span.set_attribute(DELAY, delay.total_seconds() if isinstance(delay, timedelta) else float(delay))


def _tell_error(span: Span, error: BaseException) -> None:
    kind = type(error)
    span.set_attribute(ERROR_TYPE, kind.__qualname__ if kind.__module__ == "builtins" else _full_name(kind))
    span.set_status(Status(StatusCode.ERROR, text_of(error)))
    with suppress(Exception):  # an error whose text cannot be made; the handler's own must go on its way
        span.record_exception(error)


def _full_name(kind: type[BaseException]) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
