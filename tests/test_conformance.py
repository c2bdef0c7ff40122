"""The contract suite on both engines: in memory, on disk with a clock that tests move, on disk with the real one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from rivetq import Broker
from rivetq.testing import ManualClock, conformance
from rivetq.testing.conformance import *


def test_all_tests_of_the_suite_are_handed_out() -> None:
    assert {name for name in dir(conformance) if name.startswith("test_")} == set(conformance.__all__)


@pytest.fixture(params=["memory", "local", "local-real-clock"])
def broker(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Broker]:
    if request.param == "memory":
        opened = Broker(":memory:", clock=ManualClock())
    elif request.param == "local":
        opened = Broker(tmp_path / "data", clock=ManualClock())
    else:
        opened = Broker(tmp_path / "data")
    with opened as broker:
        yield broker
