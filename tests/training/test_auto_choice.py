"""The choice between candidates and the logging policy, and the bounds behind it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy.special import ndtri, stdtrit

from offtower import TwoTowerPolicyLearner
from offtower.benchmarks.quality.bilinear import BilinearWorld
from offtower.config import ServingConfig
from offtower.errors import KeepLoggingWarning
from offtower.training.auto.choice import Choice, Tolerance, choose
from offtower.training.auto.estimates import simultaneous_quantile
from offtower.training.auto.held_out import (
    BASED_INVERSE_TEMPERATURES,
    INVERSE_TEMPERATURES,
    CandidatePolicy,
    HeldOutRows,
    HeldOutTerms,
)
from offtower.training.auto.prior_order import CLONE
from offtower.training.auto.serving import Requirement, propose_serving

ITEMS = 8
SCORES = np.linspace(0.0, 2.0, ITEMS)


def softmax(scores: np.ndarray) -> np.ndarray:
    weight = np.exp(scores - scores.max())
    return weight / weight.sum()


def rowwise(scores: np.ndarray) -> np.ndarray:
    weight = np.exp(scores - scores.max(axis=1, keepdims=True))
    return weight / weight.sum(axis=1, keepdims=True)


def held_out(
    candidates: dict[str, np.ndarray],
    logging: np.ndarray,
    expected: np.ndarray,
    n: int,
    seed: int = 0,
    predicted: np.ndarray | None = None,
) -> HeldOutRows:
    """Rows of one context and `ITEMS` items, with the reward model's predictions of the items."""
    predicted = np.full(len(logging), 0.5) if predicted is None else predicted
    rng = np.random.default_rng(seed)
    action = rng.choice(len(logging), n, p=logging)
    terms = {}
    for name, scores in candidates.items():
        for s in INVERSE_TEMPERATURES:
            policy = softmax(s * scores)
            model = np.full(n, policy @ predicted)
            terms[CandidatePolicy(name, s)] = HeldOutTerms(policy[action] / logging[action], model)
    return HeldOutRows(
        reward=(rng.random(n) < expected[action]).astype(float),
        terms=terms,
        action_reward=predicted[action],
        scale=dict.fromkeys(candidates, 1.0),
        loss={next(iter(candidates)): 0.5},
        unit=None,
        pscore=logging[action],
        eligible_items=np.full(n, float(len(logging))),
    )


def test_a_candidate_without_evidence_does_not_replace_the_logging_policy() -> None:
    """A near-optimal log: the candidate's scores are reversed, and the log rarely shows its items,
    so that the reward model would speak for it."""
    logging, expected = softmax(6.0 * SCORES), 0.2 + 0.35 * SCORES
    # A model that the log never contradicts about the items that it does not show.
    bold = np.where(logging > 0.01, expected, 0.99)
    rows = held_out({"model": -SCORES, CLONE: 6.0 * SCORES}, logging, expected, 600, 0, bold)
    free = choose(rows, ["model", CLONE])
    assert free.advice is None
    assert choose(rows, ["model"], tolerance=Tolerance(0.005)).keep_logging
    kept = choose(rows, ["model", CLONE], tolerance=Tolerance(0.0))
    assert kept.keep_logging and kept.chosen.name == CLONE
    assert kept.advice is not None and "keep the logging policy" in kept.advice
    truth = softmax(kept.chosen.inverse_temperature * 6.0 * SCORES) @ expected
    assert truth >= logging @ expected
    # Two standard errors.
    assert kept.low < kept.value < truth + 0.025
    # Of a bad log the clone stays as soft as it is, although that loses nothing.
    bad = held_out({"model": SCORES, CLONE: -6.0 * SCORES}, softmax(-6.0 * SCORES), expected, 600)
    kept = choose(bad, ["model", CLONE], tolerance=Tolerance(0.005))
    assert kept.best[CLONE].inverse_temperature == 1.0


def tilted(scores: np.ndarray, n: int, seed: int) -> tuple[HeldOutRows, np.ndarray]:
    """Rows of an even log of 200 items, a candidate that tilts it, a clone that is far from it, and
    the candidate's true values."""
    items = len(scores)
    logging, expected = np.full(items, 1 / items), np.linspace(0.0, 0.5, items)
    rng = np.random.default_rng(seed)
    action = rng.integers(0, items, n)
    terms, values = {}, []
    for s in BASED_INVERSE_TEMPERATURES:
        policy = softmax(s * scores)
        terms[CandidatePolicy("model", s)] = HeldOutTerms(policy[action] * items, np.zeros(n))
        values.append(policy @ expected)
    for s in INVERSE_TEMPERATURES:
        policy = softmax(s * np.linspace(2.0, -2.0, items))
        terms[CandidatePolicy(CLONE, s)] = HeldOutTerms(policy[action] * items, np.zeros(n))
    rows = HeldOutRows(
        reward=(rng.random(n) < expected[action]).astype(float),
        terms=terms,
        action_reward=np.zeros(n),
        scale={"model": 1.0, CLONE: 4.0},
        loss={"model": 0.5},
        unit=None,
        pscore=logging[action],
        eligible_items=np.full(n, float(items)),
        based=frozenset({"model"}),
    )
    return rows, np.array(values)


