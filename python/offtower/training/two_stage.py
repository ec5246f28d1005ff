"""Build a two-stage policy for POTEC, and the weights of logged clusters."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from offtower.config import Config
from offtower.crossfit.fold_towers import fit_plan, fold_models
from offtower.crossfit.loop import FitStep, ModelLoss, fit_out_of_fold
from offtower.data.eligible import EligibleRows
from offtower.data.encoding import tensor_of, to_tensors
from offtower.data.reader import Step
from offtower.data.rows import relative_weights
from offtower.models.features import FeatureTensors
from offtower.models.items import ItemFeatures
from offtower.models.reward.factored import FactoredRewardModel
from offtower.models.towers import Tower
from offtower.models.two_stage import (
    TwoStageContexts,
    TwoStageItems,
    bodies,
    frozen_items,
    precomputed_items,
    two_stage_policy,
)
from offtower.objectives import Objective, Potec
from offtower.ops import Eligibility, PolicyTerms, partial_terms
from offtower.prepare import PreparedData
from offtower.progress import Progress
from offtower.seeds import derive_seed, seed_torch
from offtower.training.step import TrainedPolicy
from offtower.training.workers import SINGLE_PROCESS, Workers

_KMEANS_ITEMS = 1 << 18
"""Centroids are fitted on at most this many random items."""
_BLOCK_LOGITS = 1 << 22
"""Logits held at a time for the second stage over eligible items."""


def build_two_stage(
    config: Config,
    objective: Objective,
    data: PreparedData,
    reward_model: FactoredRewardModel,
    progress: Progress,
    workers: Workers = SINGLE_PROCESS,
) -> TrainedPolicy:
    """Build the policy, its clusters, and a model of the logging policy over clusters.

    Cross-fitting: q of a row and pi_0 of its cluster come from models that did not see its fold.
    The second stage is the one that is served, the mean of all folds' logits, of which all but one
    saw the row. The correction is therefore that of DR; only the ranking of items within a cluster
    can follow the noise of the log.

    With several workers, each fits some folds of the model of the logging policy and builds the
    rest, with identical bits; collective.
    """
    assert isinstance(objective, Potec), "the only objective of two-stage policies"
    clusters = objective.clusters
    if isinstance(clusters, int):
        clusters = min(clusters, data.catalogue.num_items)
    seed_torch(config.seed, "policy")
    policy = two_stage_policy(
        config.policy, reward_model.towers, clusters, objective.inverse_temperature
    )
    policy.to(data.device)
    contexts, items = bodies(policy)
    if isinstance(clusters, int):
        _fit_centroids(items, data.items, config.seed)
    precomputed = precomputed_items(items, data.items, config.training.item_chunk)
    frozen, cluster = frozen_items(items, precomputed)
    logging = fit_logging_clusters(
        config, data, cluster.cpu(), items.num_clusters, progress, workers
    )
    weights = LoggedClusterWeights(contexts, frozen, cluster, logging)
    return TrainedPolicy(policy, precomputed, weights)


class LoggedClusterWeights:
    """log of pi(c|x) / pi_0(c|x) for logged clusters, in O(items of the cluster) per row.

    log pi(c|x) is log pi(a|x) - log pi(a|x, c) of the logged item; the latter is frozen.

    Args:
        contexts: context side of the policy.
        frozen: (N, K base_dim + 1) embeddings and biases of the second stage's logits.
        cluster: (N,) of each item.
        logging: one tower per fold whose outputs are logits of pi_0(c|x).
    """

    def __init__(
        self, contexts: TwoStageContexts, frozen: Tensor, cluster: Tensor, logging: list[Tower]
    ) -> None:
        self._contexts, self._frozen, self._logging = contexts, frozen, logging
        self._cluster, self._label = cluster, cluster.cpu().numpy()
        self._order = torch.argsort(cluster, stable=True)
        self._rank = torch.empty_like(self._order)
        self._rank[self._order] = torch.arange(len(cluster), device=cluster.device)
        count = torch.bincount(cluster)
        self._first = (torch.cumsum(count, 0) - count).tolist()
        self._count = count.tolist()

    @torch.no_grad()
    def __call__(self, batch: Step, context: FeatureTensors, terms: PolicyTerms) -> Tensor:
        action = tensor_of(batch.rows.action, self._cluster.device)
        log_second = self.log_within(context, action, batch.rows.eligible)
        logit = self._logging[batch.fold](context)[0]
        logit = _over_eligible(logit, batch.rows.eligible, self._label, logit.shape[1])
        log_logging = functional.log_softmax(logit, dim=1)
        logged = log_logging.gather(1, self._cluster[action].unsqueeze(1)).squeeze(1)
        return terms.log_prob.detach() - log_second - logged

    @torch.no_grad()
    def log_within(
        self, context: FeatureTensors, action: Tensor, eligible: EligibleRows | None = None
    ) -> Tensor:
        """(B,) log pi(a|x, c) of the logged items, over the cluster's eligible items."""
        u = self._contexts.frozen(context)
        logged, found = self._cluster[action], u.new_empty(len(u))
        for cluster in torch.unique(logged).tolist():
            rows = torch.nonzero(logged == cluster).squeeze(1)
            first = self._first[cluster]
            member = self._order[first : first + self._count[cluster]]
            of_cluster = self._frozen[member]
            if eligible is not None:
                index = rows.cpu().numpy()
                sets = eligible.take(index).on(u.device)
                place = self._rank[action[rows]] - first
                found[rows] = _log_softmax_at(u[rows], of_cluster, place, sets, member)
                continue
            part = partial_terms(
                u[rows],
                of_cluster[:, :-1].contiguous(),
                self._rank[action[rows]] - first,
                item_bias=of_cluster[:, -1].contiguous(),
            )
            found[rows] = part.action_logit - part.sums.log_normalizer
        return found


