"""The workloads: what is done, in short rounds, on a queue that has been opened for it.

A lane is one contestant in one workload. It is opened once and asked for one round after the other, so that the rounds
of all the lanes of a workload can alternate. Filling a queue that a round is to drain is not counted, nor is what the
system's manual tells its user to do now and then.
"""

from __future__ import annotations

import os
import queue
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Protocol

from contestants import Abilities, Queue
from raw import RawFile

FRAME_BYTES = 110  # what a log adds to a record, about
ANSWER_BYTES = 16  # what one job costs in the record of a lease or an ack, about
SMALL_BYTES, LARGE_BYTES = 256, 1024
LEASE_BATCH, ENQUEUE_BATCHES = 100, (100, 1000)
MANY_THREADS = (8, 32)
PAIR = 2  # producers, and consumers, of the workload where both run
PACED_PER_S = 200
STAMP_BYTES = 8  # at the head of a paced job's payload: when its enqueue began
SHORT_WAIT_S = 0.05  # a consumer at full speed looks up this often whether all is done
PATIENCE_S = 60.0  # a round that takes longer counts as stuck


class Kind(StrEnum):
    ENQUEUE = "enqueue"
    DRAIN = "drain"
    THROUGH = "through"
    PACED = "paced"


@dataclass(frozen=True)
class Workload:
    """One line of the table."""

    kind: Kind
    durable: bool
    threads: int = 1
    batch: int = 1
    payload_bytes: int = SMALL_BYTES

    @property
    def title(self) -> str:
        match self.kind:
            case Kind.ENQUEUE if self.batch > 1:
                return f"enqueue_many({self.batch})"
            case Kind.ENQUEUE:
                return f"enqueue, {self.threads} thread{'s' if self.threads > 1 else ''}"
            case Kind.DRAIN:
                return f"lease + ack, by {self.batch}"
            case Kind.THROUGH:
                return f"{PAIR} + {PAIR} threads, by {self.batch}"
            case Kind.PACED:
                return f"paced, {PACED_PER_S}/s"

    @property
    def name(self) -> str:
        """For --only and the JSON."""
        return f"{'durable' if self.durable else 'relaxed'} {self.title}, {self.payload_bytes} B"

    @property
    def commit_bytes(self) -> int:
        """What one durable commit writes, at least; 0 where a bare file says nothing about the workload."""
        if not self.durable:
            return 0
        match self.kind:
            case Kind.ENQUEUE:
                return self.batch * self.payload_bytes + FRAME_BYTES
            case Kind.DRAIN:
                return 2 * (FRAME_BYTES + self.batch * ANSWER_BYTES)
            case _:
                return 0

    def asks_too_much(self, abilities: Abilities) -> str | None:
        """Why a contestant cannot do this; None if it can."""
        if self.durable and not abilities.durable:
            return "it has no durable mode"
        enqueues, leases = self.kind is not Kind.DRAIN, self.kind in (Kind.DRAIN, Kind.THROUGH)
        if self.batch > 1 and enqueues and not abilities.enqueue_batches:
            return "it enqueues one job a commit"
        if self.batch > 1 and leases and not abilities.lease_batches:
            return "it leases one job a commit"
        return None


def workloads_of(payload_bytes: int) -> Iterator[Workload]:
    for durable in (True, False):
        base = Workload(Kind.ENQUEUE, durable, payload_bytes=payload_bytes)
        yield base
        yield from (replace(base, threads=threads) for threads in MANY_THREADS)
        yield from (replace(base, batch=batch) for batch in ENQUEUE_BATCHES)
        yield from (replace(base, kind=Kind.DRAIN, batch=batch) for batch in (1, LEASE_BATCH))
        yield from (replace(base, kind=Kind.THROUGH, batch=batch, threads=2 * PAIR) for batch in (1, LEASE_BATCH))
        yield replace(base, kind=Kind.PACED, threads=2)


@dataclass(frozen=True)
class Round:
    """What one lane did in one round. Records and syncs are those that the log itself counts, where it does."""

    jobs: int
    seconds: float
    records: int = 0
    syncs: int = 0
    p50_ms: float = 0.0
    p99_ms: float = 0.0

    @property
    def rate(self) -> float:
        return self.jobs / self.seconds


# -- threads ----------------------------------------------------------------------------------------------------------


