"""The values that users hold: frozen, comparable, picklable where they make sense outside the process.

Nothing here knows an engine. ``Lease`` keeps a reference to something that can settle it (the broker), which takes
no part in equality and is not pickled.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from enum import StrEnum
from types import TracebackType
from typing import Any, Literal, Protocol, Self

import attrs

from .errors import LeaseLostError, RivetQError, UsageError
from .units import Duration, checked_int, checked_number, seconds_of, shown_value

Jitter = Literal["full", "equal", "none"]
LimitOn = Literal["lease", "enqueue"]


class JobState(StrEnum):
    """Where a job is. A job that was acked, cancelled or purged is gone and has no state."""

    READY = "ready"
    SCHEDULED = "scheduled"
    LEASED = "leased"
    DEAD = "dead"


def _base(value: Duration) -> float:
    return seconds_of(value, "base")


def _max_delay(value: Duration) -> float:
    return seconds_of(value, "max_delay")


def _factor(value: float) -> float:
    return checked_number(value, "factor", 1)


def _max_attempts(value: int | None) -> int | None:
    return None if value is None else checked_int(value, "max_attempts", 1, 2**31 - 1)


def _jitter(value: Jitter) -> Jitter:
    if not isinstance(value, str) or value not in ("full", "equal", "none"):
        raise UsageError(f"jitter: 'full', 'equal' or 'none' expected, got {shown_value(value)}")
    return value


def _per_second(value: float) -> float:
    rate = checked_number(value, "per_second", 0)
    if not rate:
        raise UsageError("per_second: above 0 expected; to stop a queue use pause()")
    return rate


def _burst(value: int) -> int:
    return checked_int(value, "burst", 1, 2**53)


def _limit_on(value: LimitOn) -> LimitOn:
    if not isinstance(value, str) or value not in ("lease", "enqueue"):
        raise UsageError(f"on: 'lease' or 'enqueue' expected, got {shown_value(value)}")
    return value


class JobId(int):
    """The id of a job that was enqueued with an idempotency key: an int that knows whether the job is new.

    >>> JobId(7, created=True)
    7
    """

    created: bool
    """This call made the job; False: the key stood for it already."""

    def __new__(cls, value: int, *, created: bool = False) -> Self:
        job_id = super().__new__(cls, value)
        job_id.created = created
        return job_id

    def __getnewargs_ex__(self) -> tuple[tuple[int], dict[str, bool]]:
        return (int(self),), {"created": self.created}


@attrs.frozen(kw_only=True)
class RetryPolicy:
    """How often a job is delivered and how long it waits in between.

    The nth retry waits d = min(max_delay, base * factor**(n-1)) seconds; "none" is d itself, "equal" is
    d/2 + uniform(0, d/2), "full" is uniform(0, d), the default, since it spreads a herd best (AWS Architecture Blog,
    "Exponential Backoff And Jitter").

    Args:
        max_attempts: deliveries in all, the first included, before the job is a dead letter; None: no end.
        base: seconds before the first retry; 0: no wait at all.
        factor: growth per retry, at least 1.
        max_delay: the longest wait in seconds.
        jitter: "full", "equal" or "none".
    """

    max_attempts: int | None = attrs.field(default=5, converter=_max_attempts)
    base: float = attrs.field(default=1.0, converter=_base)
    factor: float = attrs.field(default=2.0, converter=_factor)
    max_delay: float = attrs.field(default=3600.0, converter=_max_delay)
    jitter: Jitter = attrs.field(default="full", converter=_jitter)


@attrs.frozen
class RateLimit:
    """A token bucket: `burst` tokens at most, refilled by `per_second`.

    Args:
        per_second: tokens a second, above 0.
        burst: size of the bucket, at least 1; it starts full.
        on: "lease": each delivery costs a token; "enqueue": each new job costs one.
    """

    per_second: float = attrs.field(converter=_per_second)
    burst: int = attrs.field(converter=_burst)
    on: LimitOn = attrs.field(default="lease", converter=_limit_on)


@attrs.frozen(kw_only=True)
class QueueConfig:
    """What is in force for one queue. Durations in seconds."""

    retry: RetryPolicy = RetryPolicy()
    rate_limit: RateLimit | None = None
    visibility_timeout: float = 30.0
    max_jobs: int | None = None
    idempotency_ttl: float = 86_400.0
    paused: bool = attrs.field(default=False, eq=False)
    """Set by `pause` and `resume`, not by `configure_queue`: no part of equality."""


@attrs.frozen(kw_only=True)
class QueueStats:
    """One look at one moment: enqueued = ready + scheduled + leased + dead + acked + cancelled + purged."""

    ready: int = 0
    scheduled: int = 0
    leased: int = 0
    dead: int = 0
    enqueued: int = 0
    acked: int = 0
    cancelled: int = 0
    purged: int = 0
    oldest_age: float | None = None
    """Seconds since the `enqueued_at` of the oldest ready job; None if no job is ready."""


@attrs.frozen
class Deliveries:
    """What became of deliveries since the broker was opened; from 0 at each opening."""

    leased: int = 0
    nacked: int = 0
    """Ended by an answer as failed: nack or reject."""
    released: int = 0
    expired: int = 0
    """Ended at their deadline, or because their owner was gone at the opening."""
    dead: int = 0
    """Made a dead letter, in any way."""
    rate_limited: int = 0
    """Calls that a rate limit refused a job: an enqueue with RateLimitedError, a lease with nothing."""


@attrs.frozen(kw_only=True)
class Health:
    """Whether a broker serves, and what may soon be short."""

    state: Literal["open", "closed", "failed", "forked"]
    last_error: str | None = None
    """Why it failed; while it is open, what housekeeping could not do last (a full disk, say)."""
    checkpoint_lag_bytes: int = 0
    """Log that an opening after a crash would replay."""
    disk_free_bytes: int | None = None
    """What is left for this user where the directory is; None without files."""

    @property
    def is_well(self) -> bool:
        """Open, and nothing went wrong lately."""
        return self.state == "open" and self.last_error is None


@attrs.frozen(kw_only=True)
class Job:
    """A job as it is now: a snapshot, not a handle."""

    id: int
    queue: str
    state: JobState
    payload: bytes
    headers: Mapping[str, str]
    priority: int
    attempts: int
    """Deliveries so far, the running one included."""
    max_attempts: int | None
    enqueued_at: datetime
    due_at: datetime | None
    """When a scheduled job becomes ready; None in the other states."""
    last_error: str | None
    died_at: datetime | None

    def json(self) -> Any:
        """The payload decoded as JSON; Any, as from json.loads."""
        return decode_json(self.payload)

    def __getstate__(self) -> tuple[object, ...]:
        return _plain_state(self)

    def __setstate__(self, state: tuple[object, ...]) -> None:
        _set_plain_state(self, state)


class LeaseLike(Protocol):
    """An object that names a delivery: a Lease, a LeaseRef, or an object of yours."""

    @property
    def id(self) -> int: ...
    @property
    def token(self) -> int: ...


@attrs.frozen
class LeaseRef:
    """The two numbers that an answer needs; enough to settle a lease from another place."""

    id: int
    token: int


class Settler(Protocol):
    """What a Lease calls back: the broker's verbs."""

    def ack(self, lease: LeaseLike) -> None: ...
    def nack(self, lease: LeaseLike, *, error: str | None = None, delay: Duration | None = None) -> None: ...
    def release(self, lease: LeaseLike, *, delay: Duration = 0) -> None: ...
    def reject(self, lease: LeaseLike, *, error: str | None = None) -> None: ...
    def extend(self, lease: LeaseLike, seconds: Duration) -> Lease: ...
    def _watch_lease(self, token: int) -> None: ...
    def _unwatch_lease(self, token: int) -> bool: ...


