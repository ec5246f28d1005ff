"""The context tower for other runtimes: ExportedProgram, ONNX and contract.json.

The graph takes features as a log has them and standardizes them itself. Categories arrive as
indices into the vocabularies that contract.json names. A user's own module is traced as it is; if
torch cannot trace it, the manifest holds the reason.
"""

from __future__ import annotations

import io
import json
import logging
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from offtower.atomic import write_text
from offtower.data.columns import as_float_array, as_float_matrix
from offtower.data.encoding import BagTensor, FeatureEncoding
from offtower.data.feature_columns import feature_column
from offtower.data.histories import AGE, DWELL, EVENT
from offtower.data.schema import FeatureSpec
from offtower.errors import MissingExtraError
from offtower.models.features import FeatureTensors
from offtower.models.histories import PaddedHistory
from offtower.models.towers import JoinedBody, MLPBody
from offtower.retrieval.tower import ContextTower

PROGRAM, ONNX, CONTRACT = "context_tower.pt2", "context_tower.onnx", "contract.json"

_AGREES = 1e-4
"""Tolerance for the queries of a traced module, relative to those of the module."""


class _Graph(nn.Module):
    """The tower with plain tensors as inputs and standardization inside."""

    def __init__(self, tower: ContextTower) -> None:
        super().__init__()
        self.tower = tower
        numbers = tower.encoding.numbers()
        for index, spec in enumerate(tower.encoding.specs):
            for part in (spec, *spec.parts):
                if part.kind in ("numeric", "vector"):
                    for what in ("mean", "scale"):
                        value = torch.tensor(
                            numbers[what][part.name], dtype=torch.float64, device="cpu"
                        )
                        self.register_buffer(f"{what}_{index}", value.reshape(-1))

    def forward(self, *inputs: Tensor) -> Tensor:
        features: dict[str, Tensor | BagTensor | PaddedHistory] = {}
        given = iter(inputs)
        for index, spec in enumerate(self.tower.encoding.specs):
            value = next(given)
            features[spec.name] = value
            if spec.kind in ("numeric", "vector"):
                features[spec.name] = self._standardized(value, index)
            elif spec.history:
                columns = {name: next(given) for name in _event_columns(spec)}
                if DWELL in columns:
                    columns[DWELL] = self._standardized(columns[DWELL], index)
                features[spec.name] = PaddedHistory(value, columns)
        body = self.tower.tower.body
        if isinstance(body, MLPBody):
            return self._built_in(body, features)
        for spec in self.tower.encoding.specs:
            padded = features[spec.name]
            if spec.pooled and isinstance(padded, Tensor):
                features[spec.name] = _ragged(padded, {})
            elif isinstance(padded, PaddedHistory) and not isinstance(body, JoinedBody):
                features[spec.name] = _ragged(padded.values, padded.columns)
        query: Tensor = self.tower(features)
        return query

    def _standardized(self, value: Tensor, index: int) -> Tensor:
        mean, scale = getattr(self, f"mean_{index}"), getattr(self, f"scale_{index}")
        standard: Tensor = ((value.double() - mean) / scale).float()
        return standard

    def _built_in(self, body: MLPBody, features: FeatureTensors) -> Tensor:
        """Forward with padded bags: other runtimes have no ragged bags."""
        encoder = body.encoder
        parts = encoder.numbers(features)
        for name, module in encoder.pooled_tables.items():
            value, table = features[name], module.weight
            assert isinstance(value, Tensor)
            if value.dim() == 1:
                parts.append(nn.functional.embedding(value, table))
            else:
                present = (value >= 0).unsqueeze(2).to(table.dtype)
                total = (nn.functional.embedding(value.clamp_min(0), table) * present).sum(1)
                parts.append(total / present.sum(1).clamp_min(1.0))
        output = body.layers(torch.cat(parts, dim=1))
        if self.tower.tower.normalize:
            output = nn.functional.normalize(output, dim=1)
        return self.tower.as_query(output)


def _ragged(padded: Tensor, columns: Mapping[str, Tensor]) -> BagTensor:
    present = padded >= 0
    ends = torch.cumsum(present.sum(1), 0)
    return BagTensor(
        padded[present],
        torch.cat([torch.zeros_like(ends[:1]), ends]),
        {name: column[present] for name, column in columns.items()},
    )


def _event_columns(spec: FeatureSpec) -> list[str]:
    """Columns of a history, in the order of the graph's inputs."""
    named = {AGE: spec.times, EVENT: spec.events, DWELL: spec.dwell}
    return [name for name, column in named.items() if column is not None]


