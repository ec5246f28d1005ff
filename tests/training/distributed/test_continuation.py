"""Runs that go on from an earlier one, on two workers and with either strategy."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from offtower.config import Config
from offtower.data import Catalogue
from offtower.data.encoding import to_tensors
from offtower.models.items import ItemFeatures
from offtower.models.store import load_policy
from offtower.training.run import train_run
from offtower.training.workers import SINGLE_PROCESS, Workers
from tests.training.days import Days, log, write_days
from tests.training.distributed.processes import run_workers


def train_all(workers: Workers, configs: list[Config]) -> None:
    for config in configs:
        train_run(config, workers=workers)


def log_probs(run: Path, days: Days) -> Tensor:
    policy, _ = load_policy(run / "policy")
    items = ItemFeatures.from_catalogue(
        Catalogue.open(days.folder / "catalogue-1"), policy.item_encoding
    )
    table = log(50, range(4, 24), range(2, 12), seed=8)
    with torch.no_grad():
        u = policy.embed_contexts(to_tensors(policy.context_encoding.encode(table))).double()
        v = policy.embed_items(items)
        assert v.bias is not None
        return torch.log_softmax(u @ v.embedding.double().T + v.bias, 1)


def test_two_workers_go_on_as_one_does(tmp_path: Path) -> None:
    """From a run on one process, and once more from a run on two."""
    days, runs = write_days(tmp_path / "days"), tmp_path / "runs"
    train_run(days.config(0, runs))

    def chain(strategy: str, name: str) -> list[Config]:
        more = (f"training.strategy={strategy}", "training.epochs=1")
        first = days.config(1, runs, f"name={name}-1", *more)
        again = (f"incremental.from_run={runs / f'{name}-1'}", "seed=9")
        return [first, days.config(1, runs, f"name={name}-2", *more, *again)]

    train_all(SINGLE_PROCESS, chain("replicated", "one"))
    both = [chain("replicated", "replicated")[0], *chain("item_sharded", "item_sharded")]
    run_workers(2, train_all, both)
    for config in both:
        expected = log_probs(runs / f"one-{config.name[-1]}", days)
        found = log_probs(config.run_directory, days)
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-4)
