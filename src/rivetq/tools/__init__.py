"""Tools for the bad day, and for the day before: verify, rebuild the index, salvage, dump, back up.

They work on a directory, not on a broker. `python -m rivetq` is the same as commands.
"""

from .commands import COMMANDS, DUMP, Command, Done, Status
from .directory import Path, Progress, check
from .dumping import dump
from .looking import Look, look
from .repair import backup, rebuild_index, salvage
from .salvage import Salvage
from .verifying import Problem, Verification, verify

__all__ = [
    "COMMANDS",
    "DUMP",
    "Command",
    "Done",
    "Look",
    "Path",
    "Problem",
    "Progress",
    "Salvage",
    "Status",
    "Verification",
    "backup",
    "check",
    "dump",
    "look",
    "rebuild_index",
    "salvage",
    "verify",
]
