"""What stands behind a broker, for tests that look inside."""

from __future__ import annotations

from typing import cast

import pytest

from rivetq import Broker
from rivetq.engines.local import LocalEngine
from rivetq.machine import apply, apply_enqueued, columns, machine, run, saving
from rivetq.machine.machine import Machine
from rivetq.machine.waiting import Waiting


def shrink_runs(patch: pytest.MonkeyPatch, run_jobs: int | None = None, few_jobs: int | None = None) -> None:
    """Runs of so many jobs at most, and another bound below which jobs stay loose."""
    for module in (apply, apply_enqueued, columns, machine, run, saving):
        for name, value in (("RUN_JOBS", run_jobs), ("FEW_JOBS", few_jobs)):
            if value is not None and hasattr(module, name):
                patch.setattr(module, name, value)


def inside(broker: Broker) -> LocalEngine:
    """The engine. Of a broker in memory it is another one, with fewer attributes."""
    return cast(LocalEngine, broker._engine)


def waiting_of(machine: Machine, queue: str) -> Waiting:
    """The jobs of a queue that wait."""
    return machine.waiting[machine.queues[queue].number]
