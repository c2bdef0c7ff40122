"""What works on a directory instead of on a broker."""

from __future__ import annotations

import os

from ..broker.arguments import checked_path
from ..broker.broker import Broker
from ..clock import SystemClock
from ..engine import Backup
from ..errors import StorageError
from ..machine.machine import Machine
from ..storage.backup import take
from ..storage.disk import SystemDisk
from ..storage.index import Index
from ..storage.layout import INDEX
from ..storage.recovery import recover
from .directory import Path, Progress, directory_of, disk_of, owned, readable
from .salvage import Salvage
from .salvage import salvage as _salvage


def rebuild_index(path: Path, *, progress: Progress | None = None) -> int:
    """Build the index anew from the log; how many jobs there are. Leases stay as they are.

    Raises:
        CorruptLogError: the log is damaged; the index stays as it is.
        StorageError: the index cannot be written (a full disk, say); the next opening tries it again.
        BrokerLockedError: a broker has it open.
    """
    directory = directory_of(path)
    index = Index(SystemDisk(), os.path.join(directory, INDEX))
    with owned(directory), readable(directory):
        log_id = recover(disk_of(directory, progress), directory, None, SystemClock(), Machine).log_id
        index.clear()
    if progress is not None:
        progress(0, 0)
    with Broker(directory, release_on_open=False) as broker:
        stats = broker.stats()
    if index.manifest(log_id) is None:
        raise StorageError(f"{directory}: the index could not be written, see the log of this program")
    return stats.ready + stats.scheduled + stats.leased + stats.dead


def salvage(path: Path, out: Path, *, progress: Progress | None = None) -> Salvage:
    """Write all that can be read of a damaged log into the new directory `out`, which a broker can open.

    The damaged one is only read. See `Salvage` for what it tells; the same is in `out` as `salvage.json`. Where records
    are missing, jobs are missing, and jobs whose end was in such a record come again.

    Raises:
        StorageError: there is no log, or something at `out`, or it cannot be written.
        BrokerLockedError: a broker has it open.
    """
    directory = directory_of(path)
    with owned(directory), readable(directory):
        disk = disk_of(directory, progress, passes=2)  # what is saved of it is read once more
        return _salvage(disk, directory, os.path.abspath(checked_path(out)), SystemClock())


def backup(path: Path, out: Path, *, link: bool = True, progress: Progress | None = None) -> Backup:
    """Copy a directory, whether a broker has it open or not; see `Broker.backup`."""
    directory = directory_of(path)
    with readable(directory):
        disk = disk_of(directory, progress, passes=1 if link else 2)  # the copy is read back
        return take(disk, directory, os.path.abspath(checked_path(out)), SystemClock(), link=link)
