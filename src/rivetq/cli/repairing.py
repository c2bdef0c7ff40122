"""Commands on a directory: verify, rebuild-index, backup, salvage."""

from __future__ import annotations

import click

from .. import tools
from .command import DAMAGED, DONE, LOG_WHOLE, command, settings_of
from .showing import complain, jobs_of, report, slow, told


@command()
def verify() -> int:
    """Read every byte, check every checksum, compare the index with the log."""
    with slow("reading every byte") as progress:
        found = tools.verify(settings_of().path, progress=progress)
    for problem in (found.log, found.index, found.mark):
        if problem is not None:
            complain(f"{problem.file}: {problem.what}")
    report(found, "whole" if found.is_whole else "damaged")
    return DONE if found.is_whole else DAMAGED if found.log else LOG_WHOLE


@command()
def rebuild_index() -> None:
    """Build the index anew from the log."""
    path = settings_of().path
    with slow("building the index") as progress:
        count = tools.rebuild_index(path, progress=progress)
    told({"path": path, "jobs": count}, jobs_of(count))


@command()
@click.argument("out", type=click.Path())
@click.option("--copy", is_flag=True, help="Copy all bytes, link none.")
def backup(out: str, copy: bool) -> None:
    """Copy the directory to OUT and read the copy back; also while a broker has it open."""
    with slow("copying") as progress:
        found = tools.backup(settings_of().path, out, link=not copy, progress=progress)
    report(found, "done")


@command()
@click.argument("out", type=click.Path())
def salvage(out: str) -> int:
    """Write what can be read of a damaged log into the new directory OUT."""
    with slow("reading what can be read") as progress:
        found = tools.salvage(settings_of().path, out, progress=progress)
    report(found, "whole" if found.is_whole else "something was missing, see salvage.json")
    return DONE if found.is_whole else DAMAGED
