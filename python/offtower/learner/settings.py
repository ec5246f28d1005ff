"""The settings of a learner."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from sklearn.base import BaseEstimator

from offtower.config import Config, parse_config
from offtower.data.schema import CatalogueSchema, LogSchema
from offtower.errors import ConfigError
from offtower.objectives import OBJECTIVES
from offtower.progress import DrawnProgress, Progress


class LearnerSettings(BaseEstimator):  # type: ignore[misc]
    """Parameters of `TwoTowerPolicyLearner`, as scikit-learn keeps them, and their configuration.

    Raises:
        ConfigError: a setting is unknown or has a wrong value.
    """

    def __init__(
        self,
        dim_context_features: int | None = None,
        dim_action_features: int | None = None,
        *,
        embedding_dim: int = 32,
        hidden_layer_sizes: Sequence[int] | None = None,
        activation: str = "elu",
        dropout: float = 0.0,
        temperature: float | None = None,
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
        serving: Mapping[str, Any] | None = None,
        random_state: int = 0,
        device: str = "cpu",
        progress: Progress | bool | None = True,
        schema: LogSchema | Mapping[str, Any] | None = None,
        catalogue_schema: CatalogueSchema | Mapping[str, Any] | None = None,
    ) -> None:
        self.dim_context_features = dim_context_features
        self.dim_action_features = dim_action_features
        self.embedding_dim = embedding_dim
        self.hidden_layer_sizes = hidden_layer_sizes
        self.activation = activation
        self.dropout = dropout
        self.temperature = temperature
        self.learn_temperature = learn_temperature
        self.normalize = normalize
        self.item_bias = item_bias
        self.objective = objective
        self.objective_arguments = objective_arguments
        self.reward_model = reward_model
        self.optimizer = optimizer
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.gradient_clip = gradient_clip
        self.batch_size = batch_size
        self.epochs = epochs
        self.shuffle = shuffle
        self.patience = patience
        self.validation_estimator = validation_estimator
        self.auto = auto
        self.serving = serving
        self.random_state = random_state
        self.device = device
        self.progress = progress
        self.schema = schema
        self.catalogue_schema = catalogue_schema
        self.config  # noqa: B018 - refuse wrong settings now

    @property
    def config(self) -> Config:
        """The settings as a configuration.

        Raises:
            ConfigError: one is unknown or has a wrong value.
        """
        tower = {
            "hidden_layer_sizes": self.hidden_layer_sizes,
            "activation": self.activation,
            "dropout": self.dropout,
            "normalize": self.normalize,
        }
        reward_model = self.reward_model
        if reward_model is None:
            kind = OBJECTIVES.get(self.objective)
            required = kind is not None and kind.requirements.reward_model
            reward_model = {"kind": "factored" if required else "none"}
        config = parse_config(
            {
                "name": "in-memory",
                "data": {"train": "in-memory", "catalogue": "in-memory"},
                "seed": self.random_state,
                "policy": {
                    "embedding_dim": self.embedding_dim,
                    "context_tower": tower,
                    "item_tower": tower,
                    "temperature": self.temperature,
                    "learn_temperature": self.learn_temperature,
                    "item_bias": self.item_bias,
                },
                "reward_model": reward_model,
                "auto": self.auto or {},
                "serving": self.serving or {},
                "objective": {
                    "name": self.objective,
                    "arguments": self.objective_arguments or {},
                },
                "training": {
                    "epochs": self.epochs,
                    "batch_size": self.batch_size,
                    "optimizer": self.optimizer,
                    "learning_rate": self.learning_rate,
                    "weight_decay": self.weight_decay,
                    "gradient_clip": self.gradient_clip,
                    "shuffle": self.shuffle,
                    "patience": self.patience,
                    "validation_estimator": self.validation_estimator,
                    "log_every_steps": None,
                    "device": self.device,
                },
            },
            source="TwoTowerPolicyLearner",
        )
        if config.serving.new_items is not None:
            raise ConfigError(
                "serving.new_items reads a feature of a run's catalogue, which the learner does "
                "not: unset it, or train a run ('offtower train')"
            )
        if self.reward_model is not None:
            return config
        # A small log needs as many steps of the reward model as of the policy.
        model, training = config.reward_model, config.training
        return replace(
            config,
            reward_model=replace(
                model,
                epochs=max(model.epochs, training.epochs),
                batch_size=min(model.batch_size, training.batch_size),
            ),
        )

    def _reports(self) -> Progress:
        if isinstance(self.progress, Progress):
            return self.progress
        return DrawnProgress() if self.progress else Progress()
