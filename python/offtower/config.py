"""The configuration of a run: typed dataclasses, read from YAML, changed by dotted overrides.

An unknown key is an error that suggests the nearest known one; a value of the wrong type names its
place in the file. The same file drives training, evaluation and (later) cluster jobs.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass as frozen_dataclass
from dataclasses import field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_type_hints

import yaml
from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    model_validator,
)
from pydantic.dataclasses import dataclass

from offtower.errors import ConfigError

_STRICT = ConfigDict(extra="forbid", validate_default=True)


@dataclass(config=_STRICT)
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


@dataclass(config=_STRICT)
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


@dataclass(config=_STRICT)
class PolicyConfig:
    """The two-tower softmax policy."""

    embedding_dim: int = Field(default=32, ge=1)
    context_tower: TowerConfig = field(default_factory=TowerConfig)
    item_tower: TowerConfig = field(default_factory=TowerConfig)
    temperature: float = Field(default=1.0, gt=0.0, allow_inf_nan=False)
    learn_temperature: bool = False
    item_bias: bool = False
    """Let the item tower give each item a bias beside its embedding."""


@dataclass(config=_STRICT)
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


@dataclass(config=_STRICT)
class ObjectiveConfig:
    """What training maximises."""

    name: str = "auto"
    """A registered name (`offtower doctor` lists them) or an import path "package.module:Class"."""
    arguments: dict[str, Any] = field(default_factory=dict)
    kl: float = Field(default=0.0, ge=0.0)
    """Price of KL(pi || pi_0), estimated from logged propensities: stay near the log."""
    imitation: float = Field(default=0.0, ge=0.0)
    """Weight of the likelihood of all logged items, whatever they earned: the other KL."""
    entropy: float = Field(default=0.0, ge=0.0)
    """Weight of the policy's entropy: stay away from determinism."""


@dataclass(config=_STRICT)
class AutoConfig:
    """objective.name=auto: several learners, cross-fitted; held-out rows choose between them.

    It has its own schedule, learning rates and temperature; of `training` it takes terms and
    item_chunk, of `policy` the sizes. The policy is an ensemble: its embedding has
    policy.embedding_dim numbers for each member.
    """

    candidates: tuple[str, ...] | None = None
    """In the order of belief; docs/objectives.md says what they are. null is regression_linear,
    regression, likelihood_linear, likelihood; the likelihoods before the regressions where the
    catalogue knows its items by ids alone."""
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


@dataclass(config=_STRICT)
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


@frozen_dataclass(frozen=True)
class GateOptions:
    """What a verdict asks for.

    Attributes:
        margin: V(new) - V(logging) must exceed it, in units of reward.
        min_rows, min_users, min_effective_sample_size: below these an asymptotic interval is not
            believed.
        max_pareto_k: heavier tails of the weights are not believed (`diagnostics.pareto_shape`).
        max_mean_weight_z, max_mean_weight_error: propensities are doubted where the mean weight is
            off 1 by more than both, in standard errors and absolutely, or where the weighted
            predictions are off by more standard errors than that, and by enough to explain
            `max_balance_share` of the difference.
        max_missing_support: tolerated share of target draws that the log cannot show.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    margin: float = 0.0
    min_rows: int = 100
    min_users: int = 30
    min_effective_sample_size: float = 100.0
    max_pareto_k: float = 0.7
    max_mean_weight_z: float = 4.0
    max_mean_weight_error: float = 0.02
    max_balance_share: float = 0.25
    max_missing_support: float = 0.01

    def __post_init__(self) -> None:
        if not math.isfinite(self.margin):
            raise ConfigError(f"the gate's margin must be a number, but is {self.margin}")
        for name in ("max_pareto_k", "max_mean_weight_z", "max_mean_weight_error"):
            if not getattr(self, name) >= 0.0:
                raise ConfigError(
                    f"the gate's {name} must not be negative, but is {getattr(self, name)}"
                )


@dataclass(config=_STRICT)
class EstimatorConfig:
    """An estimator with its parameter. `snips` alone is short for {name: snips}."""

    name: str
    """`offtower doctor` lists them."""
    max_weight: float | Literal["slope"] | None = None
    """clipped_ips, clipped_dr. "slope" lets SLOPE choose any of these from the log's first rows."""
    threshold: float | Literal["slope"] | None = None
    """switch_dr."""
    shrinkage: float | Literal["slope"] | None = None
    """dros."""
    lambda_: float | Literal["slope"] | None = None
    """sub_gaussian_ips, sub_gaussian_dr, log_smoothing."""

    @model_validator(mode="before")
    @classmethod
    def _short(cls, content: Any) -> Any:
        return {"name": content} if isinstance(content, str) else content


SelectionModel = Literal["linear", "trees", "two_tower"]


