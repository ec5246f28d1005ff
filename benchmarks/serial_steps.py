"""What is left for one process of cells, of an IVF index and of a reward model, beside its parts.

    python benchmarks/serial_steps.py --items 1000000 --rows 1000000

Parts run one after the other in this process, on one thread, and their processor seconds are
counted. Beside them is what R workers cannot share; with R workers the step takes about
serial + parts / R, in whole parts. A reward model has one part for each fold.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from offtower.benchmarks import world
from offtower.config import RewardModelConfig
from offtower.crossfit.fold_towers import FoldFits
from offtower.mapping import Mapper
from offtower.prepare import prepare
from offtower.progress import Progress
from offtower.retrieval import IndexOptions
from offtower.retrieval.index_building import build_index
from offtower.retrieval.partitioning import build_cells
from offtower.retrieval.vector_source import VectorSource

T = TypeVar("T")
R = TypeVar("R")


class TimedMapper(Mapper):
    """Runs parts here, and keeps their processor seconds by the name of the pass."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}

    def map(
        self, function: Callable[[T], R], parts: Sequence[T], task: str = "", **more: Any
    ) -> Iterator[R]:
        for part in parts:
            began = time.process_time()
            result = function(part)
            self.seconds.setdefault(task, []).append(time.process_time() - began)
            yield result


def show(name: str, seconds: float, passes: dict[str, list[float]]) -> None:
    shared = sum(sum(one) for one in passes.values())
    of_workers = {
        workers: seconds
        - shared
        + sum(math.ceil(len(one) / workers) * max(one) for one in passes.values())
        for workers in (2, 4, 8)
    }
    line = {
        "step": name,
        "one_process": round(seconds, 2),
        "serial": round(seconds - shared, 2),
        "passes": {task: [len(one), round(sum(one), 2)] for task, one in passes.items()},
        "at_most_with_workers": {key: round(value, 2) for key, value in of_workers.items()},
    }
    print(json.dumps(line), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=65)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--steps", nargs="+", default=["cells", "index", "reward"])
    given = parser.parse_args()
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    if {"cells", "index"} & set(given.steps):
        centers = rng.standard_normal((200, given.dim), dtype=np.float32)
        vectors = centers[rng.integers(0, 200, given.items)]
        vectors += 0.5 * rng.standard_normal(vectors.shape, dtype=np.float32)
        queries = rng.standard_normal((1000, given.dim), dtype=np.float32)
    with tempfile.TemporaryDirectory() as folder:
        if "cells" in given.steps:
            mapper, began = TimedMapper(), time.process_time()
            build_cells(vectors, queries, Path(folder), mapper=mapper)
            show("cells", time.process_time() - began, mapper.seconds)
        if "index" in given.steps:
            mapper, began = TimedMapper(), time.process_time()
            options = IndexOptions(kind="ivf_flat", k=100, target_recall=0.9)
            source = VectorSource(vectors)
            build_index(source, queries[:400], Path(folder), options, "1", mapper)
            show("index, with its tuning", time.process_time() - began, mapper.seconds)
    if "reward" in given.steps:
        log, catalogue = world.in_memory(given.rows, 10_000)
        data = prepare(log, None, catalogue, Progress())
        config = RewardModelConfig(kind="factored", epochs=1)
        fits = FoldFits(config, data, 0)
        warm_up, _ = world.in_memory(5_000, 10_000)
        FoldFits(config, prepare(warm_up, None, catalogue, Progress()), 0).fit(Progress())
        began = time.process_time()
        fits.fit(Progress())
        whole = time.process_time() - began
        began = time.process_time()
        fits.fit(Progress(), [0])
        one = time.process_time() - began
        found = {workers: math.ceil(config.folds / workers) for workers in (1, 2, 3)}
        print(
            json.dumps(
                {
                    "step": "reward model, an epoch",
                    "rows": given.rows,
                    "folds": config.folds,
                    "one_process": round(whole, 2),
                    "one_fold": round(one, 2),
                    "folds_of_a_worker": found,
                }
            )
        )


if __name__ == "__main__":
    main()
