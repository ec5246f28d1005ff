"""Proposals of the sampled softmax: the draws of a step and their log probabilities."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from offtower.errors import ConfigError
from offtower.ops import Eligibility
from offtower.sampling.draw_sources import BatchSource, FrequencySource, Source, UniformSource
from offtower.sampling.item_counts import ItemCounts
from offtower.sampling.top_k import PolicyTopK

PROPOSALS = ("uniform", "frequency", "in_batch", "mixed", "top_k")


@dataclass(frozen=True)
class StepDraws:
    """Draws of one step, shared by its rows; inputs of `ops.sampled_policy_terms`, on the CPU."""

    item: Tensor
    """(m,) int64 item numbers."""
    log_proposal: Tensor
    """(m,) float64; m exp(log_proposal) is the expected count of a draw's item."""
    total: int
    """m, all draws of the step; these may be the ones of a part of the catalogue."""
    exact_item: Tensor | None = None
    """(B, k) items that each row passed to `draw` counts exactly, padded with -1."""

    @property
    def log_count(self) -> Tensor:
        """(m,) log of the expected count of each draw's item."""
        return self.log_proposal + math.log(self.total)


class Proposal:
    """A union of sources. Expected counts of an item add up, so log Q is exact for every union.

    Draws are a function of the seed, which is a function of (seed, epoch, step): every worker of a
    step draws the same items, and a resumed run repeats them.

    Args:
        sources: sources of the draws.
        top_k: items of largest probability under a recent policy, which each row counts exactly.
    """

    def __init__(self, sources: Sequence[Source], top_k: PolicyTopK | None = None) -> None:
        self.sources = tuple(sources)
        self.top_k = top_k

    def due(self, step: int) -> bool:
        """Whether `at_step` reads the policy's weights at this step."""
        return self.top_k is not None and self.top_k.due(step)

    def at_step(self, step: int) -> None:
        """Refresh the search if it is due; called before each step with the steps taken so far."""
        if self.top_k is not None:
            self.top_k.at_step(step)

    def close(self) -> None:
        """End the search's thread."""
        if self.top_k is not None:
            self.top_k.close()

    def state(self) -> dict[str, Tensor]:
        """State for a checkpoint; empty for proposals that do not depend on the policy."""
        return {} if self.top_k is None else self.top_k.state()

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore the state of a checkpoint."""
        if self.top_k is not None:
            self.top_k.load_state(tensors)

    def size(self, batch_rows: int) -> int:
        """Number of draws in a step of `batch_rows` rows over all workers."""
        return sum(source.size(batch_rows) for source in self.sources)

    def draw(
        self,
        seed: int,
        batch_action: Tensor,
        context_embedding: Tensor | None = None,
        within: tuple[int, int] | None = None,
        eligible: Eligibility | None = None,
    ) -> StepDraws:
        """Draw for one step.

        Args:
            seed: seed of this step.
            batch_action: logged items of the step's rows over all workers, on the CPU.
            context_embedding: (B, d) of this worker's rows, for the exact items; detached.
            within: (start, stop) of the items whose draws are kept; all m are made.
            eligible: of this worker's rows, for the exact items. Draws are shared by all rows, so
                each row masks those that it may not choose (`ops.sampled_policy_terms`).
        """
        action = batch_action.numpy()
        sequence = np.random.SeedSequence(seed)
        item = np.concatenate(
            [
                source.draw(np.random.Philox(part), action)
                for source, part in zip(
                    self.sources, sequence.spawn(len(self.sources)), strict=True
                )
            ]
        )
        total = len(item)
        if within is not None:
            item = item[(item >= within[0]) & (item < within[1])]
        exact = None
        if self.top_k is not None and context_embedding is not None:
            exact = self.top_k.search(context_embedding.detach(), eligible)[1].cpu()
        log_proposal = torch.from_numpy(self.log_prob(item, len(action)))
        return StepDraws(torch.from_numpy(item), log_proposal, total, exact)

    def log_prob(self, item: NDArray[np.int64], batch_rows: int) -> NDArray[np.float64]:
        """log Q(a) = log(expected count of a / draws); -inf for items that are never drawn."""
        total = np.zeros(item.shape)
        for source in self.sources:
            total += source.expected_count(item, batch_rows)
        with np.errstate(divide="ignore"):
            result: NDArray[np.float64] = np.log(total) - np.log(self.size(batch_rows))
        return result


def make_proposal(
    name: str,
    num_items: int,
    *,
    num_samples: int,
    counts: ItemCounts | None = None,
    power: float = 0.75,
    uniform_share: float = 0.25,
    top_k: PolicyTopK | None = None,
) -> Proposal:
    """Make a proposal by name.

    uniform: uniform draws. frequency: logged items by count^power and a share of uniform draws,
    which bounds all weights and reaches items that were never logged. in_batch: the batch's own
    items only, so items outside the log have no part in the normalizer. mixed: the batch's items
    and uniform draws (mixed negative sampling). top_k: uniform draws, and the likely items of each
    row exactly.

    Args:
        num_samples: draws per step, beside the batch's own rows.
        counts: counts of the training log, for frequency, in_batch and mixed.
        power: exponent of the counts, for frequency.
        uniform_share: share of uniform draws in (0, 1], for frequency.
        top_k: the search, for top_k.

    Raises:
        ConfigError: unknown name, or counts or top_k are missing.

    Source: Yang et al. 2020, "Mixed negative sampling for learning two-tower neural networks in
    recommendations"; Yi et al. 2019, "Sampling-bias-corrected neural modeling for large corpus item
    recommendations"; defensive shares, Hesterberg 1995.
    """
    if name not in PROPOSALS:
        raise ConfigError(f"unknown proposal '{name}'; known: {', '.join(PROPOSALS)}")
    if name == "top_k" and top_k is None:
        raise ConfigError("proposal 'top_k' needs a PolicyTopK, which searches the catalogue")
    if name in ("uniform", "top_k"):
        return Proposal([UniformSource(num_items, num_samples)], top_k)
    if counts is None or counts.rows == 0:
        raise ConfigError(f"proposal '{name}' needs the counts of the logged items")
    if name == "in_batch":
        return Proposal([BatchSource(counts)])
    if name == "mixed":
        return Proposal([BatchSource(counts), UniformSource(num_items, num_samples)])
    uniform = max(1, round(num_samples * uniform_share))
    sources: list[Source] = [UniformSource(num_items, uniform)]
    if uniform < num_samples:
        sources.append(FrequencySource(counts, num_samples - uniform, power))
    return Proposal(sources)
