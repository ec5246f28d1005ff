"""A simulated log of several behaviour policies, with each policy's propensity of every row."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import zip_longest

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from offtower.data.simulate.logging_policy import LoggingPolicy
from offtower.data.simulate.world import SimulatedWorld
from offtower.errors import ConfigError
from offtower.seeds import derive_seed


def log_of_several(
    world: SimulatedWorld, n_rounds: int, seed: int, policies: Mapping[str, LoggingPolicy]
) -> Iterator[pa.Table]:
    """Draw a log that several policies made, row by row in turn, as equal parts as n allows.

    The columns are those of `SimulatedWorld.log`, `behavior_policy` has the policy's name, and
    beyond the schema there is a float64 column for each policy (`propensity_column`): its exact
    probability of the logged item, whoever logged it.

    Args:
        n_rounds: rows in all, at least one for each policy.
        seed: of this log. policies: by name, each of the world's kind of logging policy.

    Raises:
        ConfigError: fewer than two policies, fewer rows than policies, or another kind.
    """
    count = len(policies)
    if count < 2 or n_rounds < count:
        raise ConfigError(
            f"a log of several policies needs two or more and a row for each, got {count} policies "
            f"and {n_rounds} rows"
        )
    kind = world.logging_policy.kind
    if any(policy.kind != kind for policy in policies.values()):
        raise ConfigError(f"the policies must be of this world's kind, '{kind}'")
    return _log(world, n_rounds, seed, policies)


def propensity_column(name: str) -> str:
    """Of the policy with that name."""
    return f"pscore_{name}"


def _log(
    world: SimulatedWorld, n_rounds: int, seed: int, policies: Mapping[str, LoggingPolicy]
) -> Iterator[pa.Table]:
    count = len(policies)
    streams = [
        world.log(
            n_rounds // count + (place < n_rounds % count),
            derive_seed(seed, "behavior policy", place),
            beta=policy.beta,
            epsilon=policy.epsilon,
            behavior_policy=name,
        )
        for place, (name, policy) in enumerate(policies.items())
    ]
    ids = world.item_ids
    # Chunks are of equal length, save the last ones; a longer stream may have one more.
    for chunks in zip_longest(*streams):
        parts = [chunk for chunk in chunks if chunk is not None]
        turn = np.argsort(
            np.concatenate([np.arange(part.num_rows) for part in parts]), kind="stable"
        )
        table = pa.concat_tables(parts).take(pa.array(turn)).combine_chunks()
        latent = world.context_latent(table)
        action = pc.index_in(table.column("action"), value_set=ids).to_numpy().astype(np.int64)
        for name, policy in policies.items():
            found = policy.probability(
                latent, world.item_latent, world.item_logit, torch.from_numpy(action)
            )
            table = table.append_column(propensity_column(name), pa.array(found.numpy()))
        yield table
