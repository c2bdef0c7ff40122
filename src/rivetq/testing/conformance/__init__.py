"""The contract suite: what every engine behind a `Broker` must do, one rule a test.

A test module that defines the fixture `broker` and imports everything from here runs the whole suite against that
broker; the fixture decides whether it keeps its files in memory or on disk, and on which clock it runs:

    import pytest
    import rivetq
    from rivetq.testing import ManualClock
    from rivetq.testing.conformance import *

    @pytest.fixture
    def broker(tmp_path):
        with rivetq.Broker(tmp_path / "queue", clock=ManualClock()) as broker:
            yield broker

The broker must be new (no queues, no jobs) and must have the default `max_payload_bytes`. On a `ManualClock` no test
waits for time to pass; on any other clock a test about time takes a few tenths of a second.

The suite uses the public names only. It checks after each refused call that nothing has changed, and it asserts
lower bounds of real time and generous upper ones, so that a slow machine fails nothing.
"""

# The rules of all sections are handed on as they are.
# ruff: noqa: F403

from .answers import *
from .closing import *
from .enqueue import *
from .expiry import *
from .keys import *
from .lease import *
from .limits import *
from .looking import *
from .queues import *
from .retries import *
from .transactions import *
from .values import *
from .waiting import *

__all__ = [name for name in dir() if name.startswith("test_")]
