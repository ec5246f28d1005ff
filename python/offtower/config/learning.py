"""Configuration of the data, the towers, the objective and the training loop."""

from __future__ import annotations

import re
from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator
from pydantic.dataclasses import dataclass

from offtower.config.strict import STRICT


@dataclass(config=STRICT)
class DataConfig:
    """Paths of the logs and the catalogue, and how they are read."""

    train: str
    """Training log: directory of Parquet files, or its address (s3://..., docs/stores.md)."""
    catalogue: str
    """Directory of Parquet files with one row per item, or its address."""
    validation: str | None = None
    """Log for model selection and early stopping; without one the last epoch is kept."""
    test: str | None = None
    """Log on which `offtower evaluate` evaluates the policy."""
    log_schema: dict[str, Any] | None = None
    """Columns and features of the log; not needed for directories written by offtower."""
    catalogue_schema: dict[str, Any] | None = None
    """Features of the items; not needed for directories written by offtower."""
    window_rows: int = Field(default=1_048_576, ge=1)
    """Rows that are shuffled together in memory."""
    cache_gib: float = Field(default=4.0, ge=0.0)
    """Largest size in GiB of encoded rows that each worker keeps for later epochs, in files
    without a name in the folder for temporary files (TMPDIR); 0 encodes the log in each epoch."""
    on_bad_rows: Literal["error", "quarantine"] = "error"


@dataclass(config=STRICT)
class HistoryConfig:
    """How a context tower reads histories, lists of items (docs/how-to/histories.md)."""

    encoder: Literal["mean", "attention", "transformer"] = "mean"
    """mean: the mean of the events' vectors; attention: their mean with learned weights;
    transformer: causal self-attention over the events, read at the newest."""
    attention: Literal["softmax", "pointwise"] = "softmax"
    """transformer: weights of a row sum to 1, or are each the SiLU of a score (HSTU, Zhai et al.
    2024), which keeps how often something occurred."""
    layers: int = Field(default=2, ge=1)
    """transformer: layers."""
    heads: int = Field(default=2, ge=1)
    """attention and transformer: heads, of width / heads numbers each."""
    width: int | None = Field(default=None, ge=1)
    """Width of the events' vectors; null is that of the items' table, where there are heads rounded
    down to a multiple of them. Other widths have a linear map from the table's rows."""
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    items: Literal["shared", "own"] = "shared"
    """shared: events are rows of the item tower's table of ids, where it has one; own: of a table
    that only this tower reads."""


@dataclass(config=STRICT)
class TowerConfig:
    """One tower: encoded features -> embedding."""

    hidden_layer_sizes: tuple[int, ...] | None = None
    """null is (64, 64); for a tower whose only feature is a category or a bag it is none, with
    `tables: output` and `bag: root`. The stored policy has the sizes."""
    activation: Literal["elu", "relu", "tanh", "gelu", "silu"] = "elu"
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    normalize: bool = False
    """Scale embeddings to unit length."""
    category_embedding_dim: int = Field(default=16, ge=1)
    """Embedding width of categories and bags whose feature does not set its own."""
    bag: Literal["mean", "root"] = "mean"
    """Pooling of a bag's embeddings: their mean, or their sum divided by the square root of their
    number, which keeps its scale for bags of any length; better for long bags, such as texts."""
    tables: Literal["input", "output"] = "input"
    """How embeddings of categories and bags enter. input: they feed the layers; output: they are as
    wide as the output and added to it, and the layers read numbers and vectors only. Better for
    linear towers (no hidden layers) of ids and tokens: .555 instead of .505 on 159 labels
    (docs/results/)."""
    history: HistoryConfig = field(default_factory=HistoryConfig)
    """How histories enter the layers; for the context tower."""
    unknown_rate: float = Field(default=0.02, ge=0.0, lt=1.0)
    """Share of category values replaced by "unknown" in training, which trains the embedding that
    new items and new users share."""
    members: int = Field(default=1, ge=1)
    """Networks side by side, each with its share of the embedding, so that <u, v> is the sum of
    their inner products: an ensemble, as built by objective=auto."""
    bias_scale: float = Field(default=1.0, ge=0.0, allow_inf_nan=False)
    """Factor of the item bias, which the temperature does not scale."""
    module: str | None = None
    """Import path "package.module:Class" of a torch module that replaces the MLP."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments for `module`."""


