"""The documentation holds: its programs run, its links lead somewhere, and it knows every public name."""

from __future__ import annotations

import logging
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import rivetq
from rivetq.settings import FIELDS

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
PROGRAMS = [
    ROOT / "README.md",
    *(
        ROOT / "docs" / f"{name}.md"
        for name in (
            "tutorial", "tasks", "workers", "schedules", "asyncio", "testing", "outbox", "web-frameworks",
            "configuration", "command-line", "coming-from",
        )
    ),
]  # fmt: skip
WHERE_NAMES_ARE_EXPLAINED = [ROOT / "docs" / name for name in ("glossary.md", "tutorial.md", "guarantees.md")]

FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ +(.+)$", re.MULTILINE)


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def python_blocks(page: Path) -> Iterator[tuple[int, str]]:
    """(first line, source) of each ```python block."""
    text = page.read_text()
    for block in FENCED.finditer(text):
        if block[1] == "python":
            yield text.count("\n", 0, block.start(2)) + 1, block[2]


def without_code(text: str) -> str:
    return re.sub(r"`[^`\n]*`", "", FENCED.sub("", text))


def anchors(page: Path) -> set[str]:
    """What the headings of a page are called in links to them."""
    headings = HEADING.findall(FENCED.sub("", page.read_text()))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PROGRAMS, ids=name_of)
def test_the_programs_of_a_page_run_in_order(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "__main__"}
    blocks = list(python_blocks(page))
    assert blocks, f"{name_of(page)} has no ```python block"
    for line, source in blocks:
        # Empty lines in front, so that a traceback names the line of the page.
        exec(compile("\n" * (line - 1) + source, str(page), "exec"), namespace)


def test_the_first_example_prints_what_the_readme_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (_, source), _ = python_blocks(ROOT / "README.md")
    exec(source, {})
    assert capsys.readouterr().out == "mail to bob@example.org\nmail to ada@example.org\n2 mails sent\n"
    exec(source, {})
    assert capsys.readouterr().out == "mail to bob@example.org\n3 mails sent\n"


def test_the_second_example_prints_the_more_urgent_letter_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    _, (_, source) = python_blocks(ROOT / "README.md")
    exec(source, {"__name__": "__main__"})
    assert capsys.readouterr().out == "letter to bob@example.org at once\nletter to ada@example.org in time\n"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_within_the_repository_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(without_code(page.read_text())):
        if "://" in target or target.startswith("mailto:"):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), f"{name_of(page)}: {target} does not exist"
        assert linked.is_relative_to(ROOT), f"{name_of(page)}: {target} leads out of the repository"
        if anchor:
            assert anchor in anchors(linked), f"{name_of(page)}: {target}: there is no such heading"


def test_every_page_can_be_reached_from_the_readme() -> None:
    reached: set[Path] = set()
    waiting = [ROOT / "README.md"]
    while waiting:
        page = waiting.pop()
        if page in reached:
            continue
        reached.add(page)
        for target in LINK.findall(without_code(page.read_text())):
            path = (page.parent / target.partition("#")[0]).resolve()
            if path.suffix == ".md" and path.is_file():
                waiting.append(path)
    assert set(PAGES) <= reached


@pytest.mark.parametrize("name", rivetq.__all__)
def test_every_public_name_is_explained(name: str) -> None:
    pages = "\n".join(page.read_text() for page in WHERE_NAMES_ARE_EXPLAINED)
    assert re.search(rf"\b{name}\b", pages) or (getattr(rivetq, name).__doc__ or "").strip()


@pytest.mark.parametrize("name", [name for name in rivetq.__all__ if isinstance(getattr(rivetq, name), type)])
def test_every_public_method_says_what_it_does(name: str) -> None:
    cls = getattr(rivetq, name)
    silent = [
        attribute
        for attribute, value in vars(cls).items()
        if not attribute.startswith("_") and callable(value) and not (getattr(value, "__doc__", None) or "").strip()
    ]
    # Those of the system's clock do what the protocol says.
    assert not silent or cls is rivetq.SystemClock, f"{name}: no docstring on {', '.join(silent)}"


def test_every_promise_names_its_tests() -> None:
    """Each fault that is covered, and each paragraph of what is promised, links to a test that is there."""
    page = (ROOT / "docs" / "guarantees.md").read_text()
    faults = page.partition("## Faults that are covered")[2].partition("\n## ")[0]
    rows = [line for line in faults.splitlines() if line.startswith("| ")][1:]
    promises = page.partition("## What is promised")[2].partition("\n## ")[0]
    paragraphs = [text for text in promises.split("\n\n") if text.strip().startswith("**")]
    assert len(rows) >= 8
    assert len(paragraphs) >= 10
    for claim in rows + paragraphs:
        assert re.search(r"\]\(\.\./(tests|src/rivetq/testing)/[\w/]+\.py\)", claim), f"no test for: {claim[:80]}"


def test_every_setting_is_in_the_table_with_its_default() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text()
    table = page.partition("## Settings\n")[2].partition("\n## ")[0]
    rows = {row[1]: row[2] for row in re.finditer(r"^\| `(\w+)` \| (.*?) \| .+ \|$", table, re.MULTILINE)}
    assert list(rows) == list(FIELDS)
    for name, text in rows.items():
        field = FIELDS[name]
        if text == "the number of processors":
            assert field.default == (os.cpu_count() or 1), name
        elif text == "none":
            assert field.default is None, name
        else:  # as a file or the environment says it
            assert field.metadata["parser"](text.strip("`")) == field.default, name


def test_the_examples_of_the_command_line_work_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("click", reason="the extra cli is not installed")
    from click.testing import CliRunner

    from rivetq import cli

    page = ROOT / "docs" / "command-line.md"
    [(_, source)] = python_blocks(page)
    (tmp_path / "shop.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "shop", raising=False)
    for name in [name for name in os.environ if name.startswith("RIVETQ_")]:
        monkeypatch.delenv(name)
    shown = [shlex.split(line) for line in re.findall(r"^\$ rivetq (.*)$", page.read_text(), re.MULTILINE)]
    root, worker = logging.getLogger(), logging.getLogger("rivetq")
    before = [(logger, logger.handlers[:], logger.level, logger.propagate) for logger in (root, worker)]
    try:
        for arguments in shown:
            result = CliRunner().invoke(cli.main, arguments)
            assert result.exit_code == 0, f"rivetq {shlex.join(arguments)}: {result.output}"
    finally:
        for logger, handlers, level, propagates in before:  # `worker` has set up logging
            logger.handlers[:], logger.level, logger.propagate = handlers, level, propagates
        monkeypatch.delitem(sys.modules, "shop", raising=False)
    assert {arguments[0] for arguments in shown} == set(cli.main.commands), "a command has no example"


def test_the_picture_of_the_house_is_drawn_from_the_code() -> None:
    """`python docs/picture.py` draws it anew."""
    done = subprocess.run([sys.executable, "docs/picture.py", "--check"], cwd=ROOT, check=False)
    assert done.returncode == 0, "run: python docs/picture.py"
