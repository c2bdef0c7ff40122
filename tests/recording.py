"""An engine that hands each request on to another one as bytes, and remembers it with its answer; and one that replays.

So the contract suite shows that requests and answers are values, and that a facade needs nothing else of its engine.
"""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import attrs

from rivetq.clock import Clock
from rivetq.engine import Call, Capabilities, Done, Engine, Keeping, Request
from rivetq.errors import RivetQError
from rivetq.model import Health

A = TypeVar("A")


class RecordingEngine:
    """Stands before another engine, as if that were far away: it lives by a clock of its own."""

    def __init__(self, inner: Engine) -> None:
        self._inner = inner
        self._lock = threading.Lock()
        self.capabilities: Capabilities = attrs.evolve(inner.capabilities, clock="elsewhere")
        self.records: list[tuple[bytes, bytes]] = []
        """Requests with their answers, or with the error that came instead."""

    @property
    def clock(self) -> Clock:
        return self._inner.clock

    @property
    def keeping(self) -> Keeping | None:
        return self._inner.keeping

    def call(self, request: Request[A]) -> A:
        sent = pickle.dumps(request)
        try:
            answer = self._inner.call(pickle.loads(sent))
        except RivetQError as error:
            self._note(sent, error)
            raise
        told: A = self._note(sent, answer)
        return told

    def call_soon(self, request: Request[Any], done: Done) -> Call:
        sent = pickle.dumps(request)

        def tell(answer: Any, error: BaseException | None) -> None:
            done(None if error is not None else self._note(sent, answer), error)

        return self._inner.call_soon(pickle.loads(sent), tell)

    def _note(self, sent: bytes, answer: Any) -> Any:
        told = pickle.dumps(answer)
        with self._lock:
            self.records.append((sent, told))
        return pickle.loads(told)

    def begin(self, token: int) -> None:
        self._inner.begin(token)

    def is_paused(self, queue: str) -> bool | None:
        return self._inner.is_paused(queue)

    def check_open(self) -> None:
        self._inner.check_open()

    def health(self) -> Health:
        return self._inner.health()

    def close(self) -> None:
        self._inner.close()


class ReplayingEngine:
    """Answers what was recorded; the requests must be the same, in the same order."""

    keeping = None

    def __init__(self, recorded: RecordingEngine) -> None:
        self.clock = recorded.clock
        self.capabilities = recorded.capabilities
        self._records: Iterator[tuple[bytes, bytes]] = iter(recorded.records)

    def call(self, request: Request[A]) -> A:
        sent, told = next(self._records)
        assert pickle.loads(sent) == request
        answer = pickle.loads(told)
        if isinstance(answer, RivetQError):
            raise answer
        found: A = answer
        return found

    def call_soon(self, request: Request[Any], done: Done) -> Call:
        done(self.call(request), None)
        return self

    def cancel(self, done: Callable[[bool], None]) -> None:
        done(False)

    def abandon(self, unwanted: Callable[[], None]) -> None:
        unwanted()

    def begin(self, token: int) -> None: ...

    def is_paused(self, queue: str) -> bool | None:
        return None

    def check_open(self) -> None: ...

    def health(self) -> Health:
        return Health(state="open")

    def close(self) -> None:
        assert next(self._records, None) is None, "there was more"
