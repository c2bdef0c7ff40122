"""An app for a worker process: a task of each kind, what may become of a job, and a task that the clock enqueues.

    cd examples && rivetq worker worker_app:app    # the command line
    python examples/worker_app.py [DIRECTORY]      # the same by hand, with jobs to begin with

Ctrl-C or SIGTERM ends either in order: jobs that run get a few seconds to end, the others are given back, and the exit
status is 0. A supervisor (systemd, a container) only has to send SIGTERM and wait.

One process owns a directory, so the jobs of a worker process come from itself: from its schedules, from its tasks, and
from whatever was enqueued before it began. In a web server the worker runs beside the views: flask_app.py.
"""

from __future__ import annotations

import asyncio
import sys
import time

from rivetq import RetryPolicy
from rivetq.tasks import App, Reject, Retry, Snooze, current_job, every
from rivetq.worker import Worker

app = App("data")
rang: set[int] = set()
"""Jobs that found nobody in."""


def say(text: str) -> None:
    print(f"job {current_job().id}, attempt {current_job().attempt}: {text}", flush=True)


@app.task(queue="files")
def copy(megabytes: int) -> None:
    """In a thread, which nobody can stop from outside: one that runs for long looks whether it should."""
    for _ in range(megabytes):
        if current_job().cancelled:
            return
        if current_job().stopping:  # the worker ends: better to begin again later than to be cut off
            raise Snooze(0)
        time.sleep(0.001)
    say(f"copied {megabytes} MB")


@app.task(queue="web", time_limit=30)
async def fetch(url: str) -> None:
    """In the worker's event loop, a hundred at a time; when its time is over it is cancelled."""
    await asyncio.sleep(0.05)
    say(f"fetched {url}")


@app.task(queue="numbers", pool="process", time_limit=60)
def count_primes(below: int) -> None:
    """In a child process, on a processor of its own; when its time is over that is killed."""
    primes = [n for n in range(2, below) if all(n % d for d in range(2, int(n**0.5) + 1))]
    say(f"{len(primes)} primes below {below}")


@app.task(queue="orders", retry=RetryPolicy(max_attempts=4, base=0.1))
def deliver(address: str) -> None:
    """What a handler can say, besides that it is done. Any other exception is a Retry with the policy's delay."""
    match address:
        case "nowhere":
            say("rejected: a dead letter now")
            raise Reject("no such address")
        case "at lunch" if current_job().id not in rang:
            rang.add(current_job().id)
            say("snoozed: again a bit later, and this attempt is not counted")
            raise Snooze(0.1)
        case "far away" if current_job().attempt == 1:
            say("failed: another attempt, in a tenth of a second and not when the policy says")
            raise Retry(0.1, error="the road is closed")
        case _:
            say(f"delivered: {address}")


@app.periodic(every(10))
@app.task(queue="plans")
def plan() -> None:
    """By the clock. What it enqueues is one transaction, so an attempt that fails half-way has enqueued nothing."""
    with app.broker.transaction() as tx:
        copy.options(transaction=tx).enqueue(100)
        fetch.options(transaction=tx).enqueue("https://example.org/")
        count_primes.options(transaction=tx).enqueue(20_000)
        deliver.options(transaction=tx).enqueue_many([("Main Street 1",), ("far away",), ("at lunch",), ("nowhere",)])
    say("planned")


if __name__ == "__main__":
    app.use(sys.argv[1] if len(sys.argv) > 1 else "data")
    plan.enqueue()  # the first one does not wait for the clock
    sys.exit(Worker(app, concurrency={"threads": 4, "processes": 1, "tasks": 100}, grace=5).run())
