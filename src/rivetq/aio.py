"""The broker for asyncio: the same verbs, awaited.

A call that changes something takes the engine's lock for microseconds in the event loop and leaves a callback with the
group commit; one thread, shared by all calls, waits for the disk, and one sync covers everybody who waits (see
`notifier`). A lease is waited for in the same way, without a thread. What is rare and may read the disk (looking,
purge, backup and so on) runs in a few threads of the broker's own.

>>> import asyncio
>>> async def main():
...     async with AsyncBroker(":memory:") as broker:
...         await broker.enqueue("mail", {"to": "ada@example.org"})
...         async for lease in broker.leases("mail"):
...             async with lease:
...                 print(lease.json())
...             break
>>> asyncio.run(main())
{'to': 'ada@example.org'}
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import datetime
from functools import partial
from types import EllipsisType, TracebackType
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

import attrs

from .broker.arguments import (
    checked_bool,
    checked_error,
    checked_lease,
    checked_leases,
    checked_payloads,
    checked_queues,
    checked_visibility,
)
from .broker.broker import Broker, Moment, OnDuplicate, Transaction
from .engine import Ack, Backup, Extend, Nack, Operation, Reject, Release
from .errors import LeaseLostError, RivetQError, UsageError
from .histogram import Histogram
from .model import (
    Deliveries,
    Health,
    Job,
    JobState,
    Lease,
    LeaseLike,
    QueueConfig,
    QueueStats,
    RateLimit,
    RetryPolicy,
    text_of,
)
from .units import Duration, checked_int, duration_ms, moment

P = ParamSpec("P")
T = TypeVar("T")
THREADS = 4
"""For what is rare; the hot verbs need none."""


class AsyncBroker:
    """A `Broker` whose methods are awaited. Use it in one event loop; several may share a broker.

    Open it with ``async with AsyncBroker("data") as broker`` or ``await AsyncBroker.open("data")``.

    Cancelling a call that changes something does not undo it: what was decided will be on disk. Cancelling a `lease`
    that waits, or whose jobs are on their way, loses none: they are given back with their attempt refunded.

    Args:
        path: a directory as `Broker` takes it; or an open Broker, which stays open when this is closed.
        options: those of `Broker`.
    """

    def __init__(self, path: str | os.PathLike[str] | Broker, **options: Any) -> None:
        if isinstance(path, Broker) and options:
            raise UsageError(f"{', '.join(options)}: options are for a path, this broker is open already")
        self._path = path
        self._options = options
        self._opened: Broker | None = path if isinstance(path, Broker) else None
        self._mailbox: _Mailbox | None = None
        self._pool: ThreadPoolExecutor | None = None
        self._pool_pid = 0  # in a forked child its threads are not there

    @classmethod
    async def open(cls, path: str | os.PathLike[str] | Broker, **options: Any) -> Self:
        """Open a directory; raises what `Broker` raises."""
        broker = cls(path, **options)
        await broker._open()
        return broker

    async def _open(self) -> None:
        if self._opened is None:
            assert not isinstance(self._path, Broker)
            path, unwanted, opened = self._path, threading.Event(), list[Broker]()

            def open_() -> None:
                opened.append(Broker(path, **self._options))
                if unwanted.is_set():
                    opened[0].close()

            try:
                await self._in_thread(open_)
            except asyncio.CancelledError:
                # Whoever comes second, this or the thread, sees the other. The loop may be gone before the thread ends.
                unwanted.set()
                for broker in opened:
                    threading.Thread(target=broker.close, name="rivetq-close").start()
                self._end_threads()
                raise
            (self._opened,) = opened

    async def __aenter__(self) -> Self:
        await self._open()
        self.broker._engine.check_open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"AsyncBroker({self._path!r})"

    @property
    def broker(self) -> Broker:
        """The broker behind it."""
        if self._opened is None:
            raise UsageError('this AsyncBroker is not open yet; use `async with` or `await AsyncBroker.open("...")`')
        return self._opened

    async def close(self) -> None:
        """Close the broker, unless it was given open. May be repeated; never raises."""
        if self._opened is not None and not isinstance(self._path, Broker):
            await asyncio.shield(self._in_thread(self._opened.close))
        self._end_threads()

    def _end_threads(self) -> None:
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown(wait=False)

    # Put work in

    async def enqueue(
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
        """See `Broker.enqueue`."""
        keys = None if idempotency_key is None else [idempotency_key]
        operation = self.broker._enqueue_operation(
            queue, [payload], priority, delay, eta, headers, max_attempts, retry, visibility_timeout, keys, on_duplicate
        )
        ids: list[int] = (await self._commit([operation]))[0]
        return ids[0]

    async def enqueue_many(
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
        operation = self.broker._enqueue_operation(
            queue, checked, priority, delay, eta, headers, max_attempts, retry, visibility_timeout,
            idempotency_keys, on_duplicate,
        )  # fmt: skip
        answers = await self._commit([operation] if operation.payloads else [])
        ids: Sequence[int] = answers[0] if answers else []
        return ids

    # Take work out

    async def lease(
        self, queue: str | Sequence[str], *, visibility_timeout: Duration | None = None, wait: Duration | None = 0
    ) -> AsyncLease | None:
        """See `Broker.lease`."""
        leases = await self.lease_many(queue, 1, visibility_timeout=visibility_timeout, wait=wait)
        return leases[0] if leases else None

    async def lease_many(
        self,
        queue: str | Sequence[str],
        max_jobs: int,
        *,
        visibility_timeout: Duration | None = None,
        wait: Duration | None = 0,
        begun: bool = True,
        max_bytes: int | None = None,
    ) -> list[AsyncLease]:
        """See `Broker.lease_many`. No thread waits, and a cancelled call loses no job."""
        queues = checked_queues(queue)
        visibility_ms = None if visibility_timeout is None else checked_visibility(visibility_timeout)
        wait_s = None if wait is None else duration_ms(wait, "wait") / 1000
        checked_int(max_jobs, "max_jobs", 1)
        if max_bytes is not None:
            checked_int(max_bytes, "max_bytes", 1)
        mailbox = self._box()
        answer = _Answer(mailbox, self._give_back)
        future, broker = answer.future, self.broker
        waiting = broker._engine.lease_soon(
            queues,
            max_jobs,
            visibility_ms,
            broker,
            answer.tell,
            begun=checked_bool(begun, "begun"),
            max_bytes=max_bytes,
        )

        def end() -> None:
            if waiting.cancel() and not future.done():
                future.set_result([])

        timer: asyncio.TimerHandle | None = None
        if not future.done() and wait_s is not None:
            if wait_s == 0:
                end()
            else:
                timer = mailbox.loop.call_later(wait_s, end)
        try:
            leases: list[Lease] = await future
        except GeneratorExit:  # the loop was closed, and the coroutine is collected: in the middle of any call
            waiting.abandon(answer.drop)
            raise
        except BaseException:
            if not waiting.cancel():  # something was taken: it is here unseen, or on its way
                answer.drop()
            raise
        finally:
            if timer is not None:
                timer.cancel()
        return [AsyncLease(lease, self) for lease in leases]

    async def leases(
        self, queue: str | Sequence[str], *, visibility_timeout: Duration | None = None
    ) -> AsyncIterator[AsyncLease]:
        """Leases for ever, one after another: ``async for lease in broker.leases("mail")``.

        The next one is taken when the loop comes back for it, so leaving the loop loses no job. Several tasks may
        iterate at the same time.
        """
        while True:
            lease = await self.lease(queue, visibility_timeout=visibility_timeout, wait=None)
            assert lease is not None, "a wait without end gave nothing"
            yield lease

    async def begin(self, lease: LeaseLike) -> None:
        """See `Broker.begin`. In the event loop itself."""
        self.broker.begin(lease)

    async def ack(self, lease: LeaseLike) -> None:
        """See `Broker.ack`."""
        await self._answer([Ack(*checked_lease(lease))])

    async def ack_many(self, leases: Iterable[LeaseLike]) -> None:
        """See `Broker.ack_many`."""
        await self._answer([Ack(*checked_lease(lease)) for lease in checked_leases(leases)])

    async def nack(self, lease: LeaseLike, *, error: str | None = None, delay: Duration | None = None) -> None:
        """See `Broker.nack`."""
        delay_ms = None if delay is None else duration_ms(delay, "delay")
        await self._answer([Nack(*checked_lease(lease), checked_error(error), delay_ms)])

    async def release(self, lease: LeaseLike, *, delay: Duration = 0) -> None:
        """See `Broker.release`."""
        await self._answer([Release(*checked_lease(lease), duration_ms(delay, "delay"))])

    async def reject(self, lease: LeaseLike, *, error: str | None = None) -> None:
        """See `Broker.reject`."""
        await self._answer([Reject(*checked_lease(lease), checked_error(error))])

    async def extend(self, lease: LeaseLike, seconds: Duration) -> AsyncLease:
        """See `Broker.extend`."""
        value = lease.lease if isinstance(lease, AsyncLease) else lease
        if not isinstance(value, Lease):
            return AsyncLease(await self._call(Broker.extend, value, seconds), self)
        (deadline,) = await self.extend_many([value], seconds)
        granted = duration_ms(seconds, "seconds") / 1000
        return AsyncLease(attrs.evolve(value, deadline=deadline, granted=granted, broker=self.broker), self)

    async def extend_many(self, leases: Iterable[LeaseLike], seconds: Duration) -> list[datetime]:
        """See `Broker.extend_many`."""
        extra_ms = duration_ms(seconds, "seconds")
        operations = [Extend(*checked_lease(lease), extra_ms) for lease in checked_leases(leases)]
        return [moment(deadline_ms) for deadline_ms in await self._commit(operations)]

    def transaction(self) -> AsyncTransaction:
        """All or nothing: ``async with broker.transaction() as tx``. See `Transaction`."""
        return AsyncTransaction(self, self.broker.transaction())

    # Queues

    async def configure_queue(
        self,
        queue: str,
        *,
        retry: RetryPolicy | EllipsisType = ...,
        rate_limit: RateLimit | EllipsisType | None = ...,
        visibility_timeout: Duration | EllipsisType = ...,
        max_jobs: int | EllipsisType | None = ...,
        idempotency_ttl: Duration | EllipsisType = ...,
    ) -> QueueConfig:
        """See `Broker.configure_queue`."""
        return await self._call(
            Broker.configure_queue, queue, retry=retry, rate_limit=rate_limit, visibility_timeout=visibility_timeout,
            max_jobs=max_jobs, idempotency_ttl=idempotency_ttl,
        )  # fmt: skip

    async def pause(self, queue: str) -> None:
        """See `Broker.pause`."""
        await self._call(Broker.pause, queue)

    async def resume(self, queue: str) -> None:
        """See `Broker.resume`."""
        await self._call(Broker.resume, queue)

    async def is_paused(self, queue: str) -> bool:
        """See `Broker.is_paused`."""
        return await self._call(Broker.is_paused, queue)

    async def purge(self, queue: str, *, state: JobState | str | None = None) -> int:
        """See `Broker.purge`."""
        return await self._call(Broker.purge, queue, state=state)

    async def cancel(self, job_id: int) -> bool:
        """See `Broker.cancel`."""
        return await self._call(Broker.cancel, job_id)

    async def redrive(self, queue: str, *, job_ids: Iterable[int] | None = None, limit: int | None = None) -> int:
        """See `Broker.redrive`."""
        return await self._call(Broker.redrive, queue, job_ids=job_ids, limit=limit)

    async def remove_queue(self, queue: str) -> bool:
        """See `Broker.remove_queue`."""
        return await self._call(Broker.remove_queue, queue)

    # Looking

    async def find(self, queue: str, idempotency_key: str) -> int | None:
        """See `Broker.find`."""
        return await self._call(Broker.find, queue, idempotency_key)

    async def get(self, job_id: int) -> Job | None:
        """See `Broker.get`."""
        return await self._call(Broker.get, job_id)

    async def jobs(
        self,
        queue: str,
        *,
        state: JobState | str | None = None,
        after: int = 0,
        limit: int = 100,
        payloads: bool = True,
    ) -> list[Job]:
        """See `Broker.jobs`."""
        return await self._call(Broker.jobs, queue, state=state, after=after, limit=limit, payloads=payloads)

    async def dead_letters(self, queue: str, *, after: int = 0, limit: int = 100) -> list[Job]:
        """See `Broker.dead_letters`."""
        return await self._call(Broker.dead_letters, queue, after=after, limit=limit)

    async def queues(self) -> list[str]:
        """See `Broker.queues`."""
        return await self._call(Broker.queues)

    async def stats(self, queue: str | None = None) -> QueueStats:
        """See `Broker.stats`."""
        return await self._call(Broker.stats, queue)

    async def deliveries(self, queue: str | None = None) -> Deliveries:
        """See `Broker.deliveries`."""
        return await self._call(Broker.deliveries, queue)

    async def health(self) -> Health:
        """See `Broker.health`. In the event loop itself: it works when all threads are busy."""
        return self.broker.health()

    # Housekeeping

    async def sync(self) -> None:
        """See `Broker.sync`."""
        await self._call(Broker.sync)

    async def backup(self, out: str | os.PathLike[str], *, link: bool = True) -> Backup:
        """See `Broker.backup`."""
        return await self._call(Broker.backup, out, link=link)

    async def checkpoint(self) -> None:
        """See `Broker.checkpoint`."""
        await self._call(Broker.checkpoint)

    async def compact(self) -> None:
        """See `Broker.compact`."""
        await self._call(Broker.compact)

    async def rotate(self) -> None:
        """See `Broker.rotate`."""
        await self._call(Broker.rotate)

    async def metrics(self) -> dict[str, int]:
        """See `Broker.metrics`."""
        return await self._call(Broker.metrics)

    async def histograms(self) -> dict[str, Histogram]:
        """See `Broker.histograms`."""
        return await self._call(Broker.histograms)

    # How

    async def _answer(self, operations: Sequence[Operation]) -> None:
        await self._commit(operations)
        self.broker._note_settled(operations)

    async def _commit(self, operations: Sequence[Operation]) -> list[Any]:
        answer = _Answer(self._box())
        self.broker._engine.commit_soon(operations, answer.tell)
        answers: list[Any] = await answer.future
        return answers

    def _give_back(self, leases: list[Lease]) -> None:
        """Nobody waits for these any more."""
        operations = [Release(lease.id, lease.token) for lease in leases]
        with suppress(RivetQError):  # lost or closed: then they come again by themselves
            self.broker._engine.commit_soon(operations, _ignore)

    def _box(self) -> _Mailbox:
        loop = asyncio.get_running_loop()
        if self._mailbox is None or self._mailbox.loop is not loop:
            self._mailbox = _Mailbox(loop)
        return self._mailbox

    async def _call(self, verb: Callable[Concatenate[Broker, P], T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        self.broker._engine.check_open()  # no thread begins for what raises
        return await self._in_thread(partial(verb, self.broker, *args, **kwargs))

    def _in_thread(self, call: Callable[[], T]) -> asyncio.Future[T]:
        if self._pool is None or self._pool_pid != os.getpid():
            self._pool, self._pool_pid = ThreadPoolExecutor(THREADS, thread_name_prefix="rivetq-aio"), os.getpid()
        return asyncio.get_running_loop().run_in_executor(self._pool, call)


@attrs.frozen
class AsyncLease:
    """One delivery, as `Lease`, with answers that are awaited and an ``async with`` that acks or nacks."""

    lease: Lease
    """The value itself: frozen, picklable."""
    _broker: AsyncBroker = attrs.field(eq=False, repr=False)

    @property
    def id(self) -> int:
        return self.lease.id

    @property
    def queue(self) -> str:
        return self.lease.queue

    @property
    def payload(self) -> bytes:
        return self.lease.payload

    @property
    def headers(self) -> Mapping[str, str]:
        return self.lease.headers

    @property
    def priority(self) -> int:
        return self.lease.priority

    @property
    def attempt(self) -> int:
        """1 is the first delivery."""
        return self.lease.attempt

    @property
    def token(self) -> int:
        return self.lease.token

    @property
    def deadline(self) -> datetime:
        return self.lease.deadline

    @property
    def granted(self) -> float:
        """Seconds; see `Lease`."""
        return self.lease.granted

    @property
    def enqueued_at(self) -> datetime:
        return self.lease.enqueued_at

    @property
    def max_attempts(self) -> int | None:
        return self.lease.max_attempts

    @property
    def last_error(self) -> str | None:
        return self.lease.last_error

    def json(self) -> Any:
        """The payload decoded as JSON; Any, as from json.loads."""
        return self.lease.json()

    async def ack(self) -> None:
        """See `Broker.ack`."""
        await self._broker.ack(self)

    async def nack(self, *, error: str | None = None, delay: Duration | None = None) -> None:
        """See `Broker.nack`."""
        await self._broker.nack(self, error=error, delay=delay)

    async def release(self, *, delay: Duration = 0) -> None:
        """See `Broker.release`."""
        await self._broker.release(self, delay=delay)

    async def reject(self, *, error: str | None = None) -> None:
        """See `Broker.reject`."""
        await self._broker.reject(self, error=error)

    async def extend(self, seconds: Duration) -> AsyncLease:
        """See `Broker.extend`."""
        return await self._broker.extend(self, seconds)

    async def __aenter__(self) -> Self:
        self._broker.broker.watch_lease(self.token)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._broker.broker.unwatch_lease(self.token):
            return
        if error is None:
            await self.ack()
            return
        try:
            await self.nack(error=text_of(error))
        except LeaseLostError:
            pass  # the job runs again anyway; the block's own exception is what the caller must see
        except RivetQError as trouble:
            error.add_note(f"job {self.id} could not be nacked: {trouble}")


class AsyncTransaction:
    """`Transaction` with methods that are awaited; see there."""

    def __init__(self, broker: AsyncBroker, transaction: Transaction) -> None:
        self._broker = broker
        self._tx = transaction

    async def __aenter__(self) -> Self:
        self._tx.__enter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if operations := self._tx._end(error):
            try:
                await self._broker._answer(operations)
            except Exception:
                self._tx._give_up()
                raise

    async def enqueue(
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
        return await self._call(
            self._tx.enqueue, queue, payload, priority=priority, delay=delay, eta=eta, headers=headers,
            max_attempts=max_attempts, retry=retry, visibility_timeout=visibility_timeout,
            idempotency_key=idempotency_key, on_duplicate=on_duplicate,
        )  # fmt: skip

    async def enqueue_many(
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
        return await self._call(
            self._tx.enqueue_many, queue, payloads, priority=priority, delay=delay, eta=eta, headers=headers,
            max_attempts=max_attempts, retry=retry, visibility_timeout=visibility_timeout,
            idempotency_keys=idempotency_keys, on_duplicate=on_duplicate,
        )  # fmt: skip

    async def ack(self, lease: LeaseLike) -> None:
        """See `Broker.ack`."""
        await self._call(self._tx.ack, lease)

    async def ack_many(self, leases: Iterable[LeaseLike]) -> None:
        """See `Broker.ack_many`."""
        await self._call(self._tx.ack_many, leases)

    async def nack(self, lease: LeaseLike, *, error: str | None = None, delay: Duration | None = None) -> None:
        """See `Broker.nack`."""
        await self._call(self._tx.nack, lease, error=error, delay=delay)

    async def release(self, lease: LeaseLike, *, delay: Duration = 0) -> None:
        """See `Broker.release`."""
        await self._call(self._tx.release, lease, delay=delay)

    async def reject(self, lease: LeaseLike, *, error: str | None = None) -> None:
        """See `Broker.reject`."""
        await self._call(self._tx.reject, lease, error=error)

    async def _call(self, verb: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        # To tell an id in advance may take a sync, once in a thousand ids.
        return await self._broker._in_thread(partial(verb, *args, **kwargs))


class _Answer:
    """What an engine will tell a future, and what to do with it if nobody waits for it any more."""

    def __init__(self, mailbox: _Mailbox, unwanted: Callable[[Any], None] | None = None) -> None:
        self.future: asyncio.Future[Any] = mailbox.loop.create_future()
        self._mailbox = mailbox
        self._unwanted = unwanted
        self._lock = threading.Lock()  # guards the next two: of a drop and an answer the second sees the first
        self._is_dropped = False
        self._answer: list[tuple[Any, BaseException | None]] = []

    def tell(self, answer: Any, error: BaseException | None) -> None:
        """For the engine, in any thread. What breaks in (no memory, say) does not keep the call waiting."""
        try:
            self._take(answer, error)
        except BaseException:
            self._take(answer, error)

    def _take(self, answer: Any, error: BaseException | None) -> None:
        with self._lock:
            dropped = self._is_dropped
            if not dropped and not self._answer:
                self._answer.append((answer, error))
        if dropped:
            self._give_back(answer, error)
        else:
            self._mailbox.put(self)

    def deliver(self) -> None:
        """In the event loop."""
        if self.future.done() or self._is_dropped:  # the one that cancelled it drops it
            return
        ((answer, error),) = self._answer
        if error is None:
            self.future.set_result(answer)
        else:
            self.future.set_exception(error)

    def drop(self) -> None:
        """Nobody waits for it; the loop may end before it could deliver what is on its way."""
        with self._lock:
            self._is_dropped = True
            answers, self._answer = self._answer, []
        if not self.future.cancelled() and self.future.done():
            self.future.exception()  # it was seen, so that asyncio does not complain
        for answer, error in answers:
            self._give_back(answer, error)

    def _give_back(self, answer: Any, error: BaseException | None) -> None:
        if self._unwanted is not None and error is None:
            self._unwanted(answer)


class _Mailbox:
    """Brings what an engine tells into an event loop: many answers by one wake-up."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._thread = threading.get_ident()
        self._told: deque[_Answer] = deque()
        self._is_woken = False  # the loop will look; set back by it before it does

    def put(self, answer: _Answer) -> None:
        """In any thread."""
        self._told.append(answer)
        if threading.get_ident() == self._thread:
            self._deliver()
        elif not self._is_woken:
            try:
                self._is_woken = True
                self.loop.call_soon_threadsafe(self._wake)
            except BaseException as error:
                self._is_woken = False  # the next answer tries it again
                if not isinstance(error, RuntimeError):  # no memory, say
                    raise
                self._drop()  # the loop is closed: no task is left to be told

    def _drop(self) -> None:
        while True:
            try:
                answer = self._told.popleft()
            except IndexError:  # another thread may be at it, too
                return
            answer.drop()

    def _wake(self) -> None:
        self._is_woken = False
        self._deliver()

    def _deliver(self) -> None:
        while self._told:
            self._told.popleft().deliver()


def _ignore(answer: Any, error: BaseException | None) -> None:
    """Nobody asks what became of it."""
