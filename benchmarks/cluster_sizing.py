"""Memory and traffic of a worker by formulas, from a million to a billion items.

Nothing is measured here: docs/reference/cluster.md explains the formulas and shows this table, and
a test compares the two.

    python benchmarks/cluster_sizing.py --json cluster_sizing.json
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

GIB = 2.0**30
ID = 8
"""Bytes of an item's id: integers. Text takes its own length."""
INDEX = 0
"""Bytes an item by which an id is found, beside the ids, and the vocabulary of an id table: none
where ids are rising integers; otherwise 12, or 20 with such a table. Every process that reads a log
holds them, and the ids."""
CHECKPOINT = 2.6
"""Copies of an id table, its moments included, while a checkpoint of it is written beside the
training and as one file a worker: the most resident memory of 2 workers with 10^6 items, c = 64."""
PROCESS = 0.5 * GIB
"""A process with torch and Arrow, and a window of the log."""


@dataclass(frozen=True)
class Sizes:
    """A training.

    Attributes:
        items: N. workers: R. batch: B, rows of a step over all workers.
        width: d, of the embeddings. features: bytes of an item's encoded features.
        id_width: c, width of the item-id table; 0 without one.
        reward_width: e, of a factored reward model; 0 without one. folds: K, of it.
        parameters: P, of both towers without the item-id table.
        draws: m, of a step with sampled terms, shared by its rows.
    """

    items: int
    workers: int = 1
    batch: int = 4096
    width: int = 64
    features: int = 4 * 64
    id_width: int = 16
    reward_width: int = 0
    folds: int = 3
    parameters: int = 100_000
    draws: int = 4096

    @property
    def index(self) -> float:
        """Bytes that every process has, whatever R is: ids and their index."""
        return float(self.items) * (INDEX + ID)

    def memory(self, strategy: str, terms: str = "exact") -> float:
        """Bytes of a worker: with `item_sharded` all but the index is divided by R."""
        item = self.features
        models = 0.0
        if self.reward_width:
            # Embeddings of each fold's items; its towers have an id table of their own, whole.
            item += 4 * self.folds * (self.reward_width + 1)
            models = 4.0 * self.folds * self.items * self.id_width
        table = 4 * 3 * self.id_width  # weights and two moments
        touched = 0.0
        if terms == "exact":
            # Embedding, bias and their gradients; the id table's gradient.
            item += 4 * (2 * self.width + 2) + 4 * self.id_width
        else:
            item += 4 * (self.width + 1)  # embedding and bias, of validation
            touched = 4.0 * (self.draws + self.batch) * (2 * self.width + 4 * self.id_width)
            # The step to which a row is up to date.
            table += 8 if self.id_width else 0
        # An item's row of the id table, in the shard and in the catalogue.
        item += (1 + CHECKPOINT) * table + (16 if self.id_width else 0)
        own = self.items / self.workers if strategy == "item_sharded" else float(self.items)
        rows = 4.0 * self.batch * (2 * self.width + self.reward_width + 16)
        beside = rows + touched + 16.0 * self.parameters + PROCESS
        return own * item + self.index + models + beside

    def traffic(self, strategy: str) -> float:
        """Bytes that a worker receives in a step (and sends as many), by ring algorithms."""
        share = (self.workers - 1) / self.workers
        reduced = 2.0 * share * self.parameters
        if strategy == "replicated":
            return 4.0 * (reduced + 2.0 * share * self.items * self.id_width)
        gathered = share * self.batch * (self.width + self.reward_width)
        # The largest logit of each row, then four sums (two without a reward model).
        sums = 2.0 * share * self.batch * (1 + (4 if self.reward_width else 2))
        scattered = share * self.batch * self.width
        return 4.0 * (gathered + sums + scattered + reduced)


def evaluation_store(items: int, width: int) -> float:
    """Bytes of a node's object store that evaluation fills, once for all workers of the node."""
    return float(items) * (4 * (width + 1) + max(INDEX, ID))


def table(limit_gib: float = 32.0) -> list[dict[str, Any]]:
    """For each catalogue the least power of two of workers whose memory is below the limit."""
    rows: list[dict[str, Any]] = []
    for items in (10**6, 10**7, 10**8, 10**9):
        found: dict[str, Any] = {}
        for terms in ("exact", "sampled"):
            sizes = Sizes(items)
            while sizes.memory("item_sharded", terms) > limit_gib * GIB and sizes.workers < 1024:
                sizes = replace(sizes, workers=2 * sizes.workers)
            memory = sizes.memory("item_sharded", terms)
            several = replace(sizes, workers=max(2, sizes.workers))
            found[terms] = {
                "workers": sizes.workers,
                "fits": memory <= limit_gib * GIB,
                "gib": memory / GIB,
                "mib_a_step": several.traffic("item_sharded") / 2**20,
            }
            if terms == "exact":
                found["replicated_mib_a_step"] = several.traffic("replicated") / 2**20
        rows.append(
            {
                **asdict(Sizes(items)),
                **found,
                "replicated_gib": Sizes(items).memory("replicated") / GIB,
                "index_gib": Sizes(items).index / GIB,
                "evaluation_store_gib": evaluation_store(items, Sizes(items).width) / GIB,
            }
        )
    return rows


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| items | replicated: GiB a worker | item_sharded: workers, GiB each "
        "| sampled terms: workers, GiB each | of it the index | item_sharded: MiB a step "
        "| sampled terms: MiB a step | replicated: MiB a step "
        "| evaluate: object store, GiB a node |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        exact, sampled = row["exact"], row["sampled"]
        lines.append(
            f"| {row['items']:,} | {row['replicated_gib']:,.1f} "
            f"| {exact['workers']}, {exact['gib']:.1f} "
            f"| {sampled['workers']}, {sampled['gib']:.1f} | {row['index_gib']:.2f} "
            f"| {exact['mib_a_step']:.1f} | {sampled['mib_a_step']:.1f} "
            f"| {row['replicated_mib_a_step']:,.0f} | {row['evaluation_store_gib']:,.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--memory-gib", type=float, default=32.0, help="of a worker")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = table(arguments.memory_gib)
    print(markdown(rows))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