def _named(content: Any) -> Any:
    """A mapping by text: YAML reads an unquoted name such as 1 as a number."""
    if not isinstance(content, Mapping):
        return content
    return {str(name): value for name, value in content.items()}


ByName = Annotated[dict[str, str], BeforeValidator(_named), Field(min_length=1)]


@dataclass(config=_STRICT)
class SelectionConfig:
    """Which estimator to believe (`offtower evaluate --select`)."""

    models: tuple[SelectionModel, ...] = ("linear", "trees", "two_tower")
    """Reward models of the candidates, fitted on the run's training log where the run has none of
    the kind."""
    fit_rows: int = Field(default=200_000, ge=100)
    """Rows of the training log that `linear` and `trees` learn from, at most."""
    max_rows: int = Field(default=2_000_000, ge=100)
    """Longest log that is taken: a few numbers a row are kept in memory."""
    logging_run: str | None = None
    """Run directory whose policy logged the rows, where one did: PAS-IF then draws from it and can
    judge candidates with a reward model. Without it only logged propensities are known."""
    logging_runs: ByName | None = None
    """For a log of several behaviour policies: the run directory of each, by its value in the
    column behavior_policy. The heuristic needs them; PAS-IF draws from each row's own policy. They
    are checked against the logged propensities."""
    logging_columns: ByName | None = None
    """In place of logging_runs, for the heuristic: the column of the log with each behaviour
    policy's propensity of the logged item. Candidates with a reward model are then not judged."""
    logging_tolerance: float = Field(default=0.02, ge=0.0)
    """Largest relative distance of logging_runs or logging_columns from the logged propensities."""
    draws: int = Field(default=100, ge=2)
    """Draws from the logging policy for each row, with logging_run or logging_runs. A catalogue of
    no more items is summed over instead."""
    draw_rows: int = Field(default=20_000, ge=100)
    """Rows that PAS-IF works on at draws: evenly spaced ones of a longer log."""
    share: float = Field(default=0.2, gt=0.0, lt=1.0)
    """PAS-IF's k, the expected share of the pseudo-target part."""
    importance_fit: Literal["exact", "network"] = "exact"
    """How PAS-IF's split is fitted: a root-find, or the published network (slow: about a minute for
    2,000 rows and 10 items), which needs logging_run or logging_runs and the whole catalogue."""
    network_steps: int = Field(default=5_000, ge=1)
    """The network's steps of Adam on all rows, for each lambda of its grid."""
    repetitions: int = Field(default=100, ge=2)
    """PAS-IF's splits."""


@dataclass(config=_STRICT)
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


@dataclass(config=_STRICT)
class TrackingConfig:
    """Where the metrics of training go, beside metrics.jsonl of the run."""

    tensorboard: bool = False
    """Event files in the run's folder `tensorboard`."""
    mlflow: str | None = None
    """URI of an MLflow tracking server."""
    mlflow_experiment: str = "offtower"


@dataclass(config=_STRICT)
class EvaluationConfig:
    """How `offtower evaluate` judges."""

    estimators: tuple[EstimatorConfig, ...] = (
        EstimatorConfig("ips"),
        EstimatorConfig("snips"),
        EstimatorConfig("dm"),
        EstimatorConfig("dr"),
    )
    """Names, or {name: clipped_ips, max_weight: 10}."""
    decide_by: str = "auto"
    """The estimator of the verdict; auto is dr where there is a reward model, else snips."""
    confidence: float = Field(default=0.95, gt=0.0, lt=1.0)
    interval: Literal["normal", "bootstrap", "bernstein"] = "normal"
    """Of the table and the verdict; normal and bootstrap are always in the report's JSON."""
    max_weight: float | None = Field(default=None, gt=0.0, allow_inf_nan=False)
    """Largest weight that can occur, for bernstein: at most 1 / (least logging probability)."""
    replicates: int | None = Field(default=None, ge=20)
    """Of the bootstrap; null takes what the confidence needs, 500 at least."""
    by_user: bool | None = None
    """Treat the rows of one user as hanging together; null does so where the log has users."""
    gate: GateOptions = field(default_factory=GateOptions)
    propensities: Literal["logged", "estimate"] = "logged"
    """estimate: of a log without propensities, by a calibrated model (catalogues of up to 5,000
    items). No interval covers its error, and every output says so."""
    clusters: int | str | None = None
    """Clusters of items for mips: a category of the catalogue, or a number of clusters, found by
    k-means over the item embeddings of the first policy."""
    expected_reward: Literal["exact", "draws"] = "exact"
    """Of a reward model under a policy: a sum over all items, or a mean over `draws` items drawn
    from the policy, unbiased; its noise is part of every interval. Reward models that do not factor
    are judged by draws anyway where rows x items is large."""
    draws: int = Field(default=8, ge=1)
    """Items drawn from the judged policy for each row."""
    batch_rows: int = Field(default=4096, ge=1)
    reward_model: RewardModelConfig | None = None
    """The reward model of DM and DR; the training's own where this is null."""
    selection: SelectionConfig = field(default_factory=SelectionConfig)


