"""Protocol buffers, as far as SentencePiece model files need them.

A message is a sequence of fields: a varint of (field number, wire type), then a varint (type 0), eight bytes (1), a
length and bytes (2), or four bytes (5).
"""

from __future__ import annotations

from collections.abc import Iterator


def varint(value: int) -> bytes:
    value &= 2**64 - 1
    raw = [(value >> shift) & 127 for shift in range(0, max(1, value.bit_length()), 7)]
    return bytes([digit | 128 for digit in raw[:-1]] + raw[-1:])


def tag(field: int, wire: int) -> bytes:
    return varint(field << 3 | wire)


def number(field: int, value: int) -> bytes:
    return tag(field, 0) + varint(value)


def data(field: int, value: bytes) -> bytes:
    return tag(field, 2) + varint(len(value)) + value


def fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yields (field number, value) in order. Raises IndexError or ValueError for an invalid message."""
    at = 0

    def read() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(message):
        key = read()
        if key & 7 == 0:
            yield key >> 3, read()
            continue
        if key & 7 not in (1, 2, 5):
            raise ValueError(f"wire type {key & 7}")
        size = read() if key & 7 == 2 else 8 if key & 7 == 1 else 4
        yield key >> 3, message[at : at + size]
        at += size
