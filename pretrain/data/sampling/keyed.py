"""Random numbers keyed by where they are used, never by the process that draws them.

A draw is a pure function of (seed, position, purpose): the same on any rank, in any worker, before and after a resume.
Philox (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") is keyed directly: key = [seed, purpose],
counter = [0, position, part, 0], where word 0 counts the blocks drawn. Different keys or counters give independent
streams.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.random.bit_generator import ISeedSequence
from numpy.typing import NDArray

SHARD_ORDER = 1
BLOCK_ORDER = 2
SUBSTITUTE = 3
MIXTURE_ORDER = 4
MIXTURE_SET = 5
_FIRST_VIEW = 1 << 16
_FIRST_NOISE = 1 << 32
_FIRST_MASK = 1 << 33


def view_purpose(index: int) -> int:
    """Purpose of the `index`-th entry of an objective's list of views."""
    return _FIRST_VIEW + index


def noise_purpose(name: str) -> int:
    """Purpose of a named noise; it does not depend on other noises."""
    return _FIRST_NOISE + zlib.crc32(name.encode())


def mask_purpose(name: str) -> int:
    """Purpose of a named mask; it differs from that of a noise with the same name."""
    return _FIRST_MASK + zlib.crc32(name.encode())


def generator(seed: int, position: int, purpose: int, part: int = 0) -> np.random.Generator:
    """A new generator for one use. All four numbers are in [0, 2**64)."""
    philox = np.random.Philox(_NO_SEED)  # pyright: ignore[reportArgumentType]
    philox.state = {
        "bit_generator": "Philox",
        "state": {
            "counter": np.array([0, position, part, 0], dtype=np.uint64),
            "key": np.array([seed, purpose], dtype=np.uint64),
        },
        "buffer": np.zeros(4, dtype=np.uint64),
        "buffer_pos": 4,
        "has_uint32": 0,
        "uinteger": 0,
    }
    return np.random.Generator(philox)


def uniforms(seed: int, position: int, purpose: int, part: int = 0, *, count: int) -> np.ndarray:
    """`count` numbers in [0, 1), float64: the upper 53 bits of raw Philox words, which all versions of numpy share."""
    words = generator(seed, position, purpose, part).bit_generator.random_raw(count)
    return (words >> np.uint64(11)) * 2.0**-53


def stream(seed: int, position: int, purpose: int, part: int = 0) -> Iterator[float]:
    """The same numbers as `uniforms`, one by one, endlessly."""
    bits = generator(seed, position, purpose, part).bit_generator
    while True:
        yield from ((bits.random_raw(64) >> np.uint64(11)) * 2.0**-53).tolist()


def permutation(seed: int, position: int, purpose: int, part: int = 0, *, length: int) -> np.ndarray:
    """A keyed permutation of range(length), int64 [length].

    It sorts raw Philox words, which are the same in all versions of numpy; `Generator.permutation` is not.
    """
    words = generator(seed, position, purpose, part).bit_generator.random_raw(length)
    return np.argsort(words, kind="stable")


class _NoSeed(ISeedSequence):
    """Replaces a SeedSequence, which takes 4 us and system entropy for a state that is overwritten at once."""

    def generate_state(self, n_words: int, dtype: Any = np.uint32) -> NDArray[Any]:
        return np.zeros(n_words, dtype)


_NO_SEED = _NoSeed()
