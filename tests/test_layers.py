"""The law of the house: which room may import which, and inside a room which file (docs/design.md, "The rooms")."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
from house import (
    DEPENDENCIES,
    IO_MODULES,
    LONG,
    LONG_FUNCTION,
    MODULES,
    PUBLIC,
    PURE,
    TESTING,
    breaks,
    circles,
    functions,
    head_of,
    imports,
    others,
    spine,
    wings,
)

import rivetq

PUBLIC_PATHS = [
    "rivetq", "rivetq.__main__", "rivetq.aio", "rivetq.cli", "rivetq.engine", "rivetq.logs", "rivetq.metrics",
    "rivetq.otel", "rivetq.schedules", "rivetq.settings", "rivetq.tasks", "rivetq.testing",
    "rivetq.testing.conformance", "rivetq.testing.plugin", "rivetq.testing.tasks", "rivetq.tools",
    "rivetq.typedjson", "rivetq.worker",
]  # fmt: skip


def test_every_file_has_its_place() -> None:
    assert MODULES.keys() == {*spine(), *wings(), *(f"testing.{name}" for name in TESTING)}


def test_the_spine_imports_downwards_only() -> None:
    assert breaks(list(spine())) == []


def test_a_wing_imports_public_names_and_the_wings_before_it() -> None:
    assert breaks(list(wings()), PUBLIC) == []
    for module in wings():
        for found, name in imports(module):
            assert found != "__init__" or name in {*rivetq.__all__, "__version__"}, f"{module} imports {name}"


def test_the_testing_kit_imports_public_files_only() -> None:
    allowed = {*PUBLIC, *wings(), *(f"testing.{name}" for name in TESTING), "broker.broker", "clock", "model", "units"}
    for file in TESTING:
        for found, name in imports(f"testing.{file}"):
            assert found in allowed, f"testing.{file} imports {name} from {found}"


def test_a_break_of_the_law_is_seen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    climbing = tmp_path / "run.py"
    climbing.write_text("from ..storage.log import Log\nfrom .machine import Machine\n")
    monkeypatch.setitem(MODULES, "machine.run", climbing)
    assert breaks(list(spine())) == [
        "machine.run imports Log from storage.log",
        "machine.run imports Machine from machine.machine",
    ]


def test_there_is_no_circle_not_even_of_types(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert circles() == []
    below = tmp_path / "queue.py"
    below.write_text("if TYPE_CHECKING:\n    from .entry import Entry\n")
    monkeypatch.setitem(MODULES, "machine.queue", below)
    assert circles() == [{"machine.queue", "machine.entry"}]


@pytest.mark.parametrize("path", PUBLIC_PATHS)
def test_a_public_path_can_be_imported(path: str) -> None:
    importlib.import_module(path)


def test_the_core_depends_on_four_libraries_and_the_standard_one() -> None:
    for module in spine():
        for package in others(module):
            assert package in {*DEPENDENCIES, *sys.stdlib_module_names}, f"{module} imports {package}"


def test_importing_rivetq_loads_little() -> None:
    """Why `benchmarks/import_time.py` shows a short time: an engine is loaded when it is opened."""
    code = "import sys; before = set(sys.modules); import rivetq; print(*sorted(set(sys.modules) - before))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    outside = {name.partition(".")[0] for name in loaded} - sys.stdlib_module_names
    assert outside <= {"rivetq", "attr", "attrs"}
    assert not {"asyncio", "multiprocessing", "logging", "rivetq.engines", "rivetq.tasks"} & set(loaded)


def test_the_pure_files_know_no_clock_no_disk_and_no_threads() -> None:
    for module in spine():
        if module in PURE or module.partition(".")[0] in PURE:
            for package in others(module):
                assert package not in IO_MODULES, f"{module} imports {package}"


def test_long_files_say_why_and_no_function_is_long() -> None:
    files = [module for module, path in MODULES.items() if len(path.read_text().splitlines()) > LONG]
    assert [module for module in files if "file is long" not in head_of(module)] == []
    assert [name for length, name in functions() if length > LONG_FUNCTION] == []
