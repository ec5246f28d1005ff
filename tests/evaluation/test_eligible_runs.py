"""Whole runs over eligible items, evaluated on a log that one of them served."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from offtower.config import parse_config
from offtower.data.catalogue import Catalogue, write_catalogue
from offtower.data.encoding import to_tensors
from offtower.data.log import write_log
from offtower.data.rows import encode_rows
from offtower.evaluation.run import LogEvaluation, evaluate_runs
from offtower.evaluation.run_loading import open_run
from offtower.evaluation.scoring.policy import PolicyScorer
from offtower.execution import LOCAL
from offtower.training.run import train_run
from tests.mappers import BACKWARDS
from tests.training.eligible_data import N, items, log, schemas

FORMS = ("attribute", "exclude")
ROWS = 700


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs `ips` and `dr`, and a log `served` that the first one made."""
    folder = tmp_path_factory.mktemp("eligible_runs")
    log_schema, catalogue_schema = schemas(*FORMS)
    table, _ = log(ROWS, FORMS, seed=5)
    write_log(folder / "train", [table], log_schema, rows_per_group=300)
    write_catalogue(folder / "catalogue", items(), catalogue_schema)
    for name in ("ips", "dr"):
        train_run(
            parse_config(
                {
                    "name": name,
                    "runs": str(folder),
                    "data": {
                        "train": str(folder / "train"),
                        "validation": str(folder / "train"),
                        "catalogue": str(folder / "catalogue"),
                    },
                    "policy": {"embedding_dim": 4, "temperature": 0.7},
                    "reward_model": {"kind": "factored", "embedding_dim": 4, "epochs": 1},
                    "objective": {"name": name},
                    "training": {"epochs": 1, "batch_size": 128, "threads": 1},
                    "evaluation": {"batch_rows": 256, "selection": {"models": ["linear"]}},
                },
                source="test",
            )
        )
    write_log(folder / "served", [_served(folder, table)], log_schema, rows_per_group=300)
    return folder


def _served(folder: Path, table: pa.Table) -> pa.Table:
    """Draws of the run `ips` from the eligible items of each row, by enumeration."""
    catalogue = Catalogue.open(folder / "catalogue")
    run = open_run(folder / "ips", catalogue)
    rows = encode_rows(table, schemas(*FORMS)[0], catalogue, run.policy.context_encoding, 0)
    sets = log(ROWS, FORMS, seed=5)[1]
    scorer = PolicyScorer(run.policy, run.items)
    with torch.no_grad():
        u = run.policy.embed_contexts(to_tensors(rows.context)).double()
        score = u @ scorer.items.embedding.double().T / run.policy.temperature
    p = torch.softmax(score.masked_fill(~torch.from_numpy(sets), -torch.inf), dim=1).numpy()
    rng = np.random.default_rng(6)
    action = np.array([rng.choice(N, p=row / row.sum()) for row in p])
    reward = (rng.random(len(action)) < 0.2 + 0.6 * (action % 3 == 0)).astype(np.float32)
    for name, values in {
        "action": action,
        "reward": reward,
        "pscore": p[np.arange(len(action)), action],
    }.items():
        table = table.set_column(table.column_names.index(name), name, pa.array(values))
    return table


def evaluated(place: Path, *, backwards: bool = False) -> LogEvaluation:
    return evaluate_runs(
        [place / "ips", place / "dr"],
        log=place / "served",
        overrides=[f"evaluation.selection.logging_run={place / 'ips'}"],
        select="pasif",
        execution=BACKWARDS if backwards else LOCAL,
    )


@pytest.fixture(scope="module")
def found(place: Path) -> LogEvaluation:
    return evaluated(place)


def test_the_policy_that_served_a_log_has_weight_one(found: LogEvaluation) -> None:
    own, other = (found.result.policies[name] for name in ("ips", "dr"))
    assert own.weights.mean == pytest.approx(1.0, abs=1e-5)
    assert own.weights.max == pytest.approx(1.0, abs=1e-4)
    # The weights of another policy average to 1 within 4 standard errors (6e-5).
    assert abs(other.weights.mean - 1.0) < 4.0 * other.weights.mean_std_error
    assert not any("did not make this log" in note for note in found.notes)
    for policy in (own, other):
        assert policy.support is not None and policy.support.missing == 0.0
    assert set(found.selection) == {"ips", "dr"}
    assert found.pscore_calibration is None  # Its groups of items do not have a mass of 1 here.


def test_parts_on_other_machines_give_the_same_bits(place: Path, found: LogEvaluation) -> None:
    there = evaluated(place, backwards=True)
    for name in ("ips", "dr"):
        one, other = (result.result.policies[name] for result in (found, there))
        assert one.weights == other.weights and one.estimates == other.estimates


def test_a_log_without_the_section_is_noted(place: Path, found: LogEvaluation) -> None:
    """Without the section the policy's probabilities are over all items: weights are too small."""
    plain = replace(schemas(*FORMS)[0], eligible=None)
    table = pq.read_table(place / "served").select(list(plain.columns))
    write_log(place / "plain", [table], plain)
    bare = evaluate_runs([place / "ips"], log=place / "plain")
    assert bare.result.policies["ips"].weights.mean < 0.8
    said = "ips was trained with a section 'eligible', and the schema of this log has none"
    assert any(note.startswith(said) for note in bare.notes)
    assert not any("section 'eligible'" in note for note in found.notes)


def test_estimated_propensities_keep_to_eligible_items(place: Path) -> None:
    found = evaluate_runs(
        [place / "ips"], log=place / "train", overrides=["evaluation.propensities=estimate"]
    )
    # The log is uniform over eligible items, so the estimate has hardly anything to learn.
    note = next(one for one in found.notes if "THE PROPENSITIES ARE ESTIMATES" in one)
    assert "the number of items" in note
    weight = found.result.policies["ips"].weights
    assert weight.mean == pytest.approx(1.0, abs=0.15)
