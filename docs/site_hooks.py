"""For mkdocs: pages outside of docs/ become pages of the site, and files that pages link to become a part of it.

The pages are written for the repository, where `../tests/test_kill.py` is a file beside docs/. In the site it is
`source/tests/test_kill.py`. The README is the first page.
"""

from __future__ import annotations

import os
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "CONTRIBUTING.md", "CHANGELOG.md": "CHANGELOG.md"}
"""Pages of the repository's root, and where they are in the site."""
LINK = re.compile(r"(\]\()([^)\s]+)(\))")
FENCED = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)


def on_files(files: Files, config: Any) -> Files:
    """Add what is not in docs/."""
    pages = [(file.src_uri, f"docs/{file.src_uri}") for file in files.documentation_pages()]
    for source, target in PAGES.items():
        files.append(File.generated(config, target, content=(ROOT / source).read_text()))
        pages.append((target, source))
    for _, source in pages:
        for link in LINK.finditer((ROOT / source).read_text()):
            linked = _linked(source, link[2])
            if linked is not None and not linked.startswith("docs/") and linked not in PAGES:
                target = f"source/{linked}"
                if files.get_file_from_path(target) is None:
                    files.append(File.generated(config, target, content=(ROOT / linked).read_text()))
    return files


def on_page_markdown(markdown: str, page: Page, config: Any, files: Files) -> str:
    """Let links lead to where things are in the site."""
    here = page.file.src_uri
    source = next((name for name, target in PAGES.items() if target == here), f"docs/{here}")

    def moved(link: re.Match[str]) -> str:
        linked = _linked(source, link[2])
        if linked is None:
            return link[0]
        target = PAGES.get(linked) or (
            linked.removeprefix("docs/") if linked.startswith("docs/") else f"source/{linked}"
        )
        _, hash_, anchor = link[2].partition("#")
        return f"{link[1]}{posixpath.relpath(target, posixpath.dirname(here))}{hash_}{anchor}{link[3]}"

    # Not in blocks of code, which every second part is.
    return "".join(part if n % 2 else LINK.sub(moved, part) for n, part in enumerate(FENCED.split(markdown)))


def _linked(source: str, link: str) -> str | None:
    """The file of the repository that a link of one of its files leads to; None: it leads elsewhere."""
    path = link.partition("#")[0]
    if not path or "://" in link or link.startswith("mailto:"):
        return None
    found = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
    return found if not found.startswith("..") and os.path.isfile(ROOT / found) else None
