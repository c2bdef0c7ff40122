"""What RivetQ wants of itself: each bar a figure of this run and what it should be. Nothing fails on them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from measuring import RAW, Line, Measure, p50, p99, rate
from scale import DUE_PATIENCE_S
from workloads import ENQUEUE_BATCHES, LEASE_BATCH, MANY_THREADS, Kind, Workload

MIB = 2**20
SEGMENT_BYTES = 64 * MIB
SMALL_BACKLOG, LARGE_BACKLOG, REBUILT_BACKLOG = 10_000, 10_000_000, 1_000_000
FULL_CHURN, FULL_DUE = 1_000_000, 100_000
MEASURES: dict[str, Measure] = {"rate": rate, "p50": p50, "p99": p99}


@dataclass(frozen=True)
class Bar:
    """`figure` None: not measured in this run. `note`: the peer that it is relative to, or the case it stands for."""

    name: str
    figure: float | None
    bar: float
    at_most: bool = False
    unit: str = "x"
    note: str = ""

    @property
    def met(self) -> bool | None:
        if self.figure is None:
            return None
        return self.figure <= self.bar if self.at_most else self.figure >= self.bar


@dataclass(frozen=True)
class Aim:
    """Bars of one workload: relative to the raw limit, and to the best of the peers (of those that keep a job until
    its ack, where the workload acks)."""

    kind: Kind
    durable: bool
    of_best: float
    of_raw: float | None = None
    threads: int = 1
    batch: int = 1

    @property
    def workload(self) -> Workload:
        return Workload(self.kind, self.durable, threads=self.threads, batch=self.batch)


AIMS = [
    Aim(Kind.ENQUEUE, True, 1.15, of_raw=1.0),
    Aim(Kind.ENQUEUE, True, 2.0, of_raw=3.0, threads=MANY_THREADS[0]),
    Aim(Kind.ENQUEUE, True, 2.0, of_raw=5.0, threads=MANY_THREADS[1]),
    Aim(Kind.ENQUEUE, True, 1.8, batch=ENQUEUE_BATCHES[0]),
    Aim(Kind.ENQUEUE, True, 2.0, batch=ENQUEUE_BATCHES[1]),
    Aim(Kind.DRAIN, True, 1.7, of_raw=0.9),
    Aim(Kind.DRAIN, True, 2.5, batch=LEASE_BATCH),
    Aim(Kind.THROUGH, True, 3.0, threads=4),
    Aim(Kind.THROUGH, True, 2.5, threads=4, batch=LEASE_BATCH),
    Aim(Kind.ENQUEUE, False, 4.0),
    Aim(Kind.ENQUEUE, False, 2.0, batch=ENQUEUE_BATCHES[1]),
    Aim(Kind.DRAIN, False, 3.5),
    Aim(Kind.DRAIN, False, 2.5, batch=LEASE_BATCH),
]
PACED_OF_BEST = 0.5


def bars(lines: Sequence[Line], scale: Mapping[str, Mapping[str, Any]]) -> list[Bar]:
    return [*speed_bars(lines), *latency_bars(lines), *scale_bars(scale)]


def speed_bars(lines: Sequence[Line]) -> Iterator[Bar]:
    for aim in AIMS:
        line = found(lines, aim)
        what = f"{'durable' if aim.durable else 'relaxed'} {aim.workload.title}"
        if aim.of_raw is not None:
            yield Bar(f"{what} / raw limit", line.ratio(RAW) if line else None, aim.of_raw)
        acks = aim.kind is not Kind.ENQUEUE
        best = line.best_peer(with_leases=acks) if line else None
        figure = line.ratio(best) if line and best else None
        yield Bar(f"{what} / best peer{' with leases' if acks else ''}", figure, aim.of_best, note=best or "")


def latency_bars(lines: Sequence[Line]) -> Iterator[Bar]:
    for durable in (True, False):
        line = found(lines, Aim(Kind.PACED, durable, PACED_OF_BEST, threads=2))
        for name in ("p50", "p99"):
            measure = MEASURES[name]
            best = line.best_peer(measure) if line else None
            what = f"{'durable' if durable else 'relaxed'} paced latency {name} / best peer"
            figure = line.ratio(best, measure) if line and best else None
            yield Bar(what, figure, PACED_OF_BEST, at_most=True, note=best or "")


def scale_bars(scale: Mapping[str, Mapping[str, Any]]) -> Iterator[Bar]:
    small, large = (scale.get(f"scale rivetq {jobs}", {}) for jobs in (SMALL_BACKLOG, LARGE_BACKLOG))
    rebuilt = scale.get(f"scale rivetq {REBUILT_BACKLOG}", {})

    def above_empty(state: str) -> float | None:
        kb = large.get(f"{state}_kb")
        return None if kb is None else (kb - large["empty_kb"]) / 1024

    yield Bar("10 M jobs: open", large.get("open_s"), 1.0, at_most=True, unit="s")
    for state in ("filling", "full", "open", "draining"):
        yield Bar(f"10 M jobs: RssAnon above empty, {state}", above_empty(state), 150, at_most=True, unit="MiB")
    for name, what in COSTS.items():
        figure = large[name] / small[name] if name in large and name in small else None
        yield Bar(f"10 M jobs: {what} / its cost at 10 k", figure, 1.5, at_most=True)
    yield Bar("1 M jobs: rebuild without index/", rebuilt.get("rebuild_s"), 30, at_most=True, unit="s")

    due = scale.get("due", {})
    note = "" if due.get("jobs", FULL_DUE) == FULL_DUE else f"with {due['jobs']:,} jobs"
    ready_s = due.get("ready_s")
    if due.get("jobs") and ready_s is None:
        ready_s = DUE_PATIENCE_S  # it was not within that time, so the bar is missed by at least so much
    yield Bar("100 k due at once: all leasable", ready_s, 1.0, at_most=True, unit="s", note=note)
    yield Bar("100 k due at once: longest call", due.get("longest_call_ms"), 50, at_most=True, unit="ms", note=note)

    churn = scale.get("churn", {})
    note = "" if churn.get("jobs", FULL_CHURN) == FULL_CHURN else f"with {churn['jobs']:,} jobs"
    allowed = (2 * SEGMENT_BYTES + 2.5 * churn.get("live_bytes", 0)) / MIB
    end = churn["end_bytes"] / MIB if "end_bytes" in churn else None
    yield Bar("disk after 1 M through 10 k", end, allowed, at_most=True, unit="MiB", note=note)
    for what in ("checkpoint", "compact"):
        figure = scale.get(f"pause {what}", {}).get("p99_ms")
        yield Bar(f"p99 of an unsynced enqueue beside {what}()", figure, 5.0, at_most=True, unit="ms")


COSTS = {
    "enqueue_us": "enqueue",
    "enqueue_many_us": "enqueue_many(1000)",
    "answer_us": "lease + ack",
    "answer_many_us": "lease + ack by 100",
}


def found(lines: Sequence[Line], aim: Aim) -> Line | None:
    return next((line for line in lines if line.workload == aim.workload), None)
