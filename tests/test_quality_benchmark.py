"""Tests of the quality benchmark: exact values, baselines, resumption, summary."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import sparse

from offtower.benchmarks import Settings
from offtower.benchmarks.quality import suite
from offtower.benchmarks.quality.bilinear import BilinearWorld, bilinear
from offtower.benchmarks.quality.degenerate import WORLDS, degenerate
from offtower.benchmarks.quality.labels import LabelSet, as_feedback, load_label_set
from offtower.benchmarks.quality.methods import METHODS, MethodResult, NotApplicable
from offtower.benchmarks.quality.revealed import revealed
from offtower.benchmarks.quality.settings import load_settings
from offtower.benchmarks.quality.summary import safety, summarize
from offtower.benchmarks.quality.topics import topical
from offtower.benchmarks.quality.world import Value, value_of_scores
from offtower.data.simulate.features import vector_matrix
from offtower.errors import ConfigError, DataError


def test_value_of_scores_matches_enumeration() -> None:
    logit = torch.tensor([[0.0, np.log(3.0)], [np.log(4.0), 0.0]], dtype=torch.float64)
    expected = torch.tensor([[0.2, 0.6], [0.5, 1.0]], dtype=torch.float64)
    found = value_of_scores(logit, expected)
    assert found.softmax == pytest.approx((0.25 * 0.2 + 0.75 * 0.6 + 0.8 * 0.5 + 0.2 * 1.0) / 2)
    assert found.greedy == pytest.approx((0.6 + 0.5) / 2)


def test_actions_are_drawn_with_the_logged_propensities() -> None:
    """In 40,000 rounds each action's count is within 5 standard errors of its expectation."""
    world = BilinearWorld(6, 2.0, seed=1)
    log = world.sample(40_000, seed=2)
    pi = world.logging(world.expected(log["context"]))
    np.testing.assert_allclose(log["pscore"], pi[np.arange(40_000), log["action"]])
    spread = np.sqrt((pi * (1 - pi)).sum(0))
    assert (np.abs(np.bincount(log["action"], minlength=6) - pi.sum(0)) < 5 * spread).all()


def test_baselines_are_ordered_and_the_log_has_no_expected_rewards() -> None:
    world = bilinear(5, 1.0, 200, seed=0)
    marks = world.baselines
    assert 0 < marks["logging"] < marks["optimum"] and marks["best_fixed"] < marks["optimum"]
    assert set(world.log.table.column_names) == {"context", "action", "reward", "pscore"}


def label_set() -> LabelSet:
    rng = np.random.default_rng(0)
    x = (rng.random((120, 30)) < 0.2).astype(np.float32)
    y = (x[:, :4] > 0).astype(np.float32)
    parts = [sparse.csr_matrix(part) for part in (x[:80], y[:80], x[80:], y[80:])]
    return LabelSet("toy", *parts)


def test_label_feedback_has_label_rewards_and_exact_baselines() -> None:
    labels = label_set()
    world = as_feedback(labels, 500, seed=0, fraction=0.5)
    reward = world.log.table["reward"].to_numpy()
    tokens = world.log.table["tokens"].to_pylist()
    for row in range(0, 500, 25):
        # Label k applies exactly where token k occurs.
        assert reward[row] == float(world.log.table["action"][row].as_py() in tokens[row])
    test = labels.test_labels.toarray()
    assert world.baselines["best_fixed"] == pytest.approx(float(test.mean(0).max()))
    assert world.baselines["optimum"] == pytest.approx(float(test.max(1).mean()))
    assert world.baselines["supervised"] > 0.8 * world.baselines["optimum"]
    torch.testing.assert_close(world.truth.expected(3, 5).numpy(), test[3:5].astype(np.float64))


def test_revealed_matches_pairs_counted_by_hand() -> None:
    labels = label_set()
    world = as_feedback(labels, 2000, seed=0, fraction=0.5)
    found = revealed(world)
    # Rounds of each (tokens, label) pair.
    table = world.log.table
    tokens = [tuple(sorted(row)) for row in table["tokens"].to_pylist()]
    shown: dict[tuple[tuple[int, ...], int], list[tuple[float, float]]] = {}
    for row, action, reward, pscore in zip(
        tokens, *(table[name].to_pylist() for name in ("action", "reward", "pscore")), strict=True
    ):
        shown.setdefault((row, action), []).append((reward, pscore))
    assert len(shown) == found.known.sum() and len(set(tokens)) == len(found.label)
    for context in range(len(found.label)):
        row = tuple(found.features[context].indices.tolist())
        for action in range(4):
            seen = shown.get((row, action))
            assert found.known[context, action] == (seen is not None)
            if seen is None:
                assert found.label[context, action] == 0.0 and found.chance[context, action] == 1.0
                continue
            assert found.label[context, action] == seen[0][0]
            chance = 1.0 - (1.0 - seen[0][1]) ** tokens.count(row)
            assert found.chance[context, action] == pytest.approx(chance)


