"""Slates and eligible items of the simulated world, against enumeration in plain numpy and loops.

Each statistical test states its false-alarm rate.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pytest
from scipy import stats

from offtower.data.simulate import (
    EligibilitySettings,
    LoggingPolicy,
    ServedDistribution,
    SimulatedWorld,
    SlateSettings,
    WorldSettings,
    fixed_slate_value,
    logging_value,
    multi_policy_log,
    parse_eligibility,
    propensity_column,
    slate_value,
)
from offtower.errors import ConfigError, DataError

SMALL = WorldSettings(3, 3, 3, intercept=0.0)
ALL_FORMS = EligibilitySettings(regions=3, days=10, seen=3, candidates=6)


def drawn(world: SimulatedWorld, n: int, seed: int = 0) -> pa.Table:
    return pa.concat_tables(world.log(n, seed)).combine_chunks()


def rounds(table: pa.Table, size: int) -> pa.Table:
    return table.take(pa.array(np.arange(0, table.num_rows, size)))


def items_of(world: SimulatedWorld, table: pa.Table) -> np.ndarray:
    ids = world.item_ids.to_pylist()
    return np.array([ids.index(one) for one in table["action"].to_pylist()])


def eligible_by_loops(world: SimulatedWorld, table: pa.Table) -> np.ndarray:
    """(n, N), from the columns of log and catalogue alone."""
    found = np.ones((table.num_rows, world.n_items), dtype=bool)
    for i, row in enumerate(table.to_pylist()):
        for a, item in enumerate(world.catalogue_table().to_pylist()):
            if "region" in row:
                found[i, a] &= row["region"] in item["regions"]
            if "listed_at" in item:
                found[i, a] &= item["listed_at"] <= row["timestamp"] < item["delisted_at"]
            if "seen" in row:
                found[i, a] &= item["item_id"] not in row["seen"]
            if "candidates" in row:
                found[i, a] &= item["item_id"] in row["candidates"]
    return found


def single_draw_by_loops(world: SimulatedWorld, table: pa.Table) -> np.ndarray:
    """(n, N) pi_0, with the mask from loops."""
    logit = world.context_latent(table).numpy() @ world.item_latent.numpy().T
    logit += world.item_logit.numpy()
    policy = world.logging_policy
    if policy.kind == "popularity":
        logit = np.tile(world.item_logit.numpy(), (len(logit), 1))
    mask = eligible_by_loops(world, table)
    weight = np.exp(policy.beta * logit) * mask
    softmax = weight / weight.sum(axis=1, keepdims=True)
    return (1 - policy.epsilon) * softmax + policy.epsilon * mask / mask.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("kind", ["contextual", "popularity"])
@pytest.mark.parametrize("eligible", [None, ALL_FORMS])
def test_propensities_are_conditional_on_the_positions_above(
    kind: str,
    eligible: EligibilitySettings | None,
    large: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As a small catalogue, and as a large one, which no array over all items is made for."""
    if large:
        monkeypatch.setattr("offtower.data.simulate.rounds.DENSE_ITEMS", 1)
    world = SimulatedWorld(
        11,
        WorldSettings(3, 3, 3, string_ids=True),
        seed=4,
        logging=LoggingPolicy(kind, 1.5, 0.2),
        slate=SlateSettings(3),
        eligible=eligible,
    )
    log = drawn(world, 300, seed=1)
    p = single_draw_by_loops(world, rounds(log, 3))
    slate = items_of(world, log).reshape(-1, 3)
    assert (np.diff(np.sort(slate, axis=1)) > 0).all()
    left, expected = np.ones(300), []
    for k in range(3):
        own = p[np.arange(300), slate[:, k]]
        expected.append(own / left)
        left = left - own
    found = log["pscore"].to_numpy().reshape(-1, 3)
    np.testing.assert_allclose(found, np.stack(expected, axis=1), rtol=1e-9)
    assert log["position"].to_pylist()[:4] == [0, 1, 2, 0]
    assert len(set(log["round_id"].to_pylist())) == 300
    assert set(world.log_schema.columns) <= set(log.column_names)


