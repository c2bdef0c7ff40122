"""The error tree: who is whose kind, facts as attributes, and both survive pickle and copy."""

from __future__ import annotations

import copy
import pickle
from datetime import UTC, datetime

import pytest

from rivetq import errors
from rivetq.errors import (
    BrokerClosedError,
    BrokerFailedError,
    BrokerLockedError,
    CapacityError,
    CorruptLogError,
    DiskFullError,
    DuplicateJobError,
    ForkedBrokerError,
    FormatError,
    JobError,
    JobNotFoundError,
    LeaseLostError,
    QueueFullError,
    RateLimitedError,
    RivetQError,
    StorageError,
    UsageError,
)

SINCE = datetime(2026, 1, 1, tzinfo=UTC)

# One of each, with the facts that it must carry.
CASES: list[tuple[RivetQError, dict[str, object]]] = [
    (RivetQError("m"), {}),
    (UsageError("m"), {}),
    (JobError("m"), {}),
    (JobNotFoundError("m", job_id=7), {"job_id": 7}),
    (LeaseLostError("m", job_id=7, token=31), {"job_id": 7, "token": 31}),
    (
        DuplicateJobError("m", job_id=7, queue="mail", key="k", state="dead"),
        {"job_id": 7, "queue": "mail", "key": "k", "state": "dead"},
    ),
    (CapacityError("m"), {}),
    (QueueFullError("m", queue="mail", max_jobs=10), {"queue": "mail", "max_jobs": 10}),
    (RateLimitedError("m", queue="mail", retry_after=1.5), {"queue": "mail", "retry_after": 1.5}),
    (DiskFullError("m", path="/q"), {"path": "/q"}),
    (StorageError("m"), {}),
    (CorruptLogError("m", file="/q/log/1", offset=4096), {"file": "/q/log/1", "offset": 4096}),
    (BrokerFailedError("m"), {}),
    (BrokerLockedError("m", path="/q", pid=12, since=SINCE), {"path": "/q", "pid": 12, "since": SINCE}),
    (BrokerLockedError("m", path="/q", pid=None, since=None), {"path": "/q", "pid": None, "since": None}),
    (FormatError("m"), {}),
    (BrokerClosedError("m"), {}),
    (ForkedBrokerError("m"), {}),
]
each = pytest.mark.parametrize(("error", "facts"), CASES, ids=lambda value: getattr(type(value), "__name__", ""))

PARENTS: dict[type[RivetQError], type[BaseException]] = {
    RivetQError: Exception,
    UsageError: RivetQError,
    JobError: RivetQError,
    JobNotFoundError: JobError,
    LeaseLostError: JobError,
    DuplicateJobError: JobError,
    CapacityError: RivetQError,
    QueueFullError: CapacityError,
    RateLimitedError: CapacityError,
    DiskFullError: CapacityError,
    StorageError: RivetQError,
    CorruptLogError: StorageError,
    BrokerFailedError: StorageError,
    BrokerLockedError: StorageError,
    FormatError: StorageError,
    BrokerClosedError: RivetQError,
    ForkedBrokerError: RivetQError,
}


def test_every_error_of_the_file_is_covered_here() -> None:
    found = {kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, RivetQError)}
    assert found == set(PARENTS) == {type(error) for error, _ in CASES}


@pytest.mark.parametrize("kind", PARENTS, ids=lambda kind: kind.__name__)
def test_each_error_has_its_place_in_the_tree(kind: type[RivetQError]) -> None:
    assert kind.__bases__[0] is PARENTS[kind]
    assert kind.__doc__


def test_a_usage_error_is_a_value_error() -> None:
    assert issubclass(UsageError, ValueError)
    assert not any(issubclass(kind, ValueError) for kind in PARENTS if kind is not UsageError)


@each
def test_facts_are_attributes_and_the_message_is_the_text(error: RivetQError, facts: dict[str, object]) -> None:
    assert vars(error) == facts
    assert str(error) == "m"
    assert error.args == ("m",)


@each
def test_an_error_says_not_done_unless_told_otherwise(error: RivetQError, facts: dict[str, object]) -> None:
    assert error.outcome == "not_done"


@each
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_an_error_is_pickled_with_its_facts(error: RivetQError, facts: dict[str, object], protocol: int) -> None:
    again = pickle.loads(pickle.dumps(error, protocol))
    assert type(again) is type(error)
    assert (again.args, str(again), vars(again)) == (("m",), "m", facts)


@each
def test_an_error_can_be_copied(error: RivetQError, facts: dict[str, object]) -> None:
    for again in (copy.copy(error), copy.deepcopy(error)):
        assert again is not error
        assert (type(again), again.args, vars(again)) == (type(error), ("m",), facts)


def test_the_outcome_and_the_notes_travel_with_a_pickled_error() -> None:
    error = DiskFullError("m", path="/q")
    error.outcome = "unknown"
    error.add_note("while closing")
    again = pickle.loads(pickle.dumps(error))
    assert again.outcome == "unknown"
    assert again.__notes__ == ["while closing"]
    assert DiskFullError("another", path="/q").outcome == "not_done"


def test_an_unknown_outcome_of_one_error_is_not_that_of_its_class() -> None:
    error = BrokerFailedError("m")
    error.outcome = "unknown"
    assert BrokerFailedError("m").outcome == "not_done"


def test_an_error_of_a_user_s_own_class_is_pickled_too() -> None:
    again = pickle.loads(pickle.dumps(OwnError("m", job_id=1, token=2)))
    assert (type(again), again.job_id, again.token, again.hint) == (OwnError, 1, 2, "look at m")


class OwnError(LeaseLostError):
    """A subclass that adds a fact of its own."""

    def __init__(self, message: str, *, job_id: int, token: int) -> None:
        super().__init__(message, job_id=job_id, token=token)
        self.hint = f"look at {message}"


@pytest.mark.parametrize(
    ("kind", "facts"), [(LeaseLostError, {"job_id": 1}), (JobNotFoundError, {}), (QueueFullError, {"queue": "q"})]
)
def test_an_error_without_its_facts_cannot_be_made(kind: type[RivetQError], facts: dict[str, object]) -> None:
    with pytest.raises(TypeError):
        kind("m", **facts)  # type: ignore[call-arg]  # each kind with its own facts