def graph_inputs(encoding: FeatureEncoding, contexts: pa.Table) -> dict[str, np.ndarray]:
    """Encode contexts as inputs of the graph, by input name; bags and histories are padded with
    -1."""
    encoded = encoding.encode(contexts)
    inputs: dict[str, np.ndarray] = {}
    for index, spec in enumerate(encoding.specs):
        value = encoded[spec.name]
        if spec.kind == "numeric":
            numbers = feature_column(spec, contexts.column(spec.source))
            inputs[_input_name(index)] = as_float_array(numbers)
        elif spec.kind == "vector":
            vectors = feature_column(spec, contexts.column(spec.source))
            inputs[_input_name(index)] = as_float_matrix(vectors, spec.dim, spec.name).astype(
                np.float64
            )
        elif spec.kind == "category":
            assert isinstance(value, np.ndarray)
            inputs[_input_name(index)] = value
        else:
            assert not isinstance(value, np.ndarray)
            narrowest = _NARROWEST[spec.kind]
            inputs[_input_name(index)] = _padded(value.values, value.offsets, -1, narrowest)
            for name, column in value.columns.items():
                if name == DWELL:
                    column = encoding.restored(f"{spec.name}/dwell", column)
                inputs[_input_name(index, name)] = _padded(column, value.offsets, 0, narrowest)
    return inputs


_NARROWEST = {"bag": 1, "text": 1, "history": 2}
"""Columns of an input without values; tracers take a dimension of 1 in attention for a constant."""


def _padded(values: np.ndarray, offsets: np.ndarray, filler: int, narrowest: int) -> np.ndarray:
    """(n, w) with the values of each row from the left."""
    length = np.diff(offsets)
    shape = len(length), max(narrowest, int(length.max(initial=0)))
    padded = np.full(shape, filler, dtype=values.dtype)
    row = np.repeat(np.arange(len(length)), length)
    padded[row, np.arange(len(values)) - offsets[row]] = values
    return padded


def write_graphs(
    tower: ContextTower, directory: Path, version: str, *, onnx: bool
) -> dict[str, Any]:
    """Write the ExportedProgram, optionally ONNX, and contract.json.

    Graphs of a user's own module are compared with the module on a few rows.

    Returns:
        Names of the files that were written, and the reason why one could not be (a user's own
        module only).

    Raises:
        MissingExtraError: `onnx` is set and its packages are not installed.
    """
    if onnx:
        _need_onnx()
    graph = _Graph(tower).eval()
    facts: dict[str, Any] = {"program": None, "onnx": None, "reason": None}
    facts["reason"] = _attempt(tower, lambda: _write_program(graph, directory / PROGRAM))
    if facts["reason"] is not None:
        (directory / PROGRAM).unlink(missing_ok=True)
        facts["reason"] = (
            f"torch cannot export '{tower.config.context_tower.module}': {facts['reason']}. The "
            "Retriever serves it with the code that defines it; other runtimes cannot"
        )
        return facts
    facts["program"] = PROGRAM
    if onnx:
        facts["reason"] = _attempt(tower, lambda: _write_onnx(graph, directory / ONNX))
        if facts["reason"] is None:
            facts["onnx"] = ONNX
        else:
            (directory / ONNX).unlink(missing_ok=True)
            facts["reason"] = f"no ONNX, only {PROGRAM}: {facts['reason']}"
    write_text(directory / CONTRACT, json.dumps(contract(tower, version), indent=2) + "\n")
    return facts


def _attempt(tower: ContextTower, write: Callable[[], None]) -> str | None:
    """Return why a graph could not be written; failures of built-in towers are raised."""
    if isinstance(tower.tower.body, MLPBody):
        write()
        return None
    try:
        write()
    except Exception as error:  # Tracers and modules raise errors of any type.
        if isinstance(error, OSError) and error.errno is not None:
            raise
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
    return None


def _write_program(graph: _Graph, path: Path) -> None:
    examples, shapes = _examples(graph.tower.encoding, rows=3)
    program = torch.export.export(graph, examples, dynamic_shapes={"inputs": shapes})
    if not isinstance(graph.tower.tower.body, MLPBody):
        for rows in (1, 5):
            inputs, _ = _examples(graph.tower.encoding, rows)
            own, traced = graph(*inputs), program.module()(*inputs)
            if not torch.allclose(own, traced, rtol=_AGREES, atol=_AGREES):
                raise ValueError(f"the traced graph gives other queries for {rows} rows")
    # Sample inputs would be stored as a pickle, and nobody needs them.
    program.example_inputs = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Through memory: on a full disk torch's file writer aborts the process.
        buffer = io.BytesIO()
        torch.export.save(program, buffer)
    path.write_bytes(buffer.getbuffer())


