"""The command line ``rivetq``: `pip install rivetq[cli]`.

Commands that look work on a directory whatever process has it open, and say as of when. Commands that change something
open it themselves, and say who has it if somebody does.

Exit status::

    0    done
    1    the log is damaged, or something was missing (salvage); a worker whose broker failed
    2    not done: wrong usage or settings, no such directory, no space
    3    only the index or the mark is damaged (verify)
    4    there is no such job (show, cancel)
    5    another process has the directory open
    130  Ctrl-C
"""

from __future__ import annotations

import base64
import importlib
import json
import logging
import os
import re
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from typing import Any, TypeVar

import attrs

from rivetq import (
    Broker,
    BrokerLockedError,
    CorruptLogError,
    Job,
    JobState,
    QueueStats,
    RivetQError,
    UsageError,
    __version__,
)

from . import tools
from .logs import configure
from .settings import FIELDS, Settings, load
from .tasks.app import App
from .texts import escaped, shown
from .worker.options import Concurrency

try:
    import click
    from rich.console import Console
    from rich.live import Live
    from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn
    from rich.table import Table
    from rich.text import Text
except ImportError as error:  # pragma: no cover  # the tests run where both are installed
    raise SystemExit(f"rivetq: the command line needs click and rich ({error}): pip install rivetq[cli]") from None

DONE, DAMAGED, NOT_DONE, LOG_WHOLE, NO_JOB, LOCKED, INTERRUPTED = 0, 1, 2, 3, 4, 5, 130
PATIENCE_S = 1.0
"""What takes longer shows that it goes on."""
T = TypeVar("T")
errors = Console(stderr=True)


class _Group(click.Group):
    """Every error of RivetQ is one line and an exit status."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except CorruptLogError as error:
            self._end(ctx, error, DAMAGED)
        except BrokerLockedError as error:
            self._end(ctx, error, LOCKED)
        except BrokenPipeError:  # `dump | head`
            sys.stderr.close()
            ctx.exit(DONE)
        except (RivetQError, OSError) as error:
            self._end(ctx, error, NOT_DONE)
        except KeyboardInterrupt:
            click.echo("rivetq: interrupted", err=True)
            ctx.exit(INTERRUPTED)

    def _end(self, ctx: click.Context, error: BaseException, status: int) -> None:
        _complain(str(error))
        ctx.exit(status)


_STATUSES = (__doc__ or "").partition("Exit status::\n\n")[2]


@click.group(cls=_Group, epilog=f"\b\nExit status:\n{_STATUSES}")
@click.version_option(__version__, prog_name="rivetq")
@click.option("--config", type=click.Path(dir_okay=False), help="A TOML or YAML file of settings (or RIVETQ_CONFIG).")
@click.option("-d", "--directory", "path", help="The directory of the broker (or RIVETQ_PATH; by default data).")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, as after the command.")
@click.pass_context
def main(ctx: click.Context, config: str | None, path: str | None, as_json: bool) -> None:
    """A durable job queue in a directory: look into it, work on it, repair it."""
    ctx.obj = {"config": config, "path": path, "json": as_json}


def _settings(**explicit: Any) -> Settings:
    given: dict[str, Any] = click.get_current_context().obj
    return load(given["config"], **{"path": given["path"], **explicit})


def _command(name: str | None = None) -> Callable[[Callable[..., int | None]], click.Command]:
    """A command with --json and --directory; its return value is the exit status."""

    def register(function: Callable[..., int | None]) -> click.Command:
        def run(as_json: bool, directory: str | None, config_file: str | None, **arguments: Any) -> None:
            context = click.get_current_context()
            # An empty one was given, and is refused as before the command: `-d "$UNSET"` is not the default.
            context.obj["path"] = directory if directory is not None else context.obj["path"]
            context.obj["config"] = config_file if config_file is not None else context.obj["config"]
            context.obj["json"] = as_json or context.obj["json"]
            context.exit(function(**arguments) or DONE)

        run.__doc__ = function.__doc__
        run.__click_params__ = getattr(function, "__click_params__", [])  # type: ignore[attr-defined]  # as click keeps them
        command = click.option("--json", "as_json", is_flag=True, help="Print JSON.")(run)
        command = click.option("-d", "--directory", help="As before the command.")(command)
        command = click.option("--config", "config_file", type=click.Path(dir_okay=False), help="The same.")(command)
        return main.command(name or function.__name__.strip("_").replace("_", "-"))(command)

    return register


def _wants_json() -> bool:
    found: bool = click.get_current_context().obj["json"]
    return found


def _plain(value: Any) -> Any:
    """What json.dumps takes."""
    if attrs.has(type(value)):
        return {name: _plain(item) for name, item in attrs.asdict(value, recurse=False).items()}
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


# What job writers wrote goes out without control characters, and never as markup of rich


def _json_text(value: Any) -> str:
    """JSON in the letters of all languages. What cannot be printed stands inside of strings only: there as escapes."""
    text = json.dumps(value, ensure_ascii=False)
    return text if text.isprintable() else _UNPRINTABLE.sub(_json_escape, text)


_UNPRINTABLE = re.compile(r"[^ -~\w]")
"""Candidates: of all that is neither ASCII nor a letter only some cannot be printed."""


def _json_escape(found: re.Match[str]) -> str:
    letter = found[0]
    if letter.isprintable():
        return letter
    return json.dumps(letter)[1:-1] if ord(letter) > 127 else f"\\u{ord(letter):04x}"


def _print_json(value: Any) -> None:
    click.echo(_json_text(_plain(value)))


def _echo(text: str) -> None:
    click.echo(escaped(text))


def _complain(text: str) -> None:
    """On standard error; the further lines of a message are indented."""
    click.echo("rivetq: " + "\n  ".join(map(escaped, text.split("\n"))), err=True)


def _job_json(job: Job, *, payload: bool = True) -> dict[str, Any]:
    found: dict[str, Any] = {f.name: _plain(getattr(job, f.name)) for f in attrs.fields(Job) if f.name != "payload"}
    found["state"] = str(job.state)
    if payload:
        try:
            found["payload"] = job.json()
        except RivetQError:
            found["payload_base64"] = base64.b64encode(job.payload).decode()
    return found


CELL_CHARS = 1000
"""Of a task's name or an error in a table; `show` and JSON have all of it."""
_TEXTS = {"queue", "state", "error", "task", "setting", "call", "value", "from", "about"}


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, justify="left" if column in _TEXTS else "right", overflow="fold")
    return table


