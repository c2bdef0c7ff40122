"""The worker: leases jobs in batches, runs their tasks in pools, and answers in batches.

Three threads of its own, in addition to those of the pools::

    fetcher   waits for room in the pools and for jobs; leases up to the room there is
    settler   takes all endings that came meanwhile and answers them in one commit, so that one sync covers them
    renewer   extends leases before they end; tells a handler that its lease was lost or its time is over; gives back
              what was leased in advance and does not begin; looks for calls in further queues

The broker alone limits throughput: a job costs no round trip of its own, and no handler waits for the disk.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from types import FrameType, TracebackType
from typing import Self

from rivetq import BrokerClosedError, Duration, UsageError

from ..schedules.scheduler import Scheduler
from ..schedules.when import SCHEDULES
from ..tasks.app import App
from ..tasks.current import here
from ..texts import quoted
from ..units import seconds_of
from .fetcher import Fetcher
from .held import LEAST_S, Held
from .limits import Limits
from .options import Concurrency, Settled, counted, counted_or_none
from .order import PREFETCH_JOBS
from .pools import SHUTDOWN
from .queues import Queues, kind_of
from .renewer import Renewer
from .settler import Settler

logger = logging.getLogger("rivetq.worker")

MARGIN_S = 2.0
"""How much of the grace time is kept for giving back running jobs and closing, a fifth of it at most. Of a short grace
time half a second is kept, and half of it at most."""
SIGNAL_S = 0.05


class Worker:
    """Runs the jobs of an app's tasks.

    `run` is for a process of its own: it ends by SIGTERM or SIGINT, in order. `start` and `stop` are for a worker
    beside other work, in a web server say; it also works as a context manager.

    Args:
        app: whose tasks are run; its broker is opened.
        queues: names in order of preference; or a mapping of names to weights, so that with work in all of them each
            gets its share of the jobs; None: those of the app's tasks, and others in which calls of these wait, with
            equal weights.
        concurrency: handlers at a time: an int, a `Concurrency`, or a mapping with threads, processes and tasks.
        grace: seconds that running jobs get to end after a stop. Jobs that still run then are given back with their
            attempts refunded, whether their handlers can be stopped or not.
        visibility_timeout: seconds that its leases last and are renewed for; None: as the job or its queue says.
        prefetch: the most jobs leased in advance for each pool; 0: none. A job that does not begin within 20
            milliseconds (60 if jobs before it still begin) is given back, its attempt not counted.
        max_jobs: stop in order after so many jobs; a supervisor begins another worker.
        max_memory: stop in order when the process occupies more bytes than that after a job.
        child_max_jobs, child_max_memory: the same for the children of the process pool, which the worker replaces.
        on_settled: called with a `Settled` for each job, in a thread of the worker's; it must not wait.
    """

    def __init__(
        self,
        app: App,
        queues: Sequence[str] | Mapping[str, float] | None = None,
        concurrency: Concurrency | Mapping[str, int] | int | None = None,
        *,
        grace: Duration = 30.0,
        visibility_timeout: Duration | None = None,
        prefetch: int = PREFETCH_JOBS,
        max_jobs: int | None = None,
        max_memory: int | None = None,
        child_max_jobs: int | None = None,
        child_max_memory: int | None = None,
        on_settled: Callable[[Settled], None] | None = None,
    ) -> None:
        if not isinstance(app, App):
            raise UsageError(f"app: an App expected, got {quoted(app)}")
        self.app = app
        self.grace = seconds_of(grace, "grace")
        if on_settled is not None and not callable(on_settled):
            raise UsageError(f"on_settled: a callable expected, got {quoted(on_settled)}")
        self.on_settled: list[Callable[[Settled], None]] = [] if on_settled is None else [on_settled]
        self.failure: BaseException | None = None
        """Why it ended by itself: the broker failed or was closed."""
        self._held = held = Held(counted_or_none(max_jobs, "max_jobs"))
        self._queues = Queues(app, held, queues)
        limits = Limits(held)
        self._fetcher = Fetcher(
            app,
            held,
            self._queues,
            limits,
            concurrency=Concurrency.of(concurrency),
            prefetch=counted(prefetch, "prefetch", least=0),
            visibility=_visibility(visibility_timeout),
            child_limits={
                "max_jobs": counted_or_none(child_max_jobs, "child_max_jobs"),
                "max_memory": counted_or_none(child_max_memory, "child_max_memory"),
            },
        )
        self._settler = Settler(held, self.on_settled, max_jobs, counted_or_none(max_memory, "max_memory"))
        self._renewer = Renewer(held, self._queues, limits)
        self._started = False
        self._ended = threading.Event()
        self._signals = 0
        self._signalled_at: float | None = None  # monotonic
        self._stop_lock = threading.RLock()  # a start or stop at a time; a signal handler may break into its own
        self._threads: dict[str, threading.Thread] = {}
        self._scheduler: Scheduler | None = None

    # Beginning and ending

    def run(self) -> int:
        """Work until SIGTERM or SIGINT, or until a limit is reached; the exit status for a supervisor.

        0: it ended in order, all jobs are done or given back; 1: the broker failed, see `failure`. A second signal ends
        the grace time. The app is closed, and does not open again by itself (see `App.close`).
        """
        if threading.current_thread() is not threading.main_thread():
            raise UsageError("run: signals come to the main thread only; in another use start() and stop()")
        before = {number: signal.signal(number, self._signalled) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            self.start()
            logger.info("working in process %s on %s of %s", os.getpid(), self._queues.order, self._held.broker.path)
            # Not for longer: another thread may have got the signal. And the handler takes no lock, since it may break
            # into itself. The grace time counts from the signal.
            while not self._signals and not self._held.wanted.wait(SIGNAL_S):
                pass
            logger.info("stopping, %s jobs are leased", self.running)
            self.stop()
            logger.info("stopped after %s jobs", self._settler.jobs)
        finally:
            if hasattr(self._held, "broker"):  # a directory that could not be opened may be tried again
                self.app.close()
            for number, handler in before.items():
                signal.signal(number, handler)
        return 0 if self.failure is None else 1

    def _signalled(self, number: int, frame: FrameType | None) -> None:
        self._signals += 1
        self._signalled_at = self._signalled_at or time.monotonic()

    def start(self) -> None:
        """Open the broker and begin to work, in threads. Raises what `Broker` raises."""
        with self._stop_lock:
            if self._started:
                raise UsageError("a worker is started once; make another")
            self._held.broker = broker = self.app.broker
            names = broker.queues()
            if self.app.schedules or SCHEDULES in names:  # or those that the program had
                self._scheduler = Scheduler(broker, self.app.schedules)
            self._started = True
            try:
                self.app.workers.add(self)
                self._begin(names)
            except BaseException:
                self._end_all(time.monotonic(), 0.0)
                raise
            if self._ended.is_set():  # a signal handler stopped it: also what began behind that
                self._end_all(time.monotonic(), 0.0)

    def _begin(self, names: list[str]) -> None:
        self._queues.start(names)
        for kind in {kind_of(task) for task in list(self.app.tasks.values())} or {"thread"}:
            self._fetcher.add_room(kind)
        targets = {"settle": self._settler.run, "renew": self._renewer.run}
        if self._scheduler is not None:
            targets["schedule"] = self._scheduler.run
        targets["fetch"] = self._fetcher.run  # the last one: if another cannot be started, no job has been leased
        for name, target in targets.items():
            thread = threading.Thread(target=self._guarded, args=(target,), name=f"rivetq-{name}", daemon=True)
            self._threads[name] = thread
            thread.start()

    def follow(self, queue: str) -> None:
        """For apps: calls of a task are in this queue, too. A worker that was told its queues keeps to them."""
        self._queues.follow(queue)

    def _leave(self) -> None:
        self.app.workers.discard(self)
        if self._scheduler is not None:
            self._scheduler.close()

    def stop(self, grace: Duration | None = None) -> None:
        """Stop leasing, let handlers run for the grace time, give back the rest, end the threads. May be repeated."""
        if any(delivery.job is here() for delivery in list(self._held.deliveries.values())):
            raise UsageError("stop: a handler cannot wait for its own end; let another thread stop the worker")
        with self._stop_lock:
            if not self._started or self._ended.is_set():
                return
            if grace is not None:
                self.grace = seconds_of(grace, "grace")
            self._end_all(self._signalled_at or time.monotonic(), self.grace)

    def _end_all(self, begun: float, grace: float) -> None:
        """End the threads and pools that have begun. The grace time counts from `begun`."""
        held = self._held
        held.begin_to_stop()
        if self._scheduler is not None:
            self._scheduler.stop()
        self._join("fetch")
        with held.changed:
            for room in held.rooms.values():
                held.take_back(room)
        for delivery in list(held.deliveries.values()):
            delivery.job.stopping = True
        self._wait_for_handlers(begun, grace)
        left = [delivery for delivery in list(held.deliveries.values()) if not delivery.is_told]
        for delivery in left:
            if delivery.ending is None:
                held.tell_handler(delivery, SHUTDOWN)
        # Pools end the handlers that can be ended. The steps after that need a moment of the grace time as well.
        now = time.monotonic()
        until = now + 0.8 * min(_margin(grace), begun + grace - now)
        for room in held.rooms.values():
            room.pool.stop(max(LEAST_S, until - time.monotonic()))
        for delivery in left:
            if not delivery.is_told:  # a thread that goes on; its ending does not matter any more
                held.end(delivery)
        held.is_settling = False
        held.poked.set()
        held.renewer_poked.set()
        for name in list(self._threads):
            self._join(name)
        self._leave()
        self._ended.set()
        held.wanted.set()

    def _join(self, name: str) -> None:
        thread = self._threads.get(name)
        # This one: a listener stops the worker. And one that could not be started has no number.
        if thread is not None and thread is not threading.current_thread() and thread.ident is not None:
            thread.join()

    def _wait_for_handlers(self, begun: float, most: float) -> None:
        """Return when no handler runs or the grace time is over; a signal may shorten it."""
        held = self._held
        with held.changed:
            while any(room.jobs for room in held.rooms.values()) and self.failure is None:
                grace = most if self._signals < 2 else 0.0
                left = begun + grace - _margin(grace) - time.monotonic()
                if left <= 0:
                    return
                held.changed.wait(min(left, 0.5))

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def cancel(self, job_id: int) -> bool:
        """Remove a job that waits, or tell its handler to stop if it runs here; False if neither was possible.

        When the handler stops, its job is removed. A job that was leased and has not begun never begins.
        """
        return self._held.cancel(job_id)

    @property
    def running(self) -> int:
        """Jobs that are leased and not answered yet."""
        return len(self._held.deliveries)

    def _guarded(self, target: Callable[[], None]) -> None:
        """Run a thread of the worker. An exception that ends it ends the worker."""
        try:
            target()
        except BaseException as error:
            self.failure = self.failure or error
            if not isinstance(error, BrokerClosedError):
                logger.exception("the worker cannot go on")
            self._held.begin_to_stop()
            self._held.wanted.set()


def _margin(grace: float) -> float:
    """The seconds at the end of a grace time in which the worker waits for no handler."""
    return min(MARGIN_S, max(grace / 5, min(0.5, grace / 2)))


def _visibility(value: Duration | None) -> float | None:
    seconds = None if value is None else seconds_of(value, "visibility_timeout")
    if seconds == 0:
        raise UsageError("visibility_timeout: above 0 seconds expected")
    return seconds
