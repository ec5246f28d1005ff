"""FAISS indices: what they find, how they are checked, and FAISS beside torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from offtower import ops
from offtower.errors import ConfigError, RunError
from offtower.retrieval import IndexOptions
from offtower.retrieval.vector_source import VectorSource
from tests.mappers import BACKWARDS


@pytest.mark.parametrize("kind", ["flat", "ivf_flat", "ivf_sq8", "ivf_pq", "hnsw"])
def test_every_index_reaches_its_stated_recall(tmp_path: Path, kind: str) -> None:
    pytest.importorskip("faiss")
    from offtower.retrieval.index import open_index
    from offtower.retrieval.index_building import build_index

    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((6000, 9)).astype(np.float32)
    queries = rng.standard_normal((80, 9)).astype(np.float32)
    options = IndexOptions(kind=kind, k=10, target_recall=0.9, lists=32)  # type: ignore[arg-type]
    facts = build_index(VectorSource(vectors), queries, tmp_path, options, "v1")
    index = open_index(tmp_path, "v1", vectors)
    score, item = index.search(queries[40:], 10)
    _, truth = ops.top_k(torch.from_numpy(queries[40:]), torch.from_numpy(vectors), 10)
    hits = np.mean([np.isin(t, f).mean() for t, f in zip(truth.numpy(), item, strict=True)])
    assert hits == pytest.approx(facts["recall"]["mean"], abs=1e-6)
    assert hits >= 0.88
    own = np.einsum("nkd,nd->nk", vectors[item], queries[40:])
    np.testing.assert_allclose(score, own, rtol=1e-4)
    assert (np.diff(score, axis=1) <= 0).all()
    if kind.startswith("ivf"):
        sharded = tmp_path / "sharded"
        again = IndexOptions(kind=kind, k=10, target_recall=0.9, lists=32, shard_rows=2500)  # type: ignore[arg-type]
        build_index(VectorSource(vectors), queries, sharded, again, "v1")
        np.save(tmp_path / "vectors.npy", vectors)
        stored, elsewhere = VectorSource((tmp_path / "vectors.npy",)), tmp_path / "workers"
        build_index(stored, queries, elsewhere, options, "v1", BACKWARDS.mapper)
        assert (elsewhere / "index.faiss").read_bytes() == (tmp_path / "index.faiss").read_bytes()
        build_index(stored, queries, elsewhere, again, "v1", BACKWARDS.mapper)
        for name in ("index.faiss", "index.ivfdata"):
            # FAISS writes the folder's name into the index.
            one, two = ((folder / name).read_bytes() for folder in (sharded, elsewhere))
            assert one.replace(b"sharded", b"workers") == two
        assert {p.name for p in elsewhere.iterdir()} == {p.name for p in sharded.iterdir()}
        other = open_index(sharded, "v1", vectors)
        assert np.array_equal(
            other.search(queries, 10, nprobe=32)[1][:, 0],
            index.search(queries, 10, nprobe=32)[1][:, 0],
        )
    with pytest.raises(RunError, match="export has 100"):
        open_index(tmp_path, "v1", vectors[:100])


def test_faiss_and_torch_share_a_process() -> None:
    """Two OpenMP runtimes: both compute, and FAISS takes torch's number of threads."""
    faiss = pytest.importorskip("faiss")
    from offtower.retrieval.index import import_faiss

    vectors = np.random.default_rng(0).standard_normal((20_000, 16)).astype(np.float32)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            import_faiss()
            assert faiss.omp_get_max_threads() == threads
            index = faiss.IndexFlatIP(16)
            index.add(vectors)
            _, found = index.search(vectors[:50], 5)
            _, truth = ops.top_k(torch.from_numpy(vectors[:50]), torch.from_numpy(vectors), 5)
            assert np.array_equal(found, truth.numpy())
    finally:
        torch.set_num_threads(before)


