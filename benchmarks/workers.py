"""Measure workers: how many jobs a second RivetQ's consumer runs, beside the consumers of other task queues.

    python benchmarks/workers.py                        everything, under 4 minutes
    python benchmarks/workers.py --only 'rivetq*' --rounds 5 --json workers.json

A round of a contestant: a fresh directory or a fresh Redis, filled with jobs whose handler only counts; then its
consumer, in a process of its own, which tells the time of the job a tenth of the way and of the last one (the programs
are in consumers/). The rate is that of the jobs in between, so start and end cost nothing. Contestants take their
rounds in turn, in an order that rotates; figures are medians, a ratio is the median of the ratios of rounds with the
same number, which were neighbours in time. What is not installed is named and left out, what fails is named with its
reason. Nothing here exits with an error because a figure is low: the bars are printed beside them.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import machine
import servers
from bars import Bar
from bench import MARKS, end_in_order, figure, print_bars, wanted
from contestants import Leases, SkippedError, installed, needed, program
from servers import Server, socket_directory

ROUNDS = 3
ROUND_S = 2.0  # what a round is scaled to, by the rate of the one before
FEWEST_JOBS, MOST_JOBS = 200, 200_000
FILL_S, WORK_S = 60.0, 40.0  # the longest that a round may take to fill and to work
CONSUMERS = Path(__file__).resolve().parent / "consumers"
REDIS = ("redis-server", "redis-server")  # program, Debian package

LABEL = 24  # columns

CAVEAT = """\
How to read it
  jobs/s     handlers that ran, each doing nothing but counting: what is measured is the price of a job, not of work
  ±          half the distance from the slowest to the fastest round, as a share of the median
  stored     where a job is when it was enqueued, and where the fact is when it was done
               disk      synced: it survives a power cut
               system    written, not synced: it survives the death of the process
               memory    in a Redis without any persistence (its fastest setting): gone with that process
  *          taking a job removes it: what the consumer dies with is gone
  +          a job that a consumer dies with is kept, but it is not run again by itself
  no mark    it is run again
Caveat: client and Redis share the cores, by a unix socket; an embedded queue has them to itself, which is its nature.
A virtual disk may answer a flush from its host's memory. Compare the lines of one run, not those of two machines."""


@dataclass(frozen=True)
class Contestant:
    """A consumer with its settings. `jobs`: in the first round; the others are scaled by its rate."""

    name: str
    title: str
    program: str
    jobs: int
    stored: str
    leases: Leases
    settings: str
    variant: str = "-"
    module: str = ""  # that has to be importable
    packages: tuple[str, ...] = ()
    redis: bool = False

    def version(self) -> str:
        """Names and versions of what is measured; raises SkippedError where something is missing."""
        if self.redis:
            program(REDIS[0], package=REDIS[1])
            needed("redis", package="redis[hiredis]")
        needed(self.module, package=self.packages[0])
        return ", ".join(f"{package} {installed(package)}" for package in self.packages)


MINE = ("rivetq threads", "rivetq asyncio")
DURABLE_PEERS = ("huey durable", "huey durable 1 thread")
BARS = {"durable": 3.0, "redis": 2.0}
CLIENT = ("redis", "hiredis")

