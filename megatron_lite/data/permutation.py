"""A stateless shuffle: a keyed bijection of [0, n), computed index by index, without a table of n entries.

A Feistel network on pairs with cycle walking (the "generalized Feistel cipher" of Black and Rogaway, "Ciphers
with Arbitrary Finite Domains", CT-RSA 2002). Write x = a * right + left with left in Z_a, right in Z_b and
a * b >= n; the rounds alternate

    left  <- left  + F_k(right)  mod a
    right <- right + F_k(left)   mod b

Each can be undone, so the network permutes [0, a * b) whatever F is. A result >= n goes through again ("cycle
walking"); this ends, because the index itself is on its own cycle, and gives a bijection of [0, n). With
a = ceil(sqrt(n)) and b = ceil(n / a) about a fraction 1 / sqrt(n) of the domain is outside: few indices
walk.

Notable features
- Shuffling 10^12 windows needs no file, no memory and no time at start-up; an index costs a few microseconds.
- Python integers only: the same on every machine. F has 64 bits, so for n <= 2^48 its bias modulo a is <
  2^-40.
"""

from __future__ import annotations

import hashlib
import struct
from math import isqrt

ROUNDS = 8
MAX_SIZE = 1 << 48
_MASK = (1 << 64) - 1
_ROUND_KEYS = struct.Struct(f"<{ROUNDS}Q")

Key = tuple[int, ...]  # one 64-bit key a round


def make_key(seed: int, name: str, epoch: int) -> Key:
    """The round keys of one epoch of one source: a BLAKE2b hash of (seed, name, epoch)."""
    digest = hashlib.blake2b(
        f"{seed}|{epoch}|{name}".encode(), digest_size=_ROUND_KEYS.size, person=b"data-order"
    ).digest()
    return _ROUND_KEYS.unpack(digest)


def permute(i: int, n: int, key: Key) -> int:
    """Where index `i` of [0, n) goes under the permutation that `key` picks; 1 <= n <= 2^48.

    Raises:
        ValueError: i or n out of range.
    """
    if not 0 <= i < n <= MAX_SIZE:
        raise ValueError(f"permute({i}, {n}): the index must be in [0, n) and n must not exceed {MAX_SIZE}")
    a = isqrt(n - 1) + 1
    b = -(-n // a)
    x = _network(i, a, b, key)
    while x >= n:
        x = _network(x, a, b, key)
    return x


def _network(x: int, a: int, b: int, key: Key) -> int:
    """One pass of the Feistel network over [0, a * b)."""
    right, left = divmod(x, a)
    for even, odd in zip(key[::2], key[1::2]):
        # F: the finaliser of splitmix64 (Steele, Lea and Flood, OOPSLA 2014), in line for speed.
        z = ((right ^ even) * 0xBF58476D1CE4E5B9) & _MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
        left = (left + (z ^ (z >> 31))) % a
        z = ((left ^ odd) * 0xBF58476D1CE4E5B9) & _MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
        right = (right + (z ^ (z >> 31))) % b
    return right * a + left