def test_revealed_labels_reach_the_supervised_baseline_when_all_pairs_are_shown() -> None:
    """Thousands of uniform rounds show every pair, and the penalty is the best of several."""
    world = as_feedback(label_set(), 5000, seed=0, fraction=0.5, epsilon=1.0)
    assert revealed(world).known.mean() > 0.99
    best = METHODS["revealed_labels"](world, 0)
    assert best.value.greedy >= world.baselines["supervised"]
    assert best.value.softmax == pytest.approx(best.value.greedy, abs=1e-6)
    with pytest.raises(NotApplicable, match="no labels"):
        METHODS["revealed_labels"](bilinear(3, 1.0, 60, seed=0), 0)


def test_load_label_set_reads_saved_files(tmp_path: Path) -> None:
    labels = label_set()
    for part, x, y in (
        ("train", labels.train_features, labels.train_labels),
        ("test", labels.test_features, labels.test_labels),
    ):
        arrays = {}
        for side, matrix in (("X", x), ("Y", y)):
            for name in ("data", "indices", "indptr", "shape"):
                arrays[f"{side}_{name}"] = np.asarray(getattr(matrix, name))
        np.savez(tmp_path / f"toy-{part}.npz", **arrays)
    found = load_label_set(str(tmp_path / "toy"))
    assert (found.test_labels != labels.test_labels).nnz == 0
    with pytest.raises(DataError, match="no label set at"):
        load_label_set(str(tmp_path / "other"))


CONFIG = """
name: tiny
seeds: 2
worlds: [{kind: bilinear, actions: [3, 4], beta: 1, rounds: 60}]
methods: [good, bad]
"""


def test_interrupted_table_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def method(name: str, value: float):  # type: ignore[no-untyped-def]
        def learn(world: object, seed: int) -> MethodResult:
            calls.append(name)
            return MethodResult(Value(value + 0.01 * seed, value), 0.1)

        return learn

    monkeypatch.setattr(suite, "METHODS", {"good": method("good", 0.8), "bad": method("bad", 0.5)})
    path = tmp_path / "tiny.yaml"
    path.write_text(CONFIG)
    settings = Settings((), 1, 2, 1, False, config=path, out=tmp_path / "out")
    first = suite.run(settings)
    assert len(calls) == 8
    results = tmp_path / "out" / "results.jsonl"
    lines = results.read_text().splitlines()
    # Drop the last two cells; the first of them is partly written.
    results.write_text("\n".join(lines[:6]) + '\n{"world": "bili')
    assert suite.run(settings) == first and len(calls) == 10
    assert len((tmp_path / "out" / "results.csv").read_text().splitlines()) == 9
    for name in ("settings.yaml", "command.txt", "summary.json", "values.svg"):
        assert (tmp_path / "out" / name).stat().st_size > 0
    results.write_text('{"world": "bili\n' + "\n".join(lines))
    with pytest.raises(ValueError, match="damaged in line 1"):
        suite.run(settings)


def test_summary_pairs_methods_by_seed() -> None:
    lines = [
        {
            "world": "w",
            "seed": seed,
            "start": start,
            "method": method,
            "value": value + 0.1 * seed + 0.02 * start,
            "greedy": 0.9,
            "seconds": 1.0,
            "baselines": {"logging": 0.1},
        }
        for seed in (0, 1, 2)
        for start in (0, 1)
        for method, value in (("auto", 0.6 + 0.01 * seed), ("ips", 0.5))
    ]
    world = summarize(lines)["worlds"]["w"]
    assert world["paired"]["ips"]["mean"] == pytest.approx(0.11)
    assert world["paired"]["ips"]["error"] == pytest.approx(0.01 / np.sqrt(3))
    assert world["methods"]["ips"]["spread"] == pytest.approx(0.1)
    assert world["methods"]["ips"]["start_spread"] == pytest.approx(np.sqrt(0.0002))


def test_settings_files_of_the_source_tree_load() -> None:
    folder = Path(__file__).parent.parent / "configs" / "quality"
    for path in sorted(folder.glob("*.yaml")):
        settings = load_settings(path)
        assert settings.name == path.stem
        assert set(settings.methods) <= set(METHODS)


