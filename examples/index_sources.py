"""Index every source file of Python's standard library, while the process that does it is killed again and again.

Each `.py` file is a job. A child process holds the broker: it enqueues the files, and its worker threads lease them,
tokenize them and write the identifiers of each file to `results/<job id>.json`. This process only supervises: it kills
the child with SIGKILL in the middle of the seeding and at 20, 45 and 70 % of the work, and starts it again each time.
In the end it opens the directory itself and checks that every file was answered for exactly once.

Three habits make the work safe to repeat, and any program on RivetQ can copy them:

- every file is enqueued under its path as idempotency key, so seeding again after a crash creates nothing twice;
- a result is written under a temporary name, synced and renamed, so a repeated delivery replaces it with itself;
- a job is acked only after its result is on disk, so a kill between the two costs one repetition and never a result.

    python examples/index_sources.py [--keep DIR] [--workers N] [--limit FILES]
"""

from __future__ import annotations

import argparse
import json
import keyword
import os
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import tokenize
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from rivetq import Broker, Job, LeaseLostError, QueueStats, RetryPolicy

QUEUE = "sources"
LEASE_BATCH = 8
SEED_BATCH = 50
LOOK_EVERY_S = 0.1
GIVE_UP_AFTER_S = 300
UNREADABLE = (SyntaxError, tokenize.TokenError, UnicodeError, OSError)

# A delivery that dies with its process counts as an attempt, so a good file needs more attempts than there are kills.
KILLS = (("seeding", 0.5), ("work", 0.2), ("work", 0.45), ("work", 0.7))
RETRY = RetryPolicy(max_attempts=len(KILLS) + 1, base=0.1)

# Not every installation ships files that cannot be read as Python, so the demo always adds these two.
BROKEN = {"undecodable.py": b"name = '\xff\xfe'\n", "unterminated.py": b'text = """ this string never ends\n'}


# -- the child: holds the broker, does the work, reports in JSON lines ------------------------------------------------


def work_until_drained(directory: Path, workers: int) -> None:
    """Seed the queue, run the workers until no job is left, and report all the way; may be killed at any instant."""
    paths = json.loads((directory / "files.json").read_text())
    started = time.perf_counter()
    with Broker(directory / "queue", fsync="always") as broker:
        report("opened", ms=(time.perf_counter() - started) * 1000)
        stop = threading.Event()
        with ThreadPoolExecutor(workers) as pool:
            try:
                running = [pool.submit(index_files, broker, directory / "results", stop) for _ in range(workers)]
                seed(broker, paths)
                while not look(broker) and not any(worker.done() for worker in running):
                    stop.wait(LOOK_EVERY_S)
            finally:
                stop.set()
        for worker in running:
            worker.result()
        look(broker)


def seed(broker: Broker, paths: list[str]) -> None:
    """Enqueue every file; those that an earlier, killed child enqueued already keep their jobs."""
    for first in range(0, len(paths), SEED_BATCH):
        batch = paths[first : first + SEED_BATCH]
        broker.enqueue_many(QUEUE, batch, idempotency_keys=batch, retry=RETRY)
        report("seeded", files=first + len(batch))


def index_files(broker: Broker, results: Path, stop: threading.Event) -> None:
    """One worker thread: lease a few files, index them, ack them together (one fsync for all)."""
    while not stop.is_set():
        leases = broker.lease_many(QUEUE, LEASE_BATCH, wait=LOOK_EVERY_S)
        if leases:
            report("leased", repeats=[reason_to_repeat(lease.last_error) for lease in leases if lease.attempt > 1])
        indexed = []
        for lease in leases:
            path = str(lease.json())
            try:
                names = identifiers(path)
            except UNREADABLE as error:
                with suppress(LeaseLostError):
                    lease.nack(error=f"{type(error).__name__}: {error}")
            else:
                write_result(results, lease.id, {"path": path, "attempt": lease.attempt, "names": sorted(names)})
                indexed.append(lease)
        if indexed:
            sync_directory(results)
            with suppress(LeaseLostError):  # too slow for the visibility timeout: the files come again, to the same end
                broker.ack_many(indexed)
            look(broker)


def identifiers(path: str) -> set[str]:
    """The identifiers of a source file. Raises one of UNREADABLE if it is not Python."""
    with tokenize.open(path) as source:
        tokens = tokenize.generate_tokens(source.readline)
        return {token.string for token in tokens if token.type == tokenize.NAME and not keyword.iskeyword(token.string)}


