"""What single calls and threads meet before the queue's own code matters: cold caches and the interpreter's lock.

    python benchmarks/limits.py

Two questions, both answered with and against the raw limit of the disk (see raw.py):

- What does an enqueue cost in a loop, and what does the same enqueue cost just after a sync of some other file? The
  difference is no code of ours: while a thread waits for the disk its caches go cold.
- How much could threads commit if the queue were nothing but a pause for the time of an enqueue (in the interpreter,
  as all Python code is), the same bytes, one sync for all, and a lock to park on?
"""

from __future__ import annotations

import statistics
import tempfile
import threading
import time
from pathlib import Path

from contestants import RivetQ
from raw import RawFile
from workloads import FRAME_BYTES, MANY_THREADS, SMALL_BYTES

ROUNDS = 9
CALLS = 300  # a round of single calls
ROUND_S = 0.2


def median_us(seconds: list[float]) -> float:
    return statistics.median(seconds) * 1e6


def measure_enqueue(directory: Path) -> tuple[float, float]:
    """Microseconds of a relaxed enqueue: in a loop, and just after a sync of another file."""
    queue = RivetQ(directory, durable=False).open()
    other = RawFile(directory / "other", SMALL_BYTES)
    payload = bytes(SMALL_BYTES)
    looped: list[float] = []
    synced: list[float] = []
    for _ in range(ROUNDS):
        for times, commit in ((looped, None), (synced, other.commit)):
            for _ in range(CALLS):
                if commit is not None:
                    commit()
                started = time.perf_counter()
                queue.enqueue(payload)
                times.append(time.perf_counter() - started)
    other.close()
    queue.close()
    return median_us(looped), median_us(synced)


class BareCompany:
    """Threads that do nothing but compute for some time, park, and share a sync: the last one to come does it."""

    def __init__(self, path: Path, threads: int, work_s: float) -> None:
        self._threads = threads
        self._work_s = work_s
        self._file = RawFile(path, threads * (SMALL_BYTES + FRAME_BYTES))
        self._lock = threading.Lock()  # guards _parked
        self._parked: list[threading.Lock] = []
        self._until = 0.0
        self._done = 0

    def commits_per_s(self) -> float:
        self._done, self._until = 0, time.perf_counter() + ROUND_S
        started = time.perf_counter()
        threads = [threading.Thread(target=self._work, daemon=True) for _ in range(self._threads)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return self._done / (time.perf_counter() - started)

    def _work(self) -> None:
        mine = threading.Lock()
        mine.acquire()
        while True:
            computed = time.perf_counter() + self._work_s
            while time.perf_counter() < computed:
                pass
            with self._lock:
                self._parked.append(mine)
                last = len(self._parked) == self._threads
            if last:
                self._file.commit()
                self._done += self._threads
                company, self._parked = self._parked, []
                over = time.perf_counter() > self._until
                if over:
                    self._until = 0.0  # for all, who look at it when they are woken
                for lock in company:
                    lock.release()
            mine.acquire()
            if not self._until:
                return

    def close(self) -> None:
        self._file.close()


def raw_per_s(raw: RawFile) -> float:
    commits, started = 0, time.perf_counter()
    while time.perf_counter() < started + ROUND_S:
        raw.commit()
        commits += 1
    return commits / (time.perf_counter() - started)


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="rivetq-limits-") as name:
        directory = Path(name)
        looped_us, synced_us = measure_enqueue(directory)
        print(f"a relaxed enqueue of {SMALL_BYTES} B: {looped_us:.1f} us in a loop, {synced_us:.1f} us after a sync")
        raw = RawFile(directory / "raw", SMALL_BYTES + FRAME_BYTES)
        for threads in MANY_THREADS:
            for work_us in (0.0, looped_us, synced_us):
                company = BareCompany(directory / f"company-{threads}-{work_us:.0f}", threads, work_us / 1e6)
                ratios = []
                for _ in range(ROUNDS):
                    limit = raw_per_s(raw)
                    ratios.append(company.commits_per_s() / limit)
                company.close()
                print(
                    f"{threads} threads that share every sync and compute {work_us:.1f} us a commit: "
                    f"{statistics.median(ratios):.2f} of the raw limit ({min(ratios):.2f} to {max(ratios):.2f})"
                )
        raw.close()


if __name__ == "__main__":
    main()
