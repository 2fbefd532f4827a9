from __future__ import annotations

import pickle

from hypothesis import given
from hypothesis import strategies as st

from torchmae.data.strings import join_strings, pack_strings


@given(st.lists(st.lists(st.binary(max_size=5), max_size=6), min_size=1, max_size=4))
def test_strings_are_a_list_of_bytes(groups: list[list[bytes]]) -> None:
    joined = join_strings([pack_strings(group) for group in groups])
    expected = [value for group in groups for value in group]
    assert len(joined) == len(expected)
    assert list(joined) == list(pickle.loads(pickle.dumps(joined))) == expected
    middle = len(expected) // 2
    assert list(joined.between(middle, len(expected))) == expected[middle:]
    assert list(joined.between(0, middle)) == expected[:middle]