def contract(tower: ContextTower, version: str) -> dict[str, Any]:
    """Describe the inputs and the output of the graph."""
    inputs = []
    for index, spec in enumerate(tower.encoding.specs):
        entry: dict[str, Any] = {
            "input": _input_name(index),
            "feature": spec.name,
            "column": spec.source,
            "kind": spec.kind,
        }
        if spec.kind == "numeric":
            entry |= {"dtype": "float64", "shape": ["rows"], "value": "the number as it is"}
        elif spec.kind == "vector":
            entry |= {"dtype": "float64", "shape": ["rows", spec.dim], "value": "as it is"}
        else:
            shape = ["rows"] if spec.kind == "category" else ["rows", f"longest {spec.kind}"]
            entry |= {"dtype": "int64", "shape": shape, "unknown": 0, "encoding": spec.encoding}
            if spec.pooled or spec.history:
                entry["padding"] = -1
            if spec.history:
                entry["events"] = f"the newest {spec.most_events}, from the oldest to the newest"
            if spec.encoding == "vocabulary":
                entry["value"] = "1 + the value's index in the vocabulary; 0 if it has none"
                entry["vocabulary"] = "encoding/encoding.json names the Parquet file, column value"
            elif spec.kind == "text":
                entry["value"] = "tokens hashed as offtower.data.texts describes, one a column"
                entry |= {"buckets": spec.buckets, "tokens": spec.tokens or "subwords"}
            else:
                entry["value"] = (
                    "1 + (splitmix64 chain of the value xor crc32(feature)) mod buckets"
                )
                entry["buckets"] = spec.buckets
        inputs.append(entry)
        inputs += [_event_contract(index, spec, name) for name in _event_columns(spec)]
    return {
        "version": version,
        "inputs": inputs,
        "output": {
            "name": "query",
            "dtype": "float32",
            "shape": ["rows", tower.query_dim],
            "meaning": "its inner product with an item vector is the policy's logit",
        },
    }


def _event_contract(index: int, spec: FeatureSpec, name: str) -> dict[str, Any]:
    """Describe the input with a column of a history."""
    column, dtype, value = {
        AGE: (
            spec.times,
            "float64",
            "time from the event to the request, in seconds or in the unit of numeric times",
        ),
        EVENT: (spec.events, "int64", "1 + the value's index in the vocabulary; 0 if it has none"),
        DWELL: (spec.dwell, "float64", "the number as it is"),
    }[name]
    return {
        "input": _input_name(index, name),
        "feature": spec.name,
        "column": column,
        "kind": spec.kind,
        "dtype": dtype,
        "shape": ["rows", "longest history"],
        "padding": 0,
        "value": value,
    }


def _need_onnx() -> None:
    for package in ("onnx", "onnxscript"):
        try:
            __import__(package)
        except ImportError:
            raise MissingExtraError(
                package, "onnx", "export of the context tower as ONNX"
            ) from None


def _write_onnx(graph: _Graph, path: Path) -> None:
    examples, shapes = _examples(graph.tower.encoding, rows=3)
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                graph,
                examples,
                dynamo=True,
                verbose=False,
                dynamic_shapes={"inputs": shapes},
                input_names=_input_names(graph.tower.encoding),
                output_names=["query"],
            )
            assert program is not None
            program.save(str(path), external_data=False)
    finally:
        logger.setLevel(before)


def _examples(
    encoding: FeatureEncoding, rows: int
) -> tuple[tuple[Tensor, ...], tuple[dict[int, Any], ...]]:
    """Seeded random inputs of `rows` contexts, and their dynamic dimensions."""
    generator = torch.Generator().manual_seed(rows)
    number_of_rows = torch.export.Dim("rows", min=1)
    tensors: list[Tensor] = []
    shapes: list[dict[int, Any]] = []
    for index, spec in enumerate(encoding.specs):
        shape: dict[int, Any] = {0: number_of_rows}
        if spec.kind == "numeric":
            tensors.append(
                torch.randn(rows, generator=generator, dtype=torch.float64, device="cpu")
            )
        elif spec.kind == "vector":
            assert spec.dim is not None
            tensors.append(
                torch.randn(rows, spec.dim, generator=generator, dtype=torch.float64, device="cpu")
            )
        else:
            size = encoding.cardinality(spec.name)
            wanted = (rows,) if spec.kind == "category" else (rows, 3)
            category = torch.randint(0, size, wanted, generator=generator, device="cpu")
            if spec.kind != "category":
                category[0, 1:] = -1
                shape[1] = torch.export.Dim(f"longest_{index}", min=_NARROWEST[spec.kind])
            tensors.append(category)
            for name in _event_columns(spec):
                shapes.append(shape)
                numbers = torch.rand(rows, 3, generator=generator, dtype=torch.float64)
                if name == EVENT:
                    kinds = encoding.cardinality(f"{spec.name}/events")
                    numbers = (numbers * kinds).long()
                tensors.append(numbers.masked_fill(category < 0, 0))
        shapes.append(shape)
    return tuple(tensors), tuple(shapes)


def _input_names(encoding: FeatureEncoding) -> list[str]:
    return [
        _input_name(index, name)
        for index, spec in enumerate(encoding.specs)
        for name in ("", *_event_columns(spec))
    ]


def _input_name(index: int, column: str = "") -> str:
    """Name of a graph input, which may not hold every character that a feature name may.

    Args:
        column: of a history; empty for the feature's own input.
    """
    return f"feature_{index}_{column}" if column else f"feature_{index}"
