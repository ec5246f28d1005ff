"""Wall time, peak memory and true value of `objective: auto` on a large catalogue.

The reward of item a in context x is Bernoulli(sigmoid(b + s <Mx, v_a>)), about 1 % of the rows; the
log draws items by popularity, independently of the context, with exact propensities. Items have
their v_a as features, or only ids.

    python benchmarks/auto_budget.py make world --items 1000000 --rows 1000000
    /usr/bin/time -v python benchmarks/auto_budget.py train world --json million.json
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from offtower import ops
from offtower.cli.common import DrawnProgress
from offtower.config import parse_config
from offtower.data.catalogue import write_catalogue
from offtower.data.encoding import to_tensors
from offtower.data.log import write_log
from offtower.data.schema import CatalogueSchema, FeatureSpec, LogSchema
from offtower.execution import Execution
from offtower.models.store import load_policy
from offtower.prepare import open_data
from offtower.progress import Progress
from offtower.training.run import train_run

DIM = 16
INTERCEPT, SCALE = -5.3, 1.2
CHUNK = 65_536
CONTEXTS = 300


def make(folder: Path, items: int, rows: int, seed: int, *, ids: bool) -> None:
    rng = np.random.default_rng(seed)
    v = rng.standard_normal((items, DIM)).astype(np.float32) / DIM**0.5
    m = np.linalg.qr(rng.standard_normal((DIM, DIM)))[0].astype(np.float32)
    popularity = (1.0 + np.arange(items)) ** -0.5
    popularity = rng.permutation(popularity / popularity.sum())
    folder.mkdir(parents=True)
    np.savez(folder / "world.npz", v=v, m=m)
    item_ids = [f"item {k}" for k in range(items)]
    columns: dict[str, Any] = {"item_id": item_ids}
    if not ids:
        columns["v"] = vectors(v)
    feature = (
        FeatureSpec(name="item_id", kind="category")
        if ids
        else FeatureSpec(name="v", kind="vector", dim=DIM)
    )
    schema = CatalogueSchema(item_id="item_id", features=(feature,))
    write_catalogue(folder / "catalogue", pa.table(columns), schema)
    log_schema = LogSchema(
        action="item_id",
        reward="reward",
        pscore="pscore",
        context=(FeatureSpec(name="x", kind="vector", dim=DIM),),
    )
    names = pa.array(item_ids)

    def parts() -> Any:
        for start in range(0, rows, CHUNK):
            n = min(CHUNK, rows - start)
            x = rng.standard_normal((n, DIM)).astype(np.float32)
            action = rng.choice(items, n, p=popularity)
            z = INTERCEPT + SCALE * ((x @ m) * v[action]).sum(1)
            reward = (rng.random(n) < 1.0 / (1.0 + np.exp(-z))).astype(np.float64)
            yield pa.table(
                {
                    "x": vectors(x),
                    "item_id": names.take(pa.array(action)),
                    "reward": reward,
                    "pscore": popularity[action],
                }
            )

    write_log(folder / "log", parts(), log_schema)


def vectors(values: np.ndarray) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])


def train(folder: Path, name: str, settings: dict[str, Any]) -> dict[str, Any]:
    config = parse_config(
        {
            "name": name,
            "runs": str(folder / "runs"),
            "data": {"train": str(folder / "log"), "catalogue": str(folder / "catalogue")},
            "objective": "auto",
            "auto": settings,
        }
    )
    began = time.monotonic()
    progress = DrawnProgress()
    train_run(config, execution=Execution(progress=progress))
    seconds = time.monotonic() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    manifest = json.loads((config.run_directory / "manifest.json").read_text())
    report = manifest["auto"]
    return {
        "seconds": round(seconds, 1),
        "processor_seconds": round(time.process_time(), 1),
        "auto_seconds": report["seconds"],
        "peak_gib": round(peak, 2),
        "chosen": report["chosen"],
        "promised": report["low"],
        **true_values(folder, config),
        "dropped": report["dropped"],
        "stages": report["stages"],
        "plan": report["plan"],
    }


@torch.no_grad()
def true_values(folder: Path, config: Any) -> dict[str, float]:
    world = np.load(folder / "world.npz")
    data = open_data(config, Progress(), config.run_directory)
    policy = load_policy(config.run_directory / "policy")[0].eval()
    x = np.random.default_rng(77).standard_normal((CONTEXTS, DIM)).astype(np.float32)
    u = policy.embed_contexts(to_tensors(data.context_encoding.encode(pa.table({"x": vectors(x)}))))
    items = policy.embed_items(data.items)
    q = ops.FactoredReward(
        torch.from_numpy(SCALE * (x @ world["m"])),
        torch.from_numpy(world["v"]),
        torch.full((len(world["v"]),), INTERCEPT),
        link="sigmoid",
    )
    action = torch.zeros(len(x), dtype=torch.int64)
    terms = ops.policy_terms(
        *(u, items.embedding, action),
        temperature=policy.temperature,
        item_bias=items.bias,
        reward_model=q,
    )
    best = ops.top_k(q.context, q.item, 1, item_bias=q.item_bias)[0][:, 0]
    assert terms.expected_reward is not None
    value, optimum = float(terms.expected_reward.mean()), float(torch.sigmoid(best).mean())
    return {"value": value, "optimum": optimum, "share": value / optimum}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("verb", choices=("make", "train"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ids", action="store_true", help="items have no features")
    parser.add_argument("--name", default="run")
    parser.add_argument("--auto", type=json.loads, default={}, help="settings of auto, as JSON")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    if given.verb == "make":
        make(given.folder, given.items, given.rows, given.seed, ids=given.ids)
        return
    found = train(given.folder, given.name, given.auto)
    print(json.dumps({k: v for k, v in found.items() if k != "plan"}, indent=1))
    if given.json is not None:
        given.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
