"""The worker: leases jobs in batches, runs their tasks in pools, and answers in batches.

Three threads of its own, besides those of the pools::

    fetcher   waits for room in the pools and for jobs; leases up to the room there is
    settler   takes all endings that came meanwhile and answers them in one commit, so that one sync covers them
    renewer   extends leases before they end; tells a handler that its lease was lost or its time is over

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
from collections import deque
from collections.abc import Callable, Mapping, Sequence
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

from .children import ProcessPool, memory_bytes
from .pools import (
    ACK,
    GIVEN_BACK,
    SHUTDOWN,
    TIME_LIMIT,
    Delivery,
    Ending,
    LoopPool,
    Pool,
    ThreadPool,
    fields,
)
from .schedules import SCHEDULES, Scheduler
from .tasks import TASK_HEADER, App, Reject, here, is_name, seconds_of
from .tasks import Retry as Retry  # with `Reject` and the next two: what a handler needs, beside what runs it
from .tasks import Snooze as Snooze
from .tasks import current_job as current_job
from .texts import quoted

logger = logging.getLogger("rivetq.worker")

LEASE_LOST = "the lease was lost"
CANCELLED = "cancelled"
PREFETCH_S = 0.02
"""Jobs that are leased in advance, as the time that running them takes: enough to keep the pools busy while the next
batch is leased, and so little that an urgent job does not wait for long."""
PREFETCH_JOBS = 512
"""And this many at most, for each pool."""
RENEWALS = 3
"""A lease is extended so often in its time: one extension may come late, and the next still saves it."""
MARGIN_S = 2.0
"""Of the grace time that is kept for giving back what still runs and closing, a fifth of it at most; of a short one
half a second, and half of it at most."""
LEAST_S = 0.05
"""That an async handler gets to end after it was cancelled, whatever the grace time was."""
SIGNAL_S = 0.05
SHOWN_QUEUES = 10
LOOKED_JOBS = 20
"""Of a queue that may hold calls."""
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
            gets its share of turns, a turn being a batch; None: those of the app's tasks, and others in which there are
            calls of these, with equal weights.
        concurrency: handlers at a time: an int, a `Concurrency`, or a mapping with threads, processes and tasks.
        grace: seconds that running jobs get to end after a stop. What still runs then is given back with its attempt
            refunded, if it can be stopped or not.
        visibility_timeout: seconds that its leases last and are renewed for; None: as the job or its queue says.
        prefetch: jobs leased in advance for each pool at most; 0: none.
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
        self._order = _Order(dict.fromkeys(app.queues or ["default"], 1.0) if queues is None else queues)
        self.on_settled: list[Callable[[Settled], None]] = [] if on_settled is None else [on_settled]
        self.failure: BaseException | None = None
        """Why it ended by itself: the broker failed or was closed."""
        self._changed = threading.Condition()  # guards the pools' counts and the flags below
        self._rooms: dict[str, _Room] = {}
        self._grouped: dict[frozenset[str], list[str]] | None = None  # queues by the pools in which their tasks run
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
        for name in names:
            if self._follows and name not in self._order and self._has_calls(name):
                self.follow(name)
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

    def _has_calls(self, queue: str) -> bool:
        """Among the first jobs that wait in it is a call of one of the app's tasks."""
        waiting = (self._broker.jobs(queue, state=state, limit=LOOKED_JOBS) for state in ("ready", "scheduled"))
        return any(job.headers.get(TASK_HEADER) in self.app.tasks for jobs in waiting for job in jobs)

    def follow(self, queue: str) -> None:
        """For apps: calls of its tasks are in this queue, too. A worker that was told its queues keeps to them."""
        if self._follows and queue not in self._order:
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
        """Whatever of it has begun. The grace time counts from `begun`."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        if self._scheduler is not None:
            self._scheduler.stop()
        self._join("fetch")
        for room in self._rooms.values():
            for delivery in room.pool.take_back():
                self._end(delivery)
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
            if not delivery.is_told:  # a thread that goes on; what it ends with nobody asks any more
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
        """Tell the handler of a job that runs here to stop; False if none does. Its job goes when it stops."""
        for delivery in list(self._held.values()):
            if delivery.lease.id == job_id and delivery.ending is None:
                self._tell_handler(delivery, CANCELLED)
                return True
        return False

    def _tell_handler(self, delivery: Delivery, reason: str) -> None:
        delivery.job.cancel(reason)
        self._rooms[_kind(delivery.task)].pool.cancel(delivery)

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
        while True:
            with self._changed:
                while not self._stopping and not (self._left and (groups := self._open_groups())):
                    self._changed.wait()
                if self._stopping:
                    return
            try:
                leases = self._lease(groups)
            except DiskFullError as error:  # it passes, as it does for an answer
                logger.warning("no space to lease jobs; again in %s s: %s", RETRY_S, error)
                with self._changed:
                    self._changed.wait_for(lambda: self._stopping, RETRY_S)
                continue
            self._hand_out(leases)

    def _lease(self, groups: list[_Group]) -> list[Lease]:
        """Jobs for pools that have room: at once if there are any, else as soon as there are."""
        names = self._order.next([name for group in groups for name in group.names])
        in_turn = sorted(groups, key=lambda group: names[0] not in group.names)
        for group in in_turn if len(groups) > 1 else ():  # as many as the pool of each has room for
            own = set(group.names)
            mine = [name for name in names if name in own]
            most = self._most([group])
            if most and (leases := self._broker.lease_many(mine, most, visibility_timeout=self._visibility)):
                return leases
        most = self._most(groups)
        return self._wait_for_leases(names, most, groups) if most else []

    def _most(self, groups: Sequence[_Group]) -> int:
        """How many may be leased; 0 if a room that was wanting became smaller meanwhile, as handlers took longer."""
        return max(0, int(min(self._left, *(group.room.free() for group in groups))))

    def _open_groups(self) -> list[_Group]:
        """The queues whose jobs there is room for: those that run in the same pools together."""
        # Caller holds self._changed.
        if self._grouped is None:
            kinds_of: dict[str, set[str]] = {}
            for task in list(self.app.tasks.values()):
                kinds_of.setdefault(task.opts.queue, set()).add(_kind(task))
            for kind in set().union(*kinds_of.values()) - self._rooms.keys():  # of a task that came after the start
                self._add_room(kind)
            self._grouped = {}
            for name in self._order.names:  # a queue that no task names may hold jobs of any
                self._grouped.setdefault(frozenset(kinds_of.get(name) or self._rooms), []).append(name)
        fullest = {kinds: min((self._rooms[kind] for kind in kinds), key=_Room.free) for kinds in self._grouped}
        return [_Group(fullest[kinds], names) for kinds, names in self._grouped.items() if fullest[kinds].is_wanting()]

    def _wait_for_leases(self, names: list[str], most: int, groups: Sequence[_Group]) -> list[Lease]:
        """Until there is a job, or none is wanted any more, or other pools have room: then none."""
        self._leased, wanted = None, [group.names for group in groups]
        waiting = self._broker.lease_soon(names, most, self._told, visibility_timeout=self._visibility)
        with self._changed:
            while (
                self._leased is None and not self._stopping and [each.names for each in self._open_groups()] == wanted
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
        return leases or []

    def _told(self, leases: list[Lease] | None, error: BaseException | None) -> None:
        with self._changed:
            self._leased = leases, error
            self._changed.notify_all()

    def _hand_out(self, leases: list[Lease]) -> None:
        """Give each job to the pool of its task; what is no call of a task is answered at once."""
        now_ms, now = self._broker.clock.wall_ms(), time.monotonic()
        batches: dict[str, list[Delivery]] = {}
        timeouts: dict[str, float] = {}
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
            seconds = self._granted(lease, task, lease.deadline.timestamp() - now_ms / 1000, timeouts)
            delivery.visibility = seconds
            delivery.renew_at = now + seconds / RENEWALS
            if seconds < self._shortest:
                self._shortest = seconds
                self._renewer_poked.set()
            self._held[lease.token] = delivery
            self._left -= 1
            if kind == "thread" and task.time_limit is not None:
                self._watch_limit(delivery, now + task.time_limit)
            batches.setdefault(kind, []).append(delivery)
        for kind, batch in batches.items():
            room = self._rooms[kind]
            with self._changed:
                room.jobs += len(batch)
            room.pool.submit(batch)

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

    def _granted(self, lease: Lease, task: Any, by_wall: float, timeouts: dict[str, float]) -> float:
        """Seconds to renew a lease for. The wall clock may have been set: it counts where it says less than is known.

        `timeouts` are those of the queues, as far as this batch asked for them.
        """
        known = self._visibility
        if known is None and task.opts.visibility_timeout is not None:
            known = seconds_of(task.opts.visibility_timeout, "visibility_timeout")
        if known is None:
            known = timeouts.get(lease.queue)
        if known is None:
            known = timeouts[lease.queue] = self._broker.configure_queue(lease.queue).visibility_timeout
        return by_wall if 0 < by_wall < known else known

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
            self._rooms[kind] = _Room(pool, self._prefetch)
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
            for delivery in batch:
                self._rooms[_kind(delivery.task)].ran(delivery.seconds)
            if self._stopping or any(room.is_wanting() for room in self._rooms.values()):
                self._changed.notify_all()
        # As each has ended by now: it may be that its handler did after the job was given back.
        endings = {each: _ending(each) for each in batch if each.lease.token in self._held}
        lost = [delivery for delivery in batch if delivery not in endings]
        left = {delivery: ending for delivery, ending in endings.items() if not delivery.job.finished}
        while left:
            try:
                self._commit(left)
                break
            except LeaseLostError as error:
                for delivery in [each for each in left if each.lease.token == error.token]:
                    self._note_lost(delivery)
                    lost.append(delivery)
                    del left[delivery], endings[delivery]
            except DiskFullError:
                logger.warning("no space to write down how %s jobs ended; again in %s s", len(left), RETRY_S)
                if not self._settling:  # its leases expire
                    break
                time.sleep(RETRY_S)
        for delivery in batch:
            delivery.is_answered = True
            self._held.pop(delivery.lease.token, None)
        for delivery, ending in endings.items():
            if delivery.job.reason == CANCELLED and ending.verb == "reject":
                with suppress(DiskFullError):
                    self._broker.cancel(delivery.lease.id)  # it is a dead letter, and nobody wants it
        for delivery, ending in endings.items():
            self._tell(delivery, ending.verb)
        for delivery in lost:
            self._tell(delivery, "lost")
        self._jobs += len(endings) + len(lost)
        self._check_limits()

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
        self._held.pop(delivery.lease.token, None)
        logger.warning("job %s: %s", delivery.lease.id, LEASE_LOST, extra=fields(delivery))

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
        while self._settling:
            self._renewer_poked.wait(self._pause_s())
            self._renewer_poked.clear()
            now = time.monotonic()
            self._end_limits(now)
            due: dict[float, list[Delivery]] = {}
            shortest = math.inf
            for delivery in list(self._held.values()):
                shortest = min(shortest, delivery.visibility)
                if delivery.renew_at <= now and not delivery.is_told and not delivery.job.finished:
                    due.setdefault(delivery.visibility, []).append(delivery)
            if not self._held:
                self._shortest = shortest
            for seconds, deliveries in due.items():
                self._extend(deliveries, seconds)

    def _pause_s(self) -> float | None:
        """Until a lease may be due for renewal, or a time limit is over."""
        pause = self._shortest / RENEWALS / 2
        with self._limits_lock:
            if self._limits:
                pause = min(pause, max(0.0, self._limits[0][0] - time.monotonic()))
        return None if pause == math.inf else max(0.005, pause)

    def _extend(self, deliveries: list[Delivery], seconds: float) -> None:
        while deliveries:
            now = time.monotonic()
            try:
                self._broker.extend_many([delivery.lease for delivery in deliveries], seconds)
            except LeaseLostError as error:
                for delivery in [each for each in deliveries if each.lease.token == error.token]:
                    deliveries.remove(delivery)
                    if delivery.lease.token in self._held and not delivery.is_told and not delivery.job.finished:
                        self._note_lost(delivery)
                        self._tell_handler(delivery, LEASE_LOST)
            except (BrokerClosedError, BrokerFailedError):
                raise
            except RivetQError as error:  # a full disk: the next turn tries it again
                logger.warning("%s leases could not be renewed: %s", len(deliveries), error)
                return
            else:
                for delivery in deliveries:
                    delivery.renew_at = now + seconds / RENEWALS
                return

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


class _Room:
    """A pool and how much it has to do. Guarded by the worker's condition."""

    def __init__(self, pool: Pool, prefetch: int) -> None:
        self.pool = pool
        self.jobs = 0  # handed over and not ended
        self._prefetch = prefetch
        self._seconds: float | None = None  # that a handler runs, lately

    def free(self) -> int:
        """Jobs that may be leased now."""
        return self.pool.slots + self._ahead() - self.jobs

    def is_wanting(self) -> bool:
        """It is worth a call to lease more."""
        return self.jobs <= max(self.pool.slots - 1, (self.pool.slots + self._ahead()) // 2)

    def ran(self, seconds: float) -> None:
        self.jobs -= 1
        known = self._seconds
        self._seconds = seconds if known is None else 0.9 * known + 0.1 * seconds

    def _ahead(self) -> int:
        """Jobs beyond the slots: as many as they run in a moment."""
        if self._seconds is None or not self._prefetch:
            return 0
        return min(self._prefetch, int(self.pool.slots * PREFETCH_S / max(self._seconds, 1e-6)))


class _Order:
    """In which order queues are asked."""

    def __init__(self, queues: Sequence[str] | Mapping[str, float]) -> None:
        if isinstance(queues, str) or not isinstance(queues, Sequence | Mapping):
            raise UsageError(f"queues: a sequence of names or a mapping to weights expected, got {quoted(queues)}")
        self.names = [name for name in queues if name != SCHEDULES]  # whose jobs are no calls
        if not self.names or not all(is_name(name) and len(name.encode()) <= 255 for name in self.names):
            raise UsageError(f"queues: names expected, of 1 to 255 bytes, got {quoted(queues)}")
        self._weights: dict[str, float] | None = None
        self._credit: dict[str, float] = dict.fromkeys(self.names, 0.0)
        if isinstance(queues, Mapping):
            self._weights = {name: seconds_of(weight, f"queues[{quoted(name)}]") for name, weight in queues.items()}
            if not all(self._weights.values()):
                raise UsageError("queues: weights above 0 expected")

    def __str__(self) -> str:
        more = len(self.names) - SHOWN_QUEUES
        return ", ".join(self.names[:SHOWN_QUEUES]) + (f" and {more} more queues" if more > 0 else "")

    def __contains__(self, name: str) -> bool:
        return name in self._credit

    def add(self, name: str) -> None:
        """One more, with the weight 1."""
        if name not in self:
            self.names.append(name)
            self._credit[name] = 0.0
            if self._weights is not None:
                self._weights[name] = 1.0

    def next(self, names: list[str]) -> list[str]:
        """Those that have room, the one whose turn it is first.

        With weights: a smooth weighted round robin, in which each turn a queue gains its weight, and the first pays all
        of them.
        """
        weights = self._weights
        if weights is None or len(names) < 2:
            return names
        credit = self._credit
        for name in names:
            credit[name] += weights[name]
        first = max(names, key=credit.__getitem__)
        credit[first] -= sum(map(weights.__getitem__, names))
        return [first, *(name for name in names if name != first)]


class _Group(NamedTuple):
    """Queues that one call leases from, and the fullest of the pools in which their tasks run."""

    room: _Room
    names: list[str]


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
    if delivery.job.finished:
        return ACK
    if reason is None or ending.verb == "ack":
        return ending
    if reason == SHUTDOWN:
        return GIVEN_BACK
    if reason == CANCELLED:
        return Ending("reject", CANCELLED)
    return ending


def _count(value: object, name: str, least: int = 1) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise UsageError(f"{name}: an int of at least {least} expected, got {quoted(value)}")
    return value
