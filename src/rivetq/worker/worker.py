"""The worker: leases jobs in batches, runs their tasks in pools, and answers in batches.

Three threads of its own, besides those of the pools::

    fetcher   waits for room in the pools and for jobs; leases up to the room there is
    settler   takes all endings that came meanwhile and answers them in one commit, so that one sync covers them
    renewer   extends leases before they end; tells a handler that its lease was lost or its time is over; gives back
              what was leased in advance and does not begin; looks for calls in further queues

So throughput is the broker's: a job costs no round trip of its own, and no handler waits for the disk.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import math
import os
import signal
import threading
import time
from bisect import bisect_right
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any, NamedTuple, Self

import attrs

from rivetq import (
    Broker,
    BrokerClosedError,
    BrokerFailedError,
    DiskFullError,
    Duration,
    Lease,
    LeaseLostError,
    RivetQError,
    UsageError,
)

from ..schedules.scheduler import SCHEDULES, Scheduler
from ..tasks.app import App
from ..tasks.current import here
from ..tasks.outcomes import Reject, seconds_of
from ..tasks.running import ACK, GIVEN_BACK, TIME_LIMIT, Delivery, Ending, fields
from ..tasks.task import TASK_HEADER
from ..texts import quoted
from .children import ProcessPool, memory_bytes
from .order import AIM_S, PREFETCH_JOBS, PREFETCH_S, Order, Room
from .pools import SHUTDOWN, LoopPool, Pool, ThreadPool

logger = logging.getLogger("rivetq.worker")

LEASE_LOST = "the lease was lost"
CANCELLED = "cancelled"
RENEWALS = 3
"""A lease is extended so often in its time: one extension may come late, and the next still saves it."""
MARGIN_S = 2.0
"""Of the grace time that is kept for giving back what still runs and closing, a fifth of it at most; of a short one
half a second, and half of it at most."""
LEAST_S = 0.05
"""That an async handler gets to end after it was cancelled, whatever the grace time was."""
SIGNAL_S = 0.05
LOOKED_JOBS = 20
"""Of a queue that may hold calls, at once."""
LOOK_S = 1.0
"""How often a worker looks for calls in queues that it does not know as its own."""
LOOK_SHARE = 0.01
"""Of its time that such a look may take, about."""
CAREFUL_JOBS = 100
"""None is leased in advance from a queue until so many came of it that have another attempt."""
RETRY_S = 1.0
"""After an answer that found the disk full."""


@attrs.frozen(kw_only=True)
class Concurrency:
    """Handlers that run at a time, by kind."""

    threads: int = 8
    processes: int = attrs.field(factory=lambda: os.cpu_count() or 1)
    tasks: int = 100
    """Async handlers."""

    def __attrs_post_init__(self) -> None:
        for name, number in attrs.asdict(self).items():
            _count(number, f"concurrency[{quoted(name)}]")

    @classmethod
    def of(cls, value: Concurrency | Mapping[str, int] | int | None) -> Concurrency:
        """A number is that of each kind, but for processes no more than there are processors."""
        if value is None:
            return cls()
        if isinstance(value, Concurrency):
            return value
        if isinstance(value, Mapping):
            unknown = value.keys() - {"threads", "processes", "tasks"}
            if unknown:
                raise UsageError(f"concurrency: threads, processes and tasks expected, got {quoted(list(unknown))}")
            return cls(**value)
        number = _count(value, "concurrency")
        return cls(threads=number, processes=min(number, os.cpu_count() or 1), tasks=number)


@attrs.frozen
class Settled:
    """A job that was run and answered: for metrics and logs."""

    queue: str
    task: str
    ending: str
    """ "ack", "nack", "release" or "reject"; "lost" if there was nothing to answer any more."""
    seconds: float
    """That the handler ran."""


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
        grace: seconds that running jobs get to end after a stop. What still runs then is given back with its attempt
            refunded, if it can be stopped or not.
        visibility_timeout: seconds that its leases last and are renewed for; None: as the job or its queue says.
        prefetch: jobs leased in advance for each pool at most; 0: none. What does not begin within 20 milliseconds (60
            if jobs before it still begin) is given back, its attempt not counted.
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
        self._concurrency = Concurrency.of(concurrency)
        self._visibility = None if visibility_timeout is None else seconds_of(visibility_timeout, "visibility_timeout")
        if self._visibility == 0:
            raise UsageError("visibility_timeout: above 0 seconds expected")
        self._prefetch = _count(prefetch, "prefetch", least=0)
        self._max_jobs = None if max_jobs is None else _count(max_jobs, "max_jobs")
        self._max_memory = None if max_memory is None else _count(max_memory, "max_memory")
        self._child_limits = {
            "max_jobs": None if child_max_jobs is None else _count(child_max_jobs, "child_max_jobs"),
            "max_memory": None if child_max_memory is None else _count(child_max_memory, "child_max_memory"),
        }
        if on_settled is not None and not callable(on_settled):
            raise UsageError(f"on_settled: a callable expected, got {quoted(on_settled)}")
        self._follows = queues is None
        self._order = Order(dict.fromkeys(app.queues or ["default"], 1.0) if queues is None else queues)
        self.on_settled: list[Callable[[Settled], None]] = [] if on_settled is None else [on_settled]
        self.failure: BaseException | None = None
        """Why it ended by itself: the broker failed or was closed."""
        self._changed = threading.Condition()  # guards the pools' counts and the flags below
        self._rooms: dict[str, Room] = {}
        self._grouped: dict[frozenset[str], list[str]] | None = None  # queues by the pools in which their tasks run
        self._kinds: dict[str, set[str]] = {}  # these pools, by queue
        self._seen: dict[str, set[str]] = {}  # pools of jobs that a queue turned out to hold
        self._served: dict[str, int] = {}  # by pool: a number that grows, of its last turn
        self._careful: dict[str, int] = {}  # see CAREFUL_JOBS; fetcher only
        self._came_back: deque[Delivery] = deque()  # given back, of which the order does not know yet
        self._fetching = False
        self._asked = self._reached = 0  # how often all leased jobs were wanted in `_held`, and up to which it was so
        self._cancels: list[_Cancel] = []
        self._stopping = False
        self._leased: tuple[list[Lease] | None, BaseException | None] | None = None  # what a waiting lease was told
        self._started = False
        self._ended = threading.Event()
        self._wanted = threading.Event()  # something wants it to stop
        self._signals = 0
        self._signalled_at: float | None = None  # monotonic
        self._stop_lock = threading.RLock()  # a start or stop at a time; a signal handler may break into its own
        self._held: dict[int, Delivery] = {}  # leased and not answered; by token, since a job may come again at once
        self._endings: deque[Delivery] = deque()
        self._poked = threading.Event()  # there are endings
        self._settling = True
        self._jobs = 0
        self._left = math.inf if self._max_jobs is None else self._max_jobs  # that may still be begun
        self._renewer_poked = threading.Event()
        self._watching = False  # something waits in a pool, and the renewer knows
        self._look_at = math.inf  # monotonic, when to look for further queues
        self._looked_at = ""  # the queue that was looked at last
        self._cursors: dict[tuple[str, str], int] = {}  # by queue and state: the job that was looked at last
        self._shortest = math.inf  # visibility timeout, of those that are held
        self._limits: list[tuple[float, int, Delivery]] = []  # heap of time limits in the thread pool
        self._limits_lock = threading.Lock()
        self._numbers = itertools.count()
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
            logger.info("working in process %s on %s of %s", os.getpid(), self._order, self._broker.path)
            # Not for longer: another thread may have got the signal. And the handler takes no lock, since it may break
            # into itself. The grace time counts from the signal.
            while not self._signals and not self._wanted.wait(SIGNAL_S):
                pass
            logger.info("stopping, %s jobs are leased", self.running)
            self.stop()
            logger.info("stopped after %s jobs", self._jobs)
        finally:
            if hasattr(self, "_broker"):  # a directory that could not be opened may be tried again
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
            self._broker: Broker = self.app.broker
            names = self._broker.queues()
            if self.app.schedules or SCHEDULES in names:  # or those that the program had
                self._scheduler = Scheduler(self._broker, self.app.schedules)
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
        for name in list(self.app.queues):
            self.follow(name)  # those that came since it was made
        if self._follows:
            for name in names:
                if name not in self._order:
                    self._look_into(name)
            self._look_at = time.monotonic() + LOOK_S
        for kind in {_kind(task) for task in list(self.app.tasks.values())} or {"thread"}:
            self._add_room(kind)
        targets = {"settle": self._settle, "renew": self._renew}
        if self._scheduler is not None:
            targets["schedule"] = self._scheduler.run
        targets["fetch"] = self._fetch  # the last one: if another cannot be started, no job has been leased
        for name, target in targets.items():
            thread = threading.Thread(target=self._guarded, args=(target,), name=f"rivetq-{name}", daemon=True)
            self._threads[name] = thread
            thread.start()

    def _leave(self) -> None:
        self.app.workers.discard(self)
        if self._scheduler is not None:
            self._scheduler.close()

    def follow(self, queue: str) -> None:
        """For apps: calls of a task are in this queue, too. A worker that was told its queues keeps to them."""
        if not self._follows and queue not in self._order:
            return
        with self._changed:
            self._order.add(queue)
            self._grouped = None
            self._changed.notify_all()

    def stop(self, grace: Duration | None = None) -> None:
        """Lease no more, let run what runs for the grace time, give back the rest, end the threads. May be repeated."""
        if any(delivery.job is here() for delivery in list(self._held.values())):
            raise UsageError("stop: a handler cannot wait for its own end; let another thread stop the worker")
        with self._stop_lock:
            if not self._started or self._ended.is_set():
                return
            if grace is not None:
                self.grace = seconds_of(grace, "grace")
            self._end_all(self._signalled_at or time.monotonic(), self.grace)

    def _end_all(self, begun: float, grace: float) -> None:
        """End the threads and pools that have begun. The grace time counts from `begun`."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        if self._scheduler is not None:
            self._scheduler.stop()
        self._join("fetch")
        with self._changed:
            for room in self._rooms.values():
                self._take_back(room)
        for delivery in list(self._held.values()):
            delivery.job.stopping = True
        self._wait_for_handlers(begun, grace)
        left = [delivery for delivery in list(self._held.values()) if not delivery.is_told]
        for delivery in left:
            if delivery.ending is None:
                self._tell_handler(delivery, SHUTDOWN)
        # What can be ended is; what comes behind it needs a moment of the grace time as well.
        now = time.monotonic()
        until = now + 0.8 * min(_margin(grace), begun + grace - now)
        for room in self._rooms.values():
            room.pool.stop(max(LEAST_S, until - time.monotonic()))
        for delivery in left:
            if not delivery.is_told:  # a thread that goes on; how it ends is not asked any more
                self._end(delivery)
        self._settling = False
        self._poked.set()
        self._renewer_poked.set()
        for name in list(self._threads):
            self._join(name)
        self._leave()
        self._ended.set()
        self._wanted.set()

    def _join(self, name: str) -> None:
        thread = self._threads.get(name)
        # This one: a listener stops the worker. And one that could not be started has no number.
        if thread is not None and thread is not threading.current_thread() and thread.ident is not None:
            thread.join()

    def _wait_for_handlers(self, begun: float, most: float) -> None:
        """Until nothing runs or the grace time is over; a signal may shorten it."""
        with self._changed:
            while any(room.jobs for room in self._rooms.values()) and self.failure is None:
                grace = most if self._signals < 2 else 0.0
                left = begun + grace - _margin(grace) - time.monotonic()
                if left <= 0:
                    return
                self._changed.wait(min(left, 0.5))

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def cancel(self, job_id: int) -> bool:
        """Remove a job that waits, or tell its handler to stop if it runs here; False if it is neither.

        The job of a handler that stops is removed then. One that was leased and has not begun never does.
        """
        this = _Cancel(job_id)
        with self._changed:
            self._cancels.append(this)
        try:
            while True:
                if self._broker.cancel(job_id) or self._cancel_held(job_id):
                    return True
                self._wait_for_fetcher()  # it may be leased and not be in `_held` yet
                if this.is_told or self._cancel_held(job_id):
                    return True
                if not this.is_let_go:
                    return False
                this.is_let_go = False  # and may wait again
        finally:
            with self._changed:
                self._cancels.remove(this)

    def _cancel_held(self, job_id: int) -> bool:
        for token, delivery in list(self._held.items()):
            ending = delivery.ending
            if delivery.lease.id == job_id and (ending is None or ending.verb != "ack"):
                self._tell_handler(delivery, CANCELLED)
                if token in self._held:  # so the settler will see the reason, now or behind its commit
                    return True
                settler = self._threads["settle"]
                with self._changed:  # it may have seen the reason, and be removing the job
                    while delivery.is_removed is None and settler.is_alive():
                        self._changed.wait(LEAST_S)
                if delivery.is_removed:
                    return True
        return False

    def _let_go(self, deliveries: Sequence[Delivery]) -> None:
        """They are answered, or lost. A call that cancels one of them finds it in `_held`, or learns that it was."""
        if self._cancels:
            gone = {delivery.lease.id for delivery in deliveries}
            with self._changed:
                for cancel in self._cancels:
                    cancel.is_let_go = cancel.is_let_go or cancel.job_id in gone
        for delivery in deliveries:
            self._held.pop(delivery.lease.token, None)

    def _wait_for_fetcher(self) -> None:
        """Until all that was leased so far is in `_held`, or was."""
        with self._changed:
            self._asked += 1
            ticket = self._asked
            self._changed.notify_all()
            while self._fetching and self._reached < ticket:
                self._changed.wait()

    def _tell_handler(self, delivery: Delivery, reason: str) -> None:
        delivery.job.cancel(reason)
        self._rooms[delivery.kind].pool.cancel(delivery)

    @property
    def running(self) -> int:
        """Jobs that are leased and not answered yet."""
        return len(self._held)

    def _guarded(self, target: Callable[[], None]) -> None:
        """A thread of the worker's: what ends it ends the worker."""
        try:
            target()
        except BaseException as error:
            self.failure = self.failure or error
            if not isinstance(error, BrokerClosedError):
                logger.exception("the worker cannot go on")
            with self._changed:
                self._stopping = True
                self._changed.notify_all()
            self._wanted.set()

    # Fetching

    def _fetch(self) -> None:
        try:
            while (groups := self._next_groups()) is not None:
                try:
                    leases = self._lease(groups)
                except DiskFullError as error:  # it passes, as it does for an answer
                    logger.warning("no space to lease jobs; again in %s s: %s", RETRY_S, error)
                    with self._changed:
                        self._changed.wait_for(lambda: self._stopping or self._reached != self._asked, RETRY_S)
                    continue
                self._hand_out(leases)
        finally:
            with self._changed:
                self._fetching = False
                self._changed.notify_all()

    def _next_groups(self) -> list[_Group] | None:
        """Wait until there is room for jobs; None: no more are wanted."""
        with self._changed:
            while True:
                self._fetching = not self._stopping
                if self._reached != self._asked:  # nothing is leased that is not in `_held`
                    self._reached = self._asked
                    self._changed.notify_all()
                if self._stopping:
                    return None
                if self._left > 0 and (groups := self._open_groups()):
                    return groups
                self._changed.wait()

    def _lease(self, groups: list[_Group]) -> list[Lease]:
        """Jobs for pools that have room: at once if there are any, else as soon as there are."""
        while self._came_back:
            delivery = self._came_back.popleft()
            self._order.took_back(delivery.lease.queue, 1, self._pools_of(delivery.lease.queue))
        turns: dict[frozenset[str], tuple[str, list[str], list[_Group]]] = {}
        for kind in sorted(set().union(*(group.kinds for group in groups)), key=lambda kind: self._served.get(kind, 0)):
            mine = [group for group in groups if kind in group.kinds]
            names = self._order.turns(kind, self._names_of(mine))
            turns.setdefault(frozenset(names), (kind, names, mine))
        if len(turns) == 1:
            [(_, names, _)] = turns.values()
            return self._wait_for_leases(names, groups)
        for kind, names, mine in turns.values():  # as many as the pools of each have room for
            most, max_bytes = self._bounds(names, mine)
            if most and (leases := self._lease_now(names, most, max_bytes)):
                self._served[kind] = next(self._numbers)
                return leases
        return self._wait_for_leases(self._names_of(groups), groups)

    def _names_of(self, groups: Sequence[_Group]) -> list[str]:
        """Their queues, as they were given."""
        if len(groups) == 1:
            return groups[0].names
        names = set().union(*(group.names for group in groups))
        return [name for name in list(self._order.names) if name in names]

    def _bounds(self, names: Sequence[str], groups: Sequence[_Group]) -> tuple[int, int | None]:
        """How many may be leased, and of how many bytes together if that matters.

        None if a room that was wanting became smaller meanwhile, as handlers took longer.
        """
        rooms = [room for group in groups for room in group.rooms]
        free = min(room.free() for room in rooms)
        most = max(0, int(min(self._left, self._order.most(names, free))))
        if most <= min(room.free_slots() for room in rooms):
            return most, None
        return most, min(room.free_bytes() for room in rooms)

    def _lease_now(self, names: list[str], most: int, max_bytes: int | None) -> list[Lease]:
        leases = self._broker.lease_many(
            names, most, visibility_timeout=self._visibility, begun=False, max_bytes=max_bytes
        )
        self._note_given(names, most, max_bytes, leases)
        return leases

    def _note_given(self, names: Sequence[str], most: int, max_bytes: int | None, leases: Sequence[Lease]) -> None:
        given = Counter(lease.queue for lease in leases)
        if max_bytes is not None and 2 * sum(len(lease.payload) for lease in leases) > max_bytes:
            most = len(leases)  # perhaps there were more, too large ones
        self._order.gave(names, given, most, self._pools_of)
        for name in [name for name in self._careful if name in self._order.idle]:
            self._forget_care(name)

    def _pools_of(self, queue: str) -> Collection[str]:
        """The pools of tasks that a queue holds, or may hold."""
        return self._kinds.get(queue) or list(self._rooms)

    def _open_groups(self) -> list[_Group]:
        """The queues whose jobs there is room for: those that run in the same pools together."""
        # Caller holds self._changed.
        if self._grouped is None:
            self._kinds = self._known_kinds()
            for kind in set().union(*self._kinds.values()) - self._rooms.keys():  # of a task that came after the start
                self._add_room(kind)
            self._grouped = {}
            for name in self._order.names:  # one of which nothing is known may hold jobs of any task
                self._grouped.setdefault(frozenset(self._pools_of(name)), []).append(name)
        found = []
        for kinds, names in self._grouped.items():
            rooms = [self._rooms[kind] for kind in kinds]
            if min(rooms, key=Room.free).is_wanting():
                found.append(_Group(kinds, names, rooms))
        return found

    def _known_kinds(self) -> dict[str, set[str]]:
        """By queue, the pools of the tasks that are bound to it, whose calls were put there, or were found there."""
        found: dict[str, set[str]] = {}
        tasks = dict(self.app.tasks)
        for task in tasks.values():
            found.setdefault(task.opts.queue, set()).add(_kind(task))
        for name, those in list(self.app.queues.items()):
            found.setdefault(name, set()).update(_kind(tasks[task]) for task in list(those) if task in tasks)
        for name, kinds in self._seen.items():
            found.setdefault(name, set()).update(kinds)
        return found

    def _wait_for_leases(self, names: list[str], groups: Sequence[_Group]) -> list[Lease]:
        """Until there is a job, or none is wanted any more, or other pools have room: then none."""
        most, max_bytes = self._bounds(names, groups)
        if not most:
            return []
        self._leased, wanted = None, [group.names for group in groups]
        waiting = self._broker.lease_soon(
            names, most, self._told, visibility_timeout=self._visibility, begun=False, max_bytes=max_bytes
        )
        with self._changed:
            while (
                self._leased is None
                and not self._stopping
                and self._reached == self._asked
                and [each.names for each in self._open_groups()] == wanted
            ):
                self._changed.wait()
        if self._leased is None and waiting.cancel():
            return []
        with self._changed:
            while self._leased is None:
                self._changed.wait()
            leases, error = self._leased
        if error is not None:
            raise error
        if leases:
            self._note_given(names, most, max_bytes, leases)
        return leases or []

    def _told(self, leases: list[Lease] | None, error: BaseException | None) -> None:
        with self._changed:
            self._leased = leases, error
            self._changed.notify_all()

    def _hand_out(self, leases: list[Lease]) -> None:
        """Give each job to the pool of its task; what is no call of a task is answered at once."""
        now = time.monotonic()
        batches: dict[str, list[Delivery]] = {}
        for lease in leases:
            try:
                task, args, kwargs = self.app.find(lease)
            except Reject as error:
                logger.error(
                    "job %s is rejected: %s", lease.id, error, extra={"job_id": lease.id, "queue": lease.queue}
                )
                self._reject(lease, str(error))
                continue
            kind = _kind(task)
            if kind not in self._rooms:  # the first such task of the app came after the start
                self._add_room(kind)
            delivery = Delivery(lease, task, args, kwargs)
            delivery.broker, delivery.kind = self._broker, kind
            seconds = lease.granted
            delivery.visibility = seconds
            delivery.renew_at = now + seconds / RENEWALS
            self._held[lease.token] = delivery
            for cancel in list(self._cancels) if self._cancels else ():
                if cancel.job_id == lease.id:
                    delivery.job.cancel(CANCELLED)
                    cancel.is_told = True
            if seconds < self._shortest:
                self._shortest = seconds
                self._renewer_poked.set()
            if kind == "thread" and task.time_limit is not None:
                self._watch_limit(delivery, now + task.time_limit)
            batches.setdefault(kind, []).append(delivery)
        for kind, batch in batches.items():
            room = self._rooms[kind]
            with self._changed:
                batch = self._fitting(kind, room, batch)
                room.took(batch)
                for delivery in batch:
                    delivery.is_in_pool = True
                self._left -= len(batch)
                if not self._watching and room.waits_since() is not None:
                    self._watching = True
                    self._renewer_poked.set()
                room.pool.submit(batch)  # with the lock: what is taken back meanwhile is not a part of them

    def _fitting(self, kind: str, room: Room, batch: list[Delivery]) -> list[Delivery]:
        """Those for which there is a place in the room; the others are given back at once."""
        # Caller holds self._changed.
        slots, places = room.free_slots(), room.free()
        kept: list[Delivery] = []
        surplus: list[Delivery] = []
        plain: set[str] = set()  # queues whose other jobs fit without a further question: nearly all of a batch
        for delivery in batch:
            lease, queue = delivery.lease, delivery.lease.queue
            is_last = lease.max_attempts is not None and lease.attempt >= lease.max_attempts
            if queue in plain and not is_last:
                kept.append(delivery)
                continue
            is_known = kind in self._pools_of(queue)
            if len(kept) < slots or (not is_last and (is_known or len(kept) < places)):
                kept.append(delivery)
            else:
                surplus.append(delivery)
            if not is_known or not self._kinds.get(queue):
                self._seen.setdefault(queue, set()).add(kind)
                self._grouped = None
            if is_last and (queue not in self._order.idle or surplus):
                self._careful[queue] = CAREFUL_JOBS
                room.careful.add(queue)
            elif queue in self._careful:
                self._careful[queue] -= 1
                if not self._careful[queue]:
                    self._forget_care(queue)
            elif is_known and not is_last and self._kinds.get(queue):
                plain.add(queue)
        for delivery in surplus:
            self._give_back(delivery)
        return kept

    def _forget_care(self, queue: str) -> None:
        del self._careful[queue]
        for room in self._rooms.values():
            room.careful.discard(queue)

    # Giving back what did not begin

    def _take_back(self, room: Room) -> bool:
        """What waits in a pool goes back to its queues; whether there was any."""
        # Caller holds self._changed. A thread of the pool that takes a job at this moment has it, or has it not.
        found = room.pool.take_back()
        for delivery in found:
            self._give_back(delivery)
        return bool(found)

    def _give_back(self, delivery: Delivery) -> None:
        # Caller holds self._changed.
        self._undo(delivery)
        self._end(delivery)

    def _undo(self, delivery: Delivery) -> None:
        """It did not begin: as if it had not been leased."""
        # Caller holds self._changed.
        delivery.is_untouched = True
        self._came_back.append(delivery)
        if delivery.is_in_pool:
            delivery.is_in_pool = False
            self._rooms[delivery.kind].left(delivery)
            self._left += 1

    def _give_back_late(self, due: float) -> float:
        """Give back what was leased in advance and has waited for too long; when to look again, monotonic.

        What comes is leased afresh when a slot is free, the most urgent first. `due`: when this was to be called.
        """
        next_at = math.inf
        with self._changed:
            now = time.monotonic()
            for room in () if self._stopping else self._rooms.values():
                since = room.waits_since()
                if since is None:
                    continue
                if now >= since + PREFETCH_S:
                    if room.is_late(since, starved=now > due + AIM_S) and self._take_back(room):
                        room.took_back()
                    next_at = min(next_at, now + AIM_S)
                else:
                    next_at = min(next_at, since + PREFETCH_S)
            self._watching = next_at < math.inf
        return next_at

    # Looking for calls

    def _look_for_calls(self) -> None:
        """Follow further queues in which calls of the app's tasks wait, however they came there.

        It takes a hundredth of the time: what was not looked at comes next.
        """
        began = time.monotonic()
        names = [name for name in self._broker.queues() if name not in self._order and name != SCHEDULES]
        at = bisect_right(names, self._looked_at)
        names = names[at:] + names[:at]
        while names and time.monotonic() < began + LOOK_S * LOOK_SHARE:
            self._looked_at = name = names.pop(0)
            if self._look_into(name):
                names.append(name)  # there is more
        now = time.monotonic()
        self._look_at = now + max(LOOK_S, (now - began) / LOOK_SHARE)

    def _look_into(self, queue: str) -> bool:
        """Follow a queue if a call is among its next jobs that wait; whether there are more to look at."""
        kinds: set[str] = set()
        more = False
        for state in ("ready", "scheduled"):
            after = self._cursors.pop((queue, state), 0)
            jobs = self._broker.jobs(queue, state=state, after=after, limit=LOOKED_JOBS, payloads=False)
            tasks = [self.app.tasks.get(job.headers.get(TASK_HEADER, "")) for job in jobs]
            kinds.update(_kind(task) for task in tasks if task is not None)
            if len(jobs) == LOOKED_JOBS:
                self._cursors[queue, state] = jobs[-1].id
                more = True
        if not kinds:
            return more
        self._cursors.pop((queue, "ready"), None)
        self._cursors.pop((queue, "scheduled"), None)
        with self._changed:
            self._seen.setdefault(queue, set()).update(kinds)
        self.follow(queue)
        return False

    def _reject(self, lease: Lease, error: str) -> None:
        while True:
            try:
                self._broker.reject(lease, error=error)
            except LeaseLostError:
                return
            except DiskFullError as full:
                logger.warning("no space to reject job %s; again in %s s: %s", lease.id, RETRY_S, full)
                with self._changed:
                    if self._changed.wait_for(lambda: self._stopping, RETRY_S):
                        return
            else:
                return

    def _add_room(self, kind: str) -> None:
        many, done = self._concurrency, self._done
        pool: Pool
        if kind == "loop":
            pool = LoopPool(self.app, many.tasks, done)
        elif kind == "process":
            pool = ProcessPool(self.app, many.processes, done, **self._child_limits)
        else:
            pool = ThreadPool(self.app, many.threads, done)
        with self._changed:
            self._rooms[kind] = Room(pool, self._prefetch)
            self._grouped = None
        pool.start()  # behind that: what has begun of it when it cannot begin more is known to `stop`

    # What pools tell

    def _done(self, delivery: Delivery) -> None:
        """In a thread of a pool: the handler has ended."""
        # No lock: with many short jobs every thread would wait for it, and for the interpreter, at each of them.
        delivery.is_told = True
        self._endings.append(delivery)
        if not self._poked.is_set():
            self._poked.set()

    def _end(self, delivery: Delivery) -> None:
        """In place of its pool: one that did not begin, or that cannot be ended, is given back."""
        delivery.ending = delivery.ending or GIVEN_BACK
        self._done(delivery)

    # Settling

    def _settle(self) -> None:
        unclear: list[Delivery] = []  # of which `finish` is under way elsewhere: it says what becomes of the job
        while True:
            self._poked.wait()
            self._poked.clear()
            settling = self._settling  # first: what came before the end is answered
            while self._endings or unclear:
                ended = [*unclear, *(self._endings.popleft() for _ in range(len(self._endings)))]
                unclear = [delivery for delivery in ended if delivery.job.finishing]
                if len(unclear) == len(ended):
                    break
                self._answer([delivery for delivery in ended if delivery not in unclear] if unclear else ended)
            for delivery in unclear:
                delivery.job.when_finished(self._poked.set)
            if not settling and not unclear:
                return

    def _answer(self, batch: list[Delivery]) -> None:
        """Answer all of them in one commit; what was lost meanwhile is left out."""
        # Each once: at a stop a job may be given back while its handler ends, and it comes here twice.
        batch = [delivery for delivery in dict.fromkeys(batch) if not delivery.is_answered]
        with self._changed:  # first, so that the next jobs are leased while this waits for the disk
            rooms = self._rooms
            for delivery in batch:
                if not delivery.is_untouched:
                    rooms[delivery.kind].ran(delivery)
                elif delivery.is_in_pool:  # its pool saw that it must not begin
                    self._undo(delivery)
            for room in self._rooms.values():
                room.waits_since()  # it learns from those that began
            if self._stopping or any(room.is_wanting() for room in self._rooms.values()):
                self._changed.notify_all()
        # As each has ended by now: it may be that its handler did after the job was given back.
        held = self._held
        finished = {each for each in batch if each.job.finished and _was_finished(each)}
        endings = {each: _ending(each) for each in batch if each.lease.token in held}
        lost = [] if len(endings) == len(batch) else [delivery for delivery in batch if delivery not in endings]
        left = endings.copy()
        for delivery in finished & endings.keys():
            endings[delivery] = ACK
            del left[delivery]

        def commit(part: list[Delivery]) -> None:
            if len(part) == len(left):
                self._commit(left)
                left.clear()
            else:
                self._commit({delivery: left[delivery] for delivery in part})
                for delivery in part:
                    del left[delivery]

        while left:
            gone: list[Delivery] = []
            try:
                _in_parts(list(left), commit, gone)
            except DiskFullError:
                logger.warning("no space to write down how %s jobs ended; again in %s s", len(left), RETRY_S)
                if not self._settling:  # its leases expire
                    break
                time.sleep(RETRY_S)
            finally:
                for delivery in gone:
                    del left[delivery]
                    if _was_finished(delivery):
                        endings[delivery] = ACK
                    else:
                        _log_lost(delivery)
                        lost.append(delivery)
                        del endings[delivery]
        for delivery in batch:
            delivery.is_answered = True
        self._let_go(batch)
        self._remove_cancelled([*(each for each, ending in endings.items() if ending.verb != "ack"), *lost])
        if self._cancels:
            self._note_over(batch)
        told: list[tuple[Delivery, str]] = [
            (each, ending.verb) for each, ending in endings.items() if not each.is_untouched
        ]
        told += [(each, "lost") for each in lost if not each.is_untouched]
        if self.on_settled:
            for delivery, verb in told:
                self._tell(delivery, verb)
        self._jobs += len(told)
        self._check_limits()

    def _remove_cancelled(self, deliveries: Iterable[Delivery]) -> None:
        """Cancelled jobs that were not done: dead letters now, or they wait again."""
        for delivery in deliveries:
            if delivery.job.reason == CANCELLED:
                with suppress(DiskFullError):
                    delivery.is_removed = self.cancel(delivery.lease.id)

    def _commit(self, endings: Mapping[Delivery, Ending]) -> None:
        done = [delivery.lease for delivery, ending in endings.items() if ending.verb == "ack"]
        if len(done) == len(endings):
            self._broker.ack_many(done)
            return
        with self._broker.transaction() as tx:
            tx.ack_many(done)
            for delivery, ending in endings.items():
                match ending.verb:
                    case "nack":
                        tx.nack(delivery.lease, error=ending.error, delay=ending.delay)
                    case "release":
                        tx.release(delivery.lease, delay=ending.delay or 0)
                    case "reject":
                        tx.reject(delivery.lease, error=ending.error)

    def _note_lost(self, delivery: Delivery) -> None:
        self._let_go((delivery,))
        self._note_over((delivery,))
        _log_lost(delivery)

    def _note_over(self, deliveries: Iterable[Delivery]) -> None:
        """For calls that cancel them."""
        with self._changed:
            for delivery in deliveries:
                delivery.is_removed = delivery.is_removed or False
            self._changed.notify_all()

    def _tell(self, delivery: Delivery, ending: str) -> None:
        for listener in self.on_settled:
            try:
                listener(Settled(delivery.lease.queue, delivery.task.name, ending, delivery.seconds))
            except BaseException:  # whatever it is, the answers of others must go on
                logger.exception("a listener of the worker failed")

    def _check_limits(self) -> None:
        if (self._max_jobs is not None and self._jobs >= self._max_jobs) or (
            self._max_memory is not None and memory_bytes() > self._max_memory
        ):
            with self._changed:
                self._stopping = True
                self._changed.notify_all()
            self._wanted.set()

    # Renewing

    def _renew(self) -> None:
        scan_at = give_back_at = math.inf
        while self._settling:
            self._renewer_poked.wait(self._pause_s(min(scan_at, give_back_at)))
            self._renewer_poked.clear()
            now = time.monotonic()
            self._end_limits(now)
            give_back_at = self._give_back_late(give_back_at) if self._watching else math.inf
            if now >= self._look_at:
                self._look_for_calls()
            if now >= scan_at:
                self._renew_due(now)
                scan_at = math.inf
            scan_at = min(scan_at, now + self._shortest / RENEWALS / 2)

    def _pause_s(self, until: float) -> float | None:
        """Until then, or until a time limit is over."""
        until = min(until, self._look_at)
        with self._limits_lock:
            if self._limits:
                until = min(until, self._limits[0][0])
        return None if until == math.inf else max(0.001, until - time.monotonic())

    def _renew_due(self, now: float) -> None:
        """Extend leases of which a third of their time is over, and with these those that will be due soon."""
        due: dict[float, list[Delivery]] = {}
        soon: dict[float, list[Delivery]] = {}
        shortest = math.inf
        for delivery in list(self._held.values()):
            seconds = delivery.visibility
            shortest = min(shortest, seconds)
            if delivery.is_told or delivery.job.finished:
                continue
            if delivery.renew_at <= now:
                due.setdefault(seconds, []).append(delivery)
            elif delivery.renew_at <= now + seconds / RENEWALS / 2:
                soon.setdefault(seconds, []).append(delivery)
        if shortest == math.inf:
            known, self._shortest = self._shortest, shortest
            if self._held:  # the first came meanwhile
                self._shortest = known
        for seconds, deliveries in due.items():
            self._extend(deliveries + soon.get(seconds, []), seconds)

    def _extend(self, deliveries: list[Delivery], seconds: float) -> None:
        def extend(part: list[Delivery]) -> None:
            now = time.monotonic()
            self._broker.extend_many([delivery.lease for delivery in part], seconds)
            for delivery in part:
                delivery.renew_at = now + seconds / RENEWALS

        lost: list[Delivery] = []
        try:
            _in_parts(deliveries, extend, lost)
        except (BrokerClosedError, BrokerFailedError):
            raise
        except RivetQError as error:  # a full disk: the next turn tries it again
            logger.warning("%s leases could not be renewed: %s", len(deliveries), error)
        for delivery in lost:
            if delivery.lease.token in self._held and not delivery.is_told and not delivery.job.finished:
                self._note_lost(delivery)
                self._tell_handler(delivery, LEASE_LOST)

    def _watch_limit(self, delivery: Delivery, at: float) -> None:
        with self._limits_lock:
            if len(self._limits) > 64 + 2 * len(self._held):  # jobs that ended long before their limit
                self._limits = [each for each in self._limits if each[2].ending is None]
                heapq.heapify(self._limits)
            heapq.heappush(self._limits, (at, next(self._numbers), delivery))
            first = self._limits[0][2] is delivery
        if first:
            self._renewer_poked.set()

    def _end_limits(self, now: float) -> None:
        """Tell handlers in threads whose time is over."""
        while True:
            with self._limits_lock:
                if not self._limits or self._limits[0][0] > now:
                    return
                delivery = heapq.heappop(self._limits)[2]
            limit = delivery.task.time_limit
            assert limit is not None
            if delivery.ending is not None:
                continue
            if delivery.started_at is None or delivery.started_at + limit > now:  # it had to wait for its thread
                self._watch_limit(delivery, (delivery.started_at or now) + limit)
            else:
                delivery.job.cancel(TIME_LIMIT)


