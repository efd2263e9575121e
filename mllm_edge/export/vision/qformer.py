"""The Q-Former of BLIP-2 and its successors: learned queries that look at a picture's patches, a BERT in between.

Where there is a text, its tokens stand behind the queries: both see each other, and the queries alone see the picture.
Parameter names follow transformers, so that weights stream in by name.
"""

from dataclasses import dataclass

import torch
from torch import nn

from mllm_edge.export.checkpoint.config import ConfigReader
from mllm_edge.export.vision.modules import ACTIVATIONS, Linear, activate, attention, packed_attention, packed_linear

__all__ = ["QFormerConfig", "QFormerConnector", "TextQFormerConnector"]


@dataclass(frozen=True)
class QFormerConfig:
    """Sizes of the Q-Former, whose `queries` look at states of `vision_hidden` in one of `every` layers, from the first
    on. `words` and `places`: rows of the tables of a text's tokens."""

    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    queries: int
    every: int
    vision_hidden: int
    norm_eps: float
    activation: str
    words: int
    places: int

    @classmethod
    def read(cls, reader: ConfigReader, queries: int, vision_hidden: int) -> "QFormerConfig":
        """The settings in a `qformer_config`; raises ConfigError."""
        hidden, heads = reader.heads()
        for unused in ("encoder_hidden_size", "hidden_dropout_prob", "attention_probs_dropout_prob"):
            reader.take(unused)  # the first is the tower's, whatever is stated; the others are for training
        return cls(
            hidden_size=hidden,
            intermediate_size=reader.positive("intermediate_size"),
            layers=reader.positive("num_hidden_layers"),
            heads=heads,
            queries=queries,
            every=reader.positive("cross_attention_frequency"),
            vision_hidden=vision_hidden,
            norm_eps=reader.take("layer_norm_eps"),
            activation=reader.require("hidden_act", *ACTIVATIONS),
            words=reader.positive("vocab_size"),
            places=reader.positive("max_position_embeddings"),
        )


class QFormerConnector(nn.Module):
    """vision_hidden [N, P, V] → image_features [N, queries, outputs]."""

    def __init__(self, config: QFormerConfig, outputs: int):
        super().__init__()
        self.query_tokens = nn.Parameter(torch.empty(1, config.queries, config.hidden_size))
        self.qformer = _QFormer(config)
        self.language_projection = Linear(config.hidden_size, outputs)

    def forward(self, vision_hidden: torch.Tensor) -> torch.Tensor:
        queries = self.query_tokens.expand(vision_hidden.shape[0], -1, -1)
        return self.language_projection(self.qformer(queries, vision_hidden))


class TextQFormerConnector(nn.Module):
    """As QFormerConnector; qformer_input_ids [N, T] int64, the tokens of a text beside each picture."""

    def __init__(self, config: QFormerConfig, outputs: int):
        super().__init__()
        self.query_tokens = nn.Parameter(torch.empty(1, config.queries, config.hidden_size))
        self.qformer = _TextQFormer(config)
        self.language_projection = Linear(config.hidden_size, outputs)

    def forward(self, vision_hidden: torch.Tensor, qformer_input_ids: torch.Tensor) -> torch.Tensor:
        queries = self.query_tokens.expand(vision_hidden.shape[0], -1, -1)
        return self.language_projection(self.qformer(queries, qformer_input_ids, vision_hidden))


class _QFormer(nn.Module):
    def __init__(self, config: QFormerConfig):
        super().__init__()
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        layers = nn.ModuleList([_Layer(config, i % config.every == 0, False) for i in range(config.layers)])
        self.encoder = nn.ModuleDict({"layer": layers})

    def forward(self, queries: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        hidden = self.layernorm(queries)
        for layer in self.encoder["layer"].children():
            hidden = layer(hidden, seen)
        return hidden


class _TextQFormer(nn.Module):
    def __init__(self, config: QFormerConfig):
        super().__init__()
        self.embeddings = _TextEmbeddings(config)
        last = config.layers - 1  # nobody looks at the text behind it
        layers = [_Layer(config, i % config.every == 0, i < last) for i in range(config.layers)]
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(layers)})

    def forward(self, queries: torch.Tensor, ids: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        hidden = self.embeddings(queries, ids)
        for layer in self.encoder["layer"].children():
            hidden = layer(hidden, seen)
        return hidden


class _TextEmbeddings(nn.Module):
    def __init__(self, config: QFormerConfig):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.words, config.hidden_size)
        self.position_embeddings = nn.Embedding(config.places, config.hidden_size)
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)

    def forward(self, queries: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        words = self.word_embeddings(ids) + self.position_embeddings.weight[: ids.shape[1]]
        return self.layernorm(torch.cat([queries, words], dim=1))


class _Layer(nn.Module):
    """Post-norm layer [N, queries + T, D] → [N, queries + T, D], or [N, queries, D] where it has no part for `texts`;
    queries and text have an MLP each."""

    def __init__(self, config: QFormerConfig, crossing: bool, texts: bool):
        super().__init__()
        size, self.queries, self.activation = config.hidden_size, config.queries, config.activation
        self.attention = _SelfAttention(config)
        self.crossattention = _CrossAttention(config) if crossing else None
        self.intermediate_query, self.output_query = _Dense(size, config.intermediate_size), _Output(config)
        self.intermediate = _Dense(size, config.intermediate_size) if texts else None
        self.output = _Output(config) if texts else None

    def forward(self, hidden: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        hidden = self.attention(hidden)
        queries = hidden[:, : self.queries]
        if self.crossattention is not None:
            queries = self.crossattention(queries, seen)
        queries = self.output_query(activate(self.activation, self.intermediate_query.dense(queries)), queries)
        if self.intermediate is None or self.output is None:
            return queries
        text = hidden[:, self.queries :]
        text = self.output(activate(self.activation, self.intermediate.dense(text)), text)
        return torch.cat([queries, text], dim=1)


class _Dense(nn.Module):
    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.dense = Linear(inputs, outputs)


class _Output(nn.Module):
    """x [..., inputs] and what a branch began with [..., D] → [..., D], the norm of their sum."""

    def __init__(self, config: QFormerConfig, inputs: int | None = None):
        super().__init__()
        self.dense = Linear(config.intermediate_size if inputs is None else inputs, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)

    def forward(self, x: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        return self.LayerNorm(self.dense(x) + before)


class _Projections(nn.Module):
    def __init__(self, size: int, seen: int):
        super().__init__()
        self.query, self.key, self.value = Linear(size, size), Linear(seen, size), Linear(seen, size)


class _SelfAttention(nn.Module):
    def __init__(self, config: QFormerConfig):
        super().__init__()
        self.heads = config.heads
        self.attention = _Projections(config.hidden_size, config.hidden_size)
        self.output = _Output(config, config.hidden_size)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        qkv = packed_linear(hidden, [self.attention.query, self.attention.key, self.attention.value])
        return self.output(packed_attention(qkv, self.heads), hidden)


class _CrossAttention(nn.Module):
    def __init__(self, config: QFormerConfig):
        super().__init__()
        self.heads, self.size = config.heads, config.hidden_size
        self.attention = _Projections(config.hidden_size, config.vision_hidden)
        self.output = _Output(config, config.hidden_size)

    def forward(self, hidden: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        pairs = packed_linear(seen, [self.attention.key, self.attention.value])
        key, value = pairs[..., : self.size], pairs[..., self.size :]
        return self.output(attention(self.attention.query(hidden), key, value, self.heads), hidden)
