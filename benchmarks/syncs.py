"""How often each contestant syncs in the durable mode, counted by strace, outside of all timing.

The child (this module run as a program: `python syncs.py NAME DIR`) opens the contestant, with the server that it may
have, and does a little of everything; strace follows all of its processes. The child marks where a phase begins and
ends in the trace itself, by a sync of a descriptor that is not open. Files that are opened to sync at each write
(O_SYNC, O_DSYNC) need no call to sync, so they are reported too.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from contestants import Contestant, Queue, RivetQ
from peers import PEERS

CALLS, BATCHES, BATCH, PAYLOAD_BYTES = 40, 4, 100, 256
CHILD_S = 90.0
SYNCS = re.compile(r"^\d+\s+(fsync|fdatasync|msync|sync_file_range)\(")
NEVER_OPEN = 999_999  # a descriptor that no process has
MARK = re.compile(rf"^\d+\s+fsync\({NEVER_OPEN}\b")
SYNCING_OPEN = re.compile(r'open(?:at)?\(.*"([^"]*)".*O_D?SYNC')
PHASES = ("enqueue", f"enqueue_many({BATCH})", "lease + ack", f"lease + ack by {BATCH}")


@dataclass(frozen=True)
class Counted:
    """Syncs for a call, by phase (lease + ack: for both calls together); or why there are none."""

    per_call: dict[str, float | None]
    synced_files: list[str]
    failure: str | None = None


def count(name: str, directory: Path) -> Counted:
    """One contestant, in a process of its own."""
    strace = shutil.which("strace")
    if strace is None:
        return Counted({}, [], "strace is not installed")
    log = directory / f"{name}.strace"
    calls = "fsync,fdatasync,msync,sync_file_range,open,openat"
    command = [strace, "-f", "-qq", "--seccomp-bpf", "-s", "300", "-e", f"trace={calls}", "-o", str(log)]
    command += [sys.executable, __file__, name, str(directory)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        out, errors = process.communicate(timeout=CHILD_S)
    except BaseException as error:
        process.terminate()  # strace hands it on, and the child stops its server
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
        process.kill()
        if isinstance(error, subprocess.TimeoutExpired):
            return Counted({}, [], f"took longer than {CHILD_S:.0f} s under strace")
        raise
    if process.returncode:
        return Counted({}, [], (errors.strip().splitlines() or ["it failed and said nothing"])[-1][:300])
    done: dict[str, int] = json.loads(out)
    return Counted(per_call(log, done), synced_files(log, directory))


def per_call(log: Path, done: dict[str, int]) -> dict[str, float | None]:
    """Split the trace at its marks: every second stretch is a phase."""
    stretches = [0]
    with log.open(errors="replace") as lines:
        for line in lines:
            if MARK.match(line):
                stretches.append(0)
            elif SYNCS.match(line):
                stretches[-1] += 1
    syncs = stretches[1::2]
    assert len(syncs) == len(done), f"{len(syncs)} phases in the trace, {len(done)} were done"
    found = {phase: count / calls for count, (phase, calls) in zip(syncs, done.items(), strict=True)}
    return {phase: found.get(phase) for phase in PHASES}


def synced_files(log: Path, directory: Path) -> list[str]:
    """The files below the directory that sync at each write."""
    with log.open(errors="replace") as lines:
        found = (match[1] for line in lines if (match := SYNCING_OPEN.search(line)))
        return sorted({Path(path).name for path in found if not path.startswith(("/dev", "/proc"))})


# -- the child --------------------------------------------------------------------------------------------------------


def main(name: str, directory: Path) -> None:
    kind: type[Contestant] = RivetQ if name == RivetQ.name else PEERS[name]
    contestant = kind(directory, durable=True)
    try:
        opened = contestant.open()
        try:
            print(json.dumps(work(opened, kind)))
        finally:
            opened.close()
    finally:
        contestant.close()


def work(opened: Queue, kind: type[Contestant]) -> dict[str, int]:
    """Calls done, by phase, for the phases that the contestant is able to."""
    payloads = [os.urandom(PAYLOAD_BYTES) for _ in range(BATCH)]
    done: dict[str, int] = {}
    opened.enqueue(payloads[0])  # the first of each may set up something
    opened.ack(opened.lease(1))
    with phase(PHASES[0], CALLS, done):
        times(CALLS, lambda: opened.enqueue(payloads[0]))
    if kind.abilities.enqueue_batches:
        with phase(PHASES[1], BATCHES, done):
            times(BATCHES, lambda: opened.enqueue_many(payloads))
    with phase(PHASES[2], CALLS, done):
        times(CALLS, lambda: opened.ack(opened.lease(1)))
    if kind.abilities.lease_batches:
        with phase(PHASES[3], BATCHES, done):
            times(BATCHES, lambda: opened.ack(opened.lease(BATCH)))
    return done


@contextlib.contextmanager
def phase(name: str, calls: int, done: dict[str, int]) -> Iterator[None]:
    mark()
    yield
    mark()
    done[name] = calls


def times(calls: int, call: Callable[[], None]) -> None:
    for _ in range(calls):
        call()


def mark() -> None:
    with contextlib.suppress(OSError):
        os.fsync(NEVER_OPEN)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
