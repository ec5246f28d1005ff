"""Comparison of losses and settings for linear two-tower policies on label feedback.

    python benchmarks/experiments/label_methods.py --data PREFIX --json label_methods.json

Plain torch on tokens only, so that a variant takes seconds: the score is the product of summed
token embeddings (divided by the square root of their number) and a label embedding, plus a bias.
Three members with different initial weights train on all rows with AdamW, eight epochs and linear
decay. Reported are true values of greedy policies on test examples: the mean of the members, and
that of the sum of their log-probabilities.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from offtower.benchmarks.quality.labels import LabelSet, as_feedback, label_sets
from offtower.benchmarks.quality.world import QualityWorld
from offtower.models.bag_sums import bag_sums


@dataclass(frozen=True)
class Variant:
    loss: Literal["likelihood", "regression", "squared", "implicit"] = "likelihood"
    power: float = 1.0
    """Rewarded rows have weight min(1 / pscore^power, most)."""
    most: float = 100.0
    unrewarded: float = 0.0
    """Coefficient of -log(1 - pi(a|x)) min(1 / pscore, 3) in rows without reward."""
    alpha: float = 0.1
    """implicit: coefficient of the squared scores of all labels, in rewarded rows."""
    layers: bool = False
    """Whether a linear layer follows each embedding table."""
    dim: int = 64
    decay: float = 0.1
    passes: int = 8
    hidden: float = 0.0
    """Fraction of tokens that are dropped in a step."""


PLAIN = Variant()
IMPLICIT = Variant(loss="implicit", most=10.0, decay=1.0, dim=128)
VARIANTS = {
    "likelihood": PLAIN,
    "likelihood, a linear layer behind each table": replace(PLAIN, layers=True),
    "likelihood, weights to 10": replace(PLAIN, most=10.0),
    "likelihood, 1 / root of pscore": replace(PLAIN, power=0.5),
    "likelihood, no propensities": replace(PLAIN, power=0.0),
    "likelihood, rank 128": replace(PLAIN, dim=128),
    "likelihood, weight decay 1": replace(PLAIN, decay=1.0),
    "likelihood, 4 passes": replace(PLAIN, passes=4),
    "likelihood, 16 passes": replace(PLAIN, passes=16),
    "likelihood, a fifth of the tokens left out": replace(PLAIN, hidden=0.2),
    "likelihood, weights to 10, unrewarded rows too": replace(PLAIN, most=10.0, unrewarded=1.0),
    "regression": replace(PLAIN, loss="regression"),
    "regression, weights to 100": replace(PLAIN, loss="regression", power=1.0, unrewarded=1.0),
    "squares: all labels 0 but for min(1 / pscore, 10) r": replace(PLAIN, loss="squared", most=10),
    "implicit squares": replace(PLAIN, loss="implicit", most=10, decay=1.0),
    "implicit squares, rank 128": IMPLICIT,
    "implicit squares, rank 256": replace(IMPLICIT, dim=256),
    "implicit squares, rank 128, alpha .3": replace(IMPLICIT, alpha=0.3),
    "implicit squares, rank 128, 16 passes": replace(IMPLICIT, passes=16),
    "implicit squares, rank 128, weight decay .1": replace(IMPLICIT, decay=0.1),
    "implicit squares, rank 128, weights to 100": replace(IMPLICIT, most=100.0),
}


class Rows:
    """Token lists of many rows."""

    def __init__(self, table: object) -> None:
        column = table["tokens"].combine_chunks()  # type: ignore[index]
        self.tokens, self.offsets = column.values.to_numpy(), column.offsets.to_numpy()

    def at(self, rows: NDArray[np.int64], left_out: float) -> tuple[Tensor, Tensor]:
        """Return the tokens of some rows and the offsets of each row's tokens."""
        counts = (self.offsets[1:] - self.offsets[:-1])[rows]
        ends = np.concatenate([[0], np.cumsum(counts)])
        index = np.repeat(self.offsets[rows] - ends[:-1], counts) + np.arange(ends[-1])
        if left_out > 0.0:
            kept = torch.rand(len(index)).numpy() >= left_out
            index = index[kept]
            ends = np.concatenate([[0], np.cumsum(kept)])[ends]
        tokens = torch.from_numpy(self.tokens[index].astype(np.int64))
        return tokens, torch.from_numpy(ends.astype(np.int64))


class Policy(nn.Module):
    def __init__(self, tokens: int, labels: int, variant: Variant) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(tokens, variant.dim) * variant.dim**-0.5)
        self.label = nn.Parameter(torch.randn(labels, variant.dim) * variant.dim**-0.5)
        self.bias = nn.Parameter(torch.zeros(labels))
        layer = nn.Linear if variant.layers else nn.Identity
        self.of_context, self.of_label = (
            layer(variant.dim, variant.dim),
            layer(variant.dim, variant.dim),
        )

    def forward(self, tokens: Tensor, offsets: Tensor) -> Tensor:
        count = (offsets[1:] - offsets[:-1]).clamp(min=1).float().unsqueeze(1)
        context = self.of_context(bag_sums(self.token, tokens, offsets) / count.sqrt())
        return functional.linear(context, self.of_label(self.label), self.bias)


