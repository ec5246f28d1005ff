"""What is fuzzed: a target takes a random generator and a scratch folder, and raises on a fault."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import torch
import yaml

from offtower.config import load_config
from offtower.data import Catalogue, ParquetLog, write_catalogue, write_log
from offtower.data.ingest import IngestSource, ingest_files
from offtower.data.schema import CatalogueSchema, LogSchema
from offtower.errors import OfftowerError, OperatorError
from offtower.ops import (
    DenseReward,
    FactoredReward,
    available_backends,
    partial_terms,
    policy_terms,
    top_k,
)

Target = Callable[[np.random.Generator, Path], None]

SCHEMA = LogSchema.from_dict(
    {
        "context": [
            {"name": "age", "kind": "numeric"},
            {"name": "country", "kind": "category"},
            {"name": "tags", "kind": "bag"},
            {"name": "image", "kind": "vector", "dim": 2},
        ],
        "pscore": "pscore",
        "timestamp": "time",
        "user_id": "user",
    }
)
ITEMS = ["a", "b", "c", "7"]


def shapes(rng: np.random.Generator, folder: Path) -> None:
    """Operators on random shapes, types, strides and values: a right result or OperatorError."""
    rows, items, dim = (int(rng.choice([0, 1, 2, 3, 17, 130])) for _ in range(3))
    dtype = _pick(rng, [torch.float32, torch.bfloat16, torch.float64, torch.float16], [6, 3, 2, 1])
    u = _matrix(rng, rows, dim if rng.random() < 0.95 else dim + 1, dtype)
    v = _matrix(rng, items, dim, dtype if rng.random() < 0.95 else torch.float32)
    low, high = (0, max(items, 1)) if rng.random() < 0.9 else (-2, items + 2)
    action = torch.as_tensor(rng.integers(low, high, rows if rng.random() < 0.95 else rows + 1))
    if rng.random() < 0.05:
        action = action.to(torch.int32)
    bias = _matrix(rng, 1, items, dtype)[0] if rng.random() < 0.5 else None
    reward = _reward(rng, rows, items, dtype)
    temperature = float(_pick(rng, [1.0, 0.1, 30.0, 0.0, -1.0, float("nan")], [9, 3, 3, 1, 1, 1]))
    backend = _pick(rng, [*available_backends(), "auto"])
    entropy = bool(rng.random() < 0.5)
    leaves = [x.requires_grad_() for x in (u, v, bias) if x is not None and x.is_floating_point()]
    options = {"temperature": temperature, "item_bias": bias, "backend": backend}
    try:
        terms = policy_terms(u, v, action, reward_model=reward, entropy=entropy, **options)
        terms.log_prob.sum().backward()
        partial_terms(u, v, action, reward_model=reward, **options)
        scores, found = top_k(u, v, int(rng.integers(0, items + 3)), **options)
    except OperatorError:
        return
    assert rows >= 0 and items > 0 and dim > 0
    log_prob = terms.log_prob.detach().double()
    logits = u.detach().double() @ v.detach().double().T / temperature
    if bias is not None:
        logits = logits + bias.detach().double()
    if not bool(torch.isfinite(logits).all()):
        return
    truth = torch.log_softmax(logits, 1).gather(1, action[:, None])[:, 0]
    scale = 1.0 + logits.abs().max().item() if logits.numel() else 1.0
    assert torch.allclose(log_prob, truth, rtol=1e-3, atol=1e-4 * scale), (log_prob, truth)
    assert ((found >= 0) & (found < items)).all()
    picked = logits.gather(1, found)
    assert torch.allclose(scores.double(), picked, rtol=1e-3, atol=1e-4 * scale)
    for leaf in leaves:
        assert leaf.grad is None or leaf.grad.shape == leaf.shape


def _matrix(rng: np.random.Generator, rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """Random values, sometimes huge or not finite, with random strides."""
    values = rng.standard_normal((rows, columns)) * float(_pick(rng, [1.0, 1e-4, 30.0], [6, 1, 1]))
    if values.size and rng.random() < 0.05:
        values.flat[int(rng.integers(values.size))] = _pick(rng, [np.nan, np.inf, 1e30])
    tensor = torch.as_tensor(values).to(dtype)
    kind = rng.integers(4)
    if kind == 1:
        return tensor.T.contiguous().T
    if kind == 2 and columns:
        return torch.cat([tensor, tensor], dim=1)[:, :columns]
    if kind == 3 and rows:
        return torch.cat([tensor, tensor])[:rows]
    return tensor


def _reward(rng: np.random.Generator, rows: int, items: int, dtype: torch.dtype) -> Any:
    kind = rng.integers(4)
    if kind == 0:
        return DenseReward(_matrix(rng, rows, items, dtype))
    if kind == 1:
        width = int(rng.choice([1, 3, 16]))
        link = _pick(rng, ["identity", "sigmoid"])
        return FactoredReward(
            _matrix(rng, rows, width, dtype), _matrix(rng, items, width, dtype), link=link
        )
    return None


def rows(rng: np.random.Generator, folder: Path) -> None:
    """Tables with bad cells: refused by place, or quarantined, and no row is lost or changed."""
    table = _table(rng, int(rng.integers(1, 40)), faults=True)
    pq.write_table(table, folder / "log.parquet", row_group_size=int(rng.integers(1, 50)))
    try:
        source = IngestSource(folder / "log.parquet", SCHEMA)
        summary = ingest_files(source, folder / "out", on_bad_rows="quarantine")
    except OfftowerError as error:
        assert str(error)
        return
    assert summary.rows + summary.quarantined == table.num_rows
    log = ParquetLog.open(folder / "out" / "log")
    assert log.num_rows == summary.rows
    for kept in log.tables():
        if "pscore" in table.column_names:
            scores = kept.column("pscore").to_numpy()
            assert ((scores > 0) & (scores <= 1)).all()
        else:  # A log without propensities.
            assert log.schema.pscore is None and "pscore" not in kept.column_names
        assert np.isfinite(kept.column("reward").to_numpy()).all()


def _table(rng: np.random.Generator, n: int, *, faults: bool) -> pa.Table:
    columns: dict[str, list[Any]] = {
        "action": list(rng.choice(ITEMS, n)),
        "reward": [float(x) for x in rng.random(n) < 0.3],
        "pscore": [float(x) for x in rng.uniform(0.01, 1, n)],
        "time": [1_750_000_000 + 60 * i for i in range(n)],
        "user": [f"u{x}" for x in rng.integers(0, 5, n)],
        "age": [float(x) for x in rng.normal(40, 10, n)],
        "country": list(rng.choice(["FR", "NA", "", "null", "Ω"], n)),
        "tags": [list(rng.choice(["x", "y"], int(rng.integers(0, 3)))) for _ in range(n)],
        "image": [[float(x) for x in rng.normal(size=2)] for _ in range(n)],
    }
    for _ in range(int(rng.integers(0, 4)) if faults else 0):
        name = _pick(rng, list(columns))
        fault = rng.integers(4)
        if fault == 0:
            del columns[name]
            if not columns:
                columns = {"x": [0] * n}
            continue
        place = int(rng.integers(n))
        value = columns[name][place]
        if fault == 1 or value is None:
            columns[name][place] = None
        elif isinstance(value, float):
            columns[name][place] = _pick(rng, [np.nan, np.inf, -1.0, 0.0, 2.0, 1e300, 5e-324])
        elif isinstance(value, list):
            columns[name][place] = _pick(rng, [[], [value[0]] * 9 if value else [], None])
        elif isinstance(value, str):
            columns[name][place] = _pick(rng, ["", " a", "a\n", "\x00", "z" * 2000])
        else:
            columns[name][place] = _pick(rng, [-(2**62), 0, 2**62])
    return pa.table(columns)


def files(rng: np.random.Generator, folder: Path) -> None:
    """Log files whose bytes were changed: read, or refused with the file's name."""
    table = _table(rng, int(rng.integers(1, 30)), faults=False)
    name = _pick(rng, ["log.csv", "log.parquet", "run.yaml"])
    path = folder / name
    if name == "log.csv":
        pa_csv.write_csv(table.drop_columns(["tags", "image"]), path)
    elif name == "log.parquet":
        pq.write_table(table, path, compression=_pick(rng, ["none", "zstd", "snappy"]))
    else:
        content = {"name": "x", "data": {"train": "a", "catalogue": "b"}, "training": {"epochs": 2}}
        path.write_text(yaml.safe_dump(content), encoding="utf-8")
    path.write_bytes(damaged(rng, path.read_bytes()))
    try:
        if name == "run.yaml":
            load_config(path)
        else:
            schema = SCHEMA
            if name == "log.csv":
                schema = LogSchema.from_dict(
                    {
                        **SCHEMA.to_dict(),
                        "context": SCHEMA.to_dict()["context"][:2],
                    }
                )
            ingest_files(IngestSource(path, schema), folder / "out")
    except OfftowerError as error:
        assert str(error)


