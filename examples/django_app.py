"""A Django project in one file: a view enqueues when its database transaction is committed; a worker runs beside it.

The task is given the id of a row, not the row, and looks at the database itself. `transaction.on_commit` sees to it
that the row is there by then, and that a transaction that is rolled back enqueues nothing.

    pip install rivetq django
    python examples/django_app.py        # keeps its files in ./data, or in $SIGNUP_DIRECTORY

    curl -d email=ada@example.org http://127.0.0.1:8000/signup    # 202 {"signup": 1}
    curl http://127.0.0.1:8000/signups/1                          # {"signup": 1, "welcomed": false}, then true

The limit: the commit and the enqueue are two steps. A process that dies between them leaves a row that no job will ever
work on; so does an enqueue that fails, because the disk is full say. Where that must not happen, write the wish to
enqueue into the same transaction as the row: outbox.py shows how.

One process owns a directory: one server process with threads, and no reloader.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import django  # type: ignore[import-untyped]  # here and below: Django ships no types
from django.conf import settings  # type: ignore[import-untyped]
from django.core.exceptions import ValidationError  # type: ignore[import-untyped]
from django.core.management import call_command  # type: ignore[import-untyped]
from django.db import close_old_connections, connection, models, transaction  # type: ignore[import-untyped]
from django.http import HttpRequest, JsonResponse  # type: ignore[import-untyped]
from django.shortcuts import get_object_or_404  # type: ignore[import-untyped]
from django.urls import path  # type: ignore[import-untyped]

from rivetq import RetryPolicy
from rivetq.tasks import App, CurrentJob
from rivetq.worker import Worker

DIRECTORY = Path(os.environ.get("SIGNUP_DIRECTORY", "data"))
settings.configure(
    ALLOWED_HOSTS=["127.0.0.1", "localhost", "testserver"],
    DATABASES={
        "default": {
            "ENGINE": "django.db.backends.sqlite3",
            "NAME": DIRECTORY / "signups.sqlite3",
            "OPTIONS": {"transaction_mode": "IMMEDIATE"},  # views and worker write at the same time: they take turns
        }
    },
    DEFAULT_AUTO_FIELD="django.db.models.BigAutoField",
    ROOT_URLCONF=__name__,
    USE_TZ=True,
)
django.setup()
jobs = App(DIRECTORY / "jobs")


class Signup(models.Model):  # type: ignore[misc]
    email = models.EmailField(unique=True)
    welcomed = models.BooleanField(default=False)

    class Meta:
        app_label = "signup"


@jobs.around
def own_connection(job: CurrentJob) -> Iterator[None]:
    """Django closes connections at the end of a request. A job is none, so its thread has to."""
    close_old_connections()
    try:
        yield
    finally:
        close_old_connections()


@jobs.task(queue="mail", retry=RetryPolicy(max_attempts=5))
def welcome(signup_id: int) -> None:
    """A job may come twice, so it looks first whether it has been done."""
    signup = Signup.objects.get(pk=signup_id)
    if not signup.welcomed:
        print("welcome mail to", signup.email)
        Signup.objects.filter(pk=signup_id).update(welcomed=True)


def signup(request: HttpRequest) -> JsonResponse:
    try:
        with transaction.atomic():
            row, is_new = Signup.objects.get_or_create(email=request.POST.get("email", ""))
            if is_new:
                transaction.on_commit(partial(welcome.enqueue, row.pk))
            row.full_clean()  # what it raises takes back the row, and the enqueue with it
    except ValidationError as error:
        return JsonResponse(error.message_dict, status=400)
    return JsonResponse({"signup": row.pk}, status=202)


def state(request: HttpRequest, signup_id: int) -> JsonResponse:
    row = get_object_or_404(Signup, pk=signup_id)
    return JsonResponse({"signup": row.pk, "welcomed": row.welcomed})


urlpatterns = [path("signup", signup), path("signups/<int:signup_id>", state)]


def create_tables() -> None:
    """A project of several files has migrations instead."""
    DIRECTORY.mkdir(parents=True, exist_ok=True)
    if Signup._meta.db_table not in connection.introspection.table_names():
        with connection.schema_editor() as editor:
            editor.create_model(Signup)


if __name__ == "__main__":
    create_tables()
    with jobs, Worker(jobs, concurrency=2, grace=10):  # stopped, then closed, when the server ends by Ctrl-C
        call_command("runserver", "127.0.0.1:8000", use_reloader=False)
