"""taskiq: one worker process with an async handler, 100 at a time (its default), and no result backend.

The broker is the one on a stream, which takes a hundred jobs at a time and acks each; its broker on a list takes one by
one, forgets it, and is slower. This runs what `taskiq worker` runs in each of its processes, with --no-parse: without
the conversion of arguments by pydantic.
"""

from __future__ import annotations

import asyncio
import importlib
from typing import Any

from meter import FILL_BATCH, QUEUE, Meter, asked

CONNECTIONS = 32
STOP_S = 0.5


async def fill(broker: Any, noop: Any, jobs: int) -> None:
    await broker.startup()  # makes the consumer group, which gets what comes after that
    for first in range(0, jobs, FILL_BATCH):
        await asyncio.gather(*(noop.kiq(n) for n in range(first, min(first + FILL_BATCH, jobs))))
    await broker.shutdown()


def main() -> None:
    this = asked()
    meter = Meter(this.jobs, this.report)
    brokers: Any = importlib.import_module("taskiq_redis")
    broker = brokers.RedisStreamBroker(f"unix://{this.place}", queue_name=QUEUE, max_connection_pool_size=CONNECTIONS)

    async def run(n: int) -> None:
        meter.done(n)

    noop = broker.register_task(run, task_name="noop")
    if this.fill:
        asyncio.run(fill(broker, noop, this.jobs))
        return
    arguments: Any = importlib.import_module("taskiq.cli.worker.args")
    worker: Any = importlib.import_module("taskiq.cli.worker.run")
    options = arguments.WorkerArgs(
        broker=broker,
        modules=[],
        workers=1,
        no_parse=True,
        configure_logging=False,
        shutdown_timeout=STOP_S,
        hardkill_count=-1,  # the first SIGTERM ends it: while it waits for a next job it does not end in order
    )
    worker.start_listen(options)


if __name__ == "__main__":
    main()
