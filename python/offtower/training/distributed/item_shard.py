"""One worker's shard of the catalogue, and a policy with id tables of that size.

A table with one row per item (an item id) is not replicated: its rows, gradients and optimizer
state live with the worker that owns the items. Row 0, the value "unknown", is shared.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from offtower.config import PolicyConfig
from offtower.data.features import tensor_of
from offtower.data.rows import EncodedRows
from offtower.errors import ConfigError
from offtower.models.features import UNKNOWN, FeatureEncoder, initial_rows
from offtower.models.items import ItemFeatures
from offtower.models.policy import TwoTowerPolicy
from offtower.models.towers import MLPBody
from offtower.ops import Eligibility
from offtower.prepare import PreparedData
from offtower.training.distributed.sharded_table import ShardedItemTable
from offtower.training.workers import Workers


@dataclass(frozen=True)
class ItemShard:
    """Items start..stop-1 of a catalogue of num_items.

    Attributes:
        items: features, with rows of owned tables numbered within the shard, from 1.
        plain: features in the catalogue's encoding, on the CPU.
        codes: by owned feature, (n,) row of each item in a table of the whole catalogue.
    """

    start: int
    stop: int
    num_items: int
    per_worker: int
    items: ItemFeatures
    plain: ItemFeatures
    codes: dict[str, Tensor]

    @property
    def size(self) -> int:
        return self.stop - self.start

    def local(self, action: Tensor) -> Tensor:
        """Numbers within the shard; -1 for items of other workers."""
        here = (action >= self.start) & (action < self.stop)
        return torch.where(here, action - self.start, -1)

    def eligible(self, rows: EncodedRows, device: torch.device) -> Eligibility | None:
        """The eligible items of rows among the shard's items, numbered within it."""
        if rows.eligible is None:
            return None
        return rows.eligible.on(device).slice_items(self.start, self.stop)


