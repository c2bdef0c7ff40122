"""One thread that waits for the disk, or for a job to lease, on behalf of callers that left a callback.

A caller that cannot block, such as an event loop, leaves a callback and goes on. The thread takes all callbacks that
came since its last turn, waits once until the latest of their records is durable, and calls each. One sync covers them
all, together with threads that wait for themselves. The thread starts with the first callback.

A callback must not raise. If one does, the exception is logged and the others are called all the same, since all of
them share the thread.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable

logger = logging.getLogger("rivetq")

Tell = Callable[[BaseException | None], None]
"""Gets None when the record is durable, else the error why it never will be. Must not raise, and must not wait."""


class Notifier:
    """Callbacks for an engine.

    Args:
        wait: returns when a record is as durable as was promised, or raises.
        start: starts a thread.
        failed: called if the thread itself cannot go on.
    """

    def __init__(
        self,
        wait: Callable[[int], None],
        start: Callable[[str, Callable[[], None]], None],
        failed: Callable[[BaseException], None],
    ) -> None:
        self._wait = wait
        self._start = start
        self._failed = failed
        self._lock = threading.Lock()  # guards the start of the thread; held for as long as that takes
        self._started = self._stopping = self._runs = False
        self._poked = threading.Event()
        self._records: deque[tuple[int, Tell]] = deque()
        self._later: deque[Callable[[], None]] = deque()
        self._batch: list[tuple[int, Tell]] = []  # those of the records that are told now

    def start(self) -> None:
        """Start the thread unless it runs or was stopped. Raises RuntimeError if no thread can be started."""
        if not self._started:
            with self._lock:
                if not self._started and not self._stopping:
                    self._start("rivetq-notifier", self._run)
                    # Last: an exception in the start may leave a thread behind; the next thread sees that one runs.
                    self._started = True

    def when_durable(self, lsn: int, tell: Tell) -> None:
        """Wait for a record on behalf of the caller. Call it after `start` and before `stop`."""
        self._records.append((lsn, tell))
        self._poked.set()

    def call(self, do: Callable[[], None]) -> None:
        """Call `do` in the thread, where it may wait for the disk. May be called with locks held; else as above."""
        self._later.append(do)
        self._poked.set()

    def stop(self) -> None:
        """Call all callbacks that are left, then end the thread. The thread is joined elsewhere."""
        with self._lock:
            self._stopping = True
        self._poked.set()

    def forked(self) -> None:
        """In the child: neither the thread nor the holders of its locks exist here.

        If the thread itself forked, in a callback, it ends in the child.
        """
        self._lock, self._poked = threading.Lock(), threading.Event()
        self._stopping = True
        self._later.clear()
        self._records.clear()
        self._poked.set()

    def _run(self) -> None:
        if self._runs:
            return
        self._runs = True
        try:
            while self._turn():
                pass
        except BaseException as error:  # no memory, say
            self._failed(error)
            self._stopping = True
            for _, tell in self._batch:  # each is told why; some of these for the second time
                _guarded(tell, error)
            while self._turn():
                pass

    def _turn(self) -> bool:
        """Make one round: call what is there, else wait for more. Returns False at the end."""
        self._poked.clear()
        stopping = self._stopping  # read it before the queues below: what was left before the stop is still called
        while self._later:
            _guarded(self._later[0])
            if self._later:  # a fork in there empties it
                self._later.popleft()  # last: after an exception in here it is still called at the end
        batch = self._batch = list(self._records)
        for _ in batch:
            self._records.popleft()
        if not batch:
            if not stopping:
                self._poked.wait()
            return not stopping
        error: BaseException | None = None
        try:
            self._wait(max(lsn for lsn, _ in batch))
        except BaseException as failure:
            error = failure
        for _, tell in batch:
            if not _guarded(tell, error):
                _guarded(tell, error)  # once more: an exception may have come before it told its caller
        self._batch = []
        return True


def _guarded(do: Callable[..., None], *arguments: object) -> bool:
    try:
        do(*arguments)
    except BaseException:
        logger.exception("a callback raised; the others are told all the same")
        return False
    return True
