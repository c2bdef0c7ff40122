"""Bugs that are planted one at a time into a copy of the package: a named test must turn red for each.

    python tests/planted.py                 all of `planted_bugs.py`, several at a time
    python tests/planted.py --third         a third of them: today's; `--third 0`, 1 or 2 for a certain one
    python tests/planted.py --only "no chain"
    python tests/planted.py --whole         each with the whole suite instead, until `--most` tests have failed: hours

First the named tests run on a copy without a bug, where all of them must be green. The exit status is the number of
bugs that were not caught; 100 if the list went stale: a text that is to be replaced is not there once, a test is not
there, or is red or hangs by itself.
"""

from __future__ import annotations

import argparse
import datetime
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from planted_bugs import BUGS, Bug

import rivetq

TESTS = Path(__file__).parent
PACKAGE = Path(rivetq.__file__).parent
LAST = ("test_model", "test_kill", "test_conformance", "test_planted")
"""Of the whole suite the long ones; the very last knows all bugs."""
TIME_LIMIT_S = 120
"""For one named test. The whole suite has no limit."""
BASE_LIMIT_S = 900
"""For a share of all named tests without a bug."""
THIRDS = 3
SHARE = 2
"""So many at a time for each processor: those that turn red by a time-out mostly wait."""
STALE = 100
ALONE = """
from pathlib import Path
import rivetq
assert Path(rivetq.__file__).parent == Path(__file__).parent / "rivetq", f"the tests would run on {rivetq.__file__}"
"""
"""A plugin of pytest beside the copy: what is tested is the copy."""


class StaleError(Exception):
    """The list does not fit the code and the tests any more."""


class Finding(NamedTuple):
    """What tests said of a bug."""

    bug: Bug
    failed: list[str]
    seconds: float


def misfits(bugs: Iterable[Bug]) -> list[str]:
    """What cannot be planted, and why."""
    found = []
    for bug in bugs:
        count = (PACKAGE / bug.file).read_text().count(bug.right)
        if count != 1:
            found.append(f"{bug.name}: {bug.file} has this text {count} times, once expected: {bug.right!r}")
        elif bug.right == bug.wrong:
            found.append(f"{bug.name}: nothing is changed")
    return found


def hunt(bug: Bug | None, tests: Sequence[str], most: int = 1, limit_s: float | None = TIME_LIMIT_S) -> Finding:
    """Run tests on the package with the bug in it, or on a plain copy, until so many have failed."""
    started = time.monotonic()
    name = "no bug" if bug is None else bug.name
    if bug is not None and (wrong := misfits([bug])):
        raise StaleError(*wrong)
    with tempfile.TemporaryDirectory(prefix="rivetq-planted-") as place:
        package = Path(shutil.copytree(PACKAGE, Path(place) / "src" / "rivetq"))
        if bug is not None:
            code = (package / bug.file).read_text()
            (package / bug.file).write_text(code.replace(bug.right, bug.wrong))
        (package.parent / "planted_alone.py").write_text(ALONE)
        environment = {**os.environ, "PYTHONPATH": str(package.parent), "PYTHONDONTWRITEBYTECODE": "1"}
        command = [
            sys.executable, "-m", "pytest", "-p", "planted_alone", "-p", "no:cacheprovider", "-rfE", "--tb=short",
            "--show-capture=no", f"--maxfail={most}", f"--basetemp={place}/tmp", *tests,
        ]  # fmt: skip
        log = Path(place) / "log"
        with log.open("w") as out:
            # A group of its own: what the tests have started ends with them, also where they hang.
            tested = subprocess.Popen(
                command, cwd=TESTS.parent, env=environment, stdout=out, stderr=out, start_new_session=True
            )
            try:
                status = tested.wait(limit_s)
            except subprocess.TimeoutExpired as error:
                raise StaleError(f"{name}: {' '.join(tests)} had not ended after {error.timeout} s") from error
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(tested.pid, signal.SIGKILL)
                tested.wait()
        said = log.read_text(errors="replace")
    failed = re.findall(r"^(?:FAILED|ERROR) (?:tests/)?(.*?)(?: - .*)?$", said, re.MULTILINE)
    if status not in (0, 1) or bool(failed) != (status == 1):
        raise StaleError(f"{name}: pytest ended with {status}: {said[-4000:]}")
    if bug is None and failed:
        raise StaleError(f"{' '.join(failed)}: red without a bug: {said[-4000:]}")
    return Finding(bug or BUGS[0], failed, time.monotonic() - started)


def named(bugs: Iterable[Bug]) -> list[str]:
    """The tests that see these bugs."""
    files = {path.name: path for path in TESTS.rglob("test_*.py")}
    tests = [bug.caught_by.partition("::") for bug in bugs]
    return list(dict.fromkeys(f"{files.get(name, name)}{colons}{test}" for name, colons, test in tests))


def whole() -> list[str]:
    """All tests but those of the planted bugs, the long ones last."""
    files = {path.stem: str(path) for path in sorted(TESTS.rglob("test_*.py"))}
    return [files[name] for name in files if name not in LAST] + [files[name] for name in LAST[:-1]]


def chosen(only: Sequence[str] | None, third: int | None) -> list[Bug]:
    """The bugs that options name."""
    unknown = set(only or ()) - {bug.name for bug in BUGS}
    if unknown:
        raise StaleError(f"no such bug: {', '.join(sorted(unknown))}; there are: {', '.join(b.name for b in BUGS)}")
    bugs = [bug for bug in BUGS if not only or bug.name in only]
    return bugs if third is None else bugs[third % THIRDS :: THIRDS]


def main() -> int:
    parser = argparse.ArgumentParser(description="Plant bugs, and see whether the tests named beside them turn red.")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--all", action="store_true", help="all of them, as without any option")
    today = datetime.date.today().toordinal()
    which.add_argument("--third", type=int, nargs="?", const=today, metavar="N", help="a third; today's without N")
    which.add_argument("--only", action="append", metavar="NAME", help="this one; may be repeated")
    parser.add_argument("--whole", action="store_true", help="each with the whole suite instead of the named test")
    parser.add_argument("--most", type=int, default=3, help="with --whole: so many failed tests are enough")
    given = parser.parse_args()
    started = time.monotonic()
    many = SHARE * (os.cpu_count() or 1)
    try:
        bugs = chosen(given.only, given.third)
        if stale := misfits(bugs):
            raise StaleError("\n".join(stale))
        missed = []
        with ThreadPoolExecutor(many) as pool:
            tests = named(bugs)
            plain = [
                pool.submit(hunt, None, tests[i::many], limit_s=BASE_LIMIT_S) for i in range(min(many, len(tests)))
            ]
            for each in plain:
                each.result()
            print(f"{len(tests)} tests are green without a bug", flush=True)

            def look(bug: Bug) -> Finding:
                return hunt(bug, whole(), given.most, None) if given.whole else hunt(bug, named([bug]))

            for bug, failed, seconds in pool.map(look, bugs):
                print(f"{bug.name}: {'caught' if failed else 'NOT CAUGHT'} in {seconds:.0f} s", flush=True)
                for test in failed or [bug.caught_by]:
                    print(f"    {test}")
                missed += [] if failed else [bug]
    except StaleError as error:
        print(error)
        return STALE
    print(f"{len(bugs) - len(missed)} of {len(bugs)} planted bugs were caught, in {time.monotonic() - started:.0f} s")
    return len(missed)


if __name__ == "__main__":
    sys.exit(main())
