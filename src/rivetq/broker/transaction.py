"""Transactions: any mix of enqueues and answers, as one commit at the end of a block."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, Protocol, Self, TypeVar

import attrs

from ..engine import (
    Ack,
    Answer,
    Check,
    Configure,
    Engine,
    Enqueue,
    Get,
    KeyStands,
    Nack,
    Operation,
    Reject,
    Release,
    Request,
    Reserve,
    Unreserve,
)
from ..errors import DuplicateJobError, LeaseLostError, UsageError
from ..model import JobId, LeaseLike, RetryPolicy
from ..units import Duration
from . import requests
from .arguments import checked_payloads
from .requests import Moment, OnDuplicate

T = TypeVar("T")
Steps = Generator[Request[Any], Any, T]
"""Yields requests, is sent their answers, and returns what a caller gets: so that a call may be made or awaited."""


class Commits(Protocol):
    """The broker of a transaction."""

    _engine: Engine
    _max_payload_bytes: int

    def _commit(self, operations: Sequence[Operation]) -> list[Answer]: ...


class Block:
    """What a transaction has taken in. It calls nothing itself: its methods yield the requests that they need."""

    def __init__(self) -> None:
        self.operations: list[Operation] = []
        self._settled: set[int] = set()
        self._acked: set[int] = set()
        self._keys: dict[tuple[str, str], int] = {}
        self._is_open = self._is_used = False

    def begin(self) -> None:
        if self._is_used:
            raise UsageError("a transaction is used once; call broker.transaction() for another")
        self._is_open = self._is_used = True

    def end(self, error: BaseException | None) -> list[Operation]:
        """The block is over: what is to be committed now. Otherwise, and if that fails, `unwanted` comes next."""
        self._is_open = False
        return self.operations if error is None else []

    def unwanted(self) -> list[Unreserve]:
        """The ids that were told are wanted no more."""
        return [
            Unreserve(operation.promised)
            for operation in self.operations
            if isinstance(operation, Enqueue) and operation.promised is not None
        ]

    def check_open(self) -> None:
        if not self._is_open:
            raise UsageError("the transaction is not open; its methods work inside its `with` block only")

    def settle(self, answers: Sequence[Ack | Nack | Release | Reject]) -> Steps[None]:
        """Take in answers to leases."""
        self.check_open()
        settled = set(self._settled)
        for i, answer in enumerate(answers):
            if answer.id in settled:
                yield Check(answers[: i + 1])  # a lease that is lost is told as such
                raise LeaseLostError(
                    f"job {answer.id}: lease {answer.token} is settled already in this transaction",
                    job_id=answer.id,
                    token=answer.token,
                )
            settled.add(answer.id)
        yield Check(answers)
        self._acked.update(answer.id for answer in answers if isinstance(answer, Ack))
        self._settled = settled
        self.operations += answers

    def reserve(self, operation: Enqueue) -> Reserve:
        """For an enqueue of some jobs without keys: what is to be asked. `promised` gets the answer."""
        self.check_open()
        return Reserve(operation.queue, len(operation.payloads))

    def enqueue(self, operation: Enqueue) -> Steps[list[int]]:
        """Ids are told now; the jobs exist when the block ends."""
        self.check_open()
        queue, keys = operation.queue, operation.keys
        if not operation.payloads:
            return []
        if keys is None:
            first: int = yield self.reserve(operation)
            return self.promised(operation, first)
        (standing,) = yield Check([operation])
        answer: list[int | None] = [None] * len(keys)
        fresh: list[int] = []
        first_at: dict[str, int] = {}
        for i, key in enumerate(keys):
            known = None if key is None else self._keys.get((queue, key)) or standing[i]
            if known is not None and known in self._acked and not (yield Configure(queue)).idempotency_ttl:
                known = None  # it ends with the ack that comes before
            if key is not None and operation.raise_on_duplicate and (known is not None or key in first_at):
                job = None if known is None else (yield Get(known))
                raise DuplicateJobError(
                    f"queue {queue!r}: idempotency key {key!r} stands for a job already; nothing was enqueued",
                    job_id=known or 0,
                    queue=queue,
                    key=key,
                    state=None if job is None else job.state,
                )
            if known is not None:
                answer[i] = JobId(known)
                if key is not None and (queue, key) not in self._keys:
                    self.operations.append(KeyStands(queue, key, known))
            elif key is None or key not in first_at:
                fresh.append(i)
                if key is not None:
                    first_at[key] = i
        if fresh:
            part = attrs.evolve(
                operation, payloads=[operation.payloads[i] for i in fresh], keys=[keys[i] for i in fresh]
            )
            first = yield Reserve(queue, len(fresh))
            for i, job_id in zip(fresh, self.promised(part, first), strict=True):
                answer[i] = JobId(job_id, created=True)
                if (key := keys[i]) is not None:
                    self._keys[queue, key] = job_id
        return [JobId(self._keys[queue, keys[i] or ""]) if job is None else job for i, job in enumerate(answer)]

    def promised(self, operation: Enqueue, first: int) -> list[int]:
        operation.promised = first
        self.operations.append(operation)
        return list(range(first, first + len(operation.payloads)))


class Transaction:
    """Any mix of enqueues and answers over any queues, as one record of the log: all of it or nothing.

    Arguments and fences are checked at the call; fences, keys, max_jobs and rates again at the end of the block, which
    is where everything happens. A key that stood for a job at the call must stand for it at the end, too
    (`JobNotFoundError`), and one that an ack of the block ends is free in the block. On an exception nothing happened.
    Other threads are not blocked meanwhile; use a transaction from one thread.
    """

    def __init__(self, broker: Commits) -> None:
        self._broker = broker
        self._block = Block()

    def __enter__(self) -> Self:
        self._block.begin()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        operations = self._block.end(error)
        try:
            if operations:
                self._broker._commit(operations)
        except Exception:
            self._give_up()
            raise
        if error is not None:
            self._give_up()

    def _give_up(self) -> None:
        for request in self._block.unwanted():
            self._broker._engine.call(request)

    def _do(self, steps: Steps[T]) -> T:
        call = self._broker._engine.call
        try:
            request = next(steps)
            while True:
                request = steps.send(call(request))
        except StopIteration as end:
            value: T = end.value
            return value

    def enqueue(
        self,
        queue: str,
        payload: object,
        *,
        priority: int = 5,
        delay: Duration = 0,
        eta: Moment | None = None,
        headers: Mapping[str, str] | None = None,
        max_attempts: int | None = None,
        retry: RetryPolicy | None = None,
        visibility_timeout: Duration | None = None,
        idempotency_key: str | None = None,
        on_duplicate: OnDuplicate = "return",
    ) -> int:
        """See `Broker.enqueue`; the id is told now, the job exists when the block ends."""
        keys = None if idempotency_key is None else [idempotency_key]
        operation = requests.enqueue(
            self._broker._max_payload_bytes,
            queue,
            [payload],
            priority,
            delay,
            eta,
            headers,
            max_attempts,
            retry,
            visibility_timeout,
            keys,
            on_duplicate,
        )
        if idempotency_key is not None:
            return self._do(self._block.enqueue(operation))[0]
        first = self._broker._engine.call(self._block.reserve(operation))
        return self._block.promised(operation, first)[0]

    def enqueue_many(
        self,
        queue: str,
        payloads: Iterable[object],
        *,
        priority: int = 5,
        delay: Duration = 0,
        eta: Moment | None = None,
        headers: Mapping[str, str] | None = None,
        max_attempts: int | None = None,
        retry: RetryPolicy | None = None,
        visibility_timeout: Duration | None = None,
        idempotency_keys: Sequence[str | None] | None = None,
        on_duplicate: OnDuplicate = "return",
    ) -> Sequence[int]:
        """See `Broker.enqueue_many`."""
        checked = checked_payloads(payloads, idempotency_keys)
        operation = requests.enqueue(
            self._broker._max_payload_bytes, queue, checked, priority, delay, eta, headers, max_attempts, retry,
            visibility_timeout, idempotency_keys, on_duplicate,
        )  # fmt: skip
        return self._do(self._block.enqueue(operation))

    def ack(self, lease: LeaseLike) -> None:
        """See `Broker.ack`."""
        self._do(self._block.settle([requests.ack(lease)]))

    def ack_many(self, leases: Iterable[LeaseLike]) -> None:
        """See `Broker.ack_many`."""
        self._do(self._block.settle(requests.acks(leases)))

    def nack(self, lease: LeaseLike, *, error: str | None = None, delay: Duration | None = None) -> None:
        """See `Broker.nack`."""
        self._do(self._block.settle([requests.nack(lease, error, delay)]))

    def release(self, lease: LeaseLike, *, delay: Duration = 0) -> None:
        """See `Broker.release`."""
        self._do(self._block.settle([requests.release(lease, delay)]))

    def reject(self, lease: LeaseLike, *, error: str | None = None) -> None:
        """See `Broker.reject`."""
        self._do(self._block.settle([requests.reject(lease, error)]))