CONTESTANTS = [
    Contestant(
        "rivetq threads",
        "RivetQ threads",
        "rivetq_tasks.py",
        jobs=60_000,
        stored="disk",
        leases=Leases.TIMEOUT,
        settings='8 threads, fsync="always" (the default)',
        variant="threads",
        module="rivetq.worker",
        packages=("rivetq", "lmdb"),
    ),
    Contestant(
        "rivetq asyncio",
        "RivetQ asyncio",
        "rivetq_tasks.py",
        jobs=50_000,
        stored="disk",
        leases=Leases.TIMEOUT,
        settings='async handler, 100 at a time (the default; 8 are as fast), fsync="always"',
        variant="asyncio",
        module="rivetq.worker",
        packages=("rivetq", "lmdb"),
    ),
    Contestant(
        "huey durable",
        "huey durable",
        "huey_sqlite.py",
        jobs=5_000,
        stored="disk",
        leases=Leases.NONE,
        settings="SqliteHuey (WAL), fsync=True, results=False; 8 threads",
        variant="durable-8",
        module="huey",
        packages=("huey",),
    ),
    Contestant(
        "huey durable 1 thread",
        "huey durable, 1 thread",
        "huey_sqlite.py",
        jobs=7_000,
        stored="disk",
        leases=Leases.NONE,
        settings="the same with one thread: its threads share a connection, and hand over a lock for each call",
        variant="durable-1",
        module="huey",
        packages=("huey",),
    ),
    Contestant(
        "huey default",
        "huey default",
        "huey_sqlite.py",
        jobs=5_000,
        stored="disk",
        leases=Leases.NONE,
        settings="8 threads, no fsync given: SQLite's default decides, in most builds FULL (a sync for each commit)",
        variant="default-8",
        module="huey",
        packages=("huey",),
    ),
    Contestant(
        "huey relaxed",
        "huey relaxed",
        "huey_sqlite.py",
        jobs=10_000,
        stored="system",
        leases=Leases.NONE,
        settings="8 threads, fsync=False",
        variant="relaxed-8",
        module="huey",
        packages=("huey",),
    ),
    Contestant(
        "huey relaxed 1 thread",
        "huey relaxed, 1 thread",
        "huey_sqlite.py",
        jobs=30_000,
        stored="system",
        leases=Leases.NONE,
        settings="the same with one thread",
        variant="relaxed-1",
        module="huey",
        packages=("huey",),
    ),
    Contestant(
        "dramatiq",
        "dramatiq",
        "dramatiq_redis.py",
        jobs=8_000,
        stored="memory",
        leases=Leases.TIMEOUT,
        settings="1 process, 8 threads, prefetch 128 (by default 16, half as fast), default middleware, no results",
        module="dramatiq.brokers.redis",
        packages=("dramatiq", *CLIENT),
        redis=True,
    ),
    Contestant(
        "rq",
        "RQ",
        "rq_redis.py",
        jobs=1_000,
        stored="memory",
        leases=Leases.ACK,
        settings="worker pool of SimpleWorkers (no fork for a job), two processes a core, which is its fastest; no log",
        module="rq.worker_pool",
        packages=("rq", *CLIENT),
        redis=True,
    ),
    Contestant(
        "celery",
        "Celery",
        "celery_redis.py",
        jobs=1_600,
        stored="memory",
        leases=Leases.NONE,
        settings=(
            "-P threads -c 8, task_ignore_result, prefetch multiplier 64, no rate limits, no gossip, mingle, heartbeat"
        ),
        module="celery",
        packages=("celery", "kombu", *CLIENT),
        redis=True,
    ),
    Contestant(
        "taskiq",
        "taskiq",
        "taskiq_stream.py",
        jobs=5_000,
        stored="memory",
        leases=Leases.TIMEOUT,
        settings="1 process, async handler, 100 at a time, RedisStreamBroker (faster than the list), no result backend",
        module="taskiq_redis",
        packages=("taskiq", "taskiq-redis", *CLIENT),
        redis=True,
    ),
]
TITLES = {this.name: this.title for this in CONTESTANTS}


@dataclass(frozen=True)
class Round:
    jobs: int  # that were timed
    seconds: float

    @property
    def rate(self) -> float:
        return self.jobs / self.seconds


@dataclass
class Line:
    """A contestant and its rounds. `failure`: why it has no more of them, and no figure."""

    contestant: Contestant
    version: str
    jobs: int  # for its next round
    rounds: list[Round] = field(default_factory=list)
    failure: str | None = None

    @property
    def rate(self) -> float | None:
        return statistics.median(this.rate for this in self.rounds) if self.rounds and not self.failure else None

    @property
    def spread(self) -> float | None:
        if self.rate is None:
            return None
        rates = [this.rate for this in self.rounds]
        return (max(rates) - min(rates)) / 2 / self.rate

    def ratio(self, to: Line) -> float | None:
        """Of the rounds that both have: a run that was stopped may have one more of one of them."""
        if self.rate is None or to.rate is None:
            return None
        return statistics.median(one.rate / other.rate for one, other in zip(self.rounds, to.rounds, strict=False))


