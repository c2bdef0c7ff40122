"""Texts of others in messages: on one line, without control characters, of a bounded length."""

from __future__ import annotations

import pytest

from rivetq.texts import cut, escaped, quoted, shown


@pytest.mark.parametrize(
    ("text", "there"),
    [
        ("plain [bold]text[/bold] äß€", "plain [bold]text[/bold] äß€"),
        ("\x1b[2J\r\n\t\0\x7f", r"\x1b[2J\r\n\t\x00\x7f"),
        ("\x9b31m", r"\x9b31m"),
        ("a\u2028b\u202ec\u200bd", r"a\u2028b\u202ec\u200bd"),
        ("\ud800", r"\ud800"),
        (r"C:\new", r"C:\new"),
    ],
)
def test_what_cannot_be_printed_is_there_as_an_escape(text: str, there: str) -> None:
    assert escaped(text) == shown(text) == there
    assert there.isprintable()


def test_what_is_to_be_kept_is_kept() -> None:
    assert escaped("a\tb\nc", keep="\t") == "a\tb\\nc"


@pytest.mark.parametrize("length", [0, 9, 10, 11, 12, 1000])
def test_a_long_text_keeps_its_beginning_and_its_end(length: int) -> None:
    text = "".join(chr(ord("a") + n % 26) for n in range(length))
    found = cut(text, 10)
    if length <= 10:
        assert found == text
    else:
        assert found == f"{text[:5]} ({length - 10} characters left out) {text[-5:]}"


def test_a_mebibyte_of_control_characters_is_a_short_line() -> None:
    for found in (shown("\n" * 2**20, 100), quoted("\n" * 2**20, 100), quoted(["\n" * 2**20], 100)):
        assert len(found) < 200
        assert found.isprintable()
