"""What the tests of the suite share: values, and calls that check."""

# A block around a transaction or a lease that is to fail is more than one statement.

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from datetime import datetime, timedelta
from math import inf, nan
from typing import Any, TypeVar

import pytest

from rivetq import Broker, Job, Lease, RetryPolicy, RivetQError
from rivetq.testing import ManualClock

_E = TypeVar("_E", bound=RivetQError)
# Real seconds after which a wait counts as hung. A test that passes never waits for so long.
_PATIENCE = 20.0
_AT_ONCE = RetryPolicy(base=0, jitter="none")
_NOT_SOON = RetryPolicy(base=1000, jitter="none")
_COUNTERS = ("ready", "scheduled", "leased", "dead", "enqueued", "acked", "cancelled", "purged")
_JOB_FIELDS = (
    "id",
    "queue",
    "state",
    "payload",
    "headers",
    "priority",
    "attempts",
    "max_attempts",
    "enqueued_at",
    "due_at",
    "last_error",
    "died_at",
)
_LEASE_FIELDS = (
    "id",
    "queue",
    "payload",
    "headers",
    "priority",
    "attempt",
    "token",
    "deadline",
    "enqueued_at",
    "max_attempts",
    "last_error",
)
_CONFIG_FIELDS = ("retry", "rate_limit", "visibility_timeout", "max_jobs", "idempotency_ttl")
_TOO_LONG = 101 * 366 * 86400  # seconds; certainly more than 100 years
_BAD_NAMES = ["", "x" * 256, "é" * 128, "\ud800", b"q", 7, None]
_BAD_DURATIONS = [True, False, -1, -0.001, nan, inf, _TOO_LONG, timedelta(seconds=-1), timedelta(seconds=_TOO_LONG)]
_BAD_MOMENTS = [datetime(2030, 1, 1), True, nan, inf]
_BAD_NUMBERS = [True, nan, inf]
_BAD_INTS = [True, False, 2.0, nan]
_BAD_KEYS = ["", "k" * 257, "é" * 129, b"k", 7]


def _each(*values: object) -> list[Any]:
    """The values as pytest parameters, each under a short name that is the same in every process."""
    names = [type(value).__name__ if " at 0x" in repr(value) else repr(value)[:40] for value in values]
    return [pytest.param(value, id=name) for value, name in zip(values, names, strict=True)]


def _options(bad: dict[str, list[Any]]) -> list[Any]:
    """One pytest parameter, a dict of keyword arguments, for each bad value of each option."""
    return [
        pytest.param({name: value}, id=f"{name}={value!r}"[:60]) for name, values in bad.items() for value in values
    ]


def _pass_time(broker: Broker, seconds: float) -> None:
    """Let `seconds` pass on the broker's clock: moved if it can be moved, waited for if it is real."""
    if isinstance(broker.clock, ManualClock):
        broker.clock.advance(seconds)
    else:
        time.sleep(seconds + 0.02)


def _eventually(holds: Callable[[], bool]) -> None:
    """Return once `holds()`; on a real clock what is due may happen a moment later."""
    end = time.monotonic() + _PATIENCE
    while not holds():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.005)


def _facts(broker: Broker) -> dict[str, object]:
    """All that can be seen of the broker, but for `oldest_age`, which grows by itself."""
    return {
        queue: (
            [getattr(broker.stats(queue), name) for name in _COUNTERS],
            [_fields(job, _JOB_FIELDS) for job in broker.jobs(queue, limit=10_000)],
            _fields(broker.configure_queue(queue), _CONFIG_FIELDS),
        )
        for queue in sorted(broker.queues())
    }


def _fields(value: object, names: Iterable[str]) -> list[object]:
    """Its attributes; mappings as dicts, so that any read-only mapping compares."""
    found = [getattr(value, name) for name in names]
    return [dict(each) if hasattr(each, "keys") else each for each in found]


@contextmanager
def _refuses(broker: Broker, error: type[_E]) -> Iterator[pytest.ExceptionInfo[_E]]:
    """The block raises `error`, which says that nothing was done, and nothing was."""
    before = _facts(broker)
    with pytest.raises(error) as caught:
        yield caught
    assert caught.value.outcome == "not_done"
    assert _facts(broker) == before


def _lease(broker: Broker, queue: str = "q", visibility_timeout: float | None = None) -> Lease:
    """A lease on a job that is there, or falls due now."""
    lease = broker.lease(queue, visibility_timeout=visibility_timeout, wait=_PATIENCE)
    assert lease is not None
    return lease


def _lease_new(broker: Broker, queue: str = "q", **options: Any) -> Lease:
    """A lease on a new job, the only one of its queue that can be leased."""
    broker.enqueue(queue, b"x", **options)
    return _lease(broker, queue)


def _job(broker: Broker, job_id: int) -> Job:
    job = broker.get(job_id)
    assert job is not None
    return job


