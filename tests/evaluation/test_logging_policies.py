"""Logs of several behavior policies: the heuristic, PAS-IF's draws and support, from runs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from typer.testing import CliRunner

from offtower.cli import app
from offtower.data import write_log
from offtower.data.catalogue import Catalogue
from offtower.data.encoding import FeatureEncoding, to_tensors
from offtower.data.log import ParquetLog
from offtower.data.reader import scan
from offtower.data.schema import LogSchema
from offtower.data.simulate import SimulatedWorld, WorldSettings
from offtower.errors import ConfigError, DataError, OfftowerError
from offtower.evaluation import support_probe
from offtower.evaluation.behavior.names import BehaviorNames
from offtower.evaluation.behavior.policies import LoggingPolicies
from offtower.evaluation.behavior.probes import (
    SupportProbe,
    SupportSample,
)
from offtower.evaluation.estimators import Estimator
from offtower.evaluation.evaluator import Evaluator
from offtower.evaluation.rows import EvaluationRows
from offtower.evaluation.run import evaluate_runs
from offtower.evaluation.run_loading import open_run, with_overrides
from offtower.evaluation.samples import joined
from offtower.evaluation.scoring.policy import PolicyScorer
from offtower.evaluation.scoring.reward_models import RewardModelProvider
from offtower.execution import LOCAL
from offtower.progress import Progress
from offtower.run_directory import RunDirectory
from tests.mappers import BACKWARDS

from .several_policies import (
    BETAS,
    behavior,
    columns_option,
    evaluate,
    make_runs,
    renamed,
    runs_option,
    streamed,
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See `make_runs`."""
    folder = tmp_path_factory.mktemp("several")
    make_runs(folder)
    return folder


def test_the_heuristic_ranks_every_candidate_from_the_runs_that_logged(place: Path) -> None:
    found = evaluate(place, runs_option(place), "evaluation.batch_rows=500")
    result = found.selection["b"].results["heuristic"]
    names = {score.name for score in result.ranking}
    assert {"IPS", "SNIPS", "DM[two_tower]", "DR[linear]", "SNDR[two_tower]"} <= names
    assert not result.skipped
    assert result.details["policies"] == 2


def test_probabilities_and_expected_rewards_are_those_of_the_policies(place: Path) -> None:
    """Against softmaxes and sums by enumeration over the whole catalogue."""
    evaluator, _, accumulated = streamed(place, "heuristic", runs_option(place))
    catalogue, log, runs = evaluator.catalogue, evaluator.log, evaluator.runs
    samples = [one.heuristic for one in accumulated.behavior if one.heuristic is not None]
    assert len(samples) == len(accumulated.behavior)
    behavior = joined(samples)
    model = RewardModelProvider(runs, evaluator.config).main()
    assert model is not None and not model.of_pairs
    rows = next(iter(scan(log, catalogue, runs[0].policy.context_encoding, 5000)))
    q = model.over_catalogue(rows).terms
    value = torch.sigmoid(q.context @ q.item.T + q.item_bias).double().numpy()
    for number, name in enumerate("ab"):
        run = open_run(place / name, catalogue)
        scorer = PolicyScorer(run.policy, run.items)
        own = next(iter(scan(log, catalogue, run.policy.context_encoding, 5000)))
        with torch.no_grad():
            context = run.policy.embed_contexts(to_tensors(own.context))
        logit = context @ scorer.items.embedding.T / run.policy.temperature
        probability = torch.softmax(logit.double(), 1).numpy()
        logged = probability[np.arange(len(rows)), rows.action]
        np.testing.assert_allclose(behavior.probability[:, number], logged, rtol=1e-4)
        expected = (probability * value).sum(axis=1)
        np.testing.assert_allclose(
            behavior.expected_reward["two_tower"][:, number], expected, rtol=1e-4
        )
    own = behavior.probability[np.arange(len(rows)), behavior.row_policy]
    np.testing.assert_allclose(own, rows.pscore, rtol=1e-4)
    assert np.bincount(behavior.row_policy).tolist() == [700, 600]


