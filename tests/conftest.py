"""Shared by all tests: reproducible randomness, and the options of the longer hunts."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--cycles", type=int, default=100, help="cycles of kill -9 in test_kill.py")
