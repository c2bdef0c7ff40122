"""Each of the twelve planted bugs turns a test red (see planted.py, which runs the whole suite on each)."""

from __future__ import annotations

import pytest
from planted import BUGS, Bug, hunt, named


def test_there_are_twelve_bugs() -> None:
    assert len({bug.name for bug in BUGS}) == 12


@pytest.mark.parametrize("bug", BUGS, ids=[bug.name for bug in BUGS])
def test_a_planted_bug_is_caught(bug: Bug) -> None:
    assert hunt(bug, named(bug), 1).failed