def test_columns_of_propensities_serve_estimators_without_a_model(place: Path) -> None:
    found = evaluate(place, columns_option(), log="drawn")
    result = found.selection["b"].results["heuristic"]
    assert {"IPS", "SNIPS"} <= {score.name for score in result.ranking}
    assert all("[" in name for name in result.skipped) and result.skipped
    remarks = [text for method, text in found.selection["b"].remarks if method == "heuristic"]
    assert any("no expected rewards" in text for text in remarks)


@pytest.mark.parametrize("backwards", [False, True])
def test_columns_are_read_in_step_with_the_rows(place: Path, backwards: bool) -> None:
    found = behavior(place, columns_option(), log="drawn", backwards=backwards)
    table = pq.read_table(place / "drawn" / "part-00000.parquet")
    assert table.num_rows == 2001
    np.testing.assert_array_equal(
        found.probability, np.stack([table[f"pscore_{name}"].to_numpy() for name in BETAS], 1)
    )
    names = np.array(list(BETAS))[found.row_policy]
    assert names.tolist() == table["behavior_policy"].to_pylist()


@pytest.mark.parametrize(
    ("log", "select", "options", "cells"),
    [
        ("served", "all", ("RUNS",), None),
        ("served", "all", ("RUNS", "evaluation.selection.draws=100"), 0),
        ("served", "heuristic", ("RUNS", "evaluation.expected_reward=draws"), None),
        ("drawn", "heuristic", ("COLUMNS",), None),
        (
            *("served", "pasif"),
            (
                "RUNS",
                "evaluation.selection.importance_fit=network",
                "evaluation.selection.network_steps=3",
            ),
            None,
        ),
    ],
    ids=["every-item", "draws", "expected-by-draws", "columns", "network"],
)
def test_parts_evaluated_elsewhere_give_the_same_bits(
    place: Path,
    log: str,
    select: str,
    options: tuple[str, ...],
    cells: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Selections, support and all else of two runs; parts are sent, run twice and backwards."""
    if cells is not None:
        monkeypatch.setattr("offtower.evaluation.behavior.probes.MAX_DENSE_CELLS", cells)
    known = {"RUNS": runs_option(place), "COLUMNS": columns_option()}
    one, many = (
        evaluate_runs(
            [place / "a", place / "b"],
            overrides=[known.get(each, each) for each in (*options, "evaluation.batch_rows=300")],
            select=select,
            log=place / log,
            execution=execution,
        )
        for execution in (LOCAL, BACKWARDS)
    )
    found = one.to_dict()
    assert many.to_dict() == found
    for name in "ab":
        wanted = {"all": {"heuristic", "pasif"}}.get(select, {select})
        assert wanted <= set(one.selection[name].results)
        assert (one.result.policies[name].support is None) == (log == "drawn")


def test_a_run_that_did_not_make_the_log_is_refused_from_parts_too(place: Path) -> None:
    option = f"evaluation.selection.logging_run={place / 'a'}"
    one, many = (
        evaluate_runs(
            [place / "b"],
            overrides=[option, "evaluation.batch_rows=300"],
            select="pasif",
            log=place / "drawn",
            execution=execution,
        )
        for execution in (LOCAL, BACKWARDS)
    )
    assert any("did not make this log" in note for note in one.notes)
    assert many.to_dict() == one.to_dict()


def test_pasif_draws_from_the_policy_that_logged_each_row(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The evaluated run's own rows have weights of 1, the other's average 1 (5 standard errors)."""
    monkeypatch.setattr("offtower.evaluation.behavior.probes.MAX_DENSE_CELLS", 0)
    evaluator, plan, accumulated = streamed(
        place, "pasif", runs_option(place), "evaluation.selection.draws=100"
    )
    samples = [one.pasif for one in accumulated.behavior if one.pasif is not None]
    weight = joined(samples).weight["b"].astype(float)
    column = ParquetLog.open(place / "served").tables()
    name = np.concatenate([table["behavior_policy"].to_numpy() for table in column])
    assert weight.shape == (1300, 100)
    np.testing.assert_allclose(weight[name == "run-b"], 1.0, rtol=1e-4)
    others = weight[name == "run-a"]
    error = np.sqrt((others.var(axis=1) / 100).mean() / len(others))
    assert others.std() > 0.1
    assert abs(others.mean() - 1.0) < 5 * error
    result = evaluator.select(plan, ["b"], accumulated, Progress())["b"].results["pasif"]
    assert not result.skipped
    assert any("100 draws" in note for note in result.notes)


def test_support_is_what_the_logging_run_leaves_of_the_target(place: Path) -> None:
    """A logging policy 20 times as sharp hides items: share by enumeration, 5 standard errors."""
    catalogue = Catalogue.open(place / "catalogue")
    log = ParquetLog.open(place / "served")
    target, other = (open_run(place / name, catalogue) for name in "ba")
    scorer, sharp = (PolicyScorer(run.policy, run.items) for run in (target, other))
    sharp.items = replace(sharp.items, embedding=20.0 * sharp.items.embedding)
    policies = LoggingPolicies(("a",), (sharp,))
    probe = SupportProbe(policies, log.num_rows, 0)
    shares, counts, samples = [], 0, list[SupportSample]()
    for number, rows in enumerate(scan(log, catalogue, target.policy.context_encoding, 400)):
        scored = scorer.score_models(rows, {})
        sample = probe.measure(number, {"b": scored}, [rows])
        assert sample is not None
        samples.append(sample)
        with torch.no_grad():
            context = other.policy.embed_contexts(to_tensors(rows.context))
        of_target = scored.context_embedding @ scorer.items.embedding.T / target.policy.temperature
        of_log = context @ sharp.items.embedding.T / other.policy.temperature
        aim, shown = (torch.softmax(logit.double(), 1) for logit in (of_target, of_log))
        shares.append((aim * (shown < aim / log.num_rows)).sum(1).numpy())
        counts += len(rows)
    exact = float(np.concatenate(shares).mean())
    measured = joined(samples)
    found = support_probe(
        np.exp(np.minimum(measured.log_behavior["b"], 0.0)),
        np.exp(np.minimum(measured.log_target["b"], 0.0)),
        num_rows=log.num_rows,
    )
    assert counts == 1300 and found.draws == 13_000
    assert 0.02 < exact < 0.98
    assert found.hidden is not None
    assert abs(found.hidden - exact) < 5 * np.sqrt(exact * (1 - exact) / found.draws)


def test_the_gate_sees_support_where_the_logging_policies_are_named(place: Path) -> None:
    found = evaluate(place, runs_option(place), select=None).result.policies["b"]
    assert found.support is not None and found.support.hidden is not None
    assert found.support.hidden < 0.01 and found.support.draws == 13_000
    assert evaluate(place, select=None).result.policies["b"].support is None


@pytest.mark.parametrize("select", ["heuristic", "all"])
def test_what_to_add_is_said_where_no_runs_are_named(place: Path, select: str) -> None:
    words = "logging_runs={run-a: RUN, run-b: RUN}"
    if select == "heuristic":
        with pytest.raises(ConfigError, match="logging_runs") as refused:
            evaluate(place)
        assert words in str(refused.value) and "logging_columns=" in str(refused.value)
    else:
        failed = evaluate(place, select="all").selection["b"].failed
        assert words in failed["heuristic"]


@pytest.mark.parametrize(
    ("log", "words"),
    [("train", "every row of this log has the behavior policy 'logging'"), ("blind", "no column")],
)
def test_logs_of_one_policy_are_refused(place: Path, log: str, words: str) -> None:
    if log == "blind" and not (place / "blind").exists():
        opened = ParquetLog.open(place / "served")
        schema = LogSchema.from_dict({**opened.schema.to_dict(), "behavior_policy": None})
        write_log(place / "blind", opened.tables(), schema)
    with pytest.raises(ConfigError, match=words):
        evaluate(place, log=log)


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("logging_runs={run-a: A}", "lacks the behavior policy 'run-b', which logged 600 rows"),
        ("logging_runs={run-a: A, run-b: B, run-c: C}", "'run-c', which logged no row"),
        ("logging_columns={run-a: pscore, run-b: psc}", "the column 'psc', which the log"),
        ("logging_runs={}", "logging_runs"),
    ],
)
def test_names_that_do_not_fit_the_log_are_refused(place: Path, option: str, words: str) -> None:
    with pytest.raises(OfftowerError, match=words):
        evaluate(place, f"evaluation.selection.{option}")