def test_invalid_settings_name_the_key(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text("name: x\nmethods: [auto]\nworlds: [{kind: bilinear, action: 3}]\n")
    with pytest.raises(ConfigError, match=r"worlds\.0\.bilinear"):
        load_settings(path)
    path.write_text(json.dumps({"name": "x", "methods": ["nope"], "worlds": []}))
    with pytest.raises(ConfigError, match="unknown method 'nope'"):
        suite.run(Settings((), 1, 2, 1, False, config=path, out=tmp_path / "o"))


@pytest.mark.parametrize("name", [n for n in WORLDS if not WORLDS[n].users])
def test_logs_of_degenerate_worlds_have_the_logging_policys_value(name: str) -> None:
    """Within 6 standard errors by context, of the log and of the held-out contexts."""
    world = degenerate(name, 7)
    reward = world.log.table["reward"].to_numpy()
    column = world.log.table["context"].combine_chunks()
    context = vector_matrix(column, world.log.schema.context[0].dim or 1)
    _, unit = np.unique(context, axis=0, return_inverse=True)
    sums = np.bincount(unit.ravel(), weights=reward - reward.mean())
    error = np.sqrt(np.square(sums).sum()) / len(reward)
    # Test contexts are at least 2,000 and have the smaller spread of expected rewards.
    error = np.hypot(error, reward.std() / 2_000**0.5)
    assert abs(reward.mean() - world.baselines["logging"]) <= 6 * error + 1e-12
    assert world.baselines["logging"] <= world.baselines["optimum"] + 1e-12
    assert world.log.table["pscore"].to_numpy().max() <= 1.0


def test_degenerate_worlds_are_configured() -> None:
    settings = load_settings(Path("configs/quality/degenerate.yaml"))
    assert [one.world for one in settings.worlds] == list(WORLDS)
    with pytest.raises(ConfigError, match="unknown degenerate world 'x'; known: fifty rows"):
        degenerate("x", 0)


def test_safety_counts_losses_and_broken_bounds() -> None:
    def line(value: float, low: float, keep: bool, width: float = 1.0) -> dict[str, object]:
        facts = {"low": low, "keep_logging": keep, "reward_range": [0.0, width]}
        return {"value": value, "baselines": {"logging": 0.5}, "facts": facts}

    lines = [
        line(0.496, 0.4, keep=False),
        line(0.494, 0.4, keep=False),
        line(0.494, 0.495, keep=True),
        line(0.494, 0.4, keep=False, width=2.0),
        {"value": 0.1, "baselines": {"logging": 0.5}},
    ]
    expected = {"runs": 4, "keep_logging": 1, "below": 2, "replaced_below": 1, "low_exceeds": 1}
    assert safety(lines) == expected


def test_labels_logged_by_popularity_are_drawn_alike_in_all_contexts() -> None:
    labels = topical(0, labels=20, examples=40, tokens=80)
    world = as_feedback(labels, 20_000, seed=0, popularity=1.0, epsilon=0.2)
    action, pscore = (world.log.table[name].to_numpy() for name in ("action", "pscore"))
    rank = 1.0 / np.arange(1, 21)
    wanted = 0.8 * rank / rank.sum() + 0.2 / 20
    drawn = np.array([pscore[action == label][0] for label in range(20)])
    assert all(len(set(pscore[action == label])) == 1 for label in range(20))
    np.testing.assert_allclose(np.sort(drawn)[::-1], wanted, rtol=1e-5)
    # Five standard errors, twenty labels: false alarm rate below 2e-5.
    error = np.sqrt(drawn * (1 - drawn) / 20_000)
    assert (np.abs(np.bincount(action, minlength=20) / 20_000 - drawn) < 5 * error).all()
    assert set(action[world.log.table["reward"].to_numpy() > 0]) <= set(
        np.flatnonzero(labels.train_labels.sum(axis=0))
    )


def test_labels_of_a_text_share_its_topics() -> None:
    """Of 60 labels in 20 topics, those of an example come from at most two topics of three."""
    labels = topical(1, labels=60, examples=200, tokens=200)
    counts = np.asarray(labels.train_labels.sum(axis=1)).ravel()
    assert counts.min() >= 1 and counts.max() <= 6
    together = (labels.train_labels.T @ labels.train_labels).toarray() > 0
    # Two topics may meet by chance; most pairs of labels never do.
    assert together.mean() < 0.35
    again = topical(1, labels=60, examples=200, tokens=200)
    assert (again.test_features != labels.test_features).nnz == 0
