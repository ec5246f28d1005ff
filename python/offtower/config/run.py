"""The configuration of a run."""

from __future__ import annotations

from dataclasses import field
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field
from pydantic.dataclasses import dataclass

from offtower.config.evaluation import EvaluationConfig
from offtower.config.incremental import IncrementalConfig
from offtower.config.learning import (
    AutoConfig,
    DataConfig,
    ObjectiveConfig,
    PolicyConfig,
    RewardModelConfig,
    SamplingConfig,
    TrackingConfig,
    TrainingConfig,
)
from offtower.config.monitoring import MonitorConfig
from offtower.config.serving import ServingConfig
from offtower.config.strict import STRICT


def _folder(runs: str) -> str:
    if "://" in runs:
        raise ValueError(
            "a run is written to a folder; 'offtower train --mirror' keeps a copy in a store"
        )
    return runs


@dataclass(config=STRICT)
class Config:
    """All sections of a run."""

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
    incremental: IncrementalConfig = field(default_factory=IncrementalConfig)
    serving: ServingConfig = field(default_factory=ServingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    @property
    def run_directory(self) -> Path:
        return Path(self.runs) / self.name
