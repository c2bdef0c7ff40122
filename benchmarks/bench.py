"""Measure RivetQ beside the raw limit of the disk, embedded queues and queue servers.

    python benchmarks/bench.py                          a quick look, under 5 minutes
    python benchmarks/bench.py --full --json results.json --plots docs/plots
    python benchmarks/bench.py --peers sqlite,redis --only 'durable*thread*'
    python benchmarks/bench.py --only scale             also: syncs, due, churn, pause

Rounds are short and alternate; figures are medians, ratios are those of neighbouring rounds (see measuring.py). What
is not installed is named and left out. Nothing here fails because a figure is low: the bars are printed beside them.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import machine
import plots
import scale
import servers
import syncs
from bars import COSTS, Bar, bars
from contestants import Contestant, Leases, RivetQ, SkippedError
from measuring import MINE, RAW, Line, Measure, measure_workload, p50, p99, rate
from peers import PEERS
from workloads import FRAME_BYTES, LARGE_BYTES, SMALL_BYTES, Kind, Workload, workloads_of

CAVEAT = f"""\
How to read it
  raw limit  one thread that writes the bytes of one commit (enqueue: the payload and {FRAME_BYTES} B of framing) at the
             end of a growing file: pwrite + fdatasync. It merges nothing, so several threads can exceed it.
  durable    on the disk when the call returns. RivetQ's lease is written and not synced (its ack is); where a peer's
             lease is a commit it is synced too. The table of syncs says what each of them does.
  relaxed    survives the death of the process, not a power cut: no sync for a call.
  leases     * takes a job by removing it: what its consumer dies with is gone; an ack costs it nothing
             + keeps a job until its ack, but delivers it again only when it is told to
             no mark: delivers it again when its lease has run out
  -          not run, since the system cannot do it (no batches in one commit, or no durable mode)
  failed     the reasons are below the table
Caveat: a warm page cache, one queue, an idle machine, client and server on the same one. A virtual disk may answer a
flush from its host's memory. Compare the columns of one run, not the figures of two machines."""
MARKS = {Leases.NONE: "*", Leases.ACK: "+", Leases.TIMEOUT: ""}


@dataclass(frozen=True)
class Settings:
    rounds: int
    round_s: float
    paced_rounds: int
    paced_round_s: float
    payloads: tuple[int, ...]
    plan: scale.Plan


QUICK = Settings(rounds=3, round_s=0.1, paced_rounds=3, paced_round_s=0.5, payloads=(SMALL_BYTES,), plan=scale.QUICK)
FULL = Settings(
    rounds=7, round_s=0.45, paced_rounds=5, paced_round_s=3.0, payloads=(SMALL_BYTES, LARGE_BYTES), plan=scale.FULL
)


@dataclass
class Results:
    """All of a run, as far as it has come."""

    facts: dict[str, str]
    titles: dict[str, str]
    lines: list[Line] = field(default_factory=list)
    syncs: dict[str, syncs.Counted] = field(default_factory=dict)
    scale: dict[str, dict[str, Any]] = field(default_factory=dict)


# -- choosing ---------------------------------------------------------------------------------------------------------


def wanted(name: str, pattern: str | None) -> bool:
    """A part of the name, or a pattern for the whole of it."""
    return pattern is None or pattern.lower() in name.lower() or fnmatch.fnmatch(name.lower(), pattern.lower())


def present(names: Sequence[str]) -> dict[str, type[Contestant]]:
    """The contestants that can take part; the others are named with the reason."""
    kinds: dict[str, type[Contestant]] = {}
    everybody: list[type[Contestant]] = [RivetQ, *(PEERS[name] for name in names)]
    for kind in everybody:
        try:
            version = kind.version()
        except SkippedError as reason:
            print(f"{kind.title:12}SKIPPED: {reason}")
            continue
        kinds[kind.name] = kind
        print(f"{kind.title:12}{version}: {kind.settings}")
    return kinds


@contextmanager
def started(
    kinds: Mapping[str, type[Contestant]], directory: Path, *, durable: bool
) -> Iterator[dict[str, Contestant]]:
    """The contestants of one mode, closed at the end, each whatever happens to the others."""
    contestants: dict[str, Contestant] = {}
    try:
        for name, kind in kinds.items():
            place = directory / f"{'durable' if durable else 'relaxed'}-{name}"
            place.mkdir(mode=0o711)
            try:
                contestants[name] = kind(place, durable=durable)
            except Exception as error:  # a peer that does not start is left out, whatever its reason
                print(f"{kind.title} does not start and is left out: {error}")
        yield contestants
    finally:
        for contestant in contestants.values():
            try:
                contestant.close()
            except Exception as error:  # the next one must be closed too
                print(f"{contestant.title} did not close in order: {error}", file=sys.stderr)


# -- measuring --------------------------------------------------------------------------------------------------------


