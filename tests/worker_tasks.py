"""Tasks that a child process can import: those of the tests of the process pool."""

from __future__ import annotations

import ctypes
import dataclasses
import logging
import multiprocessing
import os
import signal
import subprocess
import threading
import time
import zlib
from pathlib import Path
from typing import Any

from rivetq import RivetQError
from rivetq.tasks import App, Reject, Retry, Snooze, current_job
from rivetq.tasks.running import Ending

app = App(":memory:")
ends: list[str] = []


@app.task
def told(what: str) -> None:
    """In the parent, in a thread: what a child told by enqueueing."""
    ends.append(what)


@app.task(queue="children", pool="process")
def tell_pid() -> None:
    told.enqueue(f"{current_job().attempt} {os.getpid()}")


@app.task(queue="children", pool="process")
def die(how: str) -> None:
    if current_job().attempt > 1:
        return
    if how == "exit":
        os._exit(7)
    os.kill(os.getpid(), signal.SIGKILL)


@app.task(queue="children", pool="process")
def end(how: str) -> None:
    if how == "error":
        raise ZeroDivisionError("by zero")
    if how == "retry":
        raise Retry(60, error="not yet")
    if how == "snooze":
        raise Snooze(60)
    if how == "reject":
        raise Reject("never")
    if how == "finish":
        with current_job().finish():
            pass


@app.task(queue="children", pool="process")
def sleep(seconds: float) -> None:
    told.enqueue("begun")
    time.sleep(seconds)


@app.task(queue="children", pool="process")
def measure(data: bytes) -> None:
    told.enqueue(f"{len(data)} {zlib.crc32(data)}")


@app.task(queue="children", pool="process", time_limit=0.5)
def hang() -> None:
    hold_the_interpreter(60)


@app.task(queue="children", pool="process", time_limit=1, max_attempts=1)
def hang_with_a_grandchild(pid_file: str) -> None:
    """What it forks outlives it, and any patience of a test."""
    pid = os.fork()
    if pid:
        Path(pid_file).write_text(str(pid))
    time.sleep(60)
    if not pid:
        os._exit(0)


@app.task(queue="children", pool="process", max_attempts=1)
def answer_for_another() -> None:
    remote: Any = app._remote
    remote._pipe.send(("done", (0, Ending("ack"), 0)))


@app.task(queue="children", pool="process")
def return_twice() -> None:
    os.fork()


@app.task(queue="children", pool="process", visibility_timeout=0.6, max_attempts=1)
def compute(seconds: float) -> None:
    hold_the_interpreter(seconds)


@app.task(queue="children", pool="process")
def use_broker() -> Any:
    return app.broker.stats()


def hold_the_interpreter(seconds: float) -> None:
    """No other thread of this process runs meanwhile: PyDLL calls into C without letting go of the interpreter."""
    ctypes.PyDLL(None).usleep(int(seconds * 1_000_000))


@dataclasses.dataclass
class Work:
    number: int


def work(what: Work) -> None:
    """No task here: a program makes one of it where it opens its broker."""
    logging.getLogger("shop").info("at work", extra={"number": what.number, "odd": object})
    if what.number:
        raise ZeroDivisionError(f"{what.number} by zero")


@app.task(queue="children", pool="process", max_attempts=1)
def start_a_program() -> None:
    """Told to end it ends, as it does outside of a child process."""
    with subprocess.Popen(["sleep", "60"]) as program:
        time.sleep(0.1)
        program.terminate()
        told.enqueue(f"ended with {program.wait(20)}")


@app.task(queue="children", pool="process")
def leave_a_thread() -> None:
    told.enqueue("begun")
    threading.Thread(target=time.sleep, args=(60,)).start()


@app.task(queue="children", pool="process", max_attempts=1)
def ask_late() -> None:
    """A thread of it enqueues when no job runs any more."""

    def ask() -> None:
        while running:
            time.sleep(0.001)
        time.sleep(0.2)
        try:
            told.enqueue("by a thread")
        except RivetQError as error:
            refused.append(str(error))

    refused.clear()
    running = [True]
    threading.Thread(target=ask, daemon=True).start()
    running.clear()


refused: list[str] = []


@app.task(queue="children", pool="process", max_attempts=1)
def tell_refused() -> None:
    for error in refused:
        told.enqueue(error)


@app.task(queue="children", pool="process", max_attempts=1)
def use_multiprocessing() -> None:
    child = multiprocessing.Process(target=os._exit, args=(7,))
    child.start()
    child.join()
    told.enqueue(f"exit code {child.exitcode}")


def pause(seconds: float) -> None:
    time.sleep(seconds)


short_pause = app.task(name="short", queue="children", pool="process", time_limit=0.3, max_attempts=1)(pause)
long_pause = app.task(name="long", queue="children", pool="process", max_attempts=1)(pause)


@app.task(queue="children", pool="process", time_limit=0.5, max_attempts=1)
def log_without_end() -> None:
    while True:
        logging.getLogger("shop").warning("still here")


@app.task(queue="children", pool="process", max_attempts=1)
def end_a_fork() -> None:
    """What it forks is told to end, as a pool of multiprocessing tells its workers, and ends."""
    forked = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    forked.start()
    forked.terminate()
    forked.join(20)
    told.options(queue="new to the parent").enqueue(f"exit code {forked.exitcode}")
