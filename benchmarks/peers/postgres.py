"""PostgreSQL: a table, `FOR UPDATE SKIP LOCKED`, fenced by a token; the same queue as the one on SQLite.

One cluster for the mode, made here and gone with it; `synchronous_commit` on or off. A connection a thread, prepared
statements, binary parameters, batches in one statement. Where consumers wait, an enqueue notifies (LISTEN / NOTIFY);
at full speed it does not, since that would only cost it. VACUUM ANALYZE runs between rounds, beside its autovacuum.
"""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from contestants import (
    BUSY_POLL_S,
    CALL_PATIENCE_S,
    Abilities,
    Contestant,
    Leases,
    PerThread,
    Queue,
    SkippedError,
    installed,
    needed,
    polled,
    program,
)
from servers import Server, as_user, socket_directory

USER = "bench"
UNPRIVILEGED = ("postgres", "nobody")  # who runs the server if this process is root's, which it refuses
PLACES = "/usr/lib/postgresql"
SETTINGS = {
    "listen_addresses": "",
    "shared_buffers": "256MB",
    "wal_level": "minimal",
    "max_wal_senders": "0",
    "max_wal_size": "4GB",
    "checkpoint_timeout": "15min",
    "max_connections": "100",
    "jit": "off",
    # A new table has no statistics, and a plan that sorts it for each lease would be no fair one.
    "enable_seqscan": "off",
    "enable_bitmapscan": "off",
}
SCHEMA = """
CREATE TABLE {table} (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    priority smallint NOT NULL DEFAULT 5,
    leased boolean NOT NULL DEFAULT false,
    due_ms bigint NOT NULL,
    token bigint NOT NULL DEFAULT 0,
    payload bytea NOT NULL
);
CREATE INDEX ON {table} (priority DESC, id) WHERE NOT leased;
CREATE INDEX ON {table} (due_ms) WHERE leased;
"""
LEASE = """
UPDATE {table} SET leased = true, due_ms = %b, token = token + 1 WHERE id = ANY (ARRAY(
    SELECT id FROM {table} WHERE NOT leased AND due_ms <= %b ORDER BY priority DESC, id LIMIT {max_jobs}
    FOR UPDATE SKIP LOCKED
)) RETURNING id, token, payload
"""
ENQUEUE = "INSERT INTO {table} (due_ms, payload) VALUES (%b, %b)"
ENQUEUE_MANY = "INSERT INTO {table} (due_ms, payload) SELECT %b, unnest(%b::bytea[])"
NOTIFYING = "WITH new AS ({insert} RETURNING 1) SELECT pg_notify('{table}', '') FROM new LIMIT 1"
ACK = "DELETE FROM {table} WHERE id = %b AND token = %b"
ACK_MANY = """
DELETE FROM {table} USING unnest(%b::bigint[], %b::bigint[]) AS settled (id, token)
WHERE {table}.id = settled.id AND {table}.token = settled.token
"""
VISIBILITY_MS = 30_000


class PostgresQueue(Queue):
    def __init__(self, dsn: str, table: str, *, durable: bool, waiting: bool) -> None:
        psycopg = needed("psycopg", package="psycopg[binary]")
        options = f"-c synchronous_commit={'on' if durable else 'off'} -c statement_timeout={CALL_PATIENCE_S:.0f}s"
        self._table = table
        self._waiting = waiting

        def connect() -> Any:
            connection = psycopg.connect(dsn, autocommit=True, prepare_threshold=0, options=options)
            if waiting:
                connection.execute(f"LISTEN {table}")
            return connection

        self._connections = PerThread(connect)
        self._connections.get().execute(SCHEMA.format(table=table), prepare=False)
        insert, insert_many = ENQUEUE.format(table=table), ENQUEUE_MANY.format(table=table)
        self._enqueue = NOTIFYING.format(insert=insert, table=table) if waiting else insert
        self._enqueue_many = NOTIFYING.format(insert=insert_many, table=table) if waiting else insert_many
        self._ack, self._ack_many = ACK.format(table=table), ACK_MANY.format(table=table)

    def enqueue(self, payload: bytes) -> None:
        self._connections.get().execute(self._enqueue, (now_ms(), payload))

    def enqueue_many(self, payloads: Sequence[bytes]) -> None:
        self._connections.get().execute(self._enqueue_many, (now_ms(), list(payloads)))

    def lease(self, max_jobs: int, wait_s: float = 0) -> Sequence[Any]:
        if not wait_s or (found := self._look(max_jobs)):
            return found if wait_s else self._look(max_jobs)
        if not self._waiting:
            return polled(lambda: self._look(max_jobs), wait_s, BUSY_POLL_S)
        connection, until = self._connections.get(), time.perf_counter() + wait_s
        while not found and (left_s := until - time.perf_counter()) > 0:
            for _ in connection.notifies(timeout=left_s, stop_after=1):
                pass
            found = self._look(max_jobs)
        return found

    def ack(self, deliveries: Sequence[Any]) -> None:
        connection = self._connections.get()
        if len(deliveries) == 1:
            cursor = connection.execute(self._ack, deliveries[0][:2])
        else:
            ids, tokens = ([delivery[n] for delivery in deliveries] for n in (0, 1))
            cursor = connection.execute(self._ack_many, (ids, tokens))
        if cursor.rowcount != len(deliveries):
            raise LookupError("a lease was lost")

    def payload(self, delivery: Any) -> bytes:
        return bytes(delivery[2])

    def tidy(self) -> None:
        self._connections.get().execute(f"VACUUM (ANALYZE) {self._table}", prepare=False)

    def close(self) -> None:
        for connection in self._connections.take_all():
            connection.close()

    def _look(self, max_jobs: int) -> list[Any]:
        now = now_ms()
        lease = LEASE.format(table=self._table, max_jobs=max_jobs)
        rows: list[Any] = self._connections.get().execute(lease, (now + VISIBILITY_MS, now), binary=True).fetchall()
        return rows


