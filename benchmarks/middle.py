"""What it costs to take jobs out of the middle of a backlog, beside an enqueue: the bar is 20 us above that.

Each verb is timed at random places of a large backlog, with `fsync="never"`; the rounds of all verbs take turns.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import machine

from rivetq import Broker

MOST_US = 20.0
"""The bar: so much more than an enqueue, of the processor."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=200_000)
    parser.add_argument("--calls", type=int, default=200, help="of each verb in each round")
    parser.add_argument("--rounds", type=int, default=15)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="rivetq-middle-") as name:
        for fact, value in machine.facts(Path(name)).items():
            print(f"{fact}: {value}")
        with Broker(Path(name) / "data", fsync="never") as broker:
            rows = measured(broker, given.jobs, given.calls, given.rounds)
    print(f"\nus of the processor a call, medians of {given.rounds} rounds; {given.jobs:,} jobs wait")
    enqueue = rows["enqueue"]
    for verb, us in rows.items():
        print(f"{verb:34} {us:7.1f}" + ("" if verb == "enqueue" else f"  {us - enqueue:+6.1f}"))
    return int(max(rows.values()) - enqueue > MOST_US)


def measured(broker: Broker, jobs: int, calls: int, rounds: int) -> dict[str, float]:
    """Microseconds a call by verb."""
    draw = random.Random(1)
    ready = fill(broker, "ready", jobs)
    later = fill(broker, "later", jobs, delay=86_400)
    dead = fill(broker, "dead", jobs // 4)
    while leases := broker.lease_many("dead", 1000):
        with broker.transaction() as tx:
            for lease in leases:
                tx.reject(lease)
    broker.checkpoint()
    for ids in (ready, later, dead):
        draw.shuffle(ids)

    def purge(_: int) -> None:
        broker.purge("few")

    def one_by_id(job_id: int) -> None:
        broker.redrive("dead", job_ids=[job_id])

    verbs: dict[str, tuple[Callable[[int], object], list[int]]] = {
        "enqueue": (lambda _: broker.enqueue("other", b"x" * 100), [0] * len(ready)),
        "cancel of a ready job": (broker.cancel, ready),
        "cancel of a scheduled job": (broker.cancel, later),
        "cancel of a dead letter": (broker.cancel, dead),
        "redrive of one by id": (one_by_id, dead),
        "purge of three": (purge, [0] * len(ready)),
    }
    found: dict[str, list[float]] = {verb: [] for verb in verbs}
    for _ in range(rounds):
        for verb, (call, ids) in verbs.items():
            spent = 0.0
            for _ in range(calls):
                job_id = ids.pop()
                if call is purge:
                    broker.enqueue_many("few", [b"x"] * 3)
                began = time.thread_time()
                call(job_id)
                spent += time.thread_time() - began
            found[verb].append(spent / calls * 1e6)
    return {verb: statistics.median(times) for verb, times in found.items()}


def fill(broker: Broker, queue: str, count: int, delay: float = 0) -> list[int]:
    ids: list[int] = []
    for _ in range(0, count, 1000):
        ids += broker.enqueue_many(queue, [b"x" * 100] * 1000, delay=delay)
    return ids


if __name__ == "__main__":
    sys.exit(main())
