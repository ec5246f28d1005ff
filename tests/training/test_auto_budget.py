"""auto within a budget: plans, races, and what they promise about bits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from offtower.benchmarks.quality.bilinear import BilinearWorld
from offtower.config import Config
from offtower.data.convert import from_bandit_feedback
from offtower.data.log_part import LogPart
from offtower.data.order import EpochOrder
from offtower.data.rows import EncodedRows
from offtower.prepare import PreparedData, prepare
from offtower.progress import PlainTask, Progress
from offtower.training.auto import budget, speed
from offtower.training.auto.budget import make_plan, narrowed
from offtower.training.auto.candidates import Schedule, make_candidates
from offtower.training.auto.evaluator import HeldOutEvaluator
from offtower.training.auto.folds import NOTHING, Folds
from offtower.training.auto.kept_rows import keep_rewarded
from offtower.training.auto.members import fit_members, set_item_bias, start_member
from offtower.training.auto.plan import groups_to_read
from offtower.training.auto.temperature_sums import TemperatureSums

WORLD = BilinearWorld(10, 1.0, seed=3)
NAMES = ["regression_linear", "regression", "likelihood_linear", "likelihood", "behavior_cloning"]


class Machine:
    """A machine with given seconds of a step, of an evaluated row and of a read row."""

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        step: float = 0.05,
        row: float = 1e-3,
        read: float = 1e-9,
    ) -> None:
        self.measured = 0
        sample = speed.read_sample

        def count(seconds: float) -> float:
            self.measured += 1
            return seconds

        monkeypatch.setattr(budget, "_SLOW", 1.0)
        monkeypatch.setattr(speed, "operations_per_second", lambda device: count(1.0))
        monkeypatch.setattr(speed, "step_seconds", lambda *_: count(step))
        monkeypatch.setattr(speed, "row_seconds", lambda *_: count(row))
        monkeypatch.setattr(speed, "read_sample", lambda data: (sample(data)[0], read))


def config_of(**auto: Any) -> Config:
    from offtower.config import parse_config

    return parse_config(
        {"name": "x", "data": {"train": "memory", "catalogue": "memory"}, "auto": auto}
    )


@pytest.fixture(scope="module")
def data() -> PreparedData:
    log, catalogue = from_bandit_feedback(WORLD.sample(3000, seed=1))
    return prepare(log, None, catalogue, Progress())


@pytest.mark.parametrize("rewards", [True, False])
def test_sums_of_all_temperatures_are_those_of_float64_softmaxes(rewards: bool) -> None:
    """Chunks whose maximum rises and falls, masked items, a chunk without eligible items."""
    rng = np.random.default_rng(0)
    logit = 30.0 * rng.standard_normal((6, 50))
    logit[:, 30:] += np.array([200.0, -200.0, 0.0, 0.0, 5.0, 0.0])[:, None]
    masked = rng.random(logit.shape) < 0.3
    masked[2, :20] = True
    masked[:, 49] = False
    logit[masked] = -np.inf
    reward = rng.random(logit.shape)
    scales = (0.01, 0.02, 0.04, 0.3, 0.6, 2.0)
    sums = TemperatureSums(6, scales, torch.device("cpu"), rewards=rewards)
    for first, last in ((0, 20), (20, 30), (30, 50)):
        for rows in (slice(0, 4), slice(4, 6)):
            part = torch.from_numpy(logit[rows, first:last]).float()
            q = torch.from_numpy(reward[rows, first:last]).float() if rewards else None
            sums.add(rows, part, q)
    action = torch.from_numpy(logit[:, 49]).float()
    found = sums.log_prob(action).numpy()
    for t, scale in enumerate(scales):
        weight = np.exp(scale * (logit - logit.max(1, keepdims=True)))
        pi = weight / weight.sum(1, keepdims=True)
        wanted = np.log(weight.sum(1)) + scale * logit.max(1)
        np.testing.assert_allclose(found[t], scale * logit[:, 49] - wanted, rtol=2e-5, atol=2e-5)
        expected = sums.expected_reward()
        if rewards:
            assert expected is not None
            np.testing.assert_allclose(expected[t], (pi * reward).sum(1), rtol=1e-5)
        else:
            assert expected is None


def test_small_work_has_the_same_plan_on_every_machine(
    data: PreparedData, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(*arguments: object) -> float:
        raise AssertionError("the plan of small work depends on the machine")

    for name in ("operations_per_second", "step_seconds", "row_seconds", "read_sample"):
        monkeypatch.setattr(speed, name, measured)
    config = config_of()
    candidates = make_candidates(config, data)
    plan = make_plan(config, data, candidates, Progress())
    unlimited = config_of(budget=None)
    assert plan == make_plan(unlimited, data, candidates, Progress())
    assert not plan.bounded and len(plan.rungs) == 1 and plan.rows == 3000


def test_work_that_fits_as_measured_is_not_changed(
    data: PreparedData, monkeypatch: pytest.MonkeyPatch
) -> None:
    Machine(monkeypatch)
    monkeypatch.setattr(speed, "operations_per_second", lambda device: 1e12)
    config = config_of()
    plan = make_plan(config, data, make_candidates(config, data), Progress())
    assert not plan.bounded


def test_a_race_fits_its_budget_and_halves_its_candidates(
    data: PreparedData, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(monkeypatch, step=0.05, row=1e-3)
    config = config_of(candidates=NAMES)
    plan = make_plan(config, data, make_candidates(config, data), Progress())
    assert machine.measured == 1 + 2 * len(NAMES)
    # All at once: 5 x 3 x some 630 steps of 0.05 s, 8 of the 10 minutes.
    assert plan.bounded and [rung.remaining for rung in plan.rungs] == [1, 1]
    shares = [rung.share for rung in plan.rungs]
    assert shares == pytest.approx([1 / 3, 2 / 3])
    seconds = 0.0
    # A regression and a likelihood leave after the first rung.
    for rung, names in zip(plan.rungs, (NAMES, NAMES[1::2] + NAMES[-1:]), strict=True):
        steps = sum(plan.candidates[name].steps or 0 for name in names)
        seconds += rung.share * steps * plan.members * 0.05
        planned = rung.share * steps * plan.members * 0.05
        # The steps of each candidate are rounded down.
        assert planned == pytest.approx(rung.training_seconds, rel=0.02)
    assert 200.0 < seconds <= 300.0
    # The clone has at most 15 % of the time for training.
    assert 3 * 0.05 * (plan.candidates["behavior_cloning"].steps or 0) <= 45.0
    assert all(3 * 0.05 * (one.refit_steps or 0) <= 120.0 for one in plan.candidates.values())
    rows = sum(
        (rung.evaluated_rows or 0) * n * 1e-3 for rung, n in zip(plan.rungs, (4, 3), strict=True)
    )
    assert rows <= 90.0


def test_a_plan_is_shortened_where_the_machine_is_slower(
    data: PreparedData, monkeypatch: pytest.MonkeyPatch
) -> None:
    Machine(monkeypatch)
    config = config_of(candidates=NAMES)
    plan = make_plan(config, data, make_candidates(config, data), Progress())
    first, second = plan.rungs
    planned = first.training_seconds, first.evaluation_seconds
    # As planned, or faster: only the mark changes.
    for seconds in (planned, (1.0, 1.0), (1.05 * planned[0], planned[1])):
        assert plan.revise(seconds[:1], seconds[1:], NAMES) == replace(plan, revised=1)
    # 1.3 times the training's time: what is left is over a half of the rest, at this speed.
    slow = plan.revise([1.3 * planned[0]], [planned[1]], NAMES)
    assert slow.revised == 1 and slow.rungs[0] == first
    total = sum(one.training_seconds + one.evaluation_seconds for one in plan.rungs)
    left = 1.2 * total - 1.3 * planned[0] - planned[1]
    share = slow.rungs[1].share / second.share
    wanted = 1.3 * second.training_seconds + second.evaluation_seconds
    assert 0.5 < left / wanted / 2**0.5 < share <= left / wanted
    assert slow.rungs[1].evaluated_rows == int(share * (second.evaluated_rows or 0))
    assert slow.rungs[1].held_out_rows == second.held_out_rows
    for name, one in plan.candidates.items():
        assert slow.candidates[name].steps == one.steps
        assert slow.candidates[name].refit_steps == int((one.refit_steps or 0) * 2**-0.5)
    # So is training where evaluations have no rows to spare.
    few = replace(plan, rungs=tuple(replace(one, evaluated_rows=256) for one in plan.rungs))
    slow = few.revise([1.3 * planned[0]], [planned[1]], NAMES)
    assert (slow.rungs[1].share, slow.rungs[1].evaluated_rows) == (share * second.share, 256)
    # A race that has less than half of the time for the rest ends.
    late = plan.revise([2.0 * planned[0]], [planned[1]], NAMES)
    assert late.rungs == plan.rungs[:1] and not late.rungs[0].final and late.revised == 1


def test_training_time_of_dropped_candidates_goes_to_the_evaluation(
    data: PreparedData, monkeypatch: pytest.MonkeyPatch
) -> None:
    Machine(monkeypatch)
    names = ("regression_linear", "regression", "likelihood_linear", "behavior_cloning")
    config = config_of(candidates=names)
    plan = make_plan(config, data, make_candidates(config, data), Progress())
    first, last = plan.rungs
    # After the first stage only a regression leaves, by its loss: no values are needed.
    assert (first.evaluated_rows, first.evaluation_seconds) == (0, 0.0)
    assert last.evaluation_seconds == pytest.approx(0.15 * 600.0)
    left = ("regression_linear", "behavior_cloning")
    revised = plan.revise([first.training_seconds], [0.5], left).rungs[1]
    needed = last.share * sum(plan.candidates[name].seconds for name in left)
    assert revised.training_seconds == needed < last.training_seconds
    seconds = revised.training_seconds + revised.evaluation_seconds
    assert seconds == pytest.approx(last.training_seconds + last.evaluation_seconds)
    rows = (last.evaluated_rows or 0) * revised.evaluation_seconds / last.evaluation_seconds
    assert revised.evaluated_rows == int(rows)
    # Plans of earlier versions do not have the seconds of candidates.
    old = {name: replace(one, seconds=0.0) for name, one in plan.candidates.items()}
    revised = replace(plan, candidates=old).revise([first.training_seconds], [0.5], left)
    assert revised.rungs == plan.rungs
    # However late it is, a choice has evidence.
    late = plan.revise([100.0 * first.training_seconds], [0.5], left)
    assert len(late.rungs) == 2 and late.rungs[1].evaluated_rows == 256


def test_a_log_is_read_as_far_as_the_budget_goes(
    data: PreparedData, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = data.train.read_row_group(0)
    short = replace(data, train=type(data.train)(table, data.train.schema, 100))  # type: ignore[call-arg]
    Machine(monkeypatch, read=0.04)
    config = config_of()
    plan = make_plan(config, short, make_candidates(config, short), Progress())
    # A tenth of ten minutes, for two passes: 750 rows, in whole row groups.
    assert plan.rows == 750
    assert plan.notes[0] == "800 of 3,000 rows of the log are read"
    part = plan.limited(short, config)
    assert part.train.num_rows == 800
    groups = groups_to_read(short, config, plan.rows)
    assert groups == sorted(set(groups)) and groups != list(range(8))
    again = EncodedRows.concat(list(part.scan(64)))
    whole = EncodedRows.concat(list(short.scan(64)))
    chosen = np.concatenate([np.arange(100 * g, 100 * g + 100) for g in groups])
    np.testing.assert_array_equal(again.action, whole.action[chosen])
    np.testing.assert_array_equal(again.pscore, whole.take(chosen).pscore)


def test_drawn_rows_stand_for_all(data: PreparedData) -> None:
    """z-tests at four standard errors, which a right one fails once in 16,000 seeds. Each drawn row
    has the exact terms of the same row among all."""
    config = config_of(candidates=["regression_linear", "likelihood_linear"], epochs=1)
    candidates = make_candidates(config, data)
    folds = Folds(2, (0, 1), 0)
    members = {
        one.name: fit_members(one, config, data, folds, Schedule(1, 256), Progress())
        for one in candidates
    }
    every = HeldOutEvaluator(data, folds, 10_000, 64)
    few = HeldOutEvaluator(data, folds, 10_000, 64, None, 500)
    evaluated = every.candidates(members, ["regression_linear"], binary=True)
    whole, found = every.terms(evaluated), few.terms(evaluated)
    assert whole.count is None and found.count is not None and found.sampling_size is not None
    assert few.rows == few.evaluated == len(found.reward) == 500
    # Contexts are distinct, so keys tell rows.
    assert whole.unit_key is not None and found.unit_key is not None
    place = {key: k for k, key in enumerate(whole.unit_key.tolist())}
    index = np.array([place[key] for key in found.unit_key.tolist()])
    np.testing.assert_array_equal(whole.reward[index], found.reward)
    for policy, terms in whole.terms.items():
        one = found.terms[policy]
        np.testing.assert_allclose(terms.weight[index], one.weight, rtol=1e-4)
        np.testing.assert_allclose(terms.expected_reward[index], one.expected_reward, rtol=1e-4)
        values = found.count * one.weight
        variance = float((found.count * (found.count - 1.0)) @ np.square(one.weight))
        assert abs(values.sum() - terms.weight.sum()) < 4.0 * variance**0.5
    parts = few.terms(evaluated, (0.0, 0.4))
    assert len(parts.reward) == 200 and parts.size == pytest.approx(3000, rel=0.3)
    parts = few.terms(evaluated, (0.4, 1.0), parts)
    assert parts.size == pytest.approx(found.size, rel=1e-12)
    assert parts.count is not None
    np.testing.assert_allclose(np.sort(parts.count), np.sort(found.count), rtol=1e-12)
    losses = [one.loss(members["regression_linear"], binary=True) for one in (every, few)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-9)


@pytest.mark.parametrize("name", ["regression_linear", "regression"])
def test_regressions_of_a_race_start_at_the_mean_reward(data: PreparedData, name: str) -> None:
    config = config_of(candidates=[name])
    (candidate,) = make_candidates(config, data)
    policy = start_member(candidate, config, data, NOTHING, Progress()).step.policy.eval()
    with torch.no_grad():
        before = policy.embed_items(data.items)
        set_item_bias(policy, -5.0)
        after = policy.embed_items(data.items)
    assert before.bias is not None and after.bias is not None
    torch.testing.assert_close(after.bias, before.bias - 5.0)
    assert torch.equal(after.embedding, before.embedding)


def test_parts_of_a_log_keep_the_origin_of_their_rows(data: PreparedData) -> None:
    table = data.train.read_row_group(0)
    log = type(data.train)(table, data.train.schema, 100)  # type: ignore[call-arg]
    part = LogPart(log, [3, 7])
    assert part.num_rows == 200 and part.fingerprint == log.fingerprint
    assert part.location(1) == log.location(7)
    assert pa.concat_tables(part.tables()).equals(
        pa.concat_tables([log.read_row_group(3), log.read_row_group(7)])
    )


def test_rewarded_rows_are_read_once_and_given_out_like_those_of_a_log(data: PreparedData) -> None:
    kept = keep_rewarded(data, 10_000, Progress())
    rows = EncodedRows.concat(list(data.scan(512)))
    wanted = rows.take(np.flatnonzero(rows.reward))
    np.testing.assert_array_equal(kept.rows.row, wanted.row)
    assert kept.counts.rows == len(wanted)
    folds = Folds(3, (0, 1, 2), 0)
    order = EpochOrder(kept.row_group_sizes, 64, 5, num_folds=3)
    for epoch in range(2):
        with kept.batches(order, folds.of) as reader:
            steps = list(reader.epoch(epoch))
        assert max(len(step.rows) for step in steps) <= 64
        found = np.sort(np.concatenate([step.rows.row for step in steps]))
        np.testing.assert_array_equal(found, wanted.row)
        assert all((folds.of(step.rows) == step.fold).all() for step in steps)
    assert len(keep_rewarded(data, 7, Progress()).rows) == 7


def test_members_that_do_not_fit_become_fewer_and_narrower(
    data: PreparedData, monkeypatch: pytest.MonkeyPatch
) -> None:
    Machine(monkeypatch)
    config = config_of(candidates=["likelihood_linear", "likelihood"])
    candidates = make_candidates(config, data)
    sizes = [budget.TowerSizes.of(one, data).parameters for one in candidates]
    loaded, largest = 4 * sum(sizes), 12 * max(sizes)
    for members, apart in ((3, False), (3, True), (2, True), (1, False)):
        need = members * loaded + (1 if apart else members) * largest
        monkeypatch.setattr(budget, "_MEMORY", budget._KEPT_BYTES + need)
        plan = make_plan(config, data, candidates, Progress())
        assert (plan.members, plan.members_apart) == (members, apart)
        assert plan.max_embedding_dim is None
        assert any("GiB" in note for note in plan.notes) == (members < 3)
    monkeypatch.setattr(budget, "_MEMORY", budget._KEPT_BYTES + loaded)
    plan = make_plan(config, data, candidates, Progress())
    assert plan.max_embedding_dim == 16
    assert all(narrowed(one, 16).policy.embedding_dim <= 16 for one in candidates)


def test_candidates_that_cannot_take_part_are_named(
    data: PreparedData, monkeypatch: pytest.MonkeyPatch
) -> None:
    Machine(monkeypatch, step=20.0)
    config = config_of(candidates=NAMES)
    plan = make_plan(config, data, make_candidates(config, data), Progress())
    # Each alone would take hours: one is left, beside the clone, with the steps that fit.
    assert list(plan.candidates) == ["regression_linear", "behavior_cloning"]
    assert plan.dropped["likelihood"] == "its 610 steps would take 610 min"
    assert (plan.candidates["regression_linear"].steps or 0) * 20.0 < 300.0
    Machine(monkeypatch, step=5.0)
    config = config_of(candidates=NAMES, budget=0.1)
    plan = make_plan(config, data, make_candidates(config, data), Progress())
    assert any(note.startswith("auto.budget of 0.1 minutes is too short") for note in plan.notes)
    assert {one.steps for one in plan.candidates.values()} == {10 * len(plan.rungs)}


def test_plain_progress_estimates_the_time_that_is_left() -> None:
    now = 0.0
    task = PlainTask("fitting", 400, every=30.0, clock=lambda: now)
    now = 20.0
    assert task.advance(50) is None
    now = 40.0
    assert task.advance(50) == "fitting: 25%, about 2 min left"
    now = 60.0
    assert task.advance(200) is None
    now = 80.0
    assert task.advance(20) == "fitting: 80%, about 20 s left"
    unknown = PlainTask("evaluating", None, every=30.0, clock=lambda: now)
    now = 120.0
    assert unknown.advance(1000) == "evaluating: 1,000 done"


def test_plain_progress_of_many_short_tasks_has_lines() -> None:
    now = 0.0
    last = 0.0
    lines = []

    def clock() -> float:
        return now

    for _ in range(4):
        task = PlainTask("fitting", 10, every=30.0, clock=clock, last=last)
        now += 12.0
        if task.advance(5) is not None:
            lines.append(now)
        last = task.last
    assert lines == [36.0]
