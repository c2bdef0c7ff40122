"""The table of transitions: it holds while a machine is live, a replay is tolerated, and the docs print it."""

from __future__ import annotations

from pathlib import Path

import pytest

from rivetq.machine.apply import apply
from rivetq.machine.check import check
from rivetq.machine.events import (
    Acked,
    Buried,
    Cancelled,
    Enqueued,
    Event,
    Extended,
    Leased,
    Purged,
    QueueCreated,
    Redriven,
    Released,
    Retried,
)
from rivetq.machine.machine import Machine
from rivetq.machine.queue import DEAD, LEASED, READY, SCHEDULED, STATES
from rivetq.machine.snapshot import Place
from rivetq.machine.transitions import FROM, GONE, TABLE, name, table
from rivetq.model import NO_HEADERS, RetryPolicy

NOW, LATER = 1000, 9000
EVENTS: dict[type[Event], Event] = {
    Leased: Leased([1], [7], [1], [LATER], []),
    Acked: Acked(1, [1]),
    Retried: Retried(1, NOW, "no"),
    Released: Released(1, NOW, 0),
    Buried: Buried(1, NOW, "bad"),
    Extended: Extended(1, LATER),
    Cancelled: Cancelled(1, 1),
    Purged: Purged(1, [1]),
    Redriven: Redriven(1, [1]),
}


def machine_with(state: int) -> Machine:
    """A machine with job 1 in this state."""
    machine = Machine(keep_payloads=True)
    apply(machine, QueueCreated(1, "q"), NOW, Place())
    due_ms = LATER if state == SCHEDULED else 0
    apply(machine, Enqueued(1, 1, 5, due_ms, 3, RetryPolicy(), None, [1], [b"x"], NO_HEADERS, None), NOW, Place())
    if state in (LEASED, DEAD, GONE):
        apply(machine, Leased([1], [6], [1], [LATER], [(1, 5, 1)]), NOW, Place())
    if state == DEAD:
        apply(machine, Buried(1, NOW, "bad"), NOW, Place())
    if state == GONE:
        apply(machine, Acked(1, [1]), NOW, Place())
    check(machine)
    return machine


def test_every_event_of_a_job_is_in_the_table() -> None:
    assert FROM.keys() == {*EVENTS, Enqueued}


@pytest.mark.parametrize("state", [READY, SCHEDULED, LEASED, DEAD, GONE], ids=name)
@pytest.mark.parametrize("kind", EVENTS, ids=lambda kind: kind.__name__)
def test_live_an_event_meets_the_states_of_the_table_only(kind: type[Event], state: int) -> None:
    machine = machine_with(state)
    machine.is_live = True
    if state in FROM[kind]:
        apply(machine, EVENTS[kind], NOW, Place())
        check(machine)
        after = next((s for s in range(len(STATES)) if machine.queues["q"].counts[s]), GONE)
        (row,) = [row for row in TABLE if row.event is kind]
        assert after in row.after
    elif kind is Leased and state == LEASED:
        apply(machine, EVENTS[kind], NOW, Place())  # those that come out of a run are leased as they do
    elif (kind, state) == (Purged, GONE):
        apply(machine, EVENTS[kind], NOW, Place())  # a part of a purge names many, and counts those that it finds
    else:
        with pytest.raises(AssertionError):
            apply(machine, EVENTS[kind], NOW, Place())


@pytest.mark.parametrize("kind", EVENTS, ids=lambda kind: kind.__name__)
def test_a_replay_passes_over_an_event_of_a_job_that_is_gone(kind: type[Event]) -> None:
    machine = machine_with(GONE)
    apply(machine, EVENTS[kind], NOW, Place())
    assert not machine.jobs


def test_the_docs_print_the_table() -> None:
    page = (Path(__file__).parents[2] / "docs" / "design.md").read_text()
    assert table() in page, "docs/design.md: the states are not those of rivetq.machine.transitions.table()"
