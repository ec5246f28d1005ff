"""Which worlds, methods and seeds: read from a YAML file such as configs/quality/small.yaml."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from offtower.benchmarks.quality.bilinear import bilinear
from offtower.benchmarks.quality.labels import as_feedback, digits, load_label_set, long_tail
from offtower.benchmarks.quality.simulated import simulated
from offtower.benchmarks.quality.world import QualityWorld
from offtower.errors import ConfigError

_STRICT = ConfigDict(extra="forbid")


@dataclass(config=_STRICT, kw_only=True)
class Bilinear:
    """Logistic rewards, bilinear in vectors of context and action."""

    kind: Literal["bilinear"]
    actions: int = Field(ge=2)
    beta: float
    rounds: int = Field(ge=50)

    def make(self, seed: int, data: str | None) -> QualityWorld:
        return bilinear(self.actions, self.beta, self.rounds, seed)


@dataclass(config=_STRICT, kw_only=True)
class Labels:
    """A label set as logged feedback: files (--data), digits, or a made-up one of 3,000 labels."""

    kind: Literal["label_set", "digits", "long_tail"]
    rounds: int = Field(ge=50)
    fraction: float = Field(default=0.1, gt=0.0, le=1.0)
    """Of the training examples, that the logging policy learned from."""
    temperature: float = Field(default=0.07, gt=0.0)
    epsilon: float = Field(default=0.1, gt=0.0, le=1.0)

    def make(self, seed: int, data: str | None) -> QualityWorld:
        if self.kind == "label_set":
            if data is None:
                raise ConfigError("a world of kind label_set needs --data PREFIX")
            labels = load_label_set(data)
        else:
            labels = digits(seed) if self.kind == "digits" else long_tail(seed)
        return as_feedback(
            labels,
            self.rounds,
            seed,
            fraction=self.fraction,
            temperature=self.temperature,
            epsilon=self.epsilon,
        )


@dataclass(config=_STRICT, kw_only=True)
class Simulated:
    """The simulator's world, for catalogues that no (rounds, items) array could serve."""

    kind: Literal["simulated"]
    items: int = Field(ge=2)
    rounds: int = Field(ge=50)

    def make(self, seed: int, data: str | None) -> QualityWorld:
        return simulated(self.items, self.rounds, seed)


WorldSettings = Annotated[Bilinear | Labels | Simulated, Field(discriminator="kind")]


@dataclass(config=_STRICT, kw_only=True)
class QualitySettings:
    """One table of the benchmark."""

    name: str
    worlds: list[WorldSettings]
    methods: list[str]
    seeds: int = Field(default=10, ge=1)
    """Worlds of each kind: a seed makes a world, its log and the learners' starts."""
    starts: int = Field(default=1, ge=1)
    """Learners' starts on each world, for the spread between training seeds."""

    def cells(self) -> Iterator[tuple[int, int, int, str]]:
        """(world, seed, start, method), cheap worlds first as they are listed."""
        for world in range(len(self.worlds)):
            for seed in range(self.seeds):
                for start in range(self.starts):
                    for method in self.methods:
                        yield world, seed, start, method


_ADAPTER: TypeAdapter[QualitySettings] = TypeAdapter(QualitySettings)


def load_settings(path: Path) -> QualitySettings:
    """Read a file; a list for a world's number stands for one world each.

    Raises:
        ConfigError: the file is missing or says something unknown.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"'{path}' cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"'{path}' is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"'{path}' must hold keys and values")
    content["worlds"] = [one for world in content.get("worlds", []) for one in _spread(world)]
    try:
        return _ADAPTER.validate_python(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"{path}: '{where}': {first['msg'].lower()}") from None


def to_dict(settings: QualitySettings) -> dict[str, Any]:
    result: dict[str, Any] = _ADAPTER.dump_python(settings, mode="json")
    return result


def _spread(world: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for key, given in world.items():
        if isinstance(given, list):
            for one in given:
                yield from _spread({**world, key: one})
            return
    yield world
