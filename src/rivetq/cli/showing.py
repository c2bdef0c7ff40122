"""How commands print: tables, JSON, errors, and progress. What users wrote is shown without control characters."""

from __future__ import annotations

import base64
import json
import re
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from typing import Any

import attrs
import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from rivetq import Job, RivetQError

from .. import tools
from ..texts import escaped, shown

PATIENCE_S = 1.0
"""What takes longer shows that it goes on."""
errors = Console(stderr=True)


def wants_json() -> bool:
    found: bool = click.get_current_context().obj["json"]
    return found


def plain(value: Any) -> Any:
    """What json.dumps takes."""
    if attrs.has(type(value)):
        return {name: plain(item) for name, item in attrs.asdict(value, recurse=False).items()}
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def json_text(value: Any) -> str:
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


def print_json(value: Any) -> None:
    click.echo(json_text(plain(value)))


def echo(text: str) -> None:
    click.echo(escaped(text))


def complain(text: str) -> None:
    """On standard error; the further lines of a message are indented."""
    click.echo("rivetq: " + "\n  ".join(map(escaped, text.split("\n"))), err=True)


def job_json(job: Job, *, payload: bool = True) -> dict[str, Any]:
    found: dict[str, Any] = {f.name: plain(getattr(job, f.name)) for f in attrs.fields(Job) if f.name != "payload"}
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


def table_of(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, justify="left" if column in _TEXTS else "right", overflow="fold")
    return table


def add_row(table: Table, *cells: str) -> None:
    table.add_row(*(Text(shown(cell, CELL_CHARS)) for cell in cells))


def print_table(table: Table) -> None:
    Console(width=None if sys.stdout.isatty() else 200).print(table)


@contextmanager
def slow(text: str) -> Iterator[tools.Progress]:
    """After a second, shows progress on a terminal: how far it is, or, if that is unknown, only that it goes on."""
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


def jobs_of(count: int) -> str:
    return "1 job" if count == 1 else f"{count} jobs"


def are(count: int) -> str:
    return f"{jobs_of(count)} {'is' if count == 1 else 'are'}"


def told(value: dict[str, Any], text: str) -> None:
    if wants_json():
        print_json(value)
    else:
        echo(text)


def report(found: Any, word: str) -> None:
    values: dict[str, Any] = plain(found)
    if wants_json():
        print_json(values)
        return
    click.echo(word)
    for name, value in values.items():
        if value is not None and not isinstance(value, dict | list):
            echo(f"{name:12} {value}")
