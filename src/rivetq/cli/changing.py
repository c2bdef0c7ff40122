"""Commands that change something: enqueue, pause, resume, redrive, purge, cancel."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from rivetq import Broker, UsageError

from .. import tools
from .command import DONE, NO_JOB, command, settings_of
from .showing import are, complain, slow, told, wants_json


@contextmanager
def opened() -> Iterator[Broker]:
    """The broker, to change something; it must be there already. Leases stay as they are."""
    settings = settings_of(release_on_open=False)
    tools.check(settings.path)
    with slow("opening"):
        broker = settings.open_broker()
    with broker:
        yield broker


@command()
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
    with slow("opening"):
        broker = settings_of(release_on_open=False).open_broker()
    with broker:
        options: Any = {
            "priority": priority, "delay": delay, "headers": headers, "idempotency_key": key,
            "max_attempts": max_attempts,
        }  # fmt: skip
        job_id = broker.enqueue(queue, body, **options)
    told({"id": job_id}, f"job {job_id}")


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


@command()
@click.argument("queue")
def pause(queue: str) -> None:
    """Let leases from a queue give nothing, until `resume`."""
    with opened() as broker:
        broker.pause(queue)
    told({"queue": queue, "paused": True}, f"{queue} is paused")


@command()
@click.argument("queue")
def resume(queue: str) -> None:
    """End a pause."""
    with opened() as broker:
        broker.resume(queue)
    told({"queue": queue, "paused": False}, f"{queue} is not paused")


@command()
@click.argument("queue")
@click.argument("job_ids", type=int, nargs=-1)
@click.option("--limit", type=int, help="At most so many.")
def redrive(queue: str, job_ids: tuple[int, ...], limit: int | None) -> None:
    """Bring dead letters back: all of a queue, or those with these ids."""
    with opened() as broker, slow("bringing back"):
        count = broker.redrive(queue, job_ids=job_ids or None, limit=limit)
    told({"queue": queue, "redriven": count}, f"{are(count)} ready again")


@command()
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
    with opened() as broker, slow("removing"):
        count = broker.purge(queue, state=state)
    told({"queue": queue, "purged": count}, f"{are(count)} removed")


@command()
@click.argument("job_id", type=int)
def cancel(job_id: int) -> int:
    """Remove a job that waits or is a dead letter."""
    with opened() as broker:
        done = broker.cancel(job_id)
    if not done and not wants_json():
        complain(f"job {job_id} is leased or gone")
        return NO_JOB
    told({"id": job_id, "cancelled": done}, f"job {job_id} is removed")
    return DONE if done else NO_JOB
