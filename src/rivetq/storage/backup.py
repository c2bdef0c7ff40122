"""A copy of a log as it is at one moment, taken while its owner works on.

A log may end after any of its records. A copy of all segments, the last one up to its last whole record, is therefore
the state after that record. Sealed segments never change and are linked where the file system can; the tail is copied.
No caller has to wait for the copy, not even in another process. If a segment goes meanwhile (a compaction drops the
oldest first), the copy begins again.

The index is not copied. The first opening of the copy rebuilds it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator

from ..clock import Clock
from ..engine import Backup
from ..errors import CorruptLogError, StorageError
from ..machine.machine import Machine
from ..units import moment
from .disk import DIRECTORY_MODE, Disk, read_file, replace_file, write_all, write_file
from .header import corrupt
from .layout import LOG, MARK, encode_mark, list_segments, read_mark, segment_name
from .recovery import beside_its_owner, recover
from .segment import Scan, SegmentFile, read_header

_CHUNK_BYTES = 1 << 22
_PARTIAL = ".partial"


def take(disk: Disk, directory: str, out: str, clock: Clock, *, link: bool = True, least_lsn: int = 0) -> Backup:
    """Copy the log of a directory to `out`, which does not exist or is empty, and read the copy back.

    Args:
        link: sealed segments may share their bytes with the original.
        least_lsn: the copy has this record at least.

    Raises:
        StorageError: there is something at `out`, or it cannot be written.
        CorruptLogError: the log is damaged. Nothing is left at `out`.
    """
    source = os.path.join(directory, LOG)
    with under_another_name(disk, out, directory) as partial:
        log = os.path.join(partial, LOG)
        numbers, linked, last_lsn = copy_log(disk, source, log, link=link, least_lsn=least_lsn)
        try:
            machine = recover(disk, partial, None, clock, Machine).machine
        except CorruptLogError as error:  # the copy goes; what is damaged is the original
            message, file = str(error).replace(log, source), error.file.replace(log, source)
            raise CorruptLogError(message, file=file, offset=error.offset) from error
        size = sum(os.path.getsize(os.path.join(log, segment_name(number))) for number in numbers)
    jobs = sum(sum(queue.counts) for queue in machine.queues.values())
    return Backup(
        path=out, records=last_lsn, as_of=moment(machine.now_ms), jobs=jobs, segments=len(numbers), linked=linked,
        bytes=size,
    )  # fmt: skip


@contextlib.contextmanager
def under_another_name(disk: Disk, out: str, directory: str) -> Iterator[str]:
    """A new directory that gets its name, durably, when it is complete. On an error nothing of it is left.

    Raises StorageError if there is something at `out`, or it lies in `directory`, or it cannot be written.
    """
    partial = out + _PARTIAL
    own = os.path.realpath(directory)
    if os.path.commonpath((own, os.path.realpath(out))) == own:
        raise StorageError(f"{out}: it would lie in the directory that it is made of; give another name")
    if os.path.lexists(out) and (os.path.islink(out) or not os.path.isdir(out) or os.listdir(out)):
        raise StorageError(f"{out}: there is something already; give the name of a directory to be made")
    try:
        if not os.path.isdir(parent := os.path.dirname(out)):
            disk.make_directory(parent)
        try:
            os.mkdir(partial, DIRECTORY_MODE)
        except FileExistsError:
            raise StorageError(f"{partial}: what another call began is there; remove it if that has ended") from None
        try:
            os.chmod(partial, DIRECTORY_MODE)
            yield partial
            disk.sync_directory(partial)
            disk.rename(partial, out)
            disk.sync_directory(os.path.dirname(out))
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    except OSError as error:
        raise StorageError(f"{out}: cannot be made: {error}") from error


def copy_log(disk: Disk, source: str, log: str, *, link: bool = True, least_lsn: int = 0) -> tuple[list[int], int, int]:
    """Copy the segments as they are at one moment into the new directory `log`; see `take`.

    Ids of the segments, how many were linked, the last record.
    """

    def copy() -> tuple[list[int], int, int]:
        shutil.rmtree(log, ignore_errors=True)
        disk.make_directory(log)
        return _copy_segments(disk, source, log, link, least_lsn)

    return beside_its_owner(source, copy)


def _copy_segments(disk: Disk, source: str, log: str, link: bool, least_lsn: int) -> tuple[list[int], int, int]:
    mark = read_file(disk, os.path.join(source, MARK))  # first: the records that it covers are in the files by now
    numbers = list_segments(disk, source)
    if not numbers:
        raise StorageError(f"{source}: there is no log")
    linked = 0
    for name in map(segment_name, numbers[:-1]):
        linked += _link(disk, os.path.join(source, name), os.path.join(log, name), link)
    path = os.path.join(source, segment_name(numbers[-1]))
    tail = SegmentFile.open(disk, path)
    header, data = read_header(tail), tail.read_all()
    scan = Scan(data, header)
    for _ in scan.records():
        pass
    last_lsn = scan.next_lsn - 1
    known_lsn = max(least_lsn, read_mark(mark, header.log_id), scan.later_witness_lsn())
    if last_lsn < known_lsn:
        raise corrupt(path, scan.end_in_file, f"record {scan.next_lsn} is not there, but {known_lsn} records were")
    write_file(disk, os.path.join(log, segment_name(numbers[-1])), data[: scan.end])
    replace_file(disk, os.path.join(log, MARK), encode_mark(header.log_id, last_lsn))  # which syncs the names too
    return numbers, linked, last_lsn


def _link(disk: Disk, old: str, new: str, link: bool) -> bool:
    """Whether it was linked, not copied."""
    if link:
        try:
            os.link(old, new)
            return True
        except FileNotFoundError:
            raise
        except OSError:
            pass  # another file system, or one without links
    source = disk.open(old)
    try:
        target = disk.create(new)
        try:
            at = 0
            while data := disk.pread(source, _CHUNK_BYTES, at):
                write_all(disk, target, data, at)
                at += len(data)
            disk.fdatasync(target)
        finally:
            disk.close(target)
    finally:
        disk.close(source)
    return False
