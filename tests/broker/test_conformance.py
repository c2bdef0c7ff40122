"""The contract suite on both engines: in memory, on disk with a clock that tests move, on disk with the real one."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from pkgutil import iter_modules

import pytest
from recording import RecordingEngine

from rivetq import Broker
from rivetq.engines.memory import MemoryEngine
from rivetq.testing import ManualClock, conformance
from rivetq.testing.conformance import *


def test_all_tests_of_the_suite_are_handed_out() -> None:
    names = [f"{conformance.__name__}.{part.name}" for part in iter_modules(conformance.__path__)]
    parts = map(vars, map(importlib.import_module, names))
    tests = [name for part in parts for name, value in part.items() if name.startswith("test_") and callable(value)]
    assert sorted(tests) == sorted(conformance.__all__)


@pytest.fixture(params=["memory", "local", "local-real-clock", "recorded"])
def broker(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Broker]:
    if request.param == "memory":
        opened = Broker(":memory:", clock=ManualClock())
    elif request.param == "recorded":
        opened = Broker.over(RecordingEngine(MemoryEngine(ManualClock())), path=":memory:")
    elif request.param == "local":
        opened = Broker(tmp_path / "data", clock=ManualClock())
    else:
        opened = Broker(tmp_path / "data")
    with opened as broker:
        yield broker