@pytest.mark.parametrize(
    "eligible",
    [
        EligibilitySettings(regions=5),
        EligibilitySettings(days=3),
        EligibilitySettings(seen=4),
        EligibilitySettings(candidates=4),
        ALL_FORMS,
    ],
)
def test_eligible_sets_follow_the_columns(eligible: EligibilitySettings) -> None:
    """The mask is that of the columns; every row has an item; shown items are eligible."""
    world = SimulatedWorld(23, SMALL, seed=5, eligible=eligible)
    log = drawn(world, 200)
    mask = eligible_by_loops(world, log)
    assert world.eligible is not None
    np.testing.assert_array_equal(world.eligible.mask(log), mask)
    assert mask.any(axis=1).all() and not mask.all()
    assert mask[np.arange(200), items_of(world, log)].all()
    contexts = world.contexts(50, seed=3)
    np.testing.assert_array_equal(world.eligible.mask(contexts), eligible_by_loops(world, contexts))
    p = single_draw_by_loops(world, contexts)
    q = 1 / (
        1
        + np.exp(
            -(world.context_latent(contexts) @ world.item_latent.T).numpy()
            - world.item_logit.numpy()
        )
    )
    np.testing.assert_allclose(world.logging_rewards(contexts), (p * q).sum(axis=1), rtol=1e-10)
    best = np.where(eligible_by_loops(world, contexts), q, 0).max(axis=1)
    np.testing.assert_allclose(world.best_rewards(contexts), best, rtol=1e-10)


def test_one_candidate_has_probability_one() -> None:
    world = SimulatedWorld(9, SMALL, eligible=EligibilitySettings(candidates=1))
    log = drawn(world, 20)
    np.testing.assert_array_equal(log["pscore"].to_numpy(), 1.0)
    assert [[a] for a in log["action"].to_pylist()] == log["candidates"].to_pylist()


def expected_by_loops(
    world: SimulatedWorld, logit: np.ndarray, slate: tuple[int, ...]
) -> list[float]:
    """Expected reward of each position of one slate, from the formulas of `clicks`."""
    settings = world.slate
    assert settings is not None
    z = [logit[a] for a in slate]
    stays, found = 1.0, []
    for k, own in enumerate(z):
        if settings.structure == "standard":
            others = [x - world.settings.intercept for j, x in enumerate(z) if j != k]
            own = own - settings.interaction * sum(others) / len(others)
        q = 1 / (1 + np.exp(-own))
        found.append((k + 1) ** -settings.decay * q * stays)
        if settings.structure == "cascade":
            stays *= 1 - settings.interaction * q
    return found


@pytest.mark.parametrize("structure", ["independent", "cascade", "standard"])
@pytest.mark.parametrize("reward", ["binary", "continuous"])
def test_rewards_have_their_expected_values(structure: str, reward: str) -> None:
    """z-scores of three positions over 40,000 rounds; 5 standard errors: false alarm 2e-6."""
    world = SimulatedWorld(
        6,
        WorldSettings(3, 3, 3, intercept=0.0, reward=reward),
        seed=7,
        slate=SlateSettings(3, structure, 0.5, 0.7),
    )
    log = drawn(world, 40_000, seed=2)
    slate = items_of(world, log).reshape(-1, 3)
    contexts = rounds(log, 3)
    expected = world.slate_rewards(contexts, slate)
    logit = (world.context_latent(contexts) @ world.item_latent.T + world.item_logit).numpy()
    for row in range(20):
        by_loops = expected_by_loops(world, logit[row], tuple(slate[row]))
        np.testing.assert_allclose(expected[row], by_loops, rtol=1e-12)
    error = log["reward"].to_numpy().reshape(-1, 3) - expected
    z = error.sum(axis=0) / np.sqrt((error**2).sum(axis=0))
    assert np.abs(z).max() < 5


@pytest.mark.parametrize("structure", ["independent", "cascade", "standard"])
@pytest.mark.parametrize("eligible", [None, EligibilitySettings(regions=3, seen=3)])
def test_values_equal_enumeration(structure: str, eligible: EligibilitySettings | None) -> None:
    """8 items, 3 positions: the value is the sum over 336 slates; Monte Carlo agrees within 5 of
    its stated errors (false alarm 6e-7)."""
    world = SimulatedWorld(
        8, SMALL, seed=3, slate=SlateSettings(3, structure, 0.5, 0.7), eligible=eligible
    )
    contexts = world.contexts(12, seed=1)
    served = ServedDistribution(temperature=0.7, uniform=0.1, top=5)
    policy = world.two_tower(world.context_latent, world.item_latent, served=served)
    p, total = np.exp(policy(contexts)), np.zeros((12, 3))
    logit = (world.context_latent(contexts) @ world.item_latent.T + world.item_logit).numpy()
    for row in range(12):
        mass = 0.0
        for slate in itertools.permutations(range(8), 3):
            left, probability = 1.0, 1.0
            for a in slate:
                probability *= p[row, a] / left if p[row, a] > 0 else 0.0
                left -= p[row, a]
            mass += probability
            total[row] += probability * np.array(expected_by_loops(world, logit[row], slate))
        assert mass == pytest.approx(1.0, rel=1e-10)
    found = slate_value(world, policy, contexts)
    assert found.exact and found.draw_error == 0.0
    np.testing.assert_allclose(found.by_position, total.mean(axis=0), rtol=1e-10)
    assert found.value == pytest.approx(total.sum(axis=1).mean(), rel=1e-10)
    assert found.std_error == pytest.approx(total.sum(axis=1).std(ddof=1) / 12**0.5, rel=1e-10)


