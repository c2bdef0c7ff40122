"""Texts that others wrote, in messages, log lines and tables: without control characters, and not too long.

A program that may enqueue chooses names of queues, headers and payloads, and what an exception says is often made of
these. Printed as they are they could write whole lines of their own into a log, drive a terminal, or fill a disk.

>>> print(shown("red\\x1b[31m\\nand more"))
red\\x1b[31m\\nand more
"""

from __future__ import annotations

NAME_CHARS = 200
"""Of a name in a message."""
ERROR_CHARS = 4000
"""Of what an error says, in the message of another and in a log line; about what is kept with a job."""
MESSAGE_CHARS = 2**16
"""Of what an error of a handler says, before the broker keeps 4 KiB of it."""


def escaped(text: str, keep: str = "") -> str:
    """What cannot be printed is there as in Python's `repr`: control characters, turns of the writing direction, lone
    surrogates. A backslash stays as it is: this is to be read by people, and is not to be turned back."""
    if text.isprintable():
        return text
    return "".join([c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text])


def cut(text: str, most: int) -> str:
    """Its beginning and its end, if it is longer than `most` characters."""
    if len(text) <= most:
        return text
    return f"{text[: most // 2]} ({len(text) - most} characters left out) {text[len(text) - most + most // 2 :]}"


def shown(text: str, most: int = ERROR_CHARS) -> str:
    """On one line, and of this length about at most."""
    return cut(escaped(cut(text, most)), most)


def quoted(value: object, most: int = NAME_CHARS) -> str:
    """A value as `repr` shows it, and of this length about at most. Any value, since it may be wrong."""
    try:
        return cut(repr(cut(value, most) if isinstance(value, str) else value), most)
    except Exception as trouble:  # an int of more digits than Python prints, say
        return f"<{type(value).__name__}: its text cannot be made: {type(trouble).__name__}>"
