"""What was learned is what is served: round trips, other readers, failed exports."""

from __future__ import annotations

import copy
import errno
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn

from offtower.checksums import describe_files, verify_file, write_checked_json
from offtower.config import TowerConfig
from offtower.data import Catalogue, array_files, write_catalogue
from offtower.data.array_files import map_array
from offtower.data.encoding import FeatureEncoding, to_tensors
from offtower.data.location import Location
from offtower.data.log import ParquetLog
from offtower.data.manifest import write_manifest as write_data_manifest
from offtower.data.simulate import SimulatedWorld
from offtower.errors import DataError, OfftowerError, RunError
from offtower.execution import LOCAL
from offtower.models import ItemFeatures, load_policy, save_policy
from offtower.models.features import FeatureEncoder
from offtower.retrieval import ExportOptions, Retriever, export_run, parquet_parts
from offtower.retrieval.catalogue_stream import CatalogueStream
from offtower.retrieval.graphs import graph_inputs, write_graphs
from offtower.retrieval.manifest import read_manifest, write_manifest
from offtower.retrieval.parquet_parts import ParquetSource, write_parquet
from offtower.retrieval.tower import ContextTower
from offtower.retrieval.vectors import load_ids, quantize, write_vectors
from tests.mappers import BACKWARDS, content

PLAIN = ExportOptions(index=None, onnx=False, contexts=50, kept=50)


def contexts(run: Path, rows: int = 32) -> pa.Table:
    return ParquetLog.open(run.parents[1] / "test").read_row_group(0).slice(0, rows)


def policy_logits(run: Path, table: pa.Table) -> torch.Tensor:
    policy, _ = load_policy(run / "policy")
    catalogue = Catalogue.open(run.parents[1] / "catalogue")
    with torch.no_grad():
        items = policy.embed_items(ItemFeatures.from_catalogue(catalogue, policy.item_encoding))
        u = policy.embed_contexts(to_tensors(policy.context_encoding.encode(table)))
    assert items.bias is not None
    return u.double() @ items.embedding.double().T / policy.temperature + items.bias.double()


def test_a_fresh_process_without_training_code_finds_the_policys_top_k(
    run: Path, exported: Path
) -> None:
    code = """
import json, sys
import pyarrow.parquet as pq
from offtower.retrieval import Retriever
r = Retriever.open(sys.argv[1])
t = pq.read_table(sys.argv[2])
exact, found = r.search(t, 20, exact=True), r.search(t, 20)
assert not [m for m in sys.modules if m.startswith("offtower.training")]
print(json.dumps([exact.item_id, [s.tolist() for s in exact.score], found.item_id]))
"""
    table = contexts(run)
    path = exported.parent / "some.parquet"
    pq.write_table(table, path)
    done = subprocess.run(
        [sys.executable, "-c", code, str(run), str(path)],
        capture_output=True,
        text=True,
        check=True,
    )
    ids, score, found = json.loads(done.stdout)
    truth = torch.topk(policy_logits(run, table), 20)
    np.testing.assert_allclose(score, truth.values.numpy(), rtol=1e-4, atol=1e-4)
    assert ids == [[f"item-{i}" for i in row] for row in truth.indices.tolist()]
    hits = [len(set(a) & set(b)) / 20 for a, b in zip(ids, found, strict=True)]
    assert np.mean(hits) > 0.95


def test_the_manifest_contains_the_measured_recall(run: Path, exported: Path) -> None:
    manifest = read_manifest(exported)
    assert manifest["index"]["recall"]["mean"] >= 0.97
    assert manifest["index"]["recall"]["contexts"] == 200
    assert manifest["index"]["metric"] == "inner_product"
    assert manifest["vectors"]["dim"] == 13 and manifest["vectors"]["count"] == 3000
    assert manifest["measured_on"]["part"] == "test"
    policy = json.loads((run / "policy" / "policy.json").read_text())
    fingerprint = policy["facts"]["config_fingerprint"]
    assert manifest["policy"]["config_fingerprint"] == fingerprint


