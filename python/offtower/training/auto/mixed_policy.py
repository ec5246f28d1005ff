"""Policies that hold a generalized linear mixed model of rewards (`mixed_model`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from offtower.data.encoding import FeatureEncoding, tensor_of
from offtower.data.features import CPU
from offtower.data.rows import EncodedRows
from offtower.errors import ConfigError
from offtower.models.items import ItemFeatures
from offtower.models.policy import TwoTowerPolicy
from offtower.models.towers import MLPBody, Tower
from offtower.prepare import PreparedData
from offtower.training.auto.base_measure import LoggedItems, log_base_measure
from offtower.training.auto.folds import NOTHING, Folds
from offtower.training.auto.mixed_model import MixedEffects, MixedRows, fit_mixed_model

MIXED = "regression_mixed"
"""Name of the candidate."""
MAX_CONTEXT_WIDTH = 64
"""Of context features with a constant: a fit takes time and memory by its square."""
MAX_ITEM_NUMBERS = 256


def context_width(data: PreparedData) -> int | None:
    """Number of context features with categories one-hot and a constant; None where the model does
    not apply: to bags and histories, to wide contexts, and to items with bags or many numbers."""
    context, item = data.context_encoding, data.item_encoding
    if any(spec.pooled or spec.history for spec in (*context.specs, *item.specs)):
        return None
    width = _numbers(context) + sum(map(context.cardinality, _categories(context))) + 1
    wide = width > MAX_CONTEXT_WIDTH or _numbers(item) > MAX_ITEM_NUMBERS
    return None if wide or not item.specs else width


def fit_mixed_members(
    policies: Sequence[TwoTowerPolicy],
    folds: Folds,
    rows: EncodedRows,
    items: ItemFeatures,
    *,
    binary: bool,
    logged: LoggedItems | None = None,
) -> None:
    """Set the weights of one policy per fold that is held out; those that see the same rows are
    equal.

    Args:
        rows: as for `fit_mixed_policy`.
        logged: all rows of the log, for base measures; None is `rows`.
    """
    fold = folds.of(rows)
    logged = LoggedItems.of([rows], folds) if logged is None else logged
    whole: TwoTowerPolicy | None = None
    for policy, held_out in zip(policies, folds.held_out, strict=True):
        index = np.flatnonzero(fold != held_out)
        if len(index) == len(rows) and whole is not None:
            policy.load_state_dict(whole.state_dict())
            continue
        some = logged.without(held_out)
        fit_mixed_policy(policy, rows.take(index), items, binary=binary, logged=some)
        whole = policy if len(index) == len(rows) else whole


def fit_mixed_policy(
    policy: TwoTowerPolicy,
    rows: EncodedRows,
    items: ItemFeatures,
    *,
    binary: bool,
    logged: LoggedItems | None = None,
) -> None:
    """Set the weights of a policy with linear towers and an embedding of `context_width` numbers.

    Item biases are no part of the model, whose score is <u, v>. They hold the logarithm of a base
    measure: the item's frequency in the log (`base_measure`) where its id is a feature, and 0
    otherwise. A policy proportional to base x exp(s <u, v>) has its mass where the log has rows, so
    it is both better and easier to evaluate than one that starts from equal shares of all items.

    Args:
        policy: with `tables: output`, no hidden layers and an item bias, on any device.
        rows: in memory; their `row_weight` counts.
        logged: rows of the base measure; None is `rows`.

    Raises:
        ConfigError: there are no rows.
    """
    if len(rows) == 0:
        raise ConfigError("no rows to fit 'regression_mixed' on: remove it from auto.candidates")
    design = _Design.of(rows, items, policy)
    effects = fit_mixed_model(design.rows, binary=binary)
    with torch.no_grad():
        _write_context(policy.context_tower, policy.context_encoding, effects.root)
        _write_items(policy.item_tower, policy.item_encoding, design, effects)
        _write_base(
            policy,
            LoggedItems.of([rows], Folds(2, (NOTHING,), 0)) if logged is None else logged,
            items,
        )


@dataclass(frozen=True)
class _Design:
    """Rows as the model reads them."""

    rows: MixedRows
    values: list[Tensor]
    """Of each category of items, the table's row of each value."""

    @classmethod
    def of(cls, rows: EncodedRows, items: ItemFeatures, policy: TwoTowerPolicy) -> _Design:
        action, item = torch.unique(tensor_of(rows.action), return_inverse=True)
        features = items.at(action)
        numbers = [torch.zeros(len(action), 0)]
        categories: list[Tensor] = []
        values: list[Tensor] = []
        for spec in policy.item_encoding.specs:
            value = features[spec.name]
            assert isinstance(value, Tensor), "bags are not supported"
            value = value.to(CPU)
            if spec.kind == "category":
                used, index = torch.unique(value, return_inverse=True)
                values.append(used)
                categories.append(index)
            else:
                numbers.append(value.reshape(len(action), -1))
        weight = None
        if rows.row_weight is not None and not (rows.row_weight == 1.0).all():
            weight = torch.from_numpy(rows.row_weight).float()
        return cls(
            MixedRows(
                _context(rows, policy.context_encoding),
                item,
                torch.from_numpy(np.asarray(rows.reward, dtype=np.float32)),
                weight,
                torch.cat(numbers, dim=1),
                categories,
            ),
            values,
        )


