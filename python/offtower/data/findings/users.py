"""Users in two parts of a split."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from offtower.data.columns import hashed, splitmix64
from offtower.data.findings.base import Finding, Level
from offtower.data.log import Log

_LIMIT = 1_000_000
"""Users of a part that are kept; beyond, a hash sample of them."""


@dataclass(frozen=True, eq=False)
class UserSample:
    """(g,) sorted hashes of a log's users: those that begin with `shift` zero bits."""

    key: NDArray[np.uint64]
    shift: int = 0

    @classmethod
    def of(cls, columns: Iterable[pa.ChunkedArray]) -> UserSample:
        """Collect the users of some columns."""
        found = cls(np.zeros(0, dtype=np.uint64))
        for column in columns:
            keys = splitmix64(np.unique(hashed(column)))
            found = cls(np.union1d(found.key, _above(keys, found.shift)), found.shift)
            while len(found.key) > _LIMIT:
                found = cls(_above(found.key, found.shift + 1), found.shift + 1)
        return found

    def common(self, other: UserSample) -> tuple[int, int]:
        """Return the numbers of users in both, and of users here; estimates for samples."""
        shift = max(self.shift, other.shift)
        mine, theirs = _above(self.key, shift), _above(other.key, shift)
        both = len(np.intersect1d(mine, theirs, assume_unique=True))
        return both << shift, len(mine) << shift


def users_in_both(parts: Mapping[str, Log], split_by: str | None = None) -> list[Finding]:
    """Find users of the first part in the others.

    Rows of one user are correlated: a policy that learned from a user's rows is flattered by other
    rows of this user. In a split by time that is how it will be served; in a split by user it is
    impossible.
    """
    names = list(parts)
    first = parts[names[0]]
    if first.schema.user_id is None:
        return []
    samples = {name: UserSample.of(_users(log)) for name, log in parts.items()}
    levels: dict[str | None, Level] = {"user": "error", "time": "info"}
    level = levels.get(split_by, "warning")
    found = []
    for name in names[1:]:
        both, users = samples[name].common(samples[names[0]])
        if both == 0:
            continue
        about = "about " if samples[name].shift or samples[names[0]].shift else ""
        found.append(
            Finding(
                level,
                "users in both parts",
                f"{about}{both:,} of {users:,} users of {name} are in {names[0]} too",
                {"users": both},
                remedy=""
                if level == "info"
                else "split by user (--split user), or by time if known users are served",
            )
        )
    return found


def _users(log: Log) -> Iterable[pa.ChunkedArray]:
    name = log.schema.user_id
    assert name is not None
    for table in log.read_row_groups(range(len(log.row_group_sizes)), [name]):
        yield table.column(name)


def _above(keys: NDArray[np.uint64], shift: int) -> NDArray[np.uint64]:
    return keys if shift == 0 else keys[keys >> np.uint64(64 - shift) == 0]