@pytest.mark.parametrize("learned", [False, True])
def test_other_runtimes_give_the_same_queries(run: Path, tmp_path: Path, learned: bool) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    policy, _ = load_policy(run / "policy")
    if learned:
        policy.config.learn_temperature = True
    tower = ContextTower.of(policy)
    facts = write_graphs(tower, tmp_path, "v", onnx=True)
    assert facts["reason"] is None
    program = torch.export.load(tmp_path / "context_tower.pt2").module()
    session = onnxruntime.InferenceSession(
        str(tmp_path / "context_tower.onnx"), providers=["CPUExecutionProvider"]
    )
    for rows in (1, 7, 32):
        table = contexts(run, rows)
        truth = tower.embed(table)
        inputs = graph_inputs(tower.encoding, table)
        onnx = session.run(["query"], inputs)[0]
        np.testing.assert_allclose(onnx, truth, rtol=1e-5, atol=1e-5)
        torch_out = program(*(torch.from_numpy(v) for v in inputs.values())).detach().numpy()
        np.testing.assert_allclose(torch_out, truth, rtol=1e-5, atol=1e-5)
    contract = json.loads((tmp_path / "contract.json").read_text())
    assert [entry["input"] for entry in contract["inputs"]] == list(inputs)


def test_duckdb_reads_the_parquet(run: Path, exported: Path) -> None:
    duckdb = pytest.importorskip("duckdb")
    retriever = Retriever.open(exported)
    table = contexts(run, 1)
    query = retriever.embed(table)[0].tolist()
    sql = (
        "select item_id, list_inner_product(embedding::float[], ?::float[]) as s "
        f"from '{exported}/items/*.parquet' order by s desc limit 10"
    )
    rows = duckdb.execute(sql, [query]).fetchall()
    assert [row[0] for row in rows] == retriever.search(table, 10, exact=True).item_id[0]


def test_lancedb_reads_the_parquet(run: Path, exported: Path, tmp_path: Path) -> None:
    lancedb = pytest.importorskip("lancedb")
    retriever = Retriever.open(exported)
    items = pq.read_table(exported / "items")
    opened = lancedb.connect(str(tmp_path / "lance")).create_table("items", items)
    context = contexts(run, 1)
    query = retriever.embed(context)[0]
    search = opened.search(query, vector_column_name="embedding")
    search = search.metric("dot") if hasattr(search, "metric") else search.distance_type("dot")
    found = search.limit(10).to_arrow().column("item_id").to_pylist()
    assert found == retriever.search(context, 10, exact=True).item_id[0]


@pytest.mark.usefixtures("no_graphs")
def test_columns_for_vector_databases(run: Path) -> None:
    options = ExportOptions(
        index=None, onnx=False, contexts=50, kept=50, layout="vector_db", fixed_size=False
    )
    path = export_run(run, options)
    table = pq.read_table(path / "items")
    assert table.column_names == ["id", "values", "metadata"]
    assert pa.types.is_list(table.schema.field("values").type)
    first = json.loads(table.column("metadata")[0].as_py())
    assert set(first) == {"price", "genre", "tags"}


@pytest.mark.usefixtures("no_graphs")
@pytest.mark.parametrize(("dtype", "least"), [("float16", 0.99), ("int8", 0.9)])
def test_reduced_precision_reports_its_recall(run: Path, dtype: str, least: float) -> None:
    options = ExportOptions(dtype=dtype, index=None, onnx=False, contexts=100, kept=50)  # type: ignore[arg-type]
    path = export_run(run, options)
    measured = read_manifest(path)["vectors"]["precision"]
    assert least < measured["recall@100"] <= 1.0
    table = contexts(run)
    found = Retriever.open(path).search(table, 100)
    truth = torch.topk(policy_logits(run, table), 100).indices.numpy()
    kept = np.mean([np.isin(t, f).mean() for t, f in zip(truth, found.item, strict=True)])
    assert kept == pytest.approx(measured["recall@100"], abs=0.02)


