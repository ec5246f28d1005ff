"""Sections about learning: the data, the towers, what is maximised, and the loop."""

from __future__ import annotations

import re
from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator
from pydantic.dataclasses import dataclass

from offtower.config.strict import STRICT


@dataclass(config=STRICT)
class DataConfig:
    """Where the logs and the catalogue are, and how they are read."""

    train: str
    """Directory of Parquet files, or its address (s3://..., docs/stores.md): the log to learn
    from."""
    catalogue: str
    """Directory of Parquet files, or its address: one row per item."""
    validation: str | None = None
    """Log for model selection and early stopping. Without one the last epoch is kept."""
    test: str | None = None
    """Log that `offtower evaluate` judges the policy on."""
    log_schema: dict[str, Any] | None = None
    """Columns and features of the log; not needed where offtower wrote the directory."""
    catalogue_schema: dict[str, Any] | None = None
    """Features of the items; not needed where offtower wrote the directory."""
    window_rows: int = Field(default=1_048_576, ge=1)
    """Rows that are shuffled together in memory."""
    on_bad_rows: Literal["error", "quarantine"] = "error"


@dataclass(config=STRICT)
class TowerConfig:
    """One tower: encoded features -> embedding."""

    hidden_layer_sizes: tuple[int, ...] = (64, 64)
    activation: Literal["elu", "relu", "tanh", "gelu", "silu"] = "elu"
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    normalize: bool = False
    """Scale embeddings to unit length; then the temperature sets the sharpness of the policy."""
    category_embedding_dim: int = Field(default=16, ge=1)
    """Width of a category's or bag's embedding where the feature does not state its own."""
    bag: Literal["mean", "root"] = "mean"
    """How the embeddings of a bag's values are joined: their mean, or their sum over the root of
    their number, which keeps its size whatever the number; better for long bags, such as texts."""
    tables: Literal["input", "output"] = "input"
    """Where embeddings of categories and bags go. input: the layers read them; output: they are as
    wide as the output and added to it, and the layers read numbers and vectors alone. A linear
    tower (no hidden layers) of ids and tokens learns far better so."""
    unknown_rate: float = Field(default=0.02, ge=0.0, lt=1.0)
    """Share of category values replaced by "unknown" in training, so that the row which new items
    and new users share is itself trained."""
    members: int = Field(default=1, ge=1)
    """Networks side by side, each with its share of the embedding: <u, v> is then the sum of their
    inner products, which is an ensemble's. objective=auto makes such policies."""
    bias_scale: float = Field(default=1.0, gt=0.0, allow_inf_nan=False)
    """Factor of the item bias, which the temperature does not touch."""
    module: str | None = None
    """Import path "package.module:Class" of a user's own torch module in place of the MLP."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments for `module`."""


@dataclass(config=STRICT)
class PolicyConfig:
    """The two-tower softmax policy."""

    embedding_dim: int = Field(default=32, ge=1)
    context_tower: TowerConfig = field(default_factory=TowerConfig)
    item_tower: TowerConfig = field(default_factory=TowerConfig)
    temperature: float = Field(default=1.0, gt=0.0, allow_inf_nan=False)
    learn_temperature: bool = False
    item_bias: bool = False
    """Let the item tower give each item a bias beside its embedding."""


@dataclass(config=STRICT)
class RewardModelConfig:
    """q(x, a): fitted first, frozen while the policy learns."""

    kind: Literal["none", "dense", "factored"] = "none"
    """dense: any scikit-learn regressor, for small catalogues; factored: two towers, for large."""
    folds: int = Field(default=3, ge=1, le=64)
    """Cross-fitting: a row's reward is predicted by the model that did not see the row's fold.
    1 fits and predicts on the same rows."""
    estimator: str = "sklearn.ensemble:HistGradientBoostingRegressor"
    """dense: import path "package.module:Class" of a scikit-learn regressor or classifier."""
    arguments: dict[str, Any] = field(default_factory=dict)
    embedding_dim: int = Field(default=32, ge=1)
    tower: TowerConfig = field(default_factory=TowerConfig)
    link: Literal["auto", "identity", "sigmoid"] = "auto"
    """factored: auto is sigmoid for rewards in {0, 1}, identity otherwise."""
    epochs: int = Field(default=20, ge=1)
    batch_size: int = Field(default=1024, ge=1)
    learning_rate: float = Field(default=3e-3, gt=0.0)
    weight_decay: float = Field(default=1e-2, ge=0.0)


