"""The queues of a worker: which ones, whose turn it is, and in which pools the tasks of each run."""

from __future__ import annotations

import math
import time
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from ..schedules.when import SCHEDULES
from ..tasks.app import App
from ..tasks.task import TASK_HEADER
from .held import Held
from .order import Order

LOOKED_JOBS = 20
"""How many jobs of a queue that may hold calls are examined at once."""
LOOK_S = 1.0
"""How often a worker looks for calls in queues that it does not know as its own."""
LOOK_SHARE = 0.01
"""About which share of its time a worker spends on this."""


class Queues:
    """The queues that were given, or those of the app's tasks and others in which calls of these tasks wait.

    Args:
        app: whose tasks are run.
        held: what the worker has in hand.
        queues: see `Worker`; None: they are followed.
    """

    def __init__(self, app: App, held: Held, queues: Sequence[str] | Mapping[str, float] | None) -> None:
        self._app = app
        self._held = held
        self.follows = queues is None
        self.order = Order(dict.fromkeys(app.queues or ["default"], 1.0) if queues is None else queues)
        self._grouped: dict[frozenset[str], list[str]] | None = None
        self.kinds: dict[str, set[str]] = {}
        """By queue, the pools in which its tasks run, as far as they are known."""
        self._seen: dict[str, set[str]] = {}  # pools of jobs that a queue turned out to hold
        self.look_at = math.inf
        """Monotonic: when to look for further queues."""
        self._looked_at = ""  # the queue that was looked at last
        self._cursors: dict[tuple[str, str], int] = {}  # by queue and state: the job that was looked at last

    def start(self, names: Iterable[str]) -> None:
        """Take in what came since the worker was made. `names`: all queues of the broker."""
        for name in list(self._app.queues):
            self.follow(name)
        if self.follows:
            for name in names:
                if name not in self.order:
                    self.look_into(name)
            self.look_at = time.monotonic() + LOOK_S

    def follow(self, queue: str) -> None:
        """For apps: calls of a task are in this queue, too. A worker that was told its queues keeps to them."""
        if not self.follows and queue not in self.order:
            return
        with self._held.changed:
            self.order.add(queue)
            self._grouped = None
            self._held.changed.notify_all()

    def pools_of(self, queue: str) -> Collection[str]:
        """The pools of tasks that a queue holds, or may hold."""
        return self.kinds.get(queue) or list(self._held.rooms)

    def _known_kinds(self) -> dict[str, set[str]]:
        """By queue, the pools of the tasks that are bound to it, whose calls were put there, or were found there."""
        found: dict[str, set[str]] = {}
        tasks = dict(self._app.tasks)
        for task in tasks.values():
            found.setdefault(task.opts.queue, set()).add(kind_of(task))
        for name, those in list(self._app.queues.items()):
            found.setdefault(name, set()).update(kind_of(tasks[task]) for task in list(those) if task in tasks)
        for name, kinds in self._seen.items():
            found.setdefault(name, set()).update(kinds)
        return found

    def look_for_calls(self) -> None:
        """Follow further queues in which calls of the app's tasks wait, however they came there.

        It takes a hundredth of the time; the next call goes on where this one stopped.
        """
        began = time.monotonic()
        names = [name for name in self._held.broker.queues() if name not in self.order and name != SCHEDULES]
        at = bisect_right(names, self._looked_at)
        names = names[at:] + names[:at]
        while names and time.monotonic() < began + LOOK_S * LOOK_SHARE:
            self._looked_at = name = names.pop(0)
            if self.look_into(name):
                names.append(name)  # there is more
        now = time.monotonic()
        self.look_at = now + max(LOOK_S, (now - began) / LOOK_SHARE)

    def look_into(self, queue: str) -> bool:
        """Follow a queue if a call is among its next waiting jobs. Returns whether there are more jobs to examine."""
        kinds: set[str] = set()
        more = False
        for state in ("ready", "scheduled"):
            after = self._cursors.pop((queue, state), 0)
            jobs = self._held.broker.jobs(queue, state=state, after=after, limit=LOOKED_JOBS, payloads=False)
            tasks = [self._app.tasks.get(job.headers.get(TASK_HEADER, "")) for job in jobs]
            kinds.update(kind_of(task) for task in tasks if task is not None)
            if len(jobs) == LOOKED_JOBS:
                self._cursors[queue, state] = jobs[-1].id
                more = True
        if not kinds:
            return more
        self._cursors.pop((queue, "ready"), None)
        self._cursors.pop((queue, "scheduled"), None)
        with self._held.changed:
            self._seen.setdefault(queue, set()).update(kinds)
        self.follow(queue)
        return False

    def grouped(self, add_room: Callable[[str], None]) -> dict[frozenset[str], list[str]]:
        """Names by the pools in which their tasks run. The caller holds `held.changed`.

        Args:
            add_room: makes a pool of this kind, for a task that came after the start.
        """
        if self._grouped is None:
            self.kinds = self._known_kinds()
            for kind in set().union(*self.kinds.values()) - self._held.rooms.keys():
                add_room(kind)
            self._grouped = {}
            for name in self.order.names:  # one of which nothing is known may hold jobs of any task
                self._grouped.setdefault(frozenset(self.pools_of(name)), []).append(name)
        return self._grouped

    def regroup(self) -> None:
        """Pools were added, or a queue was seen to use others."""
        self._grouped = None

    def saw(self, queue: str, kind: str) -> None:
        """A job of a queue runs in a pool that was not known as one of its own."""
        self._seen.setdefault(queue, set()).add(kind)
        self._grouped = None


def kind_of(task: Any) -> str:
    """The pool of a task."""
    kind: str = "loop" if task.is_async else task.opts.pool
    return kind
