"""Row updates against dense optimizers, in the cases where both must agree."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from offtower.config import TowerConfig
from offtower.errors import ConfigError
from offtower.models.optimizer import clip_gradients, finish_updates, make_optimizer
from offtower.models.table_optimizer import LazyAdamW, RowwiseAdagrad
from tests.models.test_items import build

ROWS, DIM = 12, 3


def table(seed: int = 0, *, bag: bool = False) -> nn.Embedding | nn.EmbeddingBag:
    torch.manual_seed(seed)
    layer = nn.EmbeddingBag(ROWS, DIM, mode="mean") if bag else nn.Embedding(ROWS, DIM)
    return layer.double()


def batches(steps: int, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, ROWS, (4,), generator=generator) for _ in range(steps)]


def loss(layer: nn.Module, index: Tensor, step: int) -> Tensor:
    """Depends on the weights, so that a row read too early changes everything after."""
    rows = layer(index) if isinstance(layer, nn.Embedding) else layer(index.view(2, 2))
    return (rows.tanh() * (1.0 + step % 3)).sum() + rows.square().sum()


def run(layer: nn.Module, optimizer: torch.optim.Optimizer, seen: list[Tensor]) -> None:
    for step, index in enumerate(seen):
        optimizer.zero_grad(set_to_none=True)
        loss(layer, index, step).backward()
        optimizer.step()


@pytest.mark.parametrize("bag", [False, True])
def test_without_momentum_lazy_adamw_is_dense_adamw(
    bag: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps touch few rows, so decay and the fading second moment of skipped steps are in it."""
    monkeypatch.setattr(LazyAdamW, "beta1", 0.0)
    one, two = table(bag=bag), table(bag=bag)
    lazy = LazyAdamW([one], 0.05, 0.3)
    dense = torch.optim.AdamW(two.parameters(), lr=0.05, weight_decay=0.3, betas=(0.0, 0.999))
    run(one, lazy, batches(40))
    assert not torch.equal(one.weight, two.weight)
    run(two, dense, batches(40))
    # Rows that were not read since they were touched are behind until updates are finished.
    assert not torch.allclose(one.weight, two.weight)
    finish_updates(lazy)
    torch.testing.assert_close(one.weight, two.weight, rtol=1e-10, atol=1e-12)


def test_with_every_row_in_every_step_lazy_adamw_is_dense_adamw() -> None:
    one, two = table(), table()
    lazy = LazyAdamW([one], 0.05, 0.3)
    dense = torch.optim.AdamW(two.parameters(), lr=0.05, weight_decay=0.3)
    everything = [torch.cat([torch.arange(ROWS), torch.tensor([3, 3])])] * 20
    run(one, lazy, everything)
    run(two, dense, everything)
    torch.testing.assert_close(one.weight, two.weight, rtol=1e-10, atol=1e-12)


def test_rowwise_adagrad_is_adagrad_on_tables_of_width_one() -> None:
    torch.manual_seed(0)
    one = nn.Embedding(ROWS, 1).double()
    two = copy.deepcopy(one)
    by_rows = RowwiseAdagrad([one], 0.1, 0.0)
    dense = torch.optim.Adagrad(two.parameters(), lr=0.1, eps=1e-8)
    run(one, by_rows, batches(30))
    run(two, dense, batches(30))
    torch.testing.assert_close(one.weight, two.weight, rtol=1e-10, atol=1e-12)


def test_rowwise_adagrad_divides_by_the_root_mean_square_and_decays_all_rows() -> None:
    layer = table()
    before = layer.weight.detach().clone()
    optimizer = RowwiseAdagrad([layer], 0.1, 0.5)
    gradients = torch.randn(3, DIM).double()
    for step in range(3):
        optimizer.zero_grad(set_to_none=True)
        (layer(torch.tensor([2])) * gradients[step]).sum().backward()
        optimizer.step()
    finish_updates(optimizer)
    wanted = before * 0.95**3
    row, total = before[2], torch.zeros((), dtype=torch.float64)
    for gradient in gradients:
        total = total + gradient.square().mean()
        row = row * 0.95 - 0.1 * gradient / (total.sqrt() + 1e-8)
    wanted[2] = row
    torch.testing.assert_close(layer.weight.detach(), wanted)


