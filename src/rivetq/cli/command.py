"""The group of commands, and their settings.

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

import sys
from collections.abc import Callable
from typing import Any

import click

from rivetq import BrokerLockedError, CorruptLogError, RivetQError, __version__

from ..settings import Settings, load
from ..tools import Status
from .showing import complain

DONE, DAMAGED, NOT_DONE, INTERRUPTED = map(int, (Status.WHOLE, Status.DAMAGED, Status.NOT_DONE, Status.INTERRUPTED))
NO_JOB, LOCKED = 4, 5


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
        complain(str(error))
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


def settings_of(**explicit: Any) -> Settings:
    given: dict[str, Any] = click.get_current_context().obj
    return load(given["config"], **{"path": given["path"], **explicit})


def command(name: str | None = None) -> Callable[[Callable[..., int | None]], click.Command]:
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
