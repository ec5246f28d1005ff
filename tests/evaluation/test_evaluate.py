"""Several policies on one log: numbers, shards, verdicts, errors."""

from __future__ import annotations

import json
from functools import reduce

import numpy as np
import pytest

from offtower.errors import DataError, OfftowerError
from offtower.evaluation import (
    EvaluationOptions,
    EvaluationRows,
    EvaluationSums,
    GateOptions,
    evaluate_rows,
)
from offtower.evaluation import estimators as e
from offtower.evaluation.intervals.statistics import finish
from offtower.evaluation.notes import estimator_notes
from offtower.mapping import merge_all

from .one_context import OneContext
from .test_estimators import ALL


def policies(n: int = 4000, seed: int = 0, users: bool = False) -> dict[str, EvaluationRows]:
    """A better policy, a worse one and the logging policy itself."""
    world, rng = OneContext(10), np.random.default_rng(seed)
    action = np.searchsorted(world.cumulative, rng.random(n))
    reward = (rng.random(n) < world.q[action]) * 1.0
    worse = world.behavior * np.exp(-4.0 * world.q)
    worse /= worse.sum()
    user = np.repeat(np.arange(n), 4)[:n] if users else None
    rows = {}
    for name, policy in {"new": world.target, "bad": worse, "same": world.behavior}.items():
        rows[name] = EvaluationRows(
            (policy / world.behavior)[action],
            reward,
            world.model[action],
            np.full(n, policy @ world.model),
            user,
        )
    return rows


def test_numbers_are_those_of_the_estimators() -> None:
    rows = policies()
    estimators = [x for x in ALL if x.label != "mips"]
    result = evaluate_rows(rows, estimators, reward_range=(0, 1))
    assert list(result.policies) == ["new", "bad", "same"] and result.n == 4000
    assert result.logging.estimate.value == pytest.approx(rows["new"].reward.mean())
    for name, policy in result.policies.items():
        for estimator in estimators:
            got = policy.estimates[estimator.name]
            want = estimator.estimate(rows[name])
            assert got.estimate.value == pytest.approx(want.value, rel=1e-12)
            assert got.estimate.std_error == pytest.approx(want.std_error, rel=1e-9, abs=1e-12)
            for method, interval in got.intervals.items():
                direct = estimator.interval(rows[name], method=method, replicates=500)
                expected = (direct.low, direct.high)
                assert (interval.low, interval.high) == pytest.approx(expected, abs=1e-9)
            pair = e.Difference(estimator, e.MeanReward())
            gap = finish(pair, pair.statistics(rows[name], rows[name]))
            assert got.difference is not None
            assert got.difference.estimate.value == pytest.approx(gap.value, abs=1e-12)
            assert got.difference.estimate.std_error == pytest.approx(gap.std_error, abs=1e-9)


def test_differences_between_policies_are_paired() -> None:
    rows = policies()
    result = evaluate_rows(rows, reward_range=(0, 1))
    assert [(c.first, c.second) for c in result.comparisons] == [
        ("new", "bad"),
        ("new", "same"),
        ("bad", "same"),
    ]
    pair = e.Difference(e.DR(), e.DR())
    for c in result.comparisons:
        want = finish(pair, pair.statistics(rows[c.first], rows[c.second]))
        assert c.estimator == "dr"
        assert c.difference.estimate.value == pytest.approx(want.value, abs=1e-12)
        assert c.difference.estimate.std_error == pytest.approx(want.std_error, abs=1e-9)


def test_verdicts_with_simultaneous_intervals() -> None:
    result = evaluate_rows(policies(), reward_range=(0, 1))
    decisions = {name: p.verdict.decision for name, p in result.policies.items()}
    assert decisions == {"new": "go", "bad": "no-go", "same": "not enough evidence"}
    assert result.exit_code == 0
    assert result.simultaneous_confidence == pytest.approx(1 - 0.05 / 3)
    gap = result.policies["new"].estimates["dr"].difference
    assert gap is not None
    assert gap.simultaneous.low < gap.interval.low < gap.interval.high < gap.simultaneous.high


@pytest.mark.parametrize("users", [False, True])
def test_shards_in_any_order_give_the_same_result(users: bool) -> None:
    rows = policies(900, users=users)
    keyed = {
        name: EvaluationRows(
            r.importance_weight,
            r.reward,
            r.action_reward,
            r.expected_reward,
            r.user,
            np.arange(900),
        )
        for name, r in rows.items()
    }
    options = EvaluationOptions((e.IPS(), e.SNIPS(), e.DM(), e.DR()), (0.0, 1.0))
    whole = evaluate_rows(rows, reward_range=(0, 1)).to_dict()
    shards = [
        EvaluationSums.of({k: v.take(part) for k, v in keyed.items()}, options)
        for part in np.array_split(np.random.default_rng(1).permutation(900), 7)
    ]
    for merged in (reduce(EvaluationSums.merge, shards), merge_all(iter(shards))):
        _same(merged.finish().to_dict(), whole)


