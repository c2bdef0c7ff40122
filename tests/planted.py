"""Twelve bugs, planted one at a time into a copy of the package: the suite must turn red for each.

    python tests/planted.py                 all of them, each with the whole suite until three tests have failed
    python tests/planted.py "no chain"      one
    python tests/planted.py --named         only the tests that are named here, as in `make test`

It says which tests caught which bug, and its exit status is the number of bugs that none caught.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import rivetq

TESTS = Path(__file__).parent
PACKAGE = Path(rivetq.__file__).parent
LAST = ("test_model", "test_kill", "test_conformance", "test_planted")
"""The long ones; the very last knows all bugs."""
TIME_LIMIT_S = 900


class Bug(NamedTuple):
    """A place in the code and what a tired programmer might have written there; a quick test that sees it."""

    name: str
    file: str
    right: str
    wrong: str
    caught_by: str


BUGS = (
    Bug(
        "ack before fsync",
        "group.py",
        "        waiter = _Waiter(lsn)\n        try:\n            self._join(waiter)",
        "        if lsn:\n            return self._target.write(lsn)\n"
        "        waiter = _Waiter(lsn)\n        try:\n            self._join(waiter)",
        "test_sweeps.py::test_nothing_that_goes_wrong_breaks_a_promise[sequences]",
    ),
    Bug(
        "no directory fsync",
        "segment.py",
        "        self._disk.sync_directory(os.path.dirname(final_path))\n",
        "",
        "test_sweeps.py::test_nothing_that_goes_wrong_breaks_a_promise[sequences]",
    ),
    Bug(
        "mark before sync",
        "log.py",
        "            self._syncing = threading.get_ident()\n",
        "            self._syncing = threading.get_ident()\n"
        "            write_all(self._disk, self._mark_fd, encode_mark(self._log_id, lsn), 0)\n",
        "test_sweeps.py::test_nothing_that_goes_wrong_breaks_a_promise[crash]",
    ),
    Bug(
        "no chain",
        "segment.py",
        " or frame.previous != self.last_crc:",
        ":",
        "test_segment.py",
    ),
    Bug(
        "no epoch",
        "recovery.py",
        "epoch=last.epoch + 1,",
        "epoch=last.epoch,",
        "test_recovery.py::test_every_opening_begins_a_segment_and_an_epoch",
    ),
    Bug(
        "short write ignored",
        "segment.py",
        "        if written < end:\n            write_all(self._disk, self._fd, data[written - offset :], written)\n",
        "",
        "test_disk_full.py::test_a_short_write_is_completed",
    ),
    Bug(
        "fsync retried",
        "log.py",
        "                done.extend(map(self._disk.fdatasync, (file.fd,)))\n",
        "                try:\n"
        "                    done.extend(map(self._disk.fdatasync, (file.fd,)))\n"
        "                except OSError:\n"
        "                    done.extend(map(self._disk.fdatasync, (file.fd,)))\n",
        "test_sweeps.py::test_nothing_that_goes_wrong_breaks_a_promise[errors]",
    ),
    Bug(
        "checkpoint ahead of the log",
        "local.py",
        "            self._wait_durable(last_lsn)  # the index is never ahead of the disk\n",
        "",
        "test_simulation.py::test_no_power_cut_takes_what_was_promised",
    ),
    Bug(
        "segment dropped early",
        "local.py",
        "        self._checkpoint()  # which syncs the copies; the index now points at them\n",
        "        self._log.drop(upto)\n        self._checkpoint()\n",
        "test_simulation.py::test_no_power_cut_takes_what_was_promised",
    ),
    Bug(
        "counter not logged",
        "machine.py",
        "QueueSnapshot(q.number, q.name, q.config, q.enqueued, q.acked, q.cancelled, q.purged)",
        "QueueSnapshot(q.number, q.name, q.config, q.enqueued, 0, q.cancelled, q.purged)",
        "test_housekeeping.py",
    ),
    Bug(
        "lease not fenced",
        "decide.py",
        "entry.state == LEASED and entry.token == token and entry.deadline_ms > now_ms",
        "entry.state == LEASED and entry.deadline_ms > now_ms",
        "test_decide.py",
    ),
    Bug(
        "zero header accepted",
        "segment.py",
        "            if frame is None or frame.lsn",
        "            if frame is None and self._data[at : at + HEADER_BYTES] == bytes(HEADER_BYTES):\n"
        "                self.end, self.next_lsn = at + HEADER_BYTES, self.next_lsn + 1\n"
        "                continue\n"
        "            if frame is None or frame.lsn",
        "test_segment.py",
    ),
)


class Finding(NamedTuple):
    """What the suite said of a bug."""

    bug: Bug
    failed: list[str]
    seconds: float


def hunt(bug: Bug, tests: Sequence[str], most: int) -> Finding:
    """Run tests on the package with the bug in it, until so many have failed."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="rivetq-planted-") as name:
        package = Path(shutil.copytree(PACKAGE, Path(name) / "src" / "rivetq"))
        code = (package / bug.file).read_text()
        if code.count(bug.right) != 1:
            raise LookupError(f"{bug.name}: {bug.file} does not have this place once any more: {bug.right!r}")
        (package / bug.file).write_text(code.replace(bug.right, bug.wrong))
        environment = {**os.environ, "PYTHONPATH": str(package.parent), "PYTHONDONTWRITEBYTECODE": "1"}
        where = subprocess.run(
            [sys.executable, "-c", "import rivetq; print(rivetq.__file__)"],
            env=environment, capture_output=True, text=True, check=True,
        )  # fmt: skip
        if Path(where.stdout.strip()).parent != package:
            raise LookupError(f"{bug.name}: the tests would run on {where.stdout.strip()}")
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rfE", "--tb=no", f"--maxfail={most}",
             f"--basetemp={name}/tmp", *tests],
            cwd=TESTS.parent, env=environment, capture_output=True, text=True, timeout=TIME_LIMIT_S, check=False,
        )  # fmt: skip
    failed = re.findall(r"^(?:FAILED|ERROR) (?:tests/)?(.*?)(?: - .*)?$", done.stdout, re.MULTILINE)
    if done.returncode not in (0, 1) or bool(failed) != (done.returncode == 1):
        raise LookupError(
            f"{bug.name}: pytest ended with {done.returncode}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
        )
    return Finding(bug, failed, time.monotonic() - started)


