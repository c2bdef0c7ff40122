"""Numbered requests: what was done is not done again, across the end of a process, a rebuild and a compaction."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from recording import RecordingEngine

from rivetq import Broker, JobId, LeaseLostError, QueueConfig, UsageError
from rivetq.engine import (
    Ack,
    Cancel,
    Commit,
    Configure,
    Deadline,
    EndSession,
    Engine,
    Enqueue,
    Exchange,
    Extend,
    Lost,
    Once,
    Purge,
    QueueChanges,
    Redrive,
    RemoveQueue,
    Request,
    Take,
)
from rivetq.engines.live import _Exchange
from rivetq.engines.memory import MemoryEngine
from rivetq.machine.sessions import ANSWERS, SESSIONS
from rivetq.testing import ManualClock

PATIENCE_S = 20.0
SESSION = 2**64 - 1


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


def a_job(broker: Broker, count: int = 1) -> None:
    broker.enqueue_many("q", [b"x"] * count)


def dead_ones(broker: Broker, count: int) -> None:
    a_job(broker, count)
    for lease in broker.lease_many("q", count):
        lease.reject()


REQUESTS: dict[str, tuple[Callable[[Broker], Any], Callable[[Once], Request[Any]], Any]] = {
    "enqueue": (lambda broker: None, lambda once: Commit([Enqueue("q", [b"a", b"b"])], once=once), [[1, 2]]),
    "enqueue with keys": (
        lambda broker: None,
        lambda once: Commit([Enqueue("q", [b"a", b"b"], keys=["k", None])], once=once),
        [[JobId(1, created=True), JobId(2, created=True)]],
    ),
    "cancel": (a_job, lambda once: Cancel(1, once), True),
    "purge of few": (lambda broker: a_job(broker, 3), lambda once: Purge("q", once=once), 3),
    "purge of many": (lambda broker: a_job(broker, 2500), lambda once: Purge("q", once=once), 2500),
    "redrive of few": (lambda broker: dead_ones(broker, 3), lambda once: Redrive("q", once=once), 3),
    "redrive of many": (lambda broker: dead_ones(broker, 2500), lambda once: Redrive("q", once=once), 2500),
    "redrive by id": (lambda broker: dead_ones(broker, 3), lambda once: Redrive("q", [2, 3], once=once), 2),
    "configure": (
        lambda broker: None,
        lambda once: Configure("q", QueueChanges(max_jobs=5, paused=True), once),
        QueueConfig(max_jobs=5, paused=True),
    ),
    "remove": (
        lambda broker: (broker.enqueue("q", b""), broker.purge("q")),
        lambda once: RemoveQueue("q", once),
        True,
    ),
}


def undo(broker: Broker, what: str) -> None:
    """What would let the request do something once more."""
    if what == "cancel":
        return
    if what == "configure":
        broker.configure_queue("q", max_jobs=7)
    elif what == "remove":
        broker.purge("q") if broker.enqueue("q", b"") else None
    elif "redrive" in what:
        for lease in broker.lease_many("q", 1000):
            lease.reject()
    else:
        broker.enqueue("q", b"new")


@pytest.mark.parametrize("what", REQUESTS)
def test_a_numbered_request_that_is_made_again_gets_its_first_answer(broker: Broker, engine: Engine, what: str) -> None:
    prepare, request, answer = REQUESTS[what]
    prepare(broker)
    once = Once(SESSION, 4, 4)
    assert engine.call(request(once)) == answer
    undo(broker, what)
    before = broker.stats(), broker.queues()
    again = engine.call(request(once))
    assert again == answer
    assert type(again) is type(answer)
    assert (broker.stats(), broker.queues()) == before
    engine.call(request(Once(SESSION, 5, 4)))  # with a number of its own it is another request


@pytest.mark.parametrize("what", REQUESTS)
@pytest.mark.parametrize("how", ["closed", "crashed", "rebuilt", "compacted", "compacted and rebuilt"])
def test_an_answer_is_remembered_across_the_end_of_the_process(tmp_path: Path, what: str, how: str) -> None:
    prepare, request, answer = REQUESTS[what]
    once = Once(SESSION, 4, 2)
    data = tmp_path / "data"
    with Broker(data, clock=ManualClock()) as broker:
        prepare(broker)
        assert broker._engine.call(request(once)) == answer
        if "compacted" in how:
            broker.enqueue("other", b"x" * 5000)
            broker.purge("other")
            broker.compact()
            broker.compact()
        broker.sync()
        if how == "crashed":
            data = Path(shutil.copytree(data, tmp_path / "crashed", ignore=shutil.ignore_patterns("spare-*")))
    if "rebuilt" in how:
        shutil.rmtree(data / "index")
    with Broker(data, clock=ManualClock()) as broker:
        stats = broker.stats()
        again = broker._engine.call(request(once))
        assert again == answer
        if isinstance(answer, list) and isinstance(answer[0], list):
            assert [getattr(each, "created", None) for each in again[0]] == [
                getattr(each, "created", None) for each in answer[0]
            ]
        assert broker.stats() == stats


def test_answers_to_leases_are_remembered_one_by_one(broker: Broker, engine: Engine) -> None:
    a_job(broker, 3)
    done, lost, kept = broker.lease_many("q", 3, visibility_timeout=30)
    lost.ack()
    request = Commit(
        [Ack(done.id, done.token), Ack(lost.id, lost.token), Extend(kept.id, kept.token, 60_000)],
        partial=True,
        once=Once(1, 1),
    )
    first = engine.call(request)
    assert isinstance(first[1], Lost)
    assert isinstance(first[2], Deadline)
    clock = broker.clock
    assert isinstance(clock, ManualClock)
    clock.advance(20)
    again = engine.call(request)
    assert again[:2] == first[:2]
    assert again[2] == Deadline(first[2].at_ms, 40_000)


def test_a_refused_request_is_decided_anew(broker: Broker, engine: Engine) -> None:
    a_job(broker)
    lease = broker.lease("q")
    assert lease is not None
    request = Commit([Ack(lease.id, lease.token + 1)], once=Once(1, 1))
    with pytest.raises(LeaseLostError):
        engine.call(request)
    request = Commit([Ack(lease.id, lease.token)], once=Once(1, 1))
    assert engine.call(request) == [None]
    assert engine.call(request) == [None]


def test_what_changed_nothing_is_decided_anew(broker: Broker, engine: Engine) -> None:
    assert engine.call(Cancel(1, Once(1, 1))) is False
    a_job(broker)
    assert engine.call(Cancel(1, Once(1, 1))) is True


def test_a_lease_that_is_asked_for_again_is_the_same_without_a_second_attempt(broker: Broker, engine: Engine) -> None:
    a_job(broker, 4)
    request = Take(["q"], 3, visibility_ms=30_000, once=Once(1, 1))
    first = engine.call(request)
    assert [grant.id for grant in first] == [1, 2, 3]
    broker.commit([Ack(first[0].id, first[0].token)])
    again = engine.call(request)
    assert [(grant.id, grant.token, grant.attempt, grant.payload) for grant in again] == [
        (grant.id, grant.token, 1, b"x") for grant in first[1:]
    ]
    assert [grant.id for grant in engine.call(Take(["q"], 3, once=Once(1, 2)))] == [4]
    clock = broker.clock
    assert isinstance(clock, ManualClock)
    clock.advance(31)
    assert engine.call(request) == []


@pytest.mark.parametrize("wait_ms", [0, 1000])
def test_a_lease_without_a_thread_that_is_asked_for_again_is_the_same(
    engine: Engine, broker: Broker, wait_ms: int
) -> None:
    a_job(broker, 2)
    told: list[Any] = []
    for _ in range(2):
        over = threading.Event()
        engine.call_soon(
            Take(["q"], 1, wait_ms=wait_ms, once=Once(1, 1)), lambda *told_, over=over: (told.append(told_), over.set())
        )
        assert over.wait(PATIENCE_S)
    (first, _), (again, _) = told
    assert [(grant.id, grant.token) for grant in first] == [(grant.id, grant.token) for grant in again]
    assert broker.stats("q").leased == 1


def test_leases_are_remembered_across_an_opening_that_keeps_them(tmp_path: Path) -> None:
    request = Take(["q"], 2, visibility_ms=30_000, once=Once(1, 1))
    with Broker(tmp_path, clock=ManualClock(), release_on_open=False) as broker:
        a_job(broker, 3)
        first = broker._engine.call(request)
    with Broker(tmp_path, clock=ManualClock(), release_on_open=False) as broker:
        assert [grant.token for grant in broker._engine.call(request)] == [grant.token for grant in first]
    with Broker(tmp_path, clock=ManualClock()) as broker:
        assert broker._engine.call(request) == []


def test_commits_of_a_caller_who_does_not_wait_are_remembered(broker: Broker, engine: Engine) -> None:
    told: list[Any] = []
    for _ in range(2):
        over = threading.Event()
        engine.call_soon(
            Commit([Enqueue("q", [b"x"])], once=Once(1, 1)), lambda *each, over=over: (told.append(each), over.set())
        )
        assert over.wait(PATIENCE_S)
    assert told == [([[1]], None)] * 2
    assert broker.stats("q").enqueued == 1


def test_an_answer_that_the_session_has_is_forgotten(broker: Broker) -> None:
    operations = [Enqueue("q", [b"x"])]
    broker.commit(operations, once=Once(1, 1))
    broker.commit(operations, once=Once(1, 2, done_below=2))
    with pytest.raises(UsageError, match="request 1 was answered long ago"):
        broker.commit(operations, once=Once(1, 1))
    assert broker.commit(operations, once=Once(1, 2, done_below=2)) == [[2]]
    assert broker.stats("q").enqueued == 2


def test_a_session_that_ended_is_forgotten(broker: Broker, engine: Engine) -> None:
    operations = [Enqueue("q", [b"x"])]
    broker.commit(operations, once=Once(1, 1))
    engine.call(EndSession(1))
    engine.call(EndSession(1))
    assert broker.commit(operations, once=Once(1, 1)) == [[2]]


def test_what_is_remembered_has_bounds() -> None:
    with Broker(":memory:", clock=ManualClock()) as broker:
        for number in range(1, ANSWERS + 2):
            broker.commit([Enqueue("q", [b""])], once=Once(1, number))
        with pytest.raises(UsageError, match="answered long ago"):
            broker.commit([Enqueue("q", [b""])], once=Once(1, 1))
        assert broker.commit([Enqueue("q", [b""])], once=Once(1, 2)) == [[2]]
        for session in range(2, SESSIONS + 2):
            broker.commit([Enqueue("q", [b""])], once=Once(session, 1))
        total = broker.stats("q").enqueued
        assert broker.commit([Enqueue("q", [b""])], once=Once(SESSIONS + 1, 1)) == [[total]]
        broker.commit([Enqueue("q", [b""])], once=Once(1, 2))  # it called longest ago
        assert broker.stats("q").enqueued == total + 1


def test_many_ids_in_answers_are_forgotten_first_of_those_who_called_longest_ago(broker: Broker) -> None:
    keys = [[f"{session} {n}" for n in range(15_000)] for session in range(3)]
    for session in (0, 1):
        broker.commit([Enqueue("q", [b""] * 15_000, keys=keys[session])], once=Once(session, 1))
    before = broker.stats("q").enqueued
    again = broker.commit([Enqueue("q", [b""] * 15_000, keys=keys[1])], once=Once(1, 1))
    assert again[0] is not None
    assert {getattr(each, "created", None) for each in again[0]} == {True}  # type: ignore[union-attr]  # ids
    forgotten = broker.commit([Enqueue("q", [b""] * 15_000, keys=keys[0])], once=Once(0, 1))
    assert {getattr(each, "created", None) for each in forgotten[0]} == {False}  # type: ignore[union-attr]  # its keys stand
    assert broker.stats("q").enqueued == before
    broker.commit([Enqueue("q", [b""] * 15_000, keys=keys[2])], once=Once(1, 2))
    with pytest.raises(UsageError, match="answered long ago"):
        broker.commit([Enqueue("q", [b""])], once=Once(1, 1))


def test_an_answer_that_its_caller_changes_is_kept_as_it_was(broker: Broker, engine: Engine) -> None:
    request = Commit([Enqueue("q", [b"a", b"b"])], once=Once(1, 1))
    for _ in range(3):
        answers = engine.call(request)
        assert answers == [[1, 2]]
        assert isinstance(answers[0], list)
        answers[0].clear()
        answers.append(None)


def test_a_number_that_stood_for_another_verb_is_refused(broker: Broker, engine: Engine) -> None:
    a_job(broker, 2000)
    engine.call(Commit([Enqueue("q", [b"x"])], once=Once(1, 1)))
    with pytest.raises(UsageError, match="request 1 was no lease"):
        engine.call(Take(["q"], 1, once=Once(1, 1)))
    with pytest.raises(UsageError, match="request 1 was another one"):
        engine.call(Redrive("q", list(range(1, 1500)), once=Once(1, 1)))


def test_a_redrive_of_many_by_id_that_is_made_again_gets_its_first_answer(broker: Broker, engine: Engine) -> None:
    dead_ones(broker, 2500)
    request = Redrive("q", list(range(1, 2501)), once=Once(1, 1))
    assert [engine.call(request), engine.call(request)] == [2500, 2500]


def test_a_lease_that_is_answered_again_hands_its_wake_up_on(broker: Broker, engine: Engine) -> None:
    """Of three lessees the second waits with the number of the first: when that has a job, it takes no other."""
    told: dict[str, list[int]] = {}
    over = {name: threading.Event() for name in "abc"}

    def wait(name: str, once: Once | None) -> None:
        def done(grants: Any, error: BaseException | None) -> None:
            assert error is None
            told[name] = [grant.id for grant in grants]
            over[name].set()

        engine.call_soon(Take(["q"], 1, wait_ms=None, once=once), done)

    wait("a", Once(1, 1))
    wait("b", Once(1, 1))
    wait("c", None)
    a_job(broker, 2)
    assert all(event.wait(PATIENCE_S) for event in over.values())
    assert told == {"a": [1], "b": [1], "c": [2]}


@pytest.mark.parametrize(
    "numbers",
    [
        (-1, 1),
        (2**64, 1),
        ("a", 1),
        (True, 1),
        (1, 0),
        (1, 2**64),
        (1, "a"),
        (1, 1.0),
        (1, 1, -1),
        (1, 1, 2),
        (1, 1, None),
    ],
    ids=repr,
)  # fmt: skip
def test_a_number_that_is_none_is_refused(numbers: tuple[Any, ...]) -> None:
    with pytest.raises(UsageError, match="expected"):
        Once(*numbers)


@pytest.mark.parametrize("once", ["retry-7", 5, (1, 1), b"id"], ids=repr)
def test_what_is_no_number_of_a_session_is_refused(broker: Broker, once: Any) -> None:
    with pytest.raises(UsageError, match=r"once: a rivetq\.engine\.Once expected"):
        broker.commit([Enqueue("q", [b"x"])], once=once)
    assert broker.queues() == []


# An exchange


def test_an_exchange_commits_and_then_leases(broker: Broker, engine: Engine) -> None:
    a_job(broker, 2)
    (first,) = engine.call(Take(["q"], 1))
    answers, grants = engine.call(Exchange(Commit([Ack(first.id, first.token)]), Take(["q"], 5)))
    assert (answers, [grant.id for grant in grants]) == ([None], [2])
    with pytest.raises(LeaseLostError):
        engine.call(Exchange(Commit([Ack(first.id, first.token)]), Take(["q"], 5)))


def soon(engine: Engine, request: Request[Any]) -> tuple[Any, list[Any], threading.Event]:
    told: list[Any] = []
    over = threading.Event()

    def done(answer: Any, error: BaseException | None) -> None:
        told.append((answer, error))
        over.set()

    return engine.call_soon(request, done), told, over


def test_an_exchange_without_a_thread_waits_for_jobs_after_its_commit(broker: Broker, engine: Engine) -> None:
    a_job(broker)
    (first,) = engine.call(Take(["q"], 1))
    exchange = Exchange(Commit([Ack(first.id, first.token)]), Take(["q"], 5, wait_ms=None))
    _, told, over = soon(engine, exchange)
    assert not over.wait(0.02)
    assert broker.get(first.id) is None
    a_job(broker)
    assert over.wait(PATIENCE_S)
    ((exchanged, error),) = told
    assert error is None
    assert (exchanged.answers, [grant.id for grant in exchanged.grants]) == ([None], [2])


def test_an_exchange_that_is_cancelled_tells_its_answers(broker: Broker, engine: Engine) -> None:
    a_job(broker)
    (first,) = engine.call(Take(["q"], 1))
    call, told, over = soon(engine, Exchange(Commit([Ack(first.id, first.token)]), Take(["q"], 5, wait_ms=None)))
    assert not over.wait(0.02)
    cancelled: list[bool] = []
    call.cancel(cancelled.append)
    assert over.wait(PATIENCE_S)
    assert [(exchanged.answers, exchanged.grants, error) for exchanged, error in told] == [([None], [], None)]
    assert cancelled == [False]
    a_job(broker)
    assert broker.stats("q").ready == 1


def test_an_exchange_whose_commit_is_refused_leases_nothing(broker: Broker, engine: Engine) -> None:
    a_job(broker)
    with pytest.raises(LeaseLostError):
        _, told, over = soon(engine, Exchange(Commit([Ack(1, 1)]), Take(["q"], 5)))
        assert over.wait(PATIENCE_S)
        raise told[0][1]
    assert broker.stats("q").leased == 0


def test_an_exchange_that_is_cancelled_before_its_commit_leases_nothing() -> None:
    with Broker(":memory:") as broker:
        a_job(broker)
        told: list[Any] = []
        engine: Any = broker._engine
        exchange = _Exchange(engine, Take(["q"], 5), lambda *each: told.append(each))
        exchange.cancel(lambda done: None)
        exchange.committed([None], None)
        assert told == [(([None], []), None)]
        assert broker.stats("q").ready == 1


def test_an_exchange_tells_its_answers_though_its_lease_breaks(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with Broker(":memory:") as broker:
        told: list[Any] = []
        engine: Any = broker._engine

        def broken(request: Any, done: Any) -> Any:
            raise ValueError("a bug")

        monkeypatch.setattr(engine, "_take_soon", broken)
        _Exchange(engine, Take(["q"], 5), lambda *each: told.append(each)).committed([None], None)
        assert told == [(([None], []), None)]
        assert "the lease of an exchange failed" in caplog.text
