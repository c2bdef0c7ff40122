"""A Flask app that answers at once and does the work afterwards, in a worker beside it in the same process.

A POST to /signup is answered with 202 as soon as the job is on disk; the mail is sent later. A second signup of the
same address is the same job, because the address is its idempotency key.

    pip install rivetq flask
    python examples/flask_app.py [DIRECTORY]

    curl -d email=ada@example.org http://127.0.0.1:5000/signup    # 202 {"job": 1}
    curl http://127.0.0.1:5000/jobs/1                             # {"job": 1, "state": "ready"}, "leased" and so on

One process owns a directory. So under a real server: one process, many threads, as in
`gunicorn --workers 1 --threads 16 'flask_app:create_app("data")'`; and with `flask run`: `--no-reload`, because the
reloader runs the app in two processes.
"""

from __future__ import annotations

import atexit
import logging
import sys
import time

from flask import Flask, request
from flask.typing import ResponseReturnValue

from rivetq import RetryPolicy
from rivetq.tasks import App, current_job
from rivetq.worker import Worker

logger = logging.getLogger("signup")
jobs = App("data")  # opens nothing yet; `create_app` says which directory it is


@jobs.task(queue="mail", retry=RetryPolicy(max_attempts=5), idempotency_key=lambda email: email)
def welcome(email: str) -> None:
    """Stands for a mail server that takes its time."""
    time.sleep(0.2)
    logger.info("job %s: welcome mail to %s", current_job().id, email)


def create_app(directory: str) -> Flask:
    """The web app, and a worker that runs until the process ends."""
    web = Flask(__name__)
    jobs.use(directory)
    worker = Worker(jobs, concurrency=2, grace=10)
    worker.start()

    def close() -> None:
        """First the worker, which answers for the jobs that it holds; then the broker."""
        worker.stop()
        jobs.close()

    # Ctrl-C and the end of a gunicorn process come this way. A process that is killed does not, and need not: the jobs
    # that were running are delivered again when the directory is opened the next time.
    atexit.register(close)
    web.extensions["rivetq"] = worker

    @web.post("/signup")
    def signup() -> ResponseReturnValue:
        email = request.form.get("email", "")
        if "@" not in email:
            return {"error": "email: an address expected"}, 400
        return {"job": welcome.enqueue(email)}, 202

    @web.get("/jobs/<int:job_id>")
    def state(job_id: int) -> ResponseReturnValue:
        job = jobs.broker.get(job_id)
        if job is None:  # nothing is kept of a job that has ended, so what it achieved is for the task to write down
            return {"job": job_id, "state": "gone"}
        return {"job": job_id, "state": job.state, "attempts": job.attempts, "last_error": job.last_error}

    return web


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    create_app(sys.argv[1] if len(sys.argv) > 1 else "data").run(use_reloader=False)
