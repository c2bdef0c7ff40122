"""`Broker(":memory:")`: the same machine with no files, for tests. Nothing outlives the process."""

from __future__ import annotations

from .clock import Clock
from .live import LiveEngine
from .machine import Machine


class MemoryEngine(LiveEngine):
    """Payloads are kept in the machine itself."""

    def __init__(self, clock: Clock) -> None:
        super().__init__(Machine(keep_payloads=True), clock, clock.wall_ms())
        self.start()
