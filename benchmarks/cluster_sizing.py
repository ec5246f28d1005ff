"""Memory, traffic and time of a worker by formula, for a million to a billion items.

Nothing is measured. docs/reference/cluster.md explains the formulas and contains these tables; a
test compares the two. `distributed_step.py`, `shared_reading.py` and `item_index.py` measure what
the formulas predict; the rates of a device are from docs/results.

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
"""Bytes of an integer item id."""
INDEX = 0
"""Bytes per item of the id lookup: 0 for increasing integer ids, otherwise 12."""
CPU_PAIRS = 3e8
"""Pairs of row and item per second that one core computes, forward and backward, d = 64: 1,024 x
10^6 in 1.7 s on two (docs/results/2026-11-26-distributed-step.md)."""
CPU_ROWS = 1e4
"""Rows per second of one core with sampled terms, 4,096 draws, whatever the number of items: 1,024
in 50 ms on two (the same page, to 10^7 items)."""
GPU_PAIRS = 8.5e11
"""Pairs per second of an H200: predicted (1,024 x 10^6 in 1.2 ms), not measured
(docs/results/2026-11-30-cuda-kernels.md)."""
CORES = 16
"""Of a worker in the table of times."""
CHECKPOINT = 2.6
"""Additional copies of an id table and its moments while a checkpoint is written asynchronously,
one file per worker; from the peak memory of 2 workers with 10^6 items and c = 64."""
PROCESS = 0.5 * GIB
"""Bytes of a process with torch, Arrow and a window of the log."""


@dataclass(frozen=True)
class Sizes:
    """The sizes of a training run.

    Attributes:
        items: N.
        workers: R.
        batch: B, rows of a step over all workers.
        width: d, width of the embeddings.
        features: Bytes of an item's encoded features.
        id_width: c, width of the item-id table; 0 without one.
        reward_width: e, width of a factored reward model; 0 without one.
        folds: K, folds of the reward model.
        parameters: P, parameters of both towers without the item-id table.
        draws: m, draws of a step with sampled terms, shared by its rows.
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
    def node(self) -> float:
        """Bytes of ids, their lookup and the items' features, once for all workers of a node."""
        return float(self.items) * (INDEX + ID + self.features)

    def memory(self, strategy: str, terms: str = "exact") -> float:
        """Return the bytes of a worker, without those of its node."""
        item = 0.0
        models = 0.0
        if self.reward_width:
            # Item embeddings of each fold; the fold's towers hold a complete id table.
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
            # The step of each row's last update.
            table += 8 if self.id_width else 0
        # An item's row of the id table, in the shard and in the catalogue.
        item += (1 + CHECKPOINT) * table + (16 if self.id_width else 0)
        own = self.items / self.workers if strategy == "item_sharded" else float(self.items)
        rows = 4.0 * self.batch * (2 * self.width + self.reward_width + 16)
        beside = rows + touched + 16.0 * self.parameters + PROCESS
        return own * item + models + beside

    def traffic(self, strategy: str) -> float:
        """Return the bytes that a worker receives per step, and sends, with ring algorithms."""
        share = (self.workers - 1) / self.workers
        reduced = 2.0 * share * self.parameters
        if strategy == "replicated":
            return 4.0 * (reduced + 2.0 * share * self.items * self.id_width)
        gathered = share * self.batch * (self.width + self.reward_width)
        # The maximum logit of each row, then four sums (two without a reward model).
        sums = 2.0 * share * self.batch * (1 + (4 if self.reward_width else 2))
        scattered = share * self.batch * self.width
        return 4.0 * (gathered + sums + scattered + reduced)

    def step_seconds(self, pairs_per_second: float) -> float:
        """Return the time of a step's exact terms, without messages and the towers of contexts."""
        return float(self.batch) * self.items / self.workers / pairs_per_second


@dataclass(frozen=True)
class LogSizes:
    """The sizes of a log.

    Attributes:
        rows: n.
        stored: Bytes of a row in the files.
        shared: j, encoded bytes of a row that all workers get: item, reward, pscore, number of the
            row, and what else the log has.
        context: c, encoded bytes of a row's context, which one worker gets.
    """

    rows: int
    stored: float = 69.0
    shared: float = 36.0
    context: float = 256.0

    def read(self, workers: int) -> float:
        """Return the bytes that a worker reads in its first epoch; later ones read its cache."""
        return self.rows * self.stored / workers

    def sent(self, workers: int) -> float:
        """Return the bytes that a worker sends, and receives, in every epoch."""
        share = (workers - 1) / workers
        return share * self.rows * (self.shared + self.context / workers)


def evaluation_store(items: int, width: int) -> float:
    """Return the bytes of embedded items that the workers of a node map for evaluation."""
    return float(items) * 4 * (width + 1)


def table(limit_gib: float = 32.0) -> list[dict[str, Any]]:
    """Return, per catalogue, the least power of two of workers whose memory fits the limit."""
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
                "node_gib": Sizes(items).node / GIB,
                "evaluation_store_gib": evaluation_store(items, Sizes(items).width) / GIB,
            }
        )
    return rows


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| items | replicated: GiB a worker | item_sharded: workers, GiB each "
        "| sampled terms: workers, GiB each | and once a node | item_sharded: MiB a step "
        "| sampled terms: MiB a step | replicated: MiB a step "
        "| evaluate: mapped, GiB a node |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        exact, sampled = row["exact"], row["sampled"]
        lines.append(
            f"| {row['items']:,} | {row['replicated_gib']:,.1f} "
            f"| {exact['workers']}, {exact['gib']:.1f} "
            f"| {sampled['workers']}, {sampled['gib']:.1f} | {row['node_gib']:.2f} "
            f"| {exact['mib_a_step']:.1f} | {sampled['mib_a_step']:.1f} "
            f"| {row['replicated_mib_a_step']:,.0f} | {row['evaluation_store_gib']:,.1f} |"
        )
    return "\n".join(lines)


def times() -> str:
    """Return the time of a step by the rates of cores and GPUs."""
    lines = [
        f"| items | workers | exact, {CORES} cores each, s | sampled, {CORES} cores each, s "
        "| exact, a GPU each (predicted), s |",
        "|---|---|---|---|---|",
    ]
    for items, workers in ((10**6, 1), (10**7, 2), (10**8, 8), (10**8, 64), (10**9, 64)):
        sizes = Sizes(items, workers=workers)
        sampled = sizes.batch / workers / CORES / CPU_ROWS
        lines.append(
            f"| {items:,} | {workers} | {sizes.step_seconds(CORES * CPU_PAIRS):,.2f} "
            f"| {sampled:,.4f} | {sizes.step_seconds(GPU_PAIRS):,.4f} |"
        )
    return "\n".join(lines)


def readings() -> str:
    """Return what a worker reads and sends per epoch of 10^9 rows."""
    lines = [
        "| workers | read in the first epoch, GiB | sent in every epoch, GiB |",
        "|---|---|---|",
    ]
    log = LogSizes(10**9)
    for workers in (1, 2, 4, 8, 64):
        read, sent = log.read(workers) / GIB, log.sent(workers) / GIB
        lines.append(f"| {workers} | {read:,.1f} | {sent:,.1f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--memory-gib", type=float, default=32.0, help="of a worker")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = table(arguments.memory_gib)
    print(markdown(rows), times(), readings(), sep="\n\n")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