_WITHOUT_TEMPERATURE = {"regression": 0.1, "implicit_squares": 0.05}
"""Temperatures for objectives whose fit has none. Their scores would leave a softmax at 1 nearly
uniform (docs/results/2026-11-30-objective-defaults.md)."""


@dataclass(config=STRICT)
class PolicyConfig:
    """The two-tower softmax policy."""

    embedding_dim: int = Field(default=32, ge=1)
    context_tower: TowerConfig = field(default_factory=TowerConfig)
    item_tower: TowerConfig = field(default_factory=TowerConfig)
    temperature: float | None = Field(default=None, gt=0.0, allow_inf_nan=False)
    """Divides the inner products. null is 1; without item_bias it is .1 for `regression` and .05
    for `implicit_squares`, whose fits do not contain it. The stored policy has the number."""
    learn_temperature: bool = False
    item_bias: bool = False
    """Add a bias per item to the logits."""

    def softmax_temperature(self, objective: str = "") -> float:
        """Return the temperature under an objective."""
        if self.temperature is not None:
            return self.temperature
        # The temperature divides inner products and not biases, so it would change the order.
        return 1.0 if self.item_bias else _WITHOUT_TEMPERATURE.get(objective, 1.0)


@dataclass(config=STRICT)
class RewardModelConfig:
    """The reward model q(x, a), fitted before the policy and then frozen."""

    kind: Literal["none", "dense", "factored"] = "none"
    """dense: any scikit-learn regressor, for small catalogues; factored: two towers, any size."""
    folds: int = Field(default=3, ge=1, le=64)
    """Cross-fitting folds: a row's reward is predicted by a model that did not see the row's fold.
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
    """The objective that training maximizes. Its name alone is short for {name: auto}."""

    name: str = "auto"
    """A registered name (`offtower doctor` lists them) or an import path "package.module:Class"."""
    arguments: dict[str, Any] = field(default_factory=dict)
    kl: float = Field(default=0.0, ge=0.0)
    """Coefficient of KL(pi || pi_0), estimated from logged propensities."""
    kl_policy: str | None = None
    """Folder of a reference policy (runs/<name>/policy) with this run's encodings, such as the
    logging policy or a clone of it: `kl` is then the coefficient of the exact KL divergence from
    it, which needs no propensities."""
    imitation: float = Field(default=0.0, ge=0.0)
    """Coefficient of the log-likelihood of all logged items, that is of -KL(pi_0 || pi)."""
    entropy: float = Field(default=0.0, ge=0.0)
    """Coefficient of the policy's entropy."""
    interaction: Literal["auto", "standard", "cascade"] = "auto"
    """What a reward in a slate may depend on: the whole slate, or the items down to its position.
    auto is cascade for conditional pscores, standard for those of whole slates."""

    @model_validator(mode="before")
    @classmethod
    def _short(cls, content: Any) -> Any:
        return {"name": content} if isinstance(content, str) else content

    @model_validator(mode="after")
    def _check(self) -> ObjectiveConfig:
        if self.kl_policy is not None and self.kl == 0.0:
            raise ValueError("kl_policy has no effect while objective.kl is 0: set both")
        if self.kl_policy is not None and self.name == "auto":
            raise ValueError(
                "objective.name=auto does not support kl_policy: name an objective, or unset "
                "kl_policy"
            )
        return self


