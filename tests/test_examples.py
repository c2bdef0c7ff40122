"""The examples, run for real: the servers by their test clients, the others as the processes that they are.

Those that need a web framework skip where it is not installed.
"""

from __future__ import annotations

import importlib.util
import itertools
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from types import ModuleType

import pytest

from rivetq import Broker
from rivetq.worker import Settled, Worker

EXAMPLES = Path(__file__).parent.parent / "examples"
WAIT_S = 30.0
"""For what takes a moment; a test that comes to its end has failed."""


@pytest.fixture
def load() -> Iterator[Callable[[str], ModuleType]]:
    """Imports an example by its name, afresh for each test."""
    loaded: list[str] = []

    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        loaded.append(name)
        spec.loader.exec_module(module)
        return module

    yield load
    for name in loaded:
        del sys.modules[name]


def settled_by(worker: Worker) -> queue.SimpleQueue[Settled]:
    """What the worker answers from now on."""
    found: queue.SimpleQueue[Settled] = queue.SimpleQueue()
    worker.on_settled.append(found.put)
    return found


def run(*arguments: str | Path) -> str:
    """What a Python process prints; it must end with 0."""
    command = [sys.executable, "-W", "error", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S, cwd=EXAMPLES, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# Web frameworks


def test_a_flask_view_enqueues_and_the_worker_beside_it_does_the_work(
    load: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    pytest.importorskip("flask", reason="flask is not installed")
    example = load("flask_app")
    web = example.create_app(str(tmp_path / "jobs"))
    worker, broker, client = web.extensions["rivetq"], example.jobs.broker, web.test_client()
    settled = settled_by(worker)
    try:
        broker.pause("mail")
        answer = client.post("/signup", data={"email": "ada@example.org"})
        job_id = answer.json["job"]
        assert answer.status_code == 202
        assert client.get(f"/jobs/{job_id}").json == {
            "job": job_id, "state": "ready", "attempts": 0, "last_error": None,
        }  # fmt: skip
        assert client.post("/signup", data={"email": "ada@example.org"}).json == {"job": job_id}
        assert client.post("/signup", data={"email": "nobody"}).status_code == 400
        assert broker.stats("mail").enqueued == 1
        broker.resume("mail")
        assert settled.get(timeout=WAIT_S).ending == "ack"
        assert client.get(f"/jobs/{job_id}").json == {"job": job_id, "state": "gone"}
    finally:
        worker.stop()
        example.jobs.close()


def test_the_worker_of_the_flask_app_ends_in_order_at_the_end_of_the_process(tmp_path: Path) -> None:
    pytest.importorskip("flask", reason="flask is not installed")
    program = """if True:
        import sys, threading, flask_app
        web, begun = flask_app.create_app(sys.argv[1]), threading.Event()

        @flask_app.jobs.around
        def tell(job):
            begun.set()
            yield

        web.test_client().post("/signup", data={"email": "ada@example.org"})
        assert begun.wait(10)
    """
    run("-c", program, tmp_path)
    with Broker(tmp_path, release_on_open=False) as broker:
        stats = broker.stats("mail")
    assert (stats.acked, stats.leased, stats.ready) == (1, 0, 0)


@pytest.mark.filterwarnings("ignore:Using `httpx` with `starlette.testclient`")  # either library will do here
def test_a_fastapi_endpoint_awaits_the_enqueue_and_the_lifespan_holds_the_worker(
    load: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    for name in ("fastapi", "httpx", "uvicorn"):
        pytest.importorskip(name, reason=f"{name} is not installed")
    from fastapi.testclient import TestClient

    example = load("fastapi_app")
    web = example.create_app(str(tmp_path / "jobs"))
    with TestClient(web) as client:
        settled, broker = settled_by(web.state.worker), example.jobs.broker
        broker.pause("mail")
        answer = client.post("/signup", json={"email": "ada@example.org"})
        job_id = answer.json()["job"]
        assert answer.status_code == 202
        assert client.get(f"/jobs/{job_id}").json()["state"] == "ready"
        assert client.post("/signup", json={"email": "ada@example.org"}).json() == {"job": job_id}
        assert client.post("/signup", json={}).status_code == 422
        broker.resume("mail")
        assert settled.get(timeout=WAIT_S).ending == "ack"
        assert client.get(f"/jobs/{job_id}").json() == {"job": job_id, "state": "gone"}
        client.post("/signup", json={"email": "bob@example.org"})
    with Broker(tmp_path / "jobs") as broker:  # it is free, and what ran at the end of the server was answered
        stats = broker.stats("mail")
    assert (stats.enqueued, stats.leased) == (2, 0)
    assert stats.acked + stats.ready == 2


def test_a_django_view_enqueues_once_its_transaction_is_committed(
    load: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("django", reason="django is not installed")
    monkeypatch.setenv("SIGNUP_DIRECTORY", str(tmp_path))
    example = load("django_app")  # once in a process, because Django is configured once
    from django.db import connections
    from django.test import Client

    client = Client()
    try:
        example.create_tables()
        example.create_tables()
        with example.jobs, Worker(example.jobs, concurrency=2) as worker:
            settled, broker = settled_by(worker), example.jobs.broker
            broker.pause("mail")
            answer = client.post("/signup", {"email": "ada@example.org"})
            assert answer.status_code == 202
            place = f"/signups/{answer.json()['signup']}"
            assert client.get(place).json()["welcomed"] is False
            assert client.post("/signup", {"email": "ada@example.org"}).json() == answer.json()
            assert client.post("/signup", {"email": "nobody"}).status_code == 400
            assert example.Signup.objects.count() == 1  # the other row was rolled back, and its job never was
            assert broker.stats("mail").enqueued == 1
            broker.resume("mail")
            assert settled.get(timeout=WAIT_S).ending == "ack"
            assert client.get(place).json()["welcomed"] is True
    finally:
        connections.close_all()


# The outbox


class Crash(BaseException):
    """Like the end of the process: nobody catches it."""


def crash_at(number: int) -> Callable[[str], None]:
    steps = itertools.count(1)

    def step(name: str) -> None:
        if next(steps) == number:
            raise Crash(name)

    return step


class Life:
    crashed = False


@contextmanager
def life_of(outbox: ModuleType, directory: Path) -> Iterator[Life]:
    """The block as a process that opens the queue, and may crash."""
    life = Life()
    outbox.jobs.use(directory / "jobs", fsync="never")
    try:
        yield life
    except Crash:
        life.crashed = True
    finally:
        outbox.jobs.close()


def ship_all(broker: Broker) -> list[int]:
    """Does what the worker would do; the orders."""
    leases = broker.lease_many("orders", 100)
    broker.ack_many(leases)
    return [lease.json()["args"][0] for lease in leases]


@pytest.mark.parametrize("shipped_between", [False, True])
def test_each_order_of_the_outbox_has_one_job_wherever_two_lives_end(
    load: Callable[[str], ModuleType], tmp_path: Path, shipped_between: bool
) -> None:
    """Every pair of steps: the program ends at one, the relay that comes after it at the other."""
    outbox = load("outbox")
    pairs = 0
    for first in itertools.count(1):
        for second in itertools.count(1):
            directory = tmp_path / f"{first}-{second}"
            directory.mkdir()
            shipped: list[int] = []
            with life_of(outbox, directory) as first_life:
                outbox.take_two_orders(directory, crash_at(first))
            with life_of(outbox, directory) as second_life:
                if shipped_between:  # so that only the key of a job that is gone tells the relay of it
                    shipped += ship_all(outbox.jobs.broker)
                with closing(outbox.open_database(directory)) as database:
                    outbox.relay(database, crash_at(second))
            with life_of(outbox, directory):
                if shipped_between:
                    shipped += ship_all(outbox.jobs.broker)
                orders, waiting = outbox.account(directory)
                assert outbox.jobs.broker.stats("orders").enqueued == len(orders)
            assert shipped + waiting == orders, (first, second)
            pairs += first_life.crashed and second_life.crashed
            if not second_life.crashed:
                break
        if not first_life.crashed:
            break
    assert (first, orders) == (13, [1, 2])  # the program has twelve steps
    assert pairs == 36  # after them 12 rows are left, counted together, and a relay has three steps for each


def test_a_relay_makes_a_second_job_once_the_time_of_the_key_is_over(
    load: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    """The limit that the example names."""
    outbox = load("outbox")
    day = 86_400
    with closing(outbox.open_database(tmp_path)) as database, outbox.jobs.testing() as testing:

        def relay_that_crashes() -> None:
            with pytest.raises(Crash, match="enqueued"):
                outbox.relay(database, crash_at(2))

        outbox.place_order(database, "lamp")
        relay_that_crashes()
        assert testing.drain().acked == 1
        testing.advance(day - 1)
        relay_that_crashes()
        testing.assert_enqueued(outbox.ship, count=0)
        testing.advance(2)
        outbox.relay(database)
        testing.assert_enqueued(outbox.ship, count=1)


def test_the_key_of_an_outbox_row_is_never_used_for_another(load: Callable[[str], ModuleType], tmp_path: Path) -> None:
    outbox = load("outbox")
    with closing(outbox.open_database(tmp_path)) as database, outbox.jobs.testing() as testing:
        for item in ("lamp", "table"):
            outbox.place_order(database, item)
            outbox.relay(database)  # the outbox is empty now, and the key of the job stands
        assert [call.args for call in testing.assert_enqueued(outbox.ship, count=2)] == [[1], [2]]


def test_the_outbox_example_dies_at_each_step_and_counts() -> None:
    lines = run("outbox.py").splitlines()
    assert len(lines) == 13
    assert lines[0].startswith("died at step 1: order written")
    assert lines[-1].startswith("did not die")


# Tasks


def test_the_example_of_testing_runs_its_tests() -> None:
    named = (EXAMPLES / "testing_tasks.py").read_text().count("\ndef test_")
    lines = run("testing_tasks.py").splitlines()
    assert len(lines) == named > 0
    assert all(line.startswith("ok ") for line in lines)


def test_the_worker_app_works_until_sigterm_and_ends_in_order(tmp_path: Path) -> None:
    awaited = {
        "planned", "copied 100 MB", "fetched https://example.org/", "2262 primes below 20000",
        "delivered: Main Street 1", "attempt 2: delivered: far away", "attempt 1: delivered: at lunch", "rejected",
    }  # fmt: skip
    command = [sys.executable, "-W", "error", str(EXAMPLES / "worker_app.py"), str(tmp_path / "jobs")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    too_late = threading.Timer(WAIT_S, process.kill)  # ends the reading below, too
    too_late.start()
    said: list[str] = []
    try:
        assert process.stdout is not None
        while awaited and (line := process.stdout.readline()):
            said.append(line)
            awaited = {text for text in awaited if text not in line}
        assert not awaited, said
        process.send_signal(signal.SIGTERM)
        begun = time.monotonic()
        assert process.wait(WAIT_S) == 0
        assert time.monotonic() - begun < 5 + 5  # its grace time, and what a slow machine needs
    finally:
        too_late.cancel()
        process.kill()
        process.communicate()
    with Broker(tmp_path / "jobs", release_on_open=False) as broker:
        assert broker.stats().leased == 0
        # The clock may have been due meanwhile, so that there were jobs of another plan.
        assert {job.last_error for job in broker.dead_letters("orders")} == {"no such address"}
        assert broker.stats().dead == len(broker.dead_letters("orders"))
