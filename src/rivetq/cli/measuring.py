"""The command bench."""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial

import click
from rich.progress import Progress, TaskID

from rivetq import Broker

from .command import command, settings_of
from .showing import add_row, errors, print_json, print_table, table_of, wants_json


@command()
@click.option(
    "--seconds", type=click.FloatRange(0.01), default=3.0, show_default=True, help="For each of the measurements."
)
@click.option("--threads", type=click.IntRange(1), default=8, show_default=True)
@click.option("--bytes", "size", type=click.IntRange(0), default=256, show_default=True, help="Of a payload.")
def bench(seconds: float, threads: int, size: int) -> None:
    """Measure this disk: jobs a second, in a new directory beside the broker's."""
    settings = settings_of()
    parent = os.path.dirname(os.path.abspath(settings.path))
    figures: dict[str, float] = {}
    options = {**settings.broker_options(), "release_on_open": True}
    with (
        tempfile.TemporaryDirectory(prefix="rivetq-bench-", dir=parent) as directory,
        Broker(os.path.join(directory, "data"), **options) as broker,
        Progress(console=errors, transient=True, disable=not errors.is_terminal) as progress,
    ):
        payload = os.urandom(size)
        rounds: list[tuple[str, int, Callable[[], int]]] = [
            ("enqueue, 1 thread", 1, lambda: bool(broker.enqueue("bench", payload))),
            (f"enqueue, {threads} threads", threads, lambda: bool(broker.enqueue("bench", payload))),
            ("enqueue_many of 100, 1 thread", 1, lambda: len(broker.enqueue_many("bench", [payload] * 100))),
            (f"lease and ack, {threads} threads", threads, lambda: _lease_and_ack(broker)),
        ]
        for name, count, call in rounds:
            task = progress.add_task(name, total=seconds)
            figures[name] = _rate(call, count, seconds, partial(_advance, progress, task))
    if wants_json():
        print_json({"fsync": settings.fsync, "payload_bytes": size, "jobs_per_second": figures})
        return
    table = table_of("jobs a second", "call")
    for name, rate in figures.items():
        add_row(table, f"{rate:,.0f}", name)
    table.caption, table.caption_justify = f"fsync={settings.fsync}, {size} bytes a payload", "left"
    print_table(table)


def _advance(progress: Progress, task: TaskID, seconds: float) -> None:
    progress.update(task, completed=seconds)


def _lease_and_ack(broker: Broker) -> int:
    lease = broker.lease("bench")
    if lease is None:
        return 0
    lease.ack()
    return 1


def _rate(call: Callable[[], int], threads: int, seconds: float, tell: Callable[[float], None]) -> float:
    counts = [0] * threads
    ended = threading.Event()
    end = time.perf_counter() + seconds

    def work(number: int) -> None:
        while time.perf_counter() < end and not ended.is_set():
            counts[number] += call()

    started = time.perf_counter()
    workers = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
    for worker in workers:
        worker.start()
    try:
        while any(worker.is_alive() for worker in workers):
            workers[0].join(0.1)
            tell(time.perf_counter() - started)
    finally:  # Ctrl-C: before the broker is closed under them
        ended.set()
        for worker in workers:
            worker.join()
    return sum(counts) / (time.perf_counter() - started)
