"""`Broker(":memory:")`: the same machine with no files, for tests. Nothing outlives the process."""

from __future__ import annotations

from ..clock import Clock, read_together
from ..machine.machine import Machine
from .live import LiveEngine


class MemoryEngine(LiveEngine):
    """Payloads are kept in the machine itself."""

    def __init__(self, clock: Clock) -> None:
        boot_ms, wall_ms = read_together(clock)
        machine = Machine(keep_payloads=True)
        machine.is_live = True
        super().__init__(machine, clock, wall_ms, boot_ms)
        self.start()
