"""The jobs of a queue that wait: ready, scheduled and dead ones, a window for each state and priority."""

from __future__ import annotations

from collections.abc import Iterator

from .queue import DEAD, PRIORITIES, READY, SCHEDULED
from .window import Window


class Waiting:
    """The windows of one queue, each made when it is first needed. Written by apply alone."""

    __slots__ = ("dead", "ready", "scheduled")

    def __init__(self) -> None:
        self.ready: list[Window | None] = [None] * PRIORITIES
        self.scheduled: list[Window | None] = [None] * PRIORITIES
        self.dead: list[Window | None] = [None] * PRIORITIES

    def window(self, state: int, priority: int) -> Window:
        """The window of a waiting state and a priority."""
        windows = self.ready if state == READY else self.scheduled if state == SCHEDULED else self.dead
        found = windows[priority]
        if found is None:
            found = windows[priority] = Window(by_due=state == SCHEDULED)
        return found

    def windows(self, state: int) -> list[Window]:
        """The windows of a waiting state that hold something."""
        windows = self.ready if state == READY else self.scheduled if state == SCHEDULED else self.dead
        return [window for window in windows if window is not None and window.count]

    def each(self, priority: int | None = None) -> Iterator[tuple[int, Window]]:
        """The windows that hold something, all or those of one priority, each with its state."""
        for state, windows in ((READY, self.ready), (SCHEDULED, self.scheduled), (DEAD, self.dead)):
            for window in windows if priority is None else windows[priority : priority + 1]:
                if window is not None and window.count:
                    yield state, window

    def ids(self, state: int) -> list[int]:
        """Ids in a waiting state, ascending."""
        found: list[int] = []
        for window in self.windows(state):
            found += [key[1] for key in window.loose] if window.by_due else window.loose
            for run in window.runs:
                columns, at = run.peek()
                found += columns.ids[at:]
        return sorted(found)
