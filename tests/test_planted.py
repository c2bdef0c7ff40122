"""Planted bugs turn tests red: those of the core here, all by `make planted`. And the list of them is no list of old.

See planted.py.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import planted
import pytest
from planted import StaleError, chosen, hunt, misfits, named
from planted_bugs import BUGS, Bug

CORE = 12
"""So many of the list are of log, recovery, machine and what stands between: seen here, in every run of the tests."""
HARMLESS = Bug(
    "a comment",
    "machine/decide.py",
    "        return entry\n    if entry is None:\n",
    "        return entry\n    # Why?\n    if entry is None:\n",
    "test_decide.py::test_jobs_get_the_next_ids_in_order",
)


def test_there_are_52_bugs_in_all_parts() -> None:
    assert len({bug.name for bug in BUGS}) == len(BUGS) >= 52
    assert len({(bug.file, bug.right, bug.wrong) for bug in BUGS}) == len(BUGS)


def test_each_can_be_planted() -> None:
    assert misfits(BUGS) == []


def test_each_has_a_test_that_there_is() -> None:
    files = sorted({test.partition("::")[0] for test in named(BUGS)})
    command = [sys.executable, "-m", "pytest", "--collect-only", "-p", "no:cacheprovider", *files]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    cases = {f"{Path(line.partition('::')[0]).name}::{line.partition('::')[2]}" for line in done.stdout.splitlines()}
    tests = {case.partition("[")[0] for case in cases}
    assert [bug.name for bug in BUGS if bug.caught_by not in cases | tests] == []


def test_the_thirds_are_the_whole() -> None:
    thirds = [chosen(None, n) for n in range(planted.THIRDS)]
    assert sorted(bug.name for third in thirds for bug in third) == sorted(bug.name for bug in BUGS)
    assert max(map(len, thirds)) - min(map(len, thirds)) <= 1
    assert chosen(None, 7) == thirds[1]
    assert chosen([BUGS[3].name], None) == [BUGS[3]]
    with pytest.raises(StaleError, match="no such bug: nonsense"):
        chosen(["nonsense"], None)


@pytest.mark.parametrize("bug", BUGS[:CORE], ids=[bug.name for bug in BUGS[:CORE]])
def test_a_planted_bug_of_the_core_is_caught(bug: Bug) -> None:
    assert hunt(bug, named([bug])).failed


def test_what_is_no_bug_is_not_caught() -> None:
    assert hunt(HARMLESS, named([HARMLESS])).failed == []


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"right": "no such text"}, "0 times"),
        ({"right": "return"}, "times, once expected"),
        ({"wrong": HARMLESS.right}, "nothing is changed"),
        ({"caught_by": "test_decide.py::test_that_there_is_not"}, "pytest ended with 4"),
        ({"wrong": HARMLESS.right + "this is no Python\n"}, "pytest ended with"),
    ],
)
def test_what_went_stale_is_an_error_that_names_the_bug(change: dict[str, str], why: str) -> None:
    bug = HARMLESS._replace(**change)
    with pytest.raises(StaleError, match=why) as caught:
        hunt(bug, named([bug]))
    assert str(caught.value).startswith("a comment: ")


def test_a_test_that_is_red_without_a_bug_proves_nothing(tmp_path: Path) -> None:
    red = tmp_path / "test_red.py"
    red.write_text("def test_red() -> None:\n    raise AssertionError\n")
    with pytest.raises(StaleError, match="red without a bug"):
        hunt(None, [str(red)])


def test_a_test_that_hangs_proves_nothing(tmp_path: Path) -> None:
    hangs = tmp_path / "test_hangs.py"
    hangs.write_text("import threading\n\ndef test_hangs() -> None:\n    threading.Event().wait(60)\n")
    with pytest.raises(StaleError, match="had not ended after"):
        hunt(HARMLESS, [str(hangs)], limit_s=0.5)
