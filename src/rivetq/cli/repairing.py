"""The commands of `rivetq.tools`: verify, rebuild-index, salvage, backup."""

from __future__ import annotations

from typing import Any

import click

from ..tools import COMMANDS, Command
from .command import command, settings_of
from .showing import complain, report, slow, told


def _add(each: Command) -> None:
    def run(**given: Any) -> int:
        out = [given.pop("out")] if each.has_out else []
        with slow(each.doing) as progress:
            done = each.run(settings_of().path, *out, **given, progress=progress)
        for complaint in done.complaints:
            complain(complaint)
        if isinstance(done.report, dict):
            told(done.report, done.says)
        else:
            report(done.report, done.says)
        return done.status

    run.__doc__ = each.text
    for name, text in each.options:
        run = click.option(f"--{name}", is_flag=True, help=text)(run)
    if each.has_out:
        run = click.argument("out", type=click.Path())(run)
    command(each.name)(run)


for _each in COMMANDS:
    _add(_each)