def test_options_that_exclude_each_other(place: Path) -> None:
    for other in (f"logging_run={place / 'a'}", "logging_columns={run-a: pscore, run-b: pscore}"):
        with pytest.raises(ConfigError, match="name one of the two"):
            evaluate(place, runs_option(place), f"evaluation.selection.{other}")
    with pytest.raises(ConfigError, match="propensities=estimate"):
        evaluate(place, runs_option(place), "evaluation.propensities=estimate")


@pytest.mark.parametrize("select", [None, "pasif", "heuristic"])
def test_runs_that_did_not_log_are_found_out_by_row_and_value(
    place: Path, select: str | None
) -> None:
    """Swapped runs: whichever part looks first refuses them."""
    with pytest.raises(DataError, match=r"behavior policy 'run-a'.*row \d+: logged 0\.\d+, found"):
        evaluate(place, runs_option(place, a="b", b="a"), select=select)


def test_columns_that_are_not_the_logged_propensities_are_found_out(place: Path) -> None:
    with pytest.raises(DataError, match=r"'pscore_keen'.*'cautious'.*row \d+: logged"):
        behavior(place, columns_option("pscore_keen", "pscore_keen"), log="drawn")
    table = pq.read_table(place / "drawn" / "part-00000.parquet")
    wrong = table["pscore_keen"].to_numpy().copy()
    wrong[777] = -0.5
    column = table.schema.get_field_index("pscore_keen")
    table = table.set_column(column, "pscore_keen", pa.array(wrong))
    write_log(place / "negative", [table], ParquetLog.open(place / "drawn").schema, 300)
    with pytest.raises(DataError, match=r"column 'pscore_keen' is -0\.5 in row 777 of the log"):
        behavior(place, columns_option(), log="negative")