@pytest.mark.usefixtures("no_graphs")
def test_items_added_after_training_are_found_from_their_features(
    run: Path, world: SimulatedWorld, tmp_path: Path
) -> None:
    table = world.catalogue_table()
    best = int(policy_logits(run, contexts(run, 1))[0].argmax())
    twin = table.slice(best, 1).set_column(0, "item_id", pa.array(["brand-new"]))
    write_catalogue(tmp_path / "more", pa.concat_tables([table, twin]), world.catalogue_schema)
    path = export_run(run, PLAIN, catalogue=tmp_path / "more")
    found = Retriever.open(path).search(contexts(run, 1), 2)
    assert set(found.item_id[0]) == {f"item-{best}", "brand-new"}


def test_nan_embeddings_and_duplicate_ids_are_named(
    run: Path, world: SimulatedWorld, tmp_path: Path
) -> None:
    before = (run / "export" / "CURRENT").read_text() if (run / "export").exists() else None
    copy = tmp_path / "runs" / "small"
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("export"))
    policy, facts = load_policy(copy / "policy")
    with torch.no_grad():
        policy.item_tower.body.layers[-1].weight[0, 0] = float("nan")
    save_policy(copy / "policy", policy, facts)
    with pytest.raises(DataError, match="embedding of item 'item-0' is not finite"):
        export_run(copy, PLAIN)
    assert not (copy / "export" / "CURRENT").exists()
    table = world.catalogue_table()
    pq.write_table(pa.concat_tables([table, table.slice(17, 1)]), tmp_path / "items.parquet")
    # No files are listed, so these are read as they are.
    schema = world.catalogue_schema.to_dict()
    write_data_manifest(Location.of(tmp_path), schema, table.num_rows + 1, "none")
    with pytest.raises(DataError, match="'item-17' stands twice in the catalogue, as items 17"):
        export_run(run, PLAIN, catalogue=tmp_path)
    if before is not None:
        assert (run / "export" / "CURRENT").read_text() == before


@pytest.mark.parametrize(
    "write",
    [
        "offtower.retrieval.export.write_vectors",
        "offtower.retrieval.export.write_parquet",
        "offtower.retrieval.export.write_manifest",
        "offtower.retrieval.partitioning.write_array",
        "numpy.save",
        "torch.export.save",
    ],
)
def test_a_full_disk_is_one_message_and_leaves_the_earlier_export(
    run: Path, exported: Path, monkeypatch: pytest.MonkeyPatch, write: str
) -> None:
    export = run / "export"
    before = (export / "CURRENT").read_text(), sorted(p.name for p in export.iterdir())
    usage = shutil.disk_usage(export)

    def full(*_: Any, **__: Any) -> None:
        if write == "torch.export.save":
            # Its writer reports no error number.
            monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=0))
            raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(write, full)
    with pytest.raises(RunError, match=r"the disk is full: .* the previous export is unchanged"):
        export_run(run, PLAIN)
    after = (export / "CURRENT").read_text(), sorted(p.name for p in export.iterdir())
    assert after == before