def run_workloads(
    results: Results, kinds: Mapping[str, type[Contestant]], directory: Path, settings: Settings, only: str | None
) -> None:
    chosen = [
        workload
        for payload_bytes in settings.payloads
        for workload in workloads_of(payload_bytes)
        if wanted(workload.name, only)
    ]
    for durable in (True, False):
        mine = [workload for workload in chosen if workload.durable is durable]
        if not mine:
            continue
        with started(kinds, directory, durable=durable) as contestants:
            heading = ""
            for workload in mine:
                if (now := heading_of(workload)) != heading:
                    heading = now
                    print_headings(heading, contestants)
                paced = workload.kind is Kind.PACED
                line = measure_workload(
                    workload,
                    contestants,
                    directory,
                    rounds=settings.paced_rounds if paced else settings.rounds,
                    round_s=settings.paced_round_s if paced else settings.round_s,
                )
                results.lines.append(line)
                print_line(line, contestants)


def run_syncs(results: Results, kinds: Mapping[str, type[Contestant]], directory: Path) -> None:
    print(f"\n{'syncs, durable, by strace':28}" + "".join(f"{phase:>20}" for phase in syncs.PHASES))
    for name, kind in kinds.items():
        if not kind.abilities.durable:
            print(f"{kind.title:28}has no durable mode")
            continue
        place = directory / f"syncs-{name}"
        place.mkdir(mode=0o711)
        try:
            counted = syncs.count(name, place)
        except (OSError, AssertionError, ValueError) as error:
            counted = syncs.Counted({}, [], f"{type(error).__name__}: {error}")
        shutil.rmtree(place, ignore_errors=True)
        results.syncs[name] = counted
        if counted.failure is not None:
            print(f"{kind.title:28}not counted: {counted.failure}")
            continue
        figures = "".join(f"{figure(counted.per_call[phase], '.2f'):>20}" for phase in syncs.PHASES)
        opened = f"   opens with O_SYNC or O_DSYNC: {', '.join(counted.synced_files)}" if counted.synced_files else ""
        print(f"{kind.title:28}{figures}{opened}", flush=True)