def _add(table: Table, *cells: str) -> None:
    table.add_row(*(Text(shown(cell, CELL_CHARS)) for cell in cells))


def _print_table(table: Table) -> None:
    Console(width=None if sys.stdout.isatty() else 200).print(table)


@contextmanager
def _slow(text: str) -> Iterator[tools.Progress]:
    """Shows on a terminal how far something is that has taken a second; or only that it goes on, if nobody tells."""
    if not errors.is_terminal:
        yield lambda done, most: None
        return
    ended = threading.Event()
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    bar = Progress(*columns, console=errors, transient=True)
    task = bar.add_task(text, total=None)

    def show() -> None:
        if not ended.wait(PATIENCE_S):
            with bar:
                ended.wait()

    def tell(done: int, most: int) -> None:
        bar.update(task, completed=done, total=most or None)

    thread = threading.Thread(target=show, daemon=True)
    thread.start()
    try:
        yield tell
    finally:
        ended.set()
        thread.join()


def _look() -> tools.Look:
    with _slow("reading the log") as progress:
        return tools.look(_settings().path, progress=progress)


@contextmanager
def _opened() -> Iterator[Broker]:
    """The broker, to change something; it must be there already. Leases stay as they are."""
    settings = _settings(release_on_open=False)
    tools.check(settings.path)
    with _slow("opening"):
        broker = settings.open_broker()
    with broker:
        yield broker


def _as_of(found: tools.Look) -> str:
    return f"as of {found.as_of.isoformat(timespec='milliseconds')}, record {found.record}"


# Looking

STATS = ("ready", "scheduled", "leased", "dead", "enqueued", "acked", "cancelled", "purged")


