"""Frequencies of draws from 8 items against enumerated propensities.

Chi-square over all slates of three items, cells of low expected count joined. The false-alarm rate
is 1e-4 in total: each test has an equal part of it.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from scipy import stats

from offtower.config import ServingConfig
from offtower.data.simulate import ServedDistribution
from offtower.data.simulate.plackett_luce import all_slates, slate_probabilities
from offtower.retrieval.propensity_sampler import Mode
from tests.roundtrip.conftest import MakeLoop

ITEMS, DRAWS = 8, 2000
CASES = [
    ("all items", ServingConfig(k=1)),
    ("all items", ServingConfig(k=3, temperature=0.5)),
    ("all items", ServingConfig(k=3, temperature=0.3, uniform=0.2)),
    ("all items", ServingConfig(k=3, top=5)),
    ("all items", ServingConfig(k=2, top=4, uniform=0.1)),
    ("few", ServingConfig(k=3, uniform=0.1)),
    ("few", ServingConfig(k=2, top=3, uniform=0.2)),
]
ALPHA = 1e-4 / (2 * len(CASES))


@pytest.mark.parametrize("number", range(len(CASES)))
def test_draws_have_their_propensities(loop_of: MakeLoop, number: int) -> None:
    check(loop_of, number, "exact")


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(CASES)))
def test_softmax_draws_have_their_propensities(loop_of: MakeLoop, number: int) -> None:
    check(loop_of, number, "softmax")


def check(loop_of: MakeLoop, number: int, mode: Mode) -> None:
    forms, serving = CASES[number]
    loop = loop_of(forms, ITEMS)
    context = loop.contexts(1, seed=5)
    slates = all_slates(ITEMS, serving.k)
    distribution = ServedDistribution(serving.temperature, serving.uniform, serving.top)
    mask = loop.mask(context)
    assert mask is None or not mask.all()
    log_prob = distribution.log_prob(loop.scores(context), mask)
    probability = slate_probabilities(log_prob, slates)[0]
    assert probability.sum() == pytest.approx(1.0, abs=1e-12)
    same = context.take(pa.array(np.zeros(DRAWS, dtype=np.int64)))
    served = loop.serving(serving).sample(same, serving.k, mode=mode, seed=7)
    base = ITEMS ** np.arange(serving.k)
    keys = slates @ base
    place = {int(key): i for i, key in enumerate(keys)}
    number = np.array([place[int(key)] for key in served.item @ base])
    np.testing.assert_allclose(np.prod(served.pscore, axis=1), probability[number], rtol=1e-5)
    assert pvalue(np.bincount(number, minlength=len(slates)), probability) > ALPHA


def pvalue(count: np.ndarray, probability: np.ndarray, least: float = 8.0) -> float:
    """Of a chi-square test; cells are joined, rarest first, until each expects `least`."""
    impossible = probability == 0.0
    assert not count[impossible].any(), "an item was drawn that cannot be"
    order = np.argsort(probability[~impossible])
    expected = (probability[~impossible] * count.sum())[order]
    count = count[~impossible][order]
    cell = np.minimum(np.cumsum(expected) // least, (expected.sum() - least) // least)
    large = expected >= least
    cell = np.where(large, cell.max() + 1 + np.cumsum(large), cell).astype(np.int64)
    _, cell = np.unique(cell, return_inverse=True)
    joined = np.bincount(cell, expected)
    return float(stats.chisquare(np.bincount(cell, count), joined).pvalue)
