"""beanstalkd: reserve with a time to run, delete; no batches. Each queue has a server of its own.

`-f 0` syncs its log at each write, `-F` never. A job belongs to the connection that reserved it.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from contestants import CALL_PATIENCE_S, Abilities, Contestant, Leases, PerThread, Queue, installed, needed, program
from servers import Server, socket_directory

LONGEST_WAIT_S = CALL_PATIENCE_S / 2
SERVER = ("beanstalkd", "beanstalkd")  # program, package


class BeanstalkQueue(Queue):
    def __init__(self, path: Path, *, durable: bool) -> None:
        greenstalk = needed("greenstalk", package="greenstalk")
        self._timed_out = greenstalk.TimedOutError
        self._sockets = socket_directory()
        address = self._sockets / "s"
        command = [program(SERVER[0], package=SERVER[1]), "-l", f"unix:{address}", "-b", str(path)]
        command += ["-f", "0"] if durable else ["-F"]
        self._server = Server(command, directory=path, ready=address.exists)

        def connect() -> Any:
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            connection.settimeout(CALL_PATIENCE_S)
            connection.connect(str(address))
            return greenstalk.Client(connection, encoding=None)

        self._clients = PerThread(connect)

    def enqueue(self, payload: bytes) -> None:
        self._clients.get().put(payload)

    def enqueue_many(self, payloads: Sequence[bytes]) -> None:
        client = self._clients.get()
        for payload in payloads:
            client.put(payload)

    def lease(self, max_jobs: int, wait_s: float = 0) -> Sequence[Any]:
        if max_jobs != 1:
            raise NotImplementedError("beanstalkd reserves one job at a time")
        try:  # it counts in whole seconds
            return [self._clients.get().reserve(timeout=max(1, int(min(wait_s, LONGEST_WAIT_S))) if wait_s else 0)]
        except self._timed_out:
            return []

    def ack(self, deliveries: Sequence[Any]) -> None:
        client = self._clients.get()
        for delivery in deliveries:
            client.delete(delivery)

    def payload(self, delivery: Any) -> bytes:
        payload: bytes = delivery.body
        return payload

    def close(self) -> None:
        for client in self._clients.take_all():
            client.close()
        self._server.stop()
        shutil.rmtree(self._sockets, ignore_errors=True)


class Beanstalkd(Contestant):
    name = "beanstalkd"
    title = "beanstalkd"
    abilities = Abilities(Leases.TIMEOUT, enqueue_batches=False, lease_batches=False)
    settings = "-b with -f 0 / -F, unix socket, a connection a thread, consumers wait in reserve"

    def open(self, *, waiting: bool = False) -> BeanstalkQueue:
        return BeanstalkQueue(self.place(), durable=self.durable)

    @classmethod
    def version(cls) -> str:
        needed("greenstalk", package="greenstalk")
        path = program(SERVER[0], package=SERVER[1])
        said = subprocess.run([path, "-v"], check=True, stdout=subprocess.PIPE, text=True, timeout=10).stdout
        return f"{said.strip()}, greenstalk {installed('greenstalk')}"