@dataclass(config=STRICT)
class ObjectiveConfig:
    """What training maximises."""

    name: str = "auto"
    """A registered name (`offtower doctor` lists them) or an import path "package.module:Class"."""
    arguments: dict[str, Any] = field(default_factory=dict)
    kl: float = Field(default=0.0, ge=0.0)
    """Price of KL(pi || pi_0), estimated from logged propensities: stay near the log."""
    kl_policy: str | None = None
    """Folder of the policy that logged, or of a clone of it (runs/<name>/policy), learned with this
    run's encodings: the price `kl` is then on the exact KL to it, and needs no propensities."""
    imitation: float = Field(default=0.0, ge=0.0)
    """Weight of the likelihood of all logged items, whatever they earned: the other KL."""
    entropy: float = Field(default=0.0, ge=0.0)
    """Weight of the policy's entropy: stay away from determinism."""

    @model_validator(mode="after")
    def _check(self) -> ObjectiveConfig:
        if self.kl_policy is not None and self.kl == 0.0:
            raise ValueError("kl_policy is there for the price objective.kl, which is 0: set both")
        if self.kl_policy is not None and self.name == "auto":
            raise ValueError(
                "objective.name=auto has no price on the KL to a policy: name an objective, or "
                "leave kl_policy out"
            )
        return self


@dataclass(config=STRICT)
class AutoConfig:
    """objective.name=auto: several learners, cross-fitted; held-out rows choose between them.

    It has its own schedule, learning rates and temperature; of `training` it takes terms and
    item_chunk, of `policy` the sizes. The policy is an ensemble: its embedding has
    policy.embedding_dim numbers for each member.
    """

    candidates: tuple[str, ...] | None = None
    """In the order of belief; docs/objectives.md says what they are. null is regression_linear,
    regression, likelihood_linear, likelihood; where the catalogue knows its items by ids alone,
    most of which the log seldom rewards, implicit_linear, the likelihoods, then the regressions."""
    folds: int = Field(default=3, ge=2, le=64)
    """Parts of the log; a member learns from all but one, which judges it."""
    members: int | None = Field(default=None, ge=1)
    """Members that judge, and members of the ensemble; null is one a fold. Fewer save time and
    width on large logs."""
    refit: bool = True
    """Learn the chosen candidate's members again from all rows; else those that were judged, each
    of which misses a fold, are the ensemble."""
    epochs: int | None = Field(default=None, ge=1)
    """Passes over the log; null takes 400 to 600 steps."""
    batch_size: int | None = Field(default=None, ge=1)
    """null is a power of two between 64 and 1024, by the rows of the log."""
    judge_rows: int = Field(default=100_000, ge=100)
    """Held-out rows that the choice is made on, at most."""

    @model_validator(mode="after")
    def _check(self) -> AutoConfig:
        if self.members is not None and self.members > self.folds:
            raise ValueError(f"auto.members is {self.members}, of {self.folds} auto.folds")
        return self


def _device(name: str) -> str:
    if re.fullmatch(r"auto|cpu|cuda(:[0-9]+)?", name) is None:
        raise ValueError("a device is auto, cpu, cuda, or cuda and a number, such as cuda:1")
    return name


