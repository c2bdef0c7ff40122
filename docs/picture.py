"""Draws docs/house.svg: the rooms of the source from `tests/house.py`, and the way of one enqueue and one lease.

    python docs/picture.py            draw it
    python docs/picture.py --check    exit status 1 if the file is not what would be drawn now

A step of a way names a file and something that is defined there; one that is not there ends the drawing.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from html import escape
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from house import MODULES, ROOMS, WINGS  # noqa: E402

OUT = ROOT / "docs" / "house.svg"
WIDTH, LEFT, RIGHT, GAP, LINE, PAD = 1000, 92, 700, 12, 16, 12
CHARS = 80
"""That fit into a line of a room."""
SAID = {
    "words": "what everything is said in",
    "machine": "what is true: no clock, no files, no threads",
    "storage": "what is on disk",
    "engines": "both, behind one seam",
    "broker": "checks, fills in, delegates",
    "face": "what you import",
}
WAYS = {
    "enqueue": [
        ("broker", "requests.enqueue", "check what the caller says, fill in the rest"),
        ("engines", "live._commit", "take the lock, let the clock act"),
        ("machine", "commit.decide_commit", "decide: events, or an error and nothing"),
        ("storage", "codec.encode_record", "to bytes, and into the buffer of the log"),
        ("machine", "apply.apply", "the job is there; who waits for it is woken"),
        ("storage", "group_commit.wait", "the lock is free; one sync for all who wait"),
    ],
    "lease": [
        ("broker", "requests.take", "from which queues, how many, for how long"),
        ("engines", "leasing._attempt", "take the lock, let the clock act"),
        ("machine", "decide.lease", "the most urgent jobs, tokens, deadlines"),
        ("machine", "apply.apply", "they are leased"),
        ("storage", "log.read_many", "the lock is free; payloads that are not in memory"),
        ("broker", "requests.leases_of", "leases with deadlines of the caller's clock"),
    ],
}
STYLE = """
  .page { fill: #ffffff } .room { fill: #f4f6f8; stroke: #c8d0d8 } .wing { fill: #fbf7ef; stroke: #ddd0b4 }
  text { font: 13px system-ui, sans-serif; fill: #1d2733 } .name { font-weight: 600 } .said { fill: #5b6875 }
  .file { font: 11.5px ui-monospace, monospace } .enqueue { fill: #1f6fb2 } .lease { fill: #b2561f }
  .way { fill: none; stroke-width: 2 }
  .way.enqueue { stroke: #1f6fb2; fill: none } .way.lease { stroke: #b2561f; fill: none }
  .number { font: 600 11px system-ui, sans-serif; fill: #ffffff; text-anchor: middle }
  @media (prefers-color-scheme: dark) {
    .page { fill: #14191f } .room { fill: #1e262e; stroke: #3a4652 } .wing { fill: #29251c; stroke: #54492f }
    text { fill: #e3e9ef } .said { fill: #9aa7b4 } .enqueue { fill: #5aa9e6 } .lease { fill: #e6945a }
    .way.enqueue { stroke: #5aa9e6 } .way.lease { stroke: #e6945a } .number { fill: #14191f }
  }
"""


def lines_of(files: list[str], chars: int) -> list[str]:
    lines = [""]
    for file in files:
        if len(lines[-1]) + len(file) > chars:
            lines.append("")
        lines[-1] += f"{file}  "
    return lines


def check(room: str, step: str) -> None:
    """The step is in the code."""
    file, name = step.split(".")
    tree = ast.parse(MODULES[f"{room}.{file}"].read_text())
    if not any(isinstance(node, ast.FunctionDef) and node.name == name for node in ast.walk(tree)):
        raise SystemExit(f"docs/picture.py: there is no {name} in {room}/{file}.py")


def box(kind: str, x: float, y: float, width: float, height: float) -> str:
    return f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="6"/>'


def text(kind: str, x: float, y: float, words: str) -> str:
    return f'<text class="{kind}" x="{x:g}" y="{y:g}" xml:space="preserve">{escape(words.rstrip())}</text>'


def rooms(middles: dict[str, float]) -> Iterator[str]:
    """The spine, the top first; notes the middle of each room."""
    y = float(GAP)
    for room in ("face", "broker", "engines", "storage", "machine", "words"):
        files = [{"__init__": "rivetq"}.get(file, file) for file in ROOMS[room] if file != "__init__" or room == "face"]
        lines = lines_of(files, CHARS)
        height = 2 * PAD + LINE * (1 + len(lines))
        yield box("room", LEFT, y, RIGHT - LEFT - GAP, height)
        title = room if room in ("words", "face") else f"{room}/"
        yield text("name", LEFT + PAD, y + PAD + 12, title)
        yield text("said", LEFT + PAD + 84, y + PAD + 12, SAID[room])
        for n, line in enumerate(lines, 1):
            yield text("file", LEFT + PAD, y + PAD + 12 + LINE * n, line)
        middles[room] = y + height / 2
        y += height + GAP
    middles["end"] = y


def wings(end: float) -> Iterator[str]:
    found = [(f"{wing}/", [f for f in files if not f.startswith("__")]) for wing, files in WINGS.items() if files]
    found += [("", [wing for wing, files in WINGS.items() if not files]), ("tools/", ROOMS["tools"][:-1])]
    found += [("testing/", ["clock", "disk", "plugin", "conformance/"])]
    sizes = [(title, lines_of(files, 36)) for title, files in found]
    y = float(GAP)
    for title, lines in sizes:
        height = 2 * PAD - 6 + LINE * (len(lines) + bool(title))
        yield box("wing", RIGHT, y, WIDTH - RIGHT - GAP, height)
        for n, line in enumerate([*([title] if title else []), *lines]):
            yield text("name" if title and not n else "file", RIGHT + PAD, y + PAD + 9 + LINE * n, line)
        y += height + 6
    assert y <= end + 400, "the wings are higher than the rooms"


def ways(middles: dict[str, float]) -> Iterator[str]:
    """The steps as numbers beside the rooms, and in words below."""
    y = middles["end"] + 8
    for column, (way, steps) in enumerate(WAYS.items()):
        x = 20 + 44 * column
        seen: dict[str, int] = {}
        points = []
        for room, step, _ in steps:
            check(room, step)
            points.append((x + 10, middles[room] + 22 * seen.get(room, 0) - 11))
            seen[room] = seen.get(room, 0) + 1
        yield f'<polyline class="way {way}" points="{" ".join(f"{px:g},{py:g}" for px, py in points)}"/>'
        for n, (px, py) in enumerate(points, 1):
            yield f'<circle class="{way}" cx="{px:g}" cy="{py:g}" r="9"/>'
            yield text("number", px, py + 4, str(n))
        left = 20 + 490 * column
        yield text(f"name {way}", left, y + 14, f"one {way}")
        for n, (room, step, said) in enumerate(steps, 1):
            yield text(f"name {way}", left, y + 18 + 32 * n, str(n))
            yield text("", left + 18, y + 18 + 32 * n, said)
            yield text("file said", left + 18, y + 32 + 32 * n, f"{room}/{step.replace('.', '  ')}")


def draw() -> str:
    middles: dict[str, float] = {}
    parts = [*rooms(middles)]
    parts += [*wings(middles["end"]), *ways(middles)]
    height = middles["end"] + 60 + 32 * 6
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}" role="img" '
            f'aria-label="The rooms of the source, and the way of one enqueue and one lease">',
            f"<style>{STYLE}</style>",
            f'<rect class="page" width="{WIDTH}" height="{height:g}"/>',
            *parts,
            "</svg>\n",
        ]
    )


def main() -> None:
    drawn = draw()
    if "--check" in sys.argv:
        sys.exit(not OUT.exists() or OUT.read_text() != drawn)
    OUT.write_text(drawn)


if __name__ == "__main__":
    main()
