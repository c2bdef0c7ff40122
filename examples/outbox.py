"""The outbox pattern: a row in your own database and a job in RivetQ, both or neither, wherever the process dies.

An order is written in one transaction of the database together with a row of the table `outbox`, which says what is to
be enqueued. A relay enqueues these rows in their order, each with its id as idempotency key, and deletes it afterwards.

- Dead before the commit: no order, no outbox row, no job.
- Dead between commit and enqueue: the row is there, and the next relay enqueues it.
- Dead between enqueue and delete: the next relay enqueues it again, and the key makes that the job that is there.

The limit: a key stands until its job has ended and `idempotency_ttl` is over, 24 hours by default. A relay that comes
back to a row later than that makes a second job. So begin a program with a relay, and set the time for longer outages:
`broker.configure_queue("orders", idempotency_ttl=timedelta(days=30))`.

    python examples/outbox.py

It runs a program that takes two orders in a process that dies at its first step, then in one that dies at the second,
and so on. After each it relays what is left, and compares the orders with the jobs.
"""

from __future__ import annotations

import itertools
import os
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from rivetq.tasks import App

DIED = 70
"""Exit status of a process that died as it was told."""
SCHEMA = """
CREATE TABLE IF NOT EXISTS orders (id INTEGER PRIMARY KEY, item TEXT NOT NULL);
-- AUTOINCREMENT: SQLite gives the id of a deleted row to a new one otherwise, and the key of the job before would stand
CREATE TABLE IF NOT EXISTS outbox (id INTEGER PRIMARY KEY AUTOINCREMENT, order_id INTEGER NOT NULL);
"""
Step = Callable[[str], object]
"""Told what has been done; in this demonstration the place to die."""

jobs = App("data")


def go_on(step: str) -> None:
    """Does nothing, which is what a program does between its steps."""


@jobs.task(queue="orders")
def ship(order_id: int) -> None:
    print("order", order_id, "is shipped")


def open_database(directory: Path) -> sqlite3.Connection:
    database = sqlite3.connect(directory / "orders.sqlite3")
    database.executescript(SCHEMA)
    return database


def place_order(database: sqlite3.Connection, item: str, step: Step = go_on) -> None:
    """Both rows or none."""
    with database:
        order_id = database.execute("INSERT INTO orders (item) VALUES (?)", (item,)).lastrowid
        step("order written")
        database.execute("INSERT INTO outbox (order_id) VALUES (?)", (order_id,))
        step("outbox row written")
    step("committed")


def relay(database: sqlite3.Connection, step: Step = go_on) -> None:
    """Enqueue what waits in the outbox. After each commit, at the start of the program, and now and then."""
    for row_id, order_id in database.execute("SELECT id, order_id FROM outbox ORDER BY id").fetchall():
        step("outbox row read")
        ship.options(idempotency_key=f"outbox-{row_id}").enqueue(order_id)
        step("enqueued")  # durable from here on, so the row is not needed any more
        with database:
            database.execute("DELETE FROM outbox WHERE id = ?", (row_id,))
        step("outbox row deleted")


def take_two_orders(directory: Path, step: Step = go_on) -> None:
    """The program: what an earlier process left behind comes first."""
    database = open_database(directory)
    try:
        relay(database, step)
        for item in ("lamp", "table"):
            place_order(database, item, step)
        relay(database, step)
    finally:
        database.close()


def account(directory: Path) -> tuple[list[int], list[int]]:
    """Relay what is left; the orders there are, and the orders that the waiting jobs are for, oldest first."""
    database = open_database(directory)
    try:
        relay(database)
        orders = [order_id for (order_id,) in database.execute("SELECT id FROM orders ORDER BY id")]
    finally:
        database.close()
    return orders, [job.json()["args"][0] for job in jobs.broker.jobs("orders")]


def die_at(number: int) -> Step:
    """Ends the process, with nothing tidied up, at the step of that number."""
    steps = itertools.count(1)

    def step(name: str) -> None:
        if next(steps) == number:
            print(name, flush=True)
            os._exit(DIED)

    return step


def demonstrate() -> None:
    for number in itertools.count(1):
        with tempfile.TemporaryDirectory(prefix="rivetq-outbox-") as place:
            command = [sys.executable, __file__, place, str(number)]
            child = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
            jobs.use(Path(place) / "jobs")
            with jobs:
                orders, enqueued = account(Path(place))
        where = f"died at step {number}: {child.stdout.strip()}" if child.returncode else "did not die"
        print(f"{where:35} orders {orders}, jobs for {enqueued}")
        if child.returncode not in (0, DIED) or orders != enqueued:
            sys.exit("FAILED: each order has one job, that is the rule")
        if child.returncode == 0:
            return


if __name__ == "__main__":
    if len(sys.argv) > 2:
        jobs.use(Path(sys.argv[1]) / "jobs")
        with jobs:
            take_two_orders(Path(sys.argv[1]), die_at(int(sys.argv[2])))
    else:
        demonstrate()
