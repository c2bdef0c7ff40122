"""Plots of a run, as SVG: from the command with --plots DIR, or by `python plots.py RESULTS.json DIR`."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from contestants import needed

MINE, RAW = "rivetq", "raw"
COLORS = {
    MINE: "#c2410c",
    RAW: "#374151",
    "sqlite": "#0369a1",
    "persist": "#1d4ed8",
    "huey": "#4d7c0f",
    "litequeue": "#be185d",
    "honker": "#9f1239",
    "diskcache": "#a16207",
    "redis": "#0d9488",
    "beanstalkd": "#7c3aed",
    "postgres": "#64748b",
}
PLAIN = "#94a3b8"  # for a contestant that has no color yet
MIB_IN_KB = 1024


def draw(results: Mapping[str, Any], directory: Path) -> list[Path]:
    """Every plot for which the results have figures; the files written."""
    directory.mkdir(parents=True, exist_ok=True)
    matplotlib: Any = needed("matplotlib", package="matplotlib")
    matplotlib.use("svg")
    plain = {"axes.spines.top": False, "axes.spines.right": False}
    matplotlib.rcParams |= {"svg.hashsalt": "rivetq", "font.size": 9, **plain}
    pyplot = needed("matplotlib.pyplot", package="matplotlib")
    written: list[Path] = []

    def save(figure: Any, name: str) -> None:
        path = directory / f"{name}.svg"
        figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
        pyplot.close(figure)
        written.append(path)

    for mode in ("durable", "relaxed"):
        lines = [line for line in results["workloads"] if line["mode"] == mode and line["payload_bytes"] == 256]
        if rates := [line for line in lines if line["kind"] != "paced" and line["jobs_per_s"].get(MINE)]:
            save(speeds(pyplot, rates, results["titles"], mode), f"speed-{mode}")
        if paced := [line for line in lines if line["kind"] == "paced" and line["p50_ms"]]:
            save(latencies(pyplot, paced[0], results["titles"], mode), f"latency-{mode}")
    if backlogs := backlog_series(results["scale"]):
        save(costs(pyplot, backlogs), "scale-cost")
        save(memory(pyplot, backlogs), "scale-memory")
    return written


def speeds(pyplot: Any, lines: Sequence[Any], titles: Mapping[str, str], mode: str) -> Any:
    """A panel for each workload, a bar for each contestant."""
    columns = 3
    rows = -(-len(lines) // columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(4 * columns, 2.4 * rows), squeeze=False)
    for panel, line in zip(axes.flat, lines, strict=False):
        found = {name: value for name, value in line["jobs_per_s"].items() if value}
        names = list(reversed(found))
        panel.barh(
            [titles[name] for name in names],
            [found[name] for name in names],
            color=[COLORS.get(name, PLAIN) for name in names],
        )
        panel.set_title(line["title"], loc="left", fontsize=9)
        panel.xaxis.set_major_locator(pyplot.MaxNLocator(4))
        panel.xaxis.set_major_formatter(lambda value, position: f"{value:,.0f}")
    for panel in list(axes.flat)[len(lines) :]:
        panel.set_visible(False)
    figure.suptitle(f"jobs per second, {mode}, 256 B payloads")
    figure.tight_layout()
    return figure


def latencies(pyplot: Any, line: Any, titles: Mapping[str, str], mode: str) -> Any:
    """Points, not bars: the scale is logarithmic and has no zero for a bar to start from."""
    figure, panel = pyplot.subplots(figsize=(6, 3.5))
    names = list(reversed([name for name, value in line["p50_ms"].items() if value]))
    for place, name in enumerate(names):
        color, ends = COLORS.get(name, PLAIN), (line["p50_ms"][name], line["p99_ms"][name])
        panel.plot(ends, (place, place), color=color, linewidth=2)
        panel.plot(ends[0], place, "o", color=color)
        panel.plot(ends[1], place, "|", color=color, markersize=10)
    panel.set_yticks(range(len(names)), [titles[name] for name in names])
    panel.set_xscale("log")
    panel.xaxis.set_major_formatter(plainly)
    panel.set_xlabel("ms from before the enqueue to the job in hand: point p50, stroke p99")
    panel.set_title(f"latency, {mode}, {line['title']}", loc="left")
    return figure


def plainly(value: float, position: int) -> str:
    """A tick's label without powers of ten."""
    return f"{value:g}"


def backlog_series(scale: Mapping[str, Any]) -> dict[str, list[tuple[int, Any]]]:
    found: dict[str, list[tuple[int, Any]]] = {}
    for name, figures in scale.items():
        if name.startswith("scale ") and "failure" not in figures:
            _, kind, jobs = name.split()
            found.setdefault(kind, []).append((int(jobs), figures))
    return found


def costs(pyplot: Any, series: Mapping[str, Sequence[tuple[int, Any]]]) -> Any:
    figure, panel = pyplot.subplots(figsize=(6, 3.5))
    calls = {"enqueue_us": "-", "enqueue_many_us": "--", "answer_us": "-.", "answer_many_us": ":"}
    labels = ("enqueue", "enqueue_many(1000)", "lease + ack", "lease + ack by 100")
    for kind, points in series.items():
        for (key, style), label in zip(calls.items(), labels, strict=True):
            xs, ys = [jobs for jobs, _ in points], [figures[key] for _, figures in points]
            panel.plot(xs, ys, style, marker="o", markersize=3, color=COLORS[kind], label=f"{kind}: {label}")
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.yaxis.set_major_formatter(plainly)
    panel.yaxis.set_minor_formatter(lambda value, position: "")
    panel.set_xlabel("waiting jobs")
    panel.set_ylabel("µs a job, relaxed")
    panel.legend(fontsize=7, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.15))
    return figure


def memory(pyplot: Any, series: Mapping[str, Sequence[tuple[int, Any]]]) -> Any:
    figure, panel = pyplot.subplots(figsize=(6, 3.5))
    for kind, points in series.items():
        for state, style in (("filling", "--"), ("full", "-"), ("draining", ":")):
            xs = [jobs for jobs, _ in points]
            ys = [(figures[f"{state}_kb"] - figures["empty_kb"]) / MIB_IN_KB for _, figures in points]
            panel.plot(xs, ys, style, marker="o", markersize=3, color=COLORS[kind], label=f"{kind}, {state}")
    panel.set_xscale("log")
    panel.set_xlabel("waiting jobs")
    panel.set_ylabel("RssAnon above an empty queue, MiB")
    panel.legend(fontsize=7, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.15))
    return figure


if __name__ == "__main__":
    for drawn in draw(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])):
        print(drawn)