@pytest.mark.slow
def test_a_full_disk_or_a_kill_leaves_the_earlier_export(run: Path, exported: Path) -> None:
    export = run / "export"
    current = (export / "CURRENT").read_text()
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000));"
        "from offtower.retrieval import ExportOptions, export_run;"
        "export_run(sys.argv[1], ExportOptions(index=None, onnx=False))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(run)], capture_output=True, text=True)
    assert done.returncode > 0, "killed by a signal"
    assert (export / "CURRENT").read_text() == current
    killed = subprocess.Popen(
        [sys.executable, "-c", code.replace("(60_000, 60_000)", "(1 << 40, 1 << 40)"), str(run)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and killed.poll() is None:
        if any(p.name.endswith(".partial") for p in export.iterdir()):
            break
        time.sleep(0.001)
    killed.kill()
    killed.wait()
    assert Retriever.open(run).search(contexts(run, 1), 3).item_id
    path = export_run(run, PLAIN)
    assert Retriever.open(run).version == path.name
    assert not list(export.glob(".*.partial"))


@pytest.mark.parametrize("part_rows", [1024, 1000, array_files.PART_ROWS])
def test_items_embedded_elsewhere_have_the_same_bits(
    run: Path,
    world: SimulatedWorld,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    part_rows: int,
) -> None:
    """Files of any size, row groups of any size, parts in any order and twice; parts of whole
    pages are mapped side by side."""
    monkeypatch.setattr(array_files, "PART_ROWS", part_rows)
    monkeypatch.setattr(parquet_parts, "ROWS_PER_PART", 1100)
    table, schema = world.catalogue_table(), world.catalogue_schema
    for name, (first, last), groups in (("a", (0, 1700), 333), ("b", (1700, 3000), 2000)):
        part = table.slice(first, last - first)
        (tmp_path / "catalogue").mkdir(exist_ok=True)
        pq.write_table(part, tmp_path / "catalogue" / f"{name}.parquet", row_group_size=groups)
    policy, _ = load_policy(run / "policy")
    stream = CatalogueStream(tmp_path / "catalogue", schema)
    assert stream.starts(700) == [0, 700, 1400, 1700, 2400]
    found = []
    for name, execution in (("one", LOCAL), ("many", BACKWARDS)):
        (tmp_path / name).mkdir()
        found.append(write_vectors(policy, stream, tmp_path / name, chunk=700, execution=execution))
        files = tuple(tmp_path / name / file for file in found[-1].files)
        quantize(files, "int8", tmp_path / name, "int8", execution.mapper)
        ids = tmp_path / name / "ids.arrow"
        source = ParquetSource(files, ids, "vector_db", metadata=stream)
        write_parquet(source, 3000, tmp_path / name / "items", chunk=400, execution=execution)
    assert found[0] == found[1] and found[0].count == 3000
    assert content(tmp_path / "many") == content(tmp_path / "one")
    ids = load_ids(tmp_path / "many" / "ids.arrow", 3000)
    assert ids.to_pylist() == table["item_id"].to_pylist()
    paths = [tmp_path / "one" / name for name in found[0].files]
    assert len(paths) == -(-3000 // part_rows)
    vectors = map_array(paths)
    assert np.array_equal(vectors, np.concatenate([np.load(path) for path in paths]))
    assert vectors.flags.c_contiguous and not (vectors.flags.writeable and part_rows == 1024)
    for path, one in found[0].files.items():
        assert verify_file(tmp_path / "one" / path, one.facts) == ""


def test_a_row_group_is_read_once(
    run: Path, world: SimulatedWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks that end inside a row group do not read it anew."""
    pq.write_table(world.catalogue_table(), tmp_path / "all.parquet", row_group_size=2000)
    policy, _ = load_policy(run / "policy")
    read: list[list[int]] = []
    batches = pq.ParquetFile.iter_batches

    def counted(self: pq.ParquetFile, *args: Any, row_groups: list[int], **kwargs: Any) -> Any:
        read.append(row_groups)
        return batches(self, *args, row_groups=row_groups, **kwargs)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", counted)
    stream = CatalogueStream(tmp_path / "all.parquet", world.catalogue_schema)
    assert write_vectors(policy, stream, tmp_path, chunk=700).count == 3000
    assert read == [[0], [1]]


@pytest.mark.usefixtures("no_graphs")
def test_an_export_in_parts_is_served_like_one_in_one_file(
    run: Path, exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A missing or damaged part is named; exports of format 2, with one file, are read."""
    monkeypatch.setattr(array_files, "PART_ROWS", 1024)
    for dtype in ("int8", "float32"):
        path = export_run(run, replace(PLAIN, dtype=dtype))
        names = read_manifest(path)["vectors"]["files"]
        assert len(names) == 3 and not (path / "vectors.npy").exists()
        Retriever.open(path).search(contexts(run, 5), 3)
    asked = contexts(run, 20)
    one, two = (Retriever.open(p).search(asked, 7, exact=True) for p in (exported, path))
    assert one.item_id == two.item_id
    assert all(np.array_equal(a, b) for a, b in zip(one.score, two.score, strict=True))

    manifest = read_manifest(path)
    manifest.pop("format")
    whole = np.concatenate([np.load(path / name) for name in names])
    np.save(path / "vectors.npy", whole)
    old = {**manifest["vectors"], "file": "vectors.npy"}
    old.pop("files")
    content = {"format": 2, **manifest, "vectors": old}
    content["files"] = {**manifest["files"], **describe_files(path, ["vectors.npy"])}
    write_checked_json(path / "manifest.json", content)
    assert Retriever.open(path).search(asked, 7, exact=True).item_id == two.item_id

    write_manifest(path, manifest)
    part = path / names[1]
    damaged = bytearray(part.read_bytes())
    damaged[-9] ^= 1
    part.write_bytes(damaged)
    with pytest.raises(RunError, match=rf"{names[1]}' is corrupted"):
        Retriever.open(path)
    part.unlink()
    with pytest.raises(RunError, match=rf"{names[1]}' is missing"):
        Retriever.open(path)


def test_ids_are_checked(run: Path, exported: Path) -> None:
    with pytest.raises(RunError, match="expected 5"):
        load_ids(exported / "ids.arrow", 5)
    retriever = Retriever.open(exported)
    assert retriever.numbers_of(["item-5", "nobody"]).tolist() == [5, -1]
    with pytest.raises(OfftowerError, match="are text"):
        retriever.numbers_of([5])
    with pytest.raises(DataError, match="no column"):
        retriever.search(contexts(run).drop_columns(["segment"]), 3)
    everything = pc.cast(retriever.item_ids, pa.string()).to_pylist()
    with pytest.raises(DataError, match="filters leave 0"):
        retriever.sample(contexts(run, 1), 1, exclude=everything)
    assert os.path.exists(exported / "manifest.json")


class Gated(nn.Module):
    """A user's own tower: numbers through a gate, bags and categories by tables of its own."""

    def __init__(self, encoding: FeatureEncoding, output_dim: int, bags: bool = True) -> None:
        super().__init__()
        self.encoding, self.bags = encoding, bags
        self.encoder = FeatureEncoder(encoding, 4)
        self.plain = [s for s in encoding.specs if s.kind in ("numeric", "vector")]
        width = self.encoder.width if bags else sum(s.dim or 1 for s in self.plain)
        self.out, self.gate = nn.Linear(width, output_dim), nn.Linear(width, output_dim)

    def forward(self, features: Any) -> torch.Tensor:
        if self.bags:
            x = self.encoder(features)
        else:
            parts = [features[s.name] for s in self.plain]
            x = torch.cat([p if p.dim() == 2 else p.unsqueeze(1) for p in parts], 1)
        return self.out(x) * torch.sigmoid(self.gate(x))


class Untraceable(Gated):
    """Looks at its numbers while it computes, which no tracer can follow."""

    def forward(self, features: Any) -> torch.Tensor:
        out = super().forward(features)
        return out if float(out.sum()) > 1e9 else 2.0 * out


def own_tower(run: Path, kind: str, **arguments: Any) -> ContextTower:
    policy, _ = load_policy(run / "policy")
    config = copy.deepcopy(policy.config)
    config.context_tower = TowerConfig(module=f"{__name__}:{kind}", arguments=arguments)
    return ContextTower(config, policy.context_encoding, 0.5).eval()


@pytest.mark.parametrize("bags", [False, True])
def test_a_users_own_module_is_traced(run: Path, tmp_path: Path, bags: bool) -> None:
    tower = own_tower(run, "Gated", bags=bags)
    facts = write_graphs(tower, tmp_path, "v", onnx=not bags)
    assert facts["program"] == "context_tower.pt2", facts
    program = torch.export.load(tmp_path / "context_tower.pt2").module()
    for rows in (1, 9):
        inputs = graph_inputs(tower.encoding, contexts(run, rows))
        given = [torch.from_numpy(value) for value in inputs.values()]
        truth = tower.embed(contexts(run, rows))
        np.testing.assert_allclose(program(*given).detach().numpy(), truth, rtol=1e-4, atol=1e-5)
    if not bags:
        assert facts["onnx"] == "context_tower.onnx" and facts["reason"] is None


def test_a_module_that_torch_cannot_export_is_named_with_the_reason(
    run: Path, tmp_path: Path
) -> None:
    facts = write_graphs(own_tower(run, "Untraceable"), tmp_path, "v", onnx=False)
    assert facts["program"] is None and facts["onnx"] is None
    assert f"torch cannot export '{__name__}:Untraceable'" in facts["reason"]
    assert "the Retriever serves it" in facts["reason"].replace("The R", "the R")
    assert [p.name for p in tmp_path.iterdir()] == []
