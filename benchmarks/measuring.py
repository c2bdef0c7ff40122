"""Rounds of many lanes, alternating, and what can be said from them.

All the contestants of a workload take their short rounds in turn, in an order that rotates; a figure is the median of
a contestant's rounds, and a ratio is the median of the ratios between rounds of the same number, which were neighbours
in time: a disk or a machine that is slow for a while is slow for both. A contestant that fails is out of the workload,
with its reason, and the others go on.
"""

from __future__ import annotations

import contextlib
import shutil
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from contestants import Contestant, Leases, RivetQ
from workloads import Kind, Lane, RawLane, Round, Workload, lane_for

RAW = "raw"
MINE = RivetQ.name


@dataclass
class Cell:
    """One contestant in one workload. `failure`: why it has no (more) rounds; `able` is False where it was not run."""

    rounds: list[Round] = field(default_factory=list)
    failure: str | None = None
    able: bool = True

    @property
    def valid(self) -> bool:
        return bool(self.rounds) and self.failure is None


Measure = Callable[[Round], float]


def rate(this: Round) -> float:
    return this.rate


def p50(this: Round) -> float:
    return this.p50_ms


def p99(this: Round) -> float:
    return this.p99_ms


@dataclass
class Line:
    """A workload and its cells."""

    workload: Workload
    cells: dict[str, Cell]
    leases: Mapping[str, Leases]  # of the contestants

    def figure(self, name: str, measure: Measure = rate) -> float | None:
        cell = self.cells.get(name)
        return statistics.median(map(measure, cell.rounds)) if cell and cell.valid else None

    def spread(self, name: str) -> float | None:
        """Half the distance from the slowest to the fastest round, as a share of the median."""
        cell = self.cells.get(name)
        if not cell or not cell.valid:
            return None
        rates = [this.rate for this in cell.rounds]
        return (max(rates) - min(rates)) / 2 / statistics.median(rates)

    def ratio(self, to: str, measure: Measure = rate) -> float | None:
        """RivetQ's figure by the other's, within neighbouring rounds."""
        mine, theirs = self.cells.get(MINE), self.cells.get(to)
        if not mine or not theirs or not mine.valid or not theirs.valid:
            return None
        pairs = zip(mine.rounds, theirs.rounds, strict=True)
        return statistics.median(measure(one) / measure(other) for one, other in pairs)

    def best_peer(self, measure: Measure = rate, *, with_leases: bool = False) -> str | None:
        """The fastest of the others; for latencies the one with the least. `with_leases`: among those that keep a job
        until its ack."""
        figures = {
            name: figure
            for name in self.cells
            if name not in (RAW, MINE) and not (with_leases and self.leases.get(name) is Leases.NONE)
            if (figure := self.figure(name, measure)) is not None
        }
        best = max if measure is rate else min
        return best(figures, key=lambda name: figures[name]) if figures else None

    @property
    def records_per_sync(self) -> float | None:
        rounds = self.cells[MINE].rounds if MINE in self.cells else []
        syncs = sum(this.syncs for this in rounds)
        return sum(this.records for this in rounds) / syncs if self.workload.durable and syncs else None


def measure_workload(
    workload: Workload, contestants: Mapping[str, Contestant], directory: Path, *, rounds: int, round_s: float
) -> Line:
    """Open the lanes, warm them up, let them alternate, close them."""
    cells: dict[str, Cell] = {}
    lanes: dict[str, Lane] = {}
    place = Path(tempfile.mkdtemp(dir=directory))
    try:
        if workload.commit_bytes:
            cells[RAW], lanes[RAW] = Cell(), RawLane(workload, place)
        for name, contestant in contestants.items():
            cells[name] = Cell()
            if (reason := workload.asks_too_much(contestant.abilities)) is not None:
                cells[name] = Cell(failure=reason, able=False)
                continue
            with failing(cells[name]):
                lanes[name] = lane_for(workload, contestant.open(waiting=workload.kind is Kind.PACED))
        for number in range(-1, rounds):  # round -1 warms up: caches, connections, the first segments
            names = list(lanes)
            first = number % len(names) if names else 0
            for name in names[first:] + names[:first]:
                if cells[name].failure is None:
                    with failing(cells[name]):
                        this = lanes[name].round(round_s if number >= 0 else round_s / 2)
                        if number >= 0:
                            cells[name].rounds.append(this)
    finally:
        for name, lane in lanes.items():
            with failing(cells[name]):
                lane.close()
        shutil.rmtree(place, ignore_errors=True)
        for contestant in contestants.values():
            for left in contestant.directory.glob(f"{contestant.name}-*"):
                shutil.rmtree(left, ignore_errors=True)
    return Line(workload, cells, {name: contestant.abilities.leases for name, contestant in contestants.items()})


@contextlib.contextmanager
def failing(cell: Cell) -> Iterator[None]:
    """Note the first failure in the cell, and go on. Anything may fail in a peer; a Ctrl-C is not the peer's."""
    try:
        yield
    except Exception as error:
        if cell.failure is None:
            cell.failure = f"{type(error).__name__}: {error}"[:300]
