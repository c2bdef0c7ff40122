"""Servers of peers: started for the benchmark, on a socket in the file system, and stopped whatever happens.

Only processes that were started here are ever signalled, by their id. A server has a time to come up and a time to go
down; after the second it is killed. On Linux the kernel ends it should this process be killed itself.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

START_S = 20.0
STOP_S = 10.0
MOST_SERVERS = 12  # alive at a time; more than this would be a leak
PR_SET_PDEATHSIG = 1

_alive: set[Server] = set()


class Server:
    """A child process that answers when `ready` says so.

    `user`: whose rights it gets when this process is root's (some servers refuse to run as root). `start_s`: how long
    it may take until it is ready.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        directory: Path,
        ready: Callable[[], bool],
        user: str | None = None,
        stop_signal: signal.Signals = signal.SIGTERM,
        start_s: float = START_S,
    ) -> None:
        if len(_alive) >= MOST_SERVERS:
            raise RuntimeError(f"{len(_alive)} servers are alive already")
        self._name = Path(command[0]).name
        self._log = directory / "server.log"
        self._stop_signal = stop_signal
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=directory,
                start_new_session=True,  # a Ctrl-C is for the benchmark, which then stops its servers in order
                preexec_fn=die_with_parent if sys.platform == "linux" else None,
                **as_user(user),
            )
        _alive.add(self)
        try:
            self._wait(ready, start_s)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Ends when the process is gone. May be repeated."""
        if self._process.poll() is None:
            self._process.send_signal(self._stop_signal)
            try:
                self._process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self._process.pid, signal.SIGKILL)  # the group that it leads
                self._process.wait()
        _alive.discard(self)

    def _wait(self, ready: Callable[[], bool], start_s: float) -> None:
        until = time.monotonic() + start_s
        while not ready():
            if self._process.poll() is not None:
                raise RuntimeError(f"{self._name} ended with {self._process.returncode}: {self._last_words()}")
            if time.monotonic() > until:
                raise RuntimeError(f"{self._name} did not answer within {start_s:.0f} s: {self._last_words()}")
            time.sleep(0.005)

    def _last_words(self) -> str:
        lines = [line for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        return " | ".join(lines[-3:]) or "it said nothing"


def stop_all() -> None:
    for server in list(_alive):
        server.stop()


atexit.register(stop_all)


def die_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def as_user(user: str | None) -> dict[str, Any]:
    """Arguments for Popen; none for the user that this process has already."""
    return {} if user is None else {"user": user, "group": pwd.getpwnam(user).pw_gid, "extra_groups": []}


def socket_directory(owner: str | None = None) -> Path:
    """A short path (a socket's may have 107 bytes), for sockets alone; the data lie where the disk is measured."""
    path = Path(tempfile.mkdtemp(prefix="rqb-"))
    if owner is not None:
        shutil.chown(path, owner)
    return path
