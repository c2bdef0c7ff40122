"""dramatiq: its worker with 8 threads in this process, which is what its command runs in each of its processes.

With the middleware that it has by default, and no results. A message is acked when its actor has returned.
"""

from __future__ import annotations

import importlib
import os
import signal
from typing import Any

from meter import QUEUE, THREADS, Meter, asked

PREFETCH = 128  # messages; by default it is 16 for 8 threads, and half as fast
STOP_MS = 5000


def main() -> None:
    this = asked()
    meter = Meter(this.jobs, this.report)
    signals = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)  # threads inherit it: this one is to get them, by sigwait
    os.environ["dramatiq_queue_prefetch"] = str(PREFETCH)  # noqa: SIM112 - its name; it is read by the import
    dramatiq: Any = importlib.import_module("dramatiq")
    brokers: Any = importlib.import_module("dramatiq.brokers.redis")
    broker = brokers.RedisBroker(unix_socket_path=this.place)
    noop = dramatiq.actor(meter.done, actor_name="noop", queue_name=QUEUE, broker=broker)
    if this.fill:
        for n in range(this.jobs):
            noop.send(n)
        return
    worker = dramatiq.Worker(broker, worker_threads=THREADS)
    worker.start()
    signal.sigwait(signals)
    worker.stop(timeout=STOP_MS)
    broker.close()


if __name__ == "__main__":
    main()
