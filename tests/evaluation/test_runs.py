"""evaluate_runs: options of the config, reward models, propensities, clusters, selection."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch

from offtower.config import parse_config
from offtower.data import write_catalogue, write_log
from offtower.data.catalogue import Catalogue
from offtower.data.encoding import to_tensors
from offtower.data.log import ParquetLog
from offtower.data.reader import scan
from offtower.data.schema import LogSchema
from offtower.data.simulate import SimulatedWorld, WorldSettings
from offtower.errors import ConfigError, DataError, OfftowerError
from offtower.evaluation.decision.gate import GO, NO_GO
from offtower.evaluation.run import LogEvaluation, evaluate_runs
from offtower.evaluation.run_loading import open_run
from offtower.evaluation.run_notes import advice_notes
from offtower.evaluation.scoring import propensities
from offtower.evaluation.scoring.clusters import ItemClusters, item_clusters
from offtower.evaluation.scoring.policy import PolicyScorer
from offtower.execution import LOCAL
from offtower.models.policy import TwoTowerPolicy
from offtower.retrieval.export import export_run
from offtower.training.run import train_run
from tests.mappers import BACKWARDS

ITEMS = 15


def of_policy(
    world: SimulatedWorld, policy: TwoTowerPolicy, catalogue: Catalogue, rows: int, folder: Path
) -> Iterator[pa.Table]:
    """A log that `policy` itself made, with its exact probabilities."""
    items = policy.embed_items(_features(catalogue, policy))
    generator = torch.Generator().manual_seed(5)
    rng = np.random.default_rng(5)
    write_log(folder / "raw", world.log(rows, seed=9), world.log_schema)
    log = ParquetLog.open(folder / "raw")
    first = 0
    table = pa.concat_tables(log.tables())
    for batch in scan(log, catalogue, policy.context_encoding, 512):
        part = table.slice(first, len(batch))
        first += len(batch)
        context = policy.embed_contexts(to_tensors(batch.context))
        logit = context @ items.embedding.T / policy.temperature
        log_prob = torch.log_softmax(logit.double(), dim=1)
        action = torch.multinomial(log_prob.exp(), 1, generator=generator)
        pscore = log_prob.exp().gather(1, action)[:, 0]
        mean = world.expected_reward(part, action[:, 0].numpy())
        reward = (rng.random(len(batch)) < mean).astype(np.float32)
        for name, values in (
            ("action", world.item_ids.take(pa.array(action[:, 0].numpy()))),
            ("pscore", pa.array(pscore.detach().numpy())),
            ("reward", pa.array(reward)),
        ):
            part = part.set_column(part.schema.get_field_index(name), name, values)
        yield part


def _features(catalogue: Catalogue, policy: TwoTowerPolicy) -> object:
    from offtower.models.items import ItemFeatures

    return ItemFeatures.from_catalogue(catalogue, policy.item_encoding)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small world, two trained runs, a log without propensities and one made by run `a`."""
    folder = tmp_path_factory.mktemp("runs")
    world = SimulatedWorld(
        ITEMS, WorldSettings(4, 4, 4, feature_kinds="all", intercept=0.0), seed=1
    )
    write_catalogue(folder / "catalogue", world.catalogue_table(), world.catalogue_schema)
    for seed, (name, rows) in enumerate({"train": 1500, "test": 800}.items()):
        write_log(folder / name, world.log(rows, seed=seed), world.log_schema)
    for name, objective in (("a", "dr"), ("b", "regression")):
        train_run(
            parse_config(
                {
                    "name": name,
                    "runs": str(folder / "runs"),
                    "data": {
                        key: str(folder / part)
                        for key, part in (
                            ("train", "train"),
                            ("test", "test"),
                            ("catalogue", "catalogue"),
                        )
                    },
                    "policy": {"embedding_dim": 4, "temperature": 0.5},
                    "reward_model": {
                        "kind": "factored",
                        "embedding_dim": 4,
                        "folds": 2,
                        "epochs": 2,
                    },
                    "objective": {"name": objective},
                    "training": {"epochs": 3, "batch_size": 64, "threads": 1},
                }
            )
        )
    blind = LogSchema.from_dict({**world.log_schema.to_dict(), "pscore": None})
    bare = (table.drop_columns(["pscore"]) for table in world.log(800, seed=1))
    write_log(folder / "bare", bare, blind)
    catalogue = Catalogue.open(folder / "catalogue")
    policy = open_run(folder / "runs" / "a", catalogue).policy
    with torch.no_grad():
        write_log(
            folder / "served", of_policy(world, policy, catalogue, 1000, folder), world.log_schema
        )
    return folder


