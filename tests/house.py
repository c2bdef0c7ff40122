"""The plan of the house, its law, and its measures.

    python tests/house.py        circles, imports upwards, the longest files and functions

Exit status 1 if there is a circle or an import upwards. `tests/test_layers.py` holds the law in detail.
"""

from __future__ import annotations

import ast
import statistics
import sys
from collections.abc import Collection, Iterator
from pathlib import Path

import rivetq

PACKAGE = Path(rivetq.__file__).parent
ROOMS: dict[str, list[str]] = {
    "words": ["errors", "units", "model", "clock", "histogram", "engine"],
    "machine": [
        "__init__", "backoff", "ratelimit", "events", "queue", "entry", "columns", "run", "window", "waiting", "keys",
        "snapshot",
        "transitions",
        "cache", "machine", "sessions", "apply_enqueued", "apply", "advance", "look",
        "decide", "commit", "saving", "check",
    ],
    "storage": [
        "__init__", "disk", "layout", "lock", "fields", "answers", "record", "header", "codec", "index_values",
        "segment", "space", "log", "index", "recovery", "backup", "ahead", "group_commit",
    ],
    "engines": [
        "__init__", "notifier", "lessees", "clockwork", "looking", "leasing", "live", "memory", "durable",
        "checkpoint", "compaction", "local", "view",
    ],
    "broker": ["__init__", "arguments", "requests", "transaction", "broker"],
    "face": ["aio", "__init__"],
    "tools": ["directory", "salvage", "dumping", "looking", "verifying", "repair", "commands", "__init__"],
    "commands": ["__main__"],
}  # fmt: skip
"""The spine, from the ground up: a file imports from the rooms before its own, and from the files before it in its own.

A room is a folder; "words", "face" and "commands" are files beside the folders.
"""
WINGS: dict[str, list[str]] = {
    "texts": [],
    "typedjson": [],
    "schedules": ["when", "scheduler", "__init__"],
    "tasks": ["outcomes", "current", "task", "running", "under_test", "app", "pickling", "__init__"],
    "logs": [],
    "worker": [
        "pools",
        "children",
        "order",
        "options",
        "held",
        "queues",
        "limits",
        "fetcher",
        "settler",
        "renewer",
        "worker",
        "__init__",
    ],
    "metrics": [],
    "otel": [],
    "settings": [],
    "cli": [
        "showing",
        "command",
        "looking",
        "changing",
        "repairing",
        "working",
        "measuring",
        "__init__",
        "__main__",
    ],
}
"""Who runs and shows: they import the wings before them, the public names of `rivetq`, `aio`, `tools` and `testing`."""
PUBLIC = {"__init__", "aio", "engine", "tools.__init__", "testing.__init__", "units"}
SUITE = [
    "answers", "closing", "enqueue", "expiry", "keys", "lease", "limits", "looking", "queues", "retries",
    "transactions", "values", "waiting",
]  # fmt: skip
TESTING = [
    "clock", "disk", "__init__", "plugin", "tasks",
    "conformance.shared", *(f"conformance.{part}" for part in SUITE), "conformance.__init__",
]  # fmt: skip
TOP = {"words", "face", "commands"}
PURE = {"machine"} | {f"storage.{name}" for name in ("fields", "codec", "index_values", "record", "header")}
DEPENDENCIES = {"attrs", "crc32c", "lmdb", "sortedcontainers"}
LONG, LONG_FUNCTION = 500, 60
"""Lines. A longer file says in its first docstring why "the file is long"; there is no longer function."""
IO_MODULES = {"os", "io", "time", "threading", "socket", "fcntl", "shutil", "pathlib", "logging"}


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


def nodes(path: Path, for_types: bool = False) -> Iterator[ast.AST]:
    """Of all that happens at run time."""
    tree = ast.parse(path.read_text())
    for node in tree.body:
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            node.body = node.body if for_types else []
    yield from ast.walk(tree)


def imports(module: str, *, for_types: bool = False) -> Iterator[tuple[str, str]]:
    """(module of ours, name) of each import of our own at run time."""
    package = module.split(".")[:-1]
    for node in nodes(MODULES[module], for_types):
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


def circles() -> list[set[str]]:
    """Files that import each other, directly or not; imports for types count, too."""
    reach = {module: {found for found, _ in imports(module, for_types=True)} - {module} for module in MODULES}
    for middle in MODULES:
        for module in MODULES:
            if middle in reach[module]:
                reach[module] |= reach[middle]
    found = {frozenset(other for other in reach[module] if module in reach[other]) for module in MODULES}
    return [set(circle) for circle in found if circle]


def functions() -> Iterator[tuple[int, str]]:
    """(lines, name) of each function, nested ones in those around them."""
    for module, path in MODULES.items():
        if module.startswith("testing.conformance"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None:
                yield node.end_lineno - node.lineno + 1, f"{module}.{node.name}"


def head_of(module: str) -> str:
    """The first docstring of a file."""
    return ast.get_docstring(ast.parse(MODULES[module].read_text())) or ""


def main() -> None:
    files = sorted(((len(path.read_text().splitlines()), module) for module, path in MODULES.items()), reverse=True)
    lengths = sorted(functions(), reverse=True)
    count = sum(1 for module in MODULES for _ in imports(module))
    short = sum(length < 40 for length, _ in lengths) / len(lengths)
    upwards = breaks([*spine()]) + breaks([*wings()], PUBLIC)
    print(f"files: {len(files)}, lines: {sum(length for length, _ in files):,}, imported names: {count}")
    print("longest files:", ", ".join(f"{module} {length}" for length, module in files[:8]))
    print(f"functions: {len(lengths):,}, median {statistics.median(length for length, _ in lengths):.0f} lines")
    print("longest functions:", ", ".join(f"{name} {length}" for length, name in lengths[:5]))
    print(f"functions under 40 lines: {short:.1%}")
    unexplained = [module for length, module in files if length > LONG and "file is long" not in head_of(module)]
    print(f"files above {LONG} lines without a reason: {len(unexplained)}", *unexplained)
    print(f"functions above {LONG_FUNCTION} lines:", sum(length > LONG_FUNCTION for length, _ in lengths))
    print(f"circles: {len(circles())}", *circles())
    print(f"imports upwards: {len(upwards)}", *upwards)
    sys.exit(bool(circles() or upwards))


if __name__ == "__main__":
    main()