def _folder(runs: str) -> str:
    if "://" in runs:
        raise ValueError(
            "a run is written to a folder; 'offtower train --mirror' keeps a copy of it in a store"
        )
    return runs


@dataclass(config=_STRICT)
class Config:
    """One run."""

    name: str
    data: DataConfig
    seed: int = Field(default=0, ge=0, lt=2**63)
    runs: Annotated[str, AfterValidator(_folder)] = "runs"
    """Folder of the run directories."""
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    reward_model: RewardModelConfig = field(default_factory=RewardModelConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    auto: AutoConfig = field(default_factory=AutoConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    @property
    def run_directory(self) -> Path:
        return Path(self.runs) / self.name


_ADAPTER: TypeAdapter[Config] = TypeAdapter(Config)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file and apply overrides such as `training.epochs=5`.

    Relative data paths stay relative to the working folder, as on any command line.

    Raises:
        ConfigError: the file is missing or not YAML, a key is unknown, a value has a wrong type.
    """
    path = Path(path)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"no configuration file at '{path}'") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"'{path}' cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"'{path}' is not valid YAML: {error}") from error
    if content is None:
        content = {}
    if not isinstance(content, dict):
        raise ConfigError(
            f"'{path}' must hold keys and values, but its top level is a {type(content).__name__}"
        )
    return parse_config(apply_overrides(content, overrides), source=str(path))


def parse_config(content: Mapping[str, Any], source: str = "configuration") -> Config:
    """Turn nested mappings into a `Config`; `source` is named in errors."""
    try:
        return _ADAPTER.validate_python(dict(content))
    except ValidationError as error:
        lines = [_explain(item) for item in error.errors()]
        raise ConfigError(f"{source}: " + "; ".join(lines)) from None


def apply_overrides(content: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """A copy of `content` with each `a.b=value` set; values are read as YAML."""
    result: dict[str, Any] = json.loads(json.dumps(content, default=str))
    for override in overrides:
        key, sign, text = override.partition("=")
        if not sign or not key.strip():
            raise ConfigError(f"override '{override}' must look like section.key=value")
        try:
            value = yaml.safe_load(text) if text.strip() else None
        except yaml.YAMLError as error:
            raise ConfigError(f"override '{override}': the value is not YAML: {error}") from error
        parts = key.strip().split(".")
        place = result
        for part in parts[:-1]:
            inner = place.setdefault(part, {})
            if not isinstance(inner, dict):
                raise ConfigError(f"override '{override}': '{part}' is a value, not a section")
            place = inner
        place[parts[-1]] = value
    return result


def to_dict(config: Config) -> dict[str, Any]:
    """Plain nested mappings, JSON- and YAML-ready."""
    dumped: dict[str, Any] = _ADAPTER.dump_python(config, mode="json")
    return dumped


def to_yaml(config: Config) -> str:
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)


def config_fingerprint(config: Config) -> str:
    """Hash of all that changes what is learned (the place of the run directory does not)."""
    content = to_dict(config)
    content.pop("runs")
    for machine_only in (
        *("threads", "device", "device_features_gib"),
        *("checkpoint_every_seconds", "checkpoints_kept"),
    ):
        content["training"].pop(machine_only)
    if content["training"]["precision"] == "float32":
        # Runs of before there was a choice go on.
        content["training"].pop("precision")
    # How a policy is judged and who is told does not change the policy.
    content.pop("evaluation")
    content.pop("tracking")
    content["data"].pop("test")
    text = json.dumps(content, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _explain(item: Any) -> str:
    where = [str(part) for part in item["loc"] if part != "__root__"]
    dotted = ".".join(where) or "top level"
    if item["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        known = _known_keys(where[:-1])
        nearest = difflib.get_close_matches(where[-1], known, n=1, cutoff=0.5)
        hint = f"did you mean '{nearest[0]}'?" if nearest else f"known: {', '.join(known)}"
        return f"unknown key '{dotted}'; {hint}"
    if item["type"] in ("missing", "missing_argument"):
        return f"'{dotted}' is required"
    given = item.get("input")
    return f"'{dotted}' = {given!r}: {item['msg'].lower()}"


def _known_keys(path: Sequence[str]) -> list[str]:
    kind: Any = Config
    for part in path:
        if part.isdigit():
            continue
        hints = get_type_hints(kind)
        kind = hints.get(part)
        options = [option for option in get_args(kind) if is_dataclass(option)]
        kind = options[0] if options else kind
        if not is_dataclass(kind):
            return []
    return [f.name for f in fields(kind)]