def test_a_tilted_base_qualifies_by_a_gain_and_not_by_changing_nothing() -> None:
    """Random scores qualify in at most 1 of 100 logs by the stated error; 30 have at most 2 with
    probability .997. Right ones qualify; bounds of confidence .95 are too high in at most 3 of 10
    with probability .999."""
    even = np.linspace(-1.7, 1.7, 200)
    noise = np.random.default_rng(0)
    chosen = []
    for seed in range(30):
        rows, values = tilted(noise.permutation(even), 400, seed)
        found = choose(rows, ["model", CLONE], tolerance=Tolerance(0.0))
        least = [one.gain_lower_bound for one in found.estimates["model"]]
        # The base itself loses nothing that matters, and that is no evidence.
        assert least[0] > -0.005
        chosen.append(not found.keep_logging)
        if found.keep_logging:
            # The base is nearer to the log than the clone.
            assert found.chosen.name == "model"
            assert found.chosen.inverse_temperature == BASED_INVERSE_TEMPERATURES[0]
            assert found.low < values[0] < found.value + 0.1
    assert sum(chosen) <= 2
    qualified = above = 0
    for seed in range(10):
        rows, values = tilted(even, 400, seed)
        found = choose(rows, ["model", CLONE], tolerance=Tolerance(0.0))
        true = dict(zip(rows.policies("model"), values, strict=True))
        chosen_policy = CandidatePolicy("model", found.chosen.inverse_temperature)
        assert found.chosen.name == "model"
        qualified += not found.keep_logging
        above += found.low > true[chosen_policy]
    assert qualified >= 8
    assert above <= 3


def test_rows_that_would_decide_are_estimated() -> None:
    """Twice the median of what 20 short logs name suffices in at least half of 10 long ones."""
    scores = np.linspace(0.0, 1.0, ITEMS)
    logging, expected = np.full(ITEMS, 1 / ITEMS), 0.3 + 0.04 * scores

    def chosen(n: int, seed: int) -> Choice:
        rows = held_out({"model": scores}, logging, expected, n, seed, expected)
        return choose(rows, ["model"], tolerance=Tolerance(0.0))

    named = []
    for choice in (chosen(2000, seed) for seed in range(20)):
        assert choice.keep_logging or not choice.undecided
        for one in choice.undecided.values():
            assert one.value > choice.logging and one.times > 1.0
            assert f"about {one.times:.1f} times as many rows" in (choice.advice or "")
            named.append(one.times)
    times = float(np.median(named))
    assert len(named) >= 8 and 2.0 < times < 40.0
    decided = [not chosen(int(2 * times * 2000), seed).keep_logging for seed in range(100, 110)]
    assert np.mean(decided) >= 0.5


def test_clear_gains_are_taken() -> None:
    logging, expected = np.full(ITEMS, 1 / ITEMS), 0.1 + 0.4 * SCORES
    rows = held_out({"model": SCORES, CLONE: np.zeros(ITEMS)}, logging, expected, 1500)
    choice = choose(rows, ["model", CLONE], tolerance=Tolerance(0.005))
    assert not choice.keep_logging and choice.chosen.name == "model"
    assert choice.logging == rows.reward.mean()
    truth = softmax(choice.chosen.inverse_temperature * SCORES) @ expected
    assert logging @ expected < choice.low < truth


def test_the_quantile_of_several_means_is_that_of_their_correlation() -> None:
    rng = np.random.default_rng(3)
    units, level = 4000, 0.99
    one = rng.standard_normal((units, 1))
    widened = float(stdtrit(units - 1, level)) / float(ndtri(level))
    same = simultaneous_quantile(np.repeat(one, 30, axis=1), level)
    # 4,096 draws: the standard error of the quantile is .06.
    assert same == pytest.approx(widened * ndtri(level), abs=0.25)
    apart = simultaneous_quantile(rng.standard_normal((units, 30)), level)
    assert apart == pytest.approx(widened * ndtri(level ** (1 / 30)), abs=0.25)
    assert simultaneous_quantile(one[:1], level) == np.inf
    # Few units have Student's tails.
    few = simultaneous_quantile(one[:5] - one[:5].mean(), level)
    assert few >= stdtrit(4, level) * (1 - 1e-9)


