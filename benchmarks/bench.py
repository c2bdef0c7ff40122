"""Measure RivetQ beside the raw limit of the disk and beside a job queue written by hand on SQLite.

    python benchmarks/bench.py [--quick] [--json FILE] [--dir DIR]

Every case is run in several short rounds, in which the contestants alternate in changing order; the figures are medians
of the rounds, and a ratio is the median of the ratios within a round, so that a disk or a machine that is slow for a
while is slow for all of them. Nothing here fails because a figure is low: the bars are printed beside the figures.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sqlite3
import statistics
import sysconfig
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import opening
from cases import (
    FRAME_BYTES,
    GROUPS,
    MANY_THREADS,
    ONE_THREAD,
    PAYLOAD_BYTES,
    Case,
    Lane,
    OnRivetQ,
    OnSqlite,
    QueueLane,
    RawLane,
    Round,
)

CAVEAT = f"""\
How to read it
  raw limit   one thread that writes the bytes of one commit (enqueue: {PAYLOAD_BYTES} + {FRAME_BYTES} B of framing)
              at the end of a growing file: pwrite + fdatasync. It merges nothing: several threads can exceed it.
  durable     on the disk when the call returns: fsync="always", SQLite synchronous=FULL. RivetQ's lease is written
              and not synced (its ack is); SQLite's is synced, as every commit of its connection.
  relaxed     survives the death of the process, not a power cut: fsync="never", synchronous=OFF.
  SQLite      a queue by hand (sqlite_by_hand.py) without keys, retries, dead letters: that can only favour it.
Caveat: payloads of {PAYLOAD_BYTES} B, a warm page cache, one queue, an idle machine. A virtual disk may answer a flush
from its host's memory. Compare the columns of one run, not the figures of two machines."""


@dataclass(frozen=True)
class Settings:
    rounds: int
    round_s: float
    open_jobs: int
    open_rounds: int


FULL = Settings(rounds=7, round_s=0.45, open_jobs=100_000, open_rounds=3)
QUICK = Settings(rounds=3, round_s=0.1, open_jobs=100_000, open_rounds=1)


@dataclass
class Line:
    """The rounds of one case, by contestant; rounds of the same number were neighbours in time."""

    case: Case
    rounds: dict[str, list[Round]] = field(default_factory=dict)

    def rate(self, contestant: str) -> float | None:
        rounds = self.rounds.get(contestant)
        return statistics.median(this.rate for this in rounds) if rounds else None

    def ratio(self, contestant: str, to: str) -> float | None:
        return ratio(self.rounds.get(contestant, []), self.rounds.get(to, []))

    def spread(self, contestant: str) -> float:
        """Half the distance from the slowest to the fastest round, as a share of the median."""
        rates = [this.rate for this in self.rounds[contestant]]
        return (max(rates) - min(rates)) / 2 / statistics.median(rates)

    @property
    def records_per_fsync(self) -> float | None:
        rounds = self.rounds["rivetq"]
        fsyncs = sum(this.fsyncs for this in rounds)
        return sum(this.records for this in rounds) / fsyncs if self.case.durable and fsyncs else None


def ratio(of: Sequence[Round], to: Sequence[Round]) -> float | None:
    """The median of the ratios of neighbouring rounds."""
    ratios = [mine.rate / theirs.rate for mine, theirs in zip(of, to, strict=bool(of and to))]
    return statistics.median(ratios) if ratios else None


# -- measuring --------------------------------------------------------------------------------------------------------


def measure_group(cases: Sequence[Case], directory: Path, settings: Settings) -> list[Line]:
    """Run the cases of one group, all their lanes alternating."""
    lines = [Line(case) for case in cases]
    with ExitStack() as stack:
        lanes: list[tuple[list[Round], Lane]] = []
        for line in lines:
            for name, lane in open_lanes(line.case, Path(tempfile.mkdtemp(dir=directory))):
                stack.enter_context(closing(lane))
                lanes.append((line.rounds.setdefault(name, []), lane))
        for _, lane in lanes:
            lane.round(settings.round_s / 2)  # warm up: caches, first segments, the thread's first faults
        for number in range(settings.rounds):
            first = number % len(lanes)
            for rounds, lane in lanes[first:] + lanes[:first]:
                rounds.append(lane.round(settings.round_s))
    return lines