class _Cancel:
    """A cancellation under way."""

    def __init__(self, job_id: int) -> None:
        self.job_id = job_id
        self.is_told = False  # it was leased meanwhile and does not begin
        self.is_let_go = False  # a delivery of it ended meanwhile


class _Group(NamedTuple):
    """Queues whose tasks run in the same pools."""

    kinds: frozenset[str]
    names: list[str]
    rooms: list[Room]


def _in_parts(deliveries: Sequence[Delivery], call: Callable[[list[Delivery]], None], lost: list[Delivery]) -> None:
    """Call with all of them, in as few parts as it takes to leave out those whose leases are lost.

    Behind a lost one the parts begin small and grow: the cost is in proportion to how many are lost, if all are, too.
    """
    at, size = 0, len(deliveries)
    while at < len(deliveries):
        part = list(deliveries[at : at + size])
        try:
            call(part)
        except LeaseLostError as error:
            place = [delivery.lease.token for delivery in part].index(error.token)
            if place:
                size = place
            else:
                lost.append(part[0])
                at, size = at + 1, 1
        else:
            at, size = at + len(part), 2 * len(part)


def _margin(grace: float) -> float:
    """Seconds of a grace time in which nothing is waited for any more."""
    return min(MARGIN_S, max(grace / 5, min(0.5, grace / 2)))


def _kind(task: Any) -> str:
    """The pool of a task."""
    kind: str = "loop" if task.is_async else task.opts.pool
    return kind


def _ending(delivery: Delivery) -> Ending:
    """What becomes of the job, since its handler may have been told to stop."""
    ending, reason = delivery.ending, delivery.job.reason
    assert ending is not None
    if reason is None or ending.verb == "ack":
        return ending
    if reason == SHUTDOWN:
        return GIVEN_BACK
    if reason == CANCELLED:
        return Ending("reject", CANCELLED)
    return ending


def _log_lost(delivery: Delivery) -> None:
    logger.warning("job %s: %s", delivery.lease.id, LEASE_LOST, extra=fields(delivery))


def _was_finished(delivery: Delivery) -> bool:
    """Whether `CurrentJob.finish` acked the job while another answer to it was under way. Waits for such a commit."""
    is_over = threading.Event()
    delivery.job.when_finished(is_over.set)
    is_over.wait()
    return delivery.job.finished


def _count(value: object, name: str, least: int = 1) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise UsageError(f"{name}: an int of at least {least} expected, got {quoted(value)}")
    return value
