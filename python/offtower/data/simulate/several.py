"""A simulated log of several behaviour policies, with each policy's propensity of every row."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray

from offtower.data.simulate.logging_policy import LoggingPolicy
from offtower.data.simulate.world import CHUNK_ROWS, SimulatedWorld, num_chunks
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
    chunks = range(len(rows_of_chunks(n_rounds, count)))
    return (chunk_of_several(world, number, n_rounds, seed, policies) for number in chunks)


def propensity_column(name: str) -> str:
    """Of the policy with that name."""
    return f"pscore_{name}"


def rows_of_chunks(n_rounds: int, policies: int) -> NDArray[np.int64]:
    """(c,) rows of each table that `log_of_several` gives."""
    own = _rows_of_each(n_rounds, policies)
    first = np.arange(num_chunks(own[0]))[:, None] * CHUNK_ROWS
    rows: NDArray[np.int64] = np.clip(np.array(own) - first, 0, CHUNK_ROWS).sum(axis=1)
    return rows


def chunk_of_several(
    world: SimulatedWorld,
    number: int,
    n_rounds: int,
    seed: int,
    policies: Mapping[str, LoggingPolicy],
) -> pa.Table:
    """Table `number` of `log_of_several` with the same arguments; each can be drawn by itself."""
    own = _rows_of_each(n_rounds, len(policies))
    # Chunks are of equal length, save the last ones; a longer share may have one more.
    parts = [
        world.log_chunk(
            number,
            own[place],
            derive_seed(seed, "behavior policy", place),
            beta=policy.beta,
            epsilon=policy.epsilon,
            behavior_policy=name,
        )
        for place, (name, policy) in enumerate(policies.items())
        if number < num_chunks(own[place])
    ]
    turn = np.argsort(np.concatenate([np.arange(part.num_rows) for part in parts]), kind="stable")
    table = pa.concat_tables(parts).take(pa.array(turn)).combine_chunks()
    latent = world.context_latent(table)
    action = pc.index_in(table.column("action"), value_set=world.item_ids)
    action = torch.from_numpy(action.to_numpy().astype(np.int64))
    for name, policy in policies.items():
        found = policy.probability(latent, world.item_latent, world.item_logit, action)
        table = table.append_column(propensity_column(name), pa.array(found.numpy()))
    return table


def _rows_of_each(n_rounds: int, policies: int) -> list[int]:
    return [n_rounds // policies + (place < n_rounds % policies) for place in range(policies)]