@pytest.mark.parametrize("kind", [LazyAdamW, RowwiseAdagrad])
def test_only_touched_rows_move(kind: type[LazyAdamW]) -> None:
    layer = table()
    before = layer.weight.detach().clone()
    optimizer = kind([layer], 0.1, 0.5)
    run(layer, optimizer, [torch.tensor([1, 4, 4])] * 3)
    moved = (layer.weight != before).any(dim=1).nonzero()[:, 0].tolist()
    assert moved == [1, 4]
    assert layer.weight.grad is not None and layer.weight.grad.is_sparse


@pytest.mark.parametrize("tables", ["lazy_adamw", "rowwise_adagrad"])
def test_a_restored_optimizer_goes_on_with_the_same_bits(tables: str) -> None:
    def fresh() -> tuple[nn.Module, torch.optim.Optimizer]:
        tower, _ = build(TowerConfig(hidden_layer_sizes=(4,), unknown_rate=0.0))
        return tower, make_optimizer("adamw", tower, 0.05, 0.1, tables)  # type: ignore[arg-type]

    _, features = build(TowerConfig(hidden_layer_sizes=(4,)))

    def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            optimizer.zero_grad(set_to_none=True)
            index = torch.tensor([step % 37, (5 * step) % 37])
            embedding, bias = model(features.at(index))
            (embedding.sum() + bias.square().sum()).backward()
            clip_gradients(model.parameters(), 0.5)
            optimizer.step()

    whole, its_optimizer = fresh()
    train(whole, its_optimizer, range(12))
    first, optimizer = fresh()
    train(first, optimizer, range(7))
    second, its_own = fresh()
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    content = its_own.state_dict()
    content["state"] = copy.deepcopy(optimizer.state_dict()["state"])
    its_own.load_state_dict(content)
    train(second, its_own, range(7, 12))
    finish_updates(its_optimizer)
    finish_updates(its_own)
    for one, two in zip(whole.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, two)


def test_the_norm_of_sparse_gradients_counts_a_row_once() -> None:
    sparse, dense = table(), table()
    sparse.sparse = True
    index = torch.tensor([1, 1, 5])
    for layer in (sparse, dense):
        loss(layer, index, 0).backward()
    wanted = float(dense.weight.grad.norm())
    assert float(clip_gradients(sparse.parameters(), 0.1)) == pytest.approx(wanted)
    assert float(clip_gradients(dense.parameters(), 0.1)) == pytest.approx(wanted)
    torch.testing.assert_close(sparse.weight.grad.to_dense(), dense.weight.grad)


def test_a_copied_tower_leaves_the_optimizer_alone() -> None:
    tower, features = build(TowerConfig(hidden_layer_sizes=(4,)))
    optimizer = make_optimizer("adamw", tower, 0.05, 0.1, "lazy_adamw")
    for _ in range(3):
        optimizer.zero_grad(set_to_none=True)
        tower(features.at(torch.tensor([0])))[0].sum().backward()
        optimizer.step()
    copied = copy.deepcopy(tower)
    before = {name: value.clone() for name, value in copied.state_dict().items()}
    copied(features.slice(0, 37))
    for name, value in copied.state_dict().items():
        assert torch.equal(value, before[name])


def test_lazy_adamw_needs_adamw() -> None:
    tower, _ = build(TowerConfig())
    with pytest.raises(ConfigError, match=r"lazy_adamw requires training.optimizer=adamw"):
        make_optimizer("sgd", tower, 0.1, 0.0, "lazy_adamw")
