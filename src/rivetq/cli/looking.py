"""Commands that look: stats, queues, jobs, show, dump."""

from __future__ import annotations

import json
import sys
import time
from datetime import UTC, datetime
from typing import Any

import attrs
import click
from rich.live import Live
from rich.table import Table

from rivetq import Job, JobState, QueueStats

from .. import tools
from .command import DONE, NO_JOB, command, settings_of
from .showing import (
    add_row,
    complain,
    echo,
    job_json,
    json_text,
    plain,
    print_json,
    print_table,
    slow,
    table_of,
    wants_json,
)


def looked() -> tools.Look:
    with slow("reading the log") as progress:
        return tools.look(settings_of().path, progress=progress)


def _as_of(found: tools.Look) -> str:
    return f"as of {found.as_of.isoformat(timespec='milliseconds')}, record {found.record}"


STATS = ("ready", "scheduled", "leased", "dead", "enqueued", "acked", "cancelled", "purged")


def _now(found: tools.Look, queue: str | None = None) -> QueueStats:
    """Counts of the last record; but a job grows older while nothing is written."""
    stats = found.stats(queue)
    if stats.oldest_age is None:
        return stats
    since = (datetime.now(UTC) - found.as_of).total_seconds()
    return attrs.evolve(stats, oldest_age=stats.oldest_age + max(0.0, since))


def _stats_table(found: tools.Look) -> Table:
    table = table_of("queue", *STATS, "oldest s")
    table.caption, table.caption_justify = _as_of(found), "left"
    for queue in [*found.queues(), None]:
        stats = _now(found, queue)
        age = "" if stats.oldest_age is None else f"{stats.oldest_age:.1f}"
        add_row(table, queue if queue is not None else "(all)", *(str(getattr(stats, name)) for name in STATS), age)
    return table


@command()
@click.option("--watch", is_flag=True, help="Again and again, until Ctrl-C.")
@click.option(
    "--interval", type=click.FloatRange(0.01), default=1.0, show_default=True, help="Seconds between two looks."
)
def stats(watch: bool, interval: float) -> None:
    """Counts of all queues."""
    if wants_json():
        while True:
            with looked() as found:
                queues = {name: _now(found, name) for name in found.queues()}
                print_json({"as_of": found.as_of, "record": found.record, "all": _now(found), "queues": queues})
            if not watch:
                return
            sys.stdout.flush()
            time.sleep(interval)
    with looked() as found:
        table = _stats_table(found)
    if not watch or not sys.stdout.isatty():
        print_table(table)
        while watch:  # for a file or a pipe: one table after another
            sys.stdout.flush()
            time.sleep(interval)
            with looked() as found:
                print_table(_stats_table(found))
        return
    with Live(table, auto_refresh=False) as live:
        while True:
            time.sleep(interval)
            with looked() as found:
                live.update(_stats_table(found), refresh=True)


@command()
def queues() -> None:
    """The queues and their configurations."""
    with looked() as found:
        configs = {name: found.config(name) for name in found.queues()}
        if wants_json():
            print_json({"as_of": found.as_of, "record": found.record, "queues": configs})
            return
        table = table_of("queue", "paused", "ready", "visibility s", "max jobs", "rate limit", "attempts")
        table.caption, table.caption_justify = _as_of(found), "left"
        for name, config in configs.items():
            limit = config.rate_limit
            rate = "" if limit is None else f"{limit.per_second:g}/s, {limit.burst} at once, on {limit.on}"
            add_row(
                table, name, "yes" if config.paused else "", str(found.stats(name).ready),
                f"{config.visibility_timeout:g}", str(config.max_jobs or ""), rate,
                str(config.retry.max_attempts or "no end"),
            )  # fmt: skip
    print_table(table)


@command()
@click.argument("queue")
@click.option("--state", type=click.Choice([state.value for state in JobState]), help="Those in one state.")
@click.option("--after", default=0, help="Ids above this one: the next page.")
@click.option("--limit", default=100, show_default=True, help="At most so many, up to 10,000.")
def jobs(queue: str, state: str | None, after: int, limit: int) -> None:
    """Jobs of a queue, by id."""
    with looked() as found:
        # Payloads one at a time, and only if they are printed: a page of large ones does not fit into memory.
        listed = found.jobs(queue, state=state, after=after, limit=limit, payloads=False)
        if wants_json():
            head = json_text(plain({"as_of": found.as_of, "record": found.record}))
            click.echo(f'{head[:-1]}, "jobs": [', nl=False)
            for n, job in enumerate(listed):
                click.echo((", " if n else "") + json_text(_listed_json(found, job)), nl=False)
            click.echo("]}")
            return
        table = table_of("id", "state", "priority", "attempts", "enqueued", "due", "task", "error")
        table.caption, table.caption_justify = _as_of(found), "left"
        for job in listed:
            when = job.enqueued_at.isoformat(timespec="seconds")
            due = "" if job.due_at is None else job.due_at.isoformat(timespec="seconds")
            task = job.headers.get("rivetq-task", "")
            add_row(
                table, str(job.id), str(job.state), str(job.priority), str(job.attempts), when, due, task,
                job.last_error or "",
            )  # fmt: skip
    print_table(table)


def _listed_json(found: tools.Look, job: Job) -> dict[str, Any]:
    """With its payload; without, if the job ended since it was listed."""
    whole = found.get(job.id)
    if whole is None:
        return job_json(job, payload=False)
    return job_json(attrs.evolve(job, payload=whole.payload))


@command()
@click.argument("job_id", type=int)
def show(job_id: int) -> int:
    """One job, with its payload."""
    with looked() as found:
        job = found.get(job_id)
        if job is None:
            complain(f"there is no job {job_id} ({_as_of(found)})")
            return NO_JOB
        content = job_json(job)
        if wants_json():
            print_json({"as_of": found.as_of, "record": found.record, "job": content})
            return DONE
        for name, value in content.items():
            echo(f"{name:14} {value if isinstance(value, str) else json_text(value)}")
        echo(_as_of(found))
    return DONE


@command()
@click.option("--payloads", is_flag=True, help="With the payloads, in base64.")
def dump(payloads: bool) -> None:
    """Print the records of the log as lines of JSON."""
    for record in tools.dump(settings_of().path, payloads=payloads):
        click.echo(json.dumps(record))
