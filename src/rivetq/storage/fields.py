"""What records and index values are made of: numbers, texts, the options of a job. Little-endian.

What is read has passed a checksum first, so a decoding that fails means a damaged checksum or a newer writer: callers
turn any of NONSENSE into a ValueError.
"""

from __future__ import annotations

import struct
from functools import lru_cache
from typing import Any

from ..model import RetryPolicy

COUNT = struct.Struct("<I")
_JITTERS = ("full", "equal", "none")
_JITTER_NUMBERS = {name: number for number, name in enumerate(_JITTERS)}
NONSENSE = (struct.error, LookupError, TypeError, AttributeError, RecursionError, OverflowError)
"""What bytes that passed their checksum and mean nothing can raise on the way; callers see a ValueError."""


def spec_numbers(max_attempts: int | None, visibility_ms: int | None, retry: RetryPolicy) -> tuple[Any, ...]:
    """0 stands for "no end", -1 for "not set"."""
    return (
        max_attempts or 0,
        -1 if visibility_ms is None else visibility_ms,
        retry.max_attempts or 0,
        retry.base,
        retry.factor,
        retry.max_delay,
        _JITTER_NUMBERS[retry.jitter],
    )


_SPEC = struct.Struct("<iqidddB")
_packed: tuple[RetryPolicy, int | None, int | None, bytes] = (RetryPolicy(), 0, 0, b"")


def spec_bytes(max_attempts: int | None, visibility_ms: int | None, retry: RetryPolicy) -> bytes:
    """`spec_numbers`, packed. From one enqueue to the next they are nearly always the same."""
    global _packed
    known = _packed
    if known[0] is retry and known[1] == max_attempts and known[2] == visibility_ms:
        return known[3]
    data = _SPEC.pack(*spec_numbers(max_attempts, visibility_ms, retry))
    _packed = (retry, max_attempts, visibility_ms, data)
    return data


@lru_cache(maxsize=1024)
def policy(max_attempts: int, base: float, factor: float, max_delay: float, jitter: int) -> RetryPolicy:
    return RetryPolicy(
        max_attempts=max_attempts or None, base=base, factor=factor, max_delay=max_delay, jitter=_jitter(jitter)
    )


def _jitter(number: int) -> Any:
    return _JITTERS[number]


def text_bytes(text: str | None) -> bytes:
    if text is None:
        return b"\xff\xff\xff\xff"
    data = text.encode()
    return COUNT.pack(len(data)) + data


class Reader:
    """A position in a body."""

    __slots__ = ("at", "body")

    def __init__(self, body: bytes) -> None:
        self.body = body
        self.at = 0

    def take(self, layout: struct.Struct) -> tuple[Any, ...]:
        values = layout.unpack_from(self.body, self.at)
        self.at += layout.size
        return values

    def column(self, layout: str) -> tuple[Any, ...]:
        return self.take(struct.Struct(layout))

    def ids(self) -> list[int]:
        (n,) = self.take(COUNT)
        return list(self.column(f"<{n}Q"))

    def data(self, size: int) -> bytes:
        if self.at + size > len(self.body):
            raise IndexError(f"{size} bytes at {self.at} of {len(self.body)}")
        self.at += size
        return self.body[self.at - size : self.at]

    def skip(self, size: int) -> int:
        """Pass over `size` bytes; returns where they begin."""
        if self.at + size > len(self.body):
            raise IndexError(f"{size} bytes at {self.at} of {len(self.body)}")
        self.at += size
        return self.at - size

    def text(self) -> str | None:
        (size,) = self.take(COUNT)
        return None if size == 0xFFFFFFFF else self.data(size).decode()
