"""The rules of `apply` as a table: which events may meet a job in which states, and its state after that.

The table is asserted while a machine is live. A replay meets jobs in other states, too: a checkpoint may have taken a
job as it was after the record that is replayed, and `apply` skips changes that the state already includes.
"""

from __future__ import annotations

from typing import NamedTuple

from .events import Acked, Buried, Cancelled, Enqueued, Event, Extended, Leased, Purged, Redriven, Released, Retried
from .queue import DEAD, LEASED, READY, SCHEDULED, STATES

GONE = -1
"""There is no such job."""


class Transition(NamedTuple):
    """A row of the table."""

    event: type[Event] | None
    """None: no event, the clock alone."""
    before: tuple[int, ...]
    after: tuple[int, ...]
    by: str
    """What makes it."""


_WAITS = (READY, SCHEDULED)
TABLE = (
    Transition(Enqueued, (GONE,), _WAITS, "enqueue"),
    Transition(None, (SCHEDULED,), (READY,), "a delay that falls due"),
    Transition(Leased, (READY,), (LEASED,), "lease"),
    Transition(Extended, (LEASED,), (LEASED,), "extend"),
    Transition(Acked, (LEASED,), (GONE,), "ack"),
    Transition(Retried, (LEASED,), _WAITS, "nack, or a deadline that passes"),
    Transition(Released, (LEASED,), _WAITS, "release, or a lease in advance whose holder is gone"),
    Transition(Buried, (LEASED,), (DEAD,), "reject, or the last attempt fails"),
    Transition(Redriven, (DEAD,), (READY,), "redrive"),
    Transition(Cancelled, (*_WAITS, DEAD), (GONE,), "cancel"),
    Transition(Purged, (*_WAITS, DEAD), (GONE,), "purge"),
)
FROM = {row.event: frozenset(row.before) for row in TABLE if row.event is not None}


def name(state: int) -> str:
    return "gone" if state == GONE else str(STATES[state])


def table() -> str:
    """For docs/design.md."""
    rows = [
        f"| {'' if row.event is None else f'`{row.event.__name__}`'} | {row.by} | {', '.join(map(name, row.before))} "
        f"| {' or '.join(map(name, row.after))} |"
        for row in TABLE
    ]
    return "\n".join(["| event | made by | before | then |", "|---|---|---|---|", *rows])
