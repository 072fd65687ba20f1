"""Mutations of bytes: plain data, so that a finding is kept as a recipe and not as a file."""

import random
import re
from collections.abc import Sequence
from typing import Any

# (name, arguments…), as `mutate` applies them
Mutation = tuple[Any, ...]

EDGE = 4096  # bytes at either end of a file, where headers and indices are
INTEGERS = (0, 1, 2**7, 2**8 - 1, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1)
TOKENS = (
    "", "null", "true", "-1", "0", "1e999", "-1e999", "NaN", "0.5", "99999999999999999999999", "-99999999999999999999",
    '""', '"\\ud800"', '"\\u0000"', "\0", "\x1b[31m", "é", "\u2028", "[]", "{}", '["a"]', '{"a": 1}', "[" * 3000,
    '{"a":' * 3000, '"' + "a" * 5000 + '"', "a" * 5000, '"', "'", ",", "\n", "\r", "\t", ":", "- ", "*a", "&a [*a]",
    "!!python/object:a", "9" * 5000, '"../../../etc/passwd"', "../../../etc/passwd", '"/etc/passwd"', "/etc/passwd",
    '"~"', '"."', '"file:///etc/passwd"', '"concat:a|b"', '"http://localhost:9/a.mp4"', "2147483648",
    "18446744073709551616", "1e308", "0x10", "1_000", "yes", "2001-01-01",
)  # fmt: skip
_TOKEN = re.compile(rb'"(?:[^"\\\n]|\\.)*"|-?\d+(?:\.\d+)?|[A-Za-z_]+')


def mutate(content: bytes, mutations: Sequence[Mutation], seeds: dict[str, bytes]) -> bytes:
    """`content` with all mutations applied in order; those that fall outside of it do nothing."""
    data = bytearray(content)
    for name, *arguments in mutations:
        _APPLY[name](data, seeds, *arguments)
    return bytes(data)


def _flip(data: bytearray, seeds: dict, offset: int, bit: int) -> None:
    if offset < len(data):
        data[offset] ^= 1 << bit


def _cut(data: bytearray, seeds: dict, length: int) -> None:
    del data[length:]


def _remove(data: bytearray, seeds: dict, offset: int, length: int) -> None:
    del data[offset : offset + length]


def _fill(data: bytearray, seeds: dict, offset: int, length: int, value: int) -> None:
    end = min(len(data), offset + length)
    data[offset:end] = bytes([value]) * max(0, end - offset)


def _repeat(data: bytearray, seeds: dict, offset: int, length: int, to: int) -> None:
    data[to:to] = data[offset : offset + length]


def _move(data: bytearray, seeds: dict, offset: int, length: int, to: int) -> None:
    part = data[offset : offset + length]
    data[to : to + len(part)] = part


def _splice(data: bytearray, seeds: dict, other: str, offset: int, length: int, to: int) -> None:
    data[to:to] = seeds[other][offset : offset + length]


def _integer(data: bytearray, seeds: dict, offset: int, width: int, value: int, order: str) -> None:
    if offset + width <= len(data):
        data[offset : offset + width] = (value % (1 << 8 * width)).to_bytes(width, order)


def _token(data: bytearray, seeds: dict, number: int, token: int) -> None:
    found = list(_TOKEN.finditer(data))
    if found:
        match = found[number % len(found)]
        data[match.start() : match.end()] = TOKENS[token].encode("utf-8", "surrogatepass")


def _line(data: bytearray, seeds: dict, number: int, copies: int) -> None:
    lines = data.split(b"\n")
    place = number % len(lines)
    data[:] = b"\n".join([*lines[:place], *lines[place : place + 1] * copies, *lines[place + 1 :]])


def _encode(data: bytearray, seeds: dict, encoding: str) -> None:
    data[:] = data.decode("utf-8", "replace").encode(encoding, "replace")


_APPLY = {
    "flip": _flip,
    "cut": _cut,
    "remove": _remove,
    "fill": _fill,
    "repeat": _repeat,
    "move": _move,
    "splice": _splice,
    "integer": _integer,
    "token": _token,
    "line": _line,
    "encode": _encode,
}


def draw_offset(generator: random.Random, size: int) -> int:
    """A place in a file; more often than not in its first or last bytes."""
    where = generator.random()
    if where < 0.4:
        return generator.randrange(min(size, EDGE))
    return generator.randrange(max(0, size - EDGE), size) if where < 0.55 else generator.randrange(size)


def draw_byte_mutation(generator: random.Random, size: int, others: Sequence[str]) -> Mutation:
    """A mutation of a file of `size` bytes; `others` are the seeds that it may take bytes from."""
    kind = generator.choice(("flip", "flip", "cut", "remove", "fill", "repeat", "move", "splice", "integer", "integer"))
    offset, to = draw_offset(generator, size), draw_offset(generator, size)
    length = min(1 << generator.randrange(1, 15), max(1, size // 2))
    if kind == "flip":
        return kind, offset, generator.randrange(8)
    if kind == "cut":
        return kind, offset
    if kind == "fill":
        return kind, offset, length, generator.choice((0, 0, 255))
    if kind == "integer":
        width = generator.choice((1, 2, 3, 4, 4, 8))
        return kind, offset, width, generator.choice(INTEGERS), generator.choice(("big", "little"))
    if kind == "splice":
        return kind, generator.choice(list(others)), draw_offset(generator, EDGE), length, to
    return (kind, offset, length) if kind == "remove" else (kind, offset, length, to)


def draw_token_mutation(generator: random.Random, size: int, others: Sequence[str]) -> Mutation:
    """Another token in the place of one."""
    return "token", generator.randrange(10_000), generator.randrange(len(TOKENS))


def draw_text_mutation(generator: random.Random, size: int, others: Sequence[str]) -> Mutation:
    """A mutation of a text file: of its tokens and lines more often than of its bytes."""
    kind = generator.random()
    if kind < 0.6:
        return draw_token_mutation(generator, size, others)
    if kind < 0.7:
        return "line", generator.randrange(1000), generator.choice((0, 2, 3))
    if kind < 0.73:
        return "encode", generator.choice(("utf-16", "utf-16-le", "latin-1", "utf-8-sig", "utf-32"))
    return draw_byte_mutation(generator, size, others)
