"""Policies given by columns or by embeddings, against the run that they were taken from."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from typer.testing import CliRunner

from offtower.cli import app
from offtower.data import write_catalogue, write_log
from offtower.data.catalogue import Catalogue
from offtower.data.encoding import to_tensors
from offtower.data.ledger import FOLDER
from offtower.data.log import ParquetLog
from offtower.data.reader import scan
from offtower.data.simulate import SimulatedWorld, SlateSettings
from offtower.errors import ConfigError, DataError
from offtower.evaluation.external import evaluate_columns, evaluate_embeddings, parse_columns
from offtower.evaluation.run_loading import open_run
from offtower.evaluation.scoring.external import PolicyColumns
from offtower.evaluation.scoring.policy import PolicyScorer
from tests.evaluation.test_runs import ITEMS, evaluate, place

__all__ = ["place"]


@pytest.fixture(scope="module")
def other(place: Path) -> Path:
    """The test log with the probabilities of run `a` in a column, and its embeddings in files."""
    catalogue = Catalogue.open(place / "catalogue")
    run = open_run(place / "runs" / "a", catalogue)
    scorer = PolicyScorer(run.policy, run.items)
    log = ParquetLog.open(place / "test")
    rows = list(scan(log, catalogue, run.policy.context_encoding, 4096))
    assert len(rows) == 1
    assert rows[0].pscore is not None
    weight = scorer.score(rows[0]).importance_weight
    table = log.read_row_group(0)
    for name, values in (("p_new", weight * rows[0].pscore), ("q", np.full(len(weight), 0.25))):
        table = table.append_column(name, pa.array(values))
    schema = replace(log.schema, keep=("p_new", "q"))
    write_log(place / "with_columns", [table], schema)
    with torch.no_grad():
        u = run.policy.embed_contexts(to_tensors(rows[0].context)) / run.policy.temperature
    item = scorer.items.embedding
    bias = torch.zeros(ITEMS) if scorer.items.bias is None else scorer.items.bias
    np.save(place / "contexts.npy", torch.cat([u, torch.ones(len(u), 1)], 1).numpy())
    np.save(place / "items.npy", torch.cat([item, bias[:, None]], 1).numpy())
    return place


def test_a_column_of_probabilities_is_evaluated_like_the_run(other: Path) -> None:
    ours = evaluate(other).result.policies["a"]
    found = evaluate_columns(
        other / "with_columns", other / "catalogue", [PolicyColumns("p_new", "q", "q")]
    )
    theirs = found.result.policies["p_new"]
    for name in ("ips", "snips"):
        assert theirs.estimates[name].estimate.value == pytest.approx(
            ours.estimates[name].estimate.value, rel=1e-5
        )
        assert theirs.estimates[name].estimate.std_error == pytest.approx(
            ours.estimates[name].estimate.std_error, rel=1e-4
        )
    # The model predicts .25 everywhere: DR is .25 + mean w (r - .25).
    weighted = theirs.estimates["ips"].estimate.value - 0.25 * theirs.weights.mean
    assert theirs.estimates["dr"].estimate.value == pytest.approx(0.25 + weighted, rel=1e-6)
    assert theirs.estimates["dm"].estimate.value == pytest.approx(0.25, rel=1e-6)
    assert set(found.baseline_values) == {"uniform"} and not found.coverage


def test_embeddings_are_evaluated_like_the_run(other: Path) -> None:
    ours = evaluate(other, also=("temperature=2",)).result.policies
    found = evaluate_embeddings(
        other / "test",
        other / "catalogue",
        other / "contexts.npy",
        other / "items.npy",
        also=("temperature=2",),
        select="paired",
    )
    for theirs, own in (("contexts", "a"), ("contexts temperature=2", "a temperature=2")):
        for name in ("ips", "snips"):
            assert found.result.policies[theirs].estimates[name].estimate.value == pytest.approx(
                ours[own].estimates[name].estimate.value, rel=1e-4
            )
    assert set(found.coverage) == set(found.selection) == set(found.result.policies)
    assert not any("reward model" in note for note in found.notes)
    with pytest.raises(ConfigError, match="PROBABILITY,Q,EXPECTED"):
        evaluate_columns(
            other / "with_columns",
            other / "catalogue",
            [PolicyColumns("p_new")],
            overrides=["evaluation.estimators=[dr]"],
        )


def test_columns_and_embeddings_are_looks_at_the_log(other: Path, tmp_path: Path) -> None:
    catalogue, log = other / "catalogue", tmp_path / "log"
    shutil.copytree(other / "with_columns", log, ignore=shutil.ignore_patterns(FOLDER))
    towers = other / "contexts.npy", other / "items.npy"
    found = [
        evaluate_columns(log, catalogue, [PolicyColumns("p_new")]),
        evaluate_columns(log, catalogue, [PolicyColumns("p_new"), PolicyColumns("q")]),
        evaluate_embeddings(log, catalogue, *towers, also=["temperature=2"]),
        evaluate_columns(log, catalogue, [PolicyColumns("q")]),
        evaluate_columns(log, catalogue, [PolicyColumns("q")], fresh="another question"),
    ]
    looks = [one.result.looks for one in found]
    assert [one and (one.look, one.policies, one.repeated) for one in looks] == [
        (1, 1, False),
        (2, 2, False),
        (3, 4, False),
        (2, 4, True),
        (1, 1, False),
    ]


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((799, 5), "contexts.npy' has 799 embeddings, and there are 800 rows of the log"),
        ((800, 4), "embeddings of 4 numbers and '.*items.npy' of 5"),
        ((800,), "two-dimensional array of floats"),
    ],
)
def test_embeddings_that_do_not_fit_are_refused(
    other: Path, tmp_path: Path, shape: tuple[int, ...], words: str
) -> None:
    np.save(tmp_path / "contexts.npy", np.zeros(shape, dtype=np.float32))
    with pytest.raises(DataError, match=words):
        evaluate_embeddings(
            other / "test", other / "catalogue", tmp_path / "contexts.npy", other / "items.npy"
        )


def test_embeddings_that_are_not_finite_are_refused(other: Path, tmp_path: Path) -> None:
    context = np.load(other / "contexts.npy")
    context[321, 2] = np.nan
    np.save(tmp_path / "contexts.npy", context)
    with pytest.raises(DataError, match="not finite in row 321"):
        evaluate_embeddings(
            other / "test", other / "catalogue", tmp_path / "contexts.npy", other / "items.npy"
        )


def test_a_file_of_objects_is_not_run(other: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "contexts.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match="cannot be read as a NumPy array"):
        evaluate_embeddings(
            other / "test", other / "catalogue", tmp_path / "contexts.npy", other / "items.npy"
        )


def test_a_number_that_is_no_probability_names_its_row(other: Path) -> None:
    log = ParquetLog.open(other / "with_columns")
    table = log.read_row_group(0)
    wrong = table.column("p_new").to_numpy().copy()
    wrong[17] = 1.5
    index = table.column_names.index("p_new")
    write_log(other / "wrong", [table.set_column(index, "p_new", pa.array(wrong))], log.schema)
    with pytest.raises(DataError, match=r"'p_new' has 1\.5 in row 17 of the log, which is no prob"):
        evaluate_columns(other / "wrong", other / "catalogue", [PolicyColumns("p_new")])


def test_a_column_that_the_log_lacks_names_the_schema_key(other: Path) -> None:
    with pytest.raises(DataError, match="no column 'p_new': name it under 'keep'"):
        evaluate_columns(other / "test", other / "catalogue", [PolicyColumns("p_new")])
    with pytest.raises(ConfigError, match="each once"):
        evaluate_columns(other / "test", other / "catalogue", [])


def test_the_option_reads_one_or_three_columns() -> None:
    assert parse_columns("p") == PolicyColumns("p")
    assert parse_columns("p, q ,e") == PolicyColumns("p", "q", "e")
    with pytest.raises(ConfigError, match="PROBABILITY,Q,EXPECTED"):
        parse_columns("p,q")


def test_the_verb_writes_a_report_and_refuses_mixtures(other: Path) -> None:
    where = ["--log", str(other / "with_columns"), "--catalogue", str(other / "catalogue")]
    page = other / "others.html"
    done = CliRunner().invoke(
        app,
        ["evaluate", "--policy-column", "p_new", *where, "--report", str(page), "--exit-zero"],
    )
    assert done.exit_code == 0, done.output
    assert "Should p_new replace what is served today?" in page.read_text(encoding="utf-8")
    for arguments in (
        ["evaluate"],
        ["evaluate", str(other / "runs" / "a"), "--policy-column", "p_new"],
        ["evaluate", "--policy-column", "p_new"],
    ):
        refused = CliRunner().invoke(app, arguments)
        assert refused.exit_code == 2, refused.output


def test_a_column_of_a_log_of_slates_differs_within_a_round(tmp_path: Path) -> None:
    """It is that of each item given the items above it, as the log's own propensities are."""
    world = SimulatedWorld(30, seed=2, slate=SlateSettings(3))
    table = pa.concat_tables(list(world.log(240, seed=1)))
    pscore = table["pscore"].to_numpy()
    reward = table["reward"].to_numpy().reshape(-1, 3)
    halved = np.where(table["position"].to_numpy() == 1, 0.5, 1.0) * pscore
    for name, values in (("same", pscore), ("halved", halved), ("q", 0.1 + 0 * pscore)):
        table = table.append_column(name, pa.array(values))
    schema = replace(world.log_schema, keep=("same", "halved", "q"))
    write_log(tmp_path / "log", [table], schema)
    write_catalogue(tmp_path / "items", world.catalogue_table(), world.catalogue_schema)
    columns = [PolicyColumns(name, "q", "q") for name in ("same", "halved")]
    found = evaluate_columns(tmp_path / "log", tmp_path / "items", columns).result
    same, half = found.policies["same"], found.policies["halved"]
    for name in ("ips", "snips", "dr"):
        value = same.estimates[name].estimate.value
        assert value == pytest.approx(reward.sum(axis=1).mean(), rel=1e-6)
    assert [one.mean for one in half.positions] == pytest.approx([1.0, 0.5, 0.5], rel=1e-6)
    weighted = (reward * [1.0, 0.5, 0.5]).sum(axis=1).mean()
    assert half.estimates["ips"].estimate.value == pytest.approx(weighted, rel=1e-6)
