"""Learners on disk: JSON for settings and history, Parquet for items, and the policy's folder."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import offtower
from offtower.checksums import (
    checked_directory,
    read_checked_json,
    verify_directory,
    write_checked_json,
)
from offtower.data.catalogue import Catalogue
from offtower.data.schema import CatalogueSchema, LogSchema
from offtower.errors import ConfigError, RunError, UntrustedCodeError
from offtower.imports import check_code, trusted_names
from offtower.jsonable import finite
from offtower.learner.feedback import InputForms
from offtower.models.store import load_policy, save_policy

if TYPE_CHECKING:
    from offtower.learner.learner import TwoTowerPolicyLearner

L = TypeVar("L", bound="TwoTowerPolicyLearner")

_FORMAT = 3
_FILE = "learner.json"
_SCHEMAS = {"schema": LogSchema, "catalogue_schema": CatalogueSchema}


def save_learner(directory: Path, learner: TwoTowerPolicyLearner) -> None:
    """Write a fitted learner; the folder appears when it is complete.

    Raises:
        ConfigError: a setting cannot be written as JSON.
    """
    settings = {}
    for name, value in learner.get_params(deep=False).items():
        if name == "progress":
            continue
        plain = value.to_dict() if isinstance(value, LogSchema | CatalogueSchema) else value
        try:
            settings[name] = json.loads(json.dumps(plain))
        except (TypeError, ValueError) as error:
            raise ConfigError(f"the setting {name}={value!r} is no JSON: {error}") from None
    items = learner.catalogue_
    names = getattr(learner, "feature_names_in_", None)
    with checked_directory(directory) as temporary:
        save_policy(temporary / "policy", learner.policy_, {"offtower": offtower.__version__})
        pq.write_table(items.table(0, items.num_items), temporary / "items.parquet")
        content = {
            "format": _FORMAT,
            "settings": settings,
            "forms": asdict(learner.forms_),
            "n_features_in": getattr(learner, "n_features_in_", None),
            "feature_names_in": None if names is None else [str(name) for name in names],
            "items": items.schema.to_dict(),
            "history": finite(learner.history_),
            "fitted_on": learner.fitted_on_,
        }
        write_checked_json(temporary / _FILE, content)


def load_learner(directory: Path, kind: type[L], trust_code: Collection[str]) -> L:
    """Read what `save_learner` wrote.

    Raises:
        RunError: a file is missing, damaged, or of another format.
        UntrustedCodeError: the folder names code that may not run.
    """
    path = directory / _FILE
    try:
        content: dict[str, Any] = read_checked_json(path)
        verify_directory(directory, "restore the folder from a copy, or fit again")
        if content["format"] != _FORMAT:
            raise RunError(
                f"'{path}' has format {content['format']}, this offtower reads {_FORMAT}"
            )
        settings = dict(content["settings"])
        check_code(settings, path, trust_code)
        _check_objective(settings["objective"], path, trust_code)
        if settings["hidden_layer_sizes"] is not None:
            settings["hidden_layer_sizes"] = tuple(settings["hidden_layer_sizes"])
        for name, schema in _SCHEMAS.items():
            if settings[name] is not None:
                settings[name] = schema.from_dict(settings[name])  # type: ignore[attr-defined]
        learner = kind(**settings)
        learner.policy_ = load_policy(directory / "policy", trust_code=trust_code)[0]
        learner.catalogue_ = Catalogue.from_table(
            pq.read_table(directory / "items.parquet"), CatalogueSchema.from_dict(content["items"])
        )
        learner.forms_ = InputForms(**content["forms"])
        learner.history_ = list(content["history"])
        learner.fitted_on_ = list(content["fitted_on"])
    except FileNotFoundError:
        raise RunError(f"no learner at '{directory}': {_FILE} is missing") from None
    except (RunError, ConfigError):
        raise
    except (ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise RunError(f"'{path}' is damaged: {error}") from error
    if content["n_features_in"] is not None:
        learner.n_features_in_ = content["n_features_in"]
    if content["feature_names_in"] is not None:
        learner.feature_names_in_ = np.asarray(content["feature_names_in"], dtype=object)
    return learner


def _check_objective(name: str, path: Path, trust_code: Collection[str]) -> None:
    """Refuse an objective by import path, which a later `fit` would import."""
    if ":" in name and name not in trusted_names(trust_code):
        raise UntrustedCodeError(
            f"'{path}' asks for the objective {name!r}; if you trust it, pass trust_code=['{name}']"
        )