def test_bounds_hold_under_the_choice() -> None:
    """Of 8 candidates none of which is better than the log, a false replacement has a probability
    of at most .01 by the bounds; P(more than 6 of 60 logs) is below 1e-5."""
    rng = np.random.default_rng(0)
    logging, expected = np.full(ITEMS, 1 / ITEMS), np.full(ITEMS, 0.5)
    expected[0] = 0.2
    false = exceeded = above = 0
    for seed in range(60):
        # Every candidate prefers the worst item slightly, and loses more than is tolerated.
        names = {f"c{k}": 0.3 * rng.standard_normal(ITEMS) for k in range(8)}
        for scores in names.values():
            scores[0] = scores.max() + 0.3
        rows = held_out(names, logging, expected, 300, seed)
        choice = choose(rows, list(names), tolerance=Tolerance(0.005))
        false += not choice.keep_logging
        scores = choice.chosen.inverse_temperature * names[choice.chosen.name]
        truth = softmax(scores) @ expected
        exceeded += choice.low > truth
        above += choice.value > truth
    assert false <= 6
    # The reported value is too high in at most half of the logs;
    # P(more than 42 of 60) is below 1e-3.
    assert above <= 42
    # Confidence .95: P(more than 12 of 60) is below 1e-4.
    assert exceeded <= 12


def test_mass_off_the_log_counts_as_the_smallest_reward() -> None:
    """Half of the policy's mass is on an item that the log never shows."""
    logging = np.r_[np.full(ITEMS - 1, 1 / (ITEMS - 1)), 0.0]
    scores = np.zeros(ITEMS)
    scores[-1] = np.log(ITEMS - 1)
    expected = np.full(ITEMS, 0.9)
    rows = held_out({"half": scores}, logging, expected, 4000, predicted=expected)
    choice = choose(rows, ["half"], tolerance=Tolerance(0.005))
    first = choice.estimates["half"][0]
    assert first.covered_share == pytest.approx(0.5, abs=0.03)
    assert choice.keep_logging and first.lower_bound < 0.5


def test_the_learner_says_so() -> None:
    world = BilinearWorld(10, 20.0, seed=3)
    settings = {"candidates": ["likelihood_linear", "behavior_cloning"], "epochs": 3}
    learner = TwoTowerPolicyLearner(5, 5, auto=settings)
    with pytest.warns(KeepLoggingWarning, match="keep the logging policy"):
        learner.fit(world.sample(60, seed=1))
    assert learner.auto_.report["keep_logging"] is True
    assert learner.auto_.result.advice == learner.auto_.choice.advice
    assert learner.auto_.report["serving"]["as_trained"]["temperature"] == 1.0
    anyway = TwoTowerPolicyLearner(5, 5, auto={**settings, "tolerated_loss": None})
    assert anyway.fit(world.sample(60, seed=1)).auto_.report["keep_logging"] is False


def test_served_settings_make_the_gain_measurable() -> None:
    """Values and weights of mixtures are those of the enumerated policies."""
    items = 40
    logging, scores = np.full(items, 1 / items), np.linspace(0.0, 1.0, items)
    expected = 0.1 + 0.5 * scores
    n = 3000
    rows = held_out({"model": scores}, logging, expected, n, predicted=expected)
    choice = choose(rows, ["model"], tolerance=Tolerance(0.005))
    assert not choice.keep_logging
    needed = Requirement(rows=n, effective_sample_size=400.0, confidence=0.95)
    found = propose_serving(choice, rows, needed)
    assert found.sharpest.effective_sample_size < 400.0 and found.settings is not None
    served = found.settings
    inverse_temperature = choice.chosen.inverse_temperature
    policy = (1 - served.uniform) * softmax(scores * inverse_temperature / served.temperature)
    policy += served.uniform / items
    # Bounds of 6 standard errors.
    assert served.value == pytest.approx(policy @ expected, abs=6 * served.gain_error)
    true_size = n / (items * np.square(policy).sum())
    assert served.effective_sample_size == pytest.approx(true_size, rel=0.15)
    assert found.loss == found.sharpest.value - served.value
    assert found.loss > 0.0 and served.gain > 2.8 * served.gain_error
    config = ServingConfig(temperature=served.temperature, uniform=served.uniform)
    assert config.text in found.text
    # A log ten times as long can decide on a sharper policy.
    longer = propose_serving(choice, rows, replace(needed, rows=10 * n)).settings
    assert longer is not None and longer.value > served.value
    short = propose_serving(choice, rows, replace(needed, rows=20))
    assert short.settings is None and "log more rows" in short.text


