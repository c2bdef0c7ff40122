"""Handlers in child processes: the pool, a child as its thread in the parent sees it, and what runs in the child.

A message of the child is ("up", None), its first; ("begun", None): it has the module of a task with a time limit;
("put", ...), which asks the parent to enqueue; ("log", record); ("done", (token, ending, memory)); or ("broken", why),
the last one of a child that cannot import the task. The token says which job ended. A child that got out of step
therefore cannot answer for another job; it is killed then.
"""

from __future__ import annotations

import atexit
import logging
import multiprocessing
import os
import pickle
import queue
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from typing import Any
from weakref import WeakSet

from rivetq import Lease, RivetQError, UsageError

from .. import logs
from ..tasks.app import App
from ..tasks.running import TIME_LIMIT, Delivery, Ending, ending_of, fields, run_here, stopped, text_of
from ..tasks.task import TASK_HEADER, Task
from .pools import Done, drained, may_begin, program_ends

logger = logging.getLogger("rivetq.worker")

START_S = 300.0
"""How long a child gets to come up and to import a task that has a time limit, before it is killed."""
END_S = 5.0
"""How long a child gets to end when it has nothing to do, before it is killed."""
LOOK_S = 1.0
"""How often a parent looks whether a silent child is alive."""
_PARENTS_SIGNALS = {signal.SIGINT, signal.SIGTERM}


class ProcessPool:
    """Handlers in child processes, one job at a time each; a thread here waits on each child.

    Children are spawned, not forked: a fork would copy the locks of all threads as they are. A child imports the task
    by the module and name of its function. When a child dies, its own job failed, and the next one gets a new child.

    Args:
        max_jobs: a child ends after so many and another takes its place.
        max_memory: bytes that a child may occupy after a job; the next job gets another child.
    """

    def __init__(
        self, app: App, slots: int, done: Done, *, max_jobs: int | None = None, max_memory: int | None = None
    ) -> None:
        self.slots = slots
        self._app = app
        self._done = done
        self._max_jobs = max_jobs
        self._max_memory = max_memory
        self._waiting: queue.SimpleQueue[Delivery | None] = queue.SimpleQueue()
        self._running: dict[Delivery, _Child] = {}
        self._lock = threading.Lock()  # guards the above, so that a child is killed for the job that it runs
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        for number in range(self.slots):
            thread = threading.Thread(target=self._run, name=f"rivetq-child-{number}", daemon=True)
            thread.start()
            self._threads.append(thread)

    def submit(self, deliveries: Sequence[Delivery]) -> None:
        for delivery in deliveries:
            self._waiting.put(delivery)

    def cancel(self, delivery: Delivery) -> None:
        with self._lock:
            child = self._running.get(delivery)
            if child is not None:
                child.kill()

    def take_back(self) -> list[Delivery]:
        return drained(self._waiting)

    def stop(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        with self._lock:
            for child in self._running.values():
                child.kill()
        for _ in range(self.slots):
            self._waiting.put(None)
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))

    def _run(self) -> None:
        child: _Child | None = None
        while (delivery := self._waiting.get()) is not None:
            if program_ends():
                self._waiting.put(delivery)  # for `take_back`
                break
            delivery.started_at = time.monotonic()
            if not may_begin(delivery, later=True):
                self._done(delivery)
                continue
            try:
                ending = None if child is None else self._run_in(child, delivery)
                if ending is None:  # it has died, or it was dying when it was sent the job
                    child = _Child(self._app)
                    ending = self._run_in(child, delivery) or child.died(delivery)
                delivery.ending = ending
            except BaseException as error:
                if child is not None:  # the content of its pipe is unknown now
                    child.kill()
                logger.exception("job %s: the process pool failed", delivery.lease.id, extra=fields(delivery))
                delivery.ending = Ending("nack", f"{type(error).__name__}: {error}")
            delivery.seconds = time.monotonic() - delivery.started_at
            self._done(delivery)  # first: a child may take its time to end
            if child is not None and child.is_spent(self._max_jobs, self._max_memory):
                child.end()
                child = None
        if child is not None:
            child.end()

    def _run_in(self, child: _Child, delivery: Delivery) -> Ending | None:
        """How the job ended in this child; None if it did not begin there, since the child is dead."""
        if not child.is_alive():
            return None
        with self._lock:
            self._running[delivery] = child
        try:
            if delivery.job.cancelled:  # told before it could be killed
                child.kill()
            return child.run(delivery)
        finally:
            with self._lock:
                del self._running[delivery]


