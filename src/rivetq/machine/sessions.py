"""Sessions: callers who number their requests, so that a request whose answer was lost can be made again.

The memory for answers is bounded: a session that never ends is forgotten when many others have called since.
"""

from __future__ import annotations

from collections.abc import Iterable
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
ANSWERED_IDS = 20_000
"""What all answers together weigh, in ids, but for the last one: some hundred KiB in the header of each segment."""


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
        case list():
            return [_as_of_now(machine, each, now_ms) for each in answer]
    return answer


def called(once: Once, answer: Any) -> Called:
    """The event behind those of a request. The answer is copied: the caller may change the lists that it gets."""
    return Called(once.session, once.number, once.done_below, _copied(answer))


def _copied(answer: Any) -> Any:
    return [_copied(each) for each in answer] if type(answer) is list else answer


def _is_held(machine: Machine, job_id: int, token: int) -> bool:
    entry = machine.jobs.get(job_id)
    return entry is not None and entry.state == LEASED and entry.token == token


def note_called(machine: Machine, event: Called) -> None:
    """Keep the answer. Answers that the session has are forgotten, and what is beyond the bounds."""
    session = machine.sessions.pop(event.session, None) or Session(event.session)
    machine.sessions[event.session] = session  # at the end: it called last
    session.done_below = max(session.done_below, event.done_below)
    session.answers[event.number] = event.answer
    machine.answered += _weight(event.answer)
    for number in [n for n in session.answers if n < session.done_below]:
        _forget_answer(machine, session, number)
    while len(machine.sessions) > 1 and (len(machine.sessions) > SESSIONS or machine.answered > ANSWERED_IDS):
        end_session(machine, next(iter(machine.sessions)))
    while len(session.answers) > 1 and (len(session.answers) > ANSWERS or machine.answered > ANSWERED_IDS):
        lowest = min(session.answers)
        _forget_answer(machine, session, lowest)
        session.done_below = max(session.done_below, lowest + 1)


def end_session(machine: Machine, number: int) -> None:
    """Forget a session and its answers."""
    session = machine.sessions.pop(number, None)
    if session is not None:
        machine.answered -= sum(map(_weight, session.answers.values()))


def load_sessions(machine: Machine, sessions: Iterable[Session]) -> None:
    """Those of a snapshot, in place of all that there are."""
    machine.sessions = {session.id: session for session in sessions}
    machine.answered = answered(machine)


def answered(machine: Machine) -> int:
    """What all kept answers weigh. Costs a walk over them."""
    return sum(_weight(answer) for session in machine.sessions.values() for answer in session.answers.values())


def _forget_answer(machine: Machine, session: Session, number: int) -> None:
    machine.answered -= _weight(session.answers.pop(number))


def _weight(answer: Any) -> int:
    """About how many ids an answer holds."""
    match answer:
        case Took(ids, _):
            return 1 + 2 * len(ids)
        case [int(), *_]:
            return 1 + len(answer)
        case list():
            return 1 + sum(map(_weight, answer))
    return 1
