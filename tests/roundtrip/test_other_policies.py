"""The log of one served policy, evaluated with another: the mean weight is 1.

Weights of the evaluated policy are bounded, since both policies share their scores and the logging
one has uniform draws. z-scores of all positions are compared with the quantile of a family-wise
error of 1e-4, by Bonferroni.
"""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from offtower.config import ServingConfig
from tests.roundtrip.configurations import ITEMS
from tests.roundtrip.conftest import MakeLoop
from tests.roundtrip.loop import Loop, served_log

PAIRS = [
    ("all items", 1, {"uniform": 0.3}, {"uniform": 0.1}),
    ("all items", 3, {"uniform": 0.3}, {"uniform": 0.1}),
    ("all items", 3, {"uniform": 0.3}, {"uniform": 0.3, "top": 100}),
    ("all items", 10, {"uniform": 0.3}, {"uniform": 0.1, "softer": 0.8}),
    ("all forms", 1, {"uniform": 0.5}, {}),
    ("all forms", 3, {"uniform": 0.3}, {"uniform": 0.1, "softer": 1.3}),
    ("all forms", 3, {"uniform": 0.5}, {"uniform": 0.2, "top": 20}),
]
POSITIONS = sum(k for _, k, _, _ in PAIRS)
LARGEST = float(stats.norm.isf(0.5e-4 / POSITIONS))
ROUNDS = 800


def serving(
    loop: Loop, k: int, uniform: float = 0.0, top: int | None = None, softer: float = 1.0
) -> ServingConfig:
    temperature = softer * loop.temperature(100.0)
    return ServingConfig(k=k, temperature=temperature, uniform=uniform, top=top)


QUICK = 2


@pytest.mark.parametrize("number", [QUICK])
def test_mean_weights_are_one(loop_of: MakeLoop, number: int) -> None:
    check(loop_of, number)


@pytest.mark.slow
@pytest.mark.parametrize("number", [n for n in range(len(PAIRS)) if n != QUICK])
def test_mean_weights_of_all_pairs_are_one(loop_of: MakeLoop, number: int) -> None:
    check(loop_of, number)


def check(loop_of: MakeLoop, number: int) -> None:
    forms, k, logging, target = PAIRS[number]
    loop = loop_of(forms, ITEMS)
    logged = served_log(loop, serving(loop, k, **logging), rounds=ROUNDS, seed=700 + number)
    found = loop.evaluate(logged.log, serving(loop, k, **target), k)
    weight = found.weight
    assert weight.std(axis=0).min() > 0.1, "the policies are the same"
    z = (weight.mean(axis=0) - 1.0) / (weight.std(axis=0) / ROUNDS**0.5)
    assert (np.abs(z) < LARGEST).all(), z