class _Child:
    """A child process, as seen from its thread in the parent."""

    def __init__(self, app: App) -> None:
        if os.getpid() in _exiting:
            raise RuntimeError("the program ends")
        context = multiprocessing.get_context("spawn")
        self._app = app
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_child_main, args=(theirs, logs.levels()), name="rivetq-child")
        # Ctrl-C and a supervisor's SIGTERM go to the whole group, also while the child's interpreter comes up: blocked
        # until the child ignores them, else they would kill it, and its job would have failed.
        resource_tracker.ensure_running()  # its first start, which the child's start would include, unblocks them
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _PARENTS_SIGNALS)
        try:
            self._process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        self.parent = os.getpid()
        _children.add(self)
        theirs.close()
        self._is_up = False
        self._is_killed = False
        self._jobs = 0
        self._memory = 0

    def is_alive(self) -> bool:
        return not self._is_killed and self._process.is_alive()  # one that was killed may take a moment to die

    def is_spent(self, max_jobs: int | None, max_memory: int | None) -> bool:
        return (
            not self.is_alive()
            or (max_jobs is not None and self._jobs >= max_jobs)
            or (max_memory is not None and self._memory > max_memory)
        )

    def kill(self) -> None:
        self._is_killed = True
        self._process.kill()

    def end(self) -> None:
        """It is idle: closing the pipe is enough."""
        self._pipe.close()
        self._process.join(END_S)
        if self._process.is_alive():
            self._process.kill()
            self._process.join(END_S)

    def run(self, delivery: Delivery) -> Ending | None:
        """How the job ended; None if the child died before it took the job out of its pipe."""
        job = delivery.job
        limit = delivery.task.time_limit
        # The limit is the handler's, so it counts from its begin; before that there is one for the child's start.
        allowed = START_S if limit is not None else None
        until = None if allowed is None else time.monotonic() + allowed
        try:
            is_sent = is_taken = False
            while True:
                if self._is_up and not is_sent:  # not before: a large job would block while the child does not read
                    if not may_begin(delivery):  # once more: a child takes its time to come up
                        return delivery.ending
                    is_sent = True
                    self._pipe.send((delivery.task, delivery.lease))
                left = None if until is None else max(0, until - time.monotonic())
                # Check the process now and then: one that a handler forked may hold the pipe open after its end.
                if left == 0 or not self._pipe.poll(LOOK_S if left is None else min(left, LOOK_S)):
                    if left is not None and left <= LOOK_S:
                        job.cancel(TIME_LIMIT)
                        self.kill()
                        raise EOFError
                    if not self.is_alive():
                        raise EOFError
                    continue
                kind, content = self._pipe.recv()
                if kind == "up":
                    self._is_up = True
                    continue
                is_taken = is_sent
                if kind == "log":
                    with suppress(Exception):  # a filter of the program's, say: not the job's fault
                        logs.take(content)
                    continue
                if kind == "begun":
                    assert limit is not None
                    delivery.started_at, allowed = time.monotonic(), limit
                    until = delivery.started_at + allowed
                    continue
                if kind == "broken":
                    self.kill()
                    return Ending("nack", content)
                if kind == "put":
                    self._pipe.send(self._put(*content))
                    continue
                self._jobs += 1
                token, ending, self._memory = content
                if token != delivery.lease.token or not isinstance(ending, Ending):
                    raise RuntimeError("the child told the end of another job: did a handler fork and return twice?")
                return ending
        except (EOFError, OSError) as trouble:
            # The job is still in the pipe if it cannot be sent, or, so Linux says, if the connection is "reset".
            in_pipe = is_sent and not is_taken and isinstance(trouble, BrokenPipeError | ConnectionResetError)
            return self._cut_short(delivery, allowed, in_pipe=in_pipe)

    def _cut_short(self, delivery: Delivery, allowed: float | None, *, in_pipe: bool) -> Ending | None:
        """How a job ended whose child ends or was killed, within so many seconds if its time was limited."""
        end = time.monotonic() + END_S
        while self._process.is_alive() and time.monotonic() < end:  # join would wait for what it forked, too
            time.sleep(0.005)
        if delivery.job.reason == TIME_LIMIT:
            error = f"TimeLimitError: {TIME_LIMIT} ({allowed:g} s), its process was killed"
            logger.warning("job %s: %s", delivery.lease.id, error, extra=fields(delivery))
            return Ending("nack", error)
        if delivery.job.reason is not None:
            return stopped(delivery)
        return None if in_pipe else self.died(delivery)

    def died(self, delivery: Delivery) -> Ending:
        """The ending of a job whose child ended without a message."""
        error = f"ChildDied: the process of the job ended with exit code {self._process.exitcode}"
        if not self._is_up:
            error += (
                " before it was ready: it cannot import the program, see its standard error (does a module "
                "open a broker when it is imported? give the App a path)"
            )
        logger.warning("job %s: %s", delivery.lease.id, error, extra=fields(delivery))
        return Ending("nack", error)

    def _put(self, queue_: str, payloads: list[bytes], options: dict[str, Any]) -> tuple[bool, Any]:
        try:
            self._app.note_queue(queue_, options["headers"][TASK_HEADER])
            return True, list(self._app.broker.enqueue_many(queue_, payloads, **options))
        except RivetQError as error:
            return False, error