def _same(got: object, want: object) -> None:
    if isinstance(want, dict):
        assert isinstance(got, dict) and got.keys() == want.keys()
        for key in want:
            _same(got[key], want[key])
    elif isinstance(want, list):
        assert isinstance(got, list) and len(got) == len(want)
        for a, b in zip(got, want, strict=True):
            _same(a, b)
    elif isinstance(want, float):
        assert got == pytest.approx(want, rel=1e-7, abs=1e-10, nan_ok=True)
    elif not isinstance(want, str):  # sentences quote rounded numbers
        assert got == want


def test_long_logs_are_read_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = policies(1000)
    whole = evaluate_rows(rows, reward_range=(0, 1)).to_dict()
    monkeypatch.setattr("offtower.evaluation.evaluate.CHUNK_ROWS", 64)
    _same(evaluate_rows(rows, reward_range=(0, 1)).to_dict(), whole)


def test_json_ready() -> None:
    result = evaluate_rows(
        policies(500), reward_range=(0, 1), support={"new": [0.1, 0.2], "bad": [0.0]}
    )
    content = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    new = content["policies"]["new"]
    assert set(new["estimates"]) == {"ips", "snips", "dm", "dr"}
    assert set(new["diagnostics"]) == {"weights", "calibration", "support"}
    assert new["diagnostics"]["support"]["missing"] == 0.0
    assert content["policies"]["bad"]["diagnostics"]["support"]["missing"] == 1.0
    assert new["guaranteed_difference"]["method"] == "log_smoothing"
    assert content["decide_by"] == "dr" and content["exit_code"] in (0, 1, 3)


def test_users_make_intervals_wider_and_drop_the_guaranteed_one() -> None:
    rows = policies(users=True)
    by_user = evaluate_rows(rows, reward_range=(0, 1))
    by_row = evaluate_rows(rows, reward_range=(0, 1), by_user=False)
    assert by_user.users == 1000 and by_row.users is None
    assert by_user.policies["new"].guaranteed_value is None
    assert by_row.policies["new"].guaranteed_value is not None
    assert by_user.policies["new"].estimates["ips"].interval.by_user


def test_users_seen_once_each_keep_the_guaranteed_interval() -> None:
    rows = {
        name: EvaluationRows(r.importance_weight, r.reward, user=np.arange(r.n))
        for name, r in policies(500).items()
    }
    result = evaluate_rows(rows, reward_range=(0, 1))
    assert result.users == 500 and result.policies["new"].guaranteed_value is not None


def test_bernstein_where_it_exists() -> None:
    result = evaluate_rows(
        policies(500), reward_range=(0, 1), intervals=("normal", "bernstein"), max_weight=60.0
    )
    methods = {k: list(v.intervals) for k, v in result.policies["new"].estimates.items()}
    assert methods["ips"] == methods["dr"] == ["normal", "bernstein"]
    assert methods["snips"] == ["normal"]


def test_bootstrap_verdicts_draw_enough_replicates() -> None:
    result = evaluate_rows(policies(300), reward_range=(0, 1), intervals=("bootstrap",))
    gap = result.policies["new"].estimates["dr"].difference
    assert gap is not None and gap.simultaneous.method == "bootstrap"
    assert gap.simultaneous.confidence == result.simultaneous_confidence


def test_the_estimator_of_the_verdict() -> None:
    rows = policies(300)
    bare = {"p": EvaluationRows(rows["new"].importance_weight, rows["new"].reward)}
    assert evaluate_rows(bare, reward_range=(0, 1)).decide_by == "snips"
    clipped = [e.IPS(), e.ClippedIPS(max_weight=3.0)]
    assert evaluate_rows(bare, clipped, reward_range=(0, 1)).decide_by == "ips"
    got = evaluate_rows(bare, clipped, reward_range=(0, 1), decide_by="clipped_ips")
    assert got.decide_by == "clipped_ips(max_weight=3)"
    reasons = {r.code for r in got.policies["p"].verdict.reasons}
    assert "biased_estimator" in reasons


