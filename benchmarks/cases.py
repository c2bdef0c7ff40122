"""The cases of the benchmark: for each, the same work on RivetQ, on SQLite by hand and, if durable, on a bare file.

A lane is one contestant in one case: it is opened once, then asked for one short round of work after the other, so that
the rounds of all lanes of a case can alternate. Filling a queue that a round is to drain is not counted.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from raw import RawFile
from sqlite_by_hand import SqliteQueue

import rivetq

QUEUE = "bench"
PAYLOAD_BYTES = 256
FRAME_BYTES = 110  # what the log adds to a record, about
ANSWER_BYTES = 16  # what one job costs in the record of a lease or an ack, about
ENQUEUE_BATCH = 1000
LEASE_BATCH = 100
THREADS = 16

# Different bytes for each job, so that no layer can win by compressing or sharing them.
PAYLOADS = [os.urandom(PAYLOAD_BYTES) for _ in range(ENQUEUE_BATCH)]


class Round(NamedTuple):
    """What one lane did in one round. The log counters are those of RivetQ and 0 elsewhere."""

    jobs: int
    seconds: float
    records: int = 0
    fsyncs: int = 0

    @property
    def rate(self) -> float:
        return self.jobs / self.seconds


class Contestant(Protocol):
    """The five things that the cases do. A delivery is whatever `lease` gave."""

    def enqueue(self, payload: bytes) -> None: ...
    def enqueue_many(self, payloads: Sequence[bytes]) -> None: ...
    def lease(self, max_jobs: int) -> Sequence[Any]: ...
    def ack(self, deliveries: Sequence[Any]) -> None: ...
    def counters(self) -> tuple[int, int]: ...
    def close(self) -> None: ...


class OnRivetQ:
    def __init__(self, directory: Path, *, durable: bool) -> None:
        self._broker = rivetq.Broker(directory / "rivetq", fsync="always" if durable else "never")

    def enqueue(self, payload: bytes) -> None:
        self._broker.enqueue(QUEUE, payload)

    def enqueue_many(self, payloads: Sequence[bytes]) -> None:
        self._broker.enqueue_many(QUEUE, payloads)

    def lease(self, max_jobs: int) -> Sequence[rivetq.Lease]:
        if max_jobs > 1:
            return self._broker.lease_many(QUEUE, max_jobs)
        lease = self._broker.lease(QUEUE)
        return [] if lease is None else [lease]

    def ack(self, deliveries: Sequence[rivetq.Lease]) -> None:
        if len(deliveries) > 1:
            self._broker.ack_many(deliveries)
        else:
            self._broker.ack(deliveries[0])

    def counters(self) -> tuple[int, int]:
        counters = self._broker.metrics()
        return counters["records"], counters["fsyncs"]

    def close(self) -> None:
        self._broker.close()


class OnSqlite:
    def __init__(self, directory: Path, *, durable: bool) -> None:
        self._queue = SqliteQueue(directory / "queue.sqlite", durable=durable)

    def enqueue(self, payload: bytes) -> None:
        self._queue.enqueue(QUEUE, payload)

    def enqueue_many(self, payloads: Sequence[bytes]) -> None:
        self._queue.enqueue_many(QUEUE, payloads)

    def lease(self, max_jobs: int) -> Sequence[Any]:
        return self._queue.lease_many(QUEUE, max_jobs)

    def ack(self, deliveries: Sequence[Any]) -> None:
        self._queue.ack_many(deliveries)

    def counters(self) -> tuple[int, int]:
        return 0, 0

    def close(self) -> None:
        self._queue.close()


Work = Callable[[Contestant, float], int]  # works until the moment (of perf_counter), returns how many jobs


def enqueue_each(contestant: Contestant, until: float) -> int:
    jobs = 0
    while time.perf_counter() < until:
        contestant.enqueue(PAYLOADS[jobs % ENQUEUE_BATCH])
        jobs += 1
    return jobs


def enqueue_batches(contestant: Contestant, until: float) -> int:
    jobs = 0
    while time.perf_counter() < until:
        contestant.enqueue_many(PAYLOADS)
        jobs += ENQUEUE_BATCH
    return jobs


def lease_and_ack(contestant: Contestant, until: float, *, batch: int) -> int:
    jobs = 0
    while time.perf_counter() < until and (deliveries := contestant.lease(batch)):
        contestant.ack(deliveries)
        jobs += len(deliveries)
    return jobs


def lease_and_ack_each(contestant: Contestant, until: float) -> int:
    return lease_and_ack(contestant, until, batch=1)


def lease_and_ack_batches(contestant: Contestant, until: float) -> int:
    return lease_and_ack(contestant, until, batch=LEASE_BATCH)


@dataclass(frozen=True)
class Case:
    """One line of the table. `commit_bytes` is what a durable commit of it writes, for `jobs_per_commit` jobs."""

    name: str
    work: Work
    durable: bool = True
    threads: int = 1
    drains: bool = False
    commit_bytes: int = 0
    jobs_per_commit: int = 1


ONE_THREAD = Case("enqueue, 1 thread", enqueue_each, commit_bytes=PAYLOAD_BYTES + FRAME_BYTES)
MANY_THREADS = Case(
    f"enqueue, {THREADS} threads", enqueue_each, threads=THREADS, commit_bytes=PAYLOAD_BYTES + FRAME_BYTES
)

# The cases of one group alternate with each other: their figures are compared.
GROUPS: list[list[Case]] = [
    [ONE_THREAD, MANY_THREADS],
    [
        Case(
            f"enqueue_many({ENQUEUE_BATCH})",
            enqueue_batches,
            commit_bytes=ENQUEUE_BATCH * PAYLOAD_BYTES + FRAME_BYTES,
            jobs_per_commit=ENQUEUE_BATCH,
        )
    ],
    [
        Case(
            f"lease_many({LEASE_BATCH}) + ack_many",
            lease_and_ack_batches,
            drains=True,
            commit_bytes=2 * (FRAME_BYTES + LEASE_BATCH * ANSWER_BYTES),
            jobs_per_commit=LEASE_BATCH,
        )
    ],
    [Case("lease + ack", lease_and_ack_each, drains=True, commit_bytes=2 * (FRAME_BYTES + ANSWER_BYTES))],
    [Case("enqueue, 1 thread", enqueue_each, durable=False)],
    [Case(f"enqueue_many({ENQUEUE_BATCH})", enqueue_batches, durable=False)],
    [Case(f"lease_many({LEASE_BATCH}) + ack_many", lease_and_ack_batches, durable=False, drains=True)],
    [Case("lease + ack", lease_and_ack_each, durable=False, drains=True)],
]


class Lane(Protocol):
    """One contestant in one case."""

    def round(self, seconds: float) -> Round: ...
    def close(self) -> None: ...


class RawLane:
    """The bare file, with the bytes of one commit of the case."""

    def __init__(self, case: Case, directory: Path) -> None:
        self._case = case
        self._file = RawFile(directory / "raw", case.commit_bytes)

    def round(self, seconds: float) -> Round:
        commits, started = 0, time.perf_counter()
        while time.perf_counter() < started + seconds:
            self._file.commit()
            commits += 1
        return Round(commits * self._case.jobs_per_commit, time.perf_counter() - started)

    def close(self) -> None:
        self._file.close()


class QueueLane:
    """A queue at work on the case, in as many threads as the case asks for."""

    def __init__(self, case: Case, contestant: Contestant) -> None:
        self._case = case
        self._contestant = contestant
        self._waiting = 0
        self._fastest = 0.0

    def round(self, seconds: float) -> Round:
        if self._case.drains:
            self._fill(seconds)
        records, fsyncs = self._contestant.counters()
        jobs, elapsed = self._work(seconds)
        records_now, fsyncs_now = self._contestant.counters()
        if self._case.drains:
            self._waiting -= jobs
        this = Round(jobs, elapsed, records_now - records, fsyncs_now - fsyncs)
        self._fastest = max(self._fastest, this.rate)
        return this

    def close(self) -> None:
        self._contestant.close()

    def _fill(self, seconds: float) -> None:
        """Have more jobs waiting than the round can drain, by the fastest round so far. A round that still runs dry
        is merely shorter, and its rate is as right."""
        wanted = max(2 * ENQUEUE_BATCH, int(1.5 * self._fastest * seconds))
        while self._waiting < wanted:
            self._contestant.enqueue_many(PAYLOADS)
            self._waiting += ENQUEUE_BATCH

    def _work(self, seconds: float) -> tuple[int, float]:
        started = time.perf_counter()
        if self._case.threads == 1:
            return self._case.work(self._contestant, started + seconds), time.perf_counter() - started
        counts: list[int] = []
        start = threading.Barrier(self._case.threads + 1)

        def run() -> None:
            start.wait()
            counts.append(self._case.work(self._contestant, time.perf_counter() + seconds))

        threads = [threading.Thread(target=run, name=f"bench-{n}") for n in range(self._case.threads)]
        for thread in threads:
            thread.start()
        start.wait()
        started = time.perf_counter()
        for thread in threads:
            thread.join()
        if len(counts) != len(threads):
            raise RuntimeError(f"{len(threads) - len(counts)} of {len(threads)} threads failed: see above")
        return sum(counts), time.perf_counter() - started
