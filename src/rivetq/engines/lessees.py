"""The lessees: one line per queue, in order of arrival.

A lessee stands in the lines of all queues that it leases from. It is woken when one of them may have a job for it, and
then looks by itself. It keeps its place until it has taken jobs or gives up. The engine's lock guards all of this.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Protocol

from ..engine import Enqueue, Operation
from ..machine.machine import Machine
from ..machine.queue import READY, Queue

LONGEST_SLEEP_S = 3600.0


class Lessee(Protocol):
    """A member of a line."""

    over: bool
    """It has taken jobs, failed or been cancelled, and wants no more."""

    def wake(self) -> None:
        """Make it look again soon. The caller holds the engine's lock, unless the engine failed or this is a child."""

    def reset(self) -> None:
        """From here on it can be woken again. The caller holds the engine's lock and is about to look."""


class SleepingLessee:
    """A thread that waits for a first job. It sleeps on a bare lock, which is half the work of an Event."""

    __slots__ = ("_asleep", "over")

    def __init__(self) -> None:
        self.over = False  # guarded by the engine's lock: it has taken jobs, or wants none any more
        self._asleep = threading.Lock()
        self._asleep.acquire()

    def wake(self) -> None:
        with suppress(RuntimeError):  # it was woken before
            self._asleep.release()

    def park(self, timeout_s: float | None) -> None:
        self._asleep.acquire(timeout=LONGEST_SLEEP_S if timeout_s is None else min(timeout_s, LONGEST_SLEEP_S))

    def reset(self) -> None:
        # Caller holds the engine's lock and is about to look at the state: no wake-up is lost.
        self._asleep.acquire(blocking=False)


class Lessees:
    """The lines."""

    def __init__(self) -> None:
        self.lines: dict[str, dict[Lessee, None]] = {}
        """By the name of the queue; none is empty."""

    def add(self, lessee: Lessee, queues: Sequence[str]) -> None:
        """Put it at the end of each line that it is not in yet."""
        for name in queues:
            self.lines.setdefault(name, {})[lessee] = None

    def remove(self, lessee: Lessee, queues: Sequence[str]) -> None:
        for name in queues:
            line = self.lines.get(name)
            if line is not None:
                line.pop(lessee, None)
                if not line:
                    del self.lines[name]

    def wake_all(self) -> None:
        """May be called without the lock: when a broker fails or was forked, the lock may be held."""
        for line in list(self.lines.values()):
            for lessee in list(line):
                lessee.wake()

    def wake(self, machine: Machine, names: Iterable[str]) -> list[Queue]:
        """Wake as many lessees as there are jobs to take in these queues: none in vain, and none is forgotten.

        Returns the queues that have lessees and ready jobs, but no token of their rate limit.
        """
        without_token = []
        for name in names:
            line, queue = self.lines.get(name), machine.queues.get(name)
            if not line or queue is None or queue.config.paused or not queue.counts[READY]:
                continue
            count = queue.counts[READY]
            if queue.bucket is not None and queue.bucket.limit.on == "lease":
                count = min(count, queue.bucket.available(machine.now_ms))
            for lessee in list(line)[:count]:
                lessee.wake()
            if not count:  # else those who are woken take the tokens first, and this is asked again
                without_token.append(queue)
        return without_token

    def wake_early(self, machine: Machine, operations: Sequence[Operation]) -> None:
        """Wake waiting lessees before the enqueues are applied: a thread takes longer to wake than an enqueue to run.

        This is only a hint. A lessee that looks too early waits again, and is woken again when the jobs are there.
        """
        for operation in operations:
            if isinstance(operation, Enqueue) and (line := self.lines.get(operation.queue)):
                queue = machine.queues.get(operation.queue)
                if queue is None or not queue.config.paused:
                    for lessee in list(line)[: len(operation.payloads)]:
                        lessee.wake()
