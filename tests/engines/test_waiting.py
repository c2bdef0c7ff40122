"""Some histories of lessees that wait (see waiting.py; `make waiting` makes 2,000), and that they see lost wake-ups."""

from __future__ import annotations

import threading

import pytest
import waiting
from inside import inside
from simulation import ViolationError

from rivetq import Broker, RateLimit
from rivetq.engines import clockwork
from rivetq.engines.live import LiveEngine
from rivetq.machine.machine import Machine
from rivetq.machine.queue import NEVER_MS, Queue
from rivetq.testing import ManualClock


def test_whoever_waits_for_a_job_that_could_be_leased_gets_it() -> None:
    assert waiting.run(400) == 400 * waiting.STEPS


def nobody_expects(machine: Machine, queue: Queue, now_ms: int) -> None:
    """In place of `expect_token`."""


@pytest.mark.parametrize(
    ("where", "name", "planted"),
    [
        (clockwork, "expect_token", nobody_expects),
        (LiveEngine, "_poke_timer", lambda self: None),
        (LiveEngine, "_expect_tokens", lambda self, limited, now_ms: None),
    ],
    ids=["a token that nobody expects", "a timer that is not told", "a limited lessee that expects none"],
)
def test_the_histories_see(where: type, name: str, planted: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "PATIENCE_S", 2.0)
    monkeypatch.setattr(where, name, planted)
    with pytest.raises(ViolationError, match=r"could be leased|was due"):
        waiting.run(400)


def test_no_token_is_expected_while_those_who_were_woken_for_one_have_not_looked() -> None:
    """Its moment would be now, and the timer would get up for it again and again."""
    with Broker(":memory:", clock=ManualClock()) as broker:
        engine = inside(broker)
        broker.configure_queue("q", rate_limit=RateLimit(1, 2))
        engine._notifier.start()
        go_on, told = threading.Event(), threading.Event()
        engine._notifier.call(go_on.wait)  # type: ignore[arg-type]  # what it returns is not looked at
        broker.lease_soon("q", 1, lambda leases, error: told.set())
        broker.enqueue_many("q", [b""] * 3)
        assert engine._machine.queues["q"].token_at_ms == NEVER_MS
        go_on.set()
        assert told.wait(20)
