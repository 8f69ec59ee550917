"""The noise of a seed as docs/noise.md defines it, in Python's standard library alone.

As a program it answers a line `seed purpose index n` by two: n words, and the bits of n normals. `noise.py vectors` writes
../vectors.json.
"""

import json
import math
import struct
import sys

PICTURE_NOISE = 0
REFINING_NOISE = 0x100
MASK = 2**32 - 1


def words(seed, purpose, index, n):
    """The first n words of the stream (seed, purpose, index), whole numbers below 2^32."""
    blocks = range((n + 3) // 4)
    return [word for block in blocks for word in _block(seed, purpose, index, block)][:n]


def normals(seed, purpose, index, n):
    """The first n unit normals of the stream, each a float that float32 holds."""
    blocks = range((n + 1) // 2)
    return [value for block in blocks for value in _normal_pair(*_block(seed, purpose, index, block))][:n]


def _block(seed, purpose, index, block):
    for value, bits in (seed, 64), (purpose, 32), (index, 64):
        if not 0 <= value < 2**bits:
            raise ValueError(f"{value} is out of range, expected a whole number from 0 to 2^{bits} - 1")
    c, k = [block & MASK, purpose, index & MASK, index >> 32], [seed & MASK, seed >> 32]
    for _ in range(10):
        p, q = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(q >> 32) ^ c[1] ^ k[0], q & MASK, (p >> 32) ^ c[3] ^ k[1], p & MASK]
        k = [(k[0] + 0x9E3779B9) & MASK, (k[1] + 0xBB67AE85) & MASK]
    return c


def _normal_pair(a, b, c, d):
    # 1 - unit lies in (0, 1], so that the logarithm is finite.
    radius, angle = math.sqrt(-2 * math.log(1 - _unit(a, b))), 2 * math.pi * _unit(c, d)
    return [struct.unpack("<f", struct.pack("<f", radius * f(angle)))[0] for f in (math.cos, math.sin)]


def _unit(low, high):
    return ((low | high << 32) >> 11) / 2**53


def _vectors():
    streams = [(0, 0, 0), (7, 0, 5), (7, REFINING_NOISE + 1, 5), (2**32 - 1, 0, 1), (2**53 + 1, 0, 2**33 + 3)]
    streams += [(2**64 - 1, 0, 2**64 - 1), (2**64 - 1, 2**32 - 1, 2**64 - 1)]
    keys = ("seed", "purpose", "index")
    return [
        {**dict(zip(keys, map(str, stream))), "words": words(*stream, 16), "normals": normals(*stream, 8)}
        for stream in streams
    ]


def _answer(line):
    *stream, n = map(int, line.split())
    bits = struct.unpack(f"<{n}I", struct.pack(f"<{n}f", *normals(*stream, n)))
    return f"{' '.join(map(str, words(*stream, n)))}\n{' '.join(map(str, bits))}"


if __name__ == "__main__":
    if sys.argv[1:] == ["vectors"]:
        print(json.dumps(_vectors(), indent=1))
    else:
        for line in sys.stdin:
            print(_answer(line))
