"""The random words behind index sets: the generator, the keys of episodes, their streams."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import pairwise, product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gmixout_optim import index_sets
from gmixout_optim.index_sets import MAX_CELLS, episode_key
from tests.index_set_tools import (
    EPISODES,
    GOLDEN,
    TWO_64,
    Words,
    assert_binomial,
    ref_below,
    ref_bits,
    ref_key,
)


def test_the_generator_is_splitmix64() -> None:
    """The published output of splitmix64.c for seed 1234567: its n-th number is counter n's."""
    words = index_sets.random_bits(1234567, torch.arange(1, 6)).tolist()
    assert [word % TWO_64 for word in words] == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


@given(st.integers(-(2**63), 2**63 - 1), st.lists(st.integers(0, 2**31), min_size=1))
def test_bits_against_the_reference(key: int, places: list[int]) -> None:
    words = index_sets.random_bits(key, torch.tensor(places)).tolist()
    assert [word % TWO_64 for word in words] == [ref_bits(key, place) for place in places]


@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1), st.integers(1, MAX_CELLS))
def test_below_against_the_reference(bits: list[int], bound: int) -> None:
    number = index_sets._below(torch.tensor(bits), bound).tolist()
    assert number == [ref_below(word % TWO_64, bound) for word in bits]
    assert all(0 <= n < bound for n in number)


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1))
def test_episode_key_against_the_reference(seed: int, tensor: int, episode: int) -> None:
    key = episode_key(seed, tensor, episode)
    assert -(2**63) <= key < 2**63
    assert key % TWO_64 == ref_key(seed, tensor, episode)


def assert_random_words(words: Tensor) -> None:
    """Each of the 64 bits is balanced and unrelated to all others.

    The others are those of the same word and of the words 1 to 3 later. ``words`` is an int64
    vector. The products of the signs compared here are independent fair coins.
    """
    number = len(words)
    signs = 1 - 2 * ((words >> torch.arange(64).unsqueeze(1)) & 1).float()
    assert_binomial((number + signs.sum(1)) / 2, number, 0.5)
    agreements = (number + signs @ signs.T) / 2
    above = torch.triu_indices(64, 64, 1)
    assert_binomial(agreements[above[0], above[1]], number, 0.5)
    for lag in (1, 2, 3):
        pairs = number - lag
        assert_binomial((pairs + signs[:, lag:] @ signs[:, :-lag].T) / 2, pairs, 0.5)
    for low in range(0, 64, 8):
        assert_binomial(torch.bincount((words >> low) & 255, minlength=256), number, 1 / 256)


def stream(words: Words, counter: Tensor) -> Tensor:
    return index_sets.random_bits(episode_key(*words), counter)


def streams(words: Callable[[int], Words]) -> Tensor:
    """The first number of 512 streams, then the second of each, and so on.

    Neighbouring streams are one word apart.
    """
    return torch.stack([stream(words(i), torch.arange(512)) for i in range(512)], dim=1).flatten()


def keys(words: Callable[[int], Words]) -> Tensor:
    return torch.tensor([episode_key(*words(i)) for i in range(EPISODES)])


def by_seed(i: int) -> Words:
    return i, 2, 3


def by_tensor(i: int) -> Words:
    return 1, i, 3


def by_episode(i: int) -> Words:
    return 1, 2, i


def by_turns(i: int) -> Words:
    """Seed and tensor, and then the two swapped."""
    one, other = i // 2, 1_000 + i // 2
    return (one, other, 3) if i % 2 else (other, one, 3)


RANDOM_WORDS: dict[str, Callable[[], Tensor]] = {
    "consecutive counters": lambda: stream((0, 0, 0), torch.arange(1 << 18)),
    "counters 8192 apart": lambda: stream((0, 0, 0), torch.arange(1 << 18) << 13),
    "key 0": lambda: index_sets.random_bits(0, torch.arange(1, 1 << 18)),
} | {
    f"{make.__name__} {words.__name__}": lambda make=make, words=words: make(words)
    for make in (streams, keys)
    for words in (by_seed, by_tensor, by_episode, by_turns)
}


@pytest.mark.parametrize("name", RANDOM_WORDS)
def test_words_are_random_in_every_bit(name: str) -> None:
    assert_random_words(RANDOM_WORDS[name]())


def test_flipping_one_bit_of_a_word_flips_half_of_the_key() -> None:
    """Avalanche: each bit of the key turns with probability 1/2, independently of the others."""
    rng = random.Random(0)
    bases = [tuple(rng.getrandbits(rng.randint(1, 63)) for _ in range(3)) for _ in range(64)]
    turned = torch.empty(64, 3, 63, dtype=torch.int64)
    for i, base in enumerate(bases):
        key = episode_key(*base)
        for word, bit in product(range(3), range(63)):
            flipped = list(base)
            flipped[word] ^= 1 << bit
            turned[i, word, bit] = key ^ episode_key(*flipped)
    bits = (turned.unsqueeze(-1) >> torch.arange(64)) & 1
    assert_binomial(bits.sum(0), 64, 0.5)
    assert_binomial(bits.sum((0, 3)), 64 * 64, 0.5)
    assert_binomial(bits.sum((0, 2)), 64 * 63, 0.5)


def test_streams_do_not_overlap() -> None:
    """All streams are parts of one sequence: those of small words start far apart.

    Two of 1000 random places among 2**64 are closer than 4096 with a chance below 3e-10.
    """
    inverse = pow(GOLDEN, -1, TWO_64)
    grid = product(range(10), repeat=3)
    places = sorted(episode_key(*words) * inverse % TWO_64 for words in grid)
    gaps = [(after - before) % TWO_64 for before, after in pairwise([*places, places[0]])]
    assert min(gaps) > 4096
