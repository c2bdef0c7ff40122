"""One thread that waits in place of all who left a callback: for the disk, or for a job to lease.

A caller that cannot block, such as an event loop, hands over what is to happen next and goes on. The thread takes all
that came since it looked last, waits once until the latest of their records is durable (so one sync covers them all,
together with whoever waits in a thread of his own), and tells each. It starts with the first callback.
"""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections import deque
from collections.abc import Callable

Tell = Callable[[BaseException | None], None]
"""Gets None when the record is durable, else why it never will be. Must not raise, and must not wait."""


class Notifier:
    """Callbacks for an engine. `wait` returns when a record is as durable as was promised, or raises."""

    def __init__(self, wait: Callable[[int], None], start: Callable[[str, Callable[[], None]], None]) -> None:
        self._wait = wait
        self._start = start
        self._lock = threading.Lock()  # guards the start of the thread and the heap; held for microseconds
        self._started = self._stopping = False
        self._poked = threading.Event()
        self._records: deque[tuple[int, Tell]] = deque()
        self._calls: deque[Callable[[], None]] = deque()
        self._later: list[tuple[float, int, Callable[[], None]]] = []  # heap by monotonic time
        self._numbers = itertools.count()

    def when_durable(self, lsn: int, tell: Tell) -> None:
        """Wait for a record in place of the caller."""
        self._records.append((lsn, tell))
        self._poke()

    def call(self, do: Callable[[], None], delay_s: float | None = None) -> None:
        """Call `do` in the thread, soon or after a while; it may wait for the disk. May be called with locks held."""
        if delay_s is None:
            self._calls.append(do)
        else:
            with self._lock:
                heapq.heappush(self._later, (time.monotonic() + delay_s, next(self._numbers), do))
        self._poke()

    def stop(self) -> None:
        """Tell all who are waiting, then end; nothing is left here after this. Its thread is joined elsewhere."""
        self._stopping = True
        self._poked.set()

    def _poke(self) -> None:
        if not self._started:
            with self._lock:
                starts = not self._started and not self._stopping
                self._started = True
            if starts:
                self._start("rivetq-notifier", self._run)
        self._poked.set()

    def _run(self) -> None:
        while True:
            self._poked.clear()
            stopping = self._stopping  # before the looks below: what was left before the end is still told
            timeout_s = self._call_due()
            while self._calls:
                self._calls.popleft()()
            batch = [self._records.popleft() for _ in range(len(self._records))]
            if batch:
                self._tell(batch)
            elif stopping:
                return
            else:
                self._poked.wait(timeout_s)

    def _call_due(self) -> float | None:
        """Call what is due; seconds until the next is, None without one."""
        while True:
            with self._lock:
                left = self._later[0][0] - time.monotonic() if self._later else None
                if left is None or left > 0:
                    return left
                do = heapq.heappop(self._later)[2]
            do()

    def _tell(self, batch: list[tuple[int, Tell]]) -> None:
        error: BaseException | None = None
        try:
            self._wait(max(lsn for lsn, _ in batch))
        except BaseException as failure:
            error = failure
        for _, tell in batch:
            tell(error)
