"""Where handlers run: what hooks, forks, cancellations and the end of the program may not do to a job."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import worker_tasks
from patience import PATIENCE_S, job_of, until

from rivetq import Broker, QueueFullError, RetryPolicy
from rivetq.tasks import App, CurrentJob, Snooze, current_job, running
from rivetq.worker import Settled, Worker, children, pools
from rivetq.worker.children import ProcessPool


@pytest.fixture
def of_children() -> Iterator[App]:
    """The app of the tasks that run in child processes, with an empty broker."""
    worker_tasks.ends.clear()
    with worker_tasks.app as app:
        yield app


# -- Hooks: the ack needs the handler's own return


@pytest.mark.parametrize("kind", ["sync", "async"])
@pytest.mark.parametrize("how", ["error", "snooze", "exit"])
def test_a_hook_that_swallows_what_the_handler_raised_makes_no_ack(app: App, kind: str, how: str) -> None:
    raised: dict[str, BaseException] = {"error": ValueError("swallowed"), "snooze": Snooze(60), "exit": SystemExit(3)}

    @app.around
    def report(job: CurrentJob) -> Iterator[None]:
        with contextlib.suppress(BaseException):
            yield

    @app.task(max_attempts=1)
    def sync() -> None:
        raise raised[how]

    @app.task(max_attempts=1)
    async def asynchronous() -> None:
        raise raised[how]

    job_id = (sync if kind == "sync" else asynchronous).enqueue()
    expected = {
        "error": ("dead", "ValueError: swallowed"),
        "snooze": ("scheduled", None),
        "exit": ("dead", "SystemExit: 3"),
    }
    with Worker(app):
        until(lambda: job_of(app, job_id).state in ("dead", "scheduled"))
    assert (job_of(app, job_id).state, job_of(app, job_id).last_error) == expected[how]


def test_a_hook_in_a_child_that_swallows_what_the_handler_raised_makes_no_ack(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"hooked_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(
        """
import contextlib
from rivetq.tasks import App
app = App(":memory:")
@app.around
def report(job):
    with contextlib.suppress(Exception):
        yield
@app.task(pool="process", max_attempts=1)
def fails():
    raise ValueError("swallowed")
