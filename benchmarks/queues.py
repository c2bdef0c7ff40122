"""What beginning a segment and taking a checkpoint cost with few queues and with many: the bar is twice as much.

Both directories are open at once, and the calls take turns, so that they meet the same machine.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import machine

from rivetq import Broker

MOST = 2.0
"""The bar: so many times the cost with few queues."""


def opened(path: Path, queues: int) -> Broker:
    """A broker with this many queues, each with a configuration and a waiting job, all of it in the index."""
    broker = Broker(path, fsync="never")
    for n in range(queues):
        broker.configure_queue(f"tenant-{n}", max_jobs=1000 + n)
        broker.enqueue(f"tenant-{n}", b"x")
    broker.checkpoint()
    broker.rotate()
    return broker


def seconds(broker: Broker, verb: str) -> tuple[float, float]:
    """Of one call after some jobs went through one queue: by the clock, and of the processor."""
    for _ in range(10):
        broker.enqueue("tenant-1", b"x")
    began, worked = time.perf_counter(), time.thread_time()
    getattr(broker, verb)()
    return time.perf_counter() - began, time.thread_time() - worked


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--few", type=int, default=5)
    parser.add_argument("--many", type=int, default=5_000)
    parser.add_argument("--rounds", type=int, default=40)
    given = parser.parse_args()
    over = False
    with tempfile.TemporaryDirectory(prefix="rivetq-queues-") as name:
        for fact, value in machine.facts(Path(name)).items():
            print(f"{fact}: {value}")
        few, many = (opened(Path(name) / str(count), count) for count in (given.few, given.many))
        print(f"\nmedians of {given.rounds}, ms (of the processor); {given.few:,} and {given.many:,} queues")
        for verb in ("checkpoint", "rotate"):  # many segments call the keeper, which would take turns with a checkpoint
            found: list[list[tuple[float, float]]] = [[], []]
            for _ in range(given.rounds):
                for broker, times in zip((few, many), found, strict=True):
                    times.append(seconds(broker, verb))
            (a, cpu_a), (b, cpu_b) = ([statistics.median(each) for each in zip(*times, strict=True)] for times in found)
            print(
                f"{verb:12} {a * 1e3:8.2f} ({cpu_a * 1e3:.2f})  {b * 1e3:8.2f} ({cpu_b * 1e3:.2f})"
                f"  {b / a:.2f} times ({cpu_b / cpu_a:.2f})"
            )
            over |= b > MOST * a
        few.close()
        many.close()
    return int(over)


if __name__ == "__main__":
    sys.exit(main())
