"""The learner."""

from __future__ import annotations

import warnings
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch
from sklearn.exceptions import NotFittedError as SklearnNotFittedError

from offtower.crossfit.reward_model import obtain_reward_model
from offtower.data.catalogue import Catalogue
from offtower.data.convert import ITEM_VECTOR
from offtower.data.encoding import to_tensors
from offtower.data.log import Log
from offtower.errors import ConfigError, DataError, KeepLoggingWarning
from offtower.evaluation import evaluate_rows
from offtower.evaluation.result import EvaluationResult
from offtower.learner.eligible import masked
from offtower.learner.evaluation import (
    holds_rows_of,
    identified,
    microseconds,
    weighted_rows,
    without_go,
)
from offtower.learner.feedback import (
    CONTEXT,
    as_table,
    check_range,
    feature_column,
    is_feedback,
)
from offtower.learner.inputs import LearnerInputs, check_column
from offtower.learner.scoring import OffPolicyScorer
from offtower.models.items import ItemEmbeddings, ItemFeatures
from offtower.models.policy import TwoTowerPolicy
from offtower.models.reward.base import RewardModel
from offtower.prepare import PreparedData, prepare
from offtower.serving import ServedPolicy, served_probabilities
from offtower.training.auto import AutoTraining, train_auto
from offtower.training.device import to_configured_device
from offtower.training.run import build_trainer
from offtower.training.setup import uses_auto
from offtower.training.trainer import EpochHook, TrainingOutputs

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class NotFittedError(ConfigError, SklearnNotFittedError):  # type: ignore[misc]
    """A learner that was not fitted yet."""