@dataclass(config=STRICT)
class AutoConfig:
    """objective.name=auto: cross-fitted candidates and a choice between them on held-out rows.

    It has its own schedule, learning rates and temperature; it uses terms and item_chunk of
    `training` and the sizes of `policy`. The policy is an ensemble whose embedding has
    policy.embedding_dim numbers per member.
    """

    candidates: tuple[str, ...] | None = None
    """In order of prior preference (docs/reference/objectives.md). null is regression_linear,
    regression, likelihood_linear, likelihood, behavior_cloning; if the catalogue has only ids, most
    of them rarely rewarded, it is implicit_linear, the likelihoods, the regressions,
    behavior_cloning. Above 4 x sampling.num_samples items it begins with regression_mixed where
    that one applies."""
    folds: int = Field(default=3, ge=2, le=64)
    """Folds of the log; a member is fitted on all but one, and evaluated on that one."""
    members: int | None = Field(default=None, ge=1)
    """Members per candidate and in the ensemble; null is one per fold. Fewer save time and width on
    large logs."""
    refit: bool = True
    """Fit the chosen candidate's members again on all rows; otherwise the ensemble is made of the
    out-of-fold members."""
    epochs: int | None = Field(default=None, ge=1)
    """Passes over the log; null is enough for 400 to 600 steps."""
    budget: float | None = Field(default=10.0, gt=0.0, allow_inf_nan=False)
    """Minutes for training and choosing, without the passes over the log that prepare it. Work that
    needs more is planned to fit, from the speed of this machine: sampled terms, fewer steps and
    rows, and candidates that leave early (docs/how-to/large-catalogues.md). null trains every
    candidate on all rows, however long that takes."""
    plan: str | None = None
    """Folder of a run, or a file plan.json, whose plan is used instead of one for this machine: it
    gives the same policy on every machine."""
    batch_size: int | None = Field(default=None, ge=1)
    """null is a power of two between 64 and 1024 that depends on the rows of the log."""
    held_out_rows: int = Field(default=100_000, ge=100)
    """Maximal number of held-out rows for the choice."""
    tolerated_loss: float | None = Field(default=0.005, ge=0.0, allow_inf_nan=False)
    """A candidate replaces the logging policy only if held-out rows show that it loses at most this
    share of the range of rewards; otherwise the policy imitates the logging policy, and the report
    says to keep that one. null always chooses a candidate."""
    loss_risk: float = Field(default=0.01, gt=0.0, lt=0.5)
    """Probability of a larger loss, for all candidates and temperatures at once."""

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
    """The training loop."""

    epochs: int = Field(default=20, ge=1)
    batch_size: int = Field(default=1024, ge=1)
    terms: Literal["exact", "sampled"] = "exact"
    """exact: a step embeds the whole catalogue; sampled: the draws configured by `sampling`."""
    strategy: Literal["replicated", "item_sharded"] = "replicated"
    """On several workers (`offtower train --workers`). replicated: each has the whole catalogue and
    its rows of every batch; item_sharded: each has a part of the items with their id embeddings and
    optimizer state, and communication does not grow with the catalogue."""
    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"
    learning_rate: float = Field(default=1e-3, gt=0.0)
    weight_decay: float = Field(default=1e-2, ge=0.0)
    table_updates: Literal["auto", "dense", "lazy_adamw", "rowwise_adagrad"] = "auto"
    """Updates of embedding tables, item ids included. dense: every row in every step; lazy_adamw:
    rows that the step touched, with AdamW's moments and decay; rowwise_adagrad: those rows, with
    one number of state per row. auto is lazy_adamw for sampled terms with adamw, else dense."""
    table_learning_rate: float | None = Field(default=None, gt=0.0)
    """Learning rate of tables that are not updated densely; null is `learning_rate`."""
    gradient_clip: float | None = Field(default=1.0, gt=0.0)
    """Maximal norm of the whole gradient; null disables clipping."""
    warm_up: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of training in which the learning rate rises linearly from 0."""
    decay: Literal["none", "linear", "cosine"] = "none"
    """Decay of the learning rate to 0 between the warm-up and the end of training."""
    weight_average: float | None = Field(default=None, gt=0.0, lt=1.0)
    """Share of training, at its end, over which weights are averaged (Izmailov et al. 2018);
    validations and the saved policy use the average. null uses the last weights."""
    warm_start: str | None = None
    """Folder of a policy (runs/<name>/policy) of the same architecture to start from, such as one
    trained by regression or weighted likelihood before dr."""
    initialization: Literal["random", "uniform"] = "random"
    """uniform: before the first step all items are equally likely in every context (the last layer
    of the context tower and the item bias are zero; the item tower is random)."""
    initial_temperature: float | None = Field(default=None, gt=0.0, allow_inf_nan=False)
    """Temperature of the first step, annealed geometrically to policy.temperature; null is
    policy.temperature throughout. Applies to training steps only: validations and the saved policy
    use policy.temperature."""
    annealing_share: float = Field(default=0.5, gt=0.0, le=1.0)
    """Share of training after which the temperature is policy.temperature."""
    shuffle: bool = True
    patience: int | None = Field(default=None, ge=1)
    """Stop after this many validations without a better lower bound; null never stops early."""
    validation_estimator: str = "snips"
    validate_every_epochs: int = Field(default=1, ge=1)
    checkpoint_every_seconds: float = Field(default=300.0, ge=0.0)
    """Seconds between checkpoints within an epoch; the end of an epoch always writes one."""
    checkpoints_kept: int = Field(default=2, ge=1)
    log_every_steps: int | None = Field(default=50, ge=1)
    """Write a metrics line every k-th step; null disables step lines."""
    item_chunk: int = Field(default=65_536, ge=1)
    """Items embedded at a time, which bounds the memory of activations."""
    threads: int | None = Field(default=None, ge=1)
    device: Annotated[str, AfterValidator(_device)] = "auto"
    """auto: a GPU if torch sees one and the fused CUDA operators are built, else the CPU (`offtower
    doctor` shows which and why). cuda, cuda:1: that GPU, with plain-torch operators if the fused
    ones are not built. With `--worker-gpus` each worker has its own GPU."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: training passes of the towers multiply in bfloat16 and pass bfloat16 embeddings to
    the operators, which accumulate in float32. Weights, gradients, optimizer state, validation and
    the saved policy stay float32. Not with item_sharded."""
    device_features_gib: float | None = Field(default=None, ge=0.0)
    """Maximal size of item features that are kept in GPU memory; larger ones are transferred chunk
    by chunk in every step. null is a quarter of the free memory."""
    measure_terms: bool = True
    """Report entropy and weights at the end of each epoch, which costs one batch of exact terms."""


@dataclass(config=STRICT)
class SamplingConfig:
    """The sampled softmax of training.terms=sampled."""

    proposal: Literal["mixed", "uniform", "frequency", "in_batch", "top_k"] = "mixed"
    """mixed: the batch's items and uniform draws; top_k: uniform draws, plus the most likely items
    of each row under a recent policy, counted exactly. See docs/reference/sampling.md."""
    num_samples: int = Field(default=4096, ge=1)
    """Draws per step, shared by its rows, in addition to the batch's items."""
    power: float = Field(default=0.75, ge=0.0, le=1.0)
    """frequency: draws are proportional to (logged rows of the item)^power."""
    uniform_share: float = Field(default=0.25, gt=0.0, le=1.0)
    """frequency: share of uniform draws, so that every item can be drawn."""
    top_k: int = Field(default=32, ge=1)
    """top_k: items counted exactly per row."""
    refresh_steps: int = Field(default=200, ge=1)
    """top_k: steps between two background embeddings of the catalogue."""
    exact_every: int | None = Field(default=None, ge=1)
    """Use exact terms in every k-th step; null disables."""


@dataclass(config=STRICT)
class TrackingConfig:
    """Additional destinations of training metrics, beside the run's metrics.jsonl."""

    tensorboard: bool = False
    """Write event files to the run's folder `tensorboard`."""
    mlflow: str | None = None
    """URI of an MLflow tracking server; credentials in it are not stored."""
    mlflow_experiment: str = "offtower"
