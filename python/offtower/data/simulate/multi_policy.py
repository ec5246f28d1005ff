"""Simulated logs of several behavior policies, with the propensity of each row under every one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray

from offtower.data.simulate.logging_policy import LoggingPolicy
from offtower.data.simulate.rounds import rounds_log_prob
from offtower.data.simulate.world import CHUNK_ROWS, SimulatedWorld, num_chunks
from offtower.errors import ConfigError
from offtower.seeds import derive_seed


def multi_policy_log(
    world: SimulatedWorld, n_rounds: int, seed: int, policies: Mapping[str, LoggingPolicy]
) -> Iterator[pa.Table]:
    """Draw a log whose rows come from several policies in turn.

    The columns are those of `SimulatedWorld.log`. `behavior_policy` is the policy's name, and for
    each policy a float64 column (`propensity_column`) has its exact probability of the logged item.

    Args:
        n_rounds: rounds in all, at least one for each policy.
        seed: of this log.
        policies: by name, each of the world's kind of logging policy.

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
    chunks = range(len(rounds_of_chunks(n_rounds, count)))
    return (multi_policy_chunk(world, number, n_rounds, seed, policies) for number in chunks)


def propensity_column(name: str) -> str:
    """Return the column of a policy's propensities."""
    return f"pscore_{name}"


def rounds_of_chunks(n_rounds: int, policies: int) -> NDArray[np.int64]:
    """Count the rounds of each table of `multi_policy_log`: (c,)."""
    own = _rows_of_each(n_rounds, policies)
    first = np.arange(num_chunks(own[0]))[:, None] * CHUNK_ROWS
    rows: NDArray[np.int64] = np.clip(np.array(own) - first, 0, CHUNK_ROWS).sum(axis=1)
    return rows


def multi_policy_chunk(
    world: SimulatedWorld,
    number: int,
    n_rounds: int,
    seed: int,
    policies: Mapping[str, LoggingPolicy],
) -> pa.Table:
    """Draw table `number` of `multi_policy_log` with the same arguments, without the others."""
    own = _rows_of_each(n_rounds, len(policies))
    # The last chunk of a policy is shorter; policies with more rows may have one more chunk.
    parts = [
        world.log_chunk(
            number,
            own[index],
            derive_seed(seed, "behavior policy", index),
            policy=policy,
            behavior_policy=name,
        )
        for index, (name, policy) in enumerate(policies.items())
        if number < num_chunks(own[index])
    ]
    size = world.slate_size
    rounds = np.concatenate([np.arange(part.num_rows) // size for part in parts])
    table = pa.concat_tables(parts).take(pa.array(np.argsort(rounds, kind="stable")))
    table = table.combine_chunks()
    action = pc.index_in(table.column("action"), value_set=world.item_ids)
    action = action.to_numpy().astype(np.int64)
    for name, policy in policies.items():
        found = _propensities(world, policy, table, action)
        table = table.append_column(propensity_column(name), pa.array(found))
    return table


def _propensities(
    world: SimulatedWorld, policy: LoggingPolicy, table: pa.Table, action: NDArray[np.int64]
) -> NDArray[np.float64]:
    """(n,) of the rows of whole rounds; in a slate, conditional on the positions above."""
    if world.slate is None and world.eligible is None:
        latent = world.context_latent(table)
        found: NDArray[np.float64] = policy.probability(
            latent, world.item_latent, world.item_logit, torch.from_numpy(action)
        ).numpy()
        return found
    size = world.slate_size
    contexts = table.take(pa.array(np.arange(0, table.num_rows, size)))
    slate = action.reshape(-1, size)
    return np.exp(rounds_log_prob(world, policy, contexts, slate).reshape(-1))


def _rows_of_each(n_rounds: int, policies: int) -> list[int]:
    return [n_rounds // policies + (index < n_rounds % policies) for index in range(policies)]
