"""Memory of this machine, and measured seconds of a training step, of an evaluated row and of a
read row.

Measurements are rounded to powers of the square root of two, so that repeated runs on one machine
mostly have the same plan.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from offtower.config import Config
from offtower.data.log_part import LogPart
from offtower.data.order import Cursor
from offtower.data.reader import Step
from offtower.data.rows import EncodedRows
from offtower.models.items import DEFAULT_CHUNK, ItemEmbeddings
from offtower.models.policy import TwoTowerPolicy
from offtower.ops import policy_terms
from offtower.prepare import PreparedData
from offtower.progress import Progress
from offtower.sampling import ItemCounts
from offtower.training.auto.candidates import PolicyCandidate
from offtower.training.auto.folds import NOTHING
from offtower.training.auto.held_out import BASED_INVERSE_TEMPERATURES, INVERSE_TEMPERATURES
from offtower.training.auto.item_pass import PASS_ITEMS, PASS_ROWS, logits
from offtower.training.auto.kept_rows import SCAN_ROWS
from offtower.training.auto.members import start_member
from offtower.training.auto.mixed_policy import fit_mixed_policy
from offtower.training.auto.temperature_sums import TemperatureSums
from offtower.training.step import StepKey

_REPEATS = 3
ROWS_PER_PASS = 256
"""Held-out rows of a member that share a pass over the catalogue, at least, where there are so
many."""
_SOLVED_ROWS = 16_384
_PROBE_ROWS, _PROBE_ITEMS, _PROBE_DIM = 256, 8192, 64


def rounded(seconds: float) -> float:
    """The nearest power of the square root of two."""
    return math.pow(2.0, round(2.0 * math.log2(max(seconds, 1e-12))) / 2.0)


def operations_per_second(device: torch.device) -> float:
    """Multiplications and additions of the exact terms of a training step."""
    generator = torch.Generator().manual_seed(0)
    shape = (_PROBE_ROWS + _PROBE_ITEMS, _PROBE_DIM)
    u, v = torch.randn(shape, generator=generator).to(device).split((_PROBE_ROWS, _PROBE_ITEMS))
    u, v = u.requires_grad_(), v.requires_grad_()
    action = torch.zeros(_PROBE_ROWS, dtype=torch.int64, device=device)
    seconds = _shortest(lambda: policy_terms(u, v, action).log_prob.sum().backward(), device)
    return 1.0 / rounded(seconds / (8.0 * _PROBE_ROWS * _PROBE_ITEMS * _PROBE_DIM))


def read_sample(data: PreparedData) -> tuple[EncodedRows, float]:
    """Read one row group: its encoded rows, and the seconds of a row."""
    group = int(np.argmax(data.train.row_group_sizes))
    began = time.perf_counter()
    rows = EncodedRows.concat(
        list(replace(data, train=LogPart(data.train, [group])).scan(SCAN_ROWS))
    )
    return rows, rounded((time.perf_counter() - began) / max(len(rows), 1))


def step_seconds(
    candidate: PolicyCandidate, config: Config, data: PreparedData, sample: EncodedRows, batch: int
) -> float:
    """Seconds of a training step of one member on `batch` of the sample's rows, which are repeated
    where there are fewer."""
    member = start_member(
        candidate, config, data, NOTHING, Progress(), ItemCounts.of(sample.action)
    )
    turn = 0

    def step() -> None:
        nonlocal turn
        index = (np.arange(batch) + turn * batch) % len(sample)
        loss = member.step.loss(
            Step(Cursor(0, 0, 0), sample.take(index), 0), key=StepKey(turn, turn)
        )[0].loss
        optimizer = member.model.optimizer
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        turn += 1

    seconds = _shortest(step, data.device)
    if member.step.proposal is not None:
        member.step.proposal.close()
    return rounded(seconds)


def solution_seconds(candidate: PolicyCandidate, data: PreparedData, sample: EncodedRows) -> float:
    """Seconds of a row in the fit of a candidate that is solved."""
    policy = TwoTowerPolicy(candidate.policy, data.context_encoding, data.item_encoding)
    rows = sample.take(np.arange(min(len(sample), _SOLVED_ROWS)))
    began = time.perf_counter()
    fit_mixed_policy(policy, rows, data.items, binary=data.facts.binary_reward)
    return rounded((time.perf_counter() - began) / len(rows))


def row_seconds(candidate: PolicyCandidate, data: PreparedData) -> float:
    """Seconds of a candidate's terms in one held-out row, over the whole catalogue, with its share
    of the pass that embeds the items."""
    dim = candidate.policy.embedding_dim
    generator = torch.Generator().manual_seed(0)
    shape = (PASS_ROWS + PASS_ITEMS, dim)
    u, v = (
        torch.randn(shape, generator=generator)
        .div_(dim**0.5)
        .to(data.device)
        .split((PASS_ROWS, PASS_ITEMS))
    )
    units = BASED_INVERSE_TEMPERATURES if candidate.solved else INVERSE_TEMPERATURES
    sums = TemperatureSums(PASS_ROWS, units, data.device, rewards=True)
    items = ItemEmbeddings(v, None)

    def work() -> None:
        logit = logits(u, items)
        sums.add(slice(0, PASS_ROWS), logit, logit)

    tower = TwoTowerPolicy(candidate.policy, data.context_encoding, data.item_encoding).item_tower
    tower.to(data.device).eval()
    some = min(DEFAULT_CHUNK, data.items.num_items)
    numbered = data.items.numbered(0, some)
    with torch.no_grad():
        sums_of_item = _shortest(work, data.device) / (PASS_ROWS * PASS_ITEMS)
        embedding = _shortest(lambda: tower(*numbered), data.device) / (some * ROWS_PER_PASS)
    return rounded((sums_of_item + embedding) * data.items.num_items)


def machine_bytes() -> int:
    """Memory of this machine, or of its container where that has a limit."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
    except OSError:
        return total
    return min(total, int(limit)) if limit.isdecimal() else total


def _shortest(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of the shortest of some runs, after one that is not timed."""
    found = []
    for _ in range(1 + _REPEATS):
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(time.perf_counter() - began)
    return min(found[1:])
