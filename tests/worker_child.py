"""A worker process under load, for test_worker_processes: `python worker_child.py DIRECTORY`.

It enqueues without end and works at the same time, in all three pools. Each line that it writes is one system call, so
it is whole if it is there: "enqueued ID..." after an answer, "ran ID" at the end of a handler.
"""

from __future__ import annotations

import asyncio
import os
import random
import sys
import threading
import time

from rivetq import RivetQError
from rivetq.tasks import App, current_job
from rivetq.worker import Worker

DIRECTORY = sys.argv[1]
GRACE_S = 2.0
app = App(DIRECTORY)


def say(line: str) -> None:
    fd = os.open(DIRECTORY + ".lines", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(fd, f"{line}\n".encode())
    os.close(fd)


def drawn(seconds: float) -> float:
    """One run in fifty outlasts any grace time: it must be given back, and will be short the next time."""
    return 60.0 if random.random() < 0.02 else seconds


@app.task(queue="threads")
def thread(seconds: float) -> None:
    time.sleep(drawn(seconds))
    say(f"ran {current_job().id}")


@app.task(queue="processes", pool="process")
def process(seconds: float) -> None:
    time.sleep(drawn(seconds))
    say(f"ran {current_job().id}")


@app.task(queue="loop")
async def loop(seconds: float) -> None:
    await asyncio.sleep(drawn(seconds))
    say(f"ran {current_job().id}")


def load() -> None:
    tasks = [thread, thread, loop, loop, process]
    while True:
        task = random.choice(tasks)
        seconds = [random.choice([0, 0.001, 0.01]) for _ in range(20)]
        try:
            ids = task.enqueue_many([(each,) for each in seconds])
        except RivetQError:
            return  # the worker has closed the broker
        say(f"enqueued {' '.join(map(str, ids))}")
        time.sleep(0.004)


if __name__ == "__main__":
    worker = Worker(app, concurrency={"threads": 4, "processes": 2, "tasks": 8}, grace=GRACE_S)
    app.broker  # open it before there are two threads that would
    threading.Thread(target=load, daemon=True).start()
    say("begun")
    sys.exit(worker.run())
