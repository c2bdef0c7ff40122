"""Tasks: functions whose calls can be put into a queue and are made by a worker.

>>> app = App(":memory:")
>>> @app.task(queue="mail", priority=7)
... def send(to: str, body: str = "hello") -> None:
...     print("mail to", to)
>>> send("ada@example.org")  # still just calls
mail to ada@example.org
>>> job_id = send.enqueue("bob@example.org", body="hi")
>>> app.broker.get(job_id).json()
{'args': ['bob@example.org'], 'kwargs': {'body': 'hi'}}
>>> app.close()

A job of a task is an ordinary job: the header ``rivetq-task`` names the task, the payload is the JSON of the arguments,
so any program that can enqueue can call a task. `rivetq.worker` has what runs them.
"""

from ..schedules import every  # so that an app's module imports from here alone
from . import pickling as pickling  # a task can be pickled from now on
from .app import App
from .current import CurrentJob, current_job
from .outcomes import Outcome, Reject, Retry, Snooze
from .task import TASK_HEADER, Arguments, Call, Options, Task

__all__ = [
    "TASK_HEADER",
    "App",
    "Arguments",
    "Call",
    "CurrentJob",
    "Options",
    "Outcome",
    "Reject",
    "Retry",
    "Snooze",
    "Task",
    "current_job",
    "every",
]
