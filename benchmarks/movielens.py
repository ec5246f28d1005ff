"""Next items of MovieLens-1M from histories: leave the last one out, rank all items.

Each user's ratings in the order of their times are a history; the last one is held out, and the
policy that maximizes the likelihood of the others ranks all items at its time. One causal pass over
a history gives the context of each of its positions, so a step of 64 users has up to 12,800 rows,
each with the exact sum over all items in its normalizer. Batches are of histories of similar
length, which halves the padding. The README of meta-recsys/generative-recommenders reports HR@10
.2853 and NDCG@10 .1603 for SASRec with sampled softmax, and .3097 and .1720 for HSTU.

Metrics are of the held-out item's rank among three sets of items. `outside_history` leaves out
those of the history that the policy reads, as that repository's evaluation does by default
(`filter_invalid_ids=True` with the past ids of a sequence): compare this one with the figures
above. `unseen_items` leaves out all that the user has rated before, which differs for users with
more than `--length` earlier ratings. `all_items` leaves out none.

    python benchmarks/movielens.py ratings.dat --encoder transformer --epochs 100 --out ml-1m

`ratings.dat` is the file of MovieLens-1M (user::item::rating::time). A run that is stopped goes on
from its last epoch, to the same bits. `--encoder ids` has a table of users instead of histories.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from offtower.config import HistoryConfig, PolicyConfig, TowerConfig
from offtower.data.encoding import BagTensor, FeatureEncoding, to_tensors
from offtower.data.features import BagArray, take_bag
from offtower.data.histories import HistoryBasis
from offtower.data.schema import FeatureSpec
from offtower.models import TwoTowerPolicy
from offtower.models.features import FeatureTensors
from offtower.models.histories import HistoryEncoder
from offtower.models.items import ItemEmbeddings, ItemFeatures
from offtower.models.optimizer import make_optimizer
from offtower.models.towers import MLPBody
from offtower.ops import policy_terms, sampled_policy_terms
from offtower.seeds import derive_seed
from offtower.training.checkpoints.state import fill_optimizer, optimizer_tensors

CUTOFFS = (10, 50, 200)


@dataclass(frozen=True)
class Ratings:
    """Ratings by user, each user's in the order of their times.

    Attributes:
        items: (n,) ids of the items. times: (n,) seconds. offsets: (users + 1,).
    """

    items: NDArray[np.int64]
    times: NDArray[np.int64]
    offsets: NDArray[np.int64]

    @classmethod
    def read(cls, path: Path) -> Ratings:
        with open(path) as file:
            numbers = np.fromstring(file.read().replace("::", " "), dtype=np.int64, sep=" ")
        user, item, _, when = numbers.reshape(-1, 4).T
        order = np.lexsort((np.arange(len(user)), when, user))
        counts = np.unique(user, return_counts=True)[1]
        offsets = np.concatenate([[0], np.cumsum(counts)])
        return cls(item[order].copy(), when[order].copy(), offsets)

    @property
    def users(self) -> int:
        return len(self.offsets) - 1


class Task:
    """Histories without their last event, the events that follow each of their positions, and the
    policy.

    Args:
        ratings: of all users.
        options: of the command line.
    """

    def __init__(self, ratings: Ratings, options: argparse.Namespace) -> None:
        self.ratings, self.options = ratings, options
        length = options.length
        ids = np.unique(ratings.items)
        self.num_items = len(ids)
        self.of_item = of_item = np.searchsorted(ids, ratings.items)
        ends = ratings.offsets[1:]
        starts = np.maximum(ratings.offsets[:-1], ends - 1 - length)
        # Inputs of the held-out event; those of training end one event earlier.
        self.held_out = of_item[ends - 1]
        self.seen = [of_item[a : b - 1] for a, b in zip(ratings.offsets, ends, strict=False)]
        self.test = self._histories(starts, ends - 1)
        self.read = [of_item[a : b - 1] for a, b in zip(starts, ends, strict=True)]
        first = np.maximum(ratings.offsets[:-1], ends - 2 - length)
        self.train = self._histories(first, ends - 2)
        self.next = [of_item[a + 1 : b] for a, b in zip(first, ends - 1, strict=True)]
        spec = FeatureSpec(name="history", kind="history", length=length, times="t")
        users = FeatureSpec(name="user", kind="category")
        table = pa.table({"user": np.arange(ratings.users), **self._columns(self.test)})
        spec = users if options.encoder == "ids" else spec
        contexts = FeatureEncoding.fit((spec,), [table], HistoryBasis(pa.array(ids), "at"))
        columns = pa.table({"item_id": ids})
        items = FeatureEncoding.fit((FeatureSpec(name="item_id", kind="category"),), [columns])
        self.items = ItemFeatures(items.encode(columns), len(ids))
        torch.manual_seed(derive_seed(options.seed, "policy"))
        self.policy = TwoTowerPolicy(_config(options), contexts, items)
        if options.encoder != "ids":
            self._begin_at_newest_item()
        self._bags = {
            name: contexts.encode(pa.table({"user": np.arange(ratings.users), **part}))
            for name, part in (
                ("train", self._columns(self.train)),
                ("test", self._columns(self.test)),
            )
        }

    def _begin_at_newest_item(self) -> None:
        """Let the last map start as the identity, so that a context starts near the newest item's
        own vector, as in models without such a map."""
        body = self.policy.context_tower.body
        assert isinstance(body, MLPBody)
        (last,) = body.layers
        assert isinstance(last, torch.nn.Linear)
        torch.nn.init.eye_(last.weight)
        torch.nn.init.zeros_(last.bias)

    def batches(self, epoch: int) -> list[NDArray[np.int64]]:
        """Users in random order; eight batches at a time are sorted by length and cut."""
        size, users = self.options.batch_users, self.ratings.users
        rng = np.random.default_rng([self.options.seed, epoch])
        counts = np.array([len(one) for one in self.next])
        found = []
        for group in np.array_split(rng.permutation(users), -(-users // (8 * size))):
            by_length = group[np.argsort(counts[group], kind="stable")]
            parts = np.array_split(by_length, -(-len(group) // size))
            found += [parts[number] for number in rng.permutation(len(parts))]
        return found

    def _histories(
        self, starts: NDArray[np.int64], ends: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], ...]:
        """First and last event of each history, and the time of the event that follows."""
        return starts, ends, self.ratings.times[ends]

    def _columns(self, part: tuple[NDArray[np.int64], ...]) -> dict[str, Any]:
        starts, ends, at = part
        index = [np.arange(a, b) for a, b in zip(starts, ends, strict=True)]
        flat = np.concatenate(index)
        lists = pa.array(np.concatenate([[0], np.cumsum([len(one) for one in index])]), pa.int32())
        # Events at the time of the next one are part of the history: ratings come in batches.
        return {
            "history": pa.ListArray.from_arrays(lists, pa.array(self.ratings.items[flat])),
            "t": pa.ListArray.from_arrays(lists, pa.array(self.ratings.times[flat])),
            "at": at,
        }

    def encoded(self, part: tuple[NDArray[np.int64], ...]) -> FeatureTensors:
        """Contexts with the histories of `part`."""
        return to_tensors(self.policy.context_encoding.encode(pa.table(self._columns(part))))

    def positions(self, users: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """(B, d) contexts of all training positions of some users, and (B,) the items that follow.

        In one pass over each history; random draws are those of the user.
        """
        tower = self.policy.context_tower
        target = torch.from_numpy(np.concatenate([self.next[user] for user in users]))
        numbers = torch.from_numpy(users)
        if self.options.encoder == "ids":
            context = self.policy.embed_contexts({"user": numbers + 1}, numbers)
            counts = torch.tensor([len(self.next[user]) for user in users])
            return torch.repeat_interleave(context, counts, dim=0), target
        body = tower.body
        assert isinstance(body, MLPBody)
        reader = next(iter(body.encoder.histories.values()))
        assert isinstance(reader, HistoryEncoder)
        tower.draws.begin(numbers)
        bag = self._bag("train", users)
        states = reader.states(bag, body.encoder.item_tables["history"])
        length = bag.offsets[1:] - bag.offsets[:-1]
        present = torch.arange(states.shape[1]) < length[:, None]
        return functional.normalize(body.layers(states[present]), dim=1), target

    def contexts(self, users: NDArray[np.int64]) -> Tensor:
        """(n, d) contexts at the held-out events."""
        if self.options.encoder == "ids":
            return self.policy.embed_contexts({"user": torch.from_numpy(users) + 1})
        return self.policy.embed_contexts({"history": self._bag("test", users)})

    def _bag(self, part: str, users: NDArray[np.int64]) -> BagTensor:
        bag = self._bags[part]["history"]
        assert isinstance(bag, BagArray)
        found = to_tensors({"history": take_bag(bag, users)})["history"]
        assert isinstance(found, BagTensor)
        return found


def _config(options: argparse.Namespace) -> PolicyConfig:
    """Unit vectors and a low temperature, as in the reference."""
    history = HistoryConfig(
        encoder="mean" if options.encoder == "ids" else options.encoder,
        attention=options.attention,
        layers=options.layers,
        heads=options.heads,
        dropout=options.dropout,
    )
    tower: dict[str, Any] = {"normalize": True, "unknown_rate": 0.0, "hidden_layer_sizes": ()}
    return PolicyConfig(
        embedding_dim=options.width,
        temperature=options.temperature,
        context_tower=TowerConfig(
            **tower, history=history, tables="output" if options.encoder == "ids" else "input"
        ),
        item_tower=TowerConfig(**tower, tables="output"),
    )


def loss_of(task: Task, users: NDArray[np.int64], seed: int) -> Tensor:
    """Summed negative log-likelihood of the next items, with exact or sampled normalizers."""
    task.policy.seed_draws(seed)
    context, target = task.positions(users)
    temperature, count = task.policy.temperature, task.options.negatives
    if not count:
        items = task.policy.embed_items(task.items)
        terms = policy_terms(context, items.embedding, target, temperature=temperature)
        return -terms.log_prob.sum()
    drawn = torch.randint(task.num_items, (count,), generator=torch.Generator().manual_seed(seed))
    touched, index = torch.unique(torch.cat([target, drawn]), return_inverse=True)
    items = ItemEmbeddings(*task.policy.item_tower(task.items.at(touched)))
    terms = sampled_policy_terms(
        context,
        items.embedding[index[: len(target)]],
        target,
        items.embedding,
        drawn,
        torch.full((count,), -float(np.log(task.num_items))),
        temperature=temperature,
        sample_index=index[len(target) :],
    )
    return -terms.log_prob.sum()


@torch.no_grad()
def evaluate(task: Task) -> dict[str, dict[str, float]]:
    """Metrics of the held-out items' ranks, by the set of items that are ranked."""
    task.policy.eval()
    items = task.policy.embed_items(task.items).embedding
    names = ("all_items", "outside_history", "unseen_items")
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    for users in np.array_split(np.arange(task.ratings.users), -(-task.ratings.users // 512)):
        score = task.contexts(users) @ items.T
        own = score.gather(1, torch.from_numpy(task.held_out[users])[:, None])
        for name, left_out in zip(names, (None, task.read, task.seen), strict=True):
            if left_out is not None:
                for row, user in enumerate(users):
                    score[row, left_out[user]] = -torch.inf
            found[name].append((score > own).sum(dim=1))
    task.policy.train()
    return {name: metrics(torch.cat(ranks).numpy()) for name, ranks in found.items()}


def metrics(rank: NDArray[np.int64]) -> dict[str, float]:
    values = {f"HR@{k}": float((rank < k).mean()) for k in CUTOFFS}
    values["NDCG@10"] = float(np.where(rank < 10, 1 / np.log2(rank + 2.0), 0.0).mean())
    values["MRR"] = float((1 / (rank + 1.0)).mean())
    return values


class Run:
    """Epochs of a task; weights and optimizer are stored after each.

    Args:
        folder: of the run; an earlier one with the same options goes on.
    """

    def __init__(self, task: Task, folder: Path) -> None:
        self.task, self.folder = task, folder
        options = task.options
        self.optimizer = make_optimizer(
            "adamw", task.policy, options.learning_rate, options.weight_decay
        )
        self.lines: list[dict[str, Any]] = []
        folder.mkdir(parents=True, exist_ok=True)
        state, lines = folder / "state.safetensors", folder / "epochs.jsonl"
        if not state.exists():
            return
        tensors = safetensors.torch.load_file(state)
        epoch = int(tensors.pop("epoch"))
        self.lines = [json.loads(line) for line in lines.read_text().splitlines()][:epoch]
        policy = {k.removeprefix("policy/"): v for k, v in tensors.items() if k[:7] == "policy/"}
        task.policy.load_state_dict(policy)
        fill_optimizer(self.optimizer, tensors)

    def epoch(self) -> dict[str, Any]:
        """Train for one epoch; every few, evaluate."""
        options, number = self.task.options, len(self.lines)
        began, processor = time.perf_counter(), time.process_time()
        batches = self.task.batches(number)
        rows = sum(len(one) for one in self.task.next)
        total = 0.0
        for step, users in enumerate(batches):
            self.optimizer.zero_grad()
            loss = loss_of(self.task, users, derive_seed(options.seed, "step", number, step))
            # Every position has the same weight, whatever the length of its batch.
            (loss * (len(batches) / rows)).backward()
            self.optimizer.step()
            total += float(loss.detach())
        line: dict[str, Any] = {
            "epoch": number + 1,
            "loss": total / rows,
            "seconds": time.perf_counter() - began,
            "processor_seconds": time.process_time() - processor,
        }
        if (number + 1) % options.evaluate_every == 0 or number + 1 == options.epochs:
            line |= evaluate(self.task)
        self.lines.append(line)
        self._store()
        return line

    def _store(self) -> None:
        policy = self.task.policy.state_dict()
        tensors = {f"policy/{name}": value.contiguous() for name, value in policy.items()}
        tensors |= optimizer_tensors(self.optimizer)
        tensors["epoch"] = torch.tensor(len(self.lines))
        text = "".join(json.dumps(line) + "\n" for line in self.lines)
        (self.folder / "epochs.jsonl").write_text(text)
        temporary = self.folder / "state.tmp"
        safetensors.torch.save_file(tensors, temporary)
        temporary.replace(self.folder / "state.safetensors")


def options_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("ratings", type=Path, help="ratings.dat")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--encoder", choices=("transformer", "mean", "ids"), default="transformer")
    parser.add_argument("--attention", choices=("softmax", "pointwise"), default="softmax")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--heads", type=int, default=1)
    parser.add_argument("--width", type=int, default=50)
    parser.add_argument("--length", type=int, default=200)
    parser.add_argument("--dropout", type=float, default=0.2)
    parser.add_argument("--temperature", type=float, default=0.05)
    parser.add_argument("--negatives", type=int, default=0, help="0 sums over all items")
    parser.add_argument("--batch-users", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--weight-decay", type=float, default=0.0)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--evaluate-every", type=int, default=5, help="epochs")
    parser.add_argument("--seconds", type=float, help="stop after the epoch that exceeds them")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def main() -> None:
    options = options_parser().parse_args()
    attention = f"-{options.attention}" if options.encoder == "transformer" else ""
    run = Run(
        Task(Ratings.read(options.ratings), options),
        options.out / f"{options.encoder}{attention}-{options.seed}",
    )
    began = time.perf_counter()
    while len(run.lines) < options.epochs:
        print(json.dumps(run.epoch()), flush=True)
        if options.seconds is not None and time.perf_counter() - began > options.seconds:
            break


if __name__ == "__main__":
    main()
