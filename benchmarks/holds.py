"""The longest time that each verb holds the engine's lock, with a million waiting jobs and with thousands of queues.

Every other call waits for that long. The bar is 20 ms. Both the wall time and the thread's own processor time of each
hold are measured: with more threads than processors a thread that holds the lock can lose the processor, which is the
scheduler's doing and shows in the first only. Of several calls the best counts, each by its longest hold; of
the engine's own threads the longest of all. Python's own collector is off: it goes over all objects of the process when
it is its turn, wherever that is.

    python benchmarks/holds.py                    # some minutes; 1 GiB of memory
    python benchmarks/holds.py --jobs 100000 --only purge redrive

Exit status 1: a hold of more than the bar of processor time.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import itertools
import logging
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any
from unittest import mock

import machine

from rivetq import Broker, RetryPolicy
from rivetq.engines.local import LocalEngine
from rivetq.testing import ManualClock

BAR_MS = 20.0
MEANWHILE_MS = 25.0
"""The bar for what other calls wait in wall time meanwhile: 99 of 100 of them."""
BATCH = 1000
HOUR = 3600.0
NO_WAIT = RetryPolicy(base=0, max_attempts=1)


class TimedLock:
    """The engine's lock, with a watch on it."""

    def __init__(self, lock: threading.Lock) -> None:
        self._lock = lock
        self._began = 0.0, 0.0
        self.holds: dict[str, list[float]] = {}  # by thread: longest wall time, longest processor time
        self.places: dict[str, str] = {}  # by thread: where it took the lock for the latter

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        taken = self._lock.acquire(blocking, timeout)
        if taken:
            self._began = time.perf_counter(), time.thread_time()
        return taken

    def release(self) -> None:
        wall, processor = time.perf_counter() - self._began[0], time.thread_time() - self._began[1]
        name = threading.current_thread().name
        longest = self.holds.setdefault(name, [0.0, 0.0])
        if processor > longest[1]:
            frame = sys._getframe(1)
            frame = frame.f_back if frame.f_code.co_name == "__exit__" and frame.f_back is not None else frame
            self.places[name] = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}, {frame.f_code.co_name}"
        longest[0], longest[1] = max(longest[0], wall), max(longest[1], processor)
        self._lock.release()

    def locked(self) -> bool:
        return self._lock.locked()

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()