@pytest.mark.parametrize("estimator", ["ips", "snips"])
def test_the_logging_policy_is_no_better_than_itself(estimator: str) -> None:
    """Rounding leaves differences of 1e-17 with errors of 1e-18: no evidence of anything."""
    for seed in range(20):
        reward = np.random.default_rng(seed).random(997)
        weight = np.exp(np.zeros(997) + 1e-16 * np.arange(997))
        rows = {"same": EvaluationRows(weight, reward)}
        result = evaluate_rows(rows, [estimator], reward_range=(0, 1), intervals=("normal",))
        verdict = result.policies["same"].verdict
        assert verdict.decision == "not enough evidence"
        assert verdict.reasons[0].code == "no_variation"


@pytest.mark.parametrize("estimator", ["ips", "snips"])
@pytest.mark.parametrize("users", [False, True])
def test_rounding_of_float32_is_no_evidence(estimator: str, users: bool) -> None:
    """A log evaluated with the policy that served it has weights that are 1 up to float32."""
    n, rng = 900, np.random.default_rng(8)
    reward = (rng.random(n) < 0.4).astype(float)
    served_by = np.arange(n) // 6 if users else None
    for sign in (1.0, -1.0):
        # Rewarded rows show likelier items, whose logits round by more.
        shift = sign * (3e-9 + 6e-9 * reward) + 1e-9 * rng.standard_normal(n)
        rows = {"same": EvaluationRows(1.0 + shift, reward, user=served_by)}
        result = evaluate_rows(rows, [estimator], reward_range=(0, 1), intervals=("normal",))
        gap = result.policies["same"].estimates[estimator].difference
        assert gap is not None and not gap.interval.low <= 0.0 <= gap.interval.high
        assert abs(gap.estimate.value) < gap.rounding < 1e-4
        verdict = result.policies["same"].verdict
        assert verdict.decision == "not enough evidence"
        assert "no_variation" in {reason.code for reason in verdict.reasons}
        # The same rows, with a difference that is one.
        rows = {"better": EvaluationRows(1.0 + 1e6 * shift, reward, user=served_by)}
        result = evaluate_rows(rows, [estimator], reward_range=(0, 1), intervals=("normal",))
        decision = result.policies["better"].verdict.decision
        assert decision == ("go" if sign > 0.0 else "no-go")


def test_a_policy_with_one_agreeing_row_does_not_end_the_evaluation() -> None:
    """Of 1/e of the bootstrap replicates no row has a weight: SNIPS has no value there."""
    rng = np.random.default_rng(4)
    reward, weight = rng.random(300), np.zeros(300)
    weight[17] = 250.0
    rows = {
        "greedy": EvaluationRows(weight, reward),
        "soft": EvaluationRows(rng.random(300) * 2, reward),
    }
    result = evaluate_rows(rows, ["ips", "snips"], reward_range=(0, 1))
    found = result.policies["greedy"].estimates
    assert set(found["snips"].intervals) == {"gamma", "normal"}
    every = {"gamma", "normal", "bootstrap"}
    assert set(found["ips"].intervals) == every
    assert found["snips"].estimate.value == pytest.approx(reward[17])
    assert set(result.policies["soft"].estimates["snips"].intervals) == every
    json.dumps(result.to_dict(), allow_nan=False)
    # Where the bootstrap decides there is nothing to decide by.
    with pytest.raises(OfftowerError, match="too few rows carry a weight above 0"):
        evaluate_rows(rows, ["snips"], reward_range=(0, 1), intervals=("bootstrap",))


def test_gate_options_reach_the_gate() -> None:
    result = evaluate_rows(policies(), reward_range=(0, 1), gate=GateOptions(margin=0.9))
    assert {p.verdict.decision for p in result.policies.values()} == {"no-go"}
    assert result.exit_code == 1