"""
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    found = importlib.import_module(name)
    with found.app, Worker(found.app, concurrency=1):
        job_id = found.fails.enqueue()
        until(lambda: job_of(found.app, job_id).state == "dead")
        assert job_of(found.app, job_id).last_error == "ValueError: swallowed"


@pytest.mark.parametrize("kind", ["sync", "async"])
@pytest.mark.parametrize("when", ["enter", "exit"])
def test_a_hook_that_swallows_what_another_hook_raised_makes_no_ack(app: App, kind: str, when: str) -> None:
    """A hook that commits, say, inside of one that reports: no commit, no ack."""
    ran = []

    @app.around
    def outer(job: CurrentJob) -> Iterator[None]:
        with contextlib.suppress(ConnectionError):
            yield

    @app.around
    def inner(job: CurrentJob) -> Iterator[None]:
        if when == "enter":
            raise ConnectionError("no database")
        yield
        raise ConnectionError("no database")

    @app.task(max_attempts=1)
    def sync() -> None:
        ran.append(1)

    @app.task(max_attempts=1)
    async def asynchronous() -> None:
        ran.append(1)

    job_id = (sync if kind == "sync" else asynchronous).enqueue()
    with Worker(app):
        until(lambda: job_of(app, job_id).state == "dead")
    assert "no database" in (job_of(app, job_id).last_error or "")
    assert ran == ([] if when == "enter" else [1])


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_hook_may_turn_an_error_into_another_ending(app: App, kind: str) -> None:
    @app.around
    def outer(job: CurrentJob) -> Iterator[None]:
        with contextlib.suppress(Snooze):
            yield

    @app.around
    def later(job: CurrentJob) -> Iterator[None]:
        try:
            yield
        except ConnectionError:
            raise Snooze(60) from None

    @app.task
    def sync() -> None:
        raise ConnectionError

    @app.task
    async def asynchronous() -> None:
        raise ConnectionError

    job_id = (sync if kind == "sync" else asynchronous).enqueue()
    with Worker(app):
        until(lambda: job_of(app, job_id).state == "scheduled")
    assert (job_of(app, job_id).attempts, job_of(app, job_id).last_error) == (0, None)


def test_an_async_hook_that_swallows_makes_no_ack_of_a_handler_that_was_cancelled(app: App) -> None:
    begun = threading.Event()

    @app.around
    async def hook(job: CurrentJob) -> AsyncIterator[None]:
        with contextlib.suppress(asyncio.CancelledError):
            yield

    @app.task
    async def task() -> None:
        begun.set()
        await asyncio.sleep(60)

    with Worker(app, grace=0):
        job_id = task.enqueue()
        assert begun.wait(PATIENCE_S)
    assert (job_of(app, job_id).state, job_of(app, job_id).attempts) == ("ready", 0)


# -- Forks


@pytest.mark.parametrize("hooked", [True, False])
@pytest.mark.parametrize("kind", ["sync", "async"])
@pytest.mark.parametrize(("end", "status"), [("returns", 0), ("raises", 1), ("exits", 7)])
def test_a_copy_that_a_handler_forked_ends_with_the_handler(
    app: App, kind: str, end: str, status: int, hooked: bool
) -> None:
    pids: list[int] = []
    left: list[int] = []

    if hooked:

        @app.around
        def hook(job: CurrentJob) -> Iterator[None]:
            yield
            left.append(os.getpid())

    def fork() -> None:
        pid = os.fork()
        if pid:
            pids.append(pid)
        elif end == "raises":
            raise ValueError("in the copy")
        elif end == "exits":
            sys.exit(7)

    @app.task
    def sync() -> None:
        fork()

    @app.task
    async def asynchronous() -> None:
        fork()

    with Worker(app, concurrency=1):
        (sync if kind == "sync" else asynchronous).enqueue()
        until(lambda: app.broker.stats().acked == 1)
        [pid] = pids
        ended: list[tuple[int, int]] = []
        try:
            until(lambda: ended.append(os.waitpid(pid, os.WNOHANG)) or ended[-1][0])
        except AssertionError:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise
    assert os.waitstatus_to_exitcode(ended[-1][1]) == status
    assert left == [os.getpid()] * hooked


# -- A `finish` under way


def test_a_job_is_answered_for_when_a_commit_that_is_under_way_in_a_thread_is_over(
    app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The handler is cancelled meanwhile, and the commit is refused: what the worker tells is not an ack.

    Other jobs do not wait for that commit.
    """
    committing, go = threading.Event(), threading.Event()
    told: list[str] = []

    @app.task(queue="next")
    def following() -> None: ...

    @app.task
    def other() -> None: ...

    @app.task
    async def load() -> None:
        def step() -> None:
            with current_job().finish() as tx:
                following.options(transaction=tx).enqueue()
                monkeypatch.setattr(app.broker, "_commit", refuse)

        await asyncio.to_thread(step)

    def refuse(operations: Any) -> None:
        monkeypatch.undo()
        committing.set()
        go.wait(PATIENCE_S)
        raise QueueFullError("next: full", queue="next", max_jobs=0)

    with Worker(app, ["default"], on_settled=lambda settled: told.append(settled.ending)) as worker:
        job_id = load.enqueue()
        assert committing.wait(PATIENCE_S)
        [delivery] = list(worker._held.deliveries.values())
        assert worker.cancel(job_id)
        until(lambda: delivery.is_told and not worker._held.endings)
        assert (told, worker.running) == ([], 1)
        other.enqueue()
        until(lambda: told)
        assert told == ["ack"]
        go.set()
        until(lambda: len(told) == 2)
    assert told == ["ack", "reject"]
    assert (app.broker.get(job_id), app.broker.stats().cancelled, app.broker.stats().acked) == (None, 1, 1)


