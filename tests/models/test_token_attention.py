"""The example of an attention tower over the words of a text."""

from __future__ import annotations

import pyarrow as pa
import pytest
import torch

from offtower.data import FeatureSpec
from offtower.data.encoding import FeatureEncoding, to_tensors
from offtower.errors import ConfigError
from offtower.models.token_attention import TokenAttentionTower

SPECS = (
    FeatureSpec("title", "text", tokens="words", buckets=50),
    FeatureSpec("price", "numeric"),
)
TABLE = pa.table(
    {
        "title": ["dog bites man", "man bites dog", None, "", "one", "a b c d e f g h"],
        "price": [1.0, 1.0, 1.0, 1.0, 2.0, 3.0],
    }
)


def embedded(table: pa.Table, **arguments: int) -> torch.Tensor:
    encoding = FeatureEncoding.fit(SPECS, [TABLE])
    torch.manual_seed(0)
    tower = TokenAttentionTower(encoding, 3, "title", 8, 2, **arguments)
    torch.nn.init.normal_(tower.positions)
    output: torch.Tensor = tower(to_tensors(encoding.encode(table)))
    return output


def test_the_order_of_words_counts_and_padding_does_not() -> None:
    whole = embedded(TABLE)
    assert whole.shape == (6, 3) and bool(torch.isfinite(whole).all())
    assert (whole[0] - whole[1]).abs().max() > 1e-3
    torch.testing.assert_close(whole[2], whole[3])
    for row in range(6):
        torch.testing.assert_close(embedded(TABLE.slice(row, 1))[0], whole[row])


def test_only_the_first_words_are_read() -> None:
    few = embedded(TABLE, longest=3)
    shortened = TABLE.set_column(0, "title", pa.array([*TABLE["title"].to_pylist()[:5], "a b c"]))
    torch.testing.assert_close(embedded(shortened, longest=3), few)


def test_every_parameter_has_a_gradient() -> None:
    encoding = FeatureEncoding.fit(SPECS, [TABLE])
    tower = TokenAttentionTower(encoding, 3, "title", 8, 2)
    tower(to_tensors(encoding.encode(TABLE))).square().sum().backward()
    without = [name for name, p in tower.named_parameters() if p.grad is None]
    assert without == []
    assert all(bool(torch.isfinite(p.grad).all()) for p in tower.parameters() if p.grad is not None)


def test_what_it_refuses() -> None:
    subwords = FeatureEncoding.fit((FeatureSpec("title", "text"),), [TABLE])
    for encoding, text, heads, message in (
        (subwords, "title", 2, "'tokens: words'"),
        (subwords, "name", 2, "feature 'name' must be of kind text"),
        (FeatureEncoding.fit(SPECS, [TABLE]), "title", 3, "3 heads do not divide a width of 8"),
    ):
        with pytest.raises(ConfigError, match=message):
            TokenAttentionTower(encoding, 3, text, 8, heads)