def evaluate(place: Path, *overrides: str, runs: str = "a", **more: object) -> LogEvaluation:
    return evaluate_runs(
        [place / "runs" / name for name in runs],
        overrides=[f"evaluation.{one}" for one in overrides],
        **more,
    )


def estimate(found: LogEvaluation, name: str, policy: str = "a") -> object:
    return found.result.policies[policy].estimates[name].estimate


def test_estimators_with_parameters_and_slope(place: Path) -> None:
    found = evaluate(
        place,
        "estimators=[snips, {name: clipped_ips, max_weight: 2}, {name: dros, shrinkage: slope}]",
        "interval=bootstrap",
        "replicates=400",
    )
    names = list(found.result.policies["a"].estimates)
    assert names[:2] == ["snips", "clipped_ips(max_weight=2)"]
    assert names[2].startswith("dros(shrinkage=")
    assert any("SLOPE" in note and "800 rows" in note for note in found.notes)
    assert found.result.policies["a"].estimates["snips"].interval.method == "bootstrap"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("estimators=[clipped_ips]", "clipped_ips takes max_weight"),
        ("estimators=[{name: snips, max_weight: slope}]", "snips takes no parameters"),
        ("estimators=[snpis]", "did you mean 'snips'"),
        ("estimators=[mips]", "evaluation.clusters"),
        ("gate.margn=1", "did you mean 'margin'"),
        ("decide_by=ipps", "decide_by"),
    ],
)
def test_wrong_options_are_refused_in_words(place: Path, override: str, words: str) -> None:
    with pytest.raises(OfftowerError, match=words):
        evaluate(place, override)


def test_the_gate_is_configured(place: Path) -> None:
    easy = ("gate.min_effective_sample_size=1", "gate.max_pareto_k=9", "gate.max_mean_weight_z=99")
    decisions = [
        evaluate(place, *easy, f"gate.margin={margin}").result.policies["a"].verdict.decision
        for margin in (-0.9, 0.9)
    ]
    assert decisions == [GO, NO_GO]


def test_expected_rewards_by_draws_agree_and_their_noise_is_in_the_interval(place: Path) -> None:
    exact, drawn = evaluate(place), evaluate(place, "expected_reward=draws", "draws=1")
    a, b = estimate(exact, "dm"), estimate(drawn, "dm")
    assert b.std_error > a.std_error
    # The same rows: what differs is the draws' noise alone.
    assert abs(a.value - b.value) < 4.0 * np.sqrt(b.std_error**2 - a.std_error**2)
    assert estimate(exact, "ips").value == pytest.approx(estimate(drawn, "ips").value, rel=1e-5)


def test_without_propensities_it_refuses_or_estimates_loudly(place: Path) -> None:
    with pytest.raises(DataError, match=r"evaluation\.propensities=estimate"):
        evaluate(place, log=place / "bare")
    found = evaluate(place, "propensities=estimate", log=place / "bare")
    assert any("ESTIMATES, NOT LOGGED" in note for note in found.notes)
    assert found.result.propensities_estimated
    codes = [reason.code for reason in found.result.policies["a"].verdict.reasons]
    assert "propensities_estimated" in codes
    # The logging policy is a softmax with a little exploration: estimates land near the truth.
    logged = evaluate(place)
    error = np.hypot(estimate(logged, "snips").std_error, estimate(found, "snips").std_error)
    assert abs(estimate(found, "snips").value - estimate(logged, "snips").value) < 4 * error


