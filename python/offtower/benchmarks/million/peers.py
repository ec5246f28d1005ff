"""Learners outside of this package: two towers in plain torch, torch-rechub and implicit.

Each takes (arrays of the log, fresh contexts, clock, seed) and returns float32 embeddings of the
fresh contexts (n, d) and of the items (N, d), and item biases (N,) or None.
"""

from __future__ import annotations

import contextlib
import importlib
import io
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from offtower.benchmarks.million.clock import BudgetSpent, Clock
from offtower.benchmarks.million.world import WIDTH, Arrays, context_matrix
from offtower.benchmarks.peers import Unavailable

Embeddings = tuple[Tensor, Tensor, Tensor | None]
Loss = Literal["regression", "in_batch", "log_q"]

DIM, HIDDEN, BATCH, RATE = 32, 64, 1024, 3e-3
HELD_OUT = 0.05
"""Share of the rows on which the best weights are chosen."""
CHECKS = 10
"""How often they are, in all the time."""
_CHUNK = 1 << 16


class _TwoTowers(nn.Module):
    """A context tower, and an item tower over the vectors, the ids or both."""

    def __init__(self, arrays: Arrays) -> None:
        super().__init__()
        self.context = _tower()
        self.item = None if arrays.item is None else _tower()
        self.ids = nn.Embedding(arrays.items, DIM, sparse=True) if arrays.has_ids else None
        if self.ids is not None:
            nn.init.normal_(self.ids.weight, std=DIM**-0.5 / 4)
        self.level = nn.Parameter(torch.zeros(()))
        self._vectors = arrays.item

    def items(self, number: Tensor) -> Tensor:
        """(m, DIM) embeddings of items (m,)."""
        found = torch.zeros(())
        if self.item is not None and self._vectors is not None:
            found = found + self.item(self._vectors[number])
        return found if self.ids is None else found + self.ids(number)

    def optimizers(self) -> list[torch.optim.Optimizer]:
        dense = [p for name, p in self.named_parameters() if not name.startswith("ids.")]
        found: list[torch.optim.Optimizer] = [torch.optim.AdamW(dense, lr=RATE)]
        if self.ids is not None:
            found.append(torch.optim.SparseAdam(self.ids.parameters(), lr=RATE))
        return found


def two_towers(
    loss: Loss, arrays: Arrays, contexts: pa.Table, clock: Clock, seed: int
) -> Embeddings:
    """Train two towers as tutorials do, without propensities.

    - regression: logistic regression of rewards on all rows.
    - in_batch: softmax over the items of the batch, on rewarded rows.
    - log_q: that with the items' log-frequencies subtracted (Yi et al. 2019, "Sampling-bias-
      corrected neural modeling for large corpus item recommendations").

    The weights with the best loss on held-out rows are returned.
    """
    torch.manual_seed(seed)
    row = torch.arange(len(arrays.reward))
    if loss != "regression":
        row = row[arrays.reward > 0]
    row = row[torch.randperm(len(row))]
    held = max(1, min(20_000, round(HELD_OUT * len(row))))
    held_out, train = row[:held], row[held:]
    count = torch.bincount(arrays.action[train], minlength=arrays.items).double() + 1.0
    log_q = torch.log(count / count.sum()).float()
    model = _TwoTowers(arrays)
    if loss == "regression":
        with torch.no_grad():
            model.level.fill_(torch.logit(arrays.reward[train].mean().clamp(1e-4, 1 - 1e-4)))

    def batch_loss(rows: Tensor) -> Tensor:
        u, v = model.context(arrays.context[rows]), model.items(arrays.action[rows])
        if loss == "regression":
            logit = (u * v).sum(1) + model.level
            return nn.functional.binary_cross_entropy_with_logits(logit, arrays.reward[rows])
        score = u @ v.T
        if loss == "log_q":
            score = score - log_q[arrays.action[rows]]
        same = arrays.action[rows][:, None] == arrays.action[rows]
        same.fill_diagonal_(False)  # a repeat of the shown item is no other item
        score = score.masked_fill(same, float("-inf"))
        return nn.functional.cross_entropy(score, torch.arange(len(rows)))

    @torch.no_grad()
    def held_out_loss() -> float:
        parts = held_out.split(BATCH)
        return sum(float(batch_loss(part)) * len(part) for part in parts) / len(held_out)

    optimizers = model.optimizers()
    best, kept = float("inf"), {}
    due = 1
    for rows in _batches(train):
        spent = clock.spent / clock.seconds
        if spent > due / CHECKS:
            due = int(spent * CHECKS) + 1
            found = held_out_loss()
            if found < best:
                best, kept = found, {k: v.clone() for k, v in model.state_dict().items()}
            if spent > 1.0:
                break
        for optimizer in optimizers:
            optimizer.zero_grad()
        batch_loss(rows).backward()
        for optimizer in optimizers:
            optimizer.step()
        clock.rows += len(rows)
    if kept:
        model.load_state_dict(kept)
    with torch.no_grad():
        number = torch.arange(arrays.items).split(_CHUNK)
        item = torch.cat([model.items(part) for part in number])
        return model.context(context_matrix(contexts)), item, None


