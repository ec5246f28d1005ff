"""Policies are evaluated as they are served: evaluate, --also, tune serving."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from typer.testing import CliRunner

from offtower.cli import app
from offtower.config import ServingConfig, parse_config
from offtower.data import write_catalogue, write_log
from offtower.data.catalogue import Catalogue
from offtower.data.encoding import to_tensors
from offtower.data.log import ParquetLog
from offtower.data.reader import scan
from offtower.data.simulate import SimulatedWorld, WorldSettings
from offtower.errors import ConfigError, OfftowerError, RunError
from offtower.evaluation.frontier import (
    FrontierBounds,
    FrontierPoint,
    recommend,
    serving_frontier,
    write_serving,
)
from offtower.evaluation.report import write_report
from offtower.evaluation.run import LogEvaluation, evaluate_runs
from offtower.evaluation.run_loading import open_run
from offtower.evaluation.scoring.policy import PolicyScorer
from offtower.models.policy import TwoTowerPolicy
from offtower.run_directory import RunDirectory
from offtower.training.run import train_run
from tests.mappers import BACKWARDS

ITEMS, ROWS = 8, 600
SERVING = {"temperature": 2.0, "uniform": 0.2}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that is served with SERVING, and the log that this policy made, by enumeration."""
    folder = tmp_path_factory.mktemp("served")
    world = SimulatedWorld(ITEMS, WorldSettings(4, 4, 4, intercept=0.0), seed=1)
    write_catalogue(folder / "catalogue", world.catalogue_table(), world.catalogue_schema)
    for seed, (name, rows) in enumerate({"train": 1500, "validation": 700}.items()):
        write_log(folder / name, world.log(rows, seed=seed), world.log_schema)
    content = {
        "name": "a",
        "runs": str(folder / "runs"),
        "data": {key: str(folder / key) for key in ("train", "validation", "catalogue")},
        "policy": {"embedding_dim": 4, "temperature": 0.5},
        "reward_model": {"kind": "factored", "embedding_dim": 4, "folds": 2, "epochs": 2},
        "objective": {"name": "dr"},
        "serving": SERVING,
        "training": {"epochs": 2, "batch_size": 64, "threads": 1},
    }
    config = parse_config(content)
    train_run(config)
    with torch.no_grad():
        write_log(folder / "log", served_log(world, folder), world.log_schema)
    return folder


def served_log(world: SimulatedWorld, folder: Path) -> Iterator[pa.Table]:
    """The log of (1 - .2) softmax(s / 2) + .2 / 8, drawn and written by enumeration in float64."""
    catalogue = Catalogue.open(folder / "catalogue")
    run = open_run(folder / "runs" / "a", catalogue)
    policy: TwoTowerPolicy = run.policy
    items = policy.embed_items(run.items).embedding.double()
    write_log(folder / "raw", world.log(ROWS, seed=9), world.log_schema)
    log = ParquetLog.open(folder / "raw")
    table, rng = pa.concat_tables(log.tables()), np.random.default_rng(5)
    (batch,) = scan(log, catalogue, policy.context_encoding, ROWS)
    context = policy.embed_contexts(to_tensors(batch.context)).double()
    p = 0.8 * torch.softmax(context @ items.T / 0.5 / 2.0, 1).numpy() + 0.2 / ITEMS
    action = np.array([rng.choice(ITEMS, p=row / row.sum()) for row in p])
    reward = (rng.random(ROWS) < world.expected_reward(table, action)).astype(np.float32)
    for name, values in (
        ("action", world.item_ids.take(pa.array(action))),
        ("pscore", pa.array(p[np.arange(ROWS), action])),
        ("reward", pa.array(reward)),
    ):
        table = table.set_column(table.schema.get_field_index(name), name, values)
    yield table


def evaluate(place: Path, **more: object) -> LogEvaluation:
    return evaluate_runs([place / "runs" / "a"], log=place / "log", **more)  # type: ignore[arg-type]


def test_the_served_policy_is_evaluated(place: Path) -> None:
    found = evaluate(place, also=["temperature=1,uniform=0", "greedy", "top=2"])
    names = ["a", "a temperature=1,uniform=0", "a greedy", "a top=2"]
    assert list(found.result.policies) == names
    served = found.result.policies["a"]
    # The log is its own: every weight is 1, and IPS is the logged mean.
    assert served.weights.effective_sample_size == pytest.approx(ROWS, rel=1e-6)
    assert served.weights.max == pytest.approx(1.0, abs=1e-5)
    logged = found.result.logging.estimate.value
    assert served.estimates["ips"].estimate.value == pytest.approx(logged, abs=1e-6)
    others = [found.result.policies[name].weights for name in names[1:]]
    assert all(one.effective_sample_size < 0.95 * ROWS for one in others)
    greedy = found.result.policies["a greedy"]
    assert greedy.weights.zero_share > 0.2
    # No mean weight differs from 1 by 4 standard errors (6e-5 each): all are distributions.
    assert all(abs(one.mean_z or 0.0) < 4.0 for one in others)
    assert found.serving["a"] == {
        "k": 1,
        "mode": "sample",
        "top": None,
        "new_items": None,
        **SERVING,
    }
    assert found.also == tuple(names[1:])
    assert any("always shows its best item" in note for note in found.notes)
    assert any("temperature=2.0, uniform=0.2" in note for note in found.notes)
    assert found.exit_code == served.verdict.exit_code == found.to_dict()["exit_code"]
    perplexity = [found.coverage[name].perplexity for name in names]
    assert perplexity[2] == 1.0 and 1.0 < perplexity[3] < perplexity[0] <= ITEMS


