"""What stands behind a broker, for tests that look inside."""

from __future__ import annotations

from typing import cast

from rivetq import Broker
from rivetq.engines.local import LocalEngine


def inside(broker: Broker) -> LocalEngine:
    """The engine. Of a broker in memory it is another one, with fewer attributes."""
    return cast(LocalEngine, broker._engine)
