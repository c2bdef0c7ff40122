"""Frames: what is written comes back, and nothing else passes for a frame."""

from __future__ import annotations

import pytest
from crc32c import crc32c

from rivetq.storage.record import (
    ALIGN,
    HEADER,
    HEADER_BYTES,
    MAX_BODY_BYTES,
    SALT_AT,
    Frame,
    body_of,
    decode_frame,
    encode_frame,
    frame_bytes,
    mask,
)

SALT = 0x5EED5A17
BODY = b"eleven long"


def frame_of(body: bytes = BODY, lsn: int = 7, salt: int = SALT, previous: int = 0xABCD, durable_lsn: int = 5) -> bytes:
    return encode_frame(body, lsn, salt, previous, durable_lsn)[0]


def seal_header(length: int, salt: int = SALT) -> bytes:
    """A header of any length whose checksum is right for an empty body."""
    fields = HEADER.pack(0, length, 1, salt, 0, 0)[4:]
    return mask(crc32c(fields)).to_bytes(4, "little") + fields


@pytest.mark.parametrize("length", [*range(1, 41), 511, 512, 4096, 1 << 20])
def test_what_is_written_comes_back(length: int) -> None:
    body = bytes(i * 7 % 251 for i in range(length))
    data, crc = encode_frame(body, 7, SALT, 0xABCD, 5)
    frame = decode_frame(data, 0, SALT)
    assert frame == Frame(crc, length, 7, 0xABCD, 5)
    assert body_of(data, 0, frame) == body


def test_the_layout_is_the_documented_one() -> None:
    data = frame_of(b"body", lsn=0x0102030405060708, salt=0x11223344, previous=0x55667788, durable_lsn=0x0A0B0C)
    assert data[4:].hex(" ", 4) == ("04000000 08070605 04030201 44332211 88776655 0c0b0a00 00000000 626f6479 00000000")
    assert int.from_bytes(data[:4], "little") == mask(crc32c(data[4 : HEADER_BYTES + 4]))
    assert data[SALT_AT : SALT_AT + 4] == (0x11223344).to_bytes(4, "little")
    assert HEADER_BYTES == 32


@pytest.mark.parametrize("length", range(1, 34))
def test_frames_are_padded_with_zeros_to_eight_bytes(length: int) -> None:
    data = frame_of(b"x" * length)
    assert len(data) == frame_bytes(length)
    assert len(data) % ALIGN == 0
    assert len(data) - HEADER_BYTES - length < ALIGN
    assert not any(data[HEADER_BYTES + length :])


def test_a_frame_is_found_at_any_place() -> None:
    data = b"?" * 24 + frame_of() + frame_of(b"next")
    first = decode_frame(data, 24, SALT)
    assert first is not None
    assert body_of(data, 24, first) == BODY
    second = decode_frame(data, 24 + frame_bytes(len(BODY)), SALT)
    assert second is not None
    assert body_of(data, 24 + frame_bytes(len(BODY)), second) == b"next"


def test_one_flipped_bit_is_no_frame() -> None:
    data = frame_of()
    for bit in range(8 * (HEADER_BYTES + len(BODY))):
        rotten = bytearray(data)
        rotten[bit // 8] ^= 1 << bit % 8
        assert decode_frame(bytes(rotten), 0, SALT) is None, f"bit {bit % 8} of byte {bit // 8}"


def test_the_padding_does_not_count() -> None:
    rotten = bytearray(frame_of())
    rotten[-1] ^= 1
    assert decode_frame(bytes(rotten), 0, SALT) is not None


def test_a_cut_frame_is_no_frame() -> None:
    data = frame_of()
    for end in range(HEADER_BYTES + len(BODY)):
        assert decode_frame(data[:end], 0, SALT) is None, f"cut at {end}"
    assert decode_frame(data[: HEADER_BYTES + len(BODY)], 0, SALT) is not None, "only the padding is missing"


def test_a_frame_of_another_segment_is_no_frame() -> None:
    assert decode_frame(frame_of(salt=SALT + 1), 0, SALT) is None


@pytest.mark.parametrize("salt", [0, SALT])
def test_zeros_are_no_frame(salt: int) -> None:
    assert decode_frame(bytes(4096), 0, salt) is None


def test_an_empty_body_is_no_frame_even_with_a_right_checksum() -> None:
    assert decode_frame(seal_header(0), 0, SALT) is None


@pytest.mark.parametrize("length", [1, MAX_BODY_BYTES, MAX_BODY_BYTES + 1, 2**32 - 1])
def test_a_length_beyond_the_data_is_no_frame(length: int) -> None:
    assert decode_frame(seal_header(length), 0, SALT) is None


def test_the_largest_body_is_a_gigabyte(monkeypatch: pytest.MonkeyPatch) -> None:
    assert MAX_BODY_BYTES == 2**30
    monkeypatch.setattr("rivetq.storage.record.MAX_BODY_BYTES", len(BODY))
    assert decode_frame(frame_of(), 0, SALT) is not None
    monkeypatch.setattr("rivetq.storage.record.MAX_BODY_BYTES", len(BODY) - 1)
    assert decode_frame(frame_of(), 0, SALT) is None


def test_the_checksum_chains_frames_by_content() -> None:
    first, crc = encode_frame(b"first", 1, SALT, 0xABCD, 0)
    second = encode_frame(b"second", 2, SALT, crc, 1)[0]
    chained = decode_frame(second, 0, SALT)
    assert chained is not None
    assert chained.previous == crc == int.from_bytes(first[:4], "little")
    assert encode_frame(b"First", 1, SALT, 0xABCD, 0)[1] != crc


def test_the_mask_keeps_all_bits_and_has_no_zero_for_zero() -> None:
    """crc32c of nothing is 0: unmasked, a header of zeros would carry its own right checksum."""
    assert crc32c(b"") == 0
    assert mask(0) == 0xA282EAD8
    assert mask(0xFFFFFFFF) == 0xA282EAD7
    assert len({mask(1 << bit) for bit in range(32)}) == 32
    assert mask(1) == (1 << 17) + 0xA282EAD8
    assert mask(1 << 15) == 1 + 0xA282EAD8