@dataclass(config=STRICT)
class TrainingConfig:
    """The loop."""

    epochs: int = Field(default=20, ge=1)
    batch_size: int = Field(default=1024, ge=1)
    terms: Literal["exact", "sampled"] = "exact"
    """exact: a step reads the whole catalogue; sampled: it reads the draws of `sampling`."""
    strategy: Literal["replicated", "item_sharded"] = "replicated"
    """On several workers (`offtower train --workers`). replicated: each has the whole catalogue and
    its rows of every batch; item_sharded: each has its items, their id embeddings and optimiser
    state, and what is sent does not grow with the catalogue."""
    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"
    learning_rate: float = Field(default=1e-3, gt=0.0)
    weight_decay: float = Field(default=1e-2, ge=0.0)
    table_updates: Literal["auto", "dense", "lazy_adamw", "rowwise_adagrad"] = "auto"
    """Embedding tables of categories (item ids among them). dense: every row in every step;
    lazy_adamw: rows that the step touched, with AdamW's moments and decay; rowwise_adagrad: the
    same with one number of state a row. auto is lazy_adamw for sampled terms with adamw, else
    dense."""
    table_learning_rate: float | None = Field(default=None, gt=0.0)
    """Of tables that are not updated densely; null is `learning_rate`."""
    gradient_clip: float | None = Field(default=1.0, gt=0.0)
    """Largest norm of the whole gradient; null leaves it alone."""
    warm_up: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of training in which the learning rate rises from 0 to its value."""
    decay: Literal["none", "linear", "cosine"] = "none"
    """How the learning rate falls to 0 from the end of the warm-up to the end of training."""
    weight_average: float | None = Field(default=None, gt=0.0, lt=1.0)
    """Share of training, at its end, over which weights are averaged step by step (Izmailov et al.
    2018); validations and the saved policy take the average. null takes the last weights."""
    warm_start: str | None = None
    """Folder of a policy (runs/<name>/policy) of the same architecture that training starts from,
    such as that of a regression or of weighted likelihood before dr."""
    start: Literal["random", "uniform"] = "random"
    """uniform: before the first step every item is equally likely in every context (the context
    tower's last weights and the item bias are zero; the item tower is as random as ever)."""
    temperature_from: float | None = Field(default=None, gt=0.0, allow_inf_nan=False)
    """Temperature of the first step, from which it goes to policy.temperature geometrically; null
    is policy.temperature throughout. Only steps take it: validations and the saved policy have
    policy.temperature, with which the policy is served."""
    temperature_until: float = Field(default=0.5, gt=0.0, le=1.0)
    """Share of training after which steps take policy.temperature; for temperature_from."""
    shuffle: bool = True
    patience: int | None = Field(default=None, ge=1)
    """Stop after so many validations without a better lower bound."""
    validation_estimator: str = "snips"
    validate_every_epochs: int = Field(default=1, ge=1)
    checkpoint_every_seconds: float = Field(default=300.0, ge=0.0)
    """Also inside an epoch; an epoch's end always writes one."""
    checkpoints_kept: int = Field(default=2, ge=1)
    log_every_steps: int = Field(default=50, ge=1)
    item_chunk: int = Field(default=65_536, ge=1)
    """Items that the item tower embeds at a time; bounds the memory of its activations."""
    threads: int | None = Field(default=None, ge=1)
    device: Annotated[str, AfterValidator(_device)] = "auto"
    """Where the policy learns. auto: a GPU where torch sees one and the fused CUDA operators are
    built, else the CPU (`offtower doctor` says which and why). cuda, cuda:1: that GPU, with the
    plain-torch operators where the fused ones are not built. With `--worker-gpus` each worker has a
    GPU of its own."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: training passes of the towers multiply in bfloat16 and hand their embeddings to the
    operators so, which sum in float32; weights, their gradients and the optimiser's state stay
    float32, and so do validation and the saved policy. Not with item_sharded."""
    device_features_gib: float | None = Field(default=None, ge=0.0)
    """Encoded features of items that a GPU keeps in its memory; larger ones are sent chunk by chunk
    in every step. null is a quarter of what is free."""
    measure_terms: bool = True
    """Report entropy and weights for objectives that do not need the softmax (costs O(items))."""


@dataclass(config=STRICT)
class SamplingConfig:
    """Draws of the sampled softmax, for training.terms=sampled."""

    proposal: Literal["mixed", "uniform", "frequency", "in_batch", "top_k"] = "mixed"
    """mixed: the batch's items and uniform draws; top_k: uniform draws, and for each row its most
    likely items under a recent policy, exactly; docs/sampling.md says when to take which."""
    num_samples: int = Field(default=4096, ge=1)
    """Draws a step, shared by its rows; the batch's own items come on top."""
    power: float = Field(default=0.75, ge=0.0, le=1.0)
    """frequency: draws are proportional to an item's logged rows to this power."""
    uniform_share: float = Field(default=0.25, gt=0.0, le=1.0)
    """frequency: share of the draws that is uniform, so that every item can be drawn."""
    top_k: int = Field(default=32, ge=1)
    """top_k: items that each row counts exactly."""
    refresh_steps: int = Field(default=200, ge=1)
    """top_k: steps between two embeddings of the catalogue, which happen in the background."""
    exact_every: int | None = Field(default=None, ge=1)
    """Take the exact terms in every so-manieth step; null never does."""


@dataclass(config=STRICT)
class TrackingConfig:
    """Where the metrics of training go, beside metrics.jsonl of the run."""

    tensorboard: bool = False
    """Event files in the run's folder `tensorboard`."""
    mlflow: str | None = None
    """URI of an MLflow tracking server."""
    mlflow_experiment: str = "offtower"
