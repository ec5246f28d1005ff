"""Simulated logs in files, which are the same whether one process draws them or many."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from offtower.data.location import AnyPath
from offtower.data.log import write_log
from offtower.data.parts import RowSource, write_log_parts
from offtower.data.simulate.logging_policy import LoggingPolicy
from offtower.data.simulate.multi_policy import (
    multi_policy_chunk,
    multi_policy_log,
    rounds_of_chunks,
)
from offtower.data.simulate.world import CHUNK_ROWS, SimulatedWorld, num_chunks
from offtower.execution import LOCAL, Execution

ROWS_PER_FILE = 262_144
"""Fewer than in other logs: each row costs a pass over the catalogue."""


def write_simulated_log(
    world: SimulatedWorld,
    directory: AnyPath,
    n_rounds: int,
    seed: int,
    *,
    policies: Mapping[str, LoggingPolicy] | None = None,
    execution: Execution = LOCAL,
    task: str = "drawing",
) -> dict[str, Any]:
    """Write `world.log(n_rounds, seed)` as a log directory.

    Args:
        policies: logging policies by name, instead of the world's own (`multi_policy_log`).
        execution: draws the files; they are the same with any.

    Returns:
        The manifest.

    Raises:
        DataError: the directory exists.
        ConfigError: there is no row; or as `multi_policy_log`.
    """
    if policies is None:
        tables = world.log(n_rounds, seed)
    else:
        tables = multi_policy_log(world, n_rounds, seed, policies)
    source = _Chunks(world, n_rounds, seed, policies)
    if execution.mapper.distributed:
        return write_log_parts(
            directory,
            source,
            world.log_schema,
            execution,
            rows_per_file=ROWS_PER_FILE,
            task=task,
        )

    def drawn() -> Iterator[pa.Table]:
        for table in tables:
            yield table
            execution.progress.advance(table.num_rows)

    execution.progress.start(task, n_rounds * world.slate_size)
    manifest = write_log(directory, drawn(), world.log_schema, rows_per_file=ROWS_PER_FILE)
    execution.progress.finish()
    return manifest


class _Chunks(RowSource):
    """Chunks of a simulated log; each can be drawn without the others."""

    def __init__(
        self,
        world: SimulatedWorld,
        n_rounds: int,
        seed: int,
        policies: Mapping[str, LoggingPolicy] | None,
    ) -> None:
        self._world, self._rounds, self._seed, self._policies = world, n_rounds, seed, policies
        if policies is not None:
            rounds = rounds_of_chunks(n_rounds, len(policies))
        else:
            rounds = np.full(num_chunks(n_rounds), CHUNK_ROWS, dtype=np.int64)
            rounds[-1] = n_rounds - CHUNK_ROWS * (len(rounds) - 1)
        self.counts = rounds * world.slate_size

    def tables(self, unit: int) -> Iterator[pa.Table]:
        if self._policies is None:
            yield self._world.log_chunk(unit, self._rounds, self._seed)
        else:
            yield multi_policy_chunk(self._world, unit, self._rounds, self._seed, self._policies)
