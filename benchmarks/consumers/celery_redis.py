"""Celery: its worker with a pool of 8 threads (-P threads -c 8), without results, events, gossip and heartbeats.

A message is acked before its task runs (the default): what a worker dies with is gone.
"""

from __future__ import annotations

import importlib
from typing import Any

from meter import QUEUE, THREADS, Meter, asked

PREFETCH = 64  # messages a thread; the default is 4


def main() -> None:
    this = asked()
    meter = Meter(this.jobs, this.report)
    celery: Any = importlib.import_module("celery")
    app = celery.Celery(QUEUE, broker=f"redis+socket://{this.place}")
    app.conf.update(
        task_default_queue=QUEUE,
        task_ignore_result=True,
        worker_prefetch_multiplier=PREFETCH,
        worker_disable_rate_limits=True,
        broker_connection_retry_on_startup=True,
    )

    def run(n: int) -> None:
        meter.done(n)

    noop = app.task(run, name="noop")
    if this.fill:
        with app.producer_pool.acquire(block=True) as producer:
            for n in range(this.jobs):
                noop.apply_async((n,), producer=producer)
        return
    options = ["--loglevel=ERROR", "--without-gossip", "--without-mingle", "--without-heartbeat"]
    app.worker_main(["worker", "--pool=threads", f"--concurrency={THREADS}", *options])


if __name__ == "__main__":
    main()
