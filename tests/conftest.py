"""Shared by all tests: reproducible randomness, and the options of the longer hunts."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import HealthCheck, settings

from rivetq.tasks import App

# No test depends on how busy the machine is.
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # As under `nohup make test &`. The programs that tests start would inherit it, and Ctrl-C is what they test.
    signal.signal(signal.SIGINT, signal.default_int_handler)

collect_ignore = ["typed", "worker_child.py"]
"""Programs for type checkers, and one that is run with arguments."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--cycles", type=int, default=0, help="cycles of kill -9; 0: what `make test` does of them")
    parser.addoption("--every-byte", action="store_true", help="three mutations of every byte, every cut: `make rot`")


class Extent(NamedTuple):
    """How much of the rot a run looks at."""

    mutations: int
    """Of each byte that is looked at."""
    step: int
    """Where a slice will do, one byte in so many; multiplied by the test."""


@pytest.fixture
def app() -> Iterator[App]:
    """An open one, in memory."""
    with App(":memory:") as app:
        yield app


@pytest.fixture(scope="session")
def extent(request: pytest.FixtureRequest) -> Extent:
    return Extent(3, 0) if request.config.getoption("--every-byte") else Extent(1, 1)


@pytest.fixture
def file_system(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Makes an empty file system of a size ("6m"). Skips where nothing can be mounted."""
    mounted: list[Path] = []

    def mount(size: str) -> Path:
        if os.getuid():
            pytest.skip("mounting a file system needs root")
        place = tmp_path / f"file system of {size}"
        place.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(place)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"a file system cannot be mounted here: {done.stderr.strip()}")
        mounted.append(place)
        return place

    yield mount
    for place in mounted:
        subprocess.run(["umount", "--lazy", str(place)], check=True)
