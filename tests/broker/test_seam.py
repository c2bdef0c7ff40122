"""The seam between a broker and its engine: requests that no verb of the broker makes yet, and engines of one's own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from recording import RecordingEngine, ReplayingEngine

from rivetq import Broker, JobId, JobState, LeaseLostError, RetryPolicy, UsageError
from rivetq.aio import AsyncBroker
from rivetq.engine import (
    Ack,
    Cancel,
    Check,
    Commit,
    Configure,
    Deadline,
    Engine,
    Enqueue,
    Extend,
    Find,
    Get,
    Jobs,
    Lost,
    Nack,
    Outcomes,
    Purge,
    QueueChanges,
    Queues,
    Redrive,
    Reject,
    Release,
    RemoveQueue,
    Request,
    Reserve,
    Stats,
    Take,
    Unreserve,
)
from rivetq.engines.memory import MemoryEngine
from rivetq.testing import ManualClock

PATIENCE_S = 20.0


class Strange(Request[None]):
    """No engine knows it."""


NO_WAIT = RetryPolicy(base=0, jitter="none")


@pytest.fixture(params=["memory", "local", "recorded"])
def broker(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Broker]:
    if request.param == "recorded":
        opened = Broker.over(RecordingEngine(MemoryEngine(ManualClock())))
    else:
        opened = Broker(":memory:" if request.param == "memory" else tmp_path / "data", clock=ManualClock())
    with opened as broker:
        yield broker


@pytest.fixture
def engine(broker: Broker) -> Engine:
    return broker._engine


def program(broker: Broker) -> list[Any]:
    """Some of everything; what it was told."""
    told: list[Any] = [
        broker.enqueue("q", {"n": 1}),
        *broker.enqueue_many("q", [b"a", b"b"], idempotency_keys=["k", None]),
    ]
    with broker.transaction() as tx:
        told += [tx.enqueue("r", b"c"), tx.enqueue("q", b"again", idempotency_key="k")]
    leases = broker.lease_many("q", 2)
    told += leases
    broker.ack(leases[0])
    with pytest.raises(LeaseLostError):
        broker.ack(leases[0])
    told += broker.settle_many([Ack(leases[0].id, leases[0].token), Nack(leases[1].id, leases[1].token, "no", 0)])
    told += [
        broker.stats(),
        broker.jobs("q"),
        broker.queues(),
        broker.configure_queue("q", max_jobs=9),
        broker.cancel(3),
    ]
    return told


def test_what_was_recorded_can_be_replayed() -> None:
    recording = RecordingEngine(MemoryEngine(ManualClock()))
    with Broker.over(recording) as broker:
        told = program(broker)
    with Broker.over(ReplayingEngine(recording)) as broker:
        assert program(broker) == told
    with Broker(":memory:", clock=ManualClock()) as broker:
        assert program(broker) == told, "an engine with a clock of its own gives the same moments"


def test_an_async_broker_stands_over_any_engine() -> None:
    async def main() -> None:
        async with AsyncBroker.over(RecordingEngine(MemoryEngine(ManualClock()))) as broker:
            job_id = await broker.enqueue("q", b"x")
            async with broker.transaction() as tx:
                other = await tx.enqueue("q", b"y")
            lease = await broker.lease("q")
            assert lease is not None
            assert (lease.id, other) == (job_id, job_id + 1)
            done, lost = await broker.settle_many([Ack(lease.id, lease.token), Ack(99, 1)])
            assert done is None
            assert isinstance(lost, Lost)
            assert (await broker.stats()).acked == 1

    asyncio.run(main())


def test_a_broker_closes_the_engine_that_it_stands_over() -> None:
    engine = MemoryEngine(ManualClock())
    Broker.over(engine).close()
    assert engine.health().state == "closed"


def test_max_payload_bytes_is_bounded_by_the_engine() -> None:
    engine = MemoryEngine(ManualClock())
    with pytest.raises(UsageError, match="max_payload_bytes"):
        Broker.over(engine, max_payload_bytes=2**30)
    assert engine.health().state == "open", "it is still its maker's"
    engine.close()


def test_an_unknown_request_is_refused(engine: Engine) -> None:
    with pytest.raises(UsageError, match="Strange"):
        engine.call(Strange())
    with pytest.raises(UsageError, match="Strange"):
        engine.call_soon(Strange(), lambda answer, error: None)


REQUESTS: list[Callable[[], Request[Any]]] = [
    lambda: Commit([Enqueue("q", [b"x"])]), lambda: Reserve("q", 2), lambda: Unreserve(7), lambda: Check([]),
    lambda: Take(["q"], 1), lambda: Get(1), lambda: Jobs("q"), lambda: Find("q", "k"), Queues, Stats, Outcomes,
    lambda: Configure("q", QueueChanges(max_jobs=5)), lambda: Purge("q"), lambda: Cancel(1), lambda: Redrive("q"),
    lambda: RemoveQueue("z"),
]  # fmt: skip


@pytest.mark.parametrize("make", REQUESTS, ids=[type(make()).__name__ for make in REQUESTS])
def test_every_request_may_be_called_now_or_soon(
    broker: Broker, engine: Engine, make: Callable[[], Request[Any]]
) -> None:
    broker.enqueue("q", b"", delay=1000)
    answers: list[Any] = []
    for _ in range(2):  # a request is a value: the same twice
        is_told = threading.Event()

        def tell(answer: Any, error: BaseException | None, is_told: threading.Event = is_told) -> None:
            answers.append((answer, error))
            is_told.set()

        request = make()
        if isinstance(request, Take):
            gone: list[bool] = []
            engine.call_soon(Take(["q"], 1, None, None), tell).cancel(gone.append)
            assert gone == [True]
            continue
        engine.call_soon(request, tell)
        assert is_told.wait(PATIENCE_S)
        assert answers[-1][1] is None
        assert type(engine.call(make())) is type(answers[-1][0])


def test_an_error_is_told_soon_as_well(broker: Broker, engine: Engine) -> None:
    told: list[BaseException | None] = []
    is_told = threading.Event()
    engine.call_soon(Redrive("q", [5]), lambda answer, error: (told.append(error), is_told.set())[1])
    assert is_told.wait(PATIENCE_S)
    assert type(told[0]).__name__ == "JobNotFoundError"


def test_jobs_newest_first_in_pages(broker: Broker, engine: Engine) -> None:
    ids = list(broker.enqueue_many("q", [b"%d" % n for n in range(40)]))
    ids += broker.enqueue_many("q", [b"later"] * 5, delay=1000)
    for lease in broker.lease_many("q", 6):
        if lease.id % 2:
            lease.reject()
    page = engine.call(Jobs("q", limit=10, newest=True))
    assert [job.id for job in page] == ids[:-11:-1]
    everything: list[int] = []
    while page := engine.call(Jobs("q", after=everything[-1] if everything else 0, limit=7, newest=True)):
        everything += [job.id for job in page]
    assert everything == ids[::-1]
    for state in JobState:
        newest = engine.call(Jobs("q", state, limit=100, newest=True))
        assert [job.id for job in newest] == [job.id for job in reversed(broker.jobs("q", state=state))]
    assert engine.call(Jobs("empty", newest=True)) == []
    assert engine.call(Jobs("q", limit=2, newest=True, payloads=False))[0].payload == b""


@pytest.mark.parametrize("newest", [False, True])
def test_jobs_of_so_many_bytes(broker: Broker, engine: Engine, newest: bool) -> None:
    broker.enqueue_many("q", [b"x" * 100] * 10)
    assert len(engine.call(Jobs("q", newest=newest, max_bytes=350))) == 3
    assert len(engine.call(Jobs("q", newest=newest, max_bytes=1))) == 1
    assert len(engine.call(Jobs("q", newest=newest, max_bytes=10_000))) == 10
    assert engine.call(Jobs("none", newest=newest, max_bytes=1)) == []


def test_a_check_of_many_operations_is_one_call(broker: Broker, engine: Engine) -> None:
    job_id = broker.enqueue("q", b"", idempotency_key="k")
    lease = broker.lease("q")
    assert lease is not None
    fence = Ack(lease.id, lease.token)
    keys = Enqueue("q", [b""] * 2, keys=["k", "new"])
    assert engine.call(Check([fence, keys])) == [[], [job_id, None]]
    with pytest.raises(LeaseLostError):
        engine.call(Check([fence, Ack(job_id, 99)]))


def test_a_grant_says_how_long_it_lasts(broker: Broker, engine: Engine) -> None:
    broker.enqueue("q", b"")
    (grant,) = engine.call(Take(["q"], 1, 5000))
    assert (grant.granted_ms, grant.remaining_ms, grant.payload) == (5000, 5000, b"")
    (deadline,) = engine.call(Commit([Extend(grant.id, grant.token, 9000)]))
    assert isinstance(deadline, Deadline)
    assert deadline.remaining_ms == 9000


def test_answers_that_stand_alone_are_one_record(broker: Broker) -> None:
    broker.configure_queue("q", retry=NO_WAIT)
    broker.enqueue_many("q", [b""] * 6)
    one, two, three, four, five, six = broker.lease_many("q", 6)
    two.ack()
    before = broker.metrics()["records"]
    fates = broker.settle_many(
        [
            Ack(one.id, one.token),
            Ack(two.id, two.token),
            Nack(three.id, three.token, "no", 0),
            Release(four.id, four.token),
            Reject(five.id, five.token, "bad"),
            Extend(six.id, six.token, 90_000),
            Ack(one.id, one.token),
        ]
    )
    assert [None if fate is None else fate.token for fate in fates] == [None, two.token, *[None] * 4, one.token]
    stats = broker.stats("q")
    assert (stats.acked, stats.ready, stats.dead, stats.leased) == (2, 2, 1, 1)
    assert broker.metrics()["records"] in (before + 1, 0)


def test_a_block_that_is_settled_by_settle_many_is_left_alone(broker: Broker) -> None:
    broker.enqueue("q", b"")
    lease = broker.lease("q")
    assert lease is not None
    with lease:
        broker.settle_many([Nack(lease.id, lease.token, "my own")])
    assert broker.stats("q").acked == 0


@pytest.mark.parametrize(
    "bad",
    [
        5, "ack", [5], [Enqueue("q", [b""])], [Ack("1", 1)], [Ack(1, True)], [Nack(1, 1, 5)], [Nack(1, 1, "e", -1)],
        [Release(1, 1, 0.5)], [Reject(1, 1, b"e")], [Extend(1, 1, None)], [None],
    ],  # type: ignore[arg-type]  # wrong on purpose, as a caller may be
    ids=repr,
)  # fmt: skip
def test_bad_answers_are_refused(broker: Broker, bad: Any) -> None:
    with pytest.raises(UsageError):
        broker.settle_many(bad)


@pytest.mark.parametrize(
    "bad",
    [
        [Enqueue("", [b""])], [Enqueue("q", ["text"])], [Enqueue("q", [b"x" * 2**25])], [Enqueue("q", [b""], 10)],
        [Enqueue("q", [b""], delay_ms=-1)], [Enqueue("q", [b""], visibility_ms=-1)], [Enqueue("q", [b""], eta_ms=1.5)],
        [Enqueue("q", [b""], keys=[])], [Enqueue("q", [b""], keys=[""])], [Enqueue("q", [b""], headers={"a": 1})],
        [Enqueue("q", [b""], retry=5)], [Enqueue("q", [b""], max_attempts=0)], [Enqueue("q", [b""], promised=99)],
    ],  # type: ignore[arg-type, list-item]  # wrong on purpose, as a caller may be
    ids=repr,
)  # fmt: skip
def test_bad_operations_are_refused(broker: Broker, bad: Any) -> None:
    with pytest.raises(UsageError):
        broker.commit([Enqueue("q", [b"good"]), *bad])
    assert broker.stats().enqueued == 0


def test_a_commit_does_any_operations_or_none(broker: Broker) -> None:
    ((first,), (second, third)) = broker.commit(  # type: ignore[misc]  # two answers with ids, which the type cannot say
        [Enqueue("q", [b"a"]), Enqueue("r", [b"b", b"c"], keys=["k", "k"])]
    )
    assert second == third == JobId(first + 1)
    lease = broker.lease("q")
    assert lease is not None
    with pytest.raises(LeaseLostError):
        broker.commit([Ack(lease.id, lease.token), Ack(99, 99)])
    assert broker.stats("q").leased == 1
    assert broker.commit([]) == []


@pytest.mark.parametrize("text", ["lone \ud800", "x" * 100_000])
def test_texts_of_errors_are_taken_as_by_nack(broker: Broker, text: str) -> None:
    one, other = (broker.enqueue("q", b"") and broker.lease("q") for _ in range(2))
    assert one is not None
    assert other is not None
    broker.nack(one, error=text, delay=0)
    broker.settle_many([Nack(other.id, other.token, text, 0)])
    first, second = broker.jobs("q")
    assert first.last_error == second.last_error != ""
