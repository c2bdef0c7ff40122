"""The notifier: each is told when its record is durable and not before, none is left over at the end."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from rivetq.engines.notifier import Notifier

PATIENCE_S = 20.0


class Desk:
    """A notifier on a disk that may be slow, or fail."""

    def __init__(self) -> None:
        self.threads: list[threading.Thread] = []
        self.waits: list[int] = []
        self.told: list[tuple[str, BaseException | None, int]] = []  # who, what, after how many waits
        self.failure: BaseException | None = None
        self.notifier = Notifier(self._wait, self._start, self._failed)

    def _wait(self, lsn: int) -> None:
        self.waits.append(lsn)
        if self.failure is not None:
            raise self.failure

    def _start(self, name: str, run: Callable[[], None]) -> None:
        self.threads.append(threading.Thread(target=run, name=name, daemon=True))
        self.threads[-1].start()

    def _failed(self, error: BaseException) -> None:
        self.failure = error

    def tell(self, name: str) -> Callable[[BaseException | None], None]:
        return lambda error: self.told.append((name, error, len(self.waits)))

    def hold(self) -> threading.Event:
        """Keep the thread busy until this is set."""
        busy, go_on = threading.Event(), threading.Event()
        self.notifier.call(lambda: (busy.set(), go_on.wait(PATIENCE_S))[0])
        assert busy.wait(PATIENCE_S)
        return go_on

    def end(self) -> None:
        self.notifier.stop()
        for thread in self.threads:
            thread.join(PATIENCE_S)
            assert not thread.is_alive()


@pytest.fixture
def desk() -> Iterator[Desk]:
    desk = Desk()
    yield desk
    desk.end()


class Late(deque[Any]):
    """Records of which `then` happens as soon as somebody saw that there are none."""

    then: Callable[[], None] | None = None

    def __iter__(self) -> Iterator[Any]:
        found = list(super().__iter__())
        if not found and self.then is not None:
            then, self.then = self.then, None
            then()
        return iter(found)


def test_one_wait_is_for_all_and_none_is_told_before_its_record_is_durable(desk: Desk) -> None:
    desk.notifier.start()
    go_on = desk.hold()
    for name, lsn in (("first", 3), ("last", 7), ("between", 5)):
        desk.notifier.when_durable(lsn, desk.tell(name))
    go_on.set()
    desk.end()
    assert desk.waits == [7]
    assert desk.told == [("first", None, 1), ("last", None, 1), ("between", None, 1)]


def test_a_failed_wait_is_told_to_all(desk: Desk) -> None:
    desk.failure = OSError("no disk")
    desk.notifier.start()
    go_on = desk.hold()
    for lsn in (1, 2):
        desk.notifier.when_durable(lsn, desk.tell(str(lsn)))
    go_on.set()
    desk.end()
    assert desk.told == [("1", desk.failure, 1), ("2", desk.failure, 1)]


def test_what_comes_just_before_the_end_is_still_told(desk: Desk) -> None:
    """After the thread saw that there is nothing, and before it learnt that it is over."""

    def come_and_end() -> None:
        desk.notifier.when_durable(1, desk.tell("late"))
        desk.notifier.stop()

    late = desk.notifier._records = Late()
    late.then = come_and_end
    desk.notifier.start()
    desk.end()
    assert desk.told == [("late", None, 1)]


def test_behind_its_end_no_thread_begins(desk: Desk) -> None:
    desk.notifier.stop()
    desk.notifier.start()
    assert desk.threads == []


def test_a_callback_that_raises_disturbs_no_other(desk: Desk) -> None:
    def raises(*error: object) -> None:
        raise ZeroDivisionError

    desk.notifier.start()
    go_on = desk.hold()
    desk.notifier.when_durable(1, raises)
    desk.notifier.when_durable(1, desk.tell("other"))
    desk.notifier.call(raises)
    desk.notifier.call(lambda: desk.tell("call")(None))
    go_on.set()
    desk.end()
    assert desk.told == [("call", None, 0), ("other", None, 1)]


def test_a_thread_that_cannot_go_on_says_so_and_tells_all_why(desk: Desk) -> None:
    error = MemoryError()

    def breaks() -> None:
        desk.notifier.when_durable(1, desk.tell("waits"))
        raise error

    late = desk.notifier._records = Late()
    late.then = breaks
    desk.notifier.start()
    desk.end()
    assert desk.told == [("waits", error, 1)]
