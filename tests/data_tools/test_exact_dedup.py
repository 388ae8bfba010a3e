from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from data_tools.documents import Document
from data_tools.stages.exact_dedup import KEY, content_key, duplicates


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=30), st.randoms())
def test_the_first_of_equal_ones_stays(keys, generator) -> None:
    rows = [(high, low, i) for i, (high, low) in enumerate(keys)]
    first: dict = {}
    expected = []
    for high, low, i in rows:
        if (high, low) in first:
            expected.append((i, first[high, low]))
        first.setdefault((high, low), i)
    generator.shuffle(rows)
    assert duplicates(np.array(rows, KEY)).tolist() == expected


def document(text: str, kind: str) -> Document:
    return Document(text, "", "s", "g", kind, "en", "")


def test_what_counts_as_equal() -> None:
    assert content_key(document("Hello  World\n", "prose")) == content_key(document(" hello world", "prose"))
    assert content_key(document("a = 1  \nb\n", "code")) == content_key(document("a = 1\nb", "code"))
    assert content_key(document("  a = 1", "code")) != content_key(document("a = 1", "code"))
    assert content_key(document("A", "code")) != content_key(document("a", "code"))
