"""Search and draws among eligible items, against dense masks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from scipy import stats

from offtower.config import ServingConfig
from offtower.errors import DataError
from offtower.retrieval import IndexOptions, Retriever
from offtower.retrieval.exact import exact_top_k
from offtower.retrieval.index import AnnIndex
from offtower.retrieval.index_building import build_index
from offtower.retrieval.partitioning import build_cells
from offtower.retrieval.propensity_sampler import PropensitySampler
from offtower.retrieval.row_filter import RowBits
from tests.ops.eligible_sets import FORMS, draw_eligible, packed
from tests.retrieval.test_sampling import ALPHA, softmax, world
from tests.training.eligible_data import exported_run, log

ALL = ("attribute", "interval", "exclude", "candidates")


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("forms", FORMS)
def test_exact_search_in_chunks_is_a_sort_of_the_eligible_items(
    forms: str, dtype: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("offtower.retrieval.exact.CHUNK", 128)
    rng = np.random.default_rng(0)
    queries = rng.standard_normal((9, 5)).astype(np.float32)
    vectors = rng.standard_normal((700, 5)).astype(dtype)
    action = torch.from_numpy(rng.integers(0, 700, 9))
    eligible, mask = draw_eligible(action, 700, forms, torch.Generator().manual_seed(1), 0.2)
    score, item = exact_top_k(queries, vectors, 30, eligible=eligible)
    full = np.where(mask.numpy(), queries @ vectors.astype(np.float32).T, -np.inf)
    for row in range(9):
        order = np.argsort(-full[row], kind="stable")[: int(mask[row].sum())][:30]
        assert item[row].tolist() == [*order, *[-1] * (30 - len(order))]
        np.testing.assert_allclose(score[row, : len(order)], full[row, order], rtol=1e-5)


@pytest.mark.parametrize("kind", ["flat", "ivf_flat", "ivf_sq8", "ivf_pq", "hnsw"])
def test_an_index_finds_eligible_items_alone_at_its_recall(kind: Any, tmp_path: Path) -> None:
    """A tenth and half of the items, at the effort that finds 95 % of the best 20 of all."""
    pytest.importorskip("faiss")
    vectors, queries = world(4_000, 16, 1.0)
    options = IndexOptions(kind=kind, target_recall=0.95, k=20)
    build_index(vectors, queries[:60], tmp_path, options, "1")
    index = open_built(tmp_path, vectors)
    rng = np.random.default_rng(3)
    for share in (0.1, 0.5):
        mask = rng.random(4_000) < share
        words = packed(torch.from_numpy(mask)[None])[0].numpy()
        _, found = index.search_among(queries[60:90], 20, words)
        assert mask[found[found >= 0]].all()
        full = np.where(mask, queries[60:90] @ vectors.T, -np.inf)
        truth = np.argsort(-full, axis=1)[:, :20]
        recall = np.mean([np.isin(t, f).mean() for t, f in zip(truth, found, strict=True)])
        assert recall >= 0.93, (kind, share, recall)


def open_built(directory: Path, vectors: Any) -> AnnIndex:
    from offtower.retrieval.index import open_index

    return open_index(directory, "1", vectors)


@pytest.mark.parametrize("mode", ["softmax", "cells", "exact"])
@pytest.mark.parametrize("setting", [{}, {"uniform": 0.3, "temperature": 2.0}], ids=str)
def test_draws_among_bits_follow_their_propensities(mode: Any, setting: dict[str, Any]) -> None:
    """Chi-square of 20,000 draws at ALPHA; propensities are those of the enumeration."""
    vectors, queries = world(8, 3, 1.0)
    cells = build_cells(vectors, queries)
    sampler = PropensitySampler(cells, serving=ServingConfig(**setting))
    mask = np.array([1, 1, 0, 1, 0, 1, 1, 1], dtype=bool)
    bits = RowBits.of(cells, packed(torch.from_numpy(mask)[None])[0].numpy())
    hidden = np.array([2, 5])
    left = mask.copy()
    left[5] = False
    rng = np.random.default_rng(4)
    for among in (bits, np.flatnonzero(mask)):
        found = sampler.draw(queries[40], rng, size=20_000, mode=mode, exclude=hidden, among=among)
        p = np.zeros(8)
        p[found.item] = found.pscore
        assert left[found.item].all()
        if mode != "cells":
            wanted = softmax(cells, queries[40] / sampler.serving.temperature) * left
            wanted = wanted / wanted.sum() * (1 - sampler.serving.uniform)
            wanted += sampler.serving.uniform * left / left.sum()
            np.testing.assert_allclose(p[found.item], wanted[found.item], rtol=1e-5)
        assert p.sum() == pytest.approx(1.0, abs=1e-5)
        count = np.bincount(found.item, minlength=8)
        keep = p > 0
        assert stats.chisquare(count[keep], 20_000 * p[keep] / p.sum()).pvalue > ALPHA


def test_sampled_cells_estimate_the_mass_of_the_eligible_items() -> None:
    """E[1 / pscore weighted by f] = sum f over 1,500 draws, at a poor budget and the stated one.

    The mean lies within 4.5 standard errors: a false alarm in 7e-6 for each share.
    """
    vectors, queries = world(20_000, 40, 1.5)
    cells = build_cells(vectors, queries[:32], num_cells=512)
    sampler = PropensitySampler(cells, relative_error=0.05)
    rng = np.random.default_rng(5)
    for share in (0.1, 0.6):
        mask = rng.random(20_000) < share
        bits = RowBits.of(cells, packed(torch.from_numpy(mask)[None])[0].numpy())
        p = softmax(cells, queries[50]) * mask
        f = p * rng.random(20_000)
        drawn = [sampler.draw(queries[50], rng, among=bits) for _ in range(750)]
        item = np.array([d.item[0] for d in drawn])
        assert mask[item].all()
        ratio = f[item] / np.array([d.pscore[0] for d in drawn]) / f.sum()
        assert abs(ratio.mean() - 1.0) < 4.5 * ratio.std() / len(ratio) ** 0.5
        # The propensities are the softmax's among eligible items, up to their stated errors.
        error = np.array([d.relative_error[0] for d in drawn])
        truth = p[item] / p.sum()
        z = (np.array([d.pscore[0] for d in drawn]) / truth - 1.0) / error
        assert np.mean(np.abs(z) < 3.0) > 0.95
        assert max(d.rows_scored for d in drawn) < 20_000


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported_run(
        tmp_path_factory.mktemp("eligible"), ALL[:3], IndexOptions(kind="ivf_flat", lists=4)
    )


@pytest.mark.parametrize("exact", [False, True])
def test_a_retriever_searches_and_draws_among_each_contexts_items(run: Path, exact: bool) -> None:
    pytest.importorskip("faiss")
    retriever = Retriever.open(run)
    table, sets = log(300, ALL[:3])
    hidden = [3, 60]
    sets[:, hidden] = False
    some = np.flatnonzero(sets.sum(axis=1) >= 2)[:40]
    contexts, sets = table.take(pa.array(some)), sets[some]
    found = retriever.search(contexts, 15, exclude=hidden, exact=exact)
    queries = retriever.embed(contexts)
    full = np.where(sets, queries @ np.asarray(retriever.vectors).T, -np.inf)
    for row in range(40):
        left = min(15, int(sets[row].sum()))
        assert len(found.item[row]) == left
        assert sets[row, found.item[row]].all()
        if exact:
            assert found.item[row].tolist() == np.argsort(-full[row], kind="stable")[:left].tolist()
    served = retriever.sample(
        contexts, 2, exclude=hidden, mode="exact" if exact else "softmax", seed=1
    )
    assert np.take_along_axis(sets, served.item, 1).all()
    p = np.exp(full - full.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    np.testing.assert_allclose(
        served.pscore[:, 0], np.take_along_axis(p, served.item[:, :1], 1)[:, 0], rtol=1e-4
    )


def test_too_few_eligible_items_for_a_slate_are_reported(run: Path) -> None:
    retriever = Retriever.open(run, index=False)
    table, sets = log(300, ALL[:3])
    contexts = table.take(pa.array([0]))
    left = int(sets[0].sum())
    with pytest.raises(
        DataError, match=f"{left + 1} items were asked for, but filters leave {left}"
    ):
        retriever.sample(contexts, left + 1)
    # The context is named, not the first of the call.
    fewest = int(np.argmin(sets.sum(axis=1)))
    asked = int(sets[fewest].sum()) + 1
    assert sets[0].sum() >= asked > 1
    contexts = table.take(pa.array([0, 0, fewest]))
    with pytest.raises(DataError, match=f"context 2: {asked} items were asked for"):
        retriever.sample(contexts, asked)
