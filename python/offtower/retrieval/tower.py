"""The context tower of an export: for offtower, and for others as ExportedProgram and ONNX.

Its output is the query whose plain inner product with an item vector is the policy's logit:
u / temperature, and a last coordinate of 1 where items have a bias.

The graph takes features as a log has them, so that no serving code must repeat how they are
standardised; only categories arrive as numbers, by the vocabularies that contract.json names.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from offtower.atomic import write_text
from offtower.config import PolicyConfig
from offtower.data.columns import as_float_array, as_float_matrix
from offtower.data.encoding import FeatureEncoding, to_tensors
from offtower.errors import MissingExtraError, RunError
from offtower.models.policy import TwoTowerPolicy
from offtower.models.store import load_weights, save_weights
from offtower.models.towers import MLPBody, Tower

_CONFIG: TypeAdapter[PolicyConfig] = TypeAdapter(PolicyConfig)

PROGRAM, ONNX, CONTRACT = "context_tower.pt2", "context_tower.onnx", "contract.json"


class ContextTower(nn.Module):
    """Context features -> query; loads from an export without the policy's item side."""

    def __init__(self, config: PolicyConfig, encoding: FeatureEncoding, temperature: float) -> None:
        super().__init__()
        self.config, self.encoding = config, encoding
        self.tower = Tower(encoding, config.embedding_dim, config.context_tower)
        self.register_buffer("scale", torch.tensor(1.0 / temperature))

    @classmethod
    def of(cls, policy: TwoTowerPolicy) -> ContextTower:
        """The context side of a policy, its temperature (fixed or learned) folded in."""
        temperature = policy.config.temperature
        if policy.config.learn_temperature:
            temperature = float(torch.exp(policy.log_temperature.detach().double()))
        tower = cls(policy.config, policy.context_encoding, temperature)
        tower.tower.load_state_dict(policy.context_tower.state_dict())
        tower.eval()
        return tower

    @property
    def query_dim(self) -> int:
        return self.config.embedding_dim + int(self.config.item_bias)

    def forward(self, features: Any) -> Tensor:
        """Encoded features of n contexts -> (n, D) queries."""
        embedding = self.tower(features)[0] * self.scale
        if not self.config.item_bias:
            return embedding
        return torch.cat([embedding, torch.ones_like(embedding[:, :1])], dim=1)

    @torch.no_grad()
    def embed(self, contexts: pa.Table) -> np.ndarray:
        """Context columns of n rows -> (n, D) float32 queries."""
        query: np.ndarray = self(to_tensors(self.encoding.encode(contexts))).numpy()
        return query

    def save(self, directory: Path, version: str) -> None:
        """Weights, architecture and encoding, no pickle."""
        directory.mkdir(parents=True)
        self.encoding.save(directory / "encoding")
        save_weights(directory / "tower.safetensors", self)
        content = {"version": version, "policy": _CONFIG.dump_python(self.config, mode="json")}
        write_text(directory / "tower.json", json.dumps(content, indent=1, sort_keys=True))

    @classmethod
    def load(cls, directory: Path, version: str) -> ContextTower:
        """What `save` wrote.

        Raises:
            RunError: a file is missing or damaged, or the tower is of another version.
        """
        path = directory / "tower.json"
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            found, config = content["version"], _CONFIG.validate_python(content["policy"])
        except (OSError, ValueError, KeyError, TypeError, ValidationError) as error:
            raise RunError(f"the context tower at '{directory}' cannot be read: {error}") from error
        if found != version:
            raise RunError(
                f"the context tower at '{directory}' is of version {found}, the items are of "
                f"{version}: their inner products mean nothing; export again"
            )
        tower = cls(config, FeatureEncoding.load(directory / "encoding"), 1.0)
        load_weights(directory / "tower.safetensors", tower)
        tower.eval()
        return tower


class _Graph(nn.Module):
    """The tower as other runtimes take it: plain tensors in, standardisation inside."""

    def __init__(self, tower: ContextTower) -> None:
        super().__init__()
        self.tower = tower
        self.names: list[str] = []
        body = tower.tower.body
        assert isinstance(body, MLPBody)
        numbers = tower.encoding.numbers()
        for place, spec in enumerate(tower.encoding.specs):
            self.names.append(spec.name)
            if spec.kind in ("numeric", "vector"):
                for what in ("mean", "scale"):
                    value = torch.tensor(numbers[what][spec.name], dtype=torch.float64)
                    self.register_buffer(f"{what}_{place}", value.reshape(-1))

    def forward(self, *inputs: Tensor) -> Tensor:
        body = self.tower.tower.body
        assert isinstance(body, MLPBody)
        encoder = body.encoder
        parts: dict[str, Tensor] = {}
        for place, (spec, value) in enumerate(zip(self.tower.encoding.specs, inputs, strict=True)):
            if spec.kind in ("numeric", "vector"):
                wide = value.double() if spec.kind == "vector" else value.double().unsqueeze(1)
                mean, scale = getattr(self, f"mean_{place}"), getattr(self, f"scale_{place}")
                parts[spec.name] = ((wide - mean) / scale).float()
                continue
            table = encoder.tables[encoder._table_of[spec.name]].weight
            assert isinstance(table, Tensor)
            if spec.kind == "category":
                parts[spec.name] = nn.functional.embedding(value, table)
            else:
                present = (value >= 0).unsqueeze(2).to(table.dtype)
                total = (nn.functional.embedding(value.clamp_min(0), table) * present).sum(1)
                parts[spec.name] = total / present.sum(1).clamp_min(1.0)
        order = [*encoder.plain, *encoder._table_of]
        output = body.layers(torch.cat([parts[name] for name in order], dim=1))
        if self.tower.tower.normalize:
            output = nn.functional.normalize(output, dim=1)
        output = output * self.tower.scale
        if self.tower.config.item_bias:
            output = torch.cat([output, torch.ones_like(output[:, :1])], dim=1)
        return output


