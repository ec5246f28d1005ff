"""Vectors of texts from any encoder, as a column of a catalogue."""

from offtower.embedding.catalogue import EmbedOptions, embed_catalogue
from offtower.embedding.encoders import HashedTextEncoder, TextEncoder

__all__ = ["EmbedOptions", "HashedTextEncoder", "TextEncoder", "embed_catalogue"]
