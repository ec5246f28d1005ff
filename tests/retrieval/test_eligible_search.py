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
from offtower.errors import NoEligibleItemsError
from offtower.retrieval import IndexOptions, Retriever, decisions_table
from offtower.retrieval.exact import exact_top_k
from offtower.retrieval.index import AnnIndex
from offtower.retrieval.index_building import build_index
from offtower.retrieval.partitioning import build_cells
from offtower.retrieval.propensity_sampler import PropensitySampler
from offtower.retrieval.row_filter import RowBits
from offtower.retrieval.vector_source import VectorSource
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
    build_index(VectorSource(vectors), queries[:60], tmp_path, options, "1")
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


@pytest.mark.parametrize("serving", [ServingConfig(), ServingConfig(k=200, mode="top_k")], ids=str)
def test_a_slate_has_all_eligible_items_where_they_are_too_few(
    run: Path, serving: ServingConfig
) -> None:
    retriever = Retriever.open(run, index=False, serving=serving)
    table, sets = log(300, ALL[:3])
    sets = sets[:40]
    contexts = table.slice(0, 40)
    asked = int(np.median(sets.sum(axis=1))) + 1
    served = retriever.sample(contexts, asked, seed=1)
    assert served.lengths.tolist() == np.minimum(sets.sum(axis=1), asked).tolist()
    assert len(set(served.lengths.tolist())) > 2 and served.lengths.max() == asked
    decisions = decisions_table(retriever, contexts, served)
    assert decisions.num_rows == served.lengths.sum()
    position = decisions.column("position").to_numpy()
    assert position.tolist() == [k for length in served.lengths for k in range(length)]
    for row, length in enumerate(served.lengths):
        shown = served.item[row, :length]
        assert sets[row, shown].all() and len(set(shown)) == length
        assert served.item_id[row] == shown.tolist()
        if length == sets[row].sum():
            # Nothing else is left for the last position.
            assert served.pscore[row, length - 1] == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("serving", [ServingConfig(), ServingConfig(k=3, mode="top_k")], ids=str)
@pytest.mark.parametrize("by_call", [True, False])
def test_a_context_without_items_is_an_error_or_skipped(
    run: Path, serving: ServingConfig, by_call: bool
) -> None:
    """Items are ruled out by the call, or by the context's own columns."""
    retriever = Retriever.open(run, serving=serving)
    table, sets = log(300, ALL[:3])
    some = np.flatnonzero(sets.sum(axis=1) >= 3)[:3]
    contexts = table.take(pa.array(some))
    allowed = np.flatnonzero(sets[some[1]]).tolist()
    exclude = [[], allowed, []] if by_call else None
    if not by_call:
        seen = contexts.column("seen").to_pylist()
        seen[1] = sorted({*seen[1], *allowed})
        index = contexts.column_names.index("seen")
        contexts = contexts.set_column(index, "seen", pa.array(seen))
    named = "context 1: filters leave 0" if by_call else "row 1 of the contexts has no eligible"
    with pytest.raises(NoEligibleItemsError, match=named):
        retriever.sample(contexts, 3, exclude=exclude)
    served = retriever.sample(contexts, 3, exclude=exclude, on_empty="skip")
    assert served.lengths.tolist() == [3, 0, 3]
    decisions = decisions_table(retriever, contexts, served)
    assert decisions.num_rows == 6 and len(decisions.column("round_id").unique()) == 2
    found = retriever.search(contexts, 3, exclude=exclude, on_empty="skip")
    assert [len(items) for items in found.item] == [3, 0, 3]
