"""A small program of a user, as type checkers see it: every use here is right."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import assert_type

from rivetq import Broker, Lease, RetryPolicy
from rivetq.aio import AsyncBroker, AsyncLease
from rivetq.tasks import App, CurrentJob, Reject, Retry, Snooze, Task, current_job
from rivetq.worker import Concurrency, Settled, Worker

app = App("data/", fsync="always")


@dataclass
class Mail:
    to: str
    body: str


def key(to: str, body: str = "hello", *, copies: list[Mail] | None = None) -> str:
    return f"{to}:{body}"


@app.task
def bare(n: int) -> int:
    return n + 1


@app.task(
    queue="mail",
    priority=7,
    retry=RetryPolicy(max_attempts=3),
    visibility_timeout=timedelta(minutes=1),
    time_limit=30,
    idempotency_key=key,
)
def send(to: str, body: str = "hello", *, copies: list[Mail] | None = None) -> bool:
    if current_job().cancelled:
        raise Retry(10)
    if not to:
        raise Reject("nobody to send to")
    return True


@app.task(queue="web", pool="thread")
async def fetch(url: str) -> bytes:
    raise Snooze(timedelta(seconds=5))


@app.around
def log(job: CurrentJob) -> Iterator[None]:
    print(job.id, job.task, job.attempt)
    yield


assert_type(bare(1), int)
assert_type(bare.enqueue(1), int)
assert_type(send("ada"), bool)
assert_type(send.enqueue("ada", "hi", copies=[Mail("bob", "hi")]), int)
send.enqueue("ada", body="hi")
send.options(delay=60, priority=9).enqueue("ada")
send.enqueue_many([send.call("ada"), send.call("bob", body="hi")])
send.enqueue_many([("ada",), ("bob", "hi")])
both: Task[[int], int] = bare


async def main() -> None:
    assert_type(await fetch("http://localhost"), bytes)
    assert_type(await fetch.aenqueue("http://localhost"), int)
    async with AsyncBroker("data/") as broker:
        assert_type(await broker.enqueue("q", {"a": 1}), int)
        async for lease in broker.leases("q"):
            assert_type(lease, AsyncLease)
            async with lease:
                print(lease.json())


def work() -> int:
    def note(settled: Settled) -> None:
        print(settled.seconds)

    with Broker("other/") as broker:
        found = broker.lease("q", wait=1)
        if found is not None:
            assert_type(found, Lease)
            found.ack()
    worker = Worker(app, queues={"mail": 3, "web": 1}, concurrency=Concurrency(threads=4), on_settled=note)
    return worker.run()


if __name__ == "__main__":
    asyncio.run(main())
    work()