def fit_logging_clusters(
    config: Config,
    data: PreparedData,
    cluster: Tensor,
    num_clusters: int,
    progress: Progress,
    workers: Workers = SINGLE_PROCESS,
) -> list[Tower]:
    """Fit pi_0(c|x), a softmax over clusters, with one tower per fold.

    Towers, passes, batches, learning rate and folds are those of the reward model.

    Args:
        cluster: (N,) of each item, on the CPU.
        workers: worker r of R fits the folds r, r + R, ... and gets the others; collective.
    """
    settings, seed = config.reward_model, config.seed
    kind = replace(settings.tower, normalize=False, members=1)
    towers: list[Tower] = []
    for k in range(settings.folds):
        seed_torch(seed, "logging clusters", k)
        towers.append(Tower(data.context_encoding, num_clusters, kind).to(data.device))
    own = {k: towers[k] for k in range(workers.rank, settings.folds, workers.size)}
    fitted = fold_models(dict(own), settings)
    label = cluster.numpy()

    def losses(step: FitStep) -> ModelLoss:
        rows = step.batch.rows
        context = to_tensors(rows.context, data.device)
        logged = cluster[tensor_of(rows.action)].to(data.device)
        weight = relative_weights(rows, data.facts.mean_row_weight, data.device)

        def loss_of(index: int) -> Tensor:
            tower = towers[fitted[index].stream]
            logit = _over_eligible(tower(context)[0], rows.eligible, label, num_clusters)
            if weight is None:
                return functional.cross_entropy(logit, logged)
            loss = functional.cross_entropy(logit, logged, reduction="none")
            return (loss * weight.to(loss.dtype)).mean()

        return loss_of

    plan = fit_plan(
        settings, data, seed, "logging clusters", "fitting the logging policy over clusters"
    )
    if own:
        workers.on_each(lambda: fit_out_of_fold(data, plan, fitted, losses, progress))
    else:
        workers.on_each(lambda: None)
    states = {k: {n: t.cpu() for n, t in tower.state_dict().items()} for k, tower in own.items()}
    for found in workers.gather_objects(states):
        for k, state in found.items():
            towers[k].load_state_dict(state)
    return [tower.eval().requires_grad_(False) for tower in towers]


def _over_eligible(
    logit: Tensor, eligible: EligibleRows | None, label: NDArray[np.int64], num_clusters: int
) -> Tensor:
    """Logits (B, C) of clusters, -inf for those without an eligible item."""
    if eligible is None:
        return logit
    counts = eligible.items.cluster_counts(eligible, label, num_clusters)
    return logit.masked_fill(tensor_of(counts == 0, logit.device), float("-inf"))


def _log_softmax_at(
    context: Tensor, items: Tensor, index: Tensor, eligible: Eligibility, member: Tensor
) -> Tensor:
    """(B,) log-probabilities of the items at `index` among the eligible ones, a block at a time.

    items: (m, d + 1) embeddings and biases of the items `member` (m,).
    """
    out = context.new_empty(len(context))
    step = max(1, _BLOCK_LOGITS // len(member))
    for start in range(0, len(context), step):
        part = torch.arange(start, min(start + step, len(context)), device=context.device)
        logit = (context[part] @ items[:, :-1].T + items[:, -1]).double()
        there = eligible.contains(
            part.repeat_interleave(len(member)), member.repeat(len(part))
        ).view(logit.shape)
        log_probability = torch.log_softmax(logit.masked_fill(~there, float("-inf")), dim=1)
        out[part] = log_probability.gather(1, index[part, None])[:, 0].to(out.dtype)
    return out


@torch.no_grad()
def _fit_centroids(body: TwoStageItems, items: ItemFeatures, seed: int) -> None:
    from sklearn.cluster import MiniBatchKMeans

    rng = np.random.default_rng(derive_seed(seed, "clusters"))
    some = np.arange(items.num_items)
    if items.num_items > _KMEANS_ITEMS:
        some = np.sort(rng.choice(items.num_items, _KMEANS_ITEMS, replace=False))
    frozen, _ = body.frozen(items.at(torch.from_numpy(some)))
    model = MiniBatchKMeans(
        body.num_clusters,
        random_state=int(rng.integers(2**31)),
        n_init=1,
        batch_size=8192,
    )
    model.fit(frozen[:, :-1].cpu().double().numpy())
    assert isinstance(body.centroids, Tensor)
    body.centroids.copy_(torch.from_numpy(model.cluster_centers_))