def run_scale(results: Results, directory: Path, settings: Settings, only: str | None) -> None:
    chosen = [(name, step) for name, step in scale.steps(settings.plan) if wanted(name, only)]
    for number, (name, step) in enumerate(chosen):
        place, began = directory / f"scale-{number}", time.monotonic()
        place.mkdir()
        try:
            results.scale[name] = step(place)
        except Exception as error:  # the next step may be able to
            results.scale[name] = {"failure": f"{type(error).__name__}: {error}"}
        shutil.rmtree(place, ignore_errors=True)
        print(f"{name}: done after {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)  # minutes may pass
    if chosen:
        print_scale(results.scale)


# -- telling ----------------------------------------------------------------------------------------------------------


LABEL, COLUMN = 22, 11


def heading_of(workload: Workload) -> str:
    unit = "p50 / p99, ms" if workload.kind is Kind.PACED else "jobs/s"
    return f"{'durable' if workload.durable else 'relaxed'}, {workload.payload_bytes} B, {unit}"


def print_headings(heading: str, contestants: Mapping[str, Contestant]) -> None:
    columns = ["" if "relaxed" in heading else "raw limit", RivetQ.title, "±"]
    columns += [
        f"{contestant.title}{MARKS[contestant.abilities.leases]}"
        for name, contestant in contestants.items()
        if name != MINE
    ]
    print(f"\n{heading}\n{'':{LABEL}}{columns[0]:>{COLUMN}}{columns[1]:>{COLUMN}}{columns[2]:>6}", end="")
    print("".join(f"{column:>{COLUMN + 1}}" for column in columns[3:]) + f"{'/ raw':>8}  / best peer")


def print_line(line: Line, contestants: Mapping[str, Contestant]) -> None:
    paced = line.workload.kind is Kind.PACED
    cells = "".join(f"{cell(line, name):>{COLUMN + 1}}" for name in contestants if name != MINE)
    best = line.best_peer(p50 if paced else rate)
    compared = f"{figure(line.ratio(best, p50 if paced else rate), '.2f', 'x')} {best}" if best else "-"
    with_leases = line.best_peer(with_leases=True)
    if not paced and line.workload.kind is not Kind.ENQUEUE and with_leases and with_leases != best:
        compared += f"; {figure(line.ratio(with_leases), '.2f', 'x')} {with_leases}, which keeps jobs"
    if (shared := line.records_per_sync) is not None and line.workload.threads > 1 and not paced:
        compared += f"; {shared:.1f} records a sync"
    raw = cell(line, RAW) if line.workload.commit_bytes else ""
    print(
        f"{line.workload.title:{LABEL}}{raw:>{COLUMN}}{cell(line, MINE):>{COLUMN}}"
        f"{figure(None if paced else line.spread(MINE), '.0%'):>6}{cells}"
        f"{figure(line.ratio(RAW), '.2f') if raw else '':>8}  {compared}",
        flush=True,
    )
    for name, this in line.cells.items():
        if this.failure is not None and this.able:
            print(f"{'':{LABEL}}  {name} failed: {this.failure}")


def cell(line: Line, name: str) -> str:
    this = line.cells.get(name)
    if this is None or not this.able:
        return "-"
    if not this.valid:
        return "failed"
    if line.workload.kind is Kind.PACED:
        return f"{short(line.figure(name, p50))}/{short(line.figure(name, p99))}"
    return figure(line.figure(name), ",.0f")


def short(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def figure(value: float | None, form: str, unit: str = "") -> str:
    return "-" if value is None else f"{value:{form}}{unit}"


def print_scale(found: Mapping[str, Mapping[str, Any]]) -> None:
    """The backlogs as a table, the rest as sentences."""
    columns = {
        "enqueue": ("enqueue_us", 1.0),
        "many": ("enqueue_many_us", 1.0),
        "lease+ack": ("answer_us", 1.0),
        "by 100": ("answer_many_us", 1.0),
        "open": ("open_s", 1000.0),
        "1st job": ("open_first_job_s", 1000.0),
        "rebuild": ("rebuild_s", 1.0),
        "disk": ("disk_bytes", 1 / 2**20),
    }
    states = ("filling", "full", "open", "draining")
    backlogs = {name: figures for name, figures in found.items() if name.startswith("scale ")}
    if backlogs:
        print(f"\n{'waiting jobs, 256 B':28}{'µs a job (relaxed)':>36}{'ms':>18}{'s':>9}{'MiB':>9}", end="")
        print(f"{'RssAnon above an empty one, MiB':>36}\n{'':28}", end="")
        print("".join(f"{title:>9}" for title in columns) + "".join(f"{state:>9}" for state in states))
    for name, figures in backlogs.items():
        _, kind, jobs = name.split()
        title = f"{kind} {int(jobs):,}"
        if "failure" in figures:
            print(f"{title:28}failed: {figures['failure']}")
            continue
        print(f"{title:28}", end="")
        for key, factor in columns.values():
            value = figures.get(key)
            print(f"{figure(None if value is None else value * factor, ',.1f'):>9}", end="")
        print("".join(f"{(figures[f'{state}_kb'] - figures['empty_kb']) / 1024:>9.1f}" for state in states))
    print()
    for name, figures in found.items():
        if name in backlogs:
            continue
        print(f"{name}: {sentence(name, figures)}")


def sentence(name: str, figures: Mapping[str, Any]) -> str:
    if "failure" in figures:
        return f"failed: {figures['failure']}"
    if name == "due":
        return (
            f"{figures['jobs']:,} delayed jobs due at once: all ready after {seconds(figures['ready_s'])}, all leased "
            f"and acked after {seconds(figures['leased_s'])}; of {figures['calls']:,} calls beside them the longest "
            f"took {figures['longest_call_ms']:.1f} ms ({figures['longest_call']}), p99 {figures['p99_call_ms']:.2f} ms"
        )
    if name == "churn":
        most, end, closed, live = (figures[f"{what}_bytes"] / 2**20 for what in ("most", "end", "closed", "live"))
        metrics = figures["metrics"]
        written = figures["written_bytes"] / metrics["log_bytes_written"]
        copied = metrics["copied_bytes"] / metrics["log_bytes_written"]
        return (
            f"{figures['jobs']:,} jobs through a backlog of {scale.CHURN_STANDING:,} in {figures['seconds']:.1f} s: "
            f"disk at most {most:.0f} MiB, at the end {end:.0f}, closed {closed:.0f}; live {live:.1f}. Written: "
            f"{written:.2f} times the log (zeros ahead of it and the index included), of which {copied:.2%} are copies"
        )
    return (
        f"an unsynced enqueue beside it: p50 {figures['p50_ms']:.3f} ms, p99 {figures['p99_ms']:.3f}, longest "
        f"{figures['max_ms']:.1f}, over {figures['calls']:,} calls and {figures['runs']} runs of "
        f"{figures['run_ms']:.0f} ms; p99 alone {figures['alone_p99_ms']:.3f}. At {scale.ON_TIME_PER_S}/s, from when "
        f"each call was due: p99 {figures['on_time_p99_ms']:.3f}, alone {figures['on_time_alone_p99_ms']:.3f}"
    )


def seconds(value: float | None) -> str:
    return f"more than {scale.DUE_PATIENCE_S:.0f} s" if value is None else f"{value:.2f} s"


def print_bars(found: Sequence[Bar]) -> None:
    print(f"\n{'bar':62}{'figure':>12}{'wanted':>14}")
    for this in found:
        limit = f"{'<=' if this.at_most else '>='} {this.bar:.4g} {this.unit}"
        said = {True: "met", False: "NOT MET", None: "not measured in this run"}[this.met]
        note = f" ({this.note})" if this.note else ""
        print(f"{this.name:62}{figure(this.figure, ',.2f'):>12}{limit:>14}  {said}{note}")


def as_json(results: Results, settings: Settings, found: Sequence[Bar]) -> dict[str, Any]:
    def by_name(line: Line, measure: Measure) -> dict[str, float | None]:
        return {name: line.figure(name, measure) for name in line.cells}

    return {
        "facts": results.facts,
        "settings": asdict(settings),
        "titles": results.titles,
        "workloads": [
            {
                "name": line.workload.name,
                "title": line.workload.title,
                "kind": line.workload.kind,
                "mode": "durable" if line.workload.durable else "relaxed",
                "threads": line.workload.threads,
                "batch": line.workload.batch,
                "payload_bytes": line.workload.payload_bytes,
                "jobs_per_s": by_name(line, rate),
                "p50_ms": by_name(line, p50) if line.workload.kind is Kind.PACED else {},
                "p99_ms": by_name(line, p99) if line.workload.kind is Kind.PACED else {},
                "of_raw": line.ratio(RAW),
                "best_peer": line.best_peer(),
                "best_peer_with_leases": line.best_peer(with_leases=True),
                "records_per_sync": line.records_per_sync,
                "failures": {name: this.failure for name, this in line.cells.items() if this.failure},
                "rounds": {name: [asdict(one) for one in this.rounds] for name, this in line.cells.items()},
            }
            for line in results.lines
        ],
        "syncs": {name: asdict(counted) for name, counted in results.syncs.items()},
        "scale": results.scale,
        "scale_costs": COSTS,
        "bars": [{**asdict(this), "met": this.met} for this in found],
    }


# -- the command ------------------------------------------------------------------------------------------------------


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--full", action="store_true", help="everything: longer rounds, 1 KiB too, 10 million jobs")
    parser.add_argument("--only", metavar="PATTERN", help="workloads and measurements whose name has or matches this")
    parser.add_argument("--peers", metavar="A,B", help=f"of {','.join(PEERS)} (default: all; an empty list: none)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every round to FILE as well")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="draw plots (SVG) into DIR")
    parser.add_argument("--dir", type=Path, default=Path(), help="measure the disk of this directory (default: here)")
    options = parser.parse_args()
    options.peers = list(PEERS) if options.peers is None else [name for name in options.peers.split(",") if name]
    if unknown := [name for name in options.peers if name not in PEERS]:
        parser.error(f"no such peer: {', '.join(unknown)}; there are {', '.join(PEERS)}")
    return options


def end_in_order(number: int, frame: FrameType | None) -> None:
    """A SIGTERM ends the benchmark as a Ctrl-C does: servers stopped, files gone."""
    raise KeyboardInterrupt


def main() -> None:
    options, began, stopped = arguments(), time.monotonic(), False
    settings = FULL if options.full else QUICK
    signal.signal(signal.SIGTERM, end_in_order)
    with tempfile.TemporaryDirectory(prefix="rivetq-bench-", dir=options.dir, ignore_cleanup_errors=True) as place:
        directory = Path(place).resolve()
        directory.chmod(0o711)  # a server that runs as another user has to reach its own directory below
        facts = machine.facts(directory)
        for name, fact in facts.items():
            print(f"{name:12}{fact}")
        kinds = present(options.peers)
        print(f"{'rounds':12}{settings.rounds} of {settings.round_s} s for each figure, ", end="")
        print(f"{settings.paced_rounds} of {settings.paced_round_s} s for the paced ones, alternating; medians")
        print(f"\n{CAVEAT}")
        results = Results(facts, {RAW: "raw limit"} | {name: kind.title for name, kind in kinds.items()})
        try:
            run_workloads(results, kinds, directory, settings, options.only)
            if wanted("syncs", options.only):
                run_syncs(results, kinds, directory)
            if RivetQ.name in kinds:
                run_scale(results, directory, settings, options.only)
        except KeyboardInterrupt:
            stopped = True
            print("\nstopped; what was measured until then:")
        finally:
            servers.stop_all()
    found = bars(results.lines, results.scale)
    print_bars(found if options.only is None else [this for this in found if this.figure is not None])
    print(f"measured in {time.monotonic() - began:.0f} s")
    written = as_json(results, settings, found)
    if options.json:
        options.json.write_text(json.dumps(written, indent=1) + "\n")
    if options.plots:
        for path in plots.draw(written, options.plots):
            print(path)
    if stopped:
        sys.exit(128 + signal.SIGINT)


if __name__ == "__main__":
    main()
