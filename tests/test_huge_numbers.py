"""An int of more digits than Python prints, and a value without any text, wherever a caller may give one.

A message that shows the wrong value must not fail for it: what comes out is a RivetQError, or nothing is wrong.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from rivetq import Broker, LeaseRef, RateLimit, RetryPolicy, RivetQError
from rivetq.tasks import App, every
from rivetq.worker import Worker

HUGE = 10**5000


class Mute:
    def __repr__(self) -> str:
        raise ValueError("no text")

    __str__ = __repr__


VALUES = [HUGE, -HUGE, [HUGE], {"a": HUGE}, {HUGE: "a"}, Mute(), [Mute()]]
GOOD: dict[str, Any] = {
    "queue": "q", "payload": b"x", "payloads": [b"x"], "max_jobs": 1, "lease": LeaseRef(1, 1), "job_id": 1,
    "leases": [LeaseRef(1, 1)], "seconds": 1, "idempotency_key": "k", "per_second": 1, "burst": 1, "when": every(5),
}  # fmt: skip
VERBS = [
    "enqueue", "enqueue_many", "lease", "lease_many", "ack", "ack_many", "nack", "release", "reject", "extend",
    "configure_queue", "pause", "resume", "purge", "cancel", "redrive", "find", "get", "jobs", "dead_letters", "stats",
]  # fmt: skip


def refused_or_fine(call: Callable[..., Any], given: Mapping[str, Any], name: str) -> None:
    """With each of the values for each of the arguments."""
    for argument, parameter in inspect.signature(call).parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        for value in VALUES:
            try:
                made = call(**{**given, argument: value})
            except RivetQError:
                continue
            except Exception as error:
                pytest.fail(f"{name}({argument}={type(value).__name__}): {type(error).__name__}: {error}")
            if isinstance(made, Broker):
                made.close()


def given_to(call: Callable[..., Any]) -> dict[str, Any]:
    needed = inspect.signature(call).parameters.values()
    return {each.name: GOOD[each.name] for each in needed if each.default is each.empty and each.name in GOOD}


@pytest.fixture(params=["memory", "files"])
def broker(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Broker]:
    with Broker(":memory:" if request.param == "memory" else tmp_path / "data", fsync="never") as broker:
        yield broker


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_refuses_it_or_does_its_work(broker: Broker, verb: str) -> None:
    call = getattr(broker, verb)
    refused_or_fine(call, given_to(call), verb)
    assert broker.health().state == "open"
    broker.enqueue("still open", b"")


@pytest.mark.parametrize("kind", [RetryPolicy, RateLimit, Broker, App, Worker])
def test_a_constructor_refuses_it_or_makes_something(kind: Any) -> None:
    given = given_to(kind)
    if kind in (Broker, App):
        given["path" if kind is Broker else "broker"] = ":memory:"
    if kind is Worker:
        given["app"] = App(":memory:")
    refused_or_fine(kind, given, kind.__name__)


def test_tasks_and_schedules_refuse_it_or_take_it() -> None:
    app = App(":memory:")

    @app.task
    def work(a: Any = None) -> None: ...

    def put(**options: Any) -> None:
        work.options(**options).enqueue()

    put.__signature__ = inspect.signature(work.options)  # type: ignore[attr-defined]  # hypothesis reads it
    refused_or_fine(put, {}, "options")
    refused_or_fine(lambda **options: app.task(**options)(work.function), {}, "task")
    refused_or_fine(lambda function: app.task(function), {}, "task")
    refused_or_fine(work.enqueue_many, {}, "enqueue_many")
    refused_or_fine(every, {"seconds": 5}, "every")
    refused_or_fine(lambda hook: app.around(hook), {}, "around")
    refused_or_fine(lambda calls: work.enqueue_many([calls]), {}, "enqueue_many of")
    refused_or_fine(lambda argument: work.enqueue(argument), {}, "enqueue")
    refused_or_fine(app.periodic, {"when": every(5)}, "periodic")
    app.close()