def test_a_commit_under_way_in_a_thread_that_comes_through_makes_the_job_done(
    app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if the worker was stopped meanwhile, and its grace time is over."""
    committing, go = threading.Event(), threading.Event()
    told: list[str] = []
    original = app.broker._commit

    @app.task(max_attempts=1)
    async def load() -> None:
        def step() -> None:
            with current_job().finish():
                monkeypatch.setattr(app.broker, "_commit", slow)

        await asyncio.to_thread(step)

    def slow(operations: Any) -> None:
        monkeypatch.undo()
        committing.set()
        go.wait(PATIENCE_S)
        original(operations)

    worker = Worker(app, on_settled=lambda settled: told.append(settled.ending), grace=0)
    worker.start()
    load.enqueue()
    assert committing.wait(PATIENCE_S)
    [delivery] = list(worker._held.deliveries.values())
    stopping = threading.Thread(target=worker.stop)
    stopping.start()
    until(lambda: delivery.is_told and not worker._held.is_settling)
    assert not told
    go.set()
    stopping.join(PATIENCE_S)
    assert told == ["ack"]
    assert (app.broker.stats().acked, app.broker.stats().enqueued) == (1, 1)


def test_of_two_threads_of_a_handler_one_finishes_its_job(app: App) -> None:
    errors: list[BaseException] = []
    inside = threading.Barrier(2)

    @app.task
    def task() -> None:
        job = current_job()

        def finish() -> None:
            try:
                with job.finish():
                    inside.wait(PATIENCE_S)
            except Exception as error:
                errors.append(error)

        threads = [threading.Thread(target=finish) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert job.finished

    told: list[Settled] = []
    with Worker(app, on_settled=told.append):
        task.enqueue()
        until(lambda: told)
    assert [each.ending for each in told] == ["ack"]
    assert len(errors) == 1
    assert app.broker.stats().acked == 1


# -- Children: the process of a job dies for that job only


def delivery_of(app: App, task: Any, *args: Any) -> running.Delivery:
    task.enqueue(*args)
    lease = app.broker.lease(task.opts.queue)
    assert lease is not None
    return running.Delivery(lease, task, list(args), {})


@contextlib.contextmanager
def one_child(app: App) -> Iterator[tuple[ProcessPool, list[running.Delivery]]]:
    done: list[running.Delivery] = []
    pool = ProcessPool(app, 1, done.append)
    pool.start()
    try:
        yield pool, done
    finally:
        pool.stop(PATIENCE_S)


def test_a_child_that_was_killed_gets_no_other_job_while_it_dies(
    of_children: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kill is imagined here, so that the child takes its time to die."""
    pids: list[int] = []
    original = children._Child.run

    def run(self: children._Child, delivery: running.Delivery) -> running.Ending | None:
        assert self._process.pid is not None
        pids.append(self._process.pid)
        ending = original(self, delivery)
        if len(pids) == 1:
            with monkeypatch.context() as patch:
                patch.setattr(self._process, "kill", lambda: None)
                self.kill()
        return ending

    monkeypatch.setattr(children._Child, "run", run)
    with one_child(of_children) as (pool, done):
        pool.submit([delivery_of(of_children, worker_tasks.sleep, 0) for _ in range(2)])
        until(lambda: len(done) == 2)
    assert len(set(pids)) == 2


@pytest.mark.parametrize("dies", ["before it is sent", "before it is taken"])
def test_a_job_that_meets_a_child_that_just_died_begins_in_another(
    of_children: App, monkeypatch: pytest.MonkeyPatch, dies: str
) -> None:
    """It is killed when it had nothing to do, and behind the question whether it lives; or with the job in its pipe."""
    pids: list[int] = []
    original = children._Child.run

    def run(self: children._Child, delivery: running.Delivery) -> running.Ending | None:
        pid, pipe = self._process.pid, self._pipe
        assert pid is not None
        pids.append(pid)
        if len(pids) == 2:
            send = pipe.send

            def send_and_kill(content: Any) -> None:
                send(content)
                os.kill(pid, signal.SIGKILL)

            if dies == "before it is sent":
                os.kill(pid, signal.SIGKILL)
                self._process.join(PATIENCE_S)
            else:
                os.kill(pid, signal.SIGSTOP)
                monkeypatch.setattr(pipe, "send", send_and_kill)
        return original(self, delivery)

    monkeypatch.setattr(children._Child, "run", run)
    with one_child(of_children) as (pool, done):
        pool.submit([delivery_of(of_children, worker_tasks.sleep, 0) for _ in range(2)])
        until(lambda: len(done) == 2)
    assert [delivery.ending for delivery in done] == [running.ACK, running.ACK]
    assert (pids[0] == pids[1], pids[1] == pids[2]) == (True, False)


def test_a_job_is_sent_to_a_living_child(of_children: App, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that died while it had nothing to do is seen before, not by what it does to the job."""
    alive: list[bool] = []
    original = children._Child.run

    def run(self: children._Child, delivery: running.Delivery) -> running.Ending | None:
        alive.append(self._process.is_alive())
        return original(self, delivery)

    monkeypatch.setattr(children._Child, "run", run)
    found: list[children._Child] = []
    with one_child(of_children) as (pool, done):
        pool.submit([delivery_of(of_children, worker_tasks.sleep, 0)])
        until(lambda: found.extend(pool._running.values()) or (found and done))
        found[0]._process.kill()
        found[0]._process.join(PATIENCE_S)
        pool.submit([delivery_of(of_children, worker_tasks.sleep, 0)])
        until(lambda: len(done) == 2)
    assert alive == [True, True]


def test_a_job_whose_children_die_before_they_take_it_fails(of_children: App, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(children._Child, "run", lambda self, delivery: None)
    with one_child(of_children) as (pool, done):
        pool.submit([delivery_of(of_children, worker_tasks.sleep, 0)])
        until(lambda: done)
    ending = done[0].ending
    assert ending is not None
    assert (ending.verb, str(ending.error).partition(":")[0]) == ("nack", "ChildDied")


def test_a_job_that_began_in_a_child_that_dies_with_an_answer_in_its_pipe_failed(
    of_children: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It asked its parent to enqueue: what is left in the pipe is not the job."""
    runs: list[children._Child] = []
    run_, put = children._Child.run, children._Child._put

    def run(self: children._Child, delivery: running.Delivery) -> running.Ending | None:
        runs.append(self)
        pid, send = self._process.pid, self._pipe.send
        assert pid is not None
        pids.append(pid)

        def send_and_kill(content: Any) -> None:
            send(content)
            if stopped:
                os.kill(pid, signal.SIGKILL)

        monkeypatch.setattr(self._pipe, "send", send_and_kill)
        return run_(self, delivery)

    def put_to_stopped(self: children._Child, *call: Any) -> tuple[bool, Any]:
        os.kill(pids[-1], signal.SIGSTOP)
        stopped.append(True)
        return put(self, *call)

    pids, stopped = list[int](), list[bool]()
    with one_child(of_children) as (pool, done):
        pool.submit([delivery_of(of_children, worker_tasks.sleep, 0)])
        until(lambda: done)
        monkeypatch.setattr(children._Child, "run", run)
        monkeypatch.setattr(children._Child, "_put", put_to_stopped)
        pool.submit([delivery_of(of_children, worker_tasks.sleep, 0)])
        until(lambda: len(done) == 2)
    ending = done[1].ending
    assert ending is not None
    assert (len(runs), ending.verb, str(ending.error).partition(":")[0]) == (1, "nack", "ChildDied")


def test_a_cancellation_that_comes_as_the_job_ends_leaves_the_next_one_alone(
    of_children: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It finds the child of its job, which has just ended that, and would have the next one before it is killed."""
    ended, held, go = threading.Event(), threading.Event(), threading.Event()
    run_, kill_, put_ = children._Child.run, children._Child.kill, children._Child._put

    def put(self: children._Child, *call: Any) -> tuple[bool, Any]:
        if ended.is_set():  # the next job has begun
            go.set()
        return put_(self, *call)

    def run(self: children._Child, delivery: running.Delivery) -> running.Ending | None:
        ending = run_(self, delivery)
        if delivery is first:
            ended.set()
            assert held.wait(PATIENCE_S)
        return ending

    def kill(self: children._Child) -> None:
        held.set()
        go.wait(0.5)  # for the next job, which must not come
        kill_(self)

    monkeypatch.setattr(children._Child, "run", run)
    monkeypatch.setattr(children._Child, "_put", put)
    with one_child(of_children) as (pool, done):
        first, second = (delivery_of(of_children, worker_tasks.sleep, each) for each in (0, 0.5))
        pool.submit([first, second])
        assert ended.wait(PATIENCE_S)
        with monkeypatch.context() as patch:
            patch.setattr(children._Child, "kill", kill)
            first.job.cancel("cancelled")
            pool.cancel(first)
        until(lambda: len(done) == 2)
    assert second.ending == running.ACK


# -- The program ends


def program(tmp_path: Path, end: str) -> str:
    """What is left in the directory of a program that begins a worker, stops it by `atexit`, and ends."""
    (tmp_path / "shop.py").write_text(
        f"""
import asyncio, atexit, sys, threading, time
from rivetq.tasks import App
from rivetq.worker import Worker
app = App("data")
begun = threading.Semaphore(0)
main = threading.main_thread()
@app.task(queue="loop", max_attempts=1)
async def copies():
    await asyncio.to_thread(begun.release)
    while main.is_alive():
        await asyncio.sleep(0.001)
    for _ in range(5):
        await asyncio.to_thread(time.sleep, 0.01)
@app.task(queue="loop", max_attempts=1)
async def begins_late():
    begun.release()
    while main.is_alive():
        await asyncio.sleep(0.001)
    await asyncio.sleep(0.05)
    await asyncio.to_thread(lambda: None)
    await later.aenqueue()
@app.task(queue="thread", max_attempts=1)
def runs():
    begun.release()
    while main.is_alive():
        time.sleep(0.001)
    time.sleep(0.05)
    later.enqueue()
@app.task(queue="thread", max_attempts=1)
def later():
    print("began after the end")
    began.set()
began = threading.Event()
def count():
    return len([each for each in threading.enumerate() if each.name.startswith("rivetq-worker-")])
def before_the_stop():
    n = count()
    later.enqueue()
    while count() == n and not began.is_set():  # a thread that meets the job ends, or runs it
        time.sleep(0.001)
if __name__ == "__main__":
    worker = Worker(app, grace=20, concurrency={{"threads": 4, "tasks": 100}})
    worker.start()
    atexit.register(worker.stop)
    atexit.register(before_the_stop)
    copies.enqueue_many([()] * 3)
    begins_late.enqueue_many([()] * 3)
    runs.enqueue()
    for _ in range(7):
        begun.acquire()
    {end}
"""
    )
    done = subprocess.run(
        [sys.executable, "shop.py"], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (3, "")
    return done.stdout


def test_a_worker_that_is_stopped_by_atexit_gives_handlers_their_grace_time(tmp_path: Path) -> None:
    assert program(tmp_path, "sys.exit(3)") == ""
    with Broker(tmp_path / "data", release_on_open=False) as broker:
        stats = broker.stats()
        assert (stats.acked, stats.dead, stats.leased, stats.ready) == (7, 0, 0, 5)
        assert {job.attempts for job in broker.jobs("thread")} == {0}


def test_a_worker_goes_on_while_another_thread_serves(tmp_path: Path) -> None:
    """Python waits for threads that are no daemons: until then the program lives, though its main thread has ended."""
    end = """
    import os
    def serve():
        while app.broker.stats().acked < 11:
            time.sleep(0.01)
        worker.stop()
        app.close()
        sys.stdout.flush()
        os._exit(3)
    threading.Thread(target=serve).start()
"""
    assert program(tmp_path, end).count("began after the end") == 4
    with Broker(tmp_path / "data", release_on_open=False) as broker:
        assert (broker.stats().acked, broker.stats().dead) == (11, 0)


@pytest.mark.parametrize("kind", ["thread", "loop", "process"])
def test_no_job_begins_in_a_program_that_ends(of_children: App, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    for where in (pools, children):
        monkeypatch.setattr(where, "program_ends", lambda: True)
    app = App(of_children.broker)
    ran: list[str] = []

    @app.task(queue="thread")
    def thread() -> None:
        ran.append("thread")

    @app.task(queue="loop")
    async def loop() -> None:
        ran.append("loop")

    process = app.task(name="process", queue="process", pool="process")(worker_tasks.pause)
    task: Any = {"thread": thread, "loop": loop, "process": process}[kind]
    with Worker(app, [kind], concurrency=2) as worker:
        ids = [task.enqueue(*([0] if kind == "process" else [])) for _ in range(3)]
        until(lambda: worker.running)
    assert not ran
    assert {(job_of(app, job_id).state, job_of(app, job_id).attempts) for job_id in ids} == {("ready", 0)}


# -- The threads of the event loop


ORPHAN = """
import os, sys, time
from rivetq.tasks import App
from rivetq.worker import Worker
app = App(sys.argv[1] if len(sys.argv) > 1 else ":memory:")
@app.task(pool="process")
def sleep(path):
    with open(path + ".new", "w") as file:
        file.write(str(os.getpid()))
    os.rename(path + ".new", path)
    time.sleep(120)
"""


def test_a_child_ends_in_the_middle_of_its_job_when_its_parent_was_killed(tmp_path: Path) -> None:
    """It would finish a job that another worker has by then."""
    (tmp_path / "orphan.py").write_text(ORPHAN)
    pid_file = tmp_path / "pid"
    script = f"from orphan import *; sleep.enqueue({str(pid_file)!r}); Worker(app).start(); time.sleep(120)"
    parent = subprocess.Popen([sys.executable, "-c", script], cwd=tmp_path)
    try:
        until(pid_file.exists)
    finally:
        parent.kill()
        parent.wait(PATIENCE_S)
    child = int(pid_file.read_text())

    def is_gone() -> bool:
        try:
            state = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return True
        return state == "Z"  # and nobody is there who waits for it

    try:
        until(is_gone)
    except AssertionError:
        os.kill(child, signal.SIGKILL)
        raise


def test_the_threads_of_a_loop_are_an_executor(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = pools.LoopThreads(2)
    threads.start()
    both, alone = threading.Barrier(2), threading.Event()
    calls = [threads.submit(both.wait, PATIENCE_S) for _ in range(2)]
    assert sorted(call.result(PATIENCE_S) for call in calls) == [0, 1]
    held = [threads.submit(alone.wait, PATIENCE_S) for _ in range(2)]
    waits = threads.submit(pow, 2, exp=3)  # there are two threads, and both are busy
    assert not waits.done()
    cancelled = threads.submit(pow, 1, 1)
    assert cancelled.cancel()
    alone.set()
    assert waits.result(PATIENCE_S) == 8
    assert all(call.result(PATIENCE_S) for call in held)
    with pytest.raises(ZeroDivisionError):
        threads.submit(divmod, 1, 0).result(PATIENCE_S)
    names = [each.name for each in threading.enumerate() if each.name.startswith("rivetq-loop-")]
    assert len(names) == 2
    threads.shutdown()
    with pytest.raises(RuntimeError, match="shutdown"):
        threads.submit(pow, 1, 1)
    until(lambda: not [each for each in threading.enumerate() if each.name.startswith("rivetq-loop-")])


def test_a_loop_that_can_start_no_other_thread_gets_along_with_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """As while Python ends the process."""
    threads, go = pools.LoopThreads(4), threading.Event()
    threads.start()
    held = threads.submit(go.wait, PATIENCE_S)

    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't create new thread at interpreter shutdown")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        waits = threads.submit(pow, 2, 3)
    go.set()
    assert held.result(PATIENCE_S)
    assert waits.result(PATIENCE_S) == 8
    threads.shutdown()


def test_a_retry_policy_is_kept_by_a_job_whose_hook_swallows(app: App) -> None:
    @app.around
    def report(job: CurrentJob) -> Iterator[None]:
        with contextlib.suppress(ValueError):
            yield

    @app.task(retry=RetryPolicy(max_attempts=3, base=0))
    def fails() -> None:
        raise ValueError

    job_id = fails.enqueue()
    with Worker(app):
        until(lambda: job_of(app, job_id).state == "dead")
    assert job_of(app, job_id).attempts == 3


# -- What is left at the end


def test_an_async_generator_that_a_handler_left_open_is_closed_when_the_worker_stops(app: App) -> None:
    closed, kept = list[str](), list[Any]()

    async def rows() -> AsyncIterator[int]:
        try:
            yield 1
            yield 2
        finally:
            await asyncio.sleep(0)  # a connection is given back, say
            closed.append("rows")

    @app.task
    async def task() -> None:
        kept.append(rows())
        await anext(kept[0])

    with Worker(app):
        task.enqueue()
        until(lambda: app.broker.stats().acked == 1)
        assert not closed
    assert closed == ["rows"]


def test_a_child_ends_with_its_parent_in_the_middle_of_a_job(tmp_path: Path) -> None:
    """The parent is killed, and cannot end it; what nobody waits for must not go on."""
    (tmp_path / "shop.py").write_text(
        """
import os, signal, time
from rivetq.tasks import App
from rivetq.worker import Worker
app = App(":memory:")
@app.task(pool="process")
def work():
    open("pid", "w").write(f"{os.getpid()} ")
    time.sleep(60)
if __name__ == "__main__":
    Worker(app, concurrency=1).start()
    work.enqueue()
    while not (os.path.exists("pid") and open("pid").read().endswith(" ")):
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    )
    done = subprocess.run([sys.executable, "shop.py"], cwd=tmp_path, timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL
    pid = int((tmp_path / "pid").read_text())

    def is_gone() -> bool:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][:1]
        except OSError:
            return True
        return state == "Z"  # of a process that nobody has collected yet

    if not Path("/proc/self/stat").exists():
        pytest.skip("there is no /proc to see processes of others in")
    until(is_gone)


def test_a_copy_of_the_program_that_ends_kills_no_children(of_children: App) -> None:
    """A handler in a thread, or the program, forks, and the copy exits as Python does: with its `atexit` functions."""
    with one_child(of_children) as (pool, done):
        pool.submit([delivery_of(of_children, worker_tasks.sleep, 0)])
        until(lambda: done)
        pid = os.fork()
        if pid == 0:
            try:
                children._kill_children()
            finally:
                os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        assert children._exiting == []
        runs: list[children._Child] = []
        pool.submit([delivery_of(of_children, worker_tasks.sleep, 0.05)])
        until(lambda: runs.extend(pool._running.values()) or len(done) == 2)
    assert done[1].ending == running.ACK
    assert len(set(runs)) == 1
    assert runs[0]._jobs == 2, "it is the first child still"


@pytest.mark.parametrize("is_told", [False, True])
def test_a_job_that_is_told_to_stop_while_it_gets_its_child_does_not_run_on(
    of_children: App, monkeypatch: pytest.MonkeyPatch, is_told: bool
) -> None:
    """Between the question whether it may begin, and the moment in which its child can be found and killed."""
    original = children._Child.is_alive

    def is_alive(self: children._Child) -> bool:
        if is_told and not delivery.job.cancelled:
            delivery.job.cancel("cancelled")
            pool.cancel(delivery)  # which finds no child yet
        return original(self)

    monkeypatch.setattr(children._Child, "is_alive", is_alive)
    delivery = delivery_of(of_children, worker_tasks.sleep, 60 if is_told else 0)
    with one_child(of_children) as (pool, done):
        pool.submit([delivery])
        until(lambda: done)
    assert delivery.ending == (running.Ending("nack", "cancelled") if is_told else running.ACK)


def test_a_job_of_a_child_begins_when_the_child_is_up_and_not_before(
    of_children: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill meanwhile costs no attempt, and a pause meanwhile is seen."""
    begun: list[int] = []
    begin = Broker.begin

    def noted(self: Broker, lease: Any) -> None:
        begun.append(lease.id)
        begin(self, lease)

    monkeypatch.setattr(Broker, "begin", noted)
    make, coming, may_come = children._Child.__init__, threading.Event(), threading.Event()

    def slow(self: Any, app: App) -> None:
        coming.set()
        assert may_come.wait(PATIENCE_S)
        make(self, app)

    monkeypatch.setattr(children._Child, "__init__", slow)
    job_id = worker_tasks.sleep.enqueue(0)
    with Worker(of_children, concurrency=1):
        assert coming.wait(PATIENCE_S)
        assert begun == []
        of_children.broker.pause("children")
        may_come.set()
        until(lambda: job_of(of_children, job_id).state == "ready")
        assert (begun, job_of(of_children, job_id).attempts) == ([], 0)
        of_children.broker.resume("children")
        until(lambda: of_children.broker.get(job_id) is None)
        assert begun.count(job_id) == 1
