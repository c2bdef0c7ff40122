"""The broker for asyncio: the same verbs, awaited.

A call that changes something takes the engine's lock for microseconds in the event loop and leaves a callback with the
group commit; one thread, shared by all calls, waits for the disk, and one sync covers everybody who waits (see
`notifier`). A lease is waited for in the same way, without a thread. What is rare and may read the disk (looking,
purge, backup and so on) runs in a few threads of the broker's own.

The file is long because the verbs that are awaited without a thread have the signatures of `Broker` once more.

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
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import datetime
from functools import partial, wraps
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

import attrs

from .broker import requests
from .broker.arguments import checked_payloads
from .broker.broker import Broker
from .broker.requests import Moment, OnDuplicate
from .broker.transaction import Block, Steps
from .engine import Answer, Commit, Deadline, Engine, Grant, Lost, Once, Operation, Release, Request
from .errors import LeaseLostError, RivetQError, UsageError
from .model import Health, Lease, LeaseLike, RetryPolicy, text_of
from .units import Duration

A = TypeVar("A")
P = ParamSpec("P")
T = TypeVar("T")
THREADS = 4
"""For what is rare; the hot verbs need none."""


def _in_a_thread(
    verb: Callable[Concatenate[Broker, P], T],
) -> Callable[Concatenate[AsyncBroker, P], Coroutine[Any, Any, T]]:
    """A verb of `Broker` that is awaited, and runs in one of a few threads: it is rare and may read the disk."""

    @wraps(verb)
    async def method(self: AsyncBroker, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return await self._call(verb, *args, **kwargs)

    method.__qualname__ = f"AsyncBroker.{verb.__name__}"
    method.__doc__ = f"See `Broker.{verb.__name__}`."
    return method


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
    def over(cls, engine: Engine, **options: Any) -> Self:
        """A broker over an engine of your own: see `Broker.over`. It closes the engine."""
        broker = cls("", **options)
        broker._opened = Broker.over(engine, **options)
        return broker

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
                # This and the thread: the second one sees the first. The loop may be gone before the thread ends.
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
        operation = requests.enqueue(
            self.broker._max_payload_bytes,
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
        answers: list[Any] = await self._soon(Commit([operation]))
        ids: list[int] = answers[0]
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
        operation = requests.enqueue(
            self.broker._max_payload_bytes, queue, checked, priority, delay, eta, headers, max_attempts, retry,
            visibility_timeout, idempotency_keys, on_duplicate,
        )  # fmt: skip
        answers: list[Any] = await self._soon(Commit([operation] if operation.payloads else []))
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
        request = requests.take(queue, max_jobs, visibility_timeout, wait, begun, max_bytes)
        wait_s, request.wait_ms = None if request.wait_ms is None else request.wait_ms / 1000, None
        mailbox = self._box()
        answer = _Answer(mailbox, self._give_back)
        future, broker = answer.future, self.broker
        waiting = broker._engine.call_soon(request, answer.tell)

        def ended(gone: bool) -> None:
            if gone and not future.done():
                future.set_result([])

        def end() -> None:
            waiting.cancel(_in_loop(mailbox, ended))

        timer: asyncio.TimerHandle | None = None
        if not future.done() and wait_s is not None:
            if wait_s == 0:
                end()
            else:
                timer = mailbox.loop.call_later(wait_s, end)
        try:
            grants: list[Grant] = await future
        except GeneratorExit:  # the loop was closed, and the coroutine is collected: in the middle of any call
            waiting.abandon(answer.drop)
            raise
        except BaseException:
            waiting.cancel(lambda gone: None if gone else answer.drop())  # it is here unseen, or on its way
            raise
        finally:
            if timer is not None:
                timer.cancel()
        return [AsyncLease(lease, self) for lease in requests.leases_of(grants, broker, broker._wall_ms)]

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
        await self._commit([requests.ack(lease)])

    async def ack_many(self, leases: Iterable[LeaseLike]) -> None:
        """See `Broker.ack_many`."""
        await self._commit(requests.acks(leases))

    async def nack(self, lease: LeaseLike, *, error: str | None = None, delay: Duration | None = None) -> None:
        """See `Broker.nack`."""
        await self._commit([requests.nack(lease, error, delay)])

    async def release(self, lease: LeaseLike, *, delay: Duration = 0) -> None:
        """See `Broker.release`."""
        await self._commit([requests.release(lease, delay)])

    async def reject(self, lease: LeaseLike, *, error: str | None = None) -> None:
        """See `Broker.reject`."""
        await self._commit([requests.reject(lease, error)])

    async def extend(self, lease: LeaseLike, seconds: Duration) -> AsyncLease:
        """See `Broker.extend`."""
        value = lease.lease if isinstance(lease, AsyncLease) else lease
        if not isinstance(value, Lease):
            return AsyncLease(await self._call(Broker.extend, value, seconds), self)
        (deadline,) = await self.extend_many([value], seconds)
        return AsyncLease(requests.extended(value, deadline, seconds, self.broker), self)

    async def extend_many(self, leases: Iterable[LeaseLike], seconds: Duration) -> list[datetime]:
        """See `Broker.extend_many`."""
        answers = await self._commit(requests.extends(leases, seconds))
        wall_ms = self.broker._wall_ms
        return [requests.deadline_of(answer, wall_ms) for answer in answers if isinstance(answer, Deadline)]

    async def settle_many(self, answers: Iterable[Operation]) -> list[Lost | None]:
        """See `Broker.settle_many`."""
        operations = requests.operations(answers, self.broker._max_payload_bytes)
        told = await self._soon(Commit(operations, partial=True))
        self.broker._note_settled(operations)
        return [answer if isinstance(answer, Lost) else None for answer in told]

    async def commit(self, operations: Iterable[Operation], *, once: Once | None = None) -> list[Answer]:
        """See `Broker.commit`."""
        return await self._commit(requests.operations(operations, self.broker._max_payload_bytes), requests.once(once))

    async def _commit(self, operations: Sequence[Operation], once: Once | None = None) -> list[Answer]:
        answers = await self._soon(Commit(operations, once=once))
        self.broker._note_settled(operations)
        return answers

    def transaction(self) -> AsyncTransaction:
        """All or nothing: ``async with broker.transaction() as tx``. See `Transaction`."""
        return AsyncTransaction(self)

    # What is rare

    configure_queue = _in_a_thread(Broker.configure_queue)
    pause = _in_a_thread(Broker.pause)
    resume = _in_a_thread(Broker.resume)
    is_paused = _in_a_thread(Broker.is_paused)
    purge = _in_a_thread(Broker.purge)
    cancel = _in_a_thread(Broker.cancel)
    redrive = _in_a_thread(Broker.redrive)
    remove_queue = _in_a_thread(Broker.remove_queue)
    find = _in_a_thread(Broker.find)
    queue_of = _in_a_thread(Broker.queue_of)
    get = _in_a_thread(Broker.get)
    jobs = _in_a_thread(Broker.jobs)
    dead_letters = _in_a_thread(Broker.dead_letters)
    queues = _in_a_thread(Broker.queues)
    stats = _in_a_thread(Broker.stats)
    deliveries = _in_a_thread(Broker.deliveries)
    sync = _in_a_thread(Broker.sync)
    backup = _in_a_thread(Broker.backup)
    checkpoint = _in_a_thread(Broker.checkpoint)
    compact = _in_a_thread(Broker.compact)
    rotate = _in_a_thread(Broker.rotate)
    metrics = _in_a_thread(Broker.metrics)
    histograms = _in_a_thread(Broker.histograms)

    async def health(self) -> Health:
        """See `Broker.health`. In the event loop itself: it works when all threads are busy."""
        return self.broker.health()

    # How

    async def _soon(self, request: Request[A]) -> A:
        answer = _Answer(self._box())
        self.broker._engine.call_soon(request, answer.tell)
        told: A = await answer.future
        return told

    def _give_back(self, grants: list[Grant]) -> None:
        """Release these leases: no caller waits for them any more."""
        operations = [Release(grant.id, grant.token) for grant in grants]
        with suppress(RivetQError):  # lost or closed: then they come again by themselves
            self.broker._engine.call_soon(Commit(operations), _ignore)

    def _box(self) -> _Mailbox:
        loop = asyncio.get_running_loop()
        if self._mailbox is None or self._mailbox.loop is not loop:
            self._mailbox = _Mailbox(loop)
        return self._mailbox

    async def _call(self, verb: Callable[Concatenate[Broker, P], T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        self.broker._engine.check_open()  # no thread begins for what raises
        call = getattr(self.broker, verb.__name__)  # by its name: a broker of a subclass may do it otherwise
        return await self._in_thread(partial(call, *args, **kwargs))

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
        self._broker.broker._watch_lease(self.token)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._broker.broker._unwatch_lease(self.token):
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

    def __init__(self, broker: AsyncBroker) -> None:
        self._broker = broker
        self._block = Block()

    async def __aenter__(self) -> Self:
        self._block.begin()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        operations = self._block.end(error)
        try:
            if operations:
                await self._broker._commit(operations)
        except Exception:
            self._give_up()
            raise
        if error is not None:
            self._give_up()

    def _give_up(self) -> None:
        for request in self._block.unwanted():
            self._broker.broker._engine.call_soon(request, _ignore)

    async def _do(self, steps: Steps[T]) -> T:
        """In the loop: to tell an id in advance takes a sync once in a thousand ids, and is awaited then."""
        try:
            request = next(steps)
            while True:
                request = steps.send(await self._broker._soon(request))
        except StopIteration as end:
            value: T = end.value
            return value

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
        keys = None if idempotency_key is None else [idempotency_key]
        operation = requests.enqueue(
            self._broker.broker._max_payload_bytes, queue, [payload], priority, delay, eta, headers, max_attempts,
            retry, visibility_timeout, keys, on_duplicate,
        )  # fmt: skip
        if idempotency_key is not None:
            return (await self._do(self._block.enqueue(operation)))[0]
        first = await self._broker._soon(self._block.reserve(operation))
        return self._block.promised(operation, first)[0]

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
        operation = requests.enqueue(
            self._broker.broker._max_payload_bytes, queue, checked, priority, delay, eta, headers, max_attempts,
            retry, visibility_timeout, idempotency_keys, on_duplicate,
        )  # fmt: skip
        return await self._do(self._block.enqueue(operation))

    async def ack(self, lease: LeaseLike) -> None:
        """See `Broker.ack`."""
        await self._do(self._block.settle([requests.ack(lease)]))

    async def ack_many(self, leases: Iterable[LeaseLike]) -> None:
        """See `Broker.ack_many`."""
        await self._do(self._block.settle(requests.acks(leases)))

    async def nack(self, lease: LeaseLike, *, error: str | None = None, delay: Duration | None = None) -> None:
        """See `Broker.nack`."""
        await self._do(self._block.settle([requests.nack(lease, error, delay)]))

    async def release(self, lease: LeaseLike, *, delay: Duration = 0) -> None:
        """See `Broker.release`."""
        await self._do(self._block.settle([requests.release(lease, delay)]))

    async def reject(self, lease: LeaseLike, *, error: str | None = None) -> None:
        """See `Broker.reject`."""
        await self._do(self._block.settle([requests.reject(lease, error)]))


class _Answer:
    """The answer of an engine for a future, and what to do with it if no caller waits for it any more."""

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
        """No caller waits for it any more. The loop may end before it could deliver an answer that is on its way."""
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

    def is_here(self) -> bool:
        """Whether this is the thread of the loop."""
        return threading.get_ident() == self._thread

    def put(self, answer: _Answer) -> None:
        """In any thread."""
        self._told.append(answer)
        if self.is_here():
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
    """For a call whose answer does not matter."""


def _in_loop(mailbox: _Mailbox, tell: Callable[[bool], None]) -> Callable[[bool], None]:
    """Told in the loop, at once if it is told there."""

    def told(gone: bool) -> None:
        if mailbox.is_here():
            tell(gone)
        else:
            with suppress(RuntimeError):  # the loop is closed
                mailbox.loop.call_soon_threadsafe(tell, gone)

    return told