def learn(world: QualityWorld, width: int, variant: Variant, seed: int) -> Tensor:
    """Train one member and return its (test examples, labels) scores."""
    torch.manual_seed(seed)
    rng = np.random.default_rng([seed, 13])
    table = world.log.table
    rows, action = Rows(table), torch.tensor(table["action"].to_numpy())
    reward = torch.tensor(table["reward"].to_numpy()).float()
    pscore = torch.tensor(table["pscore"].to_numpy()).float()
    rewarded = variant.loss == "implicit" or (
        variant.loss == "likelihood" and variant.unrewarded == 0.0
    )
    used = np.flatnonzero(reward.numpy()) if rewarded else np.arange(len(reward))
    size = 256 if rewarded else 512
    weight = pscore.pow(-variant.power).clamp(max=variant.most)
    pushed = variant.unrewarded * (1.0 / pscore).clamp(max=3.0)
    policy = Policy(width, world.catalogue.num_items, variant)
    optimizer = torch.optim.AdamW(
        policy.parameters(), lr=1e-2, weight_decay=variant.decay, fused=True
    )
    steps, step = variant.passes * -(-len(used) // size), 0
    for _ in range(variant.passes):
        for part in np.array_split(rng.permutation(used), -(-len(used) // size)):
            step += 1
            for group in optimizer.param_groups:
                group["lr"] = 1e-2 * min(step / (0.05 * steps), 1.0 - (step - 1) / steps)
            score, at = policy(*rows.at(part, variant.hidden)), torch.from_numpy(part)
            own = score.gather(1, action[at].unsqueeze(1))[:, 0]
            r, w = reward[at], weight[at]
            if variant.loss == "likelihood":
                log_prob = own - torch.logsumexp(score, dim=1)
                other = torch.log1p(-log_prob.exp().clamp(max=0.999))
                loss = -(w * r * log_prob + pushed[at] * (1.0 - r) * other).mean()
            elif variant.loss == "regression":
                each = functional.binary_cross_entropy_with_logits(own, r, reduction="none")
                loss = ((w if variant.unrewarded else torch.ones_like(w)) * each).mean()
            elif variant.loss == "implicit":
                every = variant.alpha * score.square().sum(dim=1)
                loss = (every + w * r * (1.0 - own).square()).mean()
            else:
                loss = (score.square().sum(dim=1) - 2.0 * w * r * own).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    test = Rows(world.truth.contexts)
    with torch.no_grad():
        return policy(*test.at(np.arange(len(test.offsets) - 1), 0.0))


def measured(
    labels: LabelSet, rounds: int, seed: int, variants: dict[str, Variant]
) -> dict[str, object]:
    world = as_feedback(labels, rounds, seed)
    truth = torch.from_numpy(labels.test_labels.toarray())
    width = labels.train_features.shape[1]
    print(f"{labels.name}: " + "  ".join(f"{k} {v:.3f}" for k, v in world.baselines.items()))

    def greedy(scores: Tensor) -> float:
        return float(truth.gather(1, scores.argmax(dim=1, keepdim=True)).mean())

    found: dict[str, object] = {"baselines": world.baselines}
    for name, variant in variants.items():
        began = time.perf_counter()
        scores = [learn(world, width, variant, member) for member in range(3)]
        joined = torch.stack([torch.log_softmax(one, dim=1) for one in scores]).sum(dim=0)
        alone, seconds = (
            float(np.mean([greedy(one) for one in scores])),
            time.perf_counter() - began,
        )
        found[name] = {"alone": alone, "joined": greedy(joined), "seconds": seconds}
        print(f"  {name:<56}{alone:.4f}  joined {greedy(joined):.4f}  {seconds:.0f} s", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="a label set's files, PREFIX-train.npz and PREFIX-test.npz")
    parser.add_argument(
        "--long-tail", action="store_true", help="the simulated set of 3,000 labels"
    )
    parser.add_argument("--rounds", type=int, default=50_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", help="variants whose names contain one of these texts")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    sets = label_sets(arguments.data, arguments.long_tail, arguments.seed)
    only = arguments.only
    variants = {
        k: w for k, w in VARIANTS.items() if only is None or any(text in k for text in only)
    }
    summary = {one.name: measured(one, arguments.rounds, arguments.seed, variants) for one in sets}
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(summary, indent=2))


if __name__ == "__main__":
    main()