class TwoTowerPolicyLearner(LearnerInputs):
    """Learn a two-tower softmax policy from logged bandit feedback.

    A scikit-learn estimator: `get_params`, `set_params`, `clone` and `GridSearchCV` work. Settings
    are checked when the object is made, and again by `fit`.

    Contexts are a matrix (rows, features), or a data frame of pandas, polars or Arrow. A sparse
    matrix of counts (scipy) is read as bags of columns, each as often as its count, and the
    embeddings of a row's columns are averaged; nothing is made dense. A data frame
    of numbers is a matrix whose column names are checked; with `schema` its columns are read as the
    log's features, and `fit` finds action, reward and pscore in it too.

    Args:
        dim_context_features: width of the context vectors; None takes that of the fit.
        dim_action_features: width of the action (item) vectors; None takes that of the fit.
        embedding_dim: d, width of both towers' embeddings.
        hidden_layer_sizes: of both towers; None is (64, 64), or none for a tower whose only feature
            is a category or a bag.
        activation: elu, relu, tanh, gelu or silu.
        temperature: of the softmax; None is 1, or .1 for regression and .05 for implicit_squares.
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
        serving: settings of `offtower.config.ServingConfig`, such as {"uniform": 0.1}: how the
            policy is served, and so validated, evaluated and predicted.
        random_state: seed.
        device: for training, as `training.device`; the fitted policy is on the CPU.
        progress: True draws bars on standard error if it is a terminal; an object gets the reports.
        schema: the section `log` of a schema file, or a `LogSchema`: columns of data frames.
        catalogue_schema: the section `catalogue`, or a `CatalogueSchema`: columns of a data frame
            of items, passed as `action_context`.

    Raises:
        ConfigError: a setting is unknown or has a wrong value.

    Example:
        >>> learner = TwoTowerPolicyLearner(objective="ips").fit(bandit_feedback)
        >>> action_dist = learner.predict_proba(context, action_context)
    """

    policy_: TwoTowerPolicy
    reward_model_: RewardModel | None
    auto_: AutoTraining
    """With objective="auto": the candidates and the evidence for the choice."""
    history_: list[dict[str, Any]]
    """One mapping per epoch: loss, value estimate, weights, entropy, validation."""
    fitted_on_: list[dict[str, Any]]
    """Fingerprint and sketch of the rows that the policy was fitted on and its epoch chosen on."""
    data_: PreparedData
    catalogue_: Catalogue
    """The items of the fit, scored where no `action_context` is given."""

    def fit(
        self,
        X: Any,
        y: Any = None,
        reward: Any = None,
        pscore: Any = None,
        *,
        action_context: Any = None,
        validation: Any = None,
        on_epoch_end: EpochHook | None = None,
    ) -> TwoTowerPolicyLearner:
        """Fit on logged feedback, in one of four forms.

        - a bandit-feedback dict (context, action, reward, pscore, action_context, and `eligible`,
          (n_rounds, n_actions) true for the actions that a round could show);
        - contexts `X`, the numbers of the logged actions as `y`, reward and pscore, (rows,) each;
          `y` may join the three (`logged_feedback`), for scikit-learn's model selection;
        - with `schema`, a data frame with the schema's columns;
        - a pair (`offtower.data.Log`, `offtower.data.Catalogue`).

        Args:
            X: feedback or contexts.
            y, reward, pscore: see above. Objectives that need no propensities accept None.
            action_context: features of the actions, a matrix (n_actions, features), or with
                `schema` a data frame of items with the columns of `catalogue_schema`. Without it
                actions are known by their numbers alone.
            validation: feedback as a dict, data frame, pair, or (contexts, y): the weights of the
                epoch with the best lower bound of an off-policy estimate are kept. May be the
                second argument after a dict.
            on_epoch_end: adds numbers to each epoch's history.

        `pi_b` and `expected_reward` of a dict are not read.

        Raises:
            ConfigError: a setting does not fit the data.
            DataError: a value or a shape is wrong.
        """
        if is_feedback(y) or (isinstance(y, tuple) and isinstance(y[0], Log)):
            validation, y = y, None
        config = self.config
        log, catalogue, forms = self._open(X, (y, reward, pscore), action_context, None)
        held_out = None
        if validation is not None:
            given = validation if isinstance(validation, tuple) else (validation,)
            if isinstance(given[0], Log):
                held_out = given[0]
            else:
                y = given[1] if len(given) > 1 else None
                held_out = self._open(given[0], (y, None, None), action_context, forms)[0]
        progress = self._reports()
        self.forms_ = forms
        self.data_ = prepare(log, held_out, catalogue, progress)
        self.catalogue_ = catalogue
        self.reward_model_ = None
        data = to_configured_device(self.data_, config.training)
        self.fitted_on_ = [identified(log)]
        if uses_auto(config, data):
            outputs = TrainingOutputs(progress=progress, on_epoch_end=on_epoch_end)
            self.auto_ = train_auto(config, data, outputs=outputs)
            self.policy_ = self.auto_.policy
            if self.auto_.choice.advice is not None:
                warnings.warn(self.auto_.choice.advice, KeepLoggingWarning, stacklevel=2)
            self.history_ = self.auto_.result.history
            return self
        self.reward_model_ = obtain_reward_model(config.reward_model, data, config.seed, progress)
        trainer = build_trainer(
            config, data, self.reward_model_, progress=progress, on_epoch_end=on_epoch_end
        )
        fitted = trainer.fit()
        self.history_ = fitted.history
        if held_out is not None and fitted.validation is not None:
            self.fitted_on_.append(identified(held_out))
        self.policy_ = trainer.policy.cpu()
        return self

    def predict(self, X: Any, action_context: Any = None, *, eligible: Any = None) -> np.ndarray:
        """(n_rounds,) the most likely action of each context, by number or, with `schema`, id.

        The arguments are those of `predict_proba`.
        """
        probability = self.predict_proba(X, action_context, eligible=eligible)
        best: np.ndarray = probability[:, :, 0].argmax(axis=1)
        if self.forms_.items != "columns" or action_context is not None:
            return best
        ids: np.ndarray = self.catalogue_.item_ids.take(pa.array(best)).to_numpy(False)
        return ids

    def predict_proba(
        self, X: Any, action_context: Any = None, *, eligible: Any = None
    ) -> np.ndarray:
        """(n_rounds, n_actions, 1) probabilities of all actions, as in Open Bandit Pipeline.

        They are those of the policy as it is served (setting `serving`).

        Args:
            X: contexts, in the form of the fit.
            action_context: features of the actions, in the form of the fit; by default its actions.
            eligible: (n_rounds, n_actions) true for the actions that a round may show; others have
                probability 0. With a schema that has a section `eligible`, the actions of the fit
                are restricted by its columns of X.
        """
        u = torch.from_numpy(self.embed_contexts(X))
        v, bias = self._embed_items(action_context)
        policy, serving = self._fitted(), self.config.serving
        logits = (u @ v.T).double() / policy.temperature
        if bias is not None:
            logits = logits + bias
        logits = masked(logits, self._eligible(X, action_context, eligible, len(u)))
        return served_probabilities(logits, serving).numpy()[:, :, np.newaxis]

    def log_prob(
        self, X: Any, action: np.ndarray, action_context: Any = None, *, eligible: Any = None
    ) -> np.ndarray:
        """(n_rounds,) log pi(a_i|x_i) of action numbers, without a rounds x actions array.

        The other arguments are those of `predict_proba`.
        """
        u = torch.from_numpy(self.embed_contexts(X))
        v, bias = self._embed_items(action_context)
        number = torch.as_tensor(np.asarray(action), dtype=torch.int64, device="cpu")
        allowed = self._eligible(X, action_context, eligible, len(u))
        terms = self._served().terms(u, ItemEmbeddings(v, bias), number, eligible=allowed)
        return terms.log_prob.numpy()

    def evaluate(
        self,
        X: Any,
        y: Any = None,
        reward: Any = None,
        pscore: Any = None,
        *,
        action_context: Any = None,
        reward_range: tuple[float, float] | None = None,
        time: Any = None,
        **options: Any,
    ) -> EvaluationResult:
        """Evaluate the policy off-policy on feedback that it was not fitted on.

        Rows that it was fitted on, or that chose its epoch, give no "go", also in another order or
        among others.

        Args:
            X, y, reward, pscore, action_context: as in `fit`.
            reward_range: smallest and largest possible reward; by default that of the schema, or
                (0, 1) extended to the rewards found.
            time: (n,) dates or numbers, when each row of arrays was logged, for values by period
                and drift (`EvaluationResult.time`); a data frame's are those of the schema.
            options: others of `offtower.evaluation.evaluate_rows`, such as confidence.

        Returns:
            Values by IPS and SNIPS with intervals, the logging policy's value, diagnostics and a
            verdict, under the policy name "learner".

        Raises:
            DataError: there are no propensities, or a value is wrong.
        """
        self._fitted()
        log, catalogue, _ = self._open(X, (y, reward, pscore), action_context, self.forms_)
        if log.schema.pscore is None:
            raise DataError(
                "off-policy evaluation needs the logged propensities: pass pscore, or name their "
                "column in the schema"
            )
        if isinstance(X, tuple):
            items = self._embed_table(catalogue.table(0, catalogue.num_items))
        else:
            if action_context is None and is_feedback(X):
                action_context = X.get("action_context")
            items = self._embed_items(action_context)
            if action_context is None:
                catalogue = self.catalogue_
        weighted = weighted_rows(self._served(), ItemEmbeddings(*items), log, catalogue)
        if time is not None:
            weighted = replace(weighted, time=microseconds(time))
        options.setdefault("reward_range", reward_range or log.schema.reward_range)
        result = evaluate_rows({"learner": weighted}, **options)
        return without_go(result) if holds_rows_of(log, self.fitted_on_) else result

    def score(self, X: Any, y: Any = None, reward: Any = None, pscore: Any = None) -> float:
        """The SNIPS estimate of the policy's value on held-out feedback, given as to `fit`."""
        return OffPolicyScorer("snips")(self, X, y, reward, pscore)

    def plot_history(self, ax: Axes | None = None) -> Axes:
        """Draw the loss of each epoch and, with validation feedback, the value with its interval.

        Args:
            ax: where to draw; a new figure by default.
        """
        from offtower.learner.plots import draw_history

        self._fitted()
        return draw_history(self.history_, ax)

    def save(self, directory: str | Path) -> None:
        """Write the fitted learner to a new folder, as JSON, Parquet and safetensors.

        `data_`, `auto_` and `reward_model_` are not stored.

        Raises:
            ConfigError: a setting cannot be written as JSON.
        """
        from offtower.learner.store import save_learner

        self._fitted()
        save_learner(Path(directory), self)

    @classmethod
    def load(
        cls, directory: str | Path, *, trust_code: Collection[str] = ()
    ) -> TwoTowerPolicyLearner:
        """Read what `save` wrote; nothing is unpickled.

        Args:
            trust_code: import paths "package.module:Class" that the folder may name, besides
                offtower's towers and scikit-learn's estimators.

        Raises:
            RunError: a file is missing or damaged.
            UntrustedCodeError: other code is named.
        """
        from offtower.learner.store import load_learner

        return load_learner(Path(directory), cls, trust_code)

    @torch.no_grad()
    def embed_contexts(self, X: Any) -> np.ndarray:
        """(n_rounds, embedding_dim) float32."""
        policy = self._fitted()
        if self.forms_.context == "columns":
            table = as_table(X)
            for name in policy.context_encoding.columns:
                check_column(table, name)
        else:
            matrix = self._contexts(X, reset=False)
            table = pa.table({CONTEXT: feature_column(matrix, self.forms_.context)})
        encoded = policy.context_encoding.encode(table)
        return policy.embed_contexts(to_tensors(encoded)).numpy()

    def embed_items(self, action_context: Any = None) -> np.ndarray:
        """(n_actions, embedding_dim) float32."""
        return self._embed_items(action_context)[0].numpy()

    def _embed_items(self, action_context: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        policy = self._fitted()
        if action_context is None:
            table = self.catalogue_.table(0, self.catalogue_.num_items)
        elif self.forms_.items == "columns":
            table = as_table(action_context)
            for spec in policy.item_encoding.specs:
                check_column(table, spec.source)
        elif self.forms_.items == "numbers":
            raise DataError(
                "the learner was fitted without action_context and knows its actions by their "
                "numbers: leave it out here too"
            )
        else:
            matrix = self._matrix(action_context, self._item_width, "action_context")
            if matrix.dtype.kind == "f" and not np.isfinite(matrix).all():
                raise DataError("'action_context' contains NaN or infinity")
            check_range(matrix, "action_context")
            table = pa.table({ITEM_VECTOR: feature_column(matrix, self.forms_.items)})
        return self._embed_table(table)

    @torch.no_grad()
    def _embed_table(self, table: pa.Table) -> tuple[torch.Tensor, torch.Tensor | None]:
        policy = self._fitted()
        encoded = policy.item_encoding.encode(table)
        items = policy.embed_items(ItemFeatures(encoded, table.num_rows))
        return items.embedding, items.bias

    @property
    def _item_width(self) -> int | None:
        if self.dim_action_features is not None or self.forms_.items != "vectors":
            return self.dim_action_features
        return self._fitted().item_encoding.specs[0].dim

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "policy_")

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.required = True
        return tags

    def _served(self) -> ServedPolicy:
        return ServedPolicy(self._fitted(), self.config.serving)

    def _fitted(self) -> TwoTowerPolicy:
        if not hasattr(self, "policy_"):
            raise NotFittedError("this learner is not fitted yet; call fit(bandit_feedback) first")
        return self.policy_
