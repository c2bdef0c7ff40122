"""For tests of the runtime, in which threads and processes take their time."""

from __future__ import annotations

import time
from collections.abc import Callable

from rivetq import Job
from rivetq.tasks import App

PATIENCE_S = 30.0
"""For what must come true by itself; far longer than it takes."""


def until(holds: Callable[[], object], seconds: float = PATIENCE_S) -> None:
    """Wait until it holds, and fail if it does not in that time."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.002)


def job_of(app: App, job_id: int) -> Job:
    """The job as it is now; it must be there."""
    found = app.broker.get(job_id)
    assert found is not None
    return found
