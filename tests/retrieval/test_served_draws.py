"""Draws from the served policy against enumeration: temperature, uniform share, best items."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from scipy import stats

from offtower.config import ServingConfig, parse_config
from offtower.config.serving import changed_serving
from offtower.data import write_catalogue, write_log
from offtower.data.encoding import to_tensors
from offtower.data.schema import CatalogueSchema, FeatureSpec, LogSchema
from offtower.errors import ConfigError, DataError
from offtower.evaluation.scoring.policy import PolicyScorer
from offtower.models.items import ItemFeatures
from offtower.models.store import load_policy
from offtower.retrieval import ExportOptions, Retriever, export_run
from offtower.retrieval.partitioning import build_cells
from offtower.retrieval.propensity_sampler import PropensitySampler
from offtower.training.run import train_run
from tests.retrieval.test_sampling import ALPHA, softmax, world

SETTINGS: list[dict[str, Any]] = [
    {"temperature": 0.5},
    {"uniform": 0.2},
    {"temperature": 2.0, "uniform": 0.05},
    {"top": 4},
    {"top": 3, "uniform": 0.3},
]


def served(p: np.ndarray, serving: ServingConfig, hidden: np.ndarray | None = None) -> np.ndarray:
    """(N,) probabilities of the served policy, from those of the trained one."""
    allowed = np.ones(len(p), dtype=bool)
    if hidden is not None:
        allowed[hidden] = False
    score = np.where(allowed, np.log(p) / serving.temperature, -np.inf)
    if serving.top is not None:
        score[score < np.sort(score)[-min(serving.top, allowed.sum())]] = -np.inf
    soft = np.exp(score - score.max())
    return (1 - serving.uniform) * soft / soft.sum() + serving.uniform * allowed / allowed.sum()


@pytest.mark.parametrize(
    ("setting", "mode"),
    [
        (setting, mode)
        for setting in SETTINGS
        for mode in ("softmax", "cells", "exact")
        if mode != "cells" or "top" not in setting
    ],
    ids=str,
)
def test_draws_of_8_items_follow_their_propensities(setting: dict[str, Any], mode: str) -> None:
    """Chi-square of 20,000 draws at ALPHA; propensities are those of the enumeration."""
    vectors, queries = world(8, 3, 1.0)
    cells = build_cells(vectors, queries)
    sampler = PropensitySampler(cells, serving=ServingConfig(**setting))
    hidden = np.array([2])
    rng = np.random.default_rng(4)
    for exclude in (None, hidden):
        found = sampler.draw(queries[40], rng, size=20_000, mode=mode, exclude=exclude)  # type: ignore[arg-type]
        p = np.zeros(8)
        p[found.item] = found.pscore
        if mode != "cells":
            wanted = served(softmax(cells, queries[40]), sampler.serving, exclude)
            np.testing.assert_allclose(p[found.item], wanted[found.item], rtol=1e-5)
            assert not found.relative_error.any()
        count = np.bincount(found.item, minlength=8)
        assert p.sum() == pytest.approx(1.0, abs=1e-5)
        keep = p > 0
        assert stats.chisquare(count[keep], 20_000 * p[keep] / p.sum()).pvalue > ALPHA
        assert exclude is None or not count[2]


@pytest.mark.parametrize("setting", SETTINGS[2:], ids=str)
def test_slates_of_6_items_follow_the_conditional_probabilities(setting: dict[str, Any]) -> None:
    """1,500 slates of 3 of 6 items: chi-square at ALPHA; pscore is p / (1 - those before)."""
    vectors, queries = world(6, 3, 1.0)
    cells = build_cells(vectors, queries)
    sampler = PropensitySampler(cells, serving=ServingConfig(**setting))
    p = served(softmax(cells, queries[40]), sampler.serving)
    rng = np.random.default_rng(9)
    counts: Counter[tuple[int, ...]] = Counter()
    for number in range(1500):
        drawn = sampler.slate(queries[40], rng, size=3)
        counts[tuple(drawn.item.tolist())] += 1
        if number < 50:
            own = p[drawn.item]
            wanted = own / (1.0 - np.append(0.0, own.cumsum()[:-1]))
            np.testing.assert_allclose(drawn.pscore, wanted, rtol=1e-4)
    slates = list(itertools.permutations(range(6), 3))
    law = np.array([p[a] * p[b] / (1 - p[a]) * p[c] / (1 - p[a] - p[b]) for a, b, c in slates])
    observed = np.array([counts[slate] for slate in slates])
    assert observed[law == 0].sum() == 0
    rare = 1500 * law < 5
    merged = np.append(observed[~rare], observed[rare].sum())
    wanted = 1500 * np.append(law[~rare], law[rare].sum())
    keep = wanted > 0
    assert stats.chisquare(merged[keep], wanted[keep]).pvalue > ALPHA


@pytest.mark.parametrize("size", [1, 5])
@pytest.mark.parametrize("setting", [{"uniform": 0.2}, {"temperature": 0.7, "uniform": 0.02}])
def test_sampled_cells_state_the_error_of_the_mixture(setting: dict[str, Any], size: int) -> None:
    """20,000 items, whose cells are sampled: of 100 contexts at most 15 errors exceed 3 stated ones
    (normal: .0027, and the observed errors have heavier tails; P(more than 15) at .03 is 2e-7)."""
    vectors, queries = world(20_000, 8, 1.5, queries=132)
    cells = build_cells(vectors, queries[:32])
    sampler = PropensitySampler(cells, relative_error=0.02, serving=ServingConfig(**setting))
    rng = np.random.default_rng(5)
    beyond, sampled = 0, 0
    for query in queries[32:]:
        p = served(softmax(cells, query), sampler.serving)
        draw = sampler.slate(query, rng, size=size) if size > 1 else sampler.draw(query, rng)
        own = p[draw.item]
        wanted = own / (1.0 - np.append(0.0, own.cumsum()[:-1]))
        error = np.abs(draw.pscore / wanted - 1.0)
        sampled += bool(draw.relative_error[0] > 0.0)
        beyond += bool((error > 3.0 * draw.relative_error + 1e-5).any())
        assert (draw.conditional_pscore > 0.0).all()
    assert sampled > 50
    assert beyond <= 15


def test_ips_of_the_mixture_is_unbiased() -> None:
    """E[f(A) / pscore] = sum f within 4 standard errors: false-alarm rate 6e-5 each."""
    vectors, queries = world(20_000, 8, 1.5)
    cells = build_cells(vectors, queries[:32])
    sampler = PropensitySampler(
        cells, relative_error=0.05, serving=ServingConfig(uniform=0.1, temperature=0.8)
    )
    p = served(softmax(cells, queries[50]), sampler.serving)
    f = p * np.random.default_rng(1).random(20_000)
    rng = np.random.default_rng(2)
    for name in ("pscore", "conditional_pscore"):
        ratio = []
        for _ in range(600):
            drawn = sampler.draw(queries[50], rng)
            ratio.append(f[drawn.item[0]] / getattr(drawn, name)[0] / f.sum())
        z = (np.mean(ratio) - 1.0) / (np.std(ratio) / len(ratio) ** 0.5)
        assert abs(z) < 4.0, (name, z)


def test_a_tiny_uniform_share_does_not_make_slates_slow() -> None:
    """One item holds nearly all of the softmax; five positions are drawn from scores of all."""
    vectors, queries = world(2000, 4, 1.0)
    vectors[7] = 40.0 * queries[40]
    cells = build_cells(vectors, queries[:32])
    sampler = PropensitySampler(cells, serving=ServingConfig(uniform=1e-7))
    drawn = sampler.slate(queries[40], np.random.default_rng(0), size=5)
    p = served(softmax(cells, queries[40]), sampler.serving)
    assert drawn.item[0] == 7 and len(set(drawn.item.tolist())) == 5
    left = np.delete(p, drawn.item[0]).sum()
    assert drawn.pscore[1] == pytest.approx(p[drawn.item[1]] / left, rel=1e-4)


def test_settings_that_exclude_each_other() -> None:
    vectors, queries = world(50, 3, 1.0)
    cells = build_cells(vectors, queries)
    rng = np.random.default_rng(0)
    top = PropensitySampler(cells, serving=ServingConfig(top=4))
    with pytest.raises(ConfigError, match="mode cells"):
        top.draw(queries[0], rng, mode="cells")
    with pytest.raises(DataError, match=r"serving\.top leaves 4"):
        top.slate(queries[0], rng, size=5)
    with pytest.raises(ConfigError, match="top_k draws nothing"):
        PropensitySampler(cells, serving=ServingConfig(mode="top_k"))


@pytest.mark.parametrize("setting", [{}, {"temperature": 0.5, "uniform": 0.1}], ids=str)
def test_draws_keep_the_limits_of_new_items(setting: dict[str, Any]) -> None:
    """Chi-square of 20,000 draws at ALPHA; slates are those of the limited probabilities."""
    vectors, queries = world(8, 3, 1.0)
    cells = build_cells(vectors, queries)
    new = np.arange(8) >= 6
    rules = {"feature": "age", "below": 1.0, "at_least": 0.4, "at_most": 0.45}
    serving = ServingConfig(**setting, new_items=rules)  # type: ignore[arg-type]
    sampler = PropensitySampler(cells, serving=serving, new=new)
    rng = np.random.default_rng(4)
    for exclude in (None, np.array([2])):
        whole = served(softmax(cells, queries[40]), ServingConfig(**setting), exclude)
        share = np.clip(whole[new].sum(), 0.4, 0.45)
        p = np.where(new, whole * share / whole[new].sum(), 0.0)
        p += np.where(new, 0.0, whole * (1.0 - share) / whole[~new].sum())
        found = sampler.draw(queries[40], rng, size=20_000, exclude=exclude)
        np.testing.assert_allclose(found.pscore, p[found.item], rtol=1e-5)
        count, keep = np.bincount(found.item, minlength=8), p > 0
        assert stats.chisquare(count[keep], 20_000 * p[keep]).pvalue > ALPHA
        slate = sampler.slate(queries[40], rng, size=3, exclude=exclude)
        before = np.append(0.0, np.cumsum(p[slate.item])[:-1])
        np.testing.assert_allclose(slate.pscore, p[slate.item] / (1.0 - before), rtol=1e-5)
    with pytest.raises(ConfigError, match="need the scores of all"):
        sampler.draw(queries[40], rng, mode="cells")


def test_an_export_draws_what_its_evaluation_scores(tmp_path: Path) -> None:
    """With limits on new items: propensities of the retriever are those of the scorer."""
    rng = np.random.default_rng(0)
    spec = FeatureSpec(name="age", kind="numeric")
    vector = FeatureSpec(name="v", kind="vector", dim=2)
    items = pa.table(
        {"item": range(30), "age": np.arange(30.0), "v": list(rng.normal(size=(30, 2)))}
    )
    schema = CatalogueSchema(item_id="item", features=(spec, vector))
    catalogue = write_catalogue(tmp_path / "items", items, schema)
    rows = pa.table(
        {
            "v": list(rng.normal(size=(200, 2))),
            "item": rng.integers(30, size=200),
            "reward": rng.integers(2, size=200).astype(float),
            "pscore": np.full(200, 1 / 30),
        }
    )
    log = LogSchema(context=(vector,), action="item", reward="reward", pscore="pscore")
    write_log(tmp_path / "log", [rows], log)
    rules = {"feature": "age", "below": 2.5, "at_least": 0.5}
    config = parse_config(
        {
            "name": "a",
            "runs": str(tmp_path),
            "data": {"train": str(tmp_path / "log"), "catalogue": str(tmp_path / "items")},
            "objective": "ips",
            "training": {"epochs": 1, "threads": 1},
            "serving": {"uniform": 0.1, "new_items": rules},
        }
    )
    train_run(config)
    policy, _ = load_policy(tmp_path / "a" / "policy")
    scorer = PolicyScorer(
        policy,
        ItemFeatures.from_catalogue(catalogue, policy.item_encoding),
        serving=config.serving,
    )
    export_run(tmp_path / "a", ExportOptions(index=None, parquet=False, onnx=False))
    contexts = rows.select(["v"]).slice(0, 100)
    drawn = Retriever.open(tmp_path / "a").sample(contexts, 1, seed=3)
    item = torch.from_numpy(drawn.item)
    context = policy.embed_contexts(to_tensors(policy.context_encoding.encode(contexts)))
    terms = scorer.served.terms(context.detach(), scorer.items, item[:, 0])
    np.testing.assert_allclose(drawn.pscore[:, 0], terms.log_prob.exp().numpy(), rtol=1e-4)
    # At least half of the draws, 5 standard errors.
    assert np.mean(drawn.item < 3) > 0.5 - 5 * 0.05
    text = "temperature=0.5"
    assert Retriever.open(tmp_path / "a", serving=changed_serving(config.serving, text))
    other = replace(config.serving, new_items=None)
    assert Retriever.open(tmp_path / "a", serving=other).sample(contexts, 1, seed=3)
    wrong = {**rules, "below": 9.0}
    with pytest.raises(ConfigError, match="does not tell new items by 'age' below 9"):
        Retriever.open(tmp_path / "a", serving=ServingConfig(new_items=wrong))  # type: ignore[arg-type]
