"""A short run of leaks.py (`make leaks` sends a million jobs through), and that it sees a leak."""

from __future__ import annotations

import leaks
import pytest
from simulation import ViolationError

from rivetq.engines.leasing import SoonLease


def test_what_a_process_holds_stays_flat() -> None:
    leaks.run(20_000)


def a_wait_that_stays(self: SoonLease) -> bool:
    """In place of `cancel`: something remembers it."""
    self._engine._lessees.lines.setdefault("nobody's", {})[self] = None
    return cancel(self)


cancel = SoonLease._cancel


def test_a_lessee_that_stays_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SoonLease, "_cancel", a_wait_that_stays)
    with pytest.raises(ViolationError, match="lessees"):
        leaks.run(6_000)
