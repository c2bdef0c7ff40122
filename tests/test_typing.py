"""The public types as users meet them: mypy --strict and pyright accept what is right and reject what is wrong."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM, MISTAKES = (Path(__file__).parent / "typed" / name for name in ("program.py", "mistakes.py"))


def mypy(path: Path, tmp_path: Path) -> dict[int, str]:
    """Complaints by line."""
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", f"--cache-dir={tmp_path}", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode in (0, 1), done.stderr
    return {int(line): text for line, text in re.findall(r"^[^:\n]+:(\d+): error: (.*)$", done.stdout, re.MULTILINE)}


def pyright(path: Path, tmp_path: Path) -> dict[int, str]:
    shutil.copy(path, tmp_path)
    (tmp_path / "pyrightconfig.json").write_text(json.dumps({"typeCheckingMode": "strict", "include": [path.name]}))
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable, "-p", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["summary"]["filesAnalyzed"] == 1
    errors = [each for each in found["generalDiagnostics"] if each["severity"] == "error"]
    return {each["range"]["start"]["line"] + 1: each["message"] for each in errors}


@pytest.mark.parametrize("check", [mypy, pyright])
def test_a_program_that_is_right_is_accepted(check: object, tmp_path: Path) -> None:
    assert callable(check)
    assert check(PROGRAM, tmp_path) == {}


@pytest.mark.parametrize("check", [mypy, pyright])
def test_each_mistake_is_rejected_and_nothing_else(check: object, tmp_path: Path) -> None:
    assert callable(check)
    lines = MISTAKES.read_text().splitlines()
    wrong = [number for number, line in enumerate(lines, 1) if line.endswith("# wrong")]
    assert sorted(check(MISTAKES, tmp_path)) == wrong