class Watch:
    """Opens brokers whose lock is timed, and keeps what was measured."""

    def __init__(self, directory: Path, runs: int, only: list[str]) -> None:
        self.directory = directory
        self.clock = ManualClock()
        self._runs = runs
        self._only = only
        self.rows: list[tuple[str, float, float]] = []
        self.waits: list[tuple[str, float]] = []  # what 99 of 100 calls of another thread took at most, in ms
        self._open_log = LocalEngine._open_log
        self.background: dict[str, list[float]] = {}
        self.places: dict[str, str] = {}
        self.lock: TimedLock | None = None

    def open(self) -> Broker:
        watch = self

        def timed(engine: LocalEngine, *args: Any) -> None:
            watch.lock = TimedLock(engine._lock)
            engine._lock = watch.lock  # type: ignore[assignment]  # it is used as one
            watch._open_log(engine, *args)

        with mock.patch.object(LocalEngine, "_open_log", timed):
            return Broker(self.directory / "data", fsync="never", clock=self.clock)

    def wants(self, name: str) -> bool:
        return not self._only or any(word in name for word in self._only)

    def measure(self, name: str, call: Callable[..., Any], before: Callable[[], Any] | None = None) -> None:
        """The longest hold in this thread of the best of some calls; `before` each of them something is made ready."""
        if not self.wants(name):
            return
        found = []
        for _ in range(self._runs):
            given = () if before is None else (before(),)
            self.forget()
            call(*given)
            found.append(self.longest())
        self.note(name, min(wall for wall, _ in found), min(processor for _, processor in found))

    def meanwhile(self, broker: Broker, name: str, call: Callable[..., Any], before: Callable[[], Any]) -> None:
        """What an enqueue of another thread takes while a long call goes on, in wall time; the median of some calls."""
        if not self.wants(name):
            return
        found = []
        for _ in range(self._runs):
            given, over, took = before(), threading.Event(), list[float]()

            def enqueue(over: threading.Event = over, took: list[float] = took) -> None:
                while not over.wait(0.001):
                    began = time.perf_counter()
                    broker.enqueue("meanwhile", b"x")
                    took.append((time.perf_counter() - began) * 1000)

            thread = threading.Thread(target=enqueue)
            thread.start()
            call(given)
            over.set()
            thread.join()
            found.append(statistics.quantiles(took, n=100)[98] if len(took) > 1 else max(took, default=0.0))
        p99 = statistics.median(found)
        self.waits.append((name, p99))
        print(f"  {'another enqueue beside ' + name:44} {'p99':>12} {p99:9.2f} ms", flush=True)

    def forget(self) -> None:
        gc.collect()  # not in the middle of what is measured
        if self.lock is not None:
            for name, each in self.lock.holds.items():
                if name != "MainThread":
                    kept = self.background.setdefault(name, [0.0, 0.0])
                    if each[1] > kept[1]:
                        self.places[name] = self.lock.places[name]
                    kept[:] = max(kept[0], each[0]), max(kept[1], each[1])
            self.lock.holds = {}

    def longest(self) -> tuple[float, float]:
        assert self.lock is not None
        self.places |= {"MainThread": self.lock.places.get("MainThread", "")}
        wall, processor = self.lock.holds.get("MainThread", (0.0, 0.0))
        return wall, processor

    def note(self, name: str, wall: float, processor: float) -> None:
        self.rows.append((name, wall, processor))
        late = processor * 1000 > BAR_MS
        thread = name.split()[1].rstrip(",") if name.startswith("thread") else "MainThread"
        place = self.places.get(thread, "")
        mark = f"  <-- above the bar ({place})" if late else ""
        print(f"  {name:44} {processor * 1000:9.2f} ms {wall * 1000:9.2f} ms{mark}", flush=True)

    def head(self, title: str) -> None:
        print(f"\n{title}\n  {'verb':44} {'processor':>12} {'wall':>12}")

    def note_background(self) -> None:
        self.forget()
        for name, (wall, processor) in sorted(self.background.items()):
            self.note(f"thread {name}, longest of all", wall, processor)
        self.background = {}


def fill(broker: Broker, queue: str, count: int, **options: Any) -> None:
    for start in range(0, count, BATCH):
        broker.enqueue_many(queue, [b"x" * 100] * min(BATCH, count - start), **options)