@attrs.frozen(kw_only=True, slots=False)  # without slots a frozen instance is made in less than half the time
class Lease:
    """One delivery of one job, yours alone until `deadline`.

    Settle it with ack, nack, release or reject, or use it as a context manager: the end of the block acks; an
    exception nacks with "TypeName: message" and goes on its way. A block that settled the lease itself is left alone.
    """

    id: int
    queue: str
    payload: bytes
    headers: Mapping[str, str]
    priority: int
    attempt: int
    """1 is the first delivery."""
    token: int
    """The fencing token: strictly increasing over the deliveries of a job."""
    deadline: datetime
    granted: float = 0.0
    """Seconds to the deadline, from the lease or from the answer that extended it: for programs that renew it by their
    own clock. The deadline is on the queue's time line, which a step of the wall clock does not move."""
    enqueued_at: datetime
    max_attempts: int | None
    last_error: str | None
    _broker: Settler | None = attrs.field(default=None, eq=False, repr=False, alias="broker")

    def json(self) -> Any:
        """The payload decoded as JSON; Any, as from json.loads."""
        return decode_json(self.payload)

    def ack(self) -> None:
        """Done: the job is gone. See `Broker.ack`."""
        self._settler().ack(self)

    def nack(self, *, error: str | None = None, delay: Duration | None = None) -> None:
        """Failed: a retry by policy (or after `delay` seconds), or a dead letter. See `Broker.nack`."""
        self._settler().nack(self, error=error, delay=delay)

    def release(self, *, delay: Duration = 0) -> None:
        """Give the job back untouched; the attempt is not counted. See `Broker.release`."""
        self._settler().release(self, delay=delay)

    def reject(self, *, error: str | None = None) -> None:
        """A dead letter now. See `Broker.reject`."""
        self._settler().reject(self, error=error)

    def extend(self, seconds: Duration) -> Lease:
        """Heartbeat: the lease with deadline max(old, now + seconds). See `Broker.extend`."""
        return self._settler().extend(self, seconds)

    def _settler(self) -> Settler:
        if self._broker is None:
            raise UsageError(f"job {self.id}: this lease was unpickled and knows no broker; call broker.ack(lease)")
        return self._broker

    def __enter__(self) -> Self:
        self._settler()._watch_lease(self.token)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        broker = self._settler()
        if broker._unwatch_lease(self.token):
            return
        if error is None:
            broker.ack(self)
            return
        try:
            broker.nack(self, error=text_of(error))
        except LeaseLostError:
            pass  # the job runs again anyway; the block's own exception is what the caller must see
        except RivetQError as trouble:
            error.add_note(f"job {self.id} could not be nacked: {trouble}")

    def __getstate__(self) -> tuple[object, ...]:
        return _plain_state(self)

    def __setstate__(self, state: tuple[object, ...]) -> None:
        _set_plain_state(self, state)


