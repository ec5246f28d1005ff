"""Encoders of texts: what they must offer, and one of scikit-learn's parts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray


class TextEncoder(Protocol):
    """Makes vectors of texts. It is built as `Class(**arguments)`.

    A method `fit(texts)` is called first where there is one, with a sample of the catalogue's
    texts; the same texts must give the same encoder, since a resumed run fits it again.
    """

    def encode(self, texts: Sequence[str]) -> Any:
        """n texts -> (n, dim) finite numbers; each row depends on its text alone."""


class HashedTextEncoder:
    """Character n-grams of words, hashed, weighted and reduced by a truncated SVD.

    Latent semantic analysis (Deerwester et al. 1990) on hashed subwords, from scikit-learn's
    `HashingVectorizer` and `TruncatedSVD`: no model is downloaded, and a catalogue of a million
    titles takes minutes.

    Args:
        dim: of the vectors, at most the number of different texts.
        features: hashed n-grams.
        seed: of the SVD.
    """

    def __init__(self, dim: int = 64, features: int = 2**18, seed: int = 0) -> None:
        from sklearn.decomposition import TruncatedSVD
        from sklearn.feature_extraction.text import HashingVectorizer

        self._grams = HashingVectorizer(
            analyzer="char_wb", ngram_range=(3, 5), n_features=features, alternate_sign=False
        )
        self._svd = TruncatedSVD(dim, random_state=seed)

    def fit(self, texts: Sequence[str]) -> None:
        """Find the directions of most variance among the texts."""
        self._svd.fit(self._grams.transform(texts))

    def encode(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """n texts -> (n, dim)."""
        found: NDArray[np.float64] = self._svd.transform(self._grams.transform(texts))
        return found