def take(broker: Broker, queue: str, count: int) -> list[Any]:
    return list(itertools.chain(*(broker.lease_many(queue, BATCH) for _ in range(-(-count // BATCH)))))


def bury(watch: Watch, broker: Broker, queue: str, count: int) -> None:
    """Dead letters, by expired leases."""
    for start in range(0, count, 50_000):
        fill(broker, queue, min(50_000, count - start), retry=NO_WAIT)
        take(broker, queue, min(50_000, count - start))
        watch.clock.advance(HOUR)


def small_verbs(watch: Watch, broker: Broker, queue: str) -> None:
    """Calls about one job or a batch of a thousand."""
    measure = watch.measure
    broker.configure_queue(queue, visibility_timeout=1000 * HOUR)

    def leased(count: int) -> Callable[[], Any]:
        return lambda: broker.lease_many(queue, count)

    def transaction(leases: list[Any]) -> None:
        with broker.transaction() as t:
            for lease in leases:
                t.ack(lease)
                t.enqueue(queue, b"next")

    measure("enqueue", lambda: broker.enqueue(queue, b"x"))
    measure("enqueue_many of 1,000", lambda: fill(broker, queue, BATCH))
    keys = itertools.count()
    measure(
        "enqueue_many of 1,000 with keys",
        lambda: broker.enqueue_many(queue, [b"x"] * BATCH, idempotency_keys=[f"k{next(keys)}" for _ in range(BATCH)]),
    )
    measure("lease", lambda: broker.lease(queue))
    measure("lease_many of 1,000", lambda: broker.lease_many(queue, BATCH))
    measure("ack", lambda leases: leases[0].ack(), leased(1))
    measure("ack_many of 1,000", broker.ack_many, leased(BATCH))
    measure("nack", lambda leases: leases[0].nack(), leased(1))
    measure("release", lambda leases: leases[0].release(), leased(1))
    measure("reject", lambda leases: leases[0].reject(), leased(1))
    measure("extend", lambda leases: leases[0].extend(9), leased(1))
    measure("transaction of 1,000 acks and enqueues", transaction, leased(BATCH))
    some = broker.jobs(queue, state="ready", after=0, limit=1)[0].id
    measure("get", lambda: broker.get(some))
    measure("find", lambda: broker.find(queue, "k0"))
    measure("cancel", lambda job_id: broker.cancel(job_id), lambda: broker.enqueue(queue, b"x"))
    for state in (None, "ready", "scheduled", "leased"):
        measure(
            f"jobs, {state or 'any state'}, 10,000", lambda state=state: broker.jobs(queue, state=state, limit=10_000)
        )
    measure("queues", broker.queues)
    measure("stats of one", lambda: broker.stats(queue))
    measure("stats of all", broker.stats)
    measure("deliveries of all", broker.deliveries)
    limits = itertools.cycle((10**8, 10**9))
    measure("configure_queue", lambda: broker.configure_queue(queue, max_jobs=next(limits)))
    measure("pause", lambda _: broker.pause(queue), lambda: broker.resume(queue))
    measure("resume", lambda _: broker.resume(queue), lambda: broker.pause(queue))
    measure("remove_queue", lambda _: broker.remove_queue("gone"), lambda: broker.cancel(broker.enqueue("gone", b"")))
    measure("metrics", broker.metrics)
    copies = itertools.count()
    measure("checkpoint", lambda _: broker.checkpoint(), lambda: fill(broker, queue, 50_000))
    measure("rotate", lambda _: broker.rotate(), lambda: broker.enqueue(queue, b"x"))
    measure("backup", lambda: broker.backup(watch.directory / f"copy-{next(copies)}"))
    measure("compact", lambda _: broker.compact(), lambda: broker.ack_many(broker.lease_many(queue, BATCH)))


def many_jobs(watch: Watch, jobs: int) -> None:
    broker = watch.open()
    watch.head(f"{jobs:,} waiting jobs in one queue")
    fill(broker, "q", jobs)
    fill(broker, "q", jobs // 10, delay=HOUR * 24 * 365)
    small_verbs(watch, broker, "q")
    watch.measure("purge of all", lambda _: broker.purge("p"), lambda: fill(broker, "p", jobs))
    watch.measure(
        "purge of the scheduled", lambda _: broker.purge("p", state="scheduled"),
        lambda: fill(broker, "p", jobs, delay=HOUR * 24 * 365),
    )  # fmt: skip
    watch.measure(
        "lease_many of 100,000", lambda _: broker.lease_many("p", 100_000), lambda: fill(broker, "p", 100_000)
    )
    broker.ack_many(broker.lease_many("p", 1))
    dead = min(jobs, 300_000)

    def buried() -> list[int]:
        broker.purge("d")
        bury(watch, broker, "d", dead)
        ids, after = [], 0
        while found := broker.dead_letters("d", after=after, limit=10_000):
            ids += [job.id for job in found]
            after = ids[-1]
        return ids

    watch.measure(f"dead_letters, 10,000 of {dead:,}", lambda _: broker.dead_letters("d", limit=10_000), buried)
    watch.measure(f"redrive of {dead:,}", lambda ids: broker.redrive("d"), buried)
    watch.measure(f"redrive of {dead:,} by ids", lambda ids: broker.redrive("d", job_ids=ids), buried)
    watch.meanwhile(broker, f"redrive of {dead:,}", lambda _: broker.redrive("d"), buried)
    watch.meanwhile(broker, f"purge of {dead:,}", lambda _: broker.purge("d"), lambda: fill(broker, "d", dead))
    broker.purge("d")

    def storm() -> None:
        fill(broker, "s", jobs, delay=HOUR)

    watch.measure(f"timer: {jobs:,} jobs fall due", lambda _: watch.clock.advance(2 * HOUR), storm)
    broker.purge("s")
    expired = min(jobs, 100_000)

    def leased() -> None:
        fill(broker, "l", expired, retry=RetryPolicy(base=0))
        broker.configure_queue("l", visibility_timeout=60)
        take(broker, "l", expired)

    watch.measure(f"timer: {expired:,} leases expire", lambda _: watch.clock.advance(HOUR), leased)
    broker.purge("l")
    broker.close()
    watch.note_background()

    def left() -> None:
        with watch.open() as broker:
            fill(broker, "l", expired)
            broker.configure_queue("l", visibility_timeout=1000 * HOUR)
            take(broker, "l", expired)

    def reopened(_: None) -> None:
        nonlocal broker
        broker = watch.open()

    def closed_left() -> None:
        with contextlib.suppress(Exception):
            broker.close()
        left()

    watch.measure(f"opening: {expired:,} leases end as owner gone", reopened, closed_left)
    broker.close()
    watch.note_background()


def many_queues(watch: Watch, queues: int) -> None:
    broker = watch.open()
    watch.head(f"{queues:,} queues of 100 jobs")
    names = [f"tenant-{n}" for n in range(queues)]
    for name in names:
        broker.enqueue_many(name, [b"x" * 100] * 100)
    middle = names[queues // 2]
    fill(broker, middle, 20 * BATCH)
    fill(broker, middle, 20 * BATCH, delay=HOUR * 24 * 365)
    small_verbs(watch, broker, middle)

    def rest(name: str) -> None:
        broker.enqueue_many(name, [b"x"] * BATCH)

    watch.measure("lease from 3,000 names", lambda: broker.lease(names))
    watch.measure("purge", lambda _: broker.purge(names[0]), lambda: rest(names[0]))

    def buried() -> list[int]:
        broker.purge(names[-1])
        for lease in broker.lease_many(middle, BATCH):
            broker.reject(lease)
        return [job.id for job in broker.dead_letters(middle, limit=BATCH)]

    watch.measure("redrive of 1,000", lambda ids: broker.redrive(middle), buried)
    watch.measure("redrive of 1,000 by ids", lambda ids: broker.redrive(middle, job_ids=ids), buried)

    def delayed() -> None:
        for name in names:
            broker.enqueue_many(name, [b"x"] * 30, delay=HOUR)

    watch.measure(f"timer: jobs of {queues:,} queues fall due", lambda _: watch.clock.advance(2 * HOUR), delayed)
    broker.close()
    watch.note_background()

    def left() -> Broker:
        with watch.open() as broker:
            for name in names:
                broker.lease_many(name, 10)
        return broker

    def opened(_: Broker) -> None:
        watch.open().close()

    watch.measure(f"opening: leases of {queues:,} queues end", opened, left)
    watch.note_background()


@contextlib.contextmanager
def directory(given: str | None) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="rivetq-holds-", dir=given) as name:
        yield Path(name)


def main() -> None:
    parser = argparse.ArgumentParser(description="How long each verb holds the engine's lock.")
    parser.add_argument("--jobs", type=int, default=1_000_000)
    parser.add_argument("--queues", type=int, default=3_000)
    parser.add_argument("--runs", type=int, default=3, help="calls of each verb, of which the best counts")
    parser.add_argument("--only", nargs="*", default=[], help="verbs whose name has one of these words")
    parser.add_argument("--gc", action="store_true", help="with Python's own collector")
    parser.add_argument("--directory", help="where the files are")
    given = parser.parse_args()
    logging.getLogger("rivetq").setLevel(logging.ERROR)
    if not given.gc:
        gc.disable()
    rows: list[tuple[str, float, float]] = []
    waits: list[tuple[str, float]] = []
    for scenario, size in ((many_jobs, given.jobs), (many_queues, given.queues)):
        if not size:
            continue
        with directory(given.directory) as place:
            if not rows:
                for name, value in machine.facts(place).items():
                    print(f"{name}: {value}")
            watch = Watch(place, given.runs, given.only)
            scenario(watch, size)
            rows += watch.rows
            waits += watch.waits
    late = [name for name, _, processor in rows if processor * 1000 > BAR_MS]
    print(f"\n{len(rows)} rows, above {BAR_MS:.0f} ms of processor time: {', '.join(late) or 'none'}")
    slow = [name for name, p99 in waits if p99 > MEANWHILE_MS]
    if waits:
        print(f"another enqueue meanwhile, p99 above {MEANWHILE_MS:.0f} ms: {', '.join(slow) or 'none'}")
    sys.exit(bool(late or slow))


if __name__ == "__main__":
    main()
