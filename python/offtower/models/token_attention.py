"""A tower that attends to the words of a text, as an example of a tower module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from offtower.data.encoding import BagTensor, FeatureEncoding
from offtower.errors import ConfigError
from offtower.models.features import FeatureEncoder, FeatureTensors


class TokenAttentionTower(nn.Module):
    """Self-attention over the words of a text and attention pooling, beside the other features.

    The news encoder of Wu et al. 2019, "Neural News Recommendation with Multi-Head Self-Attention",
    with hashed words and learned positions. The text needs `tokens: words`. In a configuration:

        item_tower:
          module: offtower.models.token_attention:TokenAttentionTower
          arguments: {text: title}

    Args:
        encoding: fitted encoding of this side's features.
        output_dim: width of the output.
        text: the feature of kind text.
        width: of the words' embeddings. heads: of the attention; divides `width`.
        longest: words that are read, the first.
        category_embedding_dim: width of the tables of other features.

    Raises:
        ConfigError: the feature is no text of words, or the heads do not divide the width.
    """

    def __init__(
        self,
        encoding: FeatureEncoding,
        output_dim: int,
        text: str,
        width: int = 32,
        heads: int = 4,
        longest: int = 32,
        category_embedding_dim: int = 16,
    ) -> None:
        super().__init__()
        spec = next((one for one in encoding.specs if one.name == text), None)
        if spec is None or spec.kind != "text" or spec.tokens != "words":
            raise ConfigError(
                f"feature '{text}' must be of kind text with 'tokens: words', whose order the "
                "tower reads"
            )
        if width % heads:
            raise ConfigError(f"{heads} heads do not divide a width of {width}")
        self.text, self.longest = text, longest
        self.words = nn.Embedding(encoding.cardinality(text), width)
        nn.init.normal_(self.words.weight, std=width**-0.5)
        self.positions = nn.Parameter(torch.zeros(longest, width))
        self.start = nn.Parameter(torch.zeros(width))
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.pooling = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1))
        others = [one.name for one in encoding.specs if one.name != text]
        self.others = nn.ModuleList(
            FeatureEncoder(encoding.only(name), category_embedding_dim) for name in others
        )
        read = sum(one.width for one in self.others if isinstance(one, FeatureEncoder))
        self.layers = nn.Linear(width + read, output_dim)

    def forward(self, features: FeatureTensors) -> Tensor:
        """Encoded features of n rows -> (n, output_dim)."""
        bag = features[self.text]
        assert isinstance(bag, BagTensor), "a text is encoded as a bag of its words"
        parts = [self._read(bag), *(encoder(features) for encoder in self.others)]
        output: Tensor = self.layers(torch.cat(parts, dim=1))
        return output

    def _read(self, bag: BagTensor) -> Tensor:
        """(n, width) vectors of the texts; a first token that each has stands for an empty one."""
        n, length = len(bag), bag.offsets[1:] - bag.offsets[:-1]
        row = torch.repeat_interleave(torch.arange(n, device=length.device), length)
        place = torch.arange(len(bag.values), device=length.device) - bag.offsets[row]
        kept = place < self.longest
        row, place = row[kept], place[kept]
        longest = int(place.max()) + 1 if len(place) else 0
        shape = n, 1 + longest, self.words.embedding_dim
        tokens = self.start.new_zeros(shape)
        embedded = self.words(bag.values[kept]) + self.positions[place]
        tokens = tokens.index_put((row, 1 + place), embedded)
        tokens[:, 0] = self.start
        hidden = torch.ones(shape[:2], dtype=torch.bool, device=length.device)
        hidden[row, 1 + place] = False
        hidden[:, 0] = False
        mixed: Any = self.attention(tokens, tokens, tokens, hidden, need_weights=False)[0] + tokens
        score = self.pooling(mixed)[..., 0].masked_fill(hidden, -torch.inf)
        pooled: Tensor = (torch.softmax(score, dim=1).unsqueeze(1) @ mixed)[:, 0]
        return pooled
