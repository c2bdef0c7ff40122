"""Commands that run: worker; and config."""

from __future__ import annotations

import importlib
import logging
import os
import sys
import traceback
from typing import Any

import attrs
import click

from rivetq import UsageError

from ..logs import configure
from ..settings import FIELDS
from ..tasks.app import App
from ..worker.options import Concurrency
from .command import command, settings_of
from .showing import add_row, print_json, print_table, table_of, wants_json


@command()
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
    settings = settings_of(app=app, log_json=True if wants_json() else None, **given_here)
    if settings.app is None:
        raise UsageError("worker: an app is needed, as module:attribute; as an argument, or the setting app")
    found = load_app(settings.app)
    # All of the program's lines, unless its module has set up logging already.
    own = "rivetq" if logging.getLogger().handlers else ""
    configure(level=settings.log_level, json=settings.log_json, logger=own)
    given = {name for name, origin in settings.origins.items() if origin != "default"}
    options = {name: value for name, value in settings.broker_options().items() if name in given}
    if options or "path" in given:  # options that are not set are as the app has them
        found.use(settings.path if "path" in given else None, **options)
    made = settings.worker(found)
    if settings.metrics_port is None:
        return made.run()
    try:
        from ..metrics import serve
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


@command()
def config() -> None:
    """The settings in force, and where each came from."""
    settings = settings_of()
    if wants_json():
        print_json({n: {"value": getattr(settings, n), "origin": settings.origins[n]} for n in FIELDS})
        return
    table = table_of("setting", "value", "from", "about")
    for name, field in FIELDS.items():
        add_row(table, name, str(getattr(settings, name)), settings.origins[name], field.metadata["about"])
    print_table(table)