def write_result(results: Path, job_id: int, result: dict[str, Any]) -> None:
    """Write `<job id>.json` whole or not at all; a second time replaces the first."""
    temporary = results / f"{job_id}.tmp"
    with temporary.open("w") as file:
        json.dump(result, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(results / f"{job_id}.json")


def sync_directory(directory: Path) -> None:
    """Make the renames in a directory survive a power cut, as the acks that follow them do."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def reason_to_repeat(last_error: str | None) -> str:
    """The error of the attempt before, short enough to count: "owner gone", "SyntaxError", ..."""
    return (last_error or "unknown").partition(":")[0][:80]


def look(broker: Broker) -> bool:
    """Report the state of the queue; True if nothing is left to do."""
    now, counters = broker.stats(QUEUE), broker.metrics()
    report("looked", done=now.acked, ready=now.ready, scheduled=now.scheduled, leased=now.leased, dead=now.dead,
           fsyncs=counters["fsyncs"], records=counters["records"])  # fmt: skip
    return now.ready + now.scheduled + now.leased == 0


def report(event: str, **facts: Any) -> None:
    """One line to the supervisor. A single write: lines of several threads do not mix, and no buffer dies with us."""
    os.write(sys.stdout.fileno(), json.dumps({"event": event, **facts}).encode() + b"\n")


# -- the supervisor: kills and restarts the child, shows how far it is ------------------------------------------------


class Restart(NamedTuple):
    """A kill and what followed: the time that `Broker(...)` took, and that from the start to the first lease."""

    killed_at: str
    open_ms: float = 0.0
    working_ms: float = 0.0


@dataclass
class Supervisor:
    """Runs children one after the other until one of them finishes the work; all but the last are killed."""

    directory: Path
    found: int
    workers: int
    restarts: list[Restart] = field(default_factory=list)
    repeats: Counter[str] = field(default_factory=Counter)
    fsyncs: int = 0
    records: int = 0

    def __post_init__(self) -> None:
        self._progress = Progress(self.found)

    def run(self) -> None:
        for kill in KILLS:
            if not self._run_child(kill):
                return
        self._run_child(None)

    def _run_child(self, kill: tuple[str, float] | None) -> bool:
        """Follow one child until it is killed (True) or done (False). Exits if it failed by itself."""
        command = [sys.executable, __file__, "--child", str(self.directory), "--workers", str(self.workers)]
        began, open_ms, working, killed = time.monotonic(), 0.0, False, False
        last: dict[str, int] = {"fsyncs": 0, "records": 0}
        with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
            watchdog = threading.Timer(GIVE_UP_AFTER_S, child.kill)
            watchdog.start()
            try:
                for event in events(child):  # after a kill, too: what the pipe still holds did happen
                    progress = 0.0
                    match event:
                        case {"event": "opened", "ms": ms}:
                            open_ms = ms
                        case {"event": "leased", "repeats": reasons}:
                            self.repeats.update(reasons)
                            if not working:
                                working = True
                                self._note_restart(open_ms, (time.monotonic() - began) * 1000)
                        case {"event": "seeded", "files": files} if kill and kill[0] == "seeding":
                            progress = files / self.found
                        case {"event": "looked", **state}:
                            last = state
                            self._progress.show(state)
                            if kill and kill[0] == "work":
                                progress = (state["done"] + state["dead"]) / self.found
                    if kill and not killed and progress >= kill[1]:
                        child.kill()
                        killed = True
                        self.restarts.append(Restart(f"{progress:.0%} of the {kill[0]}"))
                        self._progress.stop(f"kill -9 at {self.restarts[-1].killed_at}")
            finally:
                watchdog.cancel()
                child.kill()
        self.fsyncs += last["fsyncs"]
        self.records += last["records"]
        if not killed:
            self._progress.stop()
            if child.returncode:
                sys.exit(f"the child failed by itself, with status {child.returncode}")
        return killed

    def _note_restart(self, open_ms: float, working_ms: float) -> None:
        if self.restarts:
            self.restarts[-1] = self.restarts[-1]._replace(open_ms=open_ms, working_ms=working_ms)
            print(f"        restarted: recovered in {open_ms:.0f} ms, leasing {working_ms:.0f} ms after the start")


class Progress:
    """The progress line: rewritten in place on a terminal, printed once a second elsewhere."""

    def __init__(self, found: int) -> None:
        self._found = found
        self._terminal = sys.stdout.isatty()
        self._line = ""
        self._show_at = 0.0
        self._rate = 0.0
        self._rated_at, self._rated_settled = time.monotonic(), 0

    def show(self, state: dict[str, int]) -> None:
        now, settled = time.monotonic(), state["done"] + state["dead"]
        if now >= self._rated_at + 1.0:
            self._rate = (settled - self._rated_settled) / (now - self._rated_at)
            self._rated_at, self._rated_settled = now, settled
        self._line = (
            f"  {settled / self._found:4.0%}  done {state['done']:5,}  ready {state['ready']:5,}"
            f"  scheduled {state['scheduled']:2}  leased {state['leased']:3}  dead {state['dead']:2}"
            f"  {self._rate:5,.0f} jobs/s"
        )
        if now >= self._show_at:
            self._show_at = now + (0.2 if self._terminal else 1.0)
            self._print(end="" if self._terminal else "\n")

    def stop(self, why: str = "") -> None:
        """Leave the last state standing, and the reason below it."""
        if self._line:
            self._print(end="\n")
        if why:
            print(f"        {why}", flush=True)

    def _print(self, *, end: str) -> None:
        print(f"\r{self._line}\033[K" if self._terminal else self._line, end=end, flush=True)


def events(child: subprocess.Popen[bytes]) -> Iterator[dict[str, Any]]:
    """What the child reports, until it ends; a line that the kill cut off is dropped."""
    assert child.stdout is not None
    for line in child.stdout:
        if line.endswith(b"\n"):
            yield json.loads(line)


# -- the verdict: every file answered for, once -----------------------------------------------------------------------


@dataclass
class Outcome:
    """What the directory holds at the end, read by its new owner, beside what the supervisor saw."""

    run: Supervisor
    paths: list[str]
    seconds: float
    stats: QueueStats
    dead: list[Job]
    results: list[dict[str, Any]]

    @classmethod
    def read(cls, run: Supervisor, paths: list[str], seconds: float) -> Outcome:
        with Broker(run.directory / "queue") as broker:
            stats, dead = broker.stats(QUEUE), all_dead_letters(broker)
        results = [json.loads(file.read_text()) for file in (run.directory / "results").glob("*.json")]
        return cls(run, paths, seconds, stats, dead, results)

    def tell(self) -> None:
        print(f"\nDead letters ({len(self.dead)}; the demo wrote the first {len(BROKEN)} itself, to be broken):")
        for job in self.dead:
            path = str(job.json())
            error = (job.last_error or "").replace(path, os.path.basename(path))
            print(f"  {os.path.basename(path):22} {job.attempts} attempts, {error[:90]}")
        print("\nRepeated deliveries, by what ended the one before:")
        causes = [*self.run.repeats.most_common(), ("owner gone, before the repetition was reported", self.unreported)]
        for cause, times in causes:
            if times:
                print(f"  {times:5,}  {cause}{' (its process was killed)' if cause == 'owner gone' else ''}")
        print("\nRecoveries:")
        for restart in self.run.restarts:
            print(
                f"  open {restart.open_ms:4.0f} ms, leasing {restart.working_ms:4.0f} ms after the start of the process"
                f"   (killed at {restart.killed_at})"
            )
        index = Counter(name for result in self.results for name in result["names"])
        print(f"\nThe index: {len(index):,} identifiers. In the most files:")
        print("  " + ", ".join(f"{name} {files:,}" for name, files in index.most_common(10)))
        jobs, records, fsyncs = len(self.paths), self.run.records, self.run.fsyncs
        print(f"\n{jobs:,} jobs in {self.seconds:.1f} s, restarts included: {jobs / self.seconds:,.0f} jobs/s")
        print(f"{records:,} log records, {fsyncs:,} fsyncs of the log: {jobs / max(1, fsyncs):.1f} jobs per fsync")

    def check(self) -> dict[str, bool]:
        """Each claim, with its figures, and whether it holds."""
        found, results, stats, kills = len(self.paths), len(self.results), self.stats, len(self.run.restarts)
        dead_paths = [str(job.json()) for job in self.dead]
        answers = Counter([result["path"] for result in self.results] + dead_paths)
        lost, twice = set(self.paths) - set(answers), sum(times > 1 for times in answers.values())
        by_kills, most = self.run.repeats["owner gone"] + self.unreported, self.run.workers * LEASE_BATCH
        return {
            f"files found = results + dead letters: {found:,} = {results:,} + {len(self.dead):,}": (
                found == results + len(self.dead)
            ),
            f"nothing lost: {len(lost)} files without an answer": not lost,
            f"nothing twice in the index: {twice} files with two answers": not twice,
            f"the queue agrees: {stats.enqueued:,} enqueued = {stats.acked:,} acked + {stats.dead:,} dead": (
                stats.enqueued == stats.acked + stats.dead == found and stats.acked == results
            ),
            "every dead letter is a file that cannot be read": not any(map(is_readable, dead_paths)),
            f"{self.repeated:,} repeated deliveries, {by_kills:,} by the kills (at most {kills} x {most} jobs)": (
                self.unreported >= 0 and by_kills <= kills * most
            ),
            f"killed {kills} times": kills == len(KILLS),
        }

    @property
    def repeated(self) -> int:
        """Deliveries beyond the first of each job, by the attempt that RivetQ counted on the last one."""
        deliveries = sum(int(result["attempt"]) for result in self.results) + sum(job.attempts for job in self.dead)
        return deliveries - len(self.results) - len(self.dead)

    @property
    def unreported(self) -> int:
        """Repetitions whose process was killed between the lease and its report."""
        return self.repeated - self.run.repeats.total()


def all_dead_letters(broker: Broker) -> list[Job]:
    """Every dead letter, a page at a time."""
    found: list[Job] = []
    while page := broker.dead_letters(QUEUE, after=found[-1].id if found else 0):
        found += page
    return found


def is_readable(path: str) -> bool:
    """Whether this process, too, can index the file; a dead letter's cannot be."""
    try:
        identifiers(path)
    except UNREADABLE:
        return False
    return True


# -- the command ------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--keep", type=Path, metavar="DIR", help="work in DIR (new or empty) and leave it there")
    parser.add_argument("--workers", type=int, default=4, metavar="N", help="worker threads (default 4)")
    parser.add_argument("--limit", type=int, metavar="FILES", help="index only so many files, spread over the library")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.workers < 1 or (options.limit or 100) < 100:
        parser.error("it takes at least 1 worker, and 100 files to be killed in between")
    if options.child:
        work_until_drained(options.child, options.workers)
        return
    if options.keep and options.keep.exists() and any(options.keep.iterdir()):
        parser.error(f"{options.keep} is not empty: the demo would find its files done")
    with nullcontext(options.keep) if options.keep else tempfile.TemporaryDirectory(prefix="rivetq-demo-") as place:
        sys.exit(0 if demonstrate(Path(place).resolve(), options.workers, options.limit) else 1)


def demonstrate(directory: Path, workers: int, limit: int | None) -> bool:
    """The whole demo in one directory: find the files, have them indexed by a process that keeps dying, check."""
    (directory / "results").mkdir(parents=True)
    paths = [*write_broken_files(directory / "broken"), *source_files(limit)]
    (directory / "files.json").write_text(json.dumps(paths))
    version = sys.version.split()[0]
    print(f"{len(paths):,} files: the standard library of Python {version}, and {len(BROKEN)} broken on purpose")
    print(f'fsync="always", {workers} worker threads, {len(KILLS)} kills to come, in {directory}\n')
    run, started = Supervisor(directory, len(paths), workers), time.monotonic()
    run.run()
    outcome = Outcome.read(run, paths, time.monotonic() - started)
    outcome.tell()
    checks = outcome.check()
    print()
    for claim, holds in checks.items():
        print(f"  {'ok  ' if holds else 'FAIL'}  {claim}")
    passed = all(checks.values())
    print("\nEvery file was answered for exactly once." if passed else "\nFAILED: see the checks above.")
    return passed


def source_files(limit: int | None) -> list[str]:
    """The sources of the standard library, its tests included, without what was installed beside it."""
    files = []
    for folder, folders, names in os.walk(sysconfig.get_path("stdlib")):
        folders[:] = sorted(set(folders) - {"site-packages", "dist-packages", "__pycache__"})
        files += [os.path.join(folder, name) for name in sorted(names) if name.endswith(".py")]
    return files if limit is None else files[:: max(1, len(files) // limit)][:limit]


def write_broken_files(directory: Path) -> list[str]:
    directory.mkdir()
    for name, content in BROKEN.items():
        (directory / name).write_bytes(content)
    return [str(directory / name) for name in BROKEN]


if __name__ == "__main__":
    main()
