"""Sessions: callers who number their requests, so that a request whose answer was lost can be made again.

The memory for answers is bounded: a session that never ends is forgotten when many others have called since.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from ..engine import Deadline, Once
from ..errors import UsageError
from .events import Called, Took
from .machine import Machine
from .queue import LEASED
from .snapshot import Session

SESSIONS = 1024
"""How many sessions are remembered: those that called last."""
ANSWERS = 1000
"""How many answers of one session are remembered: those with the highest numbers."""


class Told(NamedTuple):
    """The answer of a request that was made before."""

    answer: Any


def told(machine: Machine, once: Once, now_ms: int) -> Told | None:
    """The answer of a request that was done before; None: it is made for the first time. Costs one look-up.

    Raises UsageError if the session had this answer long ago.
    """
    session = machine.sessions.get(once.session)
    if session is None:
        return None
    if once.number in session.answers:
        return Told(_as_of_now(machine, session.answers[once.number], now_ms))
    if once.number < session.done_below:
        raise UsageError(
            f"session {once.session}: request {once.number} was answered long ago, and its answer is not kept: a new "
            f"request needs a new number"
        )
    return None


def _as_of_now(machine: Machine, answer: Any, now_ms: int) -> Any:
    match answer:
        case Deadline(at_ms, _):
            return Deadline(at_ms, max(0, at_ms - now_ms))
        case Took(ids, tokens):
            held = [(i, token) for i, token in zip(ids, tokens, strict=True) if _is_held(machine, i, token)]
            return Took([i for i, _ in held], [token for _, token in held])
        case [*each] if not (each and isinstance(each[0], int)):
            return [_as_of_now(machine, one, now_ms) for one in each]
    return answer


def _is_held(machine: Machine, job_id: int, token: int) -> bool:
    entry = machine.jobs.get(job_id)
    return entry is not None and entry.state == LEASED and entry.token == token


def note_called(machine: Machine, event: Called) -> None:
    """Keep the answer. Forget answers that the session has received, and those beyond the bounds."""
    session = machine.sessions.pop(event.session, None) or Session(event.session)
    machine.sessions[event.session] = session  # at the end: it called last
    session.answers[event.number] = event.answer
    if event.done_below > session.done_below:
        session.done_below = event.done_below
        for number in [n for n in session.answers if n < event.done_below]:
            del session.answers[number]
    if len(session.answers) > ANSWERS:
        lowest = min(session.answers)
        del session.answers[lowest]
        session.done_below = lowest + 1
    if len(machine.sessions) > SESSIONS:
        del machine.sessions[next(iter(machine.sessions))]