def _now(found: tools.Look, queue: str | None = None) -> QueueStats:
    """Counts of the last record; but a job grows older while nothing is written."""
    stats = found.stats(queue)
    if stats.oldest_age is None:
        return stats
    since = (datetime.now(UTC) - found.as_of).total_seconds()
    return attrs.evolve(stats, oldest_age=stats.oldest_age + max(0.0, since))


def _stats_table(found: tools.Look) -> Table:
    table = _table("queue", *STATS, "oldest s")
    table.caption, table.caption_justify = _as_of(found), "left"
    for queue in [*found.queues(), None]:
        stats = _now(found, queue)
        age = "" if stats.oldest_age is None else f"{stats.oldest_age:.1f}"
        _add(table, queue if queue is not None else "(all)", *(str(getattr(stats, name)) for name in STATS), age)
    return table


@_command()
@click.option("--watch", is_flag=True, help="Again and again, until Ctrl-C.")
@click.option(
    "--interval", type=click.FloatRange(0.01), default=1.0, show_default=True, help="Seconds between two looks."
)
def stats(watch: bool, interval: float) -> None:
    """Counts of all queues."""
    if _wants_json():
        while True:
            with _look() as found:
                queues = {name: _now(found, name) for name in found.queues()}
                _print_json({"as_of": found.as_of, "record": found.record, "all": _now(found), "queues": queues})
            if not watch:
                return
            sys.stdout.flush()
            time.sleep(interval)
    with _look() as found:
        table = _stats_table(found)
    if not watch or not sys.stdout.isatty():
        _print_table(table)
        while watch:  # for a file or a pipe: one table after another
            sys.stdout.flush()
            time.sleep(interval)
            with _look() as found:
                _print_table(_stats_table(found))
        return
    with Live(table, auto_refresh=False) as live:
        while True:
            time.sleep(interval)
            with _look() as found:
                live.update(_stats_table(found), refresh=True)


@_command()
def queues() -> None:
    """The queues and their configurations."""
    with _look() as found:
        configs = {name: found.config(name) for name in found.queues()}
        if _wants_json():
            _print_json({"as_of": found.as_of, "record": found.record, "queues": configs})
            return
        table = _table("queue", "paused", "ready", "visibility s", "max jobs", "rate limit", "attempts")
        table.caption, table.caption_justify = _as_of(found), "left"
        for name, config in configs.items():
            limit = config.rate_limit
            rate = "" if limit is None else f"{limit.per_second:g}/s, {limit.burst} at once, on {limit.on}"
            _add(
                table, name, "yes" if config.paused else "", str(found.stats(name).ready),
                f"{config.visibility_timeout:g}", str(config.max_jobs or ""), rate,
                str(config.retry.max_attempts or "no end"),
            )  # fmt: skip
    _print_table(table)


@_command()
@click.argument("queue")
@click.option("--state", type=click.Choice([state.value for state in JobState]), help="Those in one state.")
@click.option("--after", default=0, help="Ids above this one: the next page.")
@click.option("--limit", default=100, show_default=True, help="At most so many, up to 10,000.")
def jobs(queue: str, state: str | None, after: int, limit: int) -> None:
    """Jobs of a queue, by id."""
    with _look() as found:
        # Payloads one at a time, and only if they are printed: a page of large ones does not fit into memory.
        listed = found.jobs(queue, state=state, after=after, limit=limit, payloads=False)
        if _wants_json():
            head = _json_text(_plain({"as_of": found.as_of, "record": found.record}))
            click.echo(f'{head[:-1]}, "jobs": [', nl=False)
            for n, job in enumerate(listed):
                click.echo((", " if n else "") + _json_text(_listed_json(found, job)), nl=False)
            click.echo("]}")
            return
        table = _table("id", "state", "priority", "attempts", "enqueued", "due", "task", "error")
        table.caption, table.caption_justify = _as_of(found), "left"
        for job in listed:
            when = job.enqueued_at.isoformat(timespec="seconds")
            due = "" if job.due_at is None else job.due_at.isoformat(timespec="seconds")
            task = job.headers.get("rivetq-task", "")
            _add(
                table, str(job.id), str(job.state), str(job.priority), str(job.attempts), when, due, task,
                job.last_error or "",
            )  # fmt: skip
    _print_table(table)


