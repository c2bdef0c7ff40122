"""Traces: the span of an enqueue and those of the runs of its job, joined through the job's headers."""

from __future__ import annotations

import asyncio
import importlib
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from rivetq import QueueFullError, RetryPolicy
from rivetq.tasks import App, Outcome, Reject, Retry, Snooze, current_job
from rivetq.worker import Worker

pytest.importorskip("opentelemetry", reason="the extra otel is not installed")
pytest.importorskip("opentelemetry.sdk", reason="opentelemetry-sdk is not installed")

from opentelemetry import baggage, context, trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from rivetq.otel import instrument, uninstrument

PAGE = Path(__file__).parent.parent / "docs" / "observing.md"
PATIENCE_S = 30.0


class Traces:
    """An app, a provider, and what that was told."""

    def __init__(self) -> None:
        self.app = App(":memory:")
        self._exporter = InMemorySpanExporter()
        self.provider = TracerProvider()
        self.provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.tracer = self.provider.get_tracer("tests")

    def spans(self, name: str | None = None) -> list[ReadableSpan]:
        """In the order in which they ended."""
        return [span for span in self._exporter.get_finished_spans() if name is None or span.name == name]

    def one(self, name: str) -> ReadableSpan:
        [found] = self.spans(name)
        return found


def id_of(span: ReadableSpan) -> tuple[int, int]:
    found = span.get_span_context()
    assert found is not None
    return found.trace_id, found.span_id


def parent_of(span: ReadableSpan) -> tuple[int, int] | None:
    return None if span.parent is None else (span.parent.trace_id, span.parent.span_id)


