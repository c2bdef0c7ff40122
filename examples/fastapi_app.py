"""A FastAPI app that awaits the enqueue, with async tasks in a worker beside it in the same process.

The lifespan opens the directory and starts the worker before the first request, and stops both after the last one. No
endpoint blocks the event loop: `aenqueue` and `AsyncBroker` await the disk.

    pip install rivetq fastapi uvicorn
    python examples/fastapi_app.py [DIRECTORY]

    curl --json '{"email": "ada@example.org"}' http://127.0.0.1:8000/signup    # 202 {"job": 1}
    curl http://127.0.0.1:8000/jobs/1                                          # {"job": 1, "state": "leased", ...}

One process owns a directory, so uvicorn runs with one worker process, which is its default, and without `--reload`.

Async tasks run in an event loop of the worker's own, not in the server's. What belongs to a loop (an HTTP client, a
pool of database connections) must be made in a task; the one of the endpoints cannot be shared.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

import uvicorn
from fastapi import Depends, FastAPI, Request
from pydantic import BaseModel

from rivetq import RetryPolicy
from rivetq.aio import AsyncBroker
from rivetq.tasks import App, current_job
from rivetq.worker import Worker

logger = logging.getLogger("signup")
jobs = App("data")  # opens nothing yet; `create_app` says which directory it is


class Signup(BaseModel):
    email: str


@jobs.task(queue="mail", retry=RetryPolicy(max_attempts=5), time_limit=10, idempotency_key=lambda email: email)
async def welcome(email: str) -> None:
    """Stands for a mail server that takes its time; a hundred of them may be awaited at once."""
    await asyncio.sleep(0.2)
    logger.info("job %s: welcome mail to %s", current_job().id, email)


def open_broker(request: Request) -> AsyncBroker:
    broker: AsyncBroker = request.state.broker
    return broker


OpenBroker = Annotated[AsyncBroker, Depends(open_broker)]


@asynccontextmanager
async def lifespan(web: FastAPI) -> AsyncIterator[dict[str, Any]]:
    """Everything of RivetQ's that lives as long as the server. What is yielded becomes `request.state`."""
    with jobs:
        async with AsyncBroker(jobs.broker) as broker:
            worker = Worker(jobs, concurrency={"tasks": 100}, grace=10)
            worker.start()
            web.state.worker = worker
            try:
                yield {"broker": broker}
            finally:
                await asyncio.to_thread(worker.stop)  # it waits for running jobs, which the loop should not do


def create_app(directory: str) -> FastAPI:
    web = FastAPI(lifespan=lifespan)
    jobs.use(directory)

    @web.post("/signup", status_code=202)
    async def signup(form: Signup) -> dict[str, int]:
        return {"job": await welcome.aenqueue(form.email)}

    @web.get("/jobs/{job_id}")
    async def state(job_id: int, broker: OpenBroker) -> dict[str, Any]:
        job = await broker.get(job_id)
        if job is None:  # nothing is kept of a job that has ended, so what it achieved is for the task to write down
            return {"job": job_id, "state": "gone"}
        return {"job": job_id, "state": job.state, "attempts": job.attempts, "last_error": job.last_error}

    return web


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    uvicorn.run(create_app(sys.argv[1] if len(sys.argv) > 1 else "data"))