def _listed_json(found: tools.Look, job: Job) -> dict[str, Any]:
    """With its payload; without, if the job ended since it was listed."""
    whole = found.get(job.id)
    if whole is None:
        return _job_json(job, payload=False)
    return _job_json(attrs.evolve(job, payload=whole.payload))


@_command()
@click.argument("job_id", type=int)
def show(job_id: int) -> int:
    """One job, with its payload."""
    with _look() as found:
        job = found.get(job_id)
        if job is None:
            _complain(f"there is no job {job_id} ({_as_of(found)})")
            return NO_JOB
        content = _job_json(job)
        if _wants_json():
            _print_json({"as_of": found.as_of, "record": found.record, "job": content})
            return DONE
        for name, value in content.items():
            _echo(f"{name:14} {value if isinstance(value, str) else _json_text(value)}")
        _echo(_as_of(found))
    return DONE


@_command()
@click.option("--payloads", is_flag=True, help="With the payloads, in base64.")
def dump(payloads: bool) -> None:
    """The records of the log, a line of JSON each."""
    for record in tools.dump(_settings().path, payloads=payloads):
        click.echo(json.dumps(record))


# Changing


def _jobs(count: int) -> str:
    return "1 job" if count == 1 else f"{count} jobs"


def _are(count: int) -> str:
    return f"{_jobs(count)} {'is' if count == 1 else 'are'}"


def _told(value: dict[str, Any], text: str) -> None:
    if _wants_json():
        _print_json(value)
    else:
        _echo(text)


@_command()
@click.argument("queue")
@click.argument("payload", required=False)
@click.option("--task", help="The name of a task: the payload is the list of its arguments, or an object of them.")
@click.option("--priority", default=5, show_default=True, help="0 to 9, 9 is the most urgent.")
@click.option("--delay", default=0.0, help="Seconds before which it is not leased.")
@click.option("--max-attempts", type=int, help="Deliveries before it is a dead letter; by default as the queue says.")
@click.option("--key", help="Idempotency key.")
@click.option("--header", multiple=True, metavar="NAME=VALUE", help="May be repeated.")
def enqueue(
    queue: str,
    payload: str | None,
    task: str | None,
    priority: int,
    delay: float,
    max_attempts: int | None,
    key: str | None,
    header: tuple[str, ...],
) -> None:
    """Put a job into a queue. PAYLOAD is JSON, else a text; "-" or none: the bytes of the standard input."""
    headers = dict(_pair(each) for each in header)
    body: Any
    if payload is None or payload == "-":
        body = sys.stdin.buffer.read()
    else:
        try:
            body = json.loads(payload, parse_constant=_no_json)
        except ValueError:
            body = payload
    if task is not None:
        headers["rivetq-task"] = task
        body = _arguments(body)
    with _slow("opening"):
        broker = _settings(release_on_open=False).open_broker()
    with broker:
        options: Any = {
            "priority": priority, "delay": delay, "headers": headers, "idempotency_key": key,
            "max_attempts": max_attempts,
        }  # fmt: skip
        job_id = broker.enqueue(queue, body, **options)
    _told({"id": job_id}, f"job {job_id}")


def _no_json(text: str) -> None:
    raise ValueError(f"{text} is no JSON")


def _arguments(body: Any) -> dict[str, Any]:
    """The payload of a task's call."""
    try:
        found = json.loads(body or b"[]") if isinstance(body, bytes) else body
    except ValueError as error:
        raise UsageError(f"--task: a JSON list or object of arguments expected: {error}") from error
    if not isinstance(found, list | dict):
        raise UsageError(f"--task: a JSON list or object of arguments expected, got {found!r}")
    return {"kwargs": found} if isinstance(found, dict) else {"args": found}


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise UsageError(f"--header: NAME=VALUE expected, got {text!r}")
    return name, value


@_command()
@click.argument("queue")
def pause(queue: str) -> None:
    """Let leases from a queue give nothing, until `resume`."""
    with _opened() as broker:
        broker.pause(queue)
    _told({"queue": queue, "paused": True}, f"{queue} is paused")