def graph_inputs(encoding: FeatureEncoding, contexts: pa.Table) -> dict[str, np.ndarray]:
    """What the graph takes for these contexts, by input name; bags are padded with -1."""
    encoded = encoding.encode(contexts)
    inputs: dict[str, np.ndarray] = {}
    for place, spec in enumerate(encoding.specs):
        value = encoded[spec.name]
        if spec.kind == "numeric":
            inputs[_input_name(place)] = as_float_array(contexts.column(spec.source))
        elif spec.kind == "vector":
            inputs[_input_name(place)] = as_float_matrix(
                contexts.column(spec.source), spec.dim, spec.name
            )
        elif spec.kind == "category":
            assert isinstance(value, np.ndarray)
            inputs[_input_name(place)] = value
        else:
            assert not isinstance(value, np.ndarray)
            length = np.diff(value.offsets)
            # One column at least: an array without columns has no item to be padded.
            padded = np.full((len(length), max(1, int(length.max(initial=0)))), -1, dtype=np.int64)
            row = np.repeat(np.arange(len(length)), length)
            padded[row, np.arange(len(value.values)) - value.offsets[row]] = value.values
            inputs[_input_name(place)] = padded
    return inputs


def write_graphs(
    tower: ContextTower, directory: Path, version: str, *, onnx: bool
) -> dict[str, Any]:
    """Write the ExportedProgram, ONNX where asked for, and contract.json.

    Returns:
        facts for the manifest: which files were written, and why one was not.

    Raises:
        MissingExtraError: ONNX is asked for, and its packages are not installed.
    """
    facts: dict[str, Any] = {"program": None, "onnx": None, "reason": None}
    if not isinstance(tower.tower.body, MLPBody):
        facts["reason"] = (
            "the context tower is a module of its own: its inputs are offtower's encoded features, "
            "and the Retriever serves it; export it with the code that defines it"
        )
        return facts
    graph = _Graph(tower).eval()
    examples, shapes = _examples(tower.encoding)
    program = torch.export.export(graph, examples, dynamic_shapes={"inputs": shapes})
    # Sample inputs would be stored as a pickle, and nobody needs them.
    program.example_inputs = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(program, directory / PROGRAM)
    facts["program"] = PROGRAM
    if onnx:
        _write_onnx(graph, examples, shapes, directory / ONNX)
        facts["onnx"] = ONNX
    write_text(directory / CONTRACT, json.dumps(contract(tower, version), indent=2) + "\n")
    return facts


def contract(tower: ContextTower, version: str) -> dict[str, Any]:
    """Inputs and output of the graph, in words and types."""
    inputs = []
    for place, spec in enumerate(tower.encoding.specs):
        entry: dict[str, Any] = {
            "input": _input_name(place),
            "feature": spec.name,
            "column": spec.source,
            "kind": spec.kind,
        }
        if spec.kind == "numeric":
            entry |= {"dtype": "float64", "shape": ["rows"], "value": "the number as it is"}
        elif spec.kind == "vector":
            entry |= {"dtype": "float32", "shape": ["rows", spec.dim], "value": "as it is"}
        else:
            shape = ["rows"] if spec.kind == "category" else ["rows", "longest bag"]
            entry |= {"dtype": "int64", "shape": shape, "unknown": 0, "encoding": spec.encoding}
            if spec.kind == "bag":
                entry["padding"] = -1
            if spec.encoding == "vocabulary":
                entry["value"] = "1 + the value's place in the vocabulary; 0 where it has none"
                entry["vocabulary"] = "encoding/encoding.json names the Parquet file, column value"
            else:
                entry["value"] = (
                    "1 + (splitmix64 chain of the value xor crc32(feature)) mod buckets"
                )
                entry["buckets"] = spec.buckets
        inputs.append(entry)
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


def _write_onnx(graph: nn.Module, examples: Any, shapes: Any, path: Path) -> None:
    for package in ("onnx", "onnxscript"):
        try:
            __import__(package)
        except ImportError:
            raise MissingExtraError(
                package, "onnx", "export of the context tower as ONNX"
            ) from None
    import logging

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
                input_names=[_input_name(place) for place in range(len(examples))],
                output_names=["query"],
            )
            assert program is not None
            program.save(str(path), external_data=False)
    finally:
        logger.setLevel(before)


def _examples(encoding: FeatureEncoding) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
    rows = torch.export.Dim("rows", min=1)
    tensors: list[Tensor] = []
    shapes: list[dict[int, Any]] = []
    for place, spec in enumerate(encoding.specs):
        shape: dict[int, Any] = {0: rows}
        if spec.kind == "numeric":
            tensors.append(torch.zeros(3, dtype=torch.float64))
        elif spec.kind == "vector":
            assert spec.dim is not None
            tensors.append(torch.zeros(3, spec.dim))
        elif spec.kind == "category":
            tensors.append(torch.zeros(3, dtype=torch.int64))
        else:
            tensors.append(torch.full((3, 2), -1, dtype=torch.int64))
            shape[1] = torch.export.Dim(f"longest_{place}", min=1)
        shapes.append(shape)
    return tuple(tensors), tuple(shapes)


def _input_name(place: int) -> str:
    """Feature names may hold what graph inputs may not; contract.json says which is which."""
    return f"feature_{place}"