def test_monte_carlo_states_its_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against enumeration; 5 standard errors of the draws (false alarm 6e-7)."""
    world = SimulatedWorld(8, SMALL, seed=3, slate=SlateSettings(3))
    contexts = world.contexts(40)
    policy = world.two_tower(world.context_latent, world.item_latent)
    exact = slate_value(world, policy, contexts)
    monkeypatch.setattr("offtower.data.simulate.slate_values.EXACT_SLATES", 1)
    found = slate_value(world, policy, contexts, draws=50)
    assert not found.exact and 0.0 < found.draw_error < 0.01
    assert abs(found.value - exact.value) < 5 * found.draw_error


def test_a_fixed_slate_earns_its_expected_rewards() -> None:
    world = SimulatedWorld(8, SMALL, seed=3, slate=SlateSettings(2))
    contexts = world.contexts(5)
    slates = np.array([[0, 3], [1, 2], [7, 0], [4, 5], [6, 1]])
    found = fixed_slate_value(world, slates, contexts)
    assert found.value == pytest.approx(world.slate_rewards(contexts, slates).sum() / 5, rel=1e-12)


def test_the_served_distribution_by_hand() -> None:
    """Scores 0, log 2, log 4, log 8; the first of two equal best items wins a tie."""
    score = np.log([[1.0, 2.0, 4.0, 8.0]])
    mask = np.array([[True, True, False, True]])
    cases = [
        (ServedDistribution(), None, [1 / 15, 2 / 15, 4 / 15, 8 / 15]),
        (ServedDistribution(0.5), None, [1 / 85, 4 / 85, 16 / 85, 64 / 85]),
        (ServedDistribution(top=2), None, [0, 0, 1 / 3, 2 / 3]),
        (
            ServedDistribution(top=2, uniform=0.2),
            mask,
            [0.2 / 3, 0.2 / 3 + 0.16, 0, 0.2 / 3 + 0.64],
        ),
        (ServedDistribution(uniform=1.0), mask, [1 / 3, 1 / 3, 0, 1 / 3]),
    ]
    for served, eligible, expected in cases:
        np.testing.assert_allclose(np.exp(served.log_prob(score, eligible))[0], expected)
    tied = ServedDistribution(top=1).log_prob(np.array([[0.0, 3.0, 3.0]]))
    np.testing.assert_array_equal(np.exp(tied), [[0.0, 1.0, 0.0]])


def test_slates_that_hold_nearly_all_mass_keep_exact_propensities() -> None:
    """Two items hold all but 1e-12: the third position's propensity is one of the rest."""
    world = SimulatedWorld(
        5, SMALL, logging=LoggingPolicy("popularity", 1.0, 0.0), slate=SlateSettings(3)
    )
    world.item_logit[:] = 0.0
    world.item_logit[:2] = 28.0
    log = drawn(world, 400)
    slate, pscore = items_of(world, log).reshape(-1, 3), log["pscore"].to_numpy().reshape(-1, 3)
    both = np.sort(slate[:, :2], axis=1).tolist()
    assert both == [[0, 1]] * 400
    np.testing.assert_allclose(pscore[:, 2], 1 / 3, rtol=1e-9)
    assert set(slate[:, 2]) == {2, 3, 4}


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("kind", ["contextual", "popularity"])
def test_slates_are_drawn_with_their_probabilities(
    kind: str, large: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chi-square of 24 slates over 40,000 rounds of one context: false alarm 1e-5."""
    if large:
        monkeypatch.setattr("offtower.data.simulate.rounds.DENSE_ITEMS", 1)
    world = SimulatedWorld(
        4,
        WorldSettings(1, 2, 1, scale=0.0),
        seed=2,
        logging=LoggingPolicy(kind, 2.0, 0.1),
        slate=SlateSettings(3),
    )
    log = drawn(world, 40_000)
    p = single_draw_by_loops(world, log.slice(0, 1))[0]
    found = items_of(world, log).reshape(-1, 3) @ [16, 4, 1]
    slates = list(itertools.permutations(range(4), 3))
    expected = [p[a] * p[b] / (1 - p[a]) * p[c] / (1 - p[a] - p[b]) for a, b, c in slates]
    count = [int((found == 16 * a + 4 * b + c).sum()) for a, b, c in slates]
    assert stats.chisquare(count, 40_000 * np.array(expected)).pvalue > 1e-5


@pytest.mark.parametrize("large", [False, True])
def test_slates_of_several_policies_know_each_ones_probabilities(
    large: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if large:
        monkeypatch.setattr("offtower.data.simulate.rounds.DENSE_ITEMS", 1)
    world = SimulatedWorld(
        7,
        SMALL,
        seed=1,
        slate=SlateSettings(2),
        eligible=EligibilitySettings(regions=2),
    )
    policies = {"low": LoggingPolicy(beta=-1.0), "high": LoggingPolicy(beta=2.0)}
    log = pa.concat_tables(multi_policy_log(world, 101, 3, policies)).combine_chunks()
    assert log.num_rows == 202
    assert log["behavior_policy"].to_pylist()[:6] == ["low", "low", "high", "high", "low", "low"]
    slate, contexts = items_of(world, log).reshape(-1, 2), rounds(log, 2)
    names = log["behavior_policy"].to_numpy(zero_copy_only=False)
    for name, policy in policies.items():
        world.logging_policy = policy
        p = single_draw_by_loops(world, contexts)
        first = p[np.arange(101), slate[:, 0]]
        second = p[np.arange(101), slate[:, 1]] / (1 - first)
        found = log[propensity_column(name)].to_numpy()
        np.testing.assert_allclose(found.reshape(-1, 2), np.stack([first, second], 1), rtol=1e-9)
        own = names == name
        np.testing.assert_allclose(log["pscore"].to_numpy()[own], found[own], rtol=1e-12)


def test_rounds_repeat_and_chunks_stand_alone() -> None:
    def made() -> SimulatedWorld:
        return SimulatedWorld(
            30, SMALL, logging=LoggingPolicy("popularity"), slate=SlateSettings(2)
        )

    log = drawn(made(), 5000, seed=4)
    assert log.equals(drawn(made(), 5000, seed=4))
    assert log.slice(2 * 4096).equals(made().log_chunk(1, 5000, 4))
    assert not log.equals(drawn(made(), 5000, seed=5))


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: SlateSettings(0), "at least 1"),
        (lambda: SlateSettings(2, "pairwise"), "structure"),
        (lambda: SlateSettings(2, decay=-1.0), "decay"),
        (lambda: SlateSettings(2, "cascade", interaction=1.5), "interaction"),
        (lambda: EligibilitySettings(), "at least one of"),
        (lambda: EligibilitySettings(regions=0), "regions"),
        (lambda: parse_eligibility(["region=3"]), "'region=3': give each of regions"),
        (lambda: parse_eligibility(["seen=3", "seen=4"]), "at most once"),
        (lambda: parse_eligibility(["days=1.5"]), "with a number"),
        (lambda: SimulatedWorld(3, slate=SlateSettings(4)), "at least 4"),
        (lambda: ServedDistribution(temperature=0.0), "temperature"),
    ],
)
def test_settings_out_of_range(made: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        made()


def test_columns_of_another_world_are_refused() -> None:
    world = SimulatedWorld(9, SMALL, eligible=EligibilitySettings(regions=2, seen=2))
    assert world.eligible is not None
    contexts = world.contexts(2)
    column = contexts.column_names.index("region")
    with pytest.raises(DataError, match="region that this world"):
        world.eligible.mask(contexts.set_column(column, "region", pa.array(["mars", "mars"])))
    column = contexts.column_names.index("seen")
    with pytest.raises(DataError, match="item that this world"):
        world.eligible.mask(contexts.set_column(column, "seen", pa.array([[99], [0]])))
    with pytest.raises(ConfigError, match="no item is eligible in every context"):
        world.best_fixed_item(10)


def test_a_log_earns_the_value_of_its_policy() -> None:
    """Mean sum of a round's rewards against the exact value in the log's own contexts; 5 standard
    errors: false alarm 6e-7."""
    eligible = parse_eligibility(["regions=3", "seen=2"])
    assert eligible == EligibilitySettings(regions=3, seen=2)
    world = SimulatedWorld(9, SMALL, seed=6, slate=SlateSettings(3), eligible=eligible)
    log = drawn(world, 4000)
    with np.errstate(divide="ignore"):
        found = slate_value(
            world, lambda chunk: np.log(single_draw_fast(world, chunk)), rounds(log, 3)
        )
    reward = log["reward"].to_numpy().reshape(-1, 3).sum(axis=1)
    assert abs(reward.mean() - found.value) < 5 * reward.std() / 4000**0.5
    new = logging_value(world)
    assert abs(new.value - found.value) < 5 * np.hypot(new.std_error, found.std_error)


def single_draw_fast(world: SimulatedWorld, table: pa.Table) -> np.ndarray:
    assert world.eligible is not None
    logit = (world.context_latent(table) @ world.item_latent.T + world.item_logit).numpy()
    mask = world.eligible.mask(table)
    weight = np.exp(world.logging_policy.beta * logit) * mask
    softmax = weight / weight.sum(axis=1, keepdims=True)
    epsilon = world.logging_policy.epsilon
    return (1 - epsilon) * softmax + epsilon * mask / mask.sum(axis=1, keepdims=True)


def expected_estimates(
    reward: np.ndarray, logging: np.ndarray, target: np.ndarray, slates: np.ndarray
) -> dict[str, float]:
    """Exact expectations of the three estimators in one context, by enumeration of all slates.

    Args:
        reward: (S, K) expected rewards. logging, target: (N,) single-draw probabilities.
    """
    conditional = []
    for p in (logging, target):
        shown = p[slates]
        left = 1.0 - np.cumsum(shown, axis=1) + shown
        conditional.append(shown / left)
    ratio = conditional[1] / conditional[0]
    probability = [one.prod(axis=1) for one in conditional]
    cascade = ratio.cumprod(axis=1)
    marginal = np.ones_like(ratio)
    for k in range(slates.shape[1]):
        at = [np.bincount(slates[:, k], one, minlength=len(logging)) for one in probability]
        marginal[:, k] = (at[1] / at[0])[slates[:, k]]
    weights = {"standard": cascade[:, -1:], "cascade": cascade, "independent": marginal}
    return {
        name: float((probability[0][:, None] * weight * reward).sum())
        for name, weight in weights.items()
    }


@pytest.mark.parametrize(
    ("structure", "unbiased"),
    [
        ("independent", {"standard", "cascade", "independent"}),
        ("cascade", {"standard", "cascade"}),
        ("standard", {"standard"}),
    ],
)
def test_structures_decide_which_estimators_are_unbiased(
    structure: str, unbiased: set[str]
) -> None:
    """Exact, in one context: unbiased to 1e-10, biased by more than 1 % otherwise."""
    world = SimulatedWorld(
        5,
        WorldSettings(3, 3, 3, intercept=0.0),
        seed=2,
        logging=LoggingPolicy(beta=-1.0, epsilon=0.3),
        slate=SlateSettings(3, structure, decay=0.3, interaction=0.9),
    )
    context = world.contexts(1, seed=4)
    slates = np.array(list(itertools.permutations(range(5), 3)))
    reward = world.slate_rewards(context.take(pa.array(np.zeros(60, dtype=np.int64))), slates)
    policy = world.two_tower(world.context_latent, world.item_latent, item_bias=world.item_logit)
    truth = slate_value(world, policy, context).value
    logging = single_draw_by_loops(world, context)[0]
    found = expected_estimates(reward, logging, np.exp(policy(context))[0], slates)
    for name, value in found.items():
        if name in unbiased:
            assert value == pytest.approx(truth, rel=1e-10), name
        else:
            assert abs(value / truth - 1.0) > 0.01, (name, value, truth)


def test_some_items_are_everywhere_and_the_others_in_one_region() -> None:
    settings = parse_eligibility(["regions=10", "everywhere=30"])
    world = SimulatedWorld(2000, SMALL, seed=1, eligible=settings)
    regions = np.array([len(one) for one in world.catalogue_table().column("regions").to_pylist()])
    # One item of each region is always there: of these, some have a second region.
    assert (regions[10:] == 1).sum() + (regions[10:] == 10).sum() == 1990
    # Binomial(1990, .3): standard deviation 20; five of them.
    assert abs((regions[10:] == 10).sum() - 597) < 100
    with pytest.raises(ConfigError, match="give regions too"):
        parse_eligibility(["everywhere=30", "seen=3"])
    with pytest.raises(ConfigError, match="at least one of regions"):
        parse_eligibility(["everywhere=30"])
