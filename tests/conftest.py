"""Shared by all tests: reproducible randomness, and the options of the longer hunts."""

from __future__ import annotations

from typing import NamedTuple

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--cycles", type=int, default=100, help="cycles of kill -9 in test_kill.py")
    parser.addoption("--every-byte", action="store_true", help="three mutations of every byte, every cut: `make rot`")


class Extent(NamedTuple):
    """How much of the rot a run looks at."""

    mutations: int
    """Of each byte that is looked at."""
    step: int
    """Where a slice will do, one byte in so many; multiplied by the test."""


@pytest.fixture(scope="session")
def extent(request: pytest.FixtureRequest) -> Extent:
    return Extent(3, 0) if request.config.getoption("--every-byte") else Extent(1, 1)
