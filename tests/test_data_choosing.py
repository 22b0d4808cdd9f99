"""Frames are spread over episodes and over the phases of each, and a seed says which."""

from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlaquant.families.data.choosing import choose_frames

LENGTHS = st.lists(st.integers(0, 40), min_size=1, max_size=12)


@given(LENGTHS, st.integers(1, 120), st.integers(0, 3))
def test_as_many_as_wanted_and_none_twice(lengths: list[int], count: int, seed: int) -> None:
    chosen = choose_frames(lengths, count, seed=seed)
    assert len(chosen) == len(set(chosen)) == min(count, sum(lengths))
    assert chosen == sorted(chosen)
    assert all(0 <= frame < lengths[episode] for episode, frame in chosen)


@given(LENGTHS, st.integers(1, 120))
def test_shares_differ_by_one_at_most_unless_an_episode_is_too_short(lengths: list[int], count: int) -> None:
    shares = Counter(episode for episode, _ in choose_frames(lengths, count, seed=0))
    most = max(shares.values(), default=0)
    assert all(shares[episode] >= min(most - 1, length) for episode, length in enumerate(lengths))


@given(st.lists(st.integers(9, 60), min_size=1, max_size=8), st.integers(3, 9), st.integers(0, 3))
def test_every_piece_of_an_episode_gives_one(lengths: list[int], share: int, seed: int) -> None:
    chosen = choose_frames(lengths, share * len(lengths), seed=seed)
    if len(chosen) == sum(lengths):
        return
    for episode, length in enumerate(lengths):
        frames = [frame for owner, frame in chosen if owner == episode]
        edges = [piece * length // share for piece in range(share + 1)]
        inside = [sum(low <= frame < high for frame in frames) for low, high in pairwise(edges)]
        assert inside == [1] * share


@pytest.mark.parametrize("share", [1, 2])
def test_episodes_take_turns_with_their_phases(share: int) -> None:
    chosen = choose_frames([30] * 6, 6 * share, seed=0)
    phases = Counter(frame // 10 for _, frame in chosen)
    assert phases == dict.fromkeys(range(3), 2 * share)


def test_of_more_episodes_than_samples_each_gives_one_frame_at_most() -> None:
    chosen = choose_frames([30] * 20, 9, seed=1)
    assert len({episode for episode, _ in chosen}) == 9
    assert Counter(frame // 10 for _, frame in chosen) == {0: 3, 1: 3, 2: 3}


def test_the_seed_decides_and_nothing_else() -> None:
    assert choose_frames([50, 60, 70], 8, seed=3) == choose_frames([50, 60, 70], 8, seed=3)
    assert choose_frames([50, 60, 70], 8, seed=3) != choose_frames([50, 60, 70], 8, seed=4)