def _bury(broker: Broker, queue: str = "q", *, key: str | None = None) -> int:
    """The id of a new dead letter."""
    lease = _lease_new(broker, queue, priority=9, idempotency_key=key)
    broker.reject(lease, error="buried")
    return lease.id


def _await_state(broker: Broker, job_id: int, state: str) -> Job:
    _eventually(lambda: _job(broker, job_id).state == state)
    return _job(broker, job_id)


def _drain(broker: Broker, queue: str = "q") -> list[int]:
    """The ids of all ready jobs in the order in which they are given out."""
    return [lease.id for lease in broker.lease_many(queue, 1000)]


def _assert_about(broker: Broker, seconds: float, expected: float, most: float | None = None) -> None:
    """From `expected` to `most`: on a ManualClock to rounding; on a real one the calls may have taken their time."""
    slack = 0.002 if isinstance(broker.clock, ManualClock) else 10
    assert expected - 0.002 <= seconds <= (expected if most is None else most) + slack


def _assert_due_in(broker: Broker, job_id: int, expected: float) -> None:
    """The job is scheduled, `expected` seconds after its enqueue (no time was let pass since)."""
    job = _job(broker, job_id)
    assert job.state == "scheduled"
    assert job.due_at is not None
    _assert_about(broker, (job.due_at - job.enqueued_at).total_seconds(), expected)


def _elsewhere(call: Callable[[], object]) -> None:
    """Run it to its end in another thread."""
    with ThreadPoolExecutor(1) as pool:
        pool.submit(call).result(_PATIENCE)


@contextmanager
def _waiting(broker: Broker, queue: str | list[str] = "q") -> Iterator[Future[Lease | None]]:
    """Another thread waits for a lease, and the block makes one possible; it must be woken, not time out."""
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(broker.lease, queue, wait=2 * _PATIENCE)
        time.sleep(0.05)  # so that it waits by now; if it does not, the outcome is the same
        yield future


def _woken(future: Future[Lease | None]) -> Lease:
    lease = future.result(_PATIENCE)
    assert lease is not None
    return lease


def _put_one(broker: Broker, **options: Any) -> object:
    return broker.enqueue("q", b"x", **options)


def _put_many(broker: Broker, **options: Any) -> object:
    return broker.enqueue_many("q", [b"x", b"y"], **options)


def _put_one_in_a_transaction(broker: Broker, **options: Any) -> object:
    with broker.transaction() as tx:
        return tx.enqueue("q", b"x", **options)


def _put_many_in_a_transaction(broker: Broker, **options: Any) -> object:
    with broker.transaction() as tx:
        return tx.enqueue_many("q", [b"x", b"y"], **options)


_every_way_in = pytest.mark.parametrize(
    "put",
    [_put_one, _put_many, _put_one_in_a_transaction, _put_many_in_a_transaction],
    ids=["enqueue", "enqueue_many", "tx.enqueue", "tx.enqueue_many"],
)


class _Told:
    """What `lease_soon` told, and how often."""

    def __init__(self) -> None:
        self.answers: list[tuple[list[Lease] | None, BaseException | None]] = []

    def __call__(self, leases: list[Lease] | None, error: BaseException | None) -> None:
        self.answers.append((leases, error))

    def leases(self) -> list[Lease]:
        _eventually(lambda: bool(self.answers))
        ((leases, error),) = self.answers
        assert error is None
        assert leases is not None
        return leases

    def ids(self) -> list[int]:
        return [lease.id for lease in self.leases()]


_Answer = Callable[[Broker, Any], object]


def _tx_answer(verb: str) -> _Answer:
    def answer(broker: Broker, lease: Any) -> None:
        with broker.transaction() as tx:
            tx.enqueue("q", b"never there when the answer is refused")
            getattr(tx, verb)([lease] if verb == "ack_many" else lease)

    return answer


_ANSWERS: dict[str, _Answer] = {
    "ack": lambda broker, lease: broker.ack(lease),
    "ack_many": lambda broker, lease: broker.ack_many([lease]),
    "nack": lambda broker, lease: broker.nack(lease),
    "release": lambda broker, lease: broker.release(lease),
    "reject": lambda broker, lease: broker.reject(lease),
    "extend": lambda broker, lease: broker.extend(lease, 100),
    **{f"tx.{verb}": _tx_answer(verb) for verb in ("ack", "ack_many", "nack", "release", "reject")},
}
_every_answer = pytest.mark.parametrize("answer", list(_ANSWERS.values()), ids=list(_ANSWERS))


def _one_of_each_state(broker: Broker) -> dict[str, int]:
    """The ids of four jobs of "q" by their states."""
    dead = _bury(broker)
    leased = _lease_new(broker).id
    return {
        "dead": dead,
        "leased": leased,
        "ready": broker.enqueue("q", b""),
        "scheduled": broker.enqueue("q", b"", delay=1000),
    }