def open_lanes(case: Case, directory: Path) -> list[tuple[str, Lane]]:
    lanes: list[tuple[str, Lane]] = [
        ("rivetq", QueueLane(case, OnRivetQ(directory, durable=case.durable))),
        ("sqlite", QueueLane(case, OnSqlite(directory, durable=case.durable))),
    ]
    return [("raw", RawLane(case, directory)), *lanes] if case.durable else lanes


def measure_openings(directory: Path, settings: Settings) -> dict[str, list[opening.Opening]]:
    """RivetQ after a clean close and with its index deleted, and SQLite, alternating."""
    opening.fill(directory, settings.open_jobs)
    found: dict[str, list[opening.Opening]] = {"rivetq": [], "rivetq, index deleted": [], "sqlite": []}
    for _ in range(settings.open_rounds):
        found["rivetq"].append(opening.measure("rivetq", directory))
        opening.delete_index(directory)
        found["rivetq, index deleted"].append(opening.measure("rivetq", directory))
        found["sqlite"].append(opening.measure("sqlite", directory))
    return found


# -- telling ----------------------------------------------------------------------------------------------------------


def print_header(facts: dict[str, str], settings: Settings) -> None:
    for name, fact in facts.items():
        print(f"{name:10}{fact}")
    print(f"{'rounds':10}{settings.rounds} of {settings.round_s} s for each figure, alternating; medians")
    print(f"\n{CAVEAT}\n")


HEADINGS = f"{'':33}{'raw limit':>11}{'RivetQ':>11}{'':>6}{'SQLite':>11}{'of the':>9}{'of':>9}{'records':>10}\n" + (
    f"{'':33}{'jobs/s':>11}{'jobs/s':>11}{'±':>6}{'jobs/s':>11}{'limit':>9}{'SQLite':>9}{'/fsync':>10}"
)


def print_line(line: Line) -> None:
    mode = "durable" if line.case.durable else "relaxed"
    print(
        f"{mode} {line.case.name:25}{figure(line.rate('raw'), ',.0f'):>11}{figure(line.rate('rivetq'), ',.0f'):>11}"
        f"{line.spread('rivetq'):>6.0%}{figure(line.rate('sqlite'), ',.0f'):>11}"
        f"{figure(line.ratio('rivetq', 'raw'), '.2f'):>9}{figure(line.ratio('rivetq', 'sqlite'), '.2f', 'x'):>9}"
        f"{figure(line.records_per_fsync, '.1f'):>10}",
        flush=True,
    )


def figure(value: float | None, form: str, unit: str = "") -> str:
    return "-" if value is None else f"{value:{form}}{unit}"


def print_openings(openings: dict[str, list[opening.Opening]], jobs: int) -> None:
    print(f"\n{f'opening with {jobs:,} waiting jobs':33}{'open':>11}{'first job':>11}{'memory':>17}{'before':>11}")
    print(f"{'':33}{'ms':>11}{'ms':>11}{'RssAnon, MB':>17}{'MB':>11}")
    for name, rounds in openings.items():

        def median(of: Callable[[opening.Opening], float], rounds: Sequence[opening.Opening] = rounds) -> float:
            return statistics.median(of(this) for this in rounds)

        print(
            f"{name:33}{median(lambda this: this.open_ms):>11.1f}{median(lambda this: this.first_lease_ms):>11.1f}"
            f"{median(lambda this: this.anon_kb / 1024):>17.1f}{median(lambda this: this.anon_before_kb / 1024):>11.1f}"
        )


