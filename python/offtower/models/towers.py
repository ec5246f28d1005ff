"""Towers: encoded features of n rows -> n embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from offtower.config import TowerConfig
from offtower.data.encoding import FeatureEncoding
from offtower.errors import ConfigError
from offtower.imports import load_class
from offtower.models.features import ALL_ROWS, FeatureEncoder, FeatureTensors, Tables
from offtower.models.row_draws import RowDraws, RowDropout

_ACTIVATIONS: dict[str, type[nn.Module]] = {
    "elu": nn.ELU,
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
}


_HIDDEN_LAYERS = (64, 64)


def tower_of_features(config: TowerConfig, encoding: FeatureEncoding) -> TowerConfig:
    """Return the configuration with the layers that suit the features where it names none.

    A single category or bag gets an embedding of the output's width per value and no layers: each
    value has weights of its own then, and layers would only entangle them. Histories alone have
    layers of their own.
    """
    if config.hidden_layer_sizes is not None or config.module is not None:
        return config
    if len(encoding.specs) == 1 and encoding.specs[0].kind in (
        "category",
        "bag",
        "text",
    ):
        return replace(config, hidden_layer_sizes=(), tables="output", bag="root")
    kinds = {spec.kind for spec in encoding.specs}
    if kinds == {"history"} or (config.tables == "output" and kinds <= {"category", "bag", "text"}):
        return replace(config, hidden_layer_sizes=())
    return replace(config, hidden_layer_sizes=_HIDDEN_LAYERS)


_DROPOUT = 1 << 16
"""First purpose number of dropout layers; smaller ones are for tables."""


class MLPBody(nn.Module):
    """Feature encoder, hidden layers, linear map to the output.

    With `tables: output` the embeddings of categories and bags are as wide as the output and added
    to it, and the layers read numbers, vectors and histories only. In a linear tower each value
    then has its own weights. Behind a linear layer the same function is a product of two matrices,
    of four with the other tower, which overfits rare values of long bags.
    """

    def __init__(
        self,
        encoding: FeatureEncoding,
        output_dim: int,
        config: TowerConfig,
        draws: RowDraws | None = None,
        tables: Tables = ALL_ROWS,
    ) -> None:
        super().__init__()
        draws = draws or RowDraws()
        config = tower_of_features(config, encoding)
        sizes = config.hidden_layer_sizes or ()
        self.adds_tables = config.tables == "output"
        if self.adds_tables:
            tables = replace(tables, dim=output_dim)
        self.encoder = FeatureEncoder(
            encoding,
            config.category_embedding_dim,
            config.unknown_rate,
            draws,
            tables,
            config.bag,
            config.history,
        )
        if self.encoder.width == 0:
            raise ConfigError(
                "a tower needs at least one feature; name some in the schema of the log "
                "(context) and of the catalogue (features), for example the item id as a category"
            )
        layers: list[nn.Module] = []
        width = self.encoder.plain_width if self.adds_tables else self.encoder.width
        if width == 0 and sizes:
            raise ConfigError(
                "tower 'tables: output' leaves the hidden layers nothing to read, since no feature "
                "is a number, a vector or a history; set hidden_layer_sizes: [] or tables: input"
            )
        for size in sizes:
            layers += [
                nn.Linear(width, size, dtype=torch.float32, device="cpu"),
                _ACTIVATIONS[config.activation](),
            ]
            if config.dropout > 0.0:
                layers.append(RowDropout(config.dropout, draws, purpose=_DROPOUT + len(layers)))
            width = size
        if width > 0:
            layers.append(nn.Linear(width, output_dim, dtype=torch.float32, device="cpu"))
        self.layers = nn.Sequential(*layers)

    def forward(self, features: FeatureTensors) -> Tensor:
        output: Tensor
        if not self.adds_tables:
            output = self.layers(self.encoder(features))
            return output
        parts = self.encoder.embeddings(features)
        numbers = self.encoder.numbers(features)
        if numbers:
            parts.append(self.layers(torch.cat(numbers, dim=1)))
        output = parts[0] if len(parts) == 1 else torch.stack(parts).sum(dim=0)
        return output


class JoinedBody(nn.Module):
    """An ensemble of bodies: concatenated embeddings, summed biases.

    A single body with `bag: root` or `tables: output` is wrapped too, because the graph export of a
    plain `MLPBody` assumes mean pooling and input tables.
    """

    def __init__(self, bodies: list[nn.Module], member_dim: int, normalize: bool) -> None:
        super().__init__()
        self.members = nn.ModuleList(bodies)
        self.member_dim = member_dim
        self.normalize = normalize

    def forward(self, features: FeatureTensors) -> Tensor:
        outputs = [member(features) for member in self.members]
        embeddings = [output[:, : self.member_dim] for output in outputs]
        if self.normalize:
            embeddings = [functional.normalize(one, dim=1) for one in embeddings]
        biases = torch.stack([output[:, self.member_dim :] for output in outputs])
        return torch.cat([*embeddings, biases.sum(dim=0)], dim=1)


class Tower(nn.Module):
    """An MLP over encoded features, or a user's module, followed by normalization and bias.

    A user's module is built as `Class(encoding=..., output_dim=..., **arguments)` and called with
    the mapping of encoded features (a list of tokens is a bag feature); it returns (n, output_dim).

    Args:
        encoding: fitted encoding of this side's features.
        embedding_dim: d.
        config: sizes, activation, or the import path of a module.
        bias: add a bias per row, as one more output of the body.
        tables: of each member, see `FeatureEncoder`; not for a user's module.
    """

    def __init__(
        self,
        encoding: FeatureEncoding,
        embedding_dim: int,
        config: TowerConfig,
        *,
        bias: bool = False,
        tables: Sequence[Tables] = (),
    ) -> None:
        super().__init__()
        config = tower_of_features(config, encoding)
        self.draws = RowDraws()
        self.training_dtype = torch.float32
        """Of products and embeddings in training passes: float32 or bfloat16."""
        self.embedding_dim = embedding_dim
        self.normalize = config.normalize
        self.has_bias = bias
        self.bias_scale = config.bias_scale
        if embedding_dim % config.members:
            raise ConfigError(
                f"a tower of {config.members} members needs an embedding_dim that is a multiple "
                f"of {config.members}, but it is {embedding_dim}"
            )
        self.output_dim = embedding_dim + int(bias)
        member_dim = embedding_dim // config.members
        bodies = [
            _make_body(
                *(encoding, member_dim + int(bias), config, self.draws),
                tables[number] if tables else ALL_ROWS,
            )
            for number in range(config.members)
        ]
        self.body = bodies[0]
        unusual = config.bag == "root" or config.tables == "output"
        if config.members > 1 or (unusual and config.module is None):
            self.body = JoinedBody(bodies, member_dim, config.normalize)

    @property
    def bodies(self) -> list[nn.Module]:
        """The networks, one per member."""
        return list(self.body.members) if isinstance(self.body, JoinedBody) else [self.body]

    @property
    def shared_tables(self) -> list[nn.Embedding]:
        """The table of items of each member, where the members' histories read one of another
        module."""
        encoders = [body.encoder for body in self.bodies if isinstance(body, MLPBody)]
        shared = [encoder.shared_table for encoder in encoders]
        return [table for table in shared if table is not None]

    @property
    def random(self) -> bool:
        """Whether training mode may draw from torch's global generator."""
        bodies = self.bodies
        if not all(isinstance(body, MLPBody) for body in bodies):
            return True
        return self.draws.seed is None and any(_is_random(body) for body in bodies)

    def draw_with(self, draws: RowDraws) -> None:
        """Use the random draws of an enclosing tower."""
        for module in self.modules():
            if isinstance(module, (RowDropout, FeatureEncoder)):
                module._draws = draws

    def forward(
        self, features: FeatureTensors, numbers: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Encoded features of n rows -> embeddings (n, d) and biases (n,) or None.

        Args:
            numbers: (n,) int64 that key the rows' random draws; None is 0, 1, ...
        """
        self.draws.begin(numbers)
        low = self.training and self.training_dtype != torch.float32
        output = self._in_low_precision(features) if low else self.body(features)
        if output.dim() != 2 or output.shape[1] != self.output_dim:
            raise ConfigError(
                f"the tower's module returned shape {tuple(output.shape)}, expected "
                f"(rows, {self.output_dim})"
            )
        bias = output[:, self.embedding_dim] if self.has_bias else None
        embedding = output[:, : self.embedding_dim] if self.has_bias else output
        if self.normalize and not isinstance(self.body, JoinedBody):
            embedding = functional.normalize(embedding, dim=1)
        if bias is not None and self.bias_scale != 1.0:
            bias = bias * self.bias_scale
        if low:
            embedding = embedding.to(self.training_dtype)
            bias = None if bias is None else bias.to(self.training_dtype)
        return embedding.contiguous(), None if bias is None else bias.contiguous()

    def _in_low_precision(self, features: FeatureTensors) -> Tensor:
        """The body's output, computed in low precision and cast to float32."""
        device = next(self.parameters()).device.type
        # No cache: weights cast without a graph cannot be reused with one.
        with torch.autocast(device, self.training_dtype, cache_enabled=False):
            output: Tensor = self.body(features)
        return output.float()


def _is_random(body: nn.Module) -> bool:
    if not isinstance(body, MLPBody):
        return True
    dropouts = (module for module in body.modules() if isinstance(module, RowDropout))
    return body.encoder.random or any(module.rate > 0.0 for module in dropouts)


def _make_body(
    encoding: FeatureEncoding,
    output_dim: int,
    config: TowerConfig,
    draws: RowDraws,
    tables: Tables,
) -> nn.Module:
    if config.module is None:
        if config.arguments:
            raise ConfigError("tower 'arguments' are for a tower 'module', and none is named")
        return MLPBody(encoding, output_dim, config, draws, tables)
    kind = load_class(config.module, "tower module", nn.Module, "torch.nn.Module")
    try:
        module: nn.Module = kind(encoding=encoding, output_dim=output_dim, **config.arguments)
    except TypeError as error:
        raise ConfigError(
            f"tower module '{config.module}' could not be built as "
            f"Class(encoding=..., output_dim={output_dim}, **arguments): {error}"
        ) from error
    return module
