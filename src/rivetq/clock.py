"""Where time comes from: the seam that tests replace.

Two sources, for two purposes. The boot-time clock counts milliseconds since the machine started, suspend included, and
never steps: all durations (leases, delays, limits) are measured with it. The wall clock can step at any moment and is
asked only to turn a caller's absolute moment into a delay, and to place the queue's time line after a reboot.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

BOOT_ID = "/proc/sys/kernel/random/boot_id"
ROUNDS = 10
"""Two clocks are read so often at most, to have them at one moment."""


class Clock(Protocol):
    """What an engine needs to know about time."""

    @property
    def boot_id(self) -> str:
        """Names one run of the boot-time clock; values of two runs cannot be compared."""
        ...

    def boot_ms(self) -> int:
        """Milliseconds since some moment of this boot; never steps back."""
        ...

    def wall_ms(self) -> int:
        """Epoch milliseconds by the wall clock, which may step."""
        ...

    def timeout_s(self, delay_ms: int) -> float | None:
        """How long a thread should really sleep for `delay_ms` to pass here; None: until it is told."""
        ...

    def subscribe(self, moved: Callable[[], None]) -> Callable[[], None]:
        """Call `moved` after each jump of the clock; returns a function that ends that. Real clocks never jump."""
        ...


def read_together(clock: Clock) -> tuple[int, int]:
    """The boot-time clock and the wall clock at one moment, in milliseconds.

    A thread may lose its processor between the two, on a busy machine several times in a row: they are read again then.
    """
    for _ in range(ROUNDS):
        boot_ms, wall_ms = clock.boot_ms(), clock.wall_ms()
        if clock.boot_ms() - boot_ms <= 1:
            break
    return boot_ms, wall_ms


class SystemClock:
    """The machine's own clocks."""

    grain_ms = 1
    """They go on while they are read and are rounded down: a delay counts from so much later, not to be short. A clock
    without this is exact."""

    def __init__(self) -> None:
        self._boot_clock = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)  # BOOTTIME is Linux only
        self.boot_id = _read_boot_id()

    def boot_ms(self) -> int:
        return time.clock_gettime_ns(self._boot_clock) // 1_000_000

    def wall_ms(self) -> int:
        return time.time_ns() // 1_000_000

    def timeout_s(self, delay_ms: int) -> float | None:
        return delay_ms / 1000

    def subscribe(self, moved: Callable[[], None]) -> Callable[[], None]:
        return _nothing


def _nothing() -> None:
    """A real clock has nothing to unsubscribe from."""


def _read_boot_id() -> str:
    try:
        with open(BOOT_ID) as file:  # pathlib would take a tenth of the import of rivetq
            return file.read().strip()
    except OSError:
        # Not Linux: the process's own start, so that every open counts as another boot, which is the careful reading.
        return f"process-{time.time_ns()}"
