"""`python -m rivetq COMMAND DIR`: the tools for the bad day as commands.

Exit status: 0 all is well; 1 the log is damaged, or something was missing (salvage); 3 only the index or the mark is
damaged (verify); 2 it could not be done: wrong arguments, no log, a broker has the directory, no space; 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from datetime import datetime
from functools import partial

import attrs

from . import tools
from .errors import CorruptLogError, RivetQError
from .tools import COMMANDS, DUMP, Command, Status


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; its exit status."""
    given = _parser().parse_args(arguments)
    try:
        status: int = given.run(given)
        return status
    except CorruptLogError as error:
        print(f"rivetq: {error}", file=sys.stderr)
        return Status.DAMAGED
    except BrokenPipeError:  # `dump | head`
        sys.stderr.close()  # else the interpreter complains once more at its end
        return Status.WHOLE
    except (RivetQError, OSError) as error:
        print(f"rivetq: {error}", file=sys.stderr)
        return Status.NOT_DONE
    except KeyboardInterrupt:
        print("rivetq: interrupted", file=sys.stderr)
        return Status.INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m rivetq",
        description="Tools for the bad day, and for the day before.",
        epilog=(__doc__ or "").partition("\n\n")[2],
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        found = commands.add_parser(name, help=text, description=text)
        found.add_argument("directory", metavar="DIR", help="the directory of a broker")
        found.set_defaults(run=run)
        return found

    for each in COMMANDS:
        found = add(each.name, partial(_run, each), each.text)
        if each.has_out:
            found.add_argument("out", metavar="OUT", help="a directory to be made")
        for name, text in each.options:
            found.add_argument(f"--{name}", action="store_true", help=text)
    dump = add("dump", _dump, DUMP)
    dump.add_argument("--payloads", action="store_true", help="with the payloads, in base64")
    return parser


def _run(command: Command, given: argparse.Namespace) -> int:
    out = [given.out] if command.has_out else []
    done = command.run(given.directory, *out, **{name: getattr(given, name) for name, _ in command.options})
    report = done.report if isinstance(done.report, dict) else attrs.asdict(done.report)
    print(json.dumps(report, indent=2, default=datetime.isoformat))
    for complaint in done.complaints:
        print(f"rivetq: {complaint}", file=sys.stderr)
    return done.status


def _dump(given: argparse.Namespace) -> int:
    for record in tools.dump(given.directory, payloads=given.payloads):
        print(json.dumps(record))
    return Status.WHOLE


if __name__ == "__main__":
    sys.exit(main())
