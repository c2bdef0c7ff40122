"""Redis: a stream with a consumer group, which is its queue with leases.

XADD puts in, XREADGROUP delivers (a consumer that dies leaves its jobs to XAUTOCLAIM, by their idle time), XACK and
XDEL in one round trip settle. Batches are pipelines in MULTI; with `appendfsync always` the server syncs once for
all the commands that it has read together. Each queue has a server of its own, on a socket in the file system.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from contestants import (
    CALL_PATIENCE_S,
    QUEUE,
    Abilities,
    Contestant,
    Leases,
    PerThread,
    Queue,
    installed,
    needed,
    program,
)
from servers import Server, socket_directory

GROUP = "workers"
LONGEST_WAIT_S = CALL_PATIENCE_S / 2
SERVER = ("redis-server", "redis-server")  # program, package


class RedisQueue(Queue):
    def __init__(self, path: Path, *, durable: bool) -> None:
        redis = needed("redis", package="redis")
        self._sockets = socket_directory()
        socket = self._sockets / "s"
        command = [program(SERVER[0], package=SERVER[1]), "--port", "0", "--unixsocket", str(socket)]
        command += ["--dir", str(path)]
        command += ["--appendonly", "yes", "--appendfsync", "always" if durable else "no", "--save", ""]
        self._server = Server(command, directory=path, ready=socket.exists)
        self._ids = iter(range(1, 1_000_000))

        def connect() -> tuple[Any, str]:
            client = redis.Redis(
                unix_socket_path=str(socket), protocol=2, socket_timeout=CALL_PATIENCE_S, single_connection_client=True
            )
            return client, f"worker-{next(self._ids)}"

        self._clients = PerThread(connect)
        self._clients.get()[0].xgroup_create(QUEUE, GROUP, id="0", mkstream=True)

    def enqueue(self, payload: bytes) -> None:
        self._clients.get()[0].xadd(QUEUE, {"p": payload})

    def enqueue_many(self, payloads: Sequence[bytes]) -> None:
        with self._clients.get()[0].pipeline(transaction=True) as pipeline:
            for payload in payloads:
                pipeline.xadd(QUEUE, {"p": payload})
            pipeline.execute()

    def lease(self, max_jobs: int, wait_s: float = 0) -> Sequence[Any]:
        client, worker = self._clients.get()
        block_ms = max(1, int(min(wait_s, LONGEST_WAIT_S) * 1000)) if wait_s else None
        found = client.xreadgroup(GROUP, worker, {QUEUE: ">"}, count=max_jobs, block=block_ms)
        deliveries: list[Any] = found[0][1] if found else []
        return deliveries

    def ack(self, deliveries: Sequence[Any]) -> None:
        # XACK alone settles, all at once; XDEL after it only frees the memory. So they need no transaction around them.
        ids = [delivery[0] for delivery in deliveries]
        with self._clients.get()[0].pipeline(transaction=False) as pipeline:
            pipeline.xack(QUEUE, GROUP, *ids)
            pipeline.xdel(QUEUE, *ids)
            acked, _ = pipeline.execute()
        if acked != len(ids):
            raise LookupError("a delivery was lost")

    def payload(self, delivery: Any) -> bytes:
        payload: bytes = delivery[1][b"p"]
        return payload

    def close(self) -> None:
        for client, _ in self._clients.take_all():
            client.close()
        self._server.stop()
        shutil.rmtree(self._sockets, ignore_errors=True)


class RedisStreams(Contestant):
    name = "redis"
    title = "Redis"
    abilities = Abilities(Leases.TIMEOUT)
    settings = (
        "a stream with a consumer group (XADD, XREADGROUP, XACK + XDEL), batches in MULTI pipelines, appendonly, "
        "appendfsync always / no, unix socket, a connection a thread, consumers wait in BLOCK"
    )

    def open(self, *, waiting: bool = False) -> RedisQueue:
        return RedisQueue(self.place(), durable=self.durable)

    @classmethod
    def version(cls) -> str:
        needed("redis", package="redis[hiredis]")
        path = program(SERVER[0], package=SERVER[1])
        said = subprocess.run([path, "--version"], check=True, stdout=subprocess.PIPE, text=True, timeout=10).stdout
        release = next((word[2:] for word in said.split() if word.startswith("v=")), "of unknown version")
        return f"{os.path.basename(path)} {release}, redis-py {installed('redis')}, hiredis {installed('hiredis')}"