def item_range(num_items: int, rank: int, size: int) -> tuple[int, int]:
    """Items of a worker, equally many for each but the last, as in DTensor's Shard.

    Raises:
        ConfigError: a worker would have no items.
    """
    each = -(-num_items // size)
    if each * (size - 1) >= num_items:
        raise ConfigError(
            f"{num_items} items cannot be spread over {size} workers with {each} each: use fewer "
            "workers, or training.strategy=replicated"
        )
    return rank * each, min((rank + 1) * each, num_items)


def make_shard(config: PolicyConfig, data: PreparedData, workers: Workers) -> ItemShard:
    """Build this worker's shard; collective.

    Tables of a user's tower module are replicated, since the module reads the catalogue's item
    numbers; so are those of a tower with several members.

    Raises:
        ConfigError: a worker would have no items.
    """
    total = data.catalogue.num_items
    start, stop = item_range(total, workers.rank, workers.size)
    plain = data.items.part(start, stop)
    arrays = plain.arrays
    codes: dict[str, Tensor] = {}
    recoded = dict(arrays)
    for spec in data.item_encoding.specs:
        if config.item_tower.module is not None or config.item_tower.members > 1:
            break
        if spec.kind != "category" or spec.encoding == "hash":
            continue
        array = arrays[spec.name]
        assert isinstance(array, np.ndarray), "categories are dense"
        code = tensor_of(array)
        known = code[code != UNKNOWN]
        distinct = len(torch.unique(known))
        # Own a table only if each value of the vocabulary belongs to exactly one item.
        own = torch.tensor([distinct, len(known)], dtype=torch.float64, device="cpu")
        counts = workers.sum(own).tolist()
        if counts != [data.item_encoding.cardinality(spec.name) - 1] * 2:
            continue
        codes[spec.name] = code
        number = torch.arange(1, len(code) + 1, device=code.device)
        recoded[spec.name] = number.masked_fill(code == UNKNOWN, UNKNOWN).numpy()
    return ItemShard(
        start,
        stop,
        total,
        -(-total // workers.size),
        data.items.on_same_device(ItemFeatures(recoded, stop - start, start)),
        plain,
        codes,
    )


def sharded_policy(
    config: PolicyConfig, data: PreparedData, shard: ItemShard, workers: Workers
) -> TwoTowerPolicy:
    """Build the policy of `TwoTowerPolicy(...)` with only the shard's rows of owned tables.

    Histories get the rows of other workers' items from these workers.
    """
    rows = {name: len(code) + 1 for name, code in shard.codes.items()}
    policy = TwoTowerPolicy(config, data.context_encoding, data.item_encoding, item_table_rows=rows)
    for name, table in owned_tables(policy, shard).items():
        encoder = _encoder(policy)
        weight = table.weight
        with torch.no_grad():
            weight[UNKNOWN].zero_()
            seed = encoder.initial_seeds[encoder.table_of(name)]
            weight[1:] = initial_rows(seed, shard.codes[name], weight.shape[1])
        for body in policy.context_tower.bodies:
            if isinstance(body, MLPBody):
                body.encoder.read_items(table, ShardedItemTable(table, shard.codes[name], workers))
    return policy.to(data.device)


def owned_tables(policy: TwoTowerPolicy, shard: ItemShard) -> dict[str, nn.Embedding]:
    """Tables with rows of this worker's items only, by feature."""
    if not shard.codes:
        return {}
    encoder = _encoder(policy)
    found: dict[str, nn.Embedding] = {}
    for name in shard.codes:
        table = encoder.tables[encoder.table_of(name)]
        assert isinstance(table, nn.Embedding)
        found[name] = table
    return found


def owned_weights(policy: TwoTowerPolicy, shard: ItemShard) -> dict[str, str]:
    """Name of each owned weight in the policy's state, by feature."""
    names = {id(parameter): name for name, parameter in policy.named_parameters()}
    return {
        feature: names[id(table.weight)] for feature, table in owned_tables(policy, shard).items()
    }


def owned_table_rows(policy: TwoTowerPolicy, shard: ItemShard) -> dict[str, Tensor]:
    """By name of an owned weight, (n,) the rows of the whole table that this worker has."""
    unknown = torch.tensor([UNKNOWN], dtype=torch.int64, device="cpu")
    return {
        name: torch.cat([unknown, shard.codes[feature]])
        for feature, name in owned_weights(policy, shard).items()
    }


@torch.no_grad()
def fill_from_whole(
    policy: TwoTowerPolicy, whole: TwoTowerPolicy, rows: Mapping[str, Tensor]
) -> None:
    """Fill a sharded policy with the weights of one over the whole catalogue.

    rows: `owned_table_rows`.
    """
    state = policy.state_dict()
    for name, value in whole.state_dict().items():
        state[name].copy_(value[rows[name]] if name in rows else value)


_BLOCK = 262_144
"""Rows of a table that are gathered at a time."""


def whole_policy(
    policy: TwoTowerPolicy, shard: ItemShard, data: PreparedData, workers: Workers
) -> TwoTowerPolicy | None:
    """Gather the policy with tables of the whole catalogue on the first worker; None on others.

    Collective. Rows are gathered in blocks, so the first worker needs memory for the tables once.
    """
    full = (
        TwoTowerPolicy(policy.config, data.context_encoding, data.item_encoding)
        if workers.first
        else None
    )
    names = owned_weights(policy, shard)
    state = policy.state_dict()
    owned = set(names.values())
    if full is not None:
        # Rows of values that no item has keep their initial weights.
        target = full.state_dict()
        for name, value in state.items():
            if name not in owned:
                target[name].copy_(value)
    sizes = [
        stop - start
        for start, stop in (
            item_range(shard.num_items, rank, workers.size) for rank in range(workers.size)
        )
    ]
    for feature, name in names.items():
        if full is not None:
            target[name][UNKNOWN] = state[name][UNKNOWN]
        for first in range(0, max(sizes), _BLOCK):
            counts = [max(0, min(_BLOCK, size - first)) for size in sizes]
            mine = slice(first, first + counts[workers.rank])
            rows = workers.gather(state[name][1:][mine], counts)
            codes = workers.gather(shard.codes[feature][mine], counts)
            if full is not None:
                known = codes != UNKNOWN
                target[name][codes[known]] = rows.cpu()[known]
    if full is not None:
        full.load_state_dict(target)
        full.eval()
    return full


def _encoder(policy: TwoTowerPolicy) -> FeatureEncoder:
    body = policy.item_tower.bodies[0]
    assert isinstance(body, MLPBody), "tables of other modules are not owned"
    return body.encoder
