"""Simulated texts whose labels and words share topics, with hundreds to thousands of labels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from offtower.benchmarks.quality.labels import LabelSet

_WORDS_OF_TOPIC = 60
_TEST_EXAMPLES = 1500
_MISSING = 0.25
"""Share of an example's labels that its annotator left out, so that no learner is right always."""

Array = NDArray[np.float64]
Index = NDArray[np.int64]


def topical(seed: int, *, labels: int, examples: int = 5000, tokens: int = 3000) -> LabelSet:
    """Simulate texts of one or two topics, as in a thesaurus of descriptors.

    Labels have Zipf frequencies and belong to a topic each. An example's labels come from its
    topics, so they occur together. A third of its 20 to 120 words come from its labels (half of a
    label's 4 to 12 words are words of its topic), a third from its topics, the others from a Zipf
    vocabulary.
    """
    world = _Topics.draw(np.random.default_rng([seed, 21]), labels, tokens)
    rng = np.random.default_rng([seed, 22])
    drawn = [world.example(rng) for _ in range(examples + _TEST_EXAMPLES)]
    x = _indicators([words for words, _ in drawn], tokens)
    y = _indicators([own for _, own in drawn], labels)
    name = f"topics, {labels} labels"
    return LabelSet(name, x[:examples], y[:examples], x[examples:], y[examples:])


@dataclass(frozen=True)
class _Topics:
    background: Array
    """(tokens,) probabilities of words."""
    words: list[Index]
    """By topic."""
    words_of_label: list[Index]
    topic: Index
    """(labels,)."""
    members: list[Index]
    """Labels of each topic."""
    popularity: Array
    """(labels,)."""

    @classmethod
    def draw(cls, rng: np.random.Generator, labels: int, tokens: int) -> _Topics:
        topics = max(20, labels // 20)
        background = rng.permutation(1.0 / np.arange(5, tokens + 5) ** 0.9)
        popularity = rng.permutation(1.0 / np.arange(4, labels + 4))
        flat = np.sqrt(background) / np.sqrt(background).sum()
        words = [
            rng.choice(tokens, size=_WORDS_OF_TOPIC, p=flat, replace=False) for _ in range(topics)
        ]
        topic = rng.permutation(np.resize(np.arange(topics), labels))
        own = [
            np.concatenate(
                [
                    rng.choice(tokens, size=number - number // 2, p=flat),
                    rng.choice(words[topic[label]], size=number // 2),
                ]
            )
            for label, number in enumerate(rng.integers(4, 13, labels))
        ]
        members = [np.flatnonzero(topic == k) for k in range(topics)]
        return cls(
            background / background.sum(), words, own, topic, members, popularity / popularity.sum()
        )

    def example(self, rng: np.random.Generator) -> tuple[Index, Index]:
        """Return the distinct words and the labels of one example."""
        first = int(rng.choice(len(self.topic), p=self.popularity))
        topics = [self.topic[first]]
        if rng.random() < 0.5:
            topics.append(self.topic[int(rng.choice(len(self.topic), p=self.popularity))])
        near = np.concatenate([self.members[k] for k in topics])
        chance = self.popularity[near] ** 0.8
        number = min(len(near), max(1, int(rng.poisson(3.5))))
        own = rng.choice(near, size=number, p=chance / chance.sum())
        own = np.unique(np.concatenate([[first], own]))
        length = 20 + int(rng.poisson(100))
        share = rng.gamma(1.0, size=len(own))
        of_labels, of_topics = rng.binomial(length, 0.35), rng.binomial(length, 0.35)
        words = [
            int(rng.choice(self.words_of_label[label]))
            for label in rng.choice(own, size=of_labels, p=share / share.sum())
        ]
        words += [int(rng.choice(self.words[k])) for k in rng.choice(topics, size=of_topics)]
        others = max(0, length - of_labels - of_topics)
        background = rng.choice(len(self.background), size=others, p=self.background)
        seen = own[rng.random(len(own)) >= _MISSING]
        return np.unique([*words, *background]), seen if len(seen) else own[:1]


def _indicators(rows: list[Index], width: int) -> sparse.csr_matrix:
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])])
    index = np.concatenate(rows)
    ones = np.ones(len(index), np.float32)
    return sparse.csr_matrix((ones, index, offsets), shape=(len(rows), width))
