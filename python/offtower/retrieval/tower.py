"""The context tower of an export, as offtower serves it; `graphs` writes it for other runtimes.

Its output is the query whose inner product with an item vector is the policy's logit:
u / temperature, and a last coordinate of 1 if items have a bias.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from pydantic import TypeAdapter
from torch import Tensor, nn

from offtower.atomic import write_text
from offtower.checksums import read_json
from offtower.config import PolicyConfig
from offtower.data.encoding import FeatureEncoding, to_tensors
from offtower.errors import RunError
from offtower.imports import check_code
from offtower.models.features import Tables
from offtower.models.histories import ItemTable
from offtower.models.policy import TwoTowerPolicy
from offtower.models.store import load_weights, save_weights
from offtower.models.towers import Tower

_CONFIG: TypeAdapter[PolicyConfig] = TypeAdapter(PolicyConfig)


class ContextTower(nn.Module):
    """Map context features to queries; loads from an export without the item tower.

    Args:
        config: of the policy.
        encoding: of the contexts.
        temperature: divides the embeddings.
        item_dims: width of each member's table of items that histories read, where the policy's is
            the item tower's; this module has a copy of it.
    """

    def __init__(
        self,
        config: PolicyConfig,
        encoding: FeatureEncoding,
        temperature: float,
        item_dims: Sequence[int] = (),
    ) -> None:
        super().__init__()
        self.config, self.encoding = config, encoding
        histories = [spec.name for spec in encoding.specs if spec.history]
        self.item_tables = nn.ModuleList()
        tables: list[Tables] = []
        for dim in item_dims:
            size = encoding.cardinality(histories[0]), dim
            weight = torch.empty(size, dtype=torch.float32, device="cpu")
            table = nn.Embedding(*size, _weight=weight)
            self.item_tables.append(table)
            tables.append(Tables(items=dict.fromkeys(histories, ItemTable(table))))
        self.tower = Tower(encoding, config.embedding_dim, config.context_tower, tables=tables)
        self.register_buffer(
            "scale", torch.tensor(1.0 / temperature, dtype=torch.float32, device="cpu")
        )

    @classmethod
    def of(cls, policy: TwoTowerPolicy) -> ContextTower:
        """Take the context tower of a policy, and fold in its temperature (fixed or learned)."""
        temperature = policy.config.softmax_temperature()
        if policy.config.learn_temperature:
            temperature = float(torch.exp(policy.log_temperature.detach().double()))
        shared = policy.context_tower.shared_tables
        dims = [table.embedding_dim for table in shared]
        tower = cls(policy.config, policy.context_encoding, temperature, dims)
        tower.tower.load_state_dict(policy.context_tower.state_dict())
        for copy, table in zip(tower.item_tables, shared, strict=True):
            copy.load_state_dict(table.state_dict())
        tower.eval()
        return tower

    @property
    def query_dim(self) -> int:
        return self.config.embedding_dim + int(self.config.item_bias)

    def forward(self, features: Any) -> Tensor:
        """Map encoded features of n contexts to (n, D) queries."""
        return self.as_query(self.tower(features)[0])

    def as_query(self, embedding: Tensor) -> Tensor:
        """Map (n, d) context embeddings to (n, D) queries."""
        assert isinstance(self.scale, Tensor)
        query = embedding * self.scale
        if not self.config.item_bias:
            return query
        return torch.cat([query, torch.ones_like(query[:, :1])], dim=1)

    @torch.no_grad()
    def embed(self, contexts: pa.Table) -> np.ndarray:
        """Map n rows of context columns to (n, D) float32 queries."""
        query: np.ndarray = self(to_tensors(self.encoding.encode(contexts))).numpy()
        return query

    def save(self, directory: Path, version: str) -> None:
        """Write weights, architecture and encoding, without pickle."""
        directory.mkdir(parents=True)
        self.encoding.save(directory / "encoding")
        save_weights(directory / "tower.safetensors", self)
        content = {
            "version": version,
            "policy": _CONFIG.dump_python(self.config, mode="json"),
            "item_dims": [table.embedding_dim for table in self.item_tables],
        }
        write_text(directory / "tower.json", json.dumps(content, indent=1, sort_keys=True))

    @classmethod
    def load(cls, directory: Path, version: str, trust_code: Collection[str] = ()) -> ContextTower:
        """Load what `save` wrote.

        Args:
            trust_code: import paths of code that the tower may name, as in `load_policy`.

        Raises:
            UntrustedCodeError: it names other code.
            RunError: a file is missing or damaged, or the tower is of another version.
        """
        path = directory / "tower.json"
        try:
            content = read_json(path)
            check_code(content["policy"], path, trust_code)
            found, config = content["version"], _CONFIG.validate_python(content["policy"])
            item_dims = [int(dim) for dim in content.get("item_dims", ())]
        except RunError:
            raise
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunError(f"'{path}' cannot be read: {error}; export again") from error
        if found != version:
            raise RunError(
                f"the context tower at '{directory}' is of version {found}, the items are of "
                f"{version}: their inner products mean nothing; export again"
            )
        encoding = FeatureEncoding.load(directory / "encoding")
        try:
            tower = cls(config, encoding, 1.0, item_dims)
        except (RuntimeError, MemoryError) as error:
            raise RunError(f"the tower that '{path}' describes cannot be built: {error}") from error
        load_weights(directory / "tower.safetensors", tower)
        tower.eval()
        return tower