def bars(lines: Sequence[Line]) -> list[tuple[str, float, float]]:
    """What RivetQ wants of itself: what, the figure, the bar."""
    one = next(line for line in lines if line.case is ONE_THREAD)
    many = next(line for line in lines if line.case is MANY_THREADS)
    return [
        ("durable enqueue, 1 thread, of the raw limit", one.ratio("rivetq", "raw") or 0.0, 0.8),
        (f"{MANY_THREADS.threads} threads / 1 thread", ratio(many.rounds["rivetq"], one.rounds["rivetq"]) or 0.0, 4.0),
        (f"records per fsync at {MANY_THREADS.threads} threads", many.records_per_fsync or 0.0, 8.0),
    ]


def machine_facts(directory: Path) -> dict[str, str]:
    """What a reader needs to know to compare this run with another."""
    build = "free-threaded" if sysconfig.get_config_var("Py_GIL_DISABLED") else "with GIL"
    return {
        "machine": f"{cpu_model()}, {os.cpu_count()} cores, {memory_gib():.0f} GiB, {platform.platform()}",
        "disk": f"{file_system(directory)}, {shutil.disk_usage(directory).free / 2**30:.0f} GiB free",
        "python": f"{platform.python_implementation()} {platform.python_version()} {build}",
        "rivetq": f"{installed('rivetq')}, lmdb {installed('lmdb')}, crc32c {installed('crc32c')}",
        "sqlite": f"{sqlite3.sqlite_version}, WAL, one connection under a lock",
        "load": " ".join(f"{load:.2f}" for load in os.getloadavg()),
    }


def installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "from a source tree"


def cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def memory_gib() -> float:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30


def file_system(directory: Path) -> str:
    """The type of the file system that holds a directory: the mount with the longest path that leads to it."""
    try:
        mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    except OSError:
        return "unknown file system"
    leading = [(len(where), kind) for _, where, kind, *_ in mounts if directory.resolve().is_relative_to(where)]
    return max(leading)[1] if leading else "unknown file system"


def as_json(facts: dict[str, str], settings: Settings, lines: Sequence[Line], openings: Any) -> dict[str, Any]:
    return {
        "facts": facts,
        "settings": asdict(settings),
        "cases": [
            {
                "name": line.case.name,
                "durable": line.case.durable,
                "jobs_per_s": {name: line.rate(name) for name in line.rounds},
                "of_the_limit": line.ratio("rivetq", "raw"),
                "of_sqlite": line.ratio("rivetq", "sqlite"),
                "records_per_fsync": line.records_per_fsync,
                "rounds": {name: [this._asdict() for this in rounds] for name, rounds in line.rounds.items()},
            }
            for line in lines
        ],
        "openings": {name: [this._asdict() for this in rounds] for name, rounds in openings.items()},
        "bars": [{"what": what, "figure": value, "bar": bar} for what, value, bar in bars(lines)],
    }


# -- the command ------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="short rounds, for a look; not for claims")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every round to FILE as well")
    parser.add_argument("--dir", type=Path, default=Path(), help="measure the disk of this directory (default: here)")
    options = parser.parse_args()
    settings, started = QUICK if options.quick else FULL, time.monotonic()
    with tempfile.TemporaryDirectory(prefix="rivetq-bench-", dir=options.dir) as place:
        directory = Path(place)
        facts, lines = machine_facts(directory), []
        print_header(facts, settings)
        print(HEADINGS)
        for number, group in enumerate(GROUPS):
            (directory / str(number)).mkdir()
            for line in measure_group(group, directory / str(number), settings):
                print_line(line)
                lines.append(line)
            shutil.rmtree(directory / str(number))
        (directory / "open").mkdir()
        openings = measure_openings(directory / "open", settings)
    print_openings(openings, settings.open_jobs)
    print()
    for what, value, bar in bars(lines):
        print(f"{what}: {value:.2f} (bar {bar:g}{'' if value >= bar else '; below it in this run'})")
    print(f"measured in {time.monotonic() - started:.0f} s")
    if options.json:
        options.json.write_text(json.dumps(as_json(facts, settings, lines, openings), indent=1) + "\n")


if __name__ == "__main__":
    main()
