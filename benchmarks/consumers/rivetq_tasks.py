"""RivetQ: the worker of an app with a directory, durable (the default): a job is acked when that is on the disk.

Variants: `threads` has a function, which runs in 8 threads; `asyncio` a coroutine function, of which 100 run at a time.
"""

from __future__ import annotations

from meter import FILL_BATCH, QUEUE, THREADS, Meter, asked

from rivetq.tasks import App
from rivetq.worker import Worker

TASKS = 100


def main() -> None:
    this = asked()
    meter = Meter(this.jobs, this.report)
    app = App(this.place)

    def noop(n: int) -> None:
        meter.done(n)

    async def anoop(n: int) -> None:
        meter.done(n)

    # Only the one that is measured: a worker shares its room among the kinds of tasks that a queue may have.
    named = app.task(queue=QUEUE, name="noop")
    task = named(noop) if this.variant == "threads" else named(anoop)
    if this.fill:
        for first in range(0, this.jobs, FILL_BATCH):
            task.enqueue_many([(n,) for n in range(first, min(first + FILL_BATCH, this.jobs))])
        app.close()
        return
    Worker(app, queues=[QUEUE], concurrency={"threads": THREADS, "tasks": TASKS}).run()


if __name__ == "__main__":
    main()
