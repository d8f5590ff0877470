"""What lookup drafts: the continuation of the latest longest match, in a row's own text and in earlier ones."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from fastllama.generation.lookup import POOL_KEY, Lookup, LookupSource, Texts

few = st.integers(0, 5)  # tokens that come again


@given(st.lists(few, min_size=1, max_size=60), st.integers(1, 8), st.integers(1, 12))
def test_a_draft_is_what_followed_the_longest_match(text, count, longest) -> None:
    lookup = Lookup(longest)
    lookup.extend(text)
    found, length = lookup.draft(count)
    key = min(2, longest)

    def match(place: int) -> int:
        fits = (
            n for n in range(longest, key - 1, -1) if n <= place and text[place - n : place] == text[len(text) - n :]
        )
        return next(fits, 0)

    matches = {place: match(place) for place in range(key, len(text))}
    recent = sorted(place for place, n in matches.items() if n)[-16:]
    assert length == max((matches[place] for place in recent), default=0)
    if not length:
        assert found == []
        return
    (place,) = sorted(place for place in recent if matches[place] == length)[-1:]
    whole = list(text)
    while len(whole) < place + count:
        whole.append(whole[place + len(whole) - len(text)])
    assert found == whole[place : place + count]


@given(st.lists(st.lists(few, max_size=30), max_size=8), st.lists(few, max_size=20), st.integers(1, 60))
def test_earlier_texts_are_the_newest_ones(texts, ending, most) -> None:
    pool, kept = Texts(), list[list[int]]()
    for text in texts:
        pool.add(text, most)
        kept.append(text[-most:])
        while sum(map(len, kept)) > most:
            del kept[0]
    assert pool.count == sum(map(len, kept))
    found, length = pool.draft(ending, 4, 32)

    def match(text: list[int], place: int) -> int:
        fits = (n for n in range(1, min(place, len(ending)) + 1) if text[place - n : place] == ending[-n:])
        return max(fits, default=0)

    places = [(text, place) for text in kept for place in range(POOL_KEY, len(text)) if match(text, place) >= POOL_KEY]
    recent = places[-16:]
    assert length == max((match(*each) for each in recent), default=0)
    expected = [text[place : place + 4] for text, place in recent if match(text, place) == length]
    assert found == (expected[-1] if expected else [])


def test_what_is_forgotten_leaves_nothing() -> None:
    pool = Texts()
    for text in ([1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 7, 8]):
        pool.add(text, 12)
    pool.add([9] * 12, 12)
    assert pool.draft([1, 2, 3, 4], 2, 32) == ([], 0)
    assert len(pool._places) == 1  # that of the nines


def test_the_longer_match_of_own_and_earlier_texts_counts() -> None:
    pool = Texts()
    first = LookupSource([torch.tensor([1, 2, 3, 4, 5, 6, 7, 8, 9])], 32, pool, most=100)
    first.close()
    source = LookupSource([torch.tensor([5, 6, 7, 30, 3, 4, 5, 6, 7]), torch.tensor([1, 2])], 32, pool, most=100)
    found = source.draft([0, 1], 2)
    assert found[0].tokens == [8, 9]
    assert 1 not in found
    source.extend(0, [30, 3, 4, 5, 6, 7])
    assert source.draft([0], 2)[0].tokens == [30, 3]  # nine tokens of its own against five