class Postgres(Contestant):
    name = "postgres"
    title = "PostgreSQL"
    abilities = Abilities(Leases.TIMEOUT)
    settings = (
        "FOR UPDATE SKIP LOCKED, synchronous_commit on / off, shared_buffers 256 MB, wal_sync_method by default, unix "
        "socket, a connection a thread, batches by unnest, consumers wait in LISTEN. With synchronous_commit off a "
        "crash of the server itself can lose the last 0.6 s"
    )

    def __init__(self, directory: Path, *, durable: bool) -> None:
        super().__init__(directory, durable=durable)
        needed("psycopg", package="psycopg[binary]")
        initdb, postgres = binary("initdb"), binary("postgres")
        owner = server_user()
        data = directory / "cluster"
        data.mkdir(mode=0o700)
        if owner is not None:
            shutil.chown(data, owner)
        made = subprocess.run(
            [initdb, "-D", str(data), "-U", USER, "-A", "trust", "-E", "UTF8", "--no-sync", "--no-locale"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd="/",
            text=True,
            timeout=60,
            **as_user(owner),
        )
        if made.returncode:
            raise SkippedError(f"initdb as {owner or 'this user'}: {' '.join(made.stdout.splitlines()[-2:])}")
        self._sockets = socket_directory(owner)
        command = [postgres, "-D", str(data), "-k", str(self._sockets)]
        command += [word for name, value in SETTINGS.items() for word in ("-c", f"{name}={value}")]
        self._dsn = f"host={self._sockets} user={USER} dbname=postgres"
        self._server = Server(command, directory=directory, ready=self._answers, user=owner, stop_signal=signal.SIGINT)

    def open(self, *, waiting: bool = False) -> PostgresQueue:
        self._queues += 1
        return PostgresQueue(self._dsn, f"jobs_{self._queues}", durable=self.durable, waiting=waiting)

    @classmethod
    def version(cls) -> str:
        needed("psycopg", package="psycopg[binary]")
        binary("initdb")
        said = subprocess.run(
            [binary("postgres"), "--version"], check=True, stdout=subprocess.PIPE, text=True, timeout=10
        ).stdout
        server_user()
        return f"{said.partition('(PostgreSQL)')[2].split()[0]}, psycopg {installed('psycopg')}"

    def close(self) -> None:
        self._server.stop()
        shutil.rmtree(self._sockets, ignore_errors=True)

    def _answers(self) -> bool:
        psycopg = needed("psycopg", package="psycopg[binary]")
        try:
            psycopg.connect(self._dsn, connect_timeout=2).close()
        except psycopg.OperationalError:
            return False
        return True


def binary(name: str) -> str:
    """Debian keeps the server's programs off PATH, in a directory for each release: the newest one."""
    releases = sorted(Path(PLACES).glob("*/bin"), key=lambda place: float(place.parent.name), reverse=True)
    return program(name, package="postgresql", places=[str(place / name) for place in releases])


def server_user() -> str | None:
    if os.geteuid() != 0:
        return None
    for user in UNPRIVILEGED:
        try:
            pwd.getpwnam(user)
        except KeyError:
            continue
        return user
    raise SkippedError("the server refuses to run as root, and there is no other user to run it as")


def now_ms() -> int:
    return time.time_ns() // 1_000_000
