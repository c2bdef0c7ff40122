"""The pytest plugin (entry point `pytest11`): a broker in a temporary directory, on a clock that you move."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from ..broker.broker import Broker
from .clock import ManualClock

pytest.register_assert_rewrite("rivetq.testing.conformance")  # its failures show the values, as those of a test file


@pytest.fixture
def rivetq_clock() -> ManualClock:
    """The clock of `rivetq_broker`; ``rivetq_clock.advance(60)`` lets a minute pass."""
    return ManualClock()


@pytest.fixture
def rivetq_broker(tmp_path: Path, rivetq_clock: ManualClock) -> Iterator[Broker]:
    """A real broker with real files, closed after the test. Without a sync per call: a test loses no power."""
    with Broker(tmp_path / "rivetq", clock=rivetq_clock, fsync="never") as broker:
        yield broker