def test_a_loose_tolerance_lets_rounded_propensities_pass(place: Path) -> None:
    option = "evaluation.selection.logging_tolerance"
    with pytest.raises(DataError, match="1e-11 %"):
        behavior(place, runs_option(place), f"{option}=1e-13")
    assert behavior(place, runs_option(place), f"{option}=1e-3").probability.shape == (1300, 2)


def test_behavior_names_are_text_whatever_their_type(tmp_path: Path) -> None:
    world = SimulatedWorld(5, WorldSettings(2, 2, 2))
    tables = [renamed(t, name) for name in (7, -3) for t in world.log(4, seed=0)]
    write_log(tmp_path / "log", [tables[0], tables[1], tables[0]], world.log_schema, 5)
    log = ParquetLog.open(tmp_path / "log")
    names = BehaviorNames.of(log)
    assert names is not None
    assert names.name == ("-3", "7") and names.rows.tolist() == [4, 8]
    catalogue = world.catalogue()

    encoding = FeatureEncoding.fit(world.log_schema.context, log.tables())
    rows = next(iter(scan(log, catalogue, encoding, 12)))
    assert rows.behavior_policy is not None
    assert names.index(rows.behavior_policy).tolist() == [1] * 4 + [0] * 4 + [1] * 4


def test_the_command_line_runs_the_heuristic(place: Path) -> None:
    run = CliRunner().invoke(
        app,
        [
            "evaluate",
            str(place / "b"),
            "--log",
            str(place / "served"),
            "--select",
            "heuristic",
            "--json",
            "--set",
            runs_option(place),
            "--report",
            str(place / "report.html"),
        ],
    )
    assert run.exit_code in (0, 1, 3), run.output
    found = json.loads(run.stdout)["selection"]["b"]
    assert found["recommended"] == "heuristic" and not found["failed"]
    assert "heuristic" in (place / "report.html").read_text()
    plain = CliRunner().invoke(
        app, ["evaluate", str(place / "b"), "--log", str(place / "served"), "--select", "heuristic"]
    )
    assert plain.exit_code == 2
    assert "evaluation.selection.logging_runs={run-a: RUN, run-b: RUN}" in plain.output


