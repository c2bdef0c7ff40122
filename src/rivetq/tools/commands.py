"""The commands on a directory, for `python -m rivetq` and for the command `rivetq`: what they do, say and end with.

How a report is printed and how an error becomes a status is up to each of the two.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from typing import Any, NamedTuple

from .directory import Progress
from .repair import backup, rebuild_index, salvage
from .verifying import verify


class Status(IntEnum):
    """How a command ends."""

    WHOLE = 0
    DAMAGED = 1
    """The log is damaged, or something was missing."""
    NOT_DONE = 2
    LOG_WHOLE = 3
    """Only the index or the mark is damaged."""
    INTERRUPTED = 130


class Done(NamedTuple):
    """What became of a command."""

    report: Any
    """A dict, or an object with fields (attrs)."""
    says: str
    """The same in a few words."""
    status: Status = Status.WHOLE
    complaints: tuple[str, ...] = ()


class Command(NamedTuple):
    name: str
    run: Callable[..., Done]
    """Takes the directory, then `out` if `has_out`, then the options; and `progress`."""
    text: str
    doing: str
    """What a bar of its progress is named."""
    has_out: bool = False
    options: tuple[tuple[str, str], ...] = ()
    """Flags: names and texts."""


def _verify(directory: str, *, progress: Progress | None = None) -> Done:
    found = verify(directory, progress=progress)
    problems = [each for each in (found.log, found.index, found.mark) if each is not None]
    status = Status.WHOLE if found.is_whole else Status.DAMAGED if found.log else Status.LOG_WHOLE
    complaints = tuple(f"{each.file}: {each.what}" for each in problems)
    return Done(found, "whole" if found.is_whole else "damaged", status, complaints)


def _rebuild_index(directory: str, *, progress: Progress | None = None) -> Done:
    count = rebuild_index(directory, progress=progress)
    return Done({"path": directory, "jobs": count}, "1 job" if count == 1 else f"{count} jobs")


def _salvage(directory: str, out: str, *, progress: Progress | None = None) -> Done:
    found = salvage(directory, out, progress=progress)
    says = "whole" if found.is_whole else "something was missing, see salvage.json"
    return Done(found, says, Status.WHOLE if found.is_whole else Status.DAMAGED)


def _backup(directory: str, out: str, *, copy: bool = False, progress: Progress | None = None) -> Done:
    return Done(backup(directory, out, link=not copy, progress=progress), "done")


COMMANDS = (
    Command(
        "verify", _verify, "Read every byte, check every checksum, compare the index with the log.",
        "reading every byte",
    ),
    Command("rebuild-index", _rebuild_index, "Build the index anew from the log.", "building the index"),
    Command(
        "salvage", _salvage, "Write what can be read of a damaged log into the new directory OUT.",
        "reading what can be read", has_out=True,
    ),
    Command(
        "backup", _backup, "Copy the directory to OUT and read the copy back; also while a broker has it open.",
        "copying", has_out=True, options=(("copy", "Copy all bytes, link none."),),
    ),
)  # fmt: skip
DUMP = "Print the records of the log as lines of JSON."