# -- measuring --------------------------------------------------------------------------------------------------------


def present(only: str | None) -> list[Line]:
    """Those that can take part; the others are named with the reason."""
    lines = []
    for contestant in CONTESTANTS:
        if not wanted(contestant.name, only):
            continue
        try:
            version = contestant.version()
        except SkippedError as reason:
            print(f"{contestant.title:{LABEL}}SKIPPED: {reason}")
            continue
        lines.append(Line(contestant, version, contestant.jobs))
        print(f"{contestant.title:{LABEL}}{version}: {contestant.settings}")
    return lines


def measure(lines: Sequence[Line], directory: Path, rounds: int) -> None:
    for number in range(rounds):
        first = number % len(lines) if lines else 0
        for line in [*lines[first:], *lines[:first]]:
            if line.failure is not None:
                continue
            try:
                this = measure_round(line.contestant, line.jobs, directory)
            except Exception as error:  # anything may fail in a peer, and the others go on
                line.failure = f"{type(error).__name__}: {error}"[:300]
                continue
            line.rounds.append(this)
            line.jobs = max(FEWEST_JOBS, min(MOST_JOBS, int(this.rate * ROUND_S) // 100 * 100))


def measure_round(contestant: Contestant, jobs: int, directory: Path) -> Round:
    place = Path(tempfile.mkdtemp(dir=directory))
    try:
        if contestant.redis:
            with redis_server(place) as socket:
                return consumed(contestant, str(socket), jobs, place)
        return consumed(contestant, str(place / "data"), jobs, place)
    finally:
        shutil.rmtree(place, ignore_errors=True)


@contextmanager
def redis_server(place: Path) -> Iterator[Path]:
    """A fresh one that writes nothing to a disk. It is faster so, and that is the harder bar."""
    sockets = socket_directory()
    try:
        socket = sockets / "s"
        command = [program(REDIS[0], package=REDIS[1]), "--port", "0", "--unixsocket", str(socket)]
        command += ["--dir", str(place), "--appendonly", "no", "--save", ""]
        server = Server(command, directory=place, ready=socket.exists)
        try:
            yield socket
        finally:
            server.stop()
    finally:
        shutil.rmtree(sockets, ignore_errors=True)


def consumed(contestant: Contestant, where: str, jobs: int, place: Path) -> Round:
    """Fill, work until the last job has run, stop the consumer in order."""
    (place / "data").mkdir()
    own = place / "consumer"  # the log of a Redis is beside it
    own.mkdir()
    report = own / "report"
    base = [sys.executable, str(CONSUMERS / contestant.program)]
    options = [contestant.variant, where, str(jobs), str(report)]
    filled = subprocess.run(
        [*base, "fill", *options],
        check=False,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=FILL_S,
        start_new_session=True,  # a Ctrl-C is for this process, which then ends the other
        preexec_fn=servers.die_with_parent if sys.platform == "linux" else None,
    )
    if filled.returncode:
        said = filled.stdout.strip().splitlines() or ["it said nothing"]
        raise RuntimeError(f"filling ended with {filled.returncode}: {said[-1]}")
    consumer = Server([*base, "work", *options], directory=own, ready=lambda: len(marks(report)) == 2, start_s=WORK_S)
    consumer.stop()
    first, last = marks(report)
    if last["different"] != jobs:
        raise RuntimeError(f"of {jobs} jobs only {last['different']} came, some of them twice")
    return Round(last["jobs"] - first["jobs"], last["seconds"] - first["seconds"])


def marks(report: Path) -> list[dict[str, Any]]:
    """The complete lines of a report that is being written."""
    if not report.exists():
        return []
    *lines, _ = report.read_text().split("\n")
    return [json.loads(line) for line in lines]


# -- telling ----------------------------------------------------------------------------------------------------------


def fastest(lines: Iterable[Line]) -> Line | None:
    rates = [(line.rate, number, line) for number, line in enumerate(lines) if line.rate is not None]
    return max(rates)[-1] if rates else None


def bars_of(lines: Mapping[str, Line]) -> list[Bar]:
    bests = (
        (
            "huey SQLite consumer, durable",
            BARS["durable"],
            fastest(lines[name] for name in DURABLE_PEERS if name in lines),
        ),
        (
            "fastest Redis-backed worker",
            BARS["redis"],
            fastest(line for line in lines.values() if line.contestant.redis),
        ),
    )
    return [
        Bar(
            f"{TITLES[name]} / {what}",
            mine.ratio(best) if (mine := lines.get(name)) and best else None,
            limit,
            note=best.contestant.name if best else "",
        )
        for name in MINE
        for what, limit, best in bests
    ]


def print_table(lines: Mapping[str, Line]) -> None:
    heads = [f"{mine.contestant.title} / it" for name in MINE if (mine := lines.get(name))]
    print(f"\n{'':{LABEL}}{'stored':>8}{'jobs/s':>10}{'±':>6}{'jobs':>9}" + "".join(f"{head:>21}" for head in heads))
    for name, line in lines.items():
        contestant = line.contestant
        label = f"{contestant.title}{MARKS[contestant.leases]}"
        if line.failure:
            print(f"{label:{LABEL}}{contestant.stored:>8}    failed: {line.failure}")
            continue
        ratios = [mine.ratio(line) if name not in MINE else None for other in MINE if (mine := lines.get(other))]
        timed = statistics.median(this.jobs for this in line.rounds) if line.rounds else None
        print(
            f"{label:{LABEL}}{contestant.stored:>8}{figure(line.rate, ',.0f'):>10}{figure(line.spread, '.0%'):>6}"
            f"{figure(timed, ',.0f'):>9}" + "".join(f"{figure(ratio, '.2f'):>21}" for ratio in ratios)
        )


def as_json(facts: Mapping[str, str], lines: Mapping[str, Line], found: Sequence[Bar]) -> dict[str, Any]:
    return {
        "facts": facts,
        "contestants": {
            name: {
                **asdict(line.contestant),
                "version": line.version,
                "jobs_per_s": line.rate,
                "spread": line.spread,
                "rounds": [{**asdict(this), "jobs_per_s": this.rate} for this in line.rounds],
                "failure": line.failure,
                "ratios": {mine: lines[mine].ratio(line) for mine in MINE if mine in lines},
            }
            for name, line in lines.items()
        },
        "bars": [{**asdict(this), "met": this.met} for this in found],
    }


# -- the command ------------------------------------------------------------------------------------------------------


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=ROUNDS, metavar="N", help=f"of each contestant ({ROUNDS})")
    parser.add_argument("--only", metavar="PATTERN", help="contestants whose name has or matches this")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every round to FILE as well")
    parser.add_argument("--dir", type=Path, default=Path(), help="measure the disk of this directory (default: here)")
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error("--rounds: at least 1")
    if not any(wanted(contestant.name, options.only) for contestant in CONTESTANTS):
        parser.error(f"--only: there are {', '.join(contestant.name for contestant in CONTESTANTS)}")
    return options


def main() -> None:
    options, began, stopped = arguments(), time.monotonic(), False
    signal.signal(signal.SIGTERM, end_in_order)
    with tempfile.TemporaryDirectory(prefix="rivetq-workers-", dir=options.dir, ignore_cleanup_errors=True) as place:
        directory = Path(place).resolve()
        facts = machine.facts(directory)
        for name, fact in facts.items():
            print(f"{name:{LABEL}}{fact}")
        found = present(options.only)
        print(
            f"{'rounds':{LABEL}}{options.rounds} of about {ROUND_S} s for each, alternating; medians\n\n{CAVEAT}",
            flush=True,
        )
        try:
            measure(found, directory, options.rounds)
        except KeyboardInterrupt:
            stopped = True
            print("\nstopped; what was measured until then:")
        finally:
            servers.stop_all()
    lines = {line.contestant.name: line for line in found}
    print_table(lines)
    bars = bars_of(lines)
    print_bars(bars if options.only is None else [this for this in bars if this.figure is not None])
    print(f"measured in {time.monotonic() - began:.0f} s")
    if options.json:
        options.json.write_text(json.dumps(as_json(facts, lines, bars), indent=1) + "\n")
    if stopped:
        sys.exit(128 + signal.SIGINT)


if __name__ == "__main__":
    main()
