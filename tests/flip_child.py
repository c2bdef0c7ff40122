"""Damages the files of a directory, one byte at a time, and opens it after each: a process of its own, for signals.

Reads one JSON object: directory, boot_id, mutations (how many per byte; 0: the file is cut off there), places:
[[file, start, stop, step], ...].
Writes one line per damage, at once: [file, offset, which, outcome, ...] where outcome is

    equal       the state and every payload are as they were
    payload     the state is as it was, and a payload is refused when it is read: the file and offset that it names
    refused     the opening is refused: the kind of error, the file and offset that it names
    different   the state, or a payload that was read, is another one
    other       another exception: which
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from rivetq import CorruptLogError, FormatError
from rivetq.machine import look
from rivetq.machine.advance import resume
from rivetq.machine.check import dump
from rivetq.machine.machine import Machine
from rivetq.machine.snapshot import Place
from rivetq.storage.disk import SystemDisk
from rivetq.storage.index import Index
from rivetq.storage.log import Log
from rivetq.storage.recovery import recover, replay
from rivetq.testing import ManualClock

NOWHERE = 2**31
"""The segment of what is not in its new place yet."""


_open_indexes: list[Index] = []


def opened(directory: Path, clock: ManualClock) -> tuple[Machine, Log]:
    disk = SystemDisk()
    for index in _open_indexes:
        index.close()  # the process opens each index once
    _open_indexes[:] = [Index(disk, str(directory / "index"))]
    found = recover(disk, str(directory), _open_indexes[0], clock, Machine)
    machine = found.machine
    for body in found.surplus:  # the mark is rotten: what it testified is written again
        replay(machine, body, Place(NOWHERE, 0, 0))
    resume(machine, max(found.now_ms, machine.now_ms), found.epoch << 32)
    log = Log(disk, str(directory / "log"), log_id=found.log_id, epoch=found.epoch, segment_bytes=1 << 16)
    return machine, log


def payloads(machine: Machine, log: Log) -> dict[int, bytes | None]:
    jobs = [entry for entry in look.everything(machine) if entry.segment != NOWHERE]
    return {e.id: log.read(e.segment, e.offset, e.length, e.crc) for e in jobs}


def outcome(directory: Path, clock: ManualClock, state: dict[str, Any], contents: dict[int, bytes | None]) -> list[Any]:
    try:
        machine, log = opened(directory, clock)
        if dump(machine) != state:
            return ["different", "state"]
        try:
            return ["equal"] if payloads(machine, log).items() <= contents.items() else ["different", "payload"]
        except CorruptLogError as error:
            return ["payload", "CorruptLogError", error.file, error.offset]
    except CorruptLogError as error:
        return ["refused", "CorruptLogError", error.file, error.offset]
    except FormatError as error:
        return ["refused", "FormatError", str(error), 0]
    except BaseException as error:
        return ["other", repr(error)]


def main() -> None:
    task = json.load(sys.stdin)
    logging.disable()
    directory = Path(task["directory"])
    clock = ManualClock(start=0)
    clock.boot_id = task["boot_id"]
    machine, log = opened(directory, clock)
    state, contents = dump(machine), payloads(machine, log)
    for name, start, stop, step in task["places"]:
        fd = os.open(directory / name, os.O_RDWR)
        whole = os.pread(fd, os.fstat(fd).st_size, 0)
        for offset in range(start, stop, step):
            for n, damage in enumerate(damages(whole, offset, task["mutations"])):
                damage(fd)
                line = [name, offset, n, *outcome(directory, clock, state, contents)]
                os.write(1, json.dumps(line).encode() + b"\n")
            os.pwrite(fd, whole[offset:] if not task["mutations"] else whole[offset : offset + 1], offset)
        os.close(fd)


def damages(whole: bytes, offset: int, mutations: int) -> list[Callable[[int], object]]:
    """One flipped bit, a byte of zeros, a byte of ones (or another bit, if it is that already); or a cut."""
    if not mutations:
        return [lambda fd: os.ftruncate(fd, offset)]
    value = whole[offset]
    others = (value ^ 1 << offset * 5 % 8, 0 if value else 0x80, 0xFF if value != 0xFF else 0x7F)
    return [partial(_put, other, offset) for other in others[:mutations]]


def _put(value: int, offset: int, fd: int) -> None:
    os.pwrite(fd, bytes((value,)), offset)


if __name__ == "__main__":
    main()
