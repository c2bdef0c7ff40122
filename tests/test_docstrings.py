"""The examples in docstrings run, and every public name of the runtime's modules says what it does."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
from types import ModuleType

import pytest

import rivetq

NAMES = sorted(
    name
    for _, name, _ in pkgutil.walk_packages(rivetq.__path__, "rivetq.")
    if name not in ("rivetq.testing.conformance", "rivetq.testing.plugin", "rivetq.__main__")
)
PUBLIC = [
    "aio",
    "tasks",
    "worker",
    "schedules",
    "typedjson",
    "settings",
    "tools",
    "testing.tasks",
    "logs",
    "metrics",
    "otel",
]


def load(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except (ImportError, SystemExit) as error:
        pytest.skip(f"{name} needs an extra: {error}")


@pytest.mark.parametrize("name", ["rivetq", *NAMES])
def test_the_examples_of_a_module_run(name: str, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert doctest.testmod(load(name)).failed == 0


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_of_the_runtime_says_what_it_does(name: str) -> None:
    module = load(f"rivetq.{name}")
    silent = []
    handed_on = getattr(module, "__all__", ())
    seen = 0
    for attribute, value in vars(module).items():
        is_own = not attribute.startswith("_") and getattr(value, "__module__", None) == module.__name__
        if not is_own and attribute not in handed_on:
            continue
        seen += 1
        if (inspect.isclass(value) or inspect.isfunction(value)) and not (value.__doc__ or "").strip():
            silent.append(attribute)
        if inspect.isclass(value) and not getattr(value, "_is_protocol", False):
            for inner, method in vars(value).items():
                if inspect.isfunction(method) and not inner.startswith("_") and not (method.__doc__ or "").strip():
                    silent.append(f"{attribute}.{inner}")
    assert silent == []
    assert seen