def _context(rows: EncodedRows, encoding: FeatureEncoding) -> Tensor:
    """(n, p) float32: numbers, categories one-hot, a constant."""
    numbers: list[Tensor] = []
    categories: list[Tensor] = []
    for spec in encoding.specs:
        value = rows.context[spec.name]
        assert isinstance(value, np.ndarray), "bags are not supported"
        if spec.kind == "category":
            size = encoding.cardinality(spec.name)
            categories.append(nn.functional.one_hot(torch.from_numpy(value), size).float())
        else:
            numbers.append(torch.from_numpy(value).float().reshape(len(rows), -1))
    return torch.cat([*numbers, *categories, torch.ones(len(rows), 1)], dim=1)


def _write_context(tower: Tower, encoding: FeatureEncoding, root: Tensor) -> None:
    """u = root' x."""
    root = root.to(next(tower.parameters()).device)
    body = _body(tower)
    numbers = _numbers(encoding)
    tables = [body.encoder.tables[body.encoder.table_of(name)] for name in _categories(encoding)]
    start = numbers
    for table in tables:
        assert isinstance(table, nn.Embedding)
        table.weight.copy_(root[start : start + len(table.weight)])
        start += len(table.weight)
    _write_constant(body, tables, root[:numbers].T, root[-1])


def _write_items(
    tower: Tower, encoding: FeatureEncoding, design: _Design, effects: MixedEffects
) -> None:
    """v = constant + numbers' v_a + the effects of the categories' values; biases are 0."""
    device = next(tower.parameters()).device
    body = _body(tower)
    tables = [body.encoder.tables[body.encoder.table_of(name)] for name in _categories(encoding)]
    for table, used, effect in zip(tables, design.values, effects.categories, strict=True):
        assert isinstance(table, nn.Embedding)
        table.weight.zero_()
        table.weight[used.to(device)] = _with_bias(effect).to(device)
    _write_constant(
        body,
        tables,
        _with_bias(effects.numbers).T.to(device),
        _with_bias(effects.constant[None])[0].to(device),
    )


def _write_base(policy: TwoTowerPolicy, logged: LoggedItems, items: ItemFeatures) -> None:
    """Set the biases of a category of ids to the logarithms of the base measure."""
    encoding = policy.item_encoding
    name = next(
        (n for n in _categories(encoding) if encoding.cardinality(n) > items.num_items / 2), None
    )
    if name is None:
        return
    body = _body(policy.item_tower)
    table = body.encoder.tables[body.encoder.table_of(name)]
    assert isinstance(table, nn.Embedding)
    action, index = np.unique(logged.action, return_inverse=True)
    value = items.at(tensor_of(action))[name]
    assert isinstance(value, Tensor), "bags are not supported"
    base = log_base_measure(
        value.to(CPU).numpy()[index], logged.pscore.astype(np.float64), len(table.weight)
    )
    table.weight[:, -1] = torch.from_numpy(base).to(table.weight)


def _write_constant(
    body: MLPBody, tables: list[nn.Module], weight: Tensor, constant: Tensor
) -> None:
    """Set the linear layer, or add the constant to all rows of a table where there is none."""
    if len(body.layers):
        layer = body.layers[-1]
        assert isinstance(layer, nn.Linear)
        layer.weight.copy_(weight)
        layer.bias.copy_(constant)
        return
    table = tables[0]
    assert isinstance(table, nn.Embedding)
    table.weight.add_(constant)


def _with_bias(effect: Tensor) -> Tensor:
    return torch.cat([effect, effect.new_zeros(len(effect), 1)], dim=1)


def _body(tower: Tower) -> MLPBody:
    (body,) = tower.bodies
    assert isinstance(body, MLPBody), "a linear tower"
    return body


def _numbers(encoding: FeatureEncoding) -> int:
    return sum(
        1 if spec.kind == "numeric" else (spec.dim or 1)
        for spec in encoding.specs
        if spec.kind in ("numeric", "vector")
    )


def _categories(encoding: FeatureEncoding) -> list[str]:
    return [spec.name for spec in encoding.specs if spec.kind == "category"]
