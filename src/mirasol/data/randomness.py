"""Random numbers as pure functions of what they are for: hashes and permutations that need no state."""

import hashlib
import math


def hash64(*parts: int | str) -> int:
    """64 uniform bits from the parts; the same on every machine and in every process."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def draw_uniform(*parts: int | str) -> float:
    """A number in (0, 1) from the parts."""
    return ((hash64(*parts) >> 11) + 0.5) * 2.0**-53


def permute_index(index: int, size: int, *key: int | str) -> int:
    """Where a keyed permutation of range(size) sends `index`: any entry at once, without a table.

    A Feistel network of six rounds over the next power of four; numbers that fall outside are sent through again
    (cycle walking), which keeps it a permutation.
    """
    assert 0 <= index < size
    half_bits = max(1, math.ceil(math.ceil(math.log2(max(size, 2))) / 2))
    half_mask = (1 << half_bits) - 1
    while True:
        left, right = index >> half_bits, index & half_mask
        for round_number in range(6):
            left, right = right, left ^ (hash64(*key, round_number, right) & half_mask)
        index = (left << half_bits) | right
        if index < size:
            return index
