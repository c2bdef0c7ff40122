"""Answers of numbered requests <-> JSON: what a repeated request is told (see events.Called).

An answer is None, a bool, a number, a list of ids, a configuration, what was leased, or a list with one answer for each
operation of a commit.
"""

from __future__ import annotations

from typing import Any

import attrs

from ..engine import Deadline, Lost
from ..machine.events import Took
from ..model import JobId, QueueConfig, RateLimit, RetryPolicy


def answer_to_json(answer: Any) -> Any:
    """A value for `json.dumps`."""
    match answer:
        case None | bool() | int():
            return answer
        case Deadline():
            return {"deadline_ms": answer.at_ms}
        case Lost():
            return {"lost": answer.token, "why": answer.why}
        case Took():
            return {"leased": [list(answer.ids), list(answer.tokens)]}
        case QueueConfig():
            return {"config": config_to_json(answer)}
        case [int(), *_]:
            return _ids_to_json(answer)
        case list():
            return [answer_to_json(each) for each in answer]
    raise TypeError(f"no answer of an engine: {answer!r}")


def _ids_to_json(ids: list[int]) -> dict[str, Any]:
    created = [isinstance(each, JobId) and each.created for each in ids]
    if isinstance(ids[0], JobId):
        return {"ids": [[int(each), was] for each, was in zip(ids, created, strict=True)]}
    if ids == list(range(ids[0], ids[0] + len(ids))):
        return {"from": ids[0], "n": len(ids)}
    return {"ids": ids}


def answer_from_json(value: Any) -> Any:
    """The other way. Of a deadline only the moment is right: what remains is for who tells it."""
    match value:
        case {"deadline_ms": int(at_ms)}:
            return Deadline(at_ms, 0)
        case {"lost": int(token), "why": str(why)}:
            return Lost(token, why)
        case {"leased": [list(ids), list(tokens)]}:
            return Took(ids, tokens)
        case {"config": dict(config)}:
            return config_from_json(config)
        case {"from": int(first), "n": int(n)}:
            return list(range(first, first + n))
        case {"ids": list(ids)}:
            return [each if isinstance(each, int) else JobId(each[0], created=each[1]) for each in ids]
        case list():
            return [answer_from_json(each) for each in value]
        case None | bool() | int():
            return value
    raise ValueError(f"no answer of an engine: {value!r}")


def config_to_json(config: QueueConfig) -> dict[str, Any]:
    return attrs.asdict(config)


def config_from_json(value: dict[str, Any]) -> QueueConfig:
    value = dict(value)
    limit, retry = value.pop("rate_limit"), RetryPolicy(**value.pop("retry"))
    return QueueConfig(retry=retry, rate_limit=None if limit is None else RateLimit(**limit), **value)