def named(bug: Bug) -> list[str]:
    """The quick test that sees the bug."""
    return [str(TESTS / bug.caught_by)]


def whole() -> list[str]:
    """All tests but those of the planted bugs, the long ones last."""
    files = {path.stem: str(path) for path in sorted(TESTS.glob("test_*.py"))}
    return [files[name] for name in files if name not in LAST] + [files[name] for name in LAST[:-1]]


def main() -> int:
    parser = argparse.ArgumentParser(description="Plant bugs, and see which tests catch them.")
    parser.add_argument("bugs", nargs="*", metavar="BUG", help="names; without: all")
    parser.add_argument("--named", action="store_true", help="only the tests that are named beside the bugs")
    parser.add_argument("--most", type=int, default=3, help="a bug is done with when so many tests have failed")
    given = parser.parse_args()
    bugs = [bug for bug in BUGS if not given.bugs or bug.name in given.bugs]
    if not bugs:
        parser.error(f"no such bug; there are: {', '.join(bug.name for bug in BUGS)}")
    missed = 0
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        for bug, failed, seconds in pool.map(
            lambda bug: hunt(bug, named(bug) if given.named else whole(), given.most), bugs
        ):
            missed += not failed
            print(f"{bug.name}: {'caught' if failed else 'NOT CAUGHT'} in {seconds:.0f} s", flush=True)
            for test in failed:
                print(f"    {test}")
    print(f"{len(bugs) - missed} of {len(bugs)} planted bugs were caught")
    return missed


if __name__ == "__main__":
    sys.exit(main())
