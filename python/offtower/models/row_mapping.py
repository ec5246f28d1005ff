"""Weights and optimizer state of a policy whose encodings were extended, row by row.

A table of embeddings in the extended policy takes the rows of the values that both policies know
from the earlier one. New values begin with the row of the unknown value, which training has hidden
values behind, and with no state of the optimizer. New items may begin with a prediction of their
id's embedding from their other features instead. All other weights have the same shapes in both.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from offtower.data.encoding import FeatureEncoding
from offtower.models.features import UNKNOWN, FeatureEncoder, FeatureTensors
from offtower.models.items import DEFAULT_CHUNK, ItemFeatures
from offtower.models.policy import TwoTowerPolicy
from offtower.models.towers import MLPBody

Origins = Mapping[tuple[str, str], NDArray[np.int64]]
"""By side ("context", "item") and feature, (rows,) the row in the earlier table of each row; -1 for
new values."""
Start = Literal["features", "unknown"]

_ROW_STATE = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "fresh_at", "sum", "momentum_buffer")
_RIDGE = 1e-3
"""Penalty per row of the regression, relative to the features' mean square."""


def table_weights(policy: TwoTowerPolicy) -> dict[str, tuple[str, str]]:
    """By name of a weight in the policy's state, the side and feature whose values are its rows."""
    found = {}
    for side, tower in (("context", policy.context_tower), ("item", policy.item_tower)):
        for name, module in tower.named_modules():
            if isinstance(module, FeatureEncoder):
                for weight, feature in module.tables_by_weight.items():
                    found[f"{side}_tower.{name}.{weight}"] = (side, feature)
    return found


@torch.no_grad()
def map_weights(policy: TwoTowerPolicy, earlier: TwoTowerPolicy, origins: Origins) -> None:
    """Fill a policy with the weights of an earlier one.

    Args:
        policy: of the same layers; its encodings extend those of `earlier`.
        origins: of the tables whose rows changed.
    """
    tables = table_weights(policy)
    state = policy.state_dict()
    for name, value in earlier.state_dict().items():
        origin = origins.get(tables[name]) if name in tables else None
        if origin is None:
            state[name].copy_(value)
        else:
            state[name].copy_(mapped_rows(value, origin, value[UNKNOWN]))


def mapped_rows(value: Tensor, origin: NDArray[np.int64], fill: Tensor | float) -> Tensor:
    """Rows of `value` by their origins (n,); `fill` where the origin is -1."""
    index = torch.from_numpy(origin).to(value.device)
    rows = value[index.clamp_min(0)]
    new = index < 0
    rows[new] = fill.to(value.dtype) if isinstance(fill, Tensor) else fill
    return rows


def map_optimizer_state(
    state: Mapping[str, Mapping[str, Tensor]], policy: TwoTowerPolicy, origins: Origins
) -> dict[str, dict[str, Tensor]]:
    """The optimizer's state for the weights of an extended policy.

    New rows have moments and sums of zero, as rows that were never updated, and for updates of
    touched rows only they are current at the last step.

    Args:
        state: by name of the parameter.
    """
    tables = table_weights(policy)
    found: dict[str, dict[str, Tensor]] = {}
    for name, values in state.items():
        origin = origins.get(tables[name]) if name in tables else None
        found[name] = dict(values)
        for key, value in values.items() if origin is not None else ():
            if key in _ROW_STATE and value.dim() > 0:
                assert origin is not None
                fill = values["steps"] if key == "fresh_at" else 0.0
                found[name][key] = mapped_rows(value, origin, fill)
    return found


@torch.no_grad()
def start_new_items(
    policy: TwoTowerPolicy, items: ItemFeatures, origins: Origins, chunk: int = DEFAULT_CHUNK
) -> int:
    """Predict the embeddings of new items' ids from the items' other features.

    One ridge regression for each table of ids, fitted on the rows of the items that were known, in
    float64; its mean is that of these rows. Features are those that the tower's layers read.

    Args:
        items: of the whole catalogue, on the CPU.

    Returns:
        Number of rows that were predicted: those of categories of which each item has its own.
    """
    predicted = 0
    mode, device = policy.training, policy.device
    policy.eval().cpu()
    for body in policy.item_tower.bodies:
        if not isinstance(body, MLPBody):
            continue
        for name in _id_features(policy.item_encoding, items, origins):
            table = body.encoder.embedding(name)
            new = np.flatnonzero(origins[("item", name)] < 0)
            if len(new) and _predict_rows(body.encoder, name, table, items, new, chunk):
                predicted += len(new)
    policy.train(mode).to(device)
    return predicted


def _id_features(encoding: FeatureEncoding, items: ItemFeatures, origins: Origins) -> list[str]:
    """Categories of which each item has a value of its own."""
    return [
        spec.name
        for spec in encoding.specs
        if spec.kind == "category"
        and ("item", spec.name) in origins
        and encoding.cardinality(spec.name) - 1 == items.num_items
    ]


def _predict_rows(
    encoder: FeatureEncoder,
    name: str,
    table: nn.Embedding,
    items: ItemFeatures,
    new: NDArray[np.int64],
    chunk: int,
) -> bool:
    is_new = torch.zeros(len(table.weight), dtype=torch.bool)
    is_new[torch.from_numpy(new)] = True
    square: Tensor | None = None
    starts = range(0, items.num_items, chunk)
    parts = [(s, min(s + chunk, items.num_items)) for s in starts]
    for start, stop in parts:
        features = items.slice(start, stop)
        design, code = _design(encoder, name, features), features[name]
        assert isinstance(code, Tensor)
        known = ~is_new[code] & (code != UNKNOWN)
        x, y = design[known], table.weight[code[known]].double()
        if design.shape[1] == 1 or not len(design):
            return False  # Nothing but the constant.
        if square is None:
            square, cross = x.T @ x, x.T @ y
        else:
            square, cross = square + x.T @ x, cross + x.T @ y
    assert square is not None, "a catalogue has at least one item"
    count = float(square[-1, -1])
    if count == 0.0:
        return False
    penalty = _RIDGE * float(square.diagonal()[:-1].mean()) * torch.ones(len(square)).double()
    penalty[-1] = 1e-9 * count
    weights = torch.linalg.solve(square + torch.diag(penalty), cross)
    for start, stop in parts:
        features = items.slice(start, stop)
        code = features[name]
        assert isinstance(code, Tensor)
        there = is_new[code]
        predicted = _design(encoder, name, features)[there] @ weights
        table.weight[code[there]] = predicted.to(table.weight.dtype)
    return True


def _design(encoder: FeatureEncoder, name: str, features: FeatureTensors) -> Tensor:
    """(n, width + 1) float64 features but for one category's embeddings, and a constant."""
    parts = encoder.without(features, name)
    some = features[name]
    one = torch.ones(len(some), 1)
    return torch.cat([*parts, one], dim=1).double()
