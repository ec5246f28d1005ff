"""Cutting work into parts and merging it again, in one tree."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offtower.errors import OfftowerError
from offtower.mapping import Mapper, merge_all, pieces


@dataclass(frozen=True)
class Tree:
    """Remembers how it was merged."""

    shape: object

    def merge(self, other: Tree) -> Tree:
        return Tree((self.shape, other.shape))


@given(st.integers(1, 300), st.integers(1, 64), st.integers(1, 9))
def test_pieces_merge_to_the_tree_of_the_whole(total: int, wanted: int, workers: int) -> None:
    parts = pieces(total, wanted, workers)
    assert [n for part in parts for n in part] == list(range(total))
    whole = merge_all(Tree(n) for n in range(total))
    assert merge_all(merge_all(Tree(n) for n in part) for part in parts) == whole


def test_pieces_leave_work_for_every_worker() -> None:
    assert len(pieces(64, 1000, workers=4)) >= 16
    assert len(pieces(64, 16)) == 4
    assert len(pieces(3, 16, workers=8)) == 3


def test_nothing_to_merge_is_an_error() -> None:
    with pytest.raises(OfftowerError, match="no rows"):
        merge_all([])


def test_the_plain_mapper_keeps_the_order() -> None:
    assert list(Mapper().map(lambda n: n * n, range(5))) == [0, 1, 4, 9, 16]