def scored_rows(
    place: Path, log: str, *overrides: str
) -> tuple[EvaluationRows, tuple[Estimator, ...]]:
    """Rows of run `b` in the order of a log, in batches that cut its row groups; estimators."""
    config = with_overrides(
        RunDirectory(place / "b").load_config(), ["evaluation.batch_rows=190", *overrides]
    )
    catalogue = Catalogue.open(place / "catalogue")
    runs = (open_run(place / "b", catalogue),)
    evaluator = Evaluator(runs, ParquetLog.open(place / log), catalogue, config)
    plan = evaluator.plan(None, Progress())
    batches = plan.scorer.batches(range(plan.scorer.source.num_batches))
    return EvaluationRows.concatenate([one.rows["b"] for one in batches]), plan.options.estimators


BALANCED = "evaluation.propensities=balanced"


def test_balanced_propensities_are_the_mixture_of_the_columns(place: Path) -> None:
    own, _ = scored_rows(place, "drawn")
    balanced, _ = scored_rows(place, "drawn", BALANCED, columns_option())
    parts = sorted((place / "drawn").glob("part-*.parquet"))
    table = pa.concat_tables([pq.read_table(part) for part in parts])
    column = {name: table.column(name).to_numpy() for name in ("pscore_cautious", "pscore_keen")}
    pscore, made_by = table.column("pscore").to_numpy(), table.column("behavior_policy").to_pylist()
    share = np.mean([name == "keen" for name in made_by])
    mixture = (1.0 - share) * column["pscore_cautious"] + share * column["pscore_keen"]
    expected = own.importance_weight * pscore / mixture
    np.testing.assert_allclose(balanced.importance_weight, expected, rtol=1e-6)
    assert balanced.logger is not None
    assert balanced.logger.tolist() == [int(name == "keen") for name in made_by]


def test_balanced_propensities_are_the_mixture_of_the_runs(place: Path) -> None:
    own, _ = scored_rows(place, "served")
    balanced, _ = scored_rows(place, "served", BALANCED, runs_option(place))
    known = behavior(place, runs_option(place))
    rows = np.arange(own.n)
    mixture = known.probability @ (np.bincount(known.row_policy) / own.n)
    expected = own.importance_weight * known.probability[rows, known.row_policy] / mixture
    np.testing.assert_allclose(balanced.importance_weight, expected, rtol=1e-4)
    assert balanced.logger is not None and (balanced.logger == known.row_policy).all()
    # Run b logged nearly half of the rows: no weight exceeds the inverse of its share.
    assert balanced.importance_weight.max() <= 1.001 * own.n / np.sum(known.row_policy == 1)


def test_estimators_by_logger_need_the_column_only(place: Path) -> None:
    option = "evaluation.estimators=[ips, logger_weighted_ips, logger_weighted_dr]"
    rows, estimators = scored_rows(place, "drawn", option)
    found = evaluate(place, option, select=None, log="drawn").result.policies["b"].estimates
    assert [one.num_terms for one in estimators] == [1, 8, 8]
    for estimator in estimators:
        alone = estimator.finish(estimator.statistics(rows, by_user=True))
        by_log = found[estimator.name].estimate
        assert by_log.value == pytest.approx(alone.value, rel=1e-9)
        assert by_log.std_error == pytest.approx(alone.std_error, rel=1e-6)


def test_balanced_propensities_say_what_they_need(place: Path) -> None:
    for override, words in (
        ((), "logging_runs, or the columns"),
        ((columns_option(keen="psc"),), "the column 'psc'"),
        ((columns_option(cautious="pscore_keen"),), "does not give the probabilities"),
    ):
        with pytest.raises(OfftowerError) as refused:
            evaluate(place, BALANCED, *override, select=None, log="drawn")
        assert words in str(refused.value)
    with pytest.raises(ConfigError, match="PAS-IF splits rows by their own propensities"):
        evaluate(place, BALANCED, columns_option(), select="pasif", log="drawn")
    log = ParquetLog.open(place / "drawn")
    schema = replace(log.schema, behavior_policy=None)
    catalogue = Catalogue.open(place / "catalogue")
    config = with_overrides(RunDirectory(place / "b").load_config(), [BALANCED])
    unnamed = Evaluator(
        (open_run(place / "b", catalogue),),
        ParquetLog.open(place / "drawn", schema),
        catalogue,
        config,
    )
    with pytest.raises(ConfigError, match="name the column under 'behavior_policy'"):
        unnamed.plan(None, Progress())
