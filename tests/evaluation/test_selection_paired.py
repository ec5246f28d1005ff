"""The paired selector, and comparisons of selectors: evidence against noise and fitted models."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from offtower.evaluation import estimators as e
from offtower.evaluation.rows import EvaluationRows
from offtower.evaluation.selection import (
    Candidate,
    SelectionLog,
    compare_selectors,
    default_candidates,
    select_estimator,
)
from offtower.evaluation.selection.paired import select_paired
from offtower.evaluation.selection.result import make_result
from offtower.evaluation.selection.select import _spread, _verdict

from .selection_worlds import World, candidates


def test_paired_does_not_trust_a_model_of_the_same_log_beyond_its_evidence() -> None:
    w = World(6)
    result = select_estimator(w.log({"m": w.q}), candidates("m"), method="paired")
    assert result.position("DM[m]") > 0
    assert set(result.details["variance"]) == {c.name for c in candidates("m")}


def test_paired_ranks_consistent_candidates_by_their_variance() -> None:
    """Many rows, a useful model, far target: DR beats IPS as it does in truth."""
    w = World(7, n=20_000)
    result = select_estimator(w.log({"m": w.q}), candidates("m"), method="paired", tie_width=0.0)
    assert result.position("DR[m]") < result.position("IPS")
    scores = {s.name: s for s in result.ranking}
    n = w.n
    ips = e.IPS().contributions(w.log().problem.rows(None))
    assert scores["IPS"].mse == pytest.approx(np.var(ips) / n)


def test_paired_leaves_out_a_candidate_without_a_weight() -> None:
    """Of a greedy policy, whose whole slates the log never shows, the value 0 has no variance."""
    noise = np.random.default_rng(0).normal(size=500)
    found = [Candidate("IPS", e.IPS()), Candidate("SNIPS", e.SNIPS())]

    def log(values: list[float], influence: np.ndarray) -> Any:
        problem = SimpleNamespace(
            n=500, models={}, influence=lambda _: (np.array(values), influence)
        )
        return SimpleNamespace(problem=problem, independent_models=frozenset())

    one = select_paired(log([0.0, 0.4], np.stack([np.zeros(500), noise - noise.mean()])), found)
    assert [score.name for score in one.ranking] == ["SNIPS"]
    # A log without any reward has no variance either, and nothing to leave out.
    both = select_paired(log([0.0, 0.0], np.zeros((2, 500))), found)
    assert {score.name for score in both.ranking} == {"IPS", "SNIPS"}


def test_comparison_names_disagreement_and_failures() -> None:
    w = World(12, n=800)
    log = SelectionLog.from_policies(w.action, w.reward, w.behavior, w.target, {"m": w.q * 0.3})
    comparison = compare_selectors(log, candidates("m"))
    assert set(comparison.results) == {"paired", "pasif", "ocv", "slope"}
    assert "two or more" in comparison.failed["heuristic"]
    assert comparison.recommended == "paired" and comparison.best.name
    assert -1.0 <= comparison.agreement["paired", "pasif"] <= 1.0
    report = json.loads(json.dumps(comparison.to_dict(), allow_nan=False))
    assert report["choices"]["paired"] == comparison.best.name
    assert "choose" in comparison.verdict


def test_choices_are_compared_by_the_noise_of_their_difference() -> None:
    """DM by the truth and SNIPS, 40 logs: |z| > 2 in more than 6 has probability .003.

    In standard errors of DM alone, which is quiet, most would be beyond 2.
    """
    pool = [Candidate("SNIPS", e.SNIPS()), Candidate("DM[q]", e.DM(), "q")]
    nothing = np.zeros(2)
    beyond = far = 0
    for seed in range(300, 340):
        w = World(seed, n=600)
        log = w.log({"q": w.q})
        values = log.problem.values(pool)
        results = {
            name: make_result(name, pool, values, nothing, nothing, nothing, order=order)
            for name, order in (("paired", [1, 0]), ("pasif", [0, 1]))
        }
        own, spread = _spread(log, pool, results, "paired")
        _, influence = log.problem.influence(pool)
        error = np.std(influence[0] - influence[1]) / np.sqrt(w.n)
        assert spread == pytest.approx(abs(values[0] - values[1]) / error)
        beyond += spread > 2.0
        far += own > 2.0
    assert beyond <= 6 < 20 < far
    alike = {"paired": results["paired"], "ocv": results["paired"]}
    assert _spread(log, pool, alike, "paired") == (0.0, 0.0)
    words = [_verdict(results, "paired", own, z) for own, z in ((0.5, 9.0), (9.0, 1.0), (9.0, 9.0))]
    assert ["hardly" in words[0], "noise explains" in words[1], "biased" in words[2]] == [True] * 3


def test_paired_charges_what_a_model_learned_from_the_log_itself() -> None:
    world = World(21)
    models = {"a": world.q, "b": world.q}  # equal, so that only the charge differs
    log = world.log(models, model_parameters={"a": 30.0})
    paired = select_estimator(log, candidates("a", "b"), method="paired")
    variance = paired.details["variance"]
    for family in ("DM", "DR", "SNDR"):
        charged = variance[f"{family}[a]"] / variance[f"{family}[b]"]
        assert charged == pytest.approx(1.0 + 3.0 * 30.0 / world.n, rel=1e-9)
    assert paired.position("SNDR[b]") < paired.position("SNDR[a]")
    free = select_estimator(log, candidates("a", "b"), method="paired", overlap=0.0)
    assert free.details["variance"]["DR[a]"] == free.details["variance"]["DR[b]"]
    # A model that learned elsewhere hides nothing.
    elsewhere = world.log(
        models, model_parameters={"a": 30.0}, independent_models=frozenset({"a", "b"})
    )
    there = select_estimator(elsewhere, candidates("a", "b"), method="paired")
    assert there.details["variance"]["DR[a]"] == there.details["variance"]["DR[b]"]


def test_the_charge_for_parameters_breaks_near_ties_only() -> None:
    """A model of 2,000 parameters that predicts well is chosen, though 3 p / n is 4."""
    world = World(21)
    coarse = np.full_like(world.q, world.q.mean())
    log = world.log({"fine": world.q, "coarse": coarse}, model_parameters={"fine": 2_000.0})
    paired = select_estimator(log, candidates("fine", "coarse"), method="paired")
    free = select_estimator(log, candidates("fine", "coarse"), method="paired", overlap=0.0)
    charged, plain = paired.details["variance"], free.details["variance"]
    assert charged["DR[fine]"] == pytest.approx(1.1 * plain["DR[fine]"], rel=1e-9)
    assert plain["DR[fine]"] < 0.8 * plain["DR[coarse]"]
    assert paired.best.name == free.best.name and paired.best.name.endswith("[fine]")


def test_comparison_explains_each_disagreement_and_takes_a_log_for_one_method() -> None:
    world = World(3)
    log = world.log({"model": world.q})
    pool = candidates("model")
    found = compare_selectors(log, pool)
    for method, result in found.results.items():
        if result.best.name == found.best.name:
            assert method not in found.disagreements
        else:
            assert found.disagreements[method].startswith(f"chooses {result.best.name};")
    small = SelectionLog.from_propensities(log.problem.weight, log.problem.reward)
    part = compare_selectors(log, pool, methods=["paired", "pasif"], logs={"pasif": small})
    assert not part.results["paired"].skipped
    assert "pasif" in part.failed  # that log has no reward model


def test_values_that_differ_by_rounding_are_no_difference() -> None:
    """With all weights 1, IPS, SNIPS, DR and SNDR are the mean reward, up to rounding."""
    reward = (np.random.default_rng(1).random(300) < 0.3) * 1.0
    constant = np.full(300, 0.3)
    log = SelectionLog.from_rows({"m": EvaluationRows(np.ones(300), reward, constant, constant)})
    wanted = {"IPS", "SNIPS", "DR[m]", "SNDR[m]"}
    candidates = [c for c in default_candidates(log.problem) if c.name in wanted]
    found = compare_selectors(log, candidates)
    assert found.spread == 0.0 and "standard errors of the difference" not in found.verdict
