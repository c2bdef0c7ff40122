"""Time limits of handlers that run in threads: nothing but the handler itself can end it, so it is told."""

from __future__ import annotations

import heapq
import itertools
import threading

from ..tasks.running import TIME_LIMIT, Delivery
from .held import Held


class Limits:
    """Deliveries by the moment at which their time is over, monotonic. Any thread may call."""

    def __init__(self, held: Held) -> None:
        self._held = held
        self._heap: list[tuple[float, int, Delivery]] = []
        self._numbers = itertools.count()
        self._lock = threading.Lock()

    def first_at(self) -> float | None:
        """The first moment."""
        with self._lock:
            return self._heap[0][0] if self._heap else None

    def watch(self, delivery: Delivery, at: float) -> None:
        with self._lock:
            if len(self._heap) > 64 + 2 * len(self._held.deliveries):  # jobs that ended long before their limit
                self._heap = [each for each in self._heap if each[2].ending is None]
                heapq.heapify(self._heap)
            heapq.heappush(self._heap, (at, next(self._numbers), delivery))
            first = self._heap[0][2] is delivery
        if first:
            self._held.renewer_poked.set()

    def end(self, now: float) -> None:
        """Tell handlers whose time is over."""
        while True:
            with self._lock:
                if not self._heap or self._heap[0][0] > now:
                    return
                delivery = heapq.heappop(self._heap)[2]
            limit = delivery.task.time_limit
            assert limit is not None
            if delivery.ending is not None:
                continue
            if delivery.started_at is None or delivery.started_at + limit > now:  # it had to wait for its thread
                self.watch(delivery, (delivery.started_at or now) + limit)
            else:
                delivery.job.cancel(TIME_LIMIT)