def attributes(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


@pytest.fixture
def traces() -> Iterator[Traces]:
    traces = Traces()
    instrument(traces.app, traces.provider)
    with traces.app:
        yield traces


# -- Enqueueing


def test_an_enqueue_is_a_producer_span_whose_context_is_in_the_headers(traces: Traces) -> None:
    @traces.app.task(queue="mail")
    def send(to: str) -> None: ...

    job_id = send.options(headers={"tenant": "7"}).enqueue("ada")
    span = traces.one("enqueue mail")
    assert (span.kind, span.parent, span.status.status_code) == (SpanKind.PRODUCER, None, StatusCode.UNSET)
    assert attributes(span) == {
        "messaging.system": "rivetq", "messaging.destination.name": "mail", "messaging.message.id": str(job_id),
        "messaging.operation.name": "enqueue", "messaging.operation.type": "send", "rivetq.task": "send",
    }  # fmt: skip
    job = traces.app.broker.get(job_id)
    assert job is not None
    found = span.get_span_context()
    assert found is not None
    assert dict(job.headers) == {
        "traceparent": f"00-{found.trace_id:032x}-{found.span_id:016x}-{found.trace_flags:02x}",
        "tenant": "7",
        "rivetq-task": "send",
    }


def test_the_span_of_an_enqueue_is_a_child_of_the_span_around_it(traces: Traces) -> None:
    @traces.app.task
    def send() -> None: ...

    with traces.tracer.start_as_current_span("request") as request:
        send.enqueue()
        asyncio.run(send.aenqueue())
    assert [parent_of(span) for span in traces.spans("enqueue default")] == [id_of(request)] * 2


@pytest.mark.parametrize("how", ["sync", "async", "async in a transaction"])
def test_each_way_to_enqueue_is_one_span(traces: Traces, how: str) -> None:
    @traces.app.task
    def send() -> None: ...

    if how == "sync":
        send.enqueue()
    elif how == "async":
        asyncio.run(send.aenqueue())
    else:
        with traces.app.broker.transaction() as tx:
            asyncio.run(send.options(transaction=tx).aenqueue())
    span = traces.one("enqueue default")
    [job] = traces.app.broker.jobs("default")
    assert attributes(span)["messaging.message.id"] == str(job.id)
    assert job.headers["traceparent"].split("-")[2] == f"{id_of(span)[1]:016x}"


def test_a_batch_is_one_span_that_all_its_jobs_continue(traces: Traces) -> None:
    @traces.app.task
    def send(n: int) -> None: ...

    with traces.app.testing() as testing:
        send.enqueue_many([(1,), (2,), (3,)])
        send.enqueue_many([])
        testing.drain()
    span = traces.one("enqueue default")
    assert attributes(span)["messaging.batch.message_count"] == 3
    assert "messaging.message.id" not in attributes(span)
    assert [parent_of(run) for run in traces.spans("process default")] == [id_of(span)] * 3


def test_an_enqueue_that_fails_is_an_error_and_its_error_reaches_the_caller(traces: Traces) -> None:
    @traces.app.task
    def send() -> None: ...

    traces.app.broker.configure_queue("default", max_jobs=1)
    send.enqueue()
    with pytest.raises(QueueFullError):
        send.enqueue()
    span = traces.spans()[-1]
    assert span.status.status_code is StatusCode.ERROR
    assert attributes(span)["error.type"] == "rivetq.errors.QueueFullError"
    assert [event.name for event in span.events] == ["exception"]


# -- Running


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_run_is_a_consumer_span_that_continues_and_links_the_enqueue(traces: Traces, kind: str) -> None:
    inside: list[Any] = []

    @traces.app.task(queue="mail")
    def sync(to: str) -> None:
        inside.append(trace.get_current_span().get_span_context().span_id)

    @traces.app.task(queue="mail")
    async def asynchronous(to: str) -> None:
        await asyncio.sleep(0)
        inside.append(trace.get_current_span().get_span_context().span_id)

    task: Any = sync if kind == "sync" else asynchronous
    ran = threading.Event()
    with Worker(traces.app, on_settled=lambda settled: ran.set()):
        job_id = task.enqueue("ada")
        assert ran.wait(PATIENCE_S)
    put, run = traces.one("enqueue mail"), traces.one("process mail")
    assert (run.kind, parent_of(run), run.status.status_code) == (SpanKind.CONSUMER, id_of(put), StatusCode.UNSET)
    assert [(link.context.trace_id, link.context.span_id) for link in run.links] == [id_of(put)]
    assert inside == [id_of(run)[1]]
    assert attributes(run) == {
        "messaging.system": "rivetq", "messaging.destination.name": "mail", "messaging.message.id": str(job_id),
        "messaging.operation.name": "process", "messaging.operation.type": "process", "rivetq.task": task.name,
        "rivetq.attempt": 1, "messaging.message.body.size": len('{"args":["ada"],"kwargs":{}}'),
    }  # fmt: skip


def test_every_attempt_is_a_span_of_the_same_trace(traces: Traces) -> None:
    @traces.app.task(retry=RetryPolicy(base=10, jitter="none"))
    def send() -> None:
        if current_job().attempt == 1:
            raise ConnectionError("no answer")

    with traces.app.testing() as testing:
        send.enqueue()
        testing.drain(raise_errors=False)
        testing.advance(10)
        testing.drain()
    first, second = traces.spans("process default")
    assert [attributes(span)["rivetq.attempt"] for span in (first, second)] == [1, 2]
    assert parent_of(first) == parent_of(second) == id_of(traces.one("enqueue default"))
    assert (first.status.status_code, second.status.status_code) == (StatusCode.ERROR, StatusCode.UNSET)


def test_a_job_that_a_handler_enqueues_is_in_the_same_trace(traces: Traces) -> None:
    @traces.app.task(queue="first")
    def first() -> None:
        second.enqueue()

    @traces.app.task(queue="second")
    def second() -> None: ...

    with traces.app.testing() as testing:
        first.enqueue()
        testing.drain()
    assert parent_of(traces.one("enqueue second")) == id_of(traces.one("process first"))
    assert len({id_of(span)[0] for span in traces.spans()}) == 1


def test_inline_the_run_is_within_the_enqueue(traces: Traces) -> None:
    @traces.app.task(queue="first")
    def first() -> None:
        second.enqueue()

    @traces.app.task(queue="second")
    def second() -> None: ...

    with traces.app.testing(inline=True):
        asyncio.run(first.aenqueue())
    names = ["process second", "enqueue second", "process first", "enqueue first"]
    assert [span.name for span in traces.spans()] == names
    assert [parent_of(traces.one(name)) for name in names] == [*(id_of(traces.one(name)) for name in names[1:]), None]


def test_a_new_trace_links_to_the_enqueue_and_is_not_its_child() -> None:
    traces = Traces()
    instrument(traces.app, traces.provider, new_trace=True)

    @traces.app.task
    def send() -> None: ...

    with traces.app.testing() as testing, traces.tracer.start_as_current_span("a test around it all"):
        send.enqueue()
        testing.drain()
    put, run = traces.one("enqueue default"), traces.one("process default")
    assert run.parent is None
    assert id_of(run)[0] != id_of(put)[0]
    assert [link.context.span_id for link in run.links] == [id_of(put)[1]]


@pytest.mark.parametrize("headers", [{}, {"traceparent": "nonsense"}], ids=str)
def test_a_job_without_a_context_begins_a_trace(traces: Traces, headers: dict[str, str]) -> None:
    @traces.app.task
    def send() -> None: ...

    with traces.app.testing() as testing:
        testing.broker.enqueue("default", {}, headers={"rivetq-task": "send", **headers})
        testing.drain()
    run = traces.one("process default")
    assert (run.parent, list(run.links)) == (None, [])


def test_a_job_without_a_context_is_in_the_trace_that_it_is_run_in(traces: Traces) -> None:
    @traces.app.task
    def send() -> None: ...

    with traces.app.testing() as testing:
        testing.broker.enqueue("default", {}, headers={"rivetq-task": "send"})
        with traces.tracer.start_as_current_span("a test") as outer:
            testing.drain()
    assert parent_of(traces.one("process default")) == id_of(outer)


def test_baggage_and_trace_state_reach_the_handler_and_end_with_it(traces: Traces) -> None:
    seen: list[Any] = []

    @traces.app.task
    def send() -> None:
        state = trace.get_current_span().get_span_context().trace_state
        seen.append((baggage.get_baggage("tenant"), dict(state)))

    outer = {"traceparent": f"00-{1:032x}-{2:016x}-01", "tracestate": "shop=7"}
    with traces.app.testing() as testing:
        token = context.attach(baggage.set_baggage("tenant", "7", _extracted(outer)))
        send.enqueue()
        context.detach(token)
        testing.drain()
    assert seen == [("7", {"shop": "7"})]
    assert baggage.get_baggage("tenant") is None
    assert id_of(traces.one("process default"))[0] == 1


def _extracted(headers: dict[str, str]) -> Any:
    from opentelemetry import propagate

    return propagate.extract(headers)


# -- How handlers end


def test_an_exception_is_recorded_and_makes_the_run_an_error(traces: Traces) -> None:
    @traces.app.task
    def fail() -> None:
        raise ZeroDivisionError("by zero")

    with traces.app.testing() as testing:
        fail.enqueue()
        [error] = testing.drain(raise_errors=False).errors
    assert isinstance(error, ZeroDivisionError)
    run = traces.one("process default")
    assert (run.status.status_code, run.status.description) == (StatusCode.ERROR, "ZeroDivisionError: by zero")
    assert attributes(run)["error.type"] == "ZeroDivisionError"
    [event] = run.events
    assert (event.attributes or {})["exception.message"] == "by zero"


@pytest.mark.parametrize(
    ("outcome", "expected"),
    [
        (Retry(30, error="not yet"), {"outcome": "retry", "reason": "not yet", "delay_seconds": 30.0}),
        (Retry(), {"outcome": "retry", "reason": "the task asked for a retry"}),
        (
            Snooze(timedelta(minutes=2)),
            {"outcome": "snooze", "reason": "the task asked to come later", "delay_seconds": 120.0},
        ),
        (Reject("never"), {"outcome": "reject", "reason": "never"}),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Outcome) else "",
)
def test_an_outcome_is_in_the_attributes_and_no_error(
    traces: Traces, outcome: Outcome, expected: dict[str, Any]
) -> None:
    @traces.app.task
    def end() -> None:
        raise outcome

    with traces.app.testing() as testing:
        end.enqueue()
        testing.drain()
    run = traces.one("process default")
    assert (run.status.status_code, list(run.events)) == (StatusCode.UNSET, [])
    names = ("rivetq.outcome", "rivetq.reason", "rivetq.delay_seconds")
    assert {name: value for name, value in attributes(run).items() if name in names} == {
        f"rivetq.{name}": value for name, value in expected.items()
    }


def test_an_error_without_a_text_fails_its_job_as_it_would_without_traces(traces: Traces) -> None:
    class MuteError(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no text")

    @traces.app.task
    def fail() -> None:
        raise MuteError

    with traces.app.testing() as testing:
        fail.enqueue()
        [error] = testing.drain(raise_errors=False).errors
    assert type(error) is MuteError
    assert traces.one("process default").status.status_code is StatusCode.ERROR


def test_a_run_that_was_told_to_stop_says_why_and_is_no_error(traces: Traces) -> None:
    began = threading.Event()

    @traces.app.task
    async def hang() -> None:
        began.set()
        await asyncio.sleep(PATIENCE_S)

    settled = threading.Event()
    with Worker(traces.app, on_settled=lambda _: settled.set()):
        job_id = hang.enqueue()
        assert began.wait(PATIENCE_S)
        assert traces.app.cancel(job_id)
        assert settled.wait(PATIENCE_S)
    run = traces.one("process default")
    assert attributes(run)["rivetq.cancelled"] == "cancelled"
    assert (run.status.status_code, list(run.events)) == (StatusCode.UNSET, [])


def test_other_hooks_run_within_the_span_also_those_that_came_first() -> None:
    traces, seen = Traces(), []

    @traces.app.around
    def hook(job: Any) -> Iterator[None]:
        seen.append(trace.get_current_span().get_span_context().span_id)
        yield

    @traces.app.task
    def send() -> None: ...

    instrument(traces.app, traces.provider)
    with traces.app.testing() as testing:
        send.enqueue()
        testing.drain()
    assert seen == [id_of(traces.one("process default"))[1]]


# -- Instrumenting


def test_instrumenting_twice_is_instrumenting_once(traces: Traces) -> None:
    @traces.app.task
    def send() -> None: ...

    instrument(traces.app, traces.provider)
    with traces.app.testing() as testing:
        send.enqueue()
        testing.drain()
    assert [span.name for span in traces.spans()] == ["enqueue default", "process default"]


def test_after_uninstrument_the_app_is_as_it_was_and_can_be_instrumented_again() -> None:
    traces = Traces()
    before = dict(vars(traces.app))
    instrument(traces.app, traces.provider)
    uninstrument(traces.app)
    uninstrument(traces.app)
    assert vars(traces.app) == before
    assert traces.app.around_hooks == []

    @traces.app.task
    def send() -> None: ...

    with traces.app.testing() as testing:
        job = testing.broker.get(send.enqueue())
        testing.drain()
        assert job is not None
        assert dict(job.headers) == {"rivetq-task": "send"}
        assert traces.spans() == []
        instrument(traces.app, traces.provider)
        send.enqueue()
        testing.drain()
        assert len(traces.spans()) == 2


def test_apps_are_instrumented_one_by_one(traces: Traces) -> None:
    other = App(":memory:")

    @other.task
    def send() -> None: ...

    with other.testing() as testing:
        send.enqueue()
        testing.drain()
    assert traces.spans() == []


def test_without_an_sdk_jobs_run_and_their_headers_stay_as_they_are() -> None:
    app = App(":memory:")
    instrument(app, trace.NoOpTracerProvider())

    @app.task
    def send() -> None: ...

    with app.testing() as testing:
        job = testing.broker.get(send.enqueue())
        assert job is not None
        assert dict(job.headers) == {"rivetq-task": "send"}
        assert testing.drain().acked == 1


def test_without_opentelemetry_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    monkeypatch.delitem(sys.modules, "rivetq.otel")
    with pytest.raises(ImportError, match=r"pip install rivetq\[otel\]"):
        importlib.import_module("rivetq.otel")


# -- The page


def test_the_programs_of_the_page_run_in_order(tmp_path: Path) -> None:
    """In a process of their own: they set up logging and tracing for all of it."""
    for name in ("prometheus_client", "structlog"):
        pytest.importorskip(name, reason=f"{name} is not installed")
    blocks = [part.partition("\n```")[0] for part in PAGE.read_text().split("```python\n")[1:]]
    assert len(blocks) >= 5
    program = "\n".join(blocks)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
