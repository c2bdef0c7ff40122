"""The contract suite on `AsyncBroker`: each call is made in an event loop that runs in a thread of its own."""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any, Self

import attrs
import pytest

from rivetq import Broker, Lease, UsageError
from rivetq.aio import AsyncBroker, AsyncLease, AsyncTransaction
from rivetq.testing import ManualClock
from rivetq.testing.conformance import *

loop = asyncio.new_event_loop()


@pytest.fixture(scope="module", autouse=True)
def running_loop() -> Iterator[None]:
    thread = threading.Thread(target=loop.run_forever, name="loop of the tests")
    thread.start()
    yield
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def run(call: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run_coroutine_threadsafe(call, loop).result(60)


class Blocking:
    """An AsyncBroker (or its transaction) whose calls block, so that the suite can make them."""

    def __init__(self, inner: AsyncBroker | AsyncTransaction, broker: Broker) -> None:
        self._inner = inner
        self._broker = broker
        self.clock = broker.clock
        self._watch_lease, self._unwatch_lease = broker._watch_lease, broker._unwatch_lease

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._inner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            return self._plain(run(method(*args, **kwargs)))

        return call

    def _plain(self, value: Any) -> Any:
        if isinstance(value, AsyncLease):
            return attrs.evolve(value.lease, broker=self)
        if isinstance(value, list):
            return [self._plain(item) for item in value]
        return value

    def lease_soon(self, *args: Any, **kwargs: Any) -> Any:
        return self._broker.lease_soon(*args, **kwargs)  # what AsyncBroker itself stands on; it has none

    def transaction(self) -> Blocking:
        assert isinstance(self._inner, AsyncBroker)
        return Blocking(self._inner.transaction(), self._broker)

    def __enter__(self) -> Self:
        run(self._inner.__aenter__())
        return self

    def __exit__(self, *error: Any) -> None:
        run(self._inner.__aexit__(*error))


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Blocking]:
    inner = AsyncBroker(tmp_path / "data", clock=ManualClock())
    run(inner._open())
    broker = Blocking(inner, inner.broker)
    yield broker
    broker.close()


def test_an_async_broker_has_the_methods_of_a_broker_with_the_same_arguments() -> None:
    others = {"path", "clock", "capabilities", "lease_soon", "_watch_lease", "_unwatch_lease"}
    for name, method in inspect.getmembers(Broker, inspect.isfunction):
        if not name.startswith("_") and name not in others:
            mine = inspect.signature(getattr(AsyncBroker, name)).parameters
            theirs = inspect.signature(method).parameters
            assert list(mine.values()) == list(theirs.values()), name


def test_a_lease_of_an_async_broker_tells_all_that_a_lease_tells() -> None:
    names = {name for name in dir(Lease) if not name.startswith("_")} | {f.name for f in attrs.fields(Lease)}
    assert {name for name in names if not name.startswith("_")} <= set(dir(AsyncLease))


def test_what_is_open_already_takes_no_options() -> None:
    with Broker(":memory:") as broker, pytest.raises(UsageError, match="fsync"):
        AsyncBroker(broker, fsync="never")
