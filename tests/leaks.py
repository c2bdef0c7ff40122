"""Jobs through every way that they can go, for a long time: what the process holds must stay flat.

    python tests/leaks.py --jobs 1000000

Worker threads, an event loop and child processes work jobs off; others are polled for, cancelled, delayed, dead and
redriven, listed, waited for in vain. After each round of the same work it prints memory, threads, descriptors and what
the engine holds.
Exit status 1 if the last rounds hold more than those after the first third.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import sys
import tempfile
import threading
from pathlib import Path

import worker_tasks
from closing import children_of_this_process
from simulation import ViolationError, fast_directory

from rivetq import Broker, RateLimit
from rivetq.aio import AsyncBroker
from rivetq.engines.local import LocalEngine
from rivetq.storage.ahead import SLOTS
from rivetq.tasks import App
from rivetq.worker import Settled, Worker

ROUNDS = 12
MIB = 2**20
MEMORY_MIB = 16
"""What the allocator and a segment that is just read may differ by, from round to round."""
LIMITS = {"ahead": SLOTS}
"""What may grow up to here by design: slots of leases that ended are swept when there are no more."""
PROCESS_SHARE = 20
"""One in so many jobs goes through a child process, where a job takes far longer than in a thread."""
SLACKS = {"MiB": MEMORY_MIB, "threads": 0, "children": 0, "descriptors": 2}
SLACK = 64
"""Of things in memory: what a background thread has in hand."""


def held(broker: Broker) -> dict[str, int]:
    """What the process and the engine hold."""
    engine = broker._engine
    assert isinstance(engine, LocalEngine)
    gc.collect()
    machine, soon = engine._machine, engine._soon
    with engine._lock:
        found = {
            "due": len(machine.due), "deadlines": len(machine.deadlines), "tokens": len(machine.tokens),
            "promised": len(machine.promised), "jobs": len(machine.jobs), "keys": len(machine.keys.changed),
            "lessees": sum(map(len, engine._lessees.lines.values())), "ahead": len(engine._ahead._slots),
            "callbacks": 0 if soon is None else len(soon._later) + len(soon._records),
            "watched": len(broker._watched), "group": len(engine._group._waiters),
        }  # fmt: skip
    return {
        "MiB": int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") // MIB,
        "threads": threading.active_count(),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "children": len(children_of_this_process()),
        **found,
    }


class Traffic:
    """The same work again and again, on one broker with one worker."""

    def __init__(self, directory: Path) -> None:
        # A small cache is soon full: one of 64 MiB fills for half a million jobs, and that looks like a leak.
        self.broker = Broker(directory / "data", fsync="never", segment_bytes=MIB, cache_bytes=MIB)
        self.app = App(self.broker)
        self._done = threading.Condition()
        self._left = 0

        @self.app.task
        def in_thread(number: int) -> None:
            pass

        @self.app.task
        async def in_loop(number: int) -> None:
            pass

        self.tasks = (in_thread, in_loop)
        self.in_process = self.app.task(name="in_process", pool="process")(worker_tasks.pause)
        self.broker.configure_queue("slow", rate_limit=RateLimit(0.00001, 1), idempotency_ttl=0)
        self.broker.configure_queue("plain", idempotency_ttl=0)

    def _settled(self, settled: Settled) -> None:
        with self._done:
            self._left -= settled.ending == "ack"
            self._done.notify_all()

    def round(self, jobs: int) -> None:
        """So many jobs, half of them through the worker."""
        quarter = max(jobs // 4, 10)
        with Worker(self.app, concurrency=2) as worker:
            worker.on_settled.append(self._settled)
            with self._done:
                self._left = 2 * quarter + max(jobs // PROCESS_SHARE, 2)
            self.in_process.enqueue_many([(0.0,)] * max(jobs // PROCESS_SHARE, 2))
            for task in self.tasks:
                for start in range(0, quarter, 500):
                    task.enqueue_many([(number,) for number in range(start, min(start + 500, quarter))])
            with self._done:
                if not self._done.wait_for(lambda: self._left <= 0, 600):
                    raise ViolationError(f"{self._left} jobs were not worked on")
        self._plain(quarter)
        asyncio.run(self._awaited(quarter))
        self.broker.checkpoint()
        self.broker.compact()

    def _plain(self, jobs: int) -> None:
        broker = self.broker
        for start in range(0, jobs, 100):
            ids = broker.enqueue_many("plain", [b"x"] * 60)
            for job_id in ids[:10]:
                broker.cancel(job_id)
            late = broker.enqueue_many("plain", [b"y"] * 20, delay=86_400)
            for job_id in late:
                broker.cancel(job_id)
            broker.enqueue_many("plain", [b"z"] * 10, idempotency_keys=[f"{start} {n}" for n in range(10)])
            broker.enqueue("slow", b"")
            leases = broker.lease_many("plain", 60, begun=False)
            for lease in leases[:30]:
                broker.begin(broker.extend(lease, 1000))
            broker.reject(leases.pop())
            broker.redrive("plain")
            broker.jobs("plain", limit=20)
            broker.get(leases[0].id)
            broker.ack_many(leases)
            broker.ack_many(broker.lease_many("plain", 100))
            with broker.transaction() as tx:
                tx.enqueue("plain", b"t")
            broker.purge("plain")
            for _ in range(20):
                broker.lease("slow")
                broker.lease_soon(["slow", "empty"], 1, lambda leases, error: None).cancel()
            broker.purge("slow")

    async def _awaited(self, jobs: int) -> None:
        aio = AsyncBroker(self.broker)
        for _ in range(0, jobs, 50):
            waits = [asyncio.create_task(aio.lease("awaited", wait=None)) for _ in range(50)]
            await asyncio.sleep(0)
            await aio.enqueue_many("awaited", [b"x"] * 40)
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            for task in waits:
                task.cancel()
            for found in await asyncio.gather(*waits, return_exceptions=True):
                if found is not None and not isinstance(found, BaseException):
                    await found.ack()
            await aio.purge("awaited")
        await aio.close()


def run(jobs: int, *, rounds: int = ROUNDS, tell: bool = False) -> None:
    """Raises ViolationError if something grows."""
    with tempfile.TemporaryDirectory(prefix="rivetq-leaks-", dir=fast_directory()) as directory:
        traffic = Traffic(Path(directory))
        seen = []
        with traffic.broker:
            for number in range(rounds):
                traffic.round(jobs // rounds)
                seen.append(held(traffic.broker))
                if tell:
                    print(
                        f"{(number + 1) * (jobs // rounds):>9,}", *(f"{n} {v}" for n, v in seen[-1].items()), flush=True
                    )
    before, after = seen[rounds // 3 : rounds // 3 + 2], seen[-2:]
    for name in seen[0]:
        low, high = max(each[name] for each in before), min(each[name] for each in after)
        if high > max(low, LIMITS.get(name, 0)) + SLACKS.get(name, SLACK):
            raise ViolationError(f"{name}: {low} after a third of the rounds, {high} at the end")


def main() -> None:
    parser = argparse.ArgumentParser(description="What the process holds stays flat.")
    parser.add_argument("--jobs", type=int, default=1_000_000)
    given = parser.parse_args()
    try:
        run(given.jobs, tell=True)
    except ViolationError as error:
        sys.exit(f"VIOLATION: {error}")
    print(f"leaks: {given.jobs:,} jobs: flat")


if __name__ == "__main__":
    main()
