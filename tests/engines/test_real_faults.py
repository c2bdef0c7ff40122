"""System calls that really fail, injected by strace into a process that works: what it says, what it does then.

Needs strace and the right to trace; skips with the reason where one is missing.
"""

from __future__ import annotations

import itertools
import json
import re
import shutil
import subprocess
import sys
import textwrap
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
from inside import inside

from rivetq import Broker

CHILD = """
    import json, sys
    from rivetq import Broker, RivetQError

    def say(*line):
        sys.stdout.write(json.dumps(line) + "\\n")
        sys.stdout.flush()

    try:
        broker = Broker(sys.argv[1], segment_bytes=65536)
        for n in range(40):
            say("ok", n, broker.enqueue("q", b"x" * 1500, idempotency_key=f"k{n}"))
            if n % 3 == 0:
                lease = broker.lease("q")
                lease.ack()
                say("acked", lease.id)
    except RivetQError as error:
        say("failed", type(error).__name__, error.outcome, type(error.__cause__).__name__)
        if "broker" in globals():
            for call in (lambda: broker.enqueue("q", b"y"), broker.stats, broker.sync):
                try:
                    say("went on", str(call()))
                except RivetQError as later:
                    say("later", type(later).__name__)
            broker.close()
    else:
        broker.close()
        say("closed")
"""


class Run(NamedTuple):
    """What the process said, and its system calls."""

    said: list[list[object]]
    trace: list[str]


@cache
def why_not() -> str | None:
    """Why nothing can be injected here."""
    strace = shutil.which("strace")
    if strace is None:
        return "strace is not installed"
    done = subprocess.run(
        [strace, "-qq", "-e", "trace=fdatasync", sys.executable, "-c", ""], capture_output=True, text=True, check=False
    )
    return f"strace may not trace here: {done.stderr.strip()[-200:]}" if done.returncode else None


def run(directory: Path, inject: str) -> Run:
    """The child, with one kind of system call failing as strace is told."""
    if (reason := why_not()) is not None:
        pytest.skip(reason)
    trace = directory.with_suffix(".trace")
    done = subprocess.run(
        ["strace", "-f", "-qq", "-y", "-o", str(trace),
         "-e", "trace=fdatasync,pwrite64,close", "-e", f"inject={inject}",
         sys.executable, "-c", textwrap.dedent(CHILD), str(directory)],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return Run([json.loads(line) for line in done.stdout.splitlines()], trace.read_text().splitlines())


def check(directory: Path, said: list[list[object]]) -> None:
    """All that was answered is there."""
    with Broker(directory, segment_bytes=65_536) as broker:
        inside(broker).audit()
        acked = {line[1] for line in said if line[0] == "acked"}
        present = {job.id for job in broker.jobs("q", limit=1000)}
        assert not acked & present
        for line in said:
            if line[0] == "ok":
                assert broker.find("q", f"k{line[1]}") == line[2]
                assert line[2] in present | acked or line == [each for each in said if each[0] == "ok"][-1]


@pytest.mark.parametrize("when", [1, 2, 3, 4, 6, 9, 15, 26])
def test_a_sync_that_really_fails_is_never_repeated_and_nothing_answered_is_lost(tmp_path: Path, when: int) -> None:
    directory = tmp_path / "q"
    said, trace = run(directory, f"fdatasync:error=EIO:when={when}")
    injected = next(i for i, line in enumerate(trace) if "EIO" in line and "INJECTED" in line)
    found = re.search(r"fdatasync\((\d+)<([^>]+)>", trace[injected])
    assert found is not None
    after = itertools.takewhile(lambda line: f"close({found[1]}<" not in line, trace[injected + 1 :])
    repeated = [line for line in after if f"fdatasync({found[1]}<" in line]  # whatever its name is by then
    assert repeated == [], "a failed sync was tried again"
    failed = [line for line in said if line[0] == "failed"]
    if "spare" in found[2] and not failed:  # a spare that could not be made is no part of the log yet
        assert said[-1] == ["closed"]
    else:
        assert failed
        assert failed[0][1:] in (
            ["BrokerFailedError", "unknown", "OSError"],
            ["BrokerFailedError", "not_done", "OSError"],
            ["StorageError", "not_done", "OSError"],  # the opening
        )
        assert not [line for line in said if line[0] == "went on"], "it went on after a failed sync"
    check(directory, said)


@pytest.mark.parametrize("error", ["EIO", "ENOSPC"])
@pytest.mark.parametrize("when", [1, 2, 5, 11, 40])
def test_a_write_that_really_fails_loses_nothing_that_was_answered(tmp_path: Path, when: int, error: str) -> None:
    directory = tmp_path / "q"
    said, trace = run(directory, f"pwrite64:error={error}:when={when}")
    assert any(error in line and "INJECTED" in line for line in trace)
    assert not [line for line in said if line[0] == "went on"]
    failed = [line[1:] for line in said if line[0] == "failed"]
    assert failed or said[-1] == ["closed"], "neither an error nor an end"
    for name, _, cause in failed:
        assert (name, cause) in {
            ("BrokerFailedError", "OSError"),
            ("StorageError", "OSError"),
            ("DiskFullError", "OSError"),
        }
    check(directory, said)


def test_nothing_fails_if_nothing_is_injected(tmp_path: Path) -> None:
    said, trace = run(tmp_path / "q", "fdatasync:error=EIO:when=60000")
    assert said[-1] == ["closed"]
    assert len([line for line in said if line[0] == "ok"]) == 40
    assert sum("fdatasync(" in line for line in trace) >= 40
    check(tmp_path / "q", said)
