"""Tasks: what a call becomes in the queue, what is refused, and that calling still just calls."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import inspect
import pickle
import sys
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from rivetq import Broker, BrokerClosedError, BrokerLockedError, DuplicateJobError, RetryPolicy, UsageError
from rivetq.tasks import TASK_HEADER, App, CurrentJob, Reject, current_job, every
from rivetq.tasks.current import here, running
from rivetq.typedjson import TypedJson
from rivetq.worker import Worker

PATIENCE_S = 20.0


@dataclasses.dataclass(frozen=True)
class Mail:
    to: str
    at: datetime


module_app = App(":memory:")


@module_app.task
def of_a_module(n: int) -> int:
    return n + 1


def find(app: App, job_id: int, queue: str = "default") -> Any:
    lease = app.broker.lease(queue)
    assert lease is not None
    assert lease.id == job_id
    return app.find(lease)


def test_calling_a_task_calls_the_function(app: App) -> None:
    @app.task(queue="q")
    def add(a: int, b: int = 2) -> int:
        "Adds."
        return a + b

    @app.task
    async def later(a: int) -> int:
        return a

    assert add(1) == 3
    assert asyncio.run(later(4)) == 4
    assert app.broker.queues() == []
    assert (add.__name__, add.__doc__, list(inspect.signature(add).parameters)) == ("add", "Adds.", ["a", "b"])


def test_enqueue_puts_the_call_into_the_queue_of_the_task(app: App) -> None:
    @app.task(
        queue="mail", priority=8, retry=RetryPolicy(max_attempts=3), visibility_timeout=7,
        idempotency_key=lambda to, body: to,
    )  # fmt: skip
    def send(to: str, body: str) -> None: ...

    job_id = send.enqueue("ada", body="hi")
    job = app.broker.get(job_id)
    assert job is not None
    assert (job.queue, job.priority, job.max_attempts, dict(job.headers)) == ("mail", 8, 3, {"rivetq-task": "send"})
    assert job.json() == {"args": ["ada"], "kwargs": {"body": "hi"}}
    assert app.broker.find("mail", "ada") == job_id
    lease = app.broker.lease("mail")
    assert lease is not None
    assert 6 < (lease.deadline - lease.enqueued_at).total_seconds() < 10


def test_arguments_come_back_as_they_were(app: App) -> None:
    @app.task
    def send(mail: Mail, *, copies: list[Mail] | None = None) -> None: ...

    mail = Mail("ada", datetime(2026, 1, 2, tzinfo=UTC))
    task, args, kwargs = find(app, send.enqueue(mail, copies=[mail]))
    assert (task, args, kwargs) == (send, [mail], {"copies": [mail]})


def test_annotations_may_name_what_the_module_defines_later(app: App) -> None:
    @app.task
    def later(value: Later) -> None: ...

    assert find(app, later.enqueue(Later(1)))[1] == [Later(1)]


@dataclasses.dataclass
class Later:
    n: int


@pytest.mark.parametrize("calls", [[(1,), (2, 3)], [{"a": 1}, {"a": 2, "b": 3}], [(1,), {"a": 2, "b": 3}]])
def test_enqueue_many_takes_tuples_mappings_and_calls(app: App, calls: list[Any]) -> None:
    @app.task
    def add(a: int, b: int = 0) -> int:
        return a + b

    ids = [*add.enqueue_many(calls), *add.enqueue_many([add.call(1), add.call(2, b=3)])]
    leases = app.broker.lease_many("default", 10)
    assert [lease.id for lease in leases] == ids
    found = [app.find(lease) for lease in leases]
    assert [add(*args, **kwargs) for _, args, kwargs in found] == [1, 5, 1, 5]


@pytest.mark.parametrize("calls", [["ab"], [3], [()], [(1, 2, 3)], [(1,), {"x": 1}]])
def test_enqueue_many_with_one_bad_call_enqueues_nothing(app: App, calls: list[Any]) -> None:
    @app.task
    def add(a: int, b: int = 0) -> int:
        return a + b

    with pytest.raises(UsageError):
        add.enqueue_many(calls)
    assert app.broker.stats().enqueued == 0


def test_a_key_of_each_call_of_a_batch(app: App) -> None:
    @app.task(idempotency_key=lambda n: f"k{n}" if n else None)
    def task(n: int) -> None: ...

    ids = task.enqueue_many([(1,), (1,), (0,), (0,)])
    assert ids[0] == ids[1]
    assert len(set(ids)) == 3


def test_options_change_one_enqueue_and_not_the_task(app: App) -> None:
    @app.task(queue="q", idempotency_key=lambda n: "same")
    def task(n: int) -> None: ...

    first = task.enqueue(1)
    other = task.options(
        queue="other", delay=60, priority=9, headers={"a": "b"}, idempotency_key=None, max_attempts=2
    ).enqueue(2)
    job = app.broker.get(other)
    assert job is not None
    assert (job.queue, job.state, job.priority, job.max_attempts) == ("other", "scheduled", 9, 2)
    assert dict(job.headers) == {"a": "b", "rivetq-task": "task"}
    assert task.enqueue(3) == first
    with pytest.raises(DuplicateJobError):
        task.options(on_duplicate="raise").enqueue(4)
    assert task.options(idempotency_key=lambda n: f"n{n}").enqueue(4) == other + 1


def test_a_call_in_a_transaction_exists_when_its_block_ends_or_never(app: App) -> None:
    @app.task
    def task(n: int) -> None: ...

    with pytest.raises(ZeroDivisionError), app.broker.transaction() as tx:
        task.options(transaction=tx).enqueue(1)
        raise ZeroDivisionError
    assert app.broker.stats().enqueued == 0
    with app.broker.transaction() as tx:
        job_id = task.options(transaction=tx).enqueue(1)
        assert app.broker.get(job_id) is None
    assert app.broker.get(job_id) is not None


def test_aenqueue_is_enqueue_awaited(tmp_path: Path) -> None:
    app = App(tmp_path / "data")

    @app.task
    def task(n: int) -> None: ...

    async def main() -> list[int]:
        return list(await asyncio.gather(*(task.aenqueue(n) for n in range(50))))

    with app:
        assert sorted(asyncio.run(main())) == list(range(1, 51))
        assert sorted(asyncio.run(main())) == list(range(51, 101))  # in another loop
        assert app.broker.stats().ready == 100


@pytest.mark.parametrize(("args", "kwargs"), [((), {}), ((1, 2), {}), ((), {"b": 1}), ((1,), {"a": 1})])
def test_arguments_that_do_not_fit_are_refused_at_the_enqueue(
    app: App, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    @app.task
    def task(a: int) -> None: ...

    for enqueue in (task.enqueue, task.options(delay=1).enqueue, task.call):
        with pytest.raises(UsageError, match="do not fit"):
            enqueue(*args, **kwargs)
    assert app.broker.stats().enqueued == 0


@pytest.mark.parametrize("value", [object(), {1, 2}, {1: 2}, lambda: None])
def test_arguments_that_the_codec_cannot_say_are_refused(app: App, value: Any) -> None:
    @app.task
    def task(a: Any) -> None: ...

    with pytest.raises(UsageError, match="arguments"):
        task.enqueue(value)
    assert app.broker.stats().enqueued == 0


@pytest.mark.parametrize(
    ("payload", "headers", "why"),
    [
        (b"{}", {}, "no header"),
        (b"{}", {"rivetq-task": "other"}, "unknown task 'other'"),
        (b"{", {"rivetq-task": "task"}, "cannot be read"),
        (b"[]", {"rivetq-task": "task"}, "an object"),
        (b'{"args": [], "more": 1}', {"rivetq-task": "task"}, "an object"),
        (b'{"args": {}}', {"rivetq-task": "task"}, "a list"),
        (b'{"args": [1, 2]}', {"rivetq-task": "task"}, "do not fit"),
        (b'{"args": [{"$class": ["a:b", {}]}]}', {"rivetq-task": "task"}, "not known"),
    ],
)
def test_what_is_no_call_of_a_task_is_rejected_with_the_reason(
    app: App, payload: bytes, headers: dict[str, str], why: str
) -> None:
    @app.task
    def task(a: int) -> None: ...

    app.broker.enqueue("default", payload, headers=headers)
    lease = app.broker.lease("default")
    assert lease is not None
    with pytest.raises(Reject, match=why):
        app.find(lease)


@pytest.mark.parametrize("text", ["x\n2026-01-01 ERROR shop: forged \x1b[2J", "\x07" * 2**20])
def test_the_reason_holds_no_control_characters_of_a_job_and_not_all_of_it(app: App, text: str) -> None:
    @app.task
    def task(a: int) -> None: ...

    class Refusing:
        def dumps(self, value: Any) -> bytes:
            raise NotImplementedError

        def loads(self, data: bytes) -> Any:
            raise ValueError(text)

    own = App(app.broker, codec=Refusing())
    own.task(task.function, name="task")
    unknown, many = {"rivetq-task": text[:10_000]}, {"rivetq-task": "task"}
    for place, headers, payload in (
        (app, unknown, {}), (app, many, {"kwargs": {text: 1}}), (app, many, {"args": [{"$class": [text, {}]}]}),
        (own, many, {}),
    ):  # fmt: skip
        app.broker.enqueue("default", payload, headers=headers)
        lease = app.broker.lease("default")
        assert lease is not None
        with pytest.raises(Reject) as caught:
            place.find(lease)
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 10_000


def test_a_program_without_rivetq_can_write_a_call_as_plain_json(app: App) -> None:
    @app.task
    def task(a: int, b: list[int]) -> None: ...

    job_id = app.broker.enqueue("default", {"kwargs": {"a": 1, "b": [2]}}, headers={"rivetq-task": "task"})
    assert find(app, job_id) == (task, [], {"a": 1, "b": [2]})


def test_a_codec_of_your_own_is_used_both_ways() -> None:
    class Pickle:
        def dumps(self, value: Any) -> bytes:
            return pickle.dumps(value)

        def loads(self, data: bytes) -> Any:
            return pickle.loads(data)

    with App(":memory:", codec=Pickle()) as app:

        @app.task
        def task(a: Any) -> None: ...

        assert find(app, task.enqueue({1, 2}))[1] == [{1, 2}]


def test_two_tasks_of_one_name_are_refused(app: App) -> None:
    def task() -> None: ...

    app.task(task)
    with pytest.raises(UsageError, match="task 'task'"):
        app.task(task)
    assert app.task(name="other")(task).name == "other"
    assert sorted(app.tasks) == ["other", "task"]


@pytest.mark.parametrize(
    "options",
    [
        {"pool": "fork"}, {"time_limit": 0}, {"time_limit": -1}, {"time_limit": "1"}, {"idempotency_key": 7},
        {"priority": 10}, {"priority": True}, {"queue": ""}, {"queue": 5}, {"queue": "q" * 256}, {"retry": 3},
        {"max_attempts": 0}, {"visibility_timeout": 0}, {"visibility_timeout": -1}, {"name": 5}, {"name": ""},
        {"queue": "\ud800"}, {"name": "\ud800"},
    ],
)  # fmt: skip
def test_a_task_with_a_bad_option_is_refused(app: App, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(options))):
        app.task(**options)(of_a_module.function)
    assert app.tasks == {}


def test_an_option_of_one_call_is_checked_as_those_of_the_task(app: App) -> None:
    task = app.task(of_a_module.function)
    bad: list[dict[str, Any]] = [
        {"priority": 77}, {"delay": -1}, {"on_duplicate": "drop"}, {"headers": ["a"]}, {"headers": "a"},
        {"transaction": 5}, {"delay": timedelta(days=100 * 366 + 1)},
    ]  # fmt: skip
    task.options(delay=timedelta(days=100 * 366)).enqueue(1)
    for options in bad:
        with pytest.raises(UsageError, match=next(iter(options))):
            task.options(**options)


def test_what_is_no_function_is_no_task(app: App) -> None:
    class Sender:
        def send(self, to: str) -> None: ...

    app.task(name="is one")(of_a_module.function)
    for nothing, why in (
        ("mail", "by name"), (functools.partial(print, 1), "a function"), (Sender.send, "method"), (max, "arguments"),
        (app.tasks.pop("is one"), "stands above"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=why):
            app.task(nothing)  # type: ignore[call-overload]  # what a type checker refuses as well
    assert app.tasks == {}


def test_a_key_that_cannot_be_called_or_stands_for_many_calls_is_told(app: App) -> None:
    @app.task(idempotency_key=lambda to, body: f"{to} {body}")
    def send(to: str, body: str = "hello") -> None: ...

    assert send.enqueue("a", body="x") == send.enqueue("a", body="x")
    with pytest.raises(UsageError, match="needs its defaults"):
        send.enqueue("a")
    with pytest.raises(UsageError, match="all but the first"):
        send.options(idempotency_key="k").enqueue_many([("a", "x"), ("b", "x")])
    assert send.options(idempotency_key="k").enqueue_many([("a", "x")])

    def broken(to: str, body: str = "") -> str:
        raise TypeError("of its own")

    with pytest.raises(TypeError, match="of its own"):
        send.options(idempotency_key=broken).enqueue("a")


def test_a_task_for_the_process_pool_is_a_sync_function_of_a_module(app: App) -> None:
    async def asynchronous() -> None: ...

    for function in (asynchronous, lambda: None):
        with pytest.raises(UsageError, match="'process'"):
            app.task(pool="process")(function)


def test_the_broker_of_a_path_is_opened_at_its_first_use_and_closed_with_the_app(tmp_path: Path) -> None:
    app = App(tmp_path / "data", fsync="never")
    assert not (tmp_path / "data").exists()
    assert app.broker is app.broker
    with pytest.raises(BrokerLockedError):
        Broker(tmp_path / "data")
    app.close()
    app.close()
    Broker(tmp_path / "data").close()


@pytest.mark.parametrize("was_open", [True, False])
def test_an_app_that_was_closed_does_not_open_again_by_itself(tmp_path: Path, was_open: bool) -> None:
    """Or a handler that was left behind would take the directory, which nobody then gives back."""
    app = App(tmp_path / "data", fsync="never")

    @app.task
    def task() -> None: ...

    if was_open:
        task.enqueue()
    app.close()
    uses: list[Callable[[], Any]] = [
        lambda: app.broker,
        task.enqueue,
        lambda: asyncio.run(task.aenqueue()),
        lambda: app.cancel(1),
        Worker(app).start,
    ]
    for use in uses:
        with pytest.raises(BrokerClosedError, match="use"):
            use()
    assert (tmp_path / "data").exists() == was_open
    with app.testing():
        task.enqueue()
    with pytest.raises(BrokerClosedError):
        task.enqueue()


@pytest.mark.parametrize("way", ["use", "with", "use another"])
def test_an_app_that_was_closed_opens_again_where_the_program_says_so(tmp_path: Path, way: str) -> None:
    app = App(tmp_path / "data", fsync="never")

    @app.task
    def task() -> None: ...

    task.enqueue()
    app.close()
    if way == "with":
        with app:
            assert task.enqueue() == 2
    else:
        app.use(*[tmp_path / "other"] if way == "use another" else [])
        assert task.enqueue() == (1 if way == "use another" else 2)
    app.close()
    with pytest.raises(BrokerClosedError):
        task.enqueue()


def test_an_app_that_opens_again_awaits_its_new_broker(tmp_path: Path) -> None:
    app = App(tmp_path / "data", fsync="never")

    @app.task
    def task() -> None: ...

    for n in (1, 2):
        with app:
            assert asyncio.run(task.aenqueue()) == n


def test_a_call_that_is_awaited_in_a_transaction_exists_when_its_block_ends(app: App) -> None:
    @app.task
    def task() -> None: ...

    async def main() -> None:
        with app.broker.transaction() as tx:
            await task.options(transaction=tx).aenqueue()
            assert app.broker.stats().enqueued == 0

    asyncio.run(main())
    assert app.broker.stats().enqueued == 1


def test_a_call_for_a_moment_waits_for_it(app: App) -> None:
    @app.task
    def task() -> None: ...

    at = datetime(2100, 1, 1, tzinfo=UTC)
    job = app.broker.get(task.options(eta=at).enqueue())
    assert job is not None
    assert job.due_at is not None
    assert abs(job.due_at - at) < timedelta(seconds=1)


# -- The job that runs


@pytest.fixture
def job(app: App) -> CurrentJob:
    app.broker.enqueue("q", b"")
    lease = app.broker.lease("q")
    assert lease is not None
    return CurrentJob(lease, "task", app)


def test_the_first_reason_for_a_cancellation_stays(job: CurrentJob) -> None:
    job.cancel("the lease was lost")
    job.cancel("shutdown")
    assert (job.cancelled, job.reason) == (True, "the lease was lost")


def test_who_waits_for_a_cancellation_is_woken_and_who_comes_later_does_not_wait(job: CurrentJob) -> None:
    assert not job.wait_cancelled(0)
    told: list[bool] = []
    waits = threading.Thread(target=lambda: told.append(job.wait_cancelled(PATIENCE_S)), daemon=True)
    waits.start()
    job.cancel("the lease was lost")
    waits.join(PATIENCE_S / 2)
    assert told == [True]
    assert job.wait_cancelled(PATIENCE_S)
    late = CurrentJob(job.lease, "task", job._app)
    late.cancel("before anybody waited")
    assert late.wait_cancelled(0)


def test_behind_a_handler_there_is_no_current_job_and_behind_one_in_another_that_one(job: CurrentJob) -> None:
    inner = CurrentJob(job.lease, "inner", job._app)
    with running(job):
        with pytest.raises(ZeroDivisionError), running(inner):
            assert current_job() is inner
            raise ZeroDivisionError
        assert current_job() is job
    assert here() is None


class Lock:
    """Tells when somebody asks for it who has to wait."""

    def __init__(self) -> None:
        self.own = threading.RLock()
        self.asked = threading.Event()

    def __enter__(self) -> None:
        if not self.own.acquire(blocking=False):
            self.asked.set()
            self.own.acquire()

    def __exit__(self, *error: object) -> None:
        self.own.release()


def test_a_thread_that_comes_while_another_registers_classes_waits_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    app, lock, enqueued = App(":memory:"), Lock(), list[int]()
    app._lock = lock  # type: ignore[assignment]  # as far as it is used
    over = threading.Event()

    def enqueue() -> None:
        try:
            enqueued.append(task.enqueue(Mail("a", datetime.now(UTC))))
        finally:
            over.set()

    def register(annotations: Any) -> None:
        if not threads:
            threads.append(threading.Thread(target=enqueue))
            threads[0].start()
            while not (lock.asked.is_set() or over.is_set()):
                time.sleep(0.001)
        original(annotations)

    threads: list[threading.Thread] = []
    assert isinstance(app.codec, TypedJson)
    original = app.codec.register_annotations
    monkeypatch.setattr(app.codec, "register_annotations", register)

    @app.task
    def task(mail: Mail) -> None: ...

    with app:
        task.enqueue(Mail("b", datetime.now(UTC)))
        threads[0].join(30)
        assert len(enqueued) == 1, "whichever of the two came first"


def test_no_header_of_a_call_renames_its_task(app: App) -> None:
    @app.task
    def task() -> None: ...

    job_id = task.options(headers={TASK_HEADER: "other", "trace": "1"}).enqueue()
    lease = app.broker.lease("default")
    assert lease is not None
    assert (lease.id, dict(lease.headers)) == (job_id, {TASK_HEADER: "task", "trace": "1"})


def test_a_broker_that_was_given_open_stays_open() -> None:
    with Broker(":memory:") as broker:
        with App(broker) as app:
            assert app.broker is broker
        assert broker.health().state == "open"
        with pytest.raises(UsageError, match="fsync"):
            App(broker, fsync="never")


def test_an_unknown_option_of_the_broker_is_told_at_once() -> None:
    with pytest.raises(UsageError, match="fsyc"):
        App("data", fsyc="never")
    app = App("data")
    with pytest.raises(UsageError, match="fsyc"):
        app.use(fsyc="never")


def test_a_task_of_a_module_is_pickled_by_its_place() -> None:
    assert pickle.loads(pickle.dumps(of_a_module)) is of_a_module


def test_current_job_is_of_handlers_only() -> None:
    with pytest.raises(UsageError, match="no job runs here"):
        current_job()


def test_cancel_removes_a_job_that_waits(app: App) -> None:
    @app.task
    def task() -> None: ...

    job_id = task.enqueue()
    assert app.cancel(job_id)
    assert not app.cancel(job_id)
    assert app.broker.get(job_id) is None


def test_many_threads_may_be_the_first_to_use_an_app() -> None:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    errors: list[Exception] = []
    try:
        for _ in range(10):
            with App(":memory:") as app:
                tasks = []
                for n in range(30):
                    kind = dataclasses.make_dataclass(f"Made{n}", [("n", int)])

                    def function(value: Any) -> None: ...

                    function.__annotations__ = {"value": kind}
                    tasks.append((app.task(name=f"t{n}")(function), kind))

                def use(calls: list[Any] = tasks) -> None:
                    try:
                        for task, kind in calls:
                            task.enqueue(kind(1))
                    except Exception as error:
                        errors.append(error)

                threads = [threading.Thread(target=use) for _ in range(8)]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
    finally:
        sys.setswitchinterval(before)
    assert errors == []


@pytest.mark.parametrize("calls", [5, None, "ab", {"to": "ada"}])
def test_enqueue_many_of_what_is_no_row_of_calls_is_refused(app: App, calls: Any) -> None:
    @app.task
    def send(to: str = "") -> None: ...

    with pytest.raises(UsageError, match="enqueue_many"):
        send.enqueue_many(calls)
    assert send.enqueue_many([["ada"], ("bob",)]) == [1, 2]


@pytest.mark.parametrize("broker", [None, 5, 3.5, b"data"])
def test_an_app_of_no_broker_and_no_path_is_refused(broker: Any) -> None:
    with pytest.raises(UsageError, match="broker"):
        App(broker)
    with pytest.raises(UsageError, match="codec"):
        App("data", codec=broker or 1)


def test_arguments_may_have_any_names(app: App) -> None:
    @app.task
    def task(**named: int) -> None: ...

    job_id = task.enqueue(self=1, args=2)  # type: ignore[call-arg]  # pyright alone knows
    job = app.broker.get(job_id)
    assert job is not None
    assert job.json()["kwargs"] == {"self": 1, "args": 2}


@pytest.mark.parametrize("options", [{"kwargs": {1: 2}}, {"kwargs": [1]}, {"args": 5}, {"name": 5}])
def test_bad_arguments_of_a_schedule_are_told_where_it_is_made(app: App, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(options))):
        app.periodic(every(60), **options)
