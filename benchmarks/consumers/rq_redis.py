"""RQ: a pool of SimpleWorkers, which run a job in their own process instead of forking one for it; no logging.

A job costs more than 25 round trips to Redis, each of them waited for. So one worker leaves most of the machine idle,
and the fastest pool has some more workers than there are cores.
"""

from __future__ import annotations

import importlib
import os
from typing import Any

from meter import FILL_BATCH, QUEUE, SharedMeter, asked

WORKERS = 2 * (os.cpu_count() or 1)

this = asked()
meter = SharedMeter(this.jobs, this.report)


def noop(n: int) -> None:
    """Workers import it from here, by its name."""
    meter.done(n)


def main() -> None:
    redis: Any = importlib.import_module("redis")
    rq: Any = importlib.import_module("rq")
    queue = rq.Queue(QUEUE, connection=redis.Redis(unix_socket_path=this.place))
    if this.fill:
        for first in range(0, this.jobs, FILL_BATCH):
            some = range(first, min(first + FILL_BATCH, this.jobs))
            queue.enqueue_many([rq.Queue.prepare_data("rq_redis.noop", (n,)) for n in some])
        return
    pools: Any = importlib.import_module("rq.worker_pool")
    pool = pools.WorkerPool([queue], queue.connection, num_workers=WORKERS, worker_class=rq.SimpleWorker)
    pool.start(logging_level="ERROR")


if __name__ == "__main__":
    main()