@pytest.mark.parametrize("seed", range(3))
def test_promises_of_served_settings_hold_on_a_fresh_log(seed: int) -> None:
    """Effective sample size, standard error and value loss of a proposal against another log of the
    same world and the enumerated values of its policies."""
    n = 4000
    world = BilinearWorld(50, 1.0, seed, dim=3)
    error = np.random.default_rng([seed, 1]).standard_normal((3, 50))

    def scores(context: np.ndarray) -> np.ndarray:
        """Of an imperfect candidate, which is its own reward model."""
        q = world.expected(context)
        return np.log(q / (1.0 - q)) + 0.5 * context @ error

    def log(seed: int) -> tuple[np.ndarray, dict[str, np.ndarray], np.ndarray]:
        one = world.sample(n, seed)
        return world.contexts(n, seed), one, (np.arange(n), one["action"])  # type: ignore[return-value]

    context, seen, at = log(1)
    logit = scores(context)
    predicted = 1.0 / (1.0 + np.exp(-logit))
    terms = {}
    for s in INVERSE_TEMPERATURES:
        policy = rowwise(s * logit / logit.std())
        weight = policy[at] / seen["pscore"]
        terms[CandidatePolicy("model", s)] = HeldOutTerms(weight, (policy * predicted).sum(axis=1))
    rows = HeldOutRows(
        *(seen["reward"], terms, predicted[at], {"model": 1.0}, {"model": 0.5}, None),
        *(seen["pscore"], np.full(n, 50.0)),
    )
    choice = choose(rows, ["model"], tolerance=Tolerance(0.005))
    needed = Requirement(rows=n, effective_sample_size=800.0, confidence=0.95)
    found = propose_serving(choice, rows, needed)
    served = found.settings
    assert served is not None and served.temperature > 1.0

    def policies(context: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        sharp = choice.chosen.inverse_temperature * scores(context) / logit.std()
        softer = rowwise(sharp / served.temperature)
        return rowwise(sharp), (1.0 - served.uniform) * softer + served.uniform / 50

    fresh, again, at = log(2)
    policy = policies(fresh)[1]
    weight = policy[at] / again["pscore"]
    effective = weight.sum() ** 2 / np.square(weight).sum()
    assert effective == pytest.approx(served.effective_sample_size, rel=0.2)
    assert effective > 0.9 * needed.effective_sample_size
    # The next evaluation's estimates of the gain: self-normalized, and doubly robust.
    q = 1.0 / (1.0 + np.exp(-scores(fresh)))
    value = weight @ again["reward"] / weight.sum()
    snips = weight * (again["reward"] - value) / weight.mean() - again["reward"]
    dr = weight * (again["reward"] - q[at]) + (policy * q).sum(axis=1) - again["reward"]
    errors = [one.std() / np.sqrt(n) for one in (snips, dr)]
    assert max(errors) == pytest.approx(served.gain_error, rel=0.2)
    many = world.contexts(20_000, 3)
    expected = world.expected(many)
    values = [(one * expected).sum(axis=1) for one in policies(many)]
    logging = (world.logging(expected) * expected).sum(axis=1)
    # Four standard errors of the estimates on the first log.
    assert served.gain == pytest.approx((values[1] - logging).mean(), abs=4 * served.gain_error)
    # The loss is that of nearly deterministic policies, whose error is larger.
    bound = 4 * choice.chosen.contribution.std() / np.sqrt(n)
    assert found.loss == pytest.approx((values[0] - values[1]).mean(), abs=bound)


def test_one_item_is_the_logging_policy() -> None:
    """All weights are 1, whatever the temperature."""
    rng = np.random.default_rng(0)
    n = 60
    feedback = {
        "context": rng.standard_normal((n, 3)),
        "action_context": np.ones((1, 2)),
        "action": np.zeros(n, dtype=np.int64),
        "reward": (rng.random(n) < 0.5).astype(float),
        "pscore": np.ones(n),
    }
    settings = {"candidates": ["regression_linear", CLONE], "epochs": 2}
    found = TwoTowerPolicyLearner(3, 2, auto=settings).fit(feedback).auto_.choice
    assert not found.keep_logging
    for one in (one for options in found.estimates.values() for one in options):
        assert one.mean_weight == pytest.approx(1.0, abs=1e-6)
        assert one.gain_lower_bound == pytest.approx(0.0, abs=1e-5)