def test_a_graph_index_finds_the_largest_inner_products_of_vectors_of_unequal_norm(
    tmp_path: Path,
) -> None:
    """Lengths that differ fourfold, and a bias; exact vectors and int8 ones."""
    pytest.importorskip("faiss")
    from offtower.retrieval.index import open_index
    from offtower.retrieval.index_building import build_index

    rng = np.random.default_rng(3)
    length = np.exp(0.35 * rng.standard_normal((4000, 1)))
    vectors = np.c_[length * rng.standard_normal((4000, 12)), rng.standard_normal(4000)]
    queries = np.c_[rng.standard_normal((120, 12)), np.ones(120)].astype(np.float32)
    items = vectors.astype(np.float32)
    for dtype in ("float32", "int8"):
        scale = None
        if dtype == "int8":
            scale = (np.abs(items).max(axis=0) / 127).astype(np.float32)
            items = np.rint(items / scale).astype(np.int8)
        source, options = VectorSource(items, scale), IndexOptions(kind="hnsw", k=50)
        facts = build_index(source, queries, tmp_path / dtype, options, "v1")
        assert facts["recall"]["mean"] >= 0.97
        found = open_index(tmp_path / dtype, "v1", items, scale).search(queries, 50)[1]
        wide = items.astype(np.float64) * (1.0 if scale is None else scale)
        truth = np.argsort(-(queries @ wide.T), axis=1)[:, :50]
        hits = [np.isin(t, f).mean() for t, f in zip(truth, found, strict=True)]
        assert np.mean(hits) >= 0.97


def test_clusters_are_taken_over_until_the_recall_falls(tmp_path: Path) -> None:
    """Items come, go and move a little: the same clusters. All move far away: clustered anew."""
    pytest.importorskip("faiss")
    from offtower.retrieval.index import open_index
    from offtower.retrieval.index_building import build_index
    from offtower.retrieval.index_update import EarlierIndex, update_index

    rng = np.random.default_rng(0)
    centers = 4.0 * rng.standard_normal((40, 8)).astype(np.float32)

    def near(centers: np.ndarray, count: int) -> np.ndarray:
        some = centers[rng.integers(0, len(centers), count)]
        return (some + 0.5 * rng.standard_normal((count, 8))).astype(np.float32)

    old = near(centers, 5000)
    queries = rng.standard_normal((200, 8)).astype(np.float32)
    options = IndexOptions(k=10, target_recall=0.9, lists=40)
    build_index(VectorSource(old), queries, tmp_path / "1", options, "v1")
    earlier = EarlierIndex(tmp_path / "1", "v1")
    moved = np.concatenate([old[700:], near(centers, 900)])
    moved += (0.01 * rng.standard_normal(moved.shape)).astype(np.float32)
    facts = update_index(VectorSource(moved), queries, tmp_path / "2", options, "v2", earlier)
    assert facts["clusters_of"] == "v1" and facts["updates"] == 1 and facts["count"] == 5200
    index = open_index(tmp_path / "2", "v2", moved)
    assert index.parameters == facts["parameters"]
    found = index.search(queries[100:], 10)[1]
    _, truth = ops.top_k(torch.from_numpy(queries[100:]), torch.from_numpy(moved), 10)
    hits = np.mean([np.isin(t, f).mean() for t, f in zip(truth.numpy(), found, strict=True)])
    assert hits == pytest.approx(facts["recall"]["mean"], abs=1e-6) and hits >= 0.9

    again = EarlierIndex(tmp_path / "2", "v2")
    far = near(0.02 * centers[:3], 5000)
    facts = update_index(VectorSource(far), queries, tmp_path / "3", options, "v3", again)
    assert "with the clusters of export v1 recall@10 fell to" in facts["rebuilt_because"]
    assert facts["recall"]["mean"] >= 0.88 and open_index(tmp_path / "3", "v3", far)
    flat = IndexOptions(kind="flat", k=10)
    facts = update_index(VectorSource(far), queries, tmp_path / "4", flat, "v4", again)
    assert facts["rebuilt_because"] == "an index of kind flat has no clusters to take over"


def test_more_lists_than_items_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("faiss")
    from offtower.retrieval.index_building import build_index

    vectors = np.random.default_rng(0).standard_normal((300, 8)).astype(np.float32)
    with pytest.raises(ConfigError, match="lists=301 exceeds the 300 items"):
        build_index(VectorSource(vectors), vectors[:9], tmp_path, IndexOptions(lists=301), "1")
