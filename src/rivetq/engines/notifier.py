"""One thread that waits in place of all who left a callback: for the disk, or for a job to lease.

A caller that cannot block, such as an event loop, hands over what is to happen next and goes on. The thread takes all
that came since it looked last, waits once until the latest of their records is durable (so one sync covers them all,
together with whoever waits in a thread of his own), and tells each. It starts with the first callback.

A callback that raises, which none should, is logged, and the others are told all the same: everybody who waits like
this shares the thread.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable

logger = logging.getLogger("rivetq")

Tell = Callable[[BaseException | None], None]
"""Gets None when the record is durable, else why it never will be. Must not raise, and must not wait."""


class Notifier:
    """Callbacks for an engine.

    Args:
        wait: returns when a record is as durable as was promised, or raises.
        start: starts a thread.
        failed: told if the thread itself cannot go on.
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
        """The thread is there when this returns, unless it was stopped. Raises RuntimeError if there can be none."""
        if not self._started:
            with self._lock:
                if not self._started and not self._stopping:
                    self._start("rivetq-notifier", self._run)
                    # Last: what breaks into the start may leave a thread behind, and the next one finds that it runs.
                    self._started = True

    def when_durable(self, lsn: int, tell: Tell) -> None:
        """Wait for a record in place of the caller. The thread was started, and `stop` comes later."""
        self._records.append((lsn, tell))
        self._poked.set()

    def call(self, do: Callable[[], None]) -> None:
        """Call `do` in the thread; it may wait for the disk. May be called with locks held; otherwise as above."""
        self._later.append(do)
        self._poked.set()

    def stop(self) -> None:
        """Tell all who are waiting, then end; nothing is left here after this. Its thread is joined elsewhere."""
        with self._lock:
            self._stopping = True
        self._poked.set()

    def forked(self) -> None:
        """In the child: the thread is not here, and the holders of its locks are not.

        If it was the thread itself that forked, in a callback, it ends.
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
        """Do what is there, else wait for more; False: it is over."""
        self._poked.clear()
        stopping = self._stopping  # before the looks below: what was left before the end is still told
        while self._later:
            _guarded(self._later[0])
            if self._later:  # a fork in there empties it
                self._later.popleft()  # last: what breaks in leaves it for the end
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
                _guarded(tell, error)  # it may have been broken into before it told its caller
        self._batch = []
        return True


def _guarded(do: Callable[..., None], *arguments: object) -> bool:
    try:
        do(*arguments)
    except BaseException:
        logger.exception("a callback raised; the others are told all the same")
        return False
    return True