def torch_rechub(arrays: Arrays, contexts: pa.Table, clock: Clock, seed: int) -> Embeddings:
    """torch-rechub's DSSM on rewarded rows, with in-batch sampled softmax."""
    features = _import("torch_rechub.basic.features", "torch-rechub")
    models = _import("torch_rechub.models.matching", "torch-rechub")
    trainers = _import("torch_rechub.trainers", "torch-rechub")
    torch.manual_seed(seed)
    tower = {"dims": [HIDDEN, DIM], "activation": "relu"}
    user = [features.DenseFeature(f"user{i}") for i in range(WIDTH)]
    item: list[Any] = []
    if arrays.item is not None:
        item += [features.DenseFeature(f"item{i}") for i in range(WIDTH)]
    if arrays.has_ids:
        item.append(features.SparseFeature("id", vocab_size=arrays.items, embed_dim=DIM))
    temperature = 0.1
    model = models.DSSM(user, item, tower, tower, temperature=temperature)
    trainer = trainers.MatchTrainer(
        model, mode=0, in_batch_neg=True, n_epoch=1, optimizer_params={"lr": RATE}
    )
    rewarded = (arrays.reward > 0).nonzero()[:, 0]

    def of_items(number: Tensor) -> dict[str, Tensor]:
        found = {} if arrays.item is None else _columns("item", arrays.item[number])
        return found | ({"id": number} if arrays.has_ids else {})

    class Rows:
        """Batches until the time is over."""

        def __len__(self) -> int:
            return 1

        def __iter__(self) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
            for rows in _batches(rewarded):
                if clock.over:
                    return
                clock.rows += len(rows)
                x = _columns("user", arrays.context[rows]) | of_items(arrays.action[rows])
                yield x, torch.ones(len(rows))

    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        trainer.train_one_epoch(Rows(), log_interval=1_000_000_000)
    model.eval()
    with torch.no_grad():
        model.mode = "item"
        number = torch.arange(arrays.items).split(_CHUNK)
        v = torch.cat([model.item_tower(of_items(part)).reshape(len(part), -1) for part in number])
        model.mode = "user"
        u = model.user_tower(_columns("user", context_matrix(contexts)))
        return u.reshape(len(u), -1) / temperature, v, None


def implicit_als(arrays: Arrays, contexts: pa.Table, clock: Clock, seed: int) -> Embeddings:
    """implicit's alternating least squares on the rewarded rows of each user."""
    als = _import("implicit.als", "implicit")
    from scipy import sparse

    rewarded = arrays.reward.numpy() > 0
    rows, columns = arrays.user[rewarded], arrays.action.numpy()[rewarded]
    shape = arrays.users, arrays.items
    matrix = sparse.csr_matrix((np.ones(len(rows), dtype=np.float32), (rows, columns)), shape=shape)
    model = als.AlternatingLeastSquares(
        factors=DIM, iterations=1_000_000, random_state=seed, use_gpu=False
    )

    def stop(*unused: Any) -> None:
        if clock.over:
            raise BudgetSpent

    with contextlib.suppress(BudgetSpent):
        model.fit(matrix, show_progress=False, callback=stop)
    users = torch.from_numpy(np.asarray(model.user_factors, dtype=np.float32))
    item = torch.from_numpy(np.asarray(model.item_factors, dtype=np.float32))
    return users[torch.from_numpy(contexts["user_id"].to_numpy().copy())], item, None


def _batches(rows: Tensor) -> Iterator[Tensor]:
    """Shuffled batches of some rows, without end; all are full where there are enough rows."""
    if len(rows) < 2:
        raise Unavailable("the log has fewer than two rows that this method learns from")
    while True:
        for batch in rows[torch.randperm(len(rows))].split(BATCH):
            if len(batch) == BATCH or len(rows) < BATCH:
                yield batch


def _tower() -> nn.Sequential:
    return nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.ELU(), nn.Linear(HIDDEN, DIM))


def _columns(side: str, values: Tensor) -> dict[str, Tensor]:
    return {f"{side}{i}": values[:, i] for i in range(values.shape[1])}


def _import(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise Unavailable(
            f"package '{package}' is not installed ({error}); pip install \"offtower[peers]\""
        ) from None
