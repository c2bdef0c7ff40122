"""RivetQ with many jobs (and SQLite by hand beside it): cost, memory, disk, opening, and the work done in between.

Each measurement is a process of its own, since memory is what most of them are about; this module is that process when
it is run as a program: `python scale.py STEP KIND DIR JOBS` prints one line of JSON. All in the relaxed mode, so that
the figures are those of the software and not of the disk. The parent only asks and collects.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

from contestants import QUEUE, Queue, RivetQueue
from machine import anon_kb, disk_bytes
from peers.sqlite_by_hand import SqliteQueue
from workloads import FRAME_BYTES, percentile

PAYLOAD_BYTES = 256
FILL_BATCH, DRAIN_BATCH, SMALL_BATCH = 1000, 1000, 100
CYCLES, SINGLES, FILLS, SMALL_BATCHES = 9, 300, 3, 10  # of the costs at a backlog, which a cycle leaves as it was
SAMPLE_S = 0.02
SQLITE_JOBS = 1_000_000  # more than this is RivetQ's alone
REBUILD_JOBS = 1_000_000
RIVETQ = "rivetq"
INDEX = "index"  # inside a broker's directory: a cache, which an opening rebuilds from the log if it is gone
CHURN_STANDING = 10_000
OLD_JOBS = 100
LIVE_BYTES = CHURN_STANDING * (PAYLOAD_BYTES + FRAME_BYTES)
DUE_PATIENCE_S = 10.0
ON_TIME_PER_S = 1000
STEP_S = 3600.0
BYTES_A_JOB = 1200  # of disk, on the safe side: payload, frame, index, and what waits to be compacted


@dataclass(frozen=True)
class Plan:
    backlogs: tuple[int, ...]
    due_jobs: int
    churn_jobs: int
    pause_jobs: int
    pause_s: float


QUICK = Plan(backlogs=(10_000, 100_000), due_jobs=20_000, churn_jobs=100_000, pause_jobs=100_000, pause_s=1.5)
FULL = Plan(
    backlogs=(10_000, 100_000, 1_000_000, 10_000_000),
    due_jobs=100_000,
    churn_jobs=1_000_000,
    pause_jobs=100_000,
    pause_s=6.0,
)

Step = tuple[str, Callable[[Path], dict[str, Any]]]


def steps(plan: Plan) -> Iterator[Step]:
    """Names and measurements, in order; the caller gives each an empty directory and takes its failure."""
    for jobs in plan.backlogs:
        for kind in ("rivetq", "sqlite") if jobs <= SQLITE_JOBS else ("rivetq",):
            yield f"scale {kind} {jobs}", partial(at_backlog, kind, jobs)
    yield "due", partial(ask, "due", RIVETQ, plan.due_jobs)
    yield "churn", partial(ask, "churn", RIVETQ, plan.churn_jobs)
    for what in ("checkpoint", "compact"):
        yield f"pause {what}", partial(ask, f"pause-{what}", RIVETQ, plan.pause_jobs, seconds=plan.pause_s)


def at_backlog(kind: str, jobs: int, place: Path) -> dict[str, Any]:
    """Fill, open again, perhaps rebuild, drain: each by a process of its own, on the same directory."""
    if (free := shutil.disk_usage(place).free) < (needed := jobs * BYTES_A_JOB):
        raise RuntimeError(f"{jobs:,} jobs may need {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free")
    found = ask("fill", kind, jobs, place)
    found |= {f"open_{name}": value for name, value in ask("open", kind, jobs, place).items()}
    if kind == "rivetq" and jobs <= REBUILD_JOBS and (place / INDEX).is_dir():
        shutil.rmtree(place / INDEX)
        found |= {f"rebuild_{name}": value for name, value in ask("open", kind, jobs, place).items()}
    return found | ask("drain", kind, jobs, place)


def ask(step: str, kind: str, jobs: int, place: Path, *, seconds: float = 0) -> dict[str, Any]:
    command = [sys.executable, __file__, step, kind, str(place), str(jobs), str(seconds)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        out, errors = process.communicate(timeout=STEP_S)
    except BaseException:
        process.kill()
        process.wait()
        raise
    if process.returncode:
        raise RuntimeError((errors.strip().splitlines() or [f"{step} ended with {process.returncode}"])[-1])
    answer: dict[str, Any] = json.loads(out.splitlines()[-1])
    return answer


# -- the child: what it measures --------------------------------------------------------------------------------------


def open_queue(kind: str, place: Path) -> Queue:
    return RivetQueue(place, durable=False) if kind == "rivetq" else SqliteQueue(place / "queue.sqlite", durable=False)


def fill(kind: str, place: Path, jobs: int) -> dict[str, Any]:
    """Memory while filling and when full, disk use, and the cost of the calls at the backlog."""
    payloads = fresh_payloads()
    opened = open_queue(kind, place)
    empty_kb = anon_kb()
    with sampled_memory() as memory:
        started = time.perf_counter()
        for _ in range(jobs // FILL_BATCH):
            opened.enqueue_many(payloads)
        fill_s = time.perf_counter() - started
    full_kb = anon_kb()
    found = costs(opened, payloads)
    started = time.perf_counter()
    opened.close()
    return {
        **found,
        "fill_s": fill_s,
        "empty_kb": empty_kb,
        "filling_kb": max(memory),
        "full_kb": full_kb,
        "close_s": time.perf_counter() - started,
        "disk_bytes": disk_bytes(place),
    }


def costs(opened: Queue, payloads: list[bytes]) -> dict[str, float]:
    """Microseconds a job, medians of cycles. What a cycle put in and did not take out leaves unmeasured."""

    def singles() -> None:
        for payload in itertools.islice(payloads, SINGLES):
            opened.enqueue(payload)

    def single_answers() -> None:
        for _ in range(SINGLES):
            opened.ack(opened.lease(1))

    def batches() -> None:
        for _ in range(FILLS):
            opened.enqueue_many(payloads)

    def batch_answers() -> None:
        for _ in range(SMALL_BATCHES):
            opened.ack(opened.lease(SMALL_BATCH))

    works: dict[str, tuple[Callable[[], None], int]] = {
        "enqueue_us": (singles, SINGLES),
        "enqueue_many_us": (batches, FILLS * FILL_BATCH),
        "answer_us": (single_answers, SINGLES),
        "answer_many_us": (batch_answers, SMALL_BATCHES * SMALL_BATCH),
    }
    taken: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(CYCLES):
        for name, (work, count) in works.items():
            started = time.perf_counter()
            work()
            taken[name].append((time.perf_counter() - started) / count * 1e6)
        for _ in range(FILLS * FILL_BATCH // DRAIN_BATCH - 1):
            opened.ack(opened.lease(DRAIN_BATCH))
    return {name: statistics.median(values) for name, values in taken.items()}


def reopen(kind: str, place: Path, jobs: int) -> dict[str, Any]:
    """The constructor alone, until a first job is in hand, and the memory after that."""
    before_kb, started = anon_kb(), time.perf_counter()
    opened = open_queue(kind, place)
    opened_s = time.perf_counter() - started
    deliveries = opened.lease(1)
    found = {"s": opened_s, "first_job_s": time.perf_counter() - started, "kb": anon_kb(), "before_kb": before_kb}
    opened.ack(deliveries)
    opened.close()
    return found


def drain(kind: str, place: Path, jobs: int) -> dict[str, Any]:
    """Everything out, with memory on the way."""
    opened = open_queue(kind, place)
    with sampled_memory() as memory:
        drained, started = 0, time.perf_counter()
        while deliveries := opened.lease(DRAIN_BATCH):
            opened.ack(deliveries)
            drained += len(deliveries)
        drain_s = time.perf_counter() - started
    drained_kb = anon_kb()
    opened.close()
    if not jobs - 1000 <= drained <= jobs + 1000:  # the costs and the openings took a few
        raise RuntimeError(f"{drained} of about {jobs} jobs came out")
    return {
        "drain_s": drain_s,
        "drained": drained,
        "draining_kb": max(memory),
        "drained_kb": drained_kb,
        "drained_disk_bytes": disk_bytes(place),
    }


def due(kind: str, place: Path, jobs: int) -> dict[str, Any]:
    """Many delayed jobs fall due at one moment, while another caller goes on in another queue."""
    opened = RivetQueue(place, durable=False)
    broker, payloads = opened.broker, fresh_payloads()
    moment = datetime.now(UTC) + timedelta(seconds=3 + jobs / 50_000)
    for _ in range(jobs // FILL_BATCH):
        broker.enqueue_many(QUEUE, payloads, eta=moment)
    if (early_s := moment.timestamp() - time.time()) < 0.2:
        raise RuntimeError("the jobs fell due before all of them were there")
    calls: list[tuple[float, str]] = []
    stop = threading.Event()

    def go_on() -> None:
        while not stop.is_set():
            for name, call in (
                ("enqueue", lambda: broker.enqueue("other", payloads[0])),
                ("lease", lambda: taken.append(broker.lease("other"))),
                ("ack", lambda: broker.ack(taken.pop())),
            ):
                started = time.perf_counter()
                call()
                calls.append((time.perf_counter() - started, name))
            time.sleep(0.0005)

    taken: list[Any] = []
    time.sleep(max(0.0, early_s - 0.3))
    other = threading.Thread(target=go_on, name="other", daemon=True)
    other.start()
    ready_s = leased_s = None
    while ready_s is None and time.time() < moment.timestamp() + DUE_PATIENCE_S:
        time.sleep(0.005)
        if broker.stats(QUEUE).ready >= jobs:
            ready_s = time.time() - moment.timestamp()
    leased, moments = 0, time.time()
    while leased < jobs and time.time() < moments + DUE_PATIENCE_S:
        leases = broker.lease_many(QUEUE, DRAIN_BATCH)
        leased += len(leases)
        broker.ack_many(leases) if leases else time.sleep(0.005)
    if leased >= jobs:
        leased_s = time.time() - moment.timestamp()
    stop.set()
    other.join()
    opened.close()
    longest_s, longest = max(calls)
    return {
        "jobs": jobs,
        "ready_s": ready_s,
        "leased_s": leased_s,
        "longest_call_ms": longest_s * 1000,
        "longest_call": longest,
        "p99_call_ms": percentile([took for took, _ in calls], 99) * 1000,
        "calls": len(calls),
    }


def bytes_written() -> int:
    """What this process has handed to the system to write: log, zeros ahead of it, index."""
    counters = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(counters["wchar"])


def churn(kind: str, place: Path, jobs: int) -> dict[str, Any]:
    """Many jobs through a small standing backlog, past a hundred delayed ones that stay: how much disk that takes at
    most and in the end, and how many bytes are written for those of the callers' records."""
    opened, payloads = RivetQueue(place, durable=False), fresh_payloads()
    for _ in range(CHURN_STANDING // FILL_BATCH):
        opened.enqueue_many(payloads)
    opened.broker.enqueue_many(QUEUE, payloads[:OLD_JOBS], delay=86_400)
    most, started, before = 0, time.perf_counter(), bytes_written()
    for number in range(jobs // SMALL_BATCH):
        first = number * SMALL_BATCH % FILL_BATCH
        opened.enqueue_many(payloads[first : first + SMALL_BATCH])
        opened.ack(opened.lease(SMALL_BATCH))
        if number % 20 == 0:
            most = max(most, disk_bytes(place))
    took_s = time.perf_counter() - started
    written, end = bytes_written() - before, disk_bytes(place)
    metrics = opened.broker.metrics()
    opened.close()
    return {
        "jobs": jobs,
        "seconds": took_s,
        "most_bytes": max(most, end),
        "end_bytes": end,
        "closed_bytes": disk_bytes(place),
        "live_bytes": LIVE_BYTES,
        "written_bytes": written,
        "metrics": metrics,
    }


def pause(kind: str, place: Path, jobs: int, seconds: float, what: str) -> dict[str, Any]:
    """Enqueue one by one while another thread calls checkpoint() or compact() in a loop; only calls that ran beside
    one of those count. For compact() half of the backlog is acked before, so that there is something to copy."""
    opened, payloads = RivetQueue(place, durable=False), fresh_payloads()
    for _ in range((2 if what == "compact" else 1) * jobs // FILL_BATCH):
        opened.enqueue_many(payloads)
    if what == "compact":
        for _ in range(jobs // DRAIN_BATCH):
            opened.ack(opened.lease(DRAIN_BATCH))
    operation = getattr(opened.broker, what)
    runs: list[float] = []
    failures: list[BaseException] = []
    running, stop = threading.Event(), threading.Event()

    def repeat() -> None:
        try:
            while not stop.is_set():
                started = time.perf_counter()
                running.set()
                operation()
                running.clear()
                runs.append(time.perf_counter() - started)
        except BaseException as error:
            failures.append(error)

    def enqueue_for(duration_s: float, *, beside: bool) -> list[float]:
        calls, until = [], time.perf_counter() + duration_s
        while (started := time.perf_counter()) < until and not failures:
            was_running = running.is_set()
            opened.enqueue(payloads[0])
            if not beside or was_running or running.is_set():
                calls.append(time.perf_counter() - started)
        return calls

    def enqueue_on_time(duration_s: float) -> list[float]:
        """From the moment at which each call was to be made: a call that blocks delays those behind it, which a loop
        that just waits for it would count as one slow call among thousands."""
        late, began = [], time.perf_counter()
        for number in range(int(duration_s * ON_TIME_PER_S)):
            wanted = began + number / ON_TIME_PER_S
            if (early := wanted - time.perf_counter()) > 0:
                time.sleep(early)
            if failures:
                break
            opened.enqueue(payloads[0])
            late.append(time.perf_counter() - wanted)
        return late

    alone = enqueue_for(seconds / 3, beside=False)
    alone_on_time = enqueue_on_time(seconds / 3)
    before = opened.broker.metrics()
    thread = threading.Thread(target=repeat, name=what, daemon=True)
    thread.start()
    calls = enqueue_for(seconds, beside=True)
    on_time = enqueue_on_time(seconds)
    stop.set()
    thread.join(60)
    if failures:
        raise failures[0]
    after = opened.broker.metrics()
    opened.close()
    return {
        "alone_p99_ms": percentile(alone, 99) * 1000,
        "p50_ms": percentile(calls, 50) * 1000,
        "p99_ms": percentile(calls, 99) * 1000,
        "max_ms": max(calls) * 1000,
        "on_time_p99_ms": percentile(on_time, 99) * 1000,
        "on_time_alone_p99_ms": percentile(alone_on_time, 99) * 1000,
        "calls": len(calls),
        "runs": len(runs),
        "run_ms": statistics.median(runs) * 1000,
        "metrics": {name: after[name] - before.get(name, 0) for name in after},
    }


# -- the child: its tools ---------------------------------------------------------------------------------------------


def fresh_payloads() -> list[bytes]:
    return [os.urandom(PAYLOAD_BYTES) for _ in range(FILL_BATCH)]


@contextmanager
def sampled_memory() -> Iterator[list[int]]:
    """RssAnon in KiB, every few milliseconds, while the block runs; never empty after it."""
    samples, stop = [anon_kb()], threading.Event()

    def sample() -> None:
        while not stop.wait(SAMPLE_S):
            samples.append(max(samples.pop(), anon_kb()))

    thread = threading.Thread(target=sample, name="memory", daemon=True)
    thread.start()
    try:
        yield samples
    finally:
        stop.set()
        thread.join()
        samples.append(anon_kb())


def main(step: str, kind: str, place: Path, jobs: int, seconds: float) -> None:
    match step.split("-"):
        case ["pause", what]:
            found = pause(kind, place, jobs, seconds, what)
        case _:
            children = {"fill": fill, "open": reopen, "drain": drain, "due": due, "churn": churn}
            found = children[step](kind, place, jobs)
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]), float(sys.argv[5]))