def test_estimates_worse_than_the_frequencies_are_refused(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = propensities.estimate_propensities
    monkeypatch.setattr(
        propensities, "estimate_propensities", lambda *a, **k: replace(made(*a, **k), gain_z=-6.0)
    )
    with pytest.raises(DataError, match=r"worse than the items' frequencies .* 6\.0 standard err"):
        evaluate(place, "propensities=estimate", log=place / "bare")


@pytest.mark.parametrize("clusters", ["genre", "4"])
def test_marginalised_ips_over_clusters(place: Path, clusters: str) -> None:
    found = evaluate(place, "estimators=[ips, mips]", f"clusters={clusters}")
    assert any(note.startswith("mips:") for note in found.notes)
    # Its weights are less spread, as theory says: the error counts relative to the value, since the
    # weights' own mean, 1 in theory, differs between the two on a finite log.
    mips, ips = estimate(found, "mips"), estimate(found, "ips")
    assert mips.std_error / mips.value < ips.std_error / ips.value


def test_cluster_probabilities_are_sums_over_members(place: Path) -> None:
    catalogue = Catalogue.open(place / "catalogue")
    run = open_run(place / "runs" / "a", catalogue)
    scorer = PolicyScorer(run.policy, run.items)
    label = item_clusters(3, catalogue, scorer, 0)
    assert sorted(set(label)) == [0, 1, 2]
    log = ParquetLog.open(place / "test")
    rows = next(iter(scan(log, catalogue, run.policy.context_encoding, 50)))
    scored = scorer.score_models(rows, {})
    found = ItemClusters(label).log_probability(scored, rows.action)
    logit = scored.context_embedding @ scorer.items.embedding.T / run.policy.temperature
    probability = torch.softmax(logit.double(), dim=1).numpy()
    same = label[None, :] == label[rows.action][:, None]
    np.testing.assert_allclose(np.exp(found), (probability * same).sum(axis=1), rtol=1e-4)


def test_unknown_clusters_name_the_categories(place: Path) -> None:
    with pytest.raises(ConfigError, match="genre"):
        evaluate(place, "estimators=[mips]", "clusters=gener")
    with pytest.raises(ConfigError, match=r"2\.\.15"):
        evaluate(place, "estimators=[mips]", "clusters=99")


def test_selection_reads_three_reward_models(place: Path) -> None:
    found = evaluate(place, select="all").selection["a"]
    names = {score.name for score in found.results["paired"].ranking}
    for model in ("linear", "trees", "two_tower"):
        assert {f"DM[{model}]", f"DR[{model}]", f"SNDR[{model}]"} <= names
    assert "heuristic" in found.failed
    assert all("[" in name for name in found.results["pasif"].skipped)
    assert any("logged propensities" in note for note in found.results["pasif"].notes)


@pytest.mark.parametrize("cells", [0, None])
def test_a_run_that_made_the_log_lets_pasif_rank_every_candidate(
    place: Path, monkeypatch: pytest.MonkeyPatch, cells: int | None
) -> None:
    """By draws from it, and by sums over a catalogue of no more items."""
    if cells is not None:
        monkeypatch.setattr("offtower.evaluation.behavior.probes.MAX_DENSE_CELLS", cells)
    run = place / "runs" / "a"
    options = (f"selection.logging_run={run}", "selection.models=[linear]", "selection.draws=120")
    found = evaluate(place, *options, runs="b", select="pasif", log=place / "served")
    result = found.selection["b"].results["pasif"]
    assert not result.skipped
    assert any("120 draws" in note for note in result.notes) == (cells == 0)
    # Evaluated on its own log a run has weights of one.
    own = evaluate(place, log=place / "served").result.policies["a"].weights
    assert own.max == pytest.approx(1.0, abs=1e-3)


def test_many_draws_rank_as_the_sum_over_the_catalogue(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same splits of the same rows, fitted exactly and on 1,500 draws a row."""
    run = place / "runs" / "a"
    options = (f"selection.logging_run={run}", "selection.models=[]", "selection.draws=1500")
    errors = []
    for cells in (4_000_000, 0):
        monkeypatch.setattr("offtower.evaluation.behavior.probes.MAX_DENSE_CELLS", cells)
        found = evaluate(place, *options, runs="b", select="pasif", log=place / "served")
        ranking = found.selection["b"].results["pasif"].ranking
        errors.append({score.name: score.mse for score in ranking})
    exact, drawn = errors
    assert set(exact) == set(drawn) and len(exact) > 10
    scale = max(exact.values())
    for name, error in exact.items():
        assert drawn[name] == pytest.approx(error, abs=0.1 * scale)


def test_the_published_network_from_the_configuration(place: Path) -> None:
    network = ("selection.importance_fit=network", "selection.network_steps=5")
    options = (f"selection.logging_run={place / 'runs' / 'a'}", "selection.models=[]", *network)
    found = evaluate(place, *options, runs="b", select="pasif", log=place / "served")
    result = found.selection["b"].results["pasif"]
    assert any("network fit" in note for note in result.notes) and not result.skipped
    with pytest.raises(ConfigError, match="needs the policy that logged"):
        evaluate(place, *network, select="pasif")


def test_a_catalogue_too_large_for_the_network_is_refused(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("offtower.evaluation.behavior.probes.MAX_DENSE_CELLS", 1000)
    run = f"selection.logging_run={place / 'runs' / 'a'}"
    with pytest.raises(ConfigError, match=r"1,000 rows x 15 items.*draw_rows"):
        evaluate(
            place, run, "selection.importance_fit=network", select="pasif", log=place / "served"
        )


def test_a_run_that_did_not_make_the_log_is_found_out(place: Path) -> None:
    run = place / "runs" / "b"
    options = (f"selection.logging_run={run}", "selection.models=[]")
    found = evaluate(place, *options, select="pasif", log=place / "served")
    assert any("did not make this log" in note for note in found.notes)
    assert found.selection["a"].results["pasif"].skipped


def test_evaluation_on_the_training_log_is_noted(place: Path) -> None:
    assert any("optimistic" in note for note in evaluate(place, log=place / "train").notes)
    assert not any("optimistic" in note for note in evaluate(place).notes)


def test_values_that_training_did_not_see_are_counted(place: Path) -> None:
    stored = ParquetLog.open(place / "test")
    table = pa.concat_tables(stored.tables())
    spec = next(spec for spec in stored.schema.context if spec.kind == "category")
    values = table.column(spec.source).to_pylist()
    values[:10] = [10_000 if isinstance(values[0], int) else "never seen"] * 10
    column = pa.array(values, table.schema.field(spec.source).type)
    write_log(
        place / "unseen",
        [table.set_column(table.column_names.index(spec.source), spec.source, column)],
        stored.schema,
    )
    known, found = evaluate(place), evaluate(place, log=place / "unseen")
    assert known.unknown_values == {}
    assert found.unknown_values == {"a": {spec.name: {"rows": 800, "unknown": 10, "missing": 0}}}
    assert any("10 of 800 rows" in note for note in found.notes)


def test_a_changed_catalogue_is_noted_without_a_reward_model(place: Path, tmp_path: Path) -> None:
    assert not any("catalogue changed" in note for note in evaluate(place).notes)
    catalogue = Catalogue.open(place / "catalogue")
    table = catalogue.table(0, catalogue.num_items)
    name = next(spec.source for spec in catalogue.schema.features if spec.kind == "numeric")
    dearer = pc.add(pc.cast(table.column(name), pa.float64()), 100.0)
    table = table.set_column(table.column_names.index(name), name, dearer)
    (place / "catalogue").rename(tmp_path / "kept")
    try:
        write_catalogue(place / "catalogue", table, catalogue.schema)
        notes = evaluate(place, "estimators=[ips,snips]").notes
    finally:
        shutil.rmtree(place / "catalogue")
        (tmp_path / "kept").rename(place / "catalogue")
    assert any("the catalogue changed since a was trained" in note for note in notes)


def test_coverage_and_calibration_are_reported(place: Path) -> None:
    found = evaluate(place)
    assert found.coverage["a"].unlogged == 0.0
    assert found.pscore_calibration is not None and found.pscore_calibration.ok
    assert found.to_dict()["coverage"]["a"]["draws"] == 500 * 20


def test_models_over_pairs_at_draws_agree_with_the_sum_over_the_catalogue(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Boosted trees over a catalogue that is too large to sum: DM at draws, within its noise."""
    option = "selection.models=[trees]"
    exact = evaluate(place, option, select="paired").selection["a"].results["paired"].ranking
    monkeypatch.setattr("offtower.evaluation.evaluator.EXACT_PAIRS", 0)
    drawn = evaluate(place, option, "draws=16", select="paired").selection["a"]
    at_draws = {score.name: score.value for score in drawn.results["paired"].ranking}
    for score in exact:
        if score.name == "DM[trees]":
            assert at_draws[score.name] != score.value
            assert at_draws[score.name] == pytest.approx(score.value, abs=0.02)
        if score.name in ("IPS", "SNIPS"):
            assert at_draws[score.name] == pytest.approx(score.value, rel=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        ("estimators=[ips, snips, dm, dr, {name: dros, shrinkage: slope}]", "interval=bootstrap"),
        ("estimators=[mips]", "clusters=3"),
        ("propensities=estimate", "estimators=[snips]"),
        ("expected_reward=draws", "draws=4"),
        ("select", "selection.models=[linear]", "selection.logging_run=RUN", "selection.draws=110"),
    ],
)
def test_parts_evaluated_elsewhere_give_the_same_bits(
    place: Path, options: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every number of the evaluation, by user and by row, with estimates and selections."""
    monkeypatch.setattr("offtower.evaluation.evaluator.PILOT_ROWS", 300)
    select = "all" if options[0] == "select" else None
    given = [one.replace("RUN", str(place / "runs" / "a")) for one in options if one != "select"]
    found = [
        evaluate(
            place,
            *given,
            "batch_rows=230",
            runs="ab",
            select=select,
            log=place / "served",
            execution=execution,
        ).to_dict()
        for execution in (LOCAL, BACKWARDS)
    ]
    assert found[1] == found[0]


def test_a_pair_model_reads_any_items_alike(place: Path) -> None:
    from offtower.evaluation.scoring.pair_models import (
        fit_pair_estimator,
        pair_model,
        trees_config,
    )
    from offtower.prepare import open_data
    from offtower.progress import Progress
    from offtower.run_directory import RunDirectory

    directory = RunDirectory(place / "runs" / "a")
    data = open_data(directory.load_config(), Progress(), directory.path)
    model = pair_model(fit_pair_estimator(trees_config(True), data, 0, 500), data)
    rows = next(iter(scan(data.train, data.catalogue, data.context_encoding, 40)))
    every = model.over_catalogue(rows).values.numpy()
    assert every.shape == (40, ITEMS) and every.min() >= 0 and every.max() <= 1
    logged = model.at(rows, rows.action[:, None])[:, 0]
    np.testing.assert_allclose(logged, every[np.arange(40), rows.action], rtol=1e-6)
    item = np.random.default_rng(0).integers(0, ITEMS, (40, 3))
    np.testing.assert_allclose(
        model.at(rows, item), np.take_along_axis(every, item, axis=1), rtol=1e-6
    )


@pytest.mark.parametrize("swapped", ["policy", "config.yaml", "manifest.json"])
def test_parts_of_two_runs_are_refused(place: Path, tmp_path: Path, swapped: str) -> None:
    """Each file is intact; together they are no run."""
    shutil.copytree(place / "runs" / "a", tmp_path / "a")
    source, target = place / "runs" / "b" / swapped, tmp_path / "a" / swapped
    if source.is_dir():
        shutil.rmtree(target)
        shutil.copytree(source, target)
    else:
        shutil.copyfile(source, target)
    with pytest.raises(OfftowerError, match="different runs"):
        open_run(tmp_path / "a", Catalogue.open(place / "catalogue"))
    with pytest.raises(OfftowerError, match="different runs"):
        export_run(tmp_path / "a")


def test_the_report_repeats_the_advice_of_a_training() -> None:
    manifests: list[dict[str, Any]] = [{"advice": "keep the logging policy"}, {"advice": None}, {}]
    runs: Any = [
        SimpleNamespace(
            name=f"run{k}", directory=SimpleNamespace(manifest=lambda k=k: manifests[k])
        )
        for k in range(3)
    ]
    assert advice_notes(runs) == ["run0, by its training log: keep the logging policy"]