@_command()
@click.argument("queue")
def resume(queue: str) -> None:
    """End a pause."""
    with _opened() as broker:
        broker.resume(queue)
    _told({"queue": queue, "paused": False}, f"{queue} is not paused")


@_command()
@click.argument("queue")
@click.argument("job_ids", type=int, nargs=-1)
@click.option("--limit", type=int, help="At most so many.")
def redrive(queue: str, job_ids: tuple[int, ...], limit: int | None) -> None:
    """Bring dead letters back: all of a queue, or those with these ids."""
    with _opened() as broker, _slow("bringing back"):
        count = broker.redrive(queue, job_ids=job_ids or None, limit=limit)
    _told({"queue": queue, "redriven": count}, f"{_are(count)} ready again")


@_command()
@click.argument("queue")
@click.option("--state", type=click.Choice(["ready", "scheduled", "dead"]), help="Those in one state.")
@click.option("--yes", is_flag=True, help="Do not ask.")
def purge(queue: str, state: str | None, yes: bool) -> None:
    """Remove the jobs of a queue, but for leased ones."""
    if not yes:
        which = f"all {state} jobs" if state else "all jobs that are not leased"
        try:
            sure = click.confirm(f"Remove {which} of queue {queue!r} for good?", err=True)
        except click.Abort as error:  # Ctrl-C, or no answer to be had
            if isinstance(error.__context__, KeyboardInterrupt):
                raise KeyboardInterrupt from None
            sure = False
        if not sure:
            raise UsageError("nothing was removed; answer y, or give --yes")
    with _opened() as broker, _slow("removing"):
        count = broker.purge(queue, state=state)
    _told({"queue": queue, "purged": count}, f"{_are(count)} removed")


@_command()
@click.argument("job_id", type=int)
def cancel(job_id: int) -> int:
    """Remove a job that waits or is a dead letter."""
    with _opened() as broker:
        done = broker.cancel(job_id)
    if not done and not _wants_json():
        _complain(f"job {job_id} is leased or gone")
        return NO_JOB
    _told({"id": job_id, "cancelled": done}, f"job {job_id} is removed")
    return DONE if done else NO_JOB


# Tools


@_command()
def verify() -> int:
    """Read every byte, check every checksum, compare the index with the log."""
    with _slow("reading every byte") as progress:
        found = tools.verify(_settings().path, progress=progress)
    for problem in (found.log, found.index, found.mark):
        if problem is not None:
            _complain(f"{problem.file}: {problem.what}")
    _report(found, "whole" if found.is_whole else "damaged")
    return DONE if found.is_whole else DAMAGED if found.log else LOG_WHOLE


def _report(found: Any, word: str) -> None:
    values: dict[str, Any] = _plain(found)
    if _wants_json():
        _print_json(values)
        return
    click.echo(word)
    for name, value in values.items():
        if value is not None and not isinstance(value, dict | list):
            _echo(f"{name:12} {value}")


@_command()
def rebuild_index() -> None:
    """Build the index anew from the log."""
    path = _settings().path
    with _slow("building the index") as progress:
        count = tools.rebuild_index(path, progress=progress)
    _told({"path": path, "jobs": count}, _jobs(count))


@_command()
@click.argument("out", type=click.Path())
@click.option("--copy", is_flag=True, help="Copy all bytes, link none.")
def backup(out: str, copy: bool) -> None:
    """Copy the directory to OUT and read the copy back; also while a broker has it open."""
    with _slow("copying") as progress:
        found = tools.backup(_settings().path, out, link=not copy, progress=progress)
    _report(found, "done")


@_command()
@click.argument("out", type=click.Path())
def salvage(out: str) -> int:
    """Write what can be read of a damaged log into the new directory OUT."""
    with _slow("reading what can be read") as progress:
        found = tools.salvage(_settings().path, out, progress=progress)
    _report(found, "whole" if found.is_whole else "something was missing, see salvage.json")
    return DONE if found.is_whole else DAMAGED