class Crew:
    """Threads that live as long as the lane, since a client opens a connection for each thread that it meets."""

    def __init__(self, size: int) -> None:
        self._inboxes: list[queue.SimpleQueue[Callable[[], int] | None]] = [queue.SimpleQueue() for _ in range(size)]
        self._outbox: queue.SimpleQueue[int | BaseException] = queue.SimpleQueue()
        self._start = threading.Barrier(size + 1)
        for number, inbox in enumerate(self._inboxes):
            # Daemons: a peer that never returns from a call must not keep the benchmark from ending.
            threading.Thread(target=self._live, args=(inbox,), name=f"bench-{number}", daemon=True).start()

    def run(self, works: Sequence[Callable[[], int]]) -> list[int]:
        """Start all works at one moment; what they returned. The first failure is raised when all have ended."""
        for inbox, work in zip(self._inboxes, works, strict=True):
            inbox.put(work)
        self._start.wait(PATIENCE_S)
        until = time.monotonic() + PATIENCE_S
        results: list[int | BaseException] = []
        for _ in works:
            try:
                results.append(self._outbox.get(timeout=max(0.0, until - time.monotonic())))
            except queue.Empty:
                raise TimeoutError(f"a thread was stuck for {PATIENCE_S:.0f} s") from None
        for result in results:
            if isinstance(result, BaseException):
                raise result
        return [result for result in results if isinstance(result, int)]

    def close(self) -> None:
        for inbox in self._inboxes:
            inbox.put(None)

    def _live(self, inbox: queue.SimpleQueue[Callable[[], int] | None]) -> None:
        while (work := inbox.get()) is not None:
            self._start.wait(PATIENCE_S)
            try:
                self._outbox.put(work())
            except BaseException as error:
                self._outbox.put(error)


# -- lanes ------------------------------------------------------------------------------------------------------------


class Lane(Protocol):
    def round(self, seconds: float) -> Round: ...
    def close(self) -> None: ...


class RawLane:
    """The bare file, with the bytes of one commit of the workload."""

    def __init__(self, workload: Workload, directory: Path) -> None:
        self._jobs_per_commit = workload.batch
        self._file = RawFile(directory / "raw", workload.commit_bytes)

    def round(self, seconds: float) -> Round:
        commits, started = 0, time.perf_counter()
        while (now := time.perf_counter()) < started + seconds:
            self._file.commit()
            commits += 1
        return Round(commits * self._jobs_per_commit, now - started)

    def close(self) -> None:
        self._file.close()


def lane_for(workload: Workload, opened: Queue) -> Lane:
    match workload.kind:
        case Kind.ENQUEUE:
            return EnqueueLane(workload, opened)
        case Kind.DRAIN:
            return DrainLane(workload, opened)
        case Kind.THROUGH:
            return ThroughLane(workload, opened)
        case Kind.PACED:
            return PacedLane(workload, opened)


class QueueLane:
    """What the lanes of all queues share."""

    def __init__(self, workload: Workload, opened: Queue) -> None:
        self.workload = workload
        self.queue = opened
        # Different bytes for each job of a batch, so that no layer can win by compressing or sharing them.
        self.payloads = [os.urandom(workload.payload_bytes) for _ in range(max(ENQUEUE_BATCHES))]
        self.crew = Crew(workload.threads)

    def round(self, seconds: float) -> Round:
        records, syncs = self.queue.counters()
        done = self.work(seconds)
        records_now, syncs_now = self.queue.counters()
        self.queue.tidy()
        if not done.jobs:
            raise RuntimeError("no job went through in a round")
        return replace(done, records=records_now - records, syncs=syncs_now - syncs)

    def work(self, seconds: float) -> Round:
        raise NotImplementedError

    def close(self) -> None:
        self.crew.close()
        self.queue.close()


class EnqueueLane(QueueLane):
    """As many as possible in the time, in as many threads as the workload says."""

    def work(self, seconds: float) -> Round:
        batch, enqueue, enqueue_many = self.workload.batch, self.queue.enqueue, self.queue.enqueue_many
        payloads = self.payloads[:batch] if batch > 1 else self.payloads
        started = time.perf_counter()  # again when the threads start; a margin of some microseconds

        def run() -> int:
            jobs, until = 0, time.perf_counter() + seconds
            while time.perf_counter() < until:
                if batch > 1:
                    enqueue_many(payloads)
                else:
                    enqueue(payloads[jobs % len(payloads)])
                jobs += batch
            return jobs

        jobs = sum(self.crew.run([run] * self.workload.threads))
        return Round(jobs, time.perf_counter() - started)


