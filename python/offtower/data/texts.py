"""Texts as bags of hashed words and subwords, the same in every process and version.

A text is normalized by Unicode's NFKC, full case folding and NFKC again, and its first characters
are read. Whitespace separates words. A word with a mark at each end gives its character n-grams of
3 to 5 and itself, as in Bojanowski et al. 2017, "Enriching Word Vectors with Subword Information";
each is hashed to a row of one table (Weinberger et al. 2009). The mean of their rows weighs a token
by how often it occurs.
"""

from __future__ import annotations

import unicodedata
import zlib

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from offtower.data.columns import Column, category_values, distinct_values, splitmix64
from offtower.data.feature_schema import FeatureSpec
from offtower.data.features import BagArray, take_bag

Keys = NDArray[np.uint64]

_GRAMS = (3, 4, 5)
_BEGIN, _END = "\x02", "\x03"
"""Marks of a word's ends; control characters, so that no letter equals them."""
_AT_ONCE = 1 << 22
"""Characters that are hashed at a time."""


def normalized(text: str, characters: int) -> str:
    """The words of a text as they are hashed, with one space between them."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    folded = unicodedata.normalize("NFKC", folded)[:characters]
    return " ".join(folded.split())


def text_bags(spec: FeatureSpec, column: Column) -> BagArray:
    """Encode n texts; null and empty ones have no tokens.

    Returns:
        1 + the bucket of each token: words in their order, or subwords by their length and place.
    """
    values, index = distinct_values(pc.cast(category_values(column), pa.string()))
    texts = [normalized(text, spec.most_characters) for text in values.to_pylist()]
    seed = np.uint64(zlib.crc32(spec.name.encode()))
    tokens: list[NDArray[np.int64]] = []
    counts = [np.zeros(1, dtype=np.int64)]
    for part in _parts(texts):
        key, text = _words(part) if spec.hashed_tokens == "words" else _subwords(part)
        tokens.append(1 + ((key ^ seed) % np.uint64(spec.buckets)).astype(np.int64))
        counts.append(np.bincount(text, minlength=len(part)))
    # One more, empty, is null.
    offsets = np.cumsum(np.concatenate([*counts, [0]])).astype(np.int64)
    joined = np.concatenate([np.zeros(0, dtype=np.int64), *tokens])
    return take_bag(BagArray(joined, offsets), index)


def _parts(texts: list[str]) -> list[list[str]]:
    """Consecutive texts of at most about `_AT_ONCE` characters."""
    if not texts:
        return []
    ends = np.cumsum([len(text) for text in texts])
    edges = np.flatnonzero(np.diff(ends // _AT_ONCE)) + 1
    return [texts[a:b] for a, b in zip([0, *edges], [*edges, len(texts)], strict=True)]


def _marked(texts: list[str]) -> tuple[NDArray[np.uint64], NDArray[np.int64], NDArray[np.int64]]:
    """Code points of all words with their marks, the word of each, and the text of each word."""
    marked = [_BEGIN + text.replace(" ", _END + _BEGIN) + _END if text else "" for text in texts]
    codes = np.frombuffer("".join(marked).encode("utf-32-le"), dtype="<u4").astype(np.uint64)
    # Counted by spaces: marks may also be characters of a text.
    per_text = np.array([text.count(" ") + 1 if text else 0 for text in texts], dtype=np.int64)
    lengths = [len(word) + 2 for text in texts if text for word in text.split(" ")]
    word = np.repeat(np.arange(len(lengths)), lengths)
    return codes, word, np.repeat(np.arange(len(texts)), per_text)


def _words(texts: list[str]) -> tuple[Keys, NDArray[np.int64]]:
    """Hashes of the words in their order, and the text of each."""
    codes, word, text = _marked(texts)
    if not word.size:
        return np.zeros(0, dtype=np.uint64), text
    length = np.bincount(word)
    return _chained(codes, np.cumsum(length) - length, length), text


def _subwords(texts: list[str]) -> tuple[Keys, NDArray[np.int64]]:
    """Hashes of the words and of their n-grams, and the text of each, sorted by text."""
    codes, word, text = _marked(texts)
    if not word.size:
        return np.zeros(0, dtype=np.uint64), text
    length = np.bincount(word)
    first = np.cumsum(length) - length
    keys, of_text = [_chained(codes, first, length)], [text]
    for n in _GRAMS:
        place = np.arange(max(0, codes.size - n + 1))
        place = place[word[place] == word[place + n - 1]]
        # A word of n characters is its own n-gram, which counts once.
        place = place[length[word[place]] > n]
        keys.append(_chained(codes, place, np.full(place.size, n)))
        of_text.append(text[word[place]])
    joined = np.concatenate(of_text)
    order = np.argsort(joined, kind="stable")
    return np.concatenate(keys)[order], joined[order]


def _chained(
    codes: NDArray[np.uint64], first: NDArray[np.int64], length: NDArray[np.int64]
) -> Keys:
    """Hashes of codes[first[i]:first[i] + length[i]], chained from the length by SplitMix64."""
    key = splitmix64(length.astype(np.uint64))
    active, done = np.arange(first.size), 0
    while active.size:
        key[active] = splitmix64(key[active] ^ codes[first[active] + done])
        done += 1
        active = active[length[active] > done]
    return key
