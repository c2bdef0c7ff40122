"""A clock that moves when the test says so."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable
from datetime import datetime

from ..units import Duration, duration_ms, moment, moment_ms

_START_S = 1_767_225_600  # 2026-01-01T00:00:00Z


class ManualClock:
    """Time for tests: it stands still until `advance`.

    Args:
        start: the first moment: an aware datetime or epoch seconds.

    >>> clock = ManualClock(start=0)
    >>> clock.advance(90)
    >>> clock.now().isoformat()
    '1970-01-01T00:01:30+00:00'
    """

    def __init__(self, start: datetime | int | float = _START_S) -> None:
        self._wall_offset_ms = moment_ms(start, "start")
        self._elapsed_ms = 0
        self._lock = threading.Lock()  # guards the list below and the jump
        self._moved: list[Callable[[], None]] = []
        self.boot_id = str(uuid.uuid4())

    def now(self) -> datetime:
        """The wall clock's moment, aware, in UTC."""
        return moment(self.wall_ms())

    def advance(self, seconds: Duration) -> None:
        """Move on; returns after everything due in the brokers on this clock has happened."""
        with self._lock:
            self._elapsed_ms += duration_ms(seconds, "seconds")
            moved = list(self._moved)
        for tell in moved:
            tell()

    def step_wall(self, seconds: float) -> None:
        """Set the wall clock forward or, below 0, back, as a person or NTP would: no time passes."""
        self._wall_offset_ms += round(seconds * 1000)

    def reboot(self) -> None:
        """From here on it is another boot: the boot-time clock starts at 0. The wall clock goes on."""
        self._wall_offset_ms += self._elapsed_ms
        self._elapsed_ms = 0
        self.boot_id = str(uuid.uuid4())

    # What engines ask (see rivetq.Clock)

    def boot_ms(self) -> int:
        return self._elapsed_ms

    def wall_ms(self) -> int:
        return self._wall_offset_ms + self._elapsed_ms

    def timeout_s(self, delay_ms: int) -> float | None:
        return None

    def subscribe(self, moved: Callable[[], None]) -> Callable[[], None]:
        with self._lock:
            self._moved.append(moved)

        def unsubscribe() -> None:
            with self._lock:
                self._moved.remove(moved)

        return unsubscribe
