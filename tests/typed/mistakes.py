"""What type checkers must reject: just the lines that end in "# wrong"."""

from __future__ import annotations

from rivetq import RetryPolicy
from rivetq.aio import AsyncBroker
from rivetq.tasks import App
from rivetq.worker import Worker

app = App("data/")


@app.task
def bare(n: int) -> int:
    return n + 1


@app.task(queue="mail")
def send(to: str, body: str = "hello") -> bool:
    return True


@app.task
async def fetch(url: str) -> bytes:
    return b""


bare("1")  # wrong
bare.enqueue("1")  # wrong
send.enqueue()  # wrong
send.enqueue("ada", 7)  # wrong
send.enqueue("ada", subject="hi")  # wrong
send.call(to=b"ada")  # wrong
send.options(delay=1).enqueue(1)  # wrong
send.options(delay="soon")  # wrong
send.options(time=1)  # wrong
result: str = send("ada")  # wrong
job: str = send.enqueue("ada")  # wrong
app.task(queue=7)  # wrong
app.task(pool="fork")  # wrong
app.task(retry=3)  # wrong
RetryPolicy(jitter="some")  # wrong
Worker("data/")  # wrong
Worker(app, concurrency="many")  # wrong


async def main() -> None:
    await fetch.aenqueue(1)  # wrong
    body: str = await fetch("http://localhost")  # wrong
    print(body)
    async with AsyncBroker("data/") as broker:
        await broker.enqueue(7, b"")  # wrong
        lease = await broker.lease("q")
        await lease.ack()  # wrong