def damaged(rng: np.random.Generator, content: bytes) -> bytes:
    """Flip bits, cut, insert, or repeat a part."""
    data = bytearray(content)
    for _ in range(int(rng.integers(1, 4))):
        if not data:
            break
        at, kind = int(rng.integers(len(data))), rng.integers(5)
        if kind == 0:
            data[at] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            del data[at:]
        elif kind == 2:
            data[at:at] = rng.bytes(int(rng.integers(1, 9)))
        elif kind == 3:
            del data[at : at + int(rng.integers(1, 20))]
        else:
            data[at:at] = data[at : at + int(rng.integers(1, 20))]
    return bytes(data)


def manifests(rng: np.random.Generator, folder: Path) -> None:
    """JSON manifests of log and catalogue whose values were replaced: an error, never a traceback.

    Digests are not recomputed, so most changes must be refused; the point is how.
    """
    table = _table(rng, 30, faults=False)
    write_log(folder / "log", [table], SCHEMA, rows_per_group=10)
    write_catalogue(folder / "catalogue", pa.table({"item_id": ITEMS}), CatalogueSchema())
    kind = _pick(rng, ["log", "catalogue"])
    path = folder / kind / "_offtower.json"
    if rng.random() < 0.3:
        path.write_bytes(damaged(rng, path.read_bytes()))
    else:
        content = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps(_mutated(rng, content)), encoding="utf-8")
    before = table.num_rows
    try:
        if kind == "log":
            log = ParquetLog.open(folder / "log")
            read = sum(group.num_rows for group in log.tables())
            assert read == before, f"{read} rows of {before} were read without an error"
        else:
            assert Catalogue.open(folder / "catalogue").num_items == len(ITEMS)
    except OfftowerError as error:
        assert str(error)


