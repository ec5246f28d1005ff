"""Texts as bags of hashed words and subwords: determinism, normalization, and the schema."""

from __future__ import annotations

import unicodedata
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from offtower.cli import app
from offtower.data import Catalogue, FeatureSpec, LogSchema, ParquetLog, texts
from offtower.data.columns import splitmix64
from offtower.data.encoding import FeatureEncoding
from offtower.data.schema import CatalogueSchema, spec_from_dict, spec_to_dict
from offtower.data.texts import normalized, text_bags
from offtower.errors import ConfigError

TEXT = FeatureSpec("t", "text")
WORDS = FeatureSpec("t", "text", tokens="words")
TEXTS = st.lists(st.one_of(st.none(), st.text(max_size=30)), max_size=6)


def hashed(token: str, buckets: int = 2**16) -> int:
    """The documented hash of a token, in plain Python."""
    key = splitmix64(np.array([len(token)], dtype=np.uint64))
    for letter in token:
        key = splitmix64(key ^ np.uint64(ord(letter)))
    return 1 + int((key[0] ^ np.uint64(zlib.crc32(b"t"))) % np.uint64(buckets))


def tokens(text: str | None, words: bool) -> list[str]:
    """By definition: words with marks, and their n-grams that are not the whole word."""
    found = []
    for word in [] if text is None else normalized(text, 512).split():
        marked = f"\x02{word}\x03"
        found.append(marked)
        for n in () if words else (3, 4, 5):
            found += [marked[i : i + n] for i in range(len(marked) - n + 1) if len(marked) > n]
    return found


@settings(max_examples=60, deadline=None)
@given(column=TEXTS, words=st.booleans(), at_once=st.integers(1, 40))
def test_any_texts_are_encoded_by_definition(
    column: list[str | None], words: bool, at_once: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(texts, "_AT_ONCE", at_once)
        bags = text_bags(WORDS if words else TEXT, pa.array(column, pa.string()))
    assert len(bags) == len(column)
    for row, text in enumerate(column):
        found = bags.values[bags.offsets[row] : bags.offsets[row + 1]].tolist()
        expected = [hashed(token) for token in tokens(text, words)]
        assert found == expected if words else sorted(found) == sorted(expected)


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=30))
def test_equivalent_spellings_are_one_text(text: str) -> None:
    spelled = [text, unicodedata.normalize("NFD", text), f"  {text}\n", text.casefold()]
    bags = [text_bags(TEXT, pa.array([one])) for one in spelled]
    for other in bags[1:]:
        assert other.values.tolist() == bags[0].values.tolist()


def test_hashes_never_change() -> None:
    """Stored tables depend on them."""
    assert text_bags(WORDS, pa.array(["Straße ﬁ café"])).values.tolist() == [
        hashed("\x02strasse\x03"),
        hashed("\x02fi\x03"),
        hashed("\x02café\x03"),
    ]
    assert text_bags(WORDS, pa.array(["hello"])).values.tolist() == [22722]


def test_null_empty_and_long_texts() -> None:
    column = pa.array([None, "", "   ", "a" * 10_000, "ab"])
    bags = text_bags(FeatureSpec("t", "text", length=100), column)
    counts = np.diff(bags.offsets)
    # 102 marked characters: 100 + 99 + 98 n-grams and the word; "ab" has 2 of 3 letters.
    assert counts.tolist() == [0, 0, 0, 298, 3]
    assert len(text_bags(TEXT, pa.nulls(2, pa.string()))) == 2
    assert len(text_bags(TEXT, pa.array([], pa.string()))) == 0
    assert (
        text_bags(TEXT, pa.array([5])).values.tolist()
        == text_bags(TEXT, pa.array(["5"])).values.tolist()
    )


def test_an_encoding_of_texts_survives_json() -> None:
    table = pa.table({"t": ["a title", None]})
    encoding = FeatureEncoding.fit((TEXT,), [table])
    again = FeatureEncoding.from_dict(encoding.to_dict())
    first, second = encoding.encode(table)["t"], again.encode(table)["t"]
    assert not isinstance(first, np.ndarray) and not isinstance(second, np.ndarray)
    assert first.values.tolist() == second.values.tolist()
    assert encoding.cardinality("t") == 1 + 2**16


def test_the_schema_of_texts() -> None:
    assert (TEXT.encoding, TEXT.buckets) == ("hash", 2**16)
    assert FeatureSpec(name="t", kind="text", buckets=7).buckets == 7
    assert spec_from_dict(spec_to_dict(WORDS)) == WORDS
    assert spec_from_dict({"name": "t", "kind": "text"}) == TEXT
    # Fingerprints of data without texts are as they were.
    assert "tokens" not in repr(FeatureSpec("c", "category"))
    assert "length" not in repr(FeatureSpec("c", "category"))
    assert "tokens='words'" in repr(WORDS)
    for wrong, message in (
        ({"kind": "text", "encoding": "vocabulary"}, "the words of a text are hashed"),
        ({"kind": "text", "min_count": 2}, "the words of a text are hashed"),
        ({"kind": "bag", "tokens": "words"}, "'tokens' is for texts, not for bag"),
        ({"kind": "category", "length": 5}, "'length' is for histories, not for category"),
    ):
        with pytest.raises(ConfigError, match=message):
            spec_from_dict({"name": "t", **wrong})
    assert CatalogueSchema(features=(TEXT,)).features == LogSchema(context=(TEXT,)).context


def test_files_with_texts_are_ingested(tmp_path: Path) -> None:
    """Texts of a CSV stay as they stand: numbers, quotes and empty cells too."""
    queries = ["007", "two, words", "", "NA", "ünïcode"]
    rows = ["query,item,click,propensity", *(f'"{q}",{i % 2},0,0.5' for i, q in enumerate(queries))]
    (tmp_path / "log.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    items = 'item_id,title\n0,"5"\n1,\n'
    (tmp_path / "items.csv").write_text(items, encoding="utf-8")
    (tmp_path / "schema.yaml").write_text(
        "log:\n  context: [{name: query, kind: text}]\n  action: item\n  reward: click\n"
        "  pscore: propensity\ncatalogue:\n  features: [{name: title, kind: text}]\n"
    )
    arguments = ["ingest", tmp_path / "log.csv", "--schema", tmp_path / "schema.yaml"]
    arguments += ["--catalogue", tmp_path / "items.csv", "--out", tmp_path / "out"]
    result = CliRunner().invoke(app, [str(one) for one in arguments])
    assert result.exit_code == 0, result.output
    log = ParquetLog.open(tmp_path / "out" / "log")
    found = pa.concat_tables(log.tables()).column("query").to_pylist()
    assert [text or "" for text in found] == queries
    assert log.schema.context == (FeatureSpec("query", "text"),)
    titles = Catalogue.open(tmp_path / "out" / "catalogue").column("title").to_pylist()
    assert [title or "" for title in titles] == ["5", ""]