_children: WeakSet[_Child] = WeakSet()
_exiting: list[int] = []  # this process, once it exits: no more children


def _kill_children() -> None:
    """The program ends without having stopped its worker: multiprocessing would wait for its children for ever."""
    _exiting.append(os.getpid())
    for child in list(_children):
        if child.parent == os.getpid():  # and not a copy of it that was forked
            child.kill()


atexit.register(_kill_children)  # so before multiprocessing's own, which was registered when it was imported


# In the child


def _child_main(pipe: Connection, levels: Mapping[str, int]) -> None:
    """Run jobs until the parent closes the pipe or dies."""
    for number in _PARENTS_SIGNALS:  # the parent decides
        # Not SIG_IGN, which programs that a handler starts would inherit; and no system call is broken off for it.
        signal.signal(number, lambda number, frame: None)
        signal.siginterrupt(number, False)
    os.register_at_fork(before=_hold_signals, after_in_parent=_let_signals, after_in_child=partial(_leave_pool, pipe))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _PARENTS_SIGNALS)
    threading.Thread(target=_end_with_parent, name="rivetq-parent", daemon=True).start()
    remote = _Remote(pipe)
    logs.forward(remote.log, levels)
    with suppress(EOFError, OSError):  # the parent is gone, or wants no more
        remote.tell("up")
        while True:
            _run_next(pipe, remote)


_forking = threading.local()


def _hold_signals() -> None:
    """Before a handler forks: hold signals, since the new process would at first ignore them, as this process does."""
    _forking.mask = signal.pthread_sigmask(signal.SIG_BLOCK, _PARENTS_SIGNALS)


def _let_signals() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _forking.mask)


def _leave_pool(pipe: Connection) -> None:
    """In a process that a handler forked: else it would hold the pipe open, and ignore signals to end."""
    pipe.close()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    _let_signals()


def _run_next(pipe: Connection, remote: _Remote) -> None:
    data = pipe.recv_bytes()
    try:
        task, lease = pickle.loads(data)  # which imports the task's module
        task.app._remote = remote
    except BaseException as error:
        logger.exception("a task cannot be imported")
        remote.tell("broken", f"its child process cannot import the task: {text_of(error)}")
        os._exit(1)
    if task.time_limit is not None:
        remote.tell("begun")
    own = os.getpid()
    remote.is_asked = True
    ending = _run_in_child(task, lease)
    if os.getpid() != own:  # a handler forked and returned in both
        os._exit(0)
    remote.end((lease.token, ending, memory_bytes()))


def _run_in_child(task: Task[..., Any], lease: Lease) -> Ending:
    app = task.app
    try:
        found, args, kwargs = app.find(lease)
        delivery = Delivery(lease, found, args, kwargs)
        run_here(delivery, app.around_hooks)
        assert delivery.ending is not None
        return delivery.ending
    except BaseException as error:
        return ending_of(error)


class _Remote:
    """The parent, and its broker for `Task.enqueue`."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._pid = os.getpid()
        self._lock = threading.RLock()  # one question at a time: a thread may outlive its handler, and ask or log
        self.is_asked = False  # a handler runs: the parent answers questions, and nothing else reads the pipe

    def tell(self, kind: str, content: Any = None) -> None:
        with self._lock:
            self._pipe.send((kind, content))

    def end(self, ending: tuple[int, Ending, int]) -> None:
        with self._lock:
            self.is_asked = False
            self.tell("done", ending)

    def log(self, attributes: dict[str, Any]) -> None:
        if os.getpid() == self._pid:
            self.tell("log", attributes)
        elif logging.lastResort is not None:  # a handler forked: two cannot write to one pipe
            logging.lastResort.handle(logging.makeLogRecord(attributes))

    def put(self, queue_: str, payloads: list[bytes], options: dict[str, Any]) -> Sequence[int]:
        with self._lock:
            if not self.is_asked:
                raise UsageError("enqueue: no job runs in this child process any more")
            self._pipe.send(("put", (queue_, payloads, options)))
            done, answer = self._pipe.recv()
        if not done:
            raise answer
        ids: Sequence[int] = answer
        return ids


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def memory_bytes() -> int:
    """Bytes that this process occupies now, or at most so far where the system does not say."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