@_command()
@click.option(
    "--seconds", type=click.FloatRange(0.01), default=3.0, show_default=True, help="For each of the measurements."
)
@click.option("--threads", type=click.IntRange(1), default=8, show_default=True)
@click.option("--bytes", "size", type=click.IntRange(0), default=256, show_default=True, help="Of a payload.")
def bench(seconds: float, threads: int, size: int) -> None:
    """Measure this disk: jobs a second, in a new directory beside the broker's."""
    settings = _settings()
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
    if _wants_json():
        _print_json({"fsync": settings.fsync, "payload_bytes": size, "jobs_per_second": figures})
        return
    table = _table("jobs a second", "call")
    for name, rate in figures.items():
        _add(table, f"{rate:,.0f}", name)
    table.caption, table.caption_justify = f"fsync={settings.fsync}, {size} bytes a payload", "left"
    _print_table(table)


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


# Working


@_command()
@click.argument("app", required=False)
@click.option("-q", "--queues", help="Names in order of preference, a,b, or with weights, a=3,b=1.")
@click.option(
    "-c", "--concurrency", type=int, help="Handlers of each kind; of processes as many as processors at most."
)
@click.option("--threads", type=int, help="Handlers in threads.")
@click.option("--processes", type=int, help="Handlers in child processes.")
@click.option("--tasks", type=int, help="Async handlers.")
@click.option("--grace", type=float, help="Seconds that running jobs get to end.")
@click.option("--max-jobs", type=int, help="Stop after so many.")
@click.option("--max-memory", help="Stop when the process occupies more: bytes, or 512MiB.")
@click.option("--log-level")
@click.option("--metrics-port", type=int, help="Serve metrics on this port of the loopback interface.")
def worker(app: str | None, concurrency: int | None, **given_here: Any) -> int:
    """Run the tasks of APP, as module:attribute, until SIGTERM or Ctrl-C."""
    if concurrency is not None:
        for name, number in attrs.asdict(Concurrency.of(concurrency)).items():
            given_here[name] = given_here[name] if given_here[name] is not None else number
    settings = _settings(app=app, log_json=True if _wants_json() else None, **given_here)
    if settings.app is None:
        raise UsageError("worker: an app is needed, as module:attribute; as an argument, or the setting app")
    found = load_app(settings.app)
    # All of the program's lines, unless its module has set up logging already.
    own = "rivetq" if logging.getLogger().handlers else ""
    configure(level=settings.log_level, json=settings.log_json, logger=own)
    given = {name for name, origin in settings.origins.items() if origin != "default"}
    options = {name: value for name, value in settings.broker_options().items() if name in given}
    if options or "path" in given:  # what nobody set is as the app has it
        found.use(settings.path if "path" in given else None, **options)
    made = settings.worker(found)
    if settings.metrics_port is None:
        return made.run()
    try:
        from .metrics import serve
    except ImportError as error:
        raise UsageError(str(error)) from error
    server = serve(found.broker, settings.metrics_port, workers=[made])
    logging.getLogger("rivetq.worker").info("metrics at http://%s:%s/metrics", server.address, server.port)
    try:
        return made.run()
    finally:
        server.close()


def load_app(name: str) -> App:
    """The app that ``module:attribute`` names; the current directory comes first. Raises UsageError."""
    module_name, colon, attribute = name.partition(":")
    if not colon or not attribute:
        raise UsageError(f"app: module:attribute expected, got {name!r}")
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # the second: there is no app in it, and that is no success
        if not isinstance(error, ImportError):  # a mistake in the module: where it is
            traceback.print_exc()
        raise UsageError(f"app: {module_name!r} cannot be imported: {type(error).__name__}: {error}") from error
    for part in attribute.split("."):
        try:
            found = getattr(found, part)
        except AttributeError:
            raise UsageError(f"app: module {module_name!r} has no {attribute!r}") from None
    if not isinstance(found, App):
        raise UsageError(f"app: {name!r} is a {type(found).__name__}, an App is expected")
    return found


@_command()
def config() -> None:
    """The settings in force, and where each came from."""
    settings = _settings()
    if _wants_json():
        _print_json({n: {"value": getattr(settings, n), "origin": settings.origins[n]} for n in FIELDS})
        return
    table = _table("setting", "value", "from", "about")
    for name, field in FIELDS.items():
        _add(table, name, str(getattr(settings, name)), settings.origins[name], field.metadata["about"])
    _print_table(table)


if __name__ == "__main__":
    main()