def text_of(error: BaseException) -> str:
    """ "TypeName: message", also if the message cannot be made."""
    try:
        return f"{type(error).__name__}: {error}"
    except Exception as trouble:
        return f"{type(error).__name__}: (its text cannot be made: {type(trouble).__name__})"


def _plain_state(value: Job | Lease) -> tuple[object, ...]:
    """Field values for pickle: headers as a plain dict (a mapping proxy cannot be pickled), no broker."""
    fields = attrs.fields(type(value))
    values = (None if f.name == "_broker" else getattr(value, f.name) for f in fields)
    return tuple(dict(v) if isinstance(v, Mapping) else v for v in values)


def _set_plain_state(value: Job | Lease, state: tuple[object, ...]) -> None:
    for field, item in zip(attrs.fields(type(value)), state, strict=True):
        object.__setattr__(value, field.name, read_only(item) if isinstance(item, dict) else item)


class _ReadOnly(dict[str, str]):
    """A mapping that refuses to change; a dict, so that json.dumps and `**headers` take it."""

    def _refuse(self, *args: object, **kwargs: object) -> None:
        raise TypeError("headers are read-only; make a dict of them first")

    __setitem__ = __delitem__ = clear = pop = popitem = setdefault = update = __ior__ = _refuse  # type: ignore[assignment]  # refusing is the point

    def __reduce__(self) -> tuple[object, ...]:
        return read_only, (dict(self),)

    def __hash__(self) -> int:  # type: ignore[override]  # frozen, so a Job that holds it can be hashed
        return hash(frozenset(self.items()))


def read_only(headers: Mapping[str, str]) -> Mapping[str, str]:
    """A read-only copy."""
    return _ReadOnly(headers) if headers else NO_HEADERS


NO_HEADERS: Mapping[str, str] = _ReadOnly()


def decode_json(payload: bytes) -> Any:
    """The value of a JSON payload; `UsageError` if it is none."""
    try:
        return json.loads(payload)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"the payload ({len(payload)} bytes) is not JSON: {error}; read .payload instead") from error
