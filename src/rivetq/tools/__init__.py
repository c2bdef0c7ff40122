"""Tools for the bad day, and for the day before: verify, rebuild the index, salvage, dump, back up.

They work on a directory, not on a broker. `python -m rivetq` is the same as commands.
"""

from .repair import (
    Look,
    Path,
    Problem,
    Progress,
    Verification,
    backup,
    check,
    dump,
    look,
    rebuild_index,
    salvage,
    verify,
)
from .salvage import Salvage

__all__ = [
    "Look",
    "Path",
    "Problem",
    "Progress",
    "Salvage",
    "Verification",
    "backup",
    "check",
    "dump",
    "look",
    "rebuild_index",
    "salvage",
    "verify",
]
