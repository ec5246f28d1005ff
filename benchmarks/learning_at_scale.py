"""True value of a policy against seconds of training, with a million items.

A simulated world with known expected rewards logs 100,000 rows over 1,000,000 items. Exact terms,
sampled terms with each proposal, regression and, if installed, the two towers of torch-rechub train
on that log with the same towers, batch size and learning rate. The clock stops while the exact
value of the policy is computed on the same contexts for all.

    python benchmarks/learning_at_scale.py --methods exact:180 torch-eager:180 uniform frequency \\
        in_batch mixed top_k regression torch-rechub --seconds 20 --json learning.json \\
        --figure learning.png

`torch-eager` is the same model and objective in plain torch, which materializes the (rows, items)
logits. Results are added to those in the JSON file, so that methods can run one at a time.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from offtower import ops
from offtower.config import Config, parse_config
from offtower.data.catalogue import Catalogue
from offtower.data.encoding import to_tensors
from offtower.data.log import TableLog
from offtower.data.simulate import LoggingPolicy, SimulatedWorld, WorldSettings
from offtower.models import TwoTowerPolicy
from offtower.models.items import ItemEmbeddings
from offtower.prepare import PreparedData, prepare
from offtower.progress import Progress
from offtower.training.run import build_trainer

SAMPLED = ("uniform", "frequency", "in_batch", "mixed", "top_k")
METHODS = ("exact", "torch-eager", *SAMPLED, "regression", "torch-rechub")
WIDTH, HIDDEN = 16, 64


class BudgetSpent(Exception):
    """The budget of training seconds is spent."""


class Task:
    """A world, its log, and the true value of a policy given by its embeddings."""

    def __init__(self, items: int, rows: int, contexts: int) -> None:
        self.world = SimulatedWorld(
            items, WorldSettings(WIDTH, WIDTH, WIDTH), logging=LoggingPolicy("popularity")
        )
        table = pa.concat_tables(self.world.log(rows, seed=1))
        log = TableLog(table, self.world.log_schema)
        catalogue = Catalogue(
            self.world.catalogue_table(), self.world.catalogue_schema, "learning at scale"
        )
        self.data: PreparedData = prepare(log, None, catalogue, Progress())
        self.contexts = self.world.contexts(contexts, seed=77)
        wide = self.world.reward_model(self.contexts)
        assert wide.item_bias is not None
        self._q = ops.FactoredReward(
            wide.context.float(), wide.item.float(), wide.item_bias.float(), link="sigmoid"
        )

    def baselines(self) -> dict[str, float]:
        return {
            "logging": float(self.world.logging_rewards(self.contexts.slice(0, 64)).mean()),
            "uniform": float(self.world.uniform_rewards(self.contexts.slice(0, 64)).mean()),
            "best": float(self.world.best_rewards(self.contexts).mean()),
        }

    @torch.no_grad()
    def value(self, u: Tensor, v: Tensor, bias: Tensor | None = None) -> dict[str, float]:
        """Return the values of the softmax policy and of its greedy policy."""
        first = torch.zeros(len(u), dtype=torch.int64)
        terms = ops.policy_terms(u, v, first, item_bias=bias, reward_model=self._q)
        best = ops.top_k(u, v, 1, item_bias=bias)[1][:, 0]
        assert terms.expected_reward is not None
        return {
            "value": float(terms.expected_reward.mean()),
            "greedy": float(self.world.expected_reward(self.contexts, best.numpy()).mean()),
        }


class Clock(Progress):
    """Count training seconds without measurements; raise `BudgetSpent` at the end."""

    def __init__(self, seconds: float, points: int, measure: Callable[[], dict[str, float]]):
        self.budget = seconds
        self._due = [seconds * (i / points) ** 2 for i in range(1, points + 1)]
        self._measure = measure
        self.curve: list[dict[str, float]] = []
        self.rows, self._spent = 0, 0.0
        self._since = time.perf_counter()

    def advance(self, amount: int, note: str = "") -> None:
        self.rows += amount
        now = time.perf_counter()
        self._spent += now - self._since
        if self._due and self._spent >= self._due[0]:
            while self._due and self._spent >= self._due[0]:
                self._due.pop(0)
            point = {"seconds": self._spent, "rows": self.rows, **self._measure()}
            self.curve.append(point)
            print("   ", json.dumps(point), flush=True)
        if not self._due:
            raise BudgetSpent
        self._since = time.perf_counter()


def settings(method: str, dim: int, batch: int, draws: int, rate: float) -> Config:
    tower = {"hidden_layer_sizes": [HIDDEN]}
    sampled = method in SAMPLED
    return parse_config(
        {
            "name": method,
            "data": {"train": "in-memory", "catalogue": "in-memory"},
            "policy": {"embedding_dim": dim, "context_tower": tower, "item_tower": tower},
            "objective": {
                "name": "regression" if method == "regression" else "weighted_likelihood"
            },
            "training": {
                "terms": "sampled" if sampled else "exact",
                "epochs": 1_000_000,
                "batch_size": batch,
                "learning_rate": rate,
                "measure_terms": False,
                "log_every_steps": None,
            },
            "sampling": {"proposal": method, "num_samples": draws} if sampled else {},
        }
    )


def ours(task: Task, config: Config, seconds: float, points: int) -> Clock:
    trainer = build_trainer(config, task.data, None)
    policy: TwoTowerPolicy = trainer.policy
    if config.name == "torch-eager":
        policy.terms = partial(eager_terms, policy.temperature)  # type: ignore[method-assign]

    @torch.no_grad()
    def measure() -> dict[str, float]:
        policy.eval()
        features = policy.context_encoding.encode(task.contexts)
        items = policy.embed_items(task.data.items)
        u = policy.embed_contexts(to_tensors(features)) / policy.temperature
        found = task.value(u, items.embedding, items.bias)
        policy.train()
        return found

    clock = Clock(seconds, points, measure)
    trainer._progress = clock
    with contextlib.suppress(BudgetSpent):
        trainer.fit()
    if trainer.step.proposal is not None:
        trainer.step.proposal.close()
    return clock


def eager_terms(
    temperature: float, u: Tensor, items: ItemEmbeddings, action: Tensor, **unused: Any
) -> ops.PolicyTerms:
    """Compute the terms of likelihood objectives in plain torch."""
    logits = u @ items.embedding.T / temperature  # this model has no item bias
    normalizer = logits.logsumexp(dim=1)
    log_prob = logits.gather(1, action[:, None])[:, 0] - normalizer
    return ops.PolicyTerms(log_prob, normalizer, None, None, None)


def torch_rechub(task: Task, config: Config, seconds: float, points: int) -> Clock:
    """Train torch-rechub's DSSM on rewarded rows, with in-batch sampled softmax, no propensities.

    Its embeddings have norm 1. Training and the evaluated policy divide scores by a temperature.
    """
    from torch_rechub.basic.features import DenseFeature
    from torch_rechub.models.matching import DSSM
    from torch_rechub.trainers import MatchTrainer

    dim, batch = config.policy.embedding_dim, config.training.batch_size
    tower = {"dims": [HIDDEN, dim], "activation": "relu"}
    sides = {side: [DenseFeature(f"{side}{i}") for i in range(WIDTH)] for side in ("user", "item")}
    temperature = 0.1
    model = DSSM(sides["user"], sides["item"], tower, tower, temperature=temperature)
    trainer = MatchTrainer(
        model,
        mode=0,
        in_batch_neg=True,
        n_epoch=1,
        optimizer_params={"lr": config.training.learning_rate},
    )
    log = pa.concat_tables(task.data.train.tables())
    rewarded = log.filter(pa.compute.equal(log["reward"], 1.0))
    items = _vectors(task.data.catalogue.table(0, task.data.catalogue.num_items))
    shown = items[torch.from_numpy(task.data.catalogue.index_of(rewarded["action"]))]
    users = _vectors(rewarded)

    def columns(side: str, values: Tensor) -> dict[str, Tensor]:
        return {f"{side}{i}": values[:, i] for i in range(WIDTH)}

    @torch.no_grad()
    def measure() -> dict[str, float]:
        model.eval()
        model.mode = "item"
        v = torch.cat([model.item_tower(columns("item", part)) for part in items.split(65_536)])
        model.mode = "user"
        u = model.user_tower(columns("user", _vectors(task.contexts)))
        model.mode = None
        model.train()
        return task.value(u.reshape(len(u), -1) / temperature, v.reshape(len(v), -1))

    clock = Clock(seconds, points, measure)
    generator = torch.Generator().manual_seed(0)

    class Rows:
        """One epoch of shuffled batches; advances the clock after each batch."""

        def __len__(self) -> int:
            return len(users) // batch

        def __iter__(self) -> Any:
            for rows in torch.randperm(len(users), generator=generator).split(batch):
                if len(rows) < batch:
                    return
                x = columns("user", users[rows]) | columns("item", shown[rows])
                yield x, torch.ones(batch)
                clock.advance(batch)

    with contextlib.suppress(BudgetSpent), contextlib.redirect_stderr(io.StringIO()):
        while True:
            trainer.train_one_epoch(Rows(), log_interval=1_000_000_000)
    return clock


def _vectors(table: pa.Table) -> Tensor:
    """Return the only vector column of a table, (n, WIDTH)."""
    column = next(c for c in table.columns if pa.types.is_fixed_size_list(c.type))
    flat = column.combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return torch.from_numpy(flat.reshape(-1, WIDTH).copy()).float()


def draw_figure(results: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(10, 4.4), layout="constrained", sharex=True)
    for axes, key, what in zip(
        panels,
        ("value", "greedy"),
        ("the softmax policy", "its greedy policy"),
        strict=True,
    ):
        for name, found in results["methods"].items():
            axes.plot(
                [p["seconds"] for p in found["curve"]],
                [p[key] for p in found["curve"]],
                marker="o",
                markersize=3,
                label=name,
                color="black" if name == "exact" else None,
                linewidth=2.5 if name == "exact" else 1.5,
            )
        axes.axhline(results["baselines"]["logging"], color="gray", linestyle=":", label="logging")
        axes.set_xscale("log")
        axes.set_xlabel("seconds of training")
        axes.set_title(f"true value of {what}", loc="left", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    panels[1].legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.suptitle(f"{results['items']:,} items, {results['rows']:,} logged rows", fontsize=11)
    figure.savefig(path, dpi=120)


def method_and_seconds(text: str) -> tuple[str, float | None]:
    name, _, seconds = text.partition(":")
    if name not in METHODS:
        raise argparse.ArgumentTypeError(f"'{name}' is none of {', '.join(METHODS)}")
    return name, float(seconds) if seconds else None


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--methods",
        nargs="+",
        type=method_and_seconds,
        default=[(name, None) for name in METHODS],
        metavar="NAME[:SECONDS]",
        help=f"of {', '.join(METHODS)}",
    )
    parser.add_argument("--seconds", type=float, default=240.0, help="of training, by default")
    parser.add_argument("--points", type=int, default=8, help="measurements per method")
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--contexts", type=int, default=1000, help="number of evaluation contexts")
    parser.add_argument("--dim", type=int, default=32)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--draws", type=int, default=4096)
    parser.add_argument("--rate", type=float, default=3e-3, help="learning rate")
    parser.add_argument("--json", type=Path, help="results are added to this file")
    parser.add_argument("--figure", type=Path)
    given = parser.parse_args(arguments)
    results: dict[str, Any] = {"methods": {}}
    if given.json is not None and given.json.exists():
        results = json.loads(given.json.read_text())
    task = Task(given.items, given.rows, given.contexts)
    if "baselines" not in results:
        results |= {"items": given.items, "rows": given.rows, "baselines": task.baselines()}
    print(json.dumps(results["baselines"]), flush=True)
    for method, own in given.methods:
        print(method, flush=True)
        seconds = own or given.seconds
        config = settings(method, given.dim, given.batch, given.draws, given.rate)
        learn = torch_rechub if method == "torch-rechub" else ours
        try:
            clock = learn(task, config, seconds, given.points)
        except ImportError as error:
            print(f"    not run: {error}")
            continue
        results["methods"][method] = {
            "budget": seconds,
            "rows_per_second": clock.rows / clock.curve[-1]["seconds"],
            "threads": torch.get_num_threads(),
            "curve": clock.curve,
        }
        if given.json is not None:
            given.json.write_text(json.dumps(results, indent=2))
    if given.figure is not None:
        draw_figure(results, given.figure)


if __name__ == "__main__":
    main()
