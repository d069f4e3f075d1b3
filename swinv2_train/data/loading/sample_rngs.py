"""The random generators of a micro-batch's samples: numpy's own of (seed, epoch, sample), made all at once.

numpy makes one in 20 us, most of it Python around some integer arithmetic.  Here that is done for all samples
together, and the generators begin with what comes out: the same numbers, in a few us each.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.random.bit_generator import ISeedSequence

_SAMPLE_STREAM = 2
"""Spawn key of the per-sample random numbers; order.py uses 0 and 1."""
_FEW = 10
"""Fewer take longer together than one by one."""
_WORD = 2**32 - 1
# Of numpy's SeedSequence (bit_generator.pyx; M. E. O'Neill's seed_seq_fe), whose numbers numpy promises not to change.
_POOL = 4
_INIT_A, _MULT_A, _INIT_B, _MULT_B = 0x43B0D7E5, 0x931E8875, 0x8B51F9DD, 0x58F38DED
_MIX_LEFT, _MIX_RIGHT = 0xCA01F9DD, 0x4973F715


def sample_rngs(seed: int, places: Sequence[tuple[int, int]]) -> list[np.random.Generator]:
    """The random numbers of each sample in an epoch, by (epoch, sample); `sample` counts over all shards."""
    words = np.array(places, np.uint64).reshape(-1, 2)
    if len(words) < _FEW or (words > _WORD).any():  # which is more than one word of numpy's
        keys = [(_SAMPLE_STREAM, *place) for place in places]
        found: Sequence[Any] = [np.random.SeedSequence(seed, spawn_key=key) for key in keys]
    else:
        found = [_Words(state) for state in _states(seed, words)]
    return [np.random.Generator(np.random.PCG64(each)) for each in found]


class _Words(ISeedSequence):
    """What SeedSequence.generate_state would give a PCG64."""

    def __init__(self, state: np.ndarray) -> None:
        self._state = state

    def generate_state(self, n_words: int, dtype: Any = np.uint32) -> np.ndarray:
        assert (n_words, np.dtype(dtype)) == (len(self._state), self._state.dtype), (n_words, dtype)
        return self._state


def _states(seed: int, places: np.ndarray) -> np.ndarray:
    """uint64 (n, 2), each below 2^32 -> uint64 (n, 4)"""
    shared, factor = _pool_of(seed)
    pool: list[Any] = list(shared)
    for words in places.T:
        factor = _mix_in(pool, words, factor)
    halves: list[Any] = []
    factor = _INIT_B
    for number in range(2 * _POOL):
        value = pool[number % _POOL] ^ factor
        factor = factor * _MULT_B & _WORD
        value = value * factor & _WORD
        halves.append(value ^ value >> 16)
    pairs = [low | high << 32 for low, high in zip(halves[::2], halves[1::2], strict=True)]
    return np.ascontiguousarray(np.stack(pairs, axis=1))


@functools.lru_cache(maxsize=16)
def _pool_of(seed: int) -> tuple[tuple[int, ...], int]:
    """What is mixed of the seed and the stream, which all samples share, and the factor of the next word."""
    words = [seed >> shift & _WORD for shift in range(0, max(seed.bit_length(), 1), 32)]
    words += [0] * (_POOL - len(words))
    pool: list[Any] = []
    factor = _INIT_A
    for word in words[:_POOL]:
        value, factor = _hashed(word, factor)
        pool.append(value)
    for source in range(_POOL):
        for to in range(_POOL):
            if to != source:
                value, factor = _hashed(pool[source], factor)
                pool[to] = _mixed(pool[to], value)
    for word in (*words[_POOL:], _SAMPLE_STREAM):
        factor = _mix_in(pool, word, factor)
    return tuple(pool), factor


def _mix_in(pool: list[Any], word: Any, factor: int) -> int:
    """Change the pool by one more word, an int or uint64 (n,); returns the factor of the next one."""
    for to in range(_POOL):
        value, factor = _hashed(word, factor)
        pool[to] = _mixed(pool[to], value)
    return factor


def _hashed(value: Any, factor: int) -> tuple[Any, int]:
    value = value ^ factor
    factor = factor * _MULT_A & _WORD
    value = value * factor & _WORD
    return value ^ value >> 16, factor


def _mixed(pool: Any, value: Any) -> Any:
    result = (_MIX_LEFT * pool & _WORD) - (_MIX_RIGHT * value & _WORD) & _WORD  # an array wraps, an int goes below 0
    return result ^ result >> 16
