"""The law of the house: which room may import which, and inside a room which file (docs/design.md, "The rooms")."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections.abc import Collection, Iterator
from pathlib import Path

import pytest

import rivetq

PACKAGE = Path(rivetq.__file__).parent
ROOMS: dict[str, list[str]] = {
    "words": ["errors", "model", "clock", "histogram", "engine"],
    "machine": [
        "__init__", "backoff", "ratelimit", "events", "queue", "entry", "run", "window", "waiting", "keys", "snapshot",
        "machine", "decide",
    ],
    "storage": [
        "__init__", "disk", "layout", "lock", "fields", "codec", "index_values", "record", "header", "segment", "space",
        "log", "index", "recovery", "backup", "ahead", "group_commit",
    ],
    "engines": ["__init__", "notifier", "live", "memory", "local", "view"],
    "broker": ["__init__", "arguments", "broker"],
    "face": ["aio", "__init__"],
    "tools": ["salvage", "repair", "__init__"],
    "commands": ["__main__"],
}  # fmt: skip
"""The spine, from the ground up: a file imports from the rooms before its own, and from the files before it in its own.

A room is a folder; "words", "face" and "commands" are files beside the folders.
"""
WINGS: dict[str, list[str]] = {
    "texts": [],
    "typedjson": [],
    "schedules": ["scheduler", "__init__"],
    "tasks": ["outcomes", "current", "task", "running", "under_test", "app", "pickling", "__init__"],
    "logs": [],
    "worker": ["pools", "children", "order", "worker", "__init__"],
    "metrics": [],
    "otel": [],
    "settings": [],
    "cli": [],
}
"""Who runs and shows: they import the wings before them, the public names of `rivetq`, `aio`, `tools` and `testing`."""
PUBLIC = {"__init__", "aio", "tools.__init__", "testing.__init__"}
TESTING = {"__init__", "clock", "disk", "plugin", "conformance", "tasks"}
TOP = {"words", "face", "commands"}
PURE = {"machine"} | {f"storage.{name}" for name in ("fields", "codec", "index_values", "record", "header")}
DEPENDENCIES = {"attrs", "crc32c", "lmdb", "sortedcontainers"}
IO_MODULES = {"os", "io", "time", "threading", "socket", "fcntl", "shutil", "pathlib", "logging"}
PUBLIC_PATHS = [
    "rivetq", "rivetq.__main__", "rivetq.aio", "rivetq.cli", "rivetq.logs", "rivetq.metrics", "rivetq.otel",
    "rivetq.schedules", "rivetq.settings", "rivetq.tasks", "rivetq.testing", "rivetq.testing.conformance",
    "rivetq.testing.plugin", "rivetq.testing.tasks", "rivetq.tools", "rivetq.typedjson", "rivetq.worker",
]  # fmt: skip


def module_of(path: Path) -> str:
    """Below `rivetq`, as "machine.run"."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


MODULES = {module_of(path): path for path in PACKAGE.rglob("*.py")}


def spine() -> Iterator[str]:
    for room, files in ROOMS.items():
        for file in files:
            yield file if room in TOP else f"{room}.{file}"


def wings() -> Iterator[str]:
    for wing, files in WINGS.items():
        yield from (f"{wing}.{file}" for file in files) if files else (wing,)


def nodes(path: Path) -> Iterator[ast.AST]:
    """Of all that happens at run time."""
    tree = ast.parse(path.read_text())
    for node in tree.body:
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            node.body = []  # a job's queue has a type, and nothing is called there
    yield from ast.walk(tree)


def imports(module: str) -> Iterator[tuple[str, str]]:
    """(module of ours, name) of each import of our own at run time."""
    package = module.split(".")[:-1]
    for node in nodes(MODULES[module]):
        if not isinstance(node, ast.ImportFrom):
            continue
        parts = node.module.split(".") if node.module else []
        if node.level:
            parts = package[: len(package) - node.level + 1] + parts
        elif parts[0] == "rivetq":
            parts = parts[1:]
        else:
            continue
        for alias in node.names:
            for found in ([*parts, alias.name], [*parts, alias.name, "__init__"], parts, [*parts, "__init__"]):
                if (name := ".".join(found)) in MODULES:
                    yield name, alias.name
                    break
            else:
                raise AssertionError(f"{module} imports {alias.name} from {'.'.join(parts)}, which is not there")


def others(module: str) -> Iterator[str]:
    """Packages that are not ours."""
    for node in nodes(MODULES[module]):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            yield node.module.partition(".")[0]


def breaks(order: list[str], more: Collection[str] = ()) -> list[str]:
    """Imports of files that do not come before in the order."""
    return [
        f"{module} imports {name} from {found}"
        for at, module in enumerate(order)
        for found, name in imports(module)
        if found not in {*order[:at], *more}
    ]


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
    allowed = {*PUBLIC, *wings(), *(f"testing.{name}" for name in TESTING), "broker.broker", "model", "clock"}
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
