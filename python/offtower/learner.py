"""The in-memory learner, in the conventions of scikit-learn and Open Bandit Pipeline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from offtower.config import parse_config
from offtower.crossfit.reward_model import obtain_reward_model
from offtower.data.catalogue import Catalogue
from offtower.data.convert import ITEM_VECTOR, from_bandit_feedback
from offtower.data.encoding import to_tensors
from offtower.data.indicators import as_ids, as_tokens, is_indicator, is_one_hot
from offtower.data.log import Log, TableLog
from offtower.data.schema import CatalogueSchema, FeatureSpec
from offtower.data.simulate.features import vector_array
from offtower.errors import ConfigError, DataError
from offtower.models.items import ItemFeatures
from offtower.models.policy import TwoTowerPolicy
from offtower.models.reward.base import RewardModel
from offtower.objectives import OBJECTIVES
from offtower.ops import policy_terms
from offtower.prepare import prepare
from offtower.progress import Progress
from offtower.training.auto import AutoTraining, train_auto
from offtower.training.device import to_configured_device
from offtower.training.run import build_trainer
from offtower.training.setup import uses_auto
from offtower.training.trainer import EpochHook, TrainingOutputs

BanditFeedback = Mapping[str, Any]

_CONTEXT = "context"


class TwoTowerPolicyLearner:
    """Learn a two-tower softmax policy from logged bandit feedback.

    Args:
        dim_context_features: width of the context vectors.
        dim_action_features: width of the action (item) vectors.
        embedding_dim: d, width of both towers' embeddings.
        hidden_layer_sizes: of both towers.
        activation: elu, relu, tanh, gelu or silu.
        temperature: of the softmax.
        item_bias: give each action a bias beside its embedding.
        objective: a name of `offtower.objectives.OBJECTIVES`, or "auto": several candidates are
            cross-fitted, one is chosen on held-out rows, and the policy is the ensemble of its
            members (see docs/reference/objectives.md). The embedding then has `embedding_dim`
            numbers per member, and the training settings below do not apply. A `context` of zeros
            and ones, mostly zeros, is read as a bag of tokens, and a one-hot `action_context` as
            item ids.
        auto: settings of `offtower.config.AutoConfig`, such as {"folds": 5}.
        objective_arguments: settings of the objective, such as {"max_weight": 100}.
        reward_model: settings of `offtower.config.RewardModelConfig`, such as
            {"kind": "dense", "estimator": "sklearn.linear_model:LogisticRegression"}; None uses
            two towers ("factored") for objectives that require a model, and no model otherwise.
        optimizer: this and the arguments up to validation_estimator are those of
            `offtower.config.TrainingConfig`.
        random_state: seed.
        device: for training, as `training.device`; the fitted policy is on the CPU.

    Example:
        >>> learner = TwoTowerPolicyLearner(5, 5, objective="ips").fit(bandit_feedback)
        >>> action_dist = learner.predict_proba(context, action_context)
    """

    def __init__(
        self,
        dim_context_features: int,
        dim_action_features: int,
        *,
        embedding_dim: int = 32,
        hidden_layer_sizes: Sequence[int] = (64, 64),
        activation: str = "elu",
        dropout: float = 0.0,
        temperature: float = 1.0,
        learn_temperature: bool = False,
        normalize: bool = False,
        item_bias: bool = False,
        objective: str = "auto",
        objective_arguments: Mapping[str, Any] | None = None,
        reward_model: Mapping[str, Any] | None = None,
        optimizer: str = "adamw",
        learning_rate: float = 3e-3,
        weight_decay: float = 1e-2,
        gradient_clip: float | None = 1.0,
        batch_size: int = 256,
        epochs: int = 50,
        shuffle: bool = True,
        patience: int | None = None,
        validation_estimator: str = "snips",
        auto: Mapping[str, Any] | None = None,
        random_state: int = 0,
        device: str = "cpu",
        progress: Progress | None = None,
    ) -> None:
        self.dim_context_features = dim_context_features
        self.dim_action_features = dim_action_features
        tower = {
            "hidden_layer_sizes": tuple(hidden_layer_sizes),
            "activation": activation,
            "dropout": dropout,
            "normalize": normalize,
        }
        if reward_model is None:
            kind = OBJECTIVES.get(objective)
            required = kind is not None and kind.requirements.reward_model
            reward_model = {"kind": "factored" if required else "none"}
        self.config = parse_config(
            {
                "name": "in-memory",
                "data": {"train": "in-memory", "catalogue": "in-memory"},
                "seed": random_state,
                "policy": {
                    "embedding_dim": embedding_dim,
                    "context_tower": tower,
                    "item_tower": tower,
                    "temperature": temperature,
                    "learn_temperature": learn_temperature,
                    "item_bias": item_bias,
                },
                "reward_model": dict(reward_model),
                "auto": dict(auto or {}),
                "objective": {"name": objective, "arguments": dict(objective_arguments or {})},
                "training": {
                    "epochs": epochs,
                    "batch_size": batch_size,
                    "optimizer": optimizer,
                    "learning_rate": learning_rate,
                    "weight_decay": weight_decay,
                    "gradient_clip": gradient_clip,
                    "shuffle": shuffle,
                    "patience": patience,
                    "validation_estimator": validation_estimator,
                    "log_every_steps": None,
                    "device": device,
                },
            },
            source="TwoTowerPolicyLearner",
        )
        self._progress = progress or Progress()
        self._tokens = self._ids = False
        self.policy_: TwoTowerPolicy
        self.reward_model_: RewardModel | None
        self.auto_: AutoTraining
        """With objective="auto": the candidates and the evidence for the choice."""
        self.history_: list[dict[str, Any]] = []
        """One mapping per epoch: loss, value estimate, weights, entropy, validation."""

    def fit(
        self,
        bandit_feedback: BanditFeedback | tuple[Log, Catalogue],
        validation: BanditFeedback | tuple[Log, Catalogue] | None = None,
        *,
        on_epoch_end: EpochHook | None = None,
    ) -> TwoTowerPolicyLearner:
        """Fit on a bandit-feedback dict (context, action, reward, pscore, action_context).

        `pi_b` and `expected_reward` are not read. With validation feedback, the weights of the
        epoch with the best lower bound of an off-policy estimate are kept.
        """
        self._read_indicators(bandit_feedback)
        log, catalogue = self._open(bandit_feedback)
        held_out = None if validation is None else self._open(validation)[0]
        self.data_ = prepare(log, held_out, catalogue, self._progress)
        data = to_configured_device(self.data_, self.config.training)
        if uses_auto(self.config, data):
            outputs = TrainingOutputs(progress=self._progress, on_epoch_end=on_epoch_end)
            found = train_auto(self.config, data, outputs=outputs)
            self.policy_ = found.policy
            self.reward_model_ = None
            self.auto_ = found
            self.history_ = found.result.history
            return self
        reward_model = obtain_reward_model(
            self.config.reward_model, data, self.config.seed, self._progress
        )
        trainer = build_trainer(
            self.config, data, reward_model, progress=self._progress, on_epoch_end=on_epoch_end
        )
        result = trainer.fit()
        self.policy_ = trainer.policy.cpu()
        self.reward_model_ = reward_model
        self.history_ = result.history
        return self

    def predict_proba(self, context: np.ndarray, action_context: np.ndarray) -> np.ndarray:
        """(n_rounds, n_actions, 1) probabilities of all actions, as in Open Bandit Pipeline."""
        u = torch.from_numpy(self.embed_contexts(context))
        v, bias = self._embed_items(action_context)
        policy = self._fitted()
        logits = (u @ v.T).double() / policy.temperature
        if bias is not None:
            logits = logits + bias
        return torch.softmax(logits, dim=1).numpy()[:, :, np.newaxis]

    def log_prob(
        self, context: np.ndarray, action: np.ndarray, action_context: np.ndarray
    ) -> np.ndarray:
        """(n_rounds,) log pi(a_i|x_i), without a rounds x actions array."""
        u = torch.from_numpy(self.embed_contexts(context))
        v, bias = self._embed_items(action_context)
        terms = policy_terms(
            u,
            v,
            torch.as_tensor(np.asarray(action), dtype=torch.int64, device="cpu"),
            temperature=self._fitted().temperature,
            item_bias=bias,
        )
        return terms.log_prob.numpy()

    @torch.no_grad()
    def embed_contexts(self, context: np.ndarray) -> np.ndarray:
        """(n_rounds, embedding_dim) float32."""
        policy = self._fitted()
        matrix = self._matrix(context, self.dim_context_features, "context")
        column = as_tokens(matrix) if self._tokens else _vectors(matrix)
        encoded = policy.context_encoding.encode(pa.table({_CONTEXT: column}))
        return policy.embed_contexts(to_tensors(encoded)).numpy()

    def embed_items(self, action_context: np.ndarray) -> np.ndarray:
        """(n_actions, embedding_dim) float32."""
        return self._embed_items(action_context)[0].numpy()

    @torch.no_grad()
    def _embed_items(self, action_context: np.ndarray) -> tuple[torch.Tensor, torch.Tensor | None]:
        policy = self._fitted()
        matrix = self._matrix(action_context, self.dim_action_features, "action_context")
        column = as_ids(matrix) if self._ids else _vectors(matrix)
        encoded = policy.item_encoding.encode(pa.table({ITEM_VECTOR: column}))
        items = policy.embed_items(ItemFeatures(encoded, len(matrix)))
        return items.embedding, items.bias

    def _fitted(self) -> TwoTowerPolicy:
        if not hasattr(self, "policy_"):
            raise ConfigError("this learner is not fitted yet; call fit(bandit_feedback) first")
        return self.policy_

    def _open(self, feedback: BanditFeedback | tuple[Log, Catalogue]) -> tuple[Log, Catalogue]:
        if isinstance(feedback, tuple):
            return feedback
        context = feedback.get("context")
        action_context = feedback.get("action_context")
        if context is not None:
            self._matrix(np.asarray(context), self.dim_context_features, "context")
        if action_context is not None:
            self._matrix(np.asarray(action_context), self.dim_action_features, "action_context")
        plain = dict(feedback)
        # Features that become ids or tokens are not copied as numbers first.
        if self._tokens:
            plain["context"] = np.zeros((len(np.asarray(context)), 1), dtype=np.float32)
        if self._ids:
            plain["action_context"] = np.zeros((len(np.asarray(action_context)), 1))
        log, catalogue = from_bandit_feedback(plain, _CONTEXT)
        if self._tokens:
            log = _with_tokens(log, np.asarray(context))
        if self._ids:
            catalogue = _of_ids(np.asarray(action_context))
        return log, catalogue

    def _read_indicators(self, feedback: BanditFeedback | tuple[Log, Catalogue]) -> None:
        """With objective=auto: detect token contexts and one-hot item ids."""
        self._tokens = self._ids = False
        if isinstance(feedback, tuple) or self.config.objective.name != "auto":
            return
        self._tokens = is_indicator(np.asarray(feedback.get("context")))
        self._ids = is_one_hot(np.asarray(feedback.get("action_context")))

    @staticmethod
    def _matrix(values: np.ndarray, width: int, name: str) -> np.ndarray:
        values = np.asarray(values)
        if values.ndim != 2 or values.shape[1] != width:
            raise DataError(
                f"'{name}' must have shape (rows, {width}), the width that the learner was built "
                f"with, but has shape {values.shape}"
            )
        return values


def _vectors(matrix: np.ndarray) -> pa.Array:
    return vector_array(matrix.astype(np.float32))


def _with_tokens(log: TableLog, context: np.ndarray) -> TableLog:
    column = log.table.column_names.index(_CONTEXT)
    table = log.table.set_column(column, _CONTEXT, as_tokens(context))
    return TableLog(table, replace(log.schema, context=(FeatureSpec(name=_CONTEXT, kind="bag"),)))


def _of_ids(action_context: np.ndarray) -> Catalogue:
    items = pa.table(
        {"item_id": np.arange(len(action_context)), ITEM_VECTOR: as_ids(action_context)}
    )
    feature = FeatureSpec(name=ITEM_VECTOR, kind="category")
    return Catalogue.from_table(items, CatalogueSchema(item_id="item_id", features=(feature,)))
