from __future__ import annotations

import pickle

from hypothesis import given
from hypothesis import strategies as st

from torchmae.data.sources import Strings


@given(st.lists(st.binary(max_size=5), max_size=6))
def test_strings_are_a_list_of_bytes(expected: list[bytes]) -> None:
    strings = Strings(expected)
    assert len(strings) == len(expected)
    content, ends = strings.parts
    for same in (strings, pickle.loads(pickle.dumps(strings)), Strings.of(bytes(content), ends)):
        assert list(same) == expected