class DrainLane(QueueLane):
    """Lease and ack, from a queue that has more than enough."""

    def __init__(self, workload: Workload, opened: Queue) -> None:
        super().__init__(workload, opened)
        self._waiting = 0
        self._fastest = 0.0

    def work(self, seconds: float) -> Round:
        self._fill(seconds)
        batch, lease, ack = self.workload.batch, self.queue.lease, self.queue.ack
        took: list[float] = []

        def run() -> int:
            jobs, started = 0, time.perf_counter()
            while time.perf_counter() < started + seconds and (deliveries := lease(batch)):
                ack(deliveries)
                jobs += len(deliveries)
            took.append(time.perf_counter() - started)
            return jobs

        (jobs,) = self.crew.run([run])
        self._waiting -= jobs
        done = Round(jobs, took[0])
        self._fastest = max(self._fastest, done.rate)
        return done

    def _fill(self, seconds: float) -> None:
        """Have more jobs waiting than the round can drain, by the fastest round so far. A round that still runs dry
        is merely shorter, and its rate is as right."""
        wanted = max(5 * self.workload.batch, 500, int(1.5 * self._fastest * seconds))
        while self._waiting < wanted:
            jobs = min(len(self.payloads), wanted - self._waiting)
            self.queue.enqueue_many(self.payloads[:jobs])
            self._waiting += jobs


class ThroughLane(QueueLane):
    """Producers and consumers at once. The round is a number of jobs, and ends with the last ack: a system that lets
    one side starve the other wins nothing. The number is what the last round would have done in the time."""

    def __init__(self, workload: Workload, opened: Queue) -> None:
        super().__init__(workload, opened)
        self._rate = 0.0

    def work(self, seconds: float) -> Round:
        batch, wanted = self.workload.batch, int(self._rate * seconds)
        batches = max(2, wanted // (PAIR * batch))  # for each producer
        jobs, patience = batches * PAIR * batch, time.perf_counter() + PATIENCE_S / 2
        acked, lock = 0, threading.Lock()  # guards acked and ended
        ended = 0.0
        payloads = self.payloads[:batch] if batch > 1 else self.payloads
        failed = threading.Event()

        def produce() -> int:
            with setting_if_it_fails(failed):
                for number in range(batches):
                    if batch > 1:
                        self.queue.enqueue_many(payloads)
                    else:
                        self.queue.enqueue(payloads[number % len(payloads)])
            return batches * batch

        def consume() -> int:
            nonlocal acked, ended
            mine = 0
            while acked < jobs and not failed.is_set():
                if deliveries := self.queue.lease(batch, SHORT_WAIT_S):
                    self.queue.ack(deliveries)
                    mine += len(deliveries)
                    with lock:
                        acked += len(deliveries)
                        ended = time.perf_counter()
                elif time.perf_counter() > patience:
                    raise TimeoutError(f"only {acked} of {jobs} jobs came through")
            return mine

        started = time.perf_counter()
        self.crew.run([produce] * PAIR + [consume] * PAIR)
        done = Round(acked, ended - started)
        self._rate = done.rate
        return done


class PacedLane(QueueLane):
    """A producer at a modest rate and a consumer that waits; from just before the enqueue to the job in hand."""

    def work(self, seconds: float) -> Round:
        jobs = max(1, int(PACED_PER_S * seconds))
        patience = time.perf_counter() + seconds + PATIENCE_S / 2
        filler = self.payloads[0][STAMP_BYTES:]
        latencies_ns: list[int] = []
        failed = threading.Event()

        def produce() -> int:
            began = time.perf_counter()
            with setting_if_it_fails(failed):
                for number in range(jobs):
                    if (early := began + number / PACED_PER_S - time.perf_counter()) > 0:
                        time.sleep(early)
                    self.queue.enqueue(time.perf_counter_ns().to_bytes(STAMP_BYTES, "big") + filler)
            return 0

        def consume() -> int:
            while len(latencies_ns) < jobs and not failed.is_set():
                if deliveries := self.queue.lease(1, 1.0):
                    now = time.perf_counter_ns()
                    for delivery in deliveries:
                        stamp = self.queue.payload(delivery)[:STAMP_BYTES]
                        latencies_ns.append(now - int.from_bytes(stamp, "big"))
                    self.queue.ack(deliveries)
                elif time.perf_counter() > patience:
                    raise TimeoutError(f"only {len(latencies_ns)} of {jobs} jobs came")
            return 0

        started = time.perf_counter()
        self.crew.run([produce, consume])
        seconds = time.perf_counter() - started
        return Round(
            jobs, seconds, p50_ms=statistics.median(latencies_ns) / 1e6, p99_ms=percentile(latencies_ns, 99) / 1e6
        )


@contextmanager
def setting_if_it_fails(failed: threading.Event) -> Iterator[None]:
    """So that the consumers do not wait for what a failed producer will not bring."""
    try:
        yield
    except BaseException:
        failed.set()
        raise


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that at least so many percent do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, -int(-len(ordered) * percent // 100) - 1)]
