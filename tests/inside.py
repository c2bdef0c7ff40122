"""What stands behind a broker, for tests that look inside."""

from __future__ import annotations

from typing import cast

from rivetq import Broker
from rivetq.engines.local import LocalEngine
from rivetq.machine.machine import Machine
from rivetq.machine.waiting import Waiting


def inside(broker: Broker) -> LocalEngine:
    """The engine. Of a broker in memory it is another one, with fewer attributes."""
    return cast(LocalEngine, broker._engine)


def waiting_of(machine: Machine, queue: str) -> Waiting:
    """The jobs of a queue that wait."""
    return machine.waiting[machine.queues[queue].number]
