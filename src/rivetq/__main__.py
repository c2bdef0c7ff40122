"""`python -m rivetq COMMAND DIR`: the tools for the bad day as commands.

Exit status: 0 all is well; 1 the log is damaged, or something was missing (salvage); 3 only the index or the mark is
damaged (verify); 2 it could not be done: wrong arguments, no log, a broker has the directory, no space; 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from datetime import datetime
from typing import Any

import attrs

from . import tools
from .errors import CorruptLogError, RivetQError

WHOLE, DAMAGED, NOT_DONE, LOG_WHOLE, INTERRUPTED = 0, 1, 2, 3, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; its exit status."""
    given = _parser().parse_args(arguments)
    try:
        status: int = given.run(given)
        return status
    except CorruptLogError as error:
        print(f"rivetq: {error}", file=sys.stderr)
        return DAMAGED
    except BrokenPipeError:  # `dump | head`
        sys.stderr.close()  # else the interpreter complains once more at its end
        return WHOLE
    except (RivetQError, OSError) as error:
        print(f"rivetq: {error}", file=sys.stderr)
        return NOT_DONE
    except KeyboardInterrupt:
        print("rivetq: interrupted", file=sys.stderr)
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m rivetq",
        description="Tools for the bad day, and for the day before.",
        epilog=(__doc__ or "").partition("\n\n")[2],
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Any, text: str, *, out: bool = False) -> argparse.ArgumentParser:
        found = commands.add_parser(name, help=text, description=text)
        found.add_argument("directory", metavar="DIR", help="the directory of a broker")
        if out:
            found.add_argument("out", metavar="OUT", help="a directory to be made")
        found.set_defaults(run=run)
        return found

    command("verify", _verify, "read every byte, check every checksum, compare the index with the log")
    command("rebuild-index", _rebuild_index, "build the index anew from the log")
    command("salvage", _salvage, "write what can be read of a damaged log into a new directory", out=True)
    dump = command("dump", _dump, "the records of the log as lines of JSON")
    dump.add_argument("--payloads", action="store_true", help="with the payloads, in base64")
    backup = command("backup", _backup, "copy a directory, also while a broker has it open", out=True)
    backup.add_argument("--copy", action="store_true", help="copy all bytes, link none")
    return parser


def _verify(given: argparse.Namespace) -> int:
    found = tools.verify(given.directory)
    _print(found)
    for problem in (found.log, found.index, found.mark):
        if problem is not None:
            print(f"rivetq: {problem.file}: {problem.what}", file=sys.stderr)
    return WHOLE if found.is_whole else DAMAGED if found.log else LOG_WHOLE


def _rebuild_index(given: argparse.Namespace) -> int:
    print(json.dumps({"path": given.directory, "jobs": tools.rebuild_index(given.directory)}))
    return WHOLE


def _salvage(given: argparse.Namespace) -> int:
    found = tools.salvage(given.directory, given.out)
    _print(found)
    return WHOLE if found.is_whole else DAMAGED


def _dump(given: argparse.Namespace) -> int:
    for record in tools.dump(given.directory, payloads=given.payloads):
        print(json.dumps(record))
    return WHOLE


def _backup(given: argparse.Namespace) -> int:
    _print(tools.backup(given.directory, given.out, link=not given.copy))
    return WHOLE


def _print(report: attrs.AttrsInstance) -> None:
    print(json.dumps(attrs.asdict(report), indent=2, default=datetime.isoformat))


if __name__ == "__main__":
    sys.exit(main())