def _mutated(rng: np.random.Generator, content: Any) -> Any:
    """Replace, remove or rename one random node of a JSON tree."""
    replacement = _pick(
        rng, [None, -1, 2**70, 1e308, "", "../../etc/passwd", "/abs", "\x00", [], {}, True, [[[]]]]
    )
    if isinstance(content, dict) and content and rng.random() < 0.85:
        key = _pick(rng, list(content))
        if rng.random() < 0.15:
            return {k: v for k, v in content.items() if k != key}
        if rng.random() < 0.1:
            return {**content, f"{key}_": content[key]}
        return {**content, key: _mutated(rng, content[key])}
    if isinstance(content, list) and content and rng.random() < 0.85:
        place = int(rng.integers(len(content)))
        return [*content[:place], _mutated(rng, content[place]), *content[place + 1 :]]
    return replacement


def _pick(rng: np.random.Generator, choices: list[Any], weights: list[int] | None = None) -> Any:
    p = None if weights is None else np.array(weights) / sum(weights)
    return choices[int(rng.choice(len(choices), p=p))]


TARGETS: dict[str, Target] = {
    "shapes": shapes,
    "rows": rows,
    "files": files,
    "manifests": manifests,
}


def run_case(target: str, seed: int, folder: Path) -> None:
    """Run one case in an empty folder.

    Raises:
        AssertionError: a wrong result.
        Exception: anything that is not an error for users.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    torch.manual_seed(seed)
    TARGETS[target](np.random.default_rng([seed, sorted(TARGETS).index(target)]), folder)
