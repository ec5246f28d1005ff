"""A log that a policy served, evaluated with the policy that served it, has weights of 1.

The propensities are also compared with the simulators' own formulas, so that an error that serving
and evaluation share is seen; so are the frequencies of draws, in `test_frequencies.py`.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from offtower.config import ServingConfig
from offtower.data.simulate import ServedDistribution
from offtower.data.simulate.plackett_luce import conditional_log_prob
from offtower.retrieval import decisions_table
from tests.roundtrip.configurations import CONFIGURATIONS, ITEMS, QUICK, Configuration
from tests.roundtrip.conftest import MakeLoop
from tests.roundtrip.loop import START, Loop, at_time, served_log

ROUNDS = 60


def check(loop: Loop, configuration: Configuration, seed: int) -> None:
    served_as = serving_of(loop, configuration)
    logged = served_log(loop, served_as, rounds=ROUNDS, seed=seed, mode=configuration.draws)
    contexts, served = logged.contexts, logged.served
    found = loop.evaluate(logged.log, served_as, configuration.k)
    scores = masked_scores(loop, contexts)
    largest = np.abs(scores[np.isfinite(scores)]).max() / served_as.temperature
    allowed = tolerance(served.relative_error, float(largest))
    if configuration.mode == "top_k":
        np.testing.assert_array_equal(served.pscore, 1.0)
        best = np.argsort(-scores, axis=1, kind="stable")
        np.testing.assert_array_equal(served.item, best[:, : configuration.k])
    else:
        distribution = ServedDistribution(served_as.temperature, served_as.uniform, served_as.top)
        log_prob = distribution.log_prob(loop.scores(contexts), loop.mask(contexts))
        truth = np.exp(conditional_log_prob(log_prob, served.item))
        assert (np.abs(served.pscore / truth - 1.0) < allowed).all()
    # The weight of a position is the product of the ratios down to it.
    ratio = found.weight.copy()
    ratio[:, 1:] /= found.weight[:, :-1]
    assert (np.abs(ratio - 1.0) < allowed).all()
    value = found.rewards.sum(axis=1).mean()
    assert found.values["ips"] == pytest.approx(value, rel=allowed.sum(axis=1).max())
    assert found.logging_value == pytest.approx(value, rel=1e-12)


def tolerance(relative_error: np.ndarray, largest_logit: float) -> np.ndarray:
    """1e-5, or 4 roundings of float32 of the largest logit, which is more at logits above 42: the
    normalizer of an evaluation sums float32 logits.

    Where pscore is an estimate, 6 of its standard errors more (false alarm 2e-9).
    """
    return max(1e-5, 4.0 * 2.0**-24 * largest_logit) + 6.0 * relative_error


def masked_scores(loop: Loop, contexts: pa.Table) -> np.ndarray:
    scores, mask = loop.scores(contexts), loop.mask(contexts)
    return scores if mask is None else np.where(mask, scores, -np.inf)


def serving_of(loop: Loop, configuration: Configuration) -> ServingConfig:
    if configuration.mode == "top_k":
        return ServingConfig(k=configuration.k, mode="top_k")
    perplexity = configuration.perplexity
    return ServingConfig(
        k=configuration.k,
        temperature=1.0 if perplexity is None else loop.temperature(perplexity),
        uniform=configuration.uniform,
        top=configuration.top,
    )


@pytest.mark.parametrize("configuration", QUICK, ids=str)
def test_weights_are_one(loop_of: MakeLoop, configuration: Configuration) -> None:
    check(loop_of(configuration.forms, ITEMS), configuration, QUICK.index(configuration))


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(CONFIGURATIONS)), ids=lambda n: str(CONFIGURATIONS[n]))
def test_weights_are_one_in_all_configurations(loop_of: MakeLoop, number: int) -> None:
    configuration = CONFIGURATIONS[number]
    check(loop_of(configuration.forms, ITEMS), configuration, 100 + number)


@pytest.mark.parametrize("forms", ["all items", "all forms"])
def test_items_that_a_call_excludes_are_excluded_in_evaluation(
    loop_of: MakeLoop, forms: str
) -> None:
    """One list for each context, some of them empty; the best items of most contexts are in it."""
    loop = loop_of(forms, ITEMS)
    serving, seed = ServingConfig(k=2, temperature=loop.temperature(20.0), uniform=0.1), 90
    contexts, _ = at_time(loop.contexts(ROUNDS, seed), seed)
    best = np.argsort(-masked_scores(loop, contexts), axis=1, kind="stable")[:, :5]
    exclude = [loop.retriever.ids_of(row[: i % 6]) for i, row in enumerate(best)]
    logged = served_log(loop, serving, rounds=ROUNDS, seed=seed, exclude=exclude)
    for row, ids in zip(logged.served.item_id, exclude, strict=True):
        assert not set(row) & set(ids)
    found = loop.evaluate(logged.log, serving, 2)
    assert np.abs(found.weight - 1.0).max() < 2e-5


SHORT = [
    ServingConfig(k=12),
    ServingConfig(k=12, uniform=0.2),
    ServingConfig(k=12, top=20),
    ServingConfig(k=12, mode="top_k"),
]


@pytest.mark.parametrize("serving", SHORT, ids=lambda one: one.text)
def test_rounds_are_shorter_where_fewer_items_are_eligible(
    loop_of: MakeLoop, serving: ServingConfig
) -> None:
    """Contexts of 3 to 15 candidates and slates of 12: served, logged and evaluated as they are."""
    loop, seed = loop_of("candidates", ITEMS), 91 + SHORT.index(serving)
    contexts, _ = at_time(loop.contexts(ROUNDS, seed), seed)
    column = contexts.column_names.index("candidates")
    lists = [ids[: 3 + i % 13] for i, ids in enumerate(contexts.column(column).to_pylist())]
    contexts = contexts.set_column(column, "candidates", pa.array(lists))
    retriever = loop.serving(serving)
    served = retriever.sample(contexts, serving.k, seed=seed)
    lengths = np.array([min(len(ids), serving.k) for ids in lists])
    np.testing.assert_array_equal(served.lengths, lengths)
    decisions = decisions_table(retriever, contexts, served, served_at=START)
    found = loop.evaluate(loop.log(contexts, decisions, served, seed), serving, serving.k)
    assert np.abs(found.weight - 1.0).max() < 2e-5
    assert found.values["ips"] == pytest.approx(found.rewards.sum(axis=1).mean(), rel=2e-5)
    if serving.mode == "sample":
        distribution = ServedDistribution(1.0, serving.uniform, serving.top)
        log_prob = distribution.log_prob(loop.scores(contexts), loop.mask(contexts))
        for row, length in enumerate(lengths):
            shown = served.item[row : row + 1, :length]
            truth = np.exp(conditional_log_prob(log_prob[row : row + 1], shown))[0]
            np.testing.assert_allclose(served.pscore[row, :length], truth, rtol=1e-5)
