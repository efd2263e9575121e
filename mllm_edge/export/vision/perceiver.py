"""The connector of Idefics2: a gated MLP, then a Perceiver resampler, whose latents look at a picture's patches.

Parameter names follow transformers, so that weights stream in by name.
"""

from dataclasses import dataclass

import torch
from torch import nn

from mllm_edge.errors import ConfigError
from mllm_edge.export.checkpoint.config import ConfigReader
from mllm_edge.export.vision.modules import ACTIVATIONS, Linear, RmsNorm, activate, attention, packed_linear

__all__ = ["PerceiverConfig", "PerceiverConnector"]

_WIDER = 4  # the inner values of a layer's MLP for each of its own; fixed in the reference


@dataclass(frozen=True)
class PerceiverConfig:
    """Sizes of the connector. `inner` and `projection` (its activation) are those of the MLP before the resampler."""

    vision_hidden: int
    inner: int
    projection: str
    hidden_size: int
    latents: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    norm_eps: float
    activation: str

    @classmethod
    def read(cls, reader: ConfigReader, vision_hidden: int, inner: int, projection: str) -> "PerceiverConfig":
        """The settings in a `perceiver_config`; raises ConfigError."""
        heads, kv_heads = reader.positive("resampler_n_heads"), reader.positive("num_key_value_heads")
        if heads % kv_heads:
            raise ConfigError(
                f"perceiver_config: resampler_n_heads {heads} share num_key_value_heads {kv_heads}",
                "a multiple is needed",
            )
        return cls(
            vision_hidden=vision_hidden,
            inner=inner,
            projection=projection,
            hidden_size=reader.positive("hidden_size"),
            latents=reader.positive("resampler_n_latents"),
            layers=reader.positive("resampler_depth"),
            heads=heads,
            kv_heads=kv_heads,
            head_dim=reader.positive("resampler_head_dim"),
            norm_eps=reader.take("rms_norm_eps"),
            activation=reader.require("hidden_act", *ACTIVATIONS),
        )


class PerceiverConnector(nn.Module):
    """A picture: vision_hidden [patches, 1, D] → image_features [latents, H]."""

    def __init__(self, config: PerceiverConfig):
        super().__init__()
        sizes = config.vision_hidden, config.inner, config.hidden_size
        self.modality_projection = _GatedMlp(*sizes, config.projection)
        self.perceiver_resampler = _Resampler(config)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.perceiver_resampler(self.modality_projection(hidden.transpose(0, 1)))


class _Resampler(nn.Module):
    def __init__(self, config: PerceiverConfig):
        super().__init__()
        self.latents = nn.Parameter(torch.empty(config.latents, config.hidden_size))
        self.layers = nn.ModuleList([_Layer(config) for _ in range(config.layers)])
        self.norm = RmsNorm(config.hidden_size, config.norm_eps)

    def forward(self, context: torch.Tensor) -> torch.Tensor:
        latents = self.latents.unsqueeze(0)
        for layer in self.layers.children():
            latents = layer(latents, context)
        return self.norm(latents).squeeze(0)


class _Layer(nn.Module):
    """latents [1, K, H] look at the context [1, L, H] and at themselves."""

    def __init__(self, config: PerceiverConfig):
        super().__init__()
        size, eps = config.hidden_size, config.norm_eps
        self.input_latents_norm, self.input_context_norm = RmsNorm(size, eps), RmsNorm(size, eps)
        self.self_attn = _Attention(config)
        self.post_attention_layernorm = RmsNorm(size, eps)
        self.mlp = _GatedMlp(size, _WIDER * size, size, config.activation)

    def forward(self, latents: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        latents = latents + self.self_attn(self.input_latents_norm(latents), self.input_context_norm(context))
        return latents + self.mlp(self.post_attention_layernorm(latents))


class _Attention(nn.Module):
    def __init__(self, config: PerceiverConfig):
        super().__init__()
        self.config, size, wide = config, config.hidden_size, config.heads * config.head_dim
        shared = config.kv_heads * config.head_dim
        self.q_proj, self.o_proj = Linear(size, wide, bias=False), Linear(wide, size, bias=False)
        self.k_proj, self.v_proj = (Linear(size, shared, bias=False) for _ in range(2))

    def forward(self, latents: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        pairs = packed_linear(torch.cat([context, latents], dim=1), [self.k_proj, self.v_proj])
        shared = self.config.kv_heads * self.config.head_dim
        key, value = self._spread(pairs[..., :shared]), self._spread(pairs[..., shared:])
        return self.o_proj(attention(self.q_proj(latents), key, value, self.config.heads))

    def _spread(self, x: torch.Tensor) -> torch.Tensor:
        """Heads [1, L, kv_heads · D] for all that share them, [1, L, heads · D]."""
        times, heads = self.config.heads // self.config.kv_heads, x.unflatten(2, (-1, 1, self.config.head_dim))
        return torch.cat([heads] * times, dim=3).flatten(2)


class _GatedMlp(nn.Module):
    def __init__(self, inputs: int, inner: int, outputs: int, activation: str):
        super().__init__()
        self.activation = activation
        self.gate_proj, self.up_proj = (Linear(inputs, inner, bias=False) for _ in range(2))
        self.down_proj = Linear(inner, outputs, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(activate(self.activation, self.gate_proj(x)) * self.up_proj(x))
