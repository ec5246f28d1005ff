"""The configuration of a run: typed dataclasses, read from YAML, changed by dotted overrides.

Errors name the key, and suggest the nearest one for an unknown key.
"""

from offtower.config.evaluation import (
    EstimatorConfig,
    EvaluationConfig,
    GateOptions,
    SelectionConfig,
    SelectionModel,
    TimeOptions,
)
from offtower.config.files import (
    apply_overrides,
    config_fingerprint,
    load_config,
    parse_config,
    read_yaml,
    settings_fingerprint,
    to_dict,
    to_stored_dict,
    to_yaml,
)
from offtower.config.incremental import IncrementalConfig, ReplayConfig
from offtower.config.learning import (
    AutoConfig,
    DataConfig,
    HistoryConfig,
    ObjectiveConfig,
    PolicyConfig,
    RewardModelConfig,
    SamplingConfig,
    TowerConfig,
    TrackingConfig,
    TrainingConfig,
)
from offtower.config.monitoring import MonitorConfig
from offtower.config.run import Config
from offtower.config.serving import NewItemsConfig, ServingConfig

__all__ = [
    "AutoConfig",
    "Config",
    "DataConfig",
    "EstimatorConfig",
    "EvaluationConfig",
    "GateOptions",
    "HistoryConfig",
    "IncrementalConfig",
    "MonitorConfig",
    "NewItemsConfig",
    "ObjectiveConfig",
    "PolicyConfig",
    "ReplayConfig",
    "RewardModelConfig",
    "SamplingConfig",
    "SelectionConfig",
    "SelectionModel",
    "ServingConfig",
    "TimeOptions",
    "TowerConfig",
    "TrackingConfig",
    "TrainingConfig",
    "apply_overrides",
    "config_fingerprint",
    "load_config",
    "parse_config",
    "read_yaml",
    "settings_fingerprint",
    "to_dict",
    "to_stored_dict",
    "to_yaml",
]
