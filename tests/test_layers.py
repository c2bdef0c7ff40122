"""The floors of the house: a file imports only from those above it. The list is the architecture (docs/design.md)."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import rivetq

PACKAGE = Path(rivetq.__file__).parent
FLOORS = [
    # words
    "errors", "model", "events", "clock", "histogram", "engine",
    # pure
    "backoff", "ratelimit", "entry", "run", "window", "keys", "state", "machine", "decide",
    "fields", "codec", "values", "record",
    # files
    "io", "ahead", "owner", "segment", "log", "index", "recovery", "backup",
    # engines
    "group", "notifier", "live", "memory", "local", "salvage", "view",
    # public
    "arguments", "broker", "aio", "__init__", "tools", "__main__",
]  # fmt: skip
EXTRAS = [
    "texts", "typedjson", "schedules", "tasks", "logs", "pools", "children", "turns", "worker", "metrics", "otel",
    "settings", "cli",
]  # fmt: skip
"""Above the house: they import public names of `rivetq` and each other, and what their extra brings."""
TESTING = {
    "testing/tasks",
    "testing/__init__",
    "testing/clock",
    "testing/disk",
    "testing/plugin",
    "testing/conformance",
}
PURE = set(FLOORS[FLOORS.index("backoff") : FLOORS.index("io")])
DEPENDENCIES = {"attrs", "crc32c", "lmdb", "sortedcontainers"}
IO_MODULES = {"os", "io", "time", "threading", "socket", "fcntl", "shutil", "pathlib", "logging"}


def imports(path: Path) -> list[tuple[int, str]]:
    """(level, module) of every import in a file that happens at run time; level 0 is absolute."""
    found: list[tuple[int, str]] = []
    tree = ast.parse(path.read_text())
    for node in tree.body:
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            node.body = []  # a job's queue has a type, and nothing is called there
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(0, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            names = [module] if module else [alias.name for alias in node.names]
            found += [(node.level, name) for name in names]
    return found


def test_every_file_has_its_floor() -> None:
    files = {str(path.relative_to(PACKAGE).with_suffix("")) for path in PACKAGE.rglob("*.py")}
    assert files == {*FLOORS, *EXTRAS, *TESTING}


def test_a_file_imports_only_from_the_floors_above_it() -> None:
    for number, name in enumerate(FLOORS):
        for level, module in imports(PACKAGE / f"{name}.py"):
            if level:
                assert module in FLOORS[:number], f"{name} imports {module}, which is not above it"


def test_an_extra_imports_public_names_and_extras_above_it() -> None:
    for number, name in enumerate(EXTRAS):
        for level, module in imports(PACKAGE / f"{name}.py"):
            if level:
                assert module in {*EXTRAS[:number], "aio", "tools", "testing.tasks"}, f"{name} imports {module}"
        for node in ast.walk(ast.parse((PACKAGE / f"{name}.py").read_text())):
            if isinstance(node, ast.ImportFrom) and node.module == "rivetq":
                private = {alias.name for alias in node.names} - {*rivetq.__all__, "__version__"}
                assert not private, f"{name} imports {private}, which is not public"


def test_the_testing_kit_imports_public_files_only() -> None:
    for name in TESTING:
        for level, module in imports(PACKAGE / f"{name}.py"):
            if level == 2:
                assert module in {"broker", "model", "clock", *EXTRAS}, f"{name} imports {module}"


def test_the_core_depends_on_four_libraries_and_the_standard_one() -> None:
    for name in FLOORS:
        for level, module in imports(PACKAGE / f"{name}.py"):
            top = module.partition(".")[0]
            assert level or top in DEPENDENCIES or top in sys.stdlib_module_names, f"{name} imports {module}"


def test_importing_rivetq_loads_little() -> None:
    """Why `benchmarks/import_time.py` shows a short time: an engine is loaded when it is opened."""
    code = "import sys; before = set(sys.modules); import rivetq; print(*sorted(set(sys.modules) - before))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    outside = {name.partition(".")[0] for name in loaded} - sys.stdlib_module_names
    assert outside <= {"rivetq", "attr", "attrs"}
    assert not {"asyncio", "multiprocessing", "logging", "rivetq.local", "rivetq.tasks"} & set(loaded)


def test_the_pure_floor_knows_no_clock_no_files_and_no_threads() -> None:
    for name in PURE:
        for level, module in imports(PACKAGE / f"{name}.py"):
            assert level or module.partition(".")[0] not in IO_MODULES, f"{name} imports {module}"