def test_what_is_refused() -> None:
    rows = policies(50)
    new = rows["new"]
    bare = {"p": EvaluationRows(new.importance_weight, new.reward)}

    def refused(message: str, *arguments: object, **options: object) -> None:
        with pytest.raises(OfftowerError, match=message):
            evaluate_rows(*arguments, **{"reward_range": (0, 1), **options})  # type: ignore[arg-type]

    refused("no policy", {})
    refused("at least two rows; there are 1", {"p": new.take(slice(0, 1))})
    refused("at least two rows; there are 0", {"p": new.take(slice(0, 0))})
    refused("policy 'p': dr needs a reward model", bare, ["dr"])
    refused("unknown estimator 'drr'; did you mean 'dr'", bare, ["drr"])
    refused("each once", bare, ["ips", "ips"])
    refused("decide_by='dr' is none of ips", bare, ["ips"], decide_by="dr")
    refused("intervals must be some of", bare, intervals=("magic",))
    refused("their numbers differ", {"a": new, "b": new.take(slice(0, 9))})
    refused("low < high", bare, reward_range=(1, 0))
    refused("outside of the reward range", bare, reward_range=(0, 0.5))
    refused("unexpected keyword argument 'color'", bare, color="red")
    refused("needs the 'user' column", bare, by_user=True)
    refused("unknown policies: \\['q'\\]", bare, support={"q": [0.1]})
    zero = {"p": EvaluationRows(np.zeros(50), new.reward)}
    refused("every importance weight is 0", zero)
    other = {"a": new, "b": EvaluationRows(new.importance_weight, 1.0 - new.reward)}
    with pytest.raises(DataError, match=r"reward\[0\]"):
        evaluate_rows(other, reward_range=(0, 1))
    options = EvaluationOptions((e.IPS(),), (0.0, 1.0))
    elsewhere = EvaluationOptions((e.SNIPS(),), (0.0, 1.0))
    with pytest.raises(OfftowerError, match="same evaluation"):
        EvaluationSums.of(bare, options).merge(EvaluationSums.of(bare, elsewhere))


@pytest.mark.slow
def test_the_gate_is_seldom_wrong() -> None:
    """400 logs of 1,000 rows of a policy no better than the log: at most 2.5 % go, plus 3 sigma."""
    world, rng, go = OneContext(10), np.random.default_rng(8), 0
    level = world.behavior @ world.q
    for _ in range(400):
        action = np.searchsorted(world.cumulative, rng.random(1000))
        reward = (rng.random(1000) < level) * 1.0
        rows = EvaluationRows(world.weight[action], reward)
        result = evaluate_rows({"p": rows}, reward_range=(0, 1), intervals=("normal",))
        go += result.exit_code == 0
    print(go)
    assert go / 400 <= 0.025 + 3 * np.sqrt(0.025 * 0.975 / 400)


@pytest.mark.parametrize("scale", [1e100, 1e160, 1e300])
def test_weights_beyond_double_precision_are_no_evidence(scale: float) -> None:
    rows = policies(200)["new"]
    huge = EvaluationRows(
        rows.importance_weight * scale, rows.reward, rows.action_reward, rows.expected_reward
    )
    found = evaluate_rows({"p": huge}, ("ips", "snips", "dr"), reward_range=(0, 1)).policies["p"]
    assert found.verdict.decision == "not enough evidence"
    for one in found.estimates.values():
        # Nothing is known of the mean of such weights; the ratio does not depend on their scale.
        interval = one.intervals["gamma"]
        assert interval.low >= 0.0 and interval.high <= 1.0
        assert one.label == "snips" or (interval.low, interval.high) == (0.0, 1.0)
    plain = evaluate_rows({"p": rows}, ("snips",), reward_range=(0, 1)).policies["p"]
    assert found.weights.effective_sample_size == pytest.approx(
        plain.weights.effective_sample_size, rel=1e-9
    )


def test_an_interval_of_impossible_values_is_moved_and_said() -> None:
    # No reward at all, and a reward model that predicts some: DR is below 0 for a policy that
    # shows what the model overrates less.
    n = 400
    weight = np.where(np.arange(n) % 2 == 0, 1.9, 0.1)
    rows = EvaluationRows(weight, np.zeros(n), np.full(n, 0.5), np.full(n, 0.3))
    result = evaluate_rows({"p": rows}, ("dr",), reward_range=(0, 1))
    found = result.policies["p"].estimates["dr"]
    assert found.estimate.value == pytest.approx(-0.2)
    normal, gamma = found.intervals["normal"], found.intervals["gamma"]
    assert normal.high < 0.0 and gamma.low == 0.0
    assert 0.9 * (normal.high - normal.low) < gamma.high < 2.0 * (normal.high - normal.low)
    (note,) = estimator_notes(result, (e.DR(),))
    assert "dr -0.2 lies outside of the rewards' range [0, 1]" in note
    impossible = EvaluationRows(np.full(n, 3.0), np.ones(n), np.zeros(n), np.zeros(n))
    verdict = evaluate_rows({"p": impossible}, ("dr",), reward_range=(0, 1)).policies["p"].verdict
    assert verdict.decision != "go"
    rows = policies()["new"]
    tenfold = EvaluationRows(10.0 * rows.importance_weight, rows.reward)
    reasons = evaluate_rows({"p": tenfold}, ("ips",), reward_range=(0, 1)).policies["p"].verdict
    assert "impossible_difference" in [reason.code for reason in reasons.reasons]