def test_policies_of_a_run_share_its_passes(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from offtower.serving import mixture, policy

    calls: list[float] = []
    real = policy.policy_terms

    def counted(*arguments: object, temperature: float = 1.0, **more: object) -> object:
        calls.append(temperature)
        return real(*arguments, temperature=temperature, **more)  # type: ignore[arg-type]

    embedded: list[object] = []
    embed = TwoTowerPolicy.embed_items
    monkeypatch.setattr(
        TwoTowerPolicy,
        "embed_items",
        lambda self, *a, **k: embedded.append(0) or embed(self, *a, **k),
    )
    alone = evaluate(place)
    passes = len(embedded)
    for module in (mixture, policy):
        monkeypatch.setattr(module, "policy_terms", counted)
    found = evaluate(place, also=["uniform=0", "uniform=0.5", "temperature=1"])
    # One embedding of the catalogue, as without --also.
    assert len(embedded) == 2 * passes
    # One pass for each temperature and one for the uniform policy. Three policies with a uniform
    # share are drawn from for the coverage, and draws come with their normalizers.
    assert calls == [1.0, 1.0, 0.5]
    same = alone.result.policies["a"].estimates, found.result.policies["a"].estimates
    for name, one in same[0].items():
        assert one.estimate == same[1][name].estimate


def test_a_policy_without_overlap_is_left_out(place: Path, tmp_path: Path) -> None:
    """Rows that show the best item of the policy are removed: the log says nothing about it."""
    log = ParquetLog.open(place / "log")
    run = open_run(place / "runs" / "a", Catalogue.open(place / "catalogue"))
    scorer = PolicyScorer(run.policy, run.items, serving=ServingConfig(mode="top_k"))
    catalogue = Catalogue.open(place / "catalogue")
    (batch,) = scan(log, catalogue, run.policy.context_encoding, ROWS)
    other = scorer.score(batch).importance_weight == 0.0
    table = pa.concat_tables(log.tables()).filter(pa.array(other))
    write_log(tmp_path / "log", [table], log.schema)
    paths = [place / "runs" / "a"]
    found = evaluate_runs(paths, log=tmp_path / "log", also=["greedy"], select="slope")
    assert list(found.result.policies) == ["a"] and found.result.unsupported == ("a greedy",)
    assert any("a greedy is left out: no row" in note for note in found.notes)
    assert list(found.selection) == ["a"]
    write_report(tmp_path / "report.html", [found], title="t", command="c")
    # A run that is served so has no evaluation at all.
    shutil.copytree(place / "runs" / "a", tmp_path / "a")
    write_serving(tmp_path / "a", ServingConfig(mode="top_k"))
    with pytest.raises(OfftowerError, match="no action that the target policy takes"):
        evaluate_runs([tmp_path / "a"], log=tmp_path / "log")


def test_workers_give_the_same_numbers(place: Path) -> None:
    also = ["uniform=0", "greedy"]
    alone = evaluate(place, also=also)
    spread = evaluate(place, also=also, execution=BACKWARDS)
    assert alone.result.to_dict() == spread.result.to_dict()
    run = open_run(place / "runs" / "a", Catalogue.open(place / "catalogue"))
    scorer = PolicyScorer(run.policy, run.items)
    one, two = pickle.loads(pickle.dumps((scorer, scorer.served_as(ServingConfig(uniform=0.5)))))
    assert one.items is two.items and one._batches is two._batches


@pytest.mark.parametrize("wrong", ["uniform=0.2", "soft", "temperature=-1", "mode=top_k"])
def test_wrong_ways_to_serve_are_refused(place: Path, wrong: str) -> None:
    with pytest.raises(ConfigError, match=r"serving|already"):
        evaluate(place, also=[wrong])


def test_validation_keeps_the_served_policy(place: Path) -> None:
    lines = (place / "runs" / "a" / "metrics.jsonl").read_text().splitlines()
    epochs = [json.loads(line) for line in lines]
    last = [line for line in epochs if line["kind"] == "epoch"][-1]["validation"]
    kept = RunDirectory(place / "runs" / "a").manifest()["selected_step"]
    assert kept > 0
    found = evaluate_runs([place / "runs" / "a"], log=place / "validation", also=["uniform=0"])
    sizes = [one.weights.effective_sample_size for one in found.result.policies.values()]
    every = [line["validation"]["effective_sample_size"] for line in epochs if "validation" in line]
    # The kept epoch's validation is the evaluation of the served policy, not of another.
    assert min(abs(size / sizes[0] - 1.0) for size in every) < 1e-5
    assert min(abs(size / sizes[1] - 1.0) for size in every) > 1e-3
    assert last["estimator"] == "snips"


def test_a_resumed_run_keeps_its_serving(place: Path) -> None:
    config = RunDirectory(place / "runs" / "a").load_config()
    with pytest.raises(RunError, match=r"serving\.uniform \(0\.2 -> 0\.0\)"):
        train_run(replace(config, serving=ServingConfig(temperature=2.0)), resume=True)


def point(value: float, size: float, perplexity: float, **serving: float) -> FrontierPoint:
    return FrontierPoint(
        serving=ServingConfig(**serving),  # type: ignore[arg-type]
        value=value,
        low=value - 1.0 / size**0.5,
        high=value + 1.0 / size**0.5,
        effective_sample_size=size,
        pareto_k=None,
        perplexity=perplexity,
        obstacle=None if size >= 100.0 else "the effective sample size is small",
    )


def test_recommendation() -> None:
    sharp = point(0.50, 10.0, 1.5, temperature=0.1)
    good = point(0.40, 400.0, 5.0, temperature=0.5)
    near = point(0.39, 900.0, 8.0, temperature=1.0)
    flat = point(0.30, 2500.0, 40.0, temperature=4.0)
    every = (sharp, good, near, flat)
    size = FrontierBounds(100.0)
    # Lower bounds: .184, .350, .357, .280; the first is not reliable.
    assert recommend(every, size)[0] is near
    assert recommend(every, FrontierBounds(100.0, 0.0))[0] is near
    assert recommend(every, FrontierBounds(100.0, 0.3))[0] is flat
    none, reason = recommend((sharp,), size)
    assert (
        none is None
        and "no reliable estimate of any setting" in reason
        and "temperature=0.1" in reason
    )
    for wrong in ({"max_loss": 1.0}, {"min_effective_sample_size": 0.0}):
        with pytest.raises(ConfigError):
            FrontierBounds(**wrong)


def test_tune_serving_writes_the_recommendation(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "runs" / "a", tmp_path / "a")
    arguments = ["tune", "serving", str(tmp_path / "a"), "--log", str(place / "log")]
    grid = ["--temperature", "1", "--temperature", "2", "--uniform", "0", "--uniform", "0.2"]
    runner = CliRunner()
    before = (tmp_path / "a" / "config.yaml").read_bytes()
    done = runner.invoke(app, [*arguments, *grid, "--dry-run", "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert (tmp_path / "a" / "config.yaml").read_bytes() == before and not found["written"]
    settings = [(p["serving"]["temperature"], p["serving"]["uniform"]) for p in found["points"]]
    assert settings == [(2.0, 0.2), (1.0, 0.0), (1.0, 0.2), (2.0, 0.0)]
    done = runner.invoke(app, [*arguments, *grid])
    assert done.exit_code == 0, done.output
    best = found["recommended"]["serving"]
    run = RunDirectory(tmp_path / "a")
    assert run.load_config().serving == ServingConfig(**best)
    page = (tmp_path / "a" / "serving.html").read_text()
    assert "recommended" in page and "<svg" in page
    # The run is still whole: it can be evaluated, and is evaluated as it is served now.
    again = evaluate_runs([tmp_path / "a"], log=place / "log")
    assert again.serving["a"] == best


def test_tune_serving_says_when_no_estimate_is_reliable(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "runs" / "a", tmp_path / "a")
    arguments = ["tune", "serving", str(tmp_path / "a"), "--log", str(place / "log")]
    done = CliRunner().invoke(app, [*arguments, "--temperature", "0.01", "--keep-ess", "1000"])
    assert done.exit_code == 3
    assert "no reliable estimate of any setting" in done.output.replace("\n", " ")
    assert RunDirectory(tmp_path / "a").load_config().serving == ServingConfig(**SERVING)
    with pytest.raises(ConfigError, match="at most 200"):
        serving_frontier(tmp_path / "a", log=place / "log", temperatures=np.arange(1, 300).tolist())


def test_an_edited_configuration_stays_without_checksum(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "runs" / "a", tmp_path / "a")
    path = tmp_path / "a" / "config.yaml"
    path.write_text("\n".join(x for x in path.read_text().splitlines() if not x.startswith("#")))
    write_serving(tmp_path / "a", ServingConfig(uniform=0.3))
    assert RunDirectory(tmp_path / "a").load_config().serving == ServingConfig(uniform=0.3)
    assert "checksum" not in path.read_text() and not path.read_text().startswith("#")
