"""The resampler of IDEFICS: latents that look at an image's patches and at themselves, as in Flamingo.

Parameter names follow transformers, so that weights stream in by name.
"""

from dataclasses import dataclass

import torch
from torch import nn

from mllm_edge.export.checkpoint.config import ConfigReader
from mllm_edge.export.vision.modules import Linear, activate, attention, packed_linear

__all__ = ["LatentsConfig", "LatentsConnector"]

_EPS, _WIDER, _ACTIVATION = 1e-5, 4, "relu"  # fixed in the reference


@dataclass(frozen=True)
class LatentsConfig:
    """Sizes of the resampler. `normed`: queries and keys are normalized, each head by itself."""

    size: int
    latents: int
    layers: int
    heads: int
    head_dim: int
    normed: bool

    @classmethod
    def read(cls, reader: ConfigReader, size: int) -> "LatentsConfig":
        """The settings in a `perceiver_config`; raises ConfigError."""
        reader.take("use_resampler")  # the model goes by its own setting of that name
        return cls(
            size=size,
            latents=reader.positive("resampler_n_latents"),
            layers=reader.positive("resampler_depth"),
            heads=reader.positive("resampler_n_heads"),
            head_dim=reader.positive("resampler_head_dim"),
            normed=bool(reader.take("qk_layer_norms_perceiver")),
        )


class LatentsConnector(nn.Module):
    """vision_hidden [N, S, D] → encoder_hidden_states [N, latents, D]."""

    def __init__(self, config: LatentsConfig):
        super().__init__()
        self.latents = nn.Parameter(torch.empty(config.latents, config.size))
        self.blocks = nn.ModuleList([nn.ModuleList([_Attention(config), _Mlp(config)]) for _ in range(config.layers)])
        self.layer_norm = nn.LayerNorm(config.size, eps=_EPS)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        latents = self.latents.unsqueeze(0).expand(hidden.shape[0], -1, -1)
        for block in self.blocks.children():
            looking, thinking = block.children()
            latents = latents + looking(latents, hidden)
            latents = latents + thinking(latents)
        return self.layer_norm(latents)


class _Attention(nn.Module):
    """latents [N, K, D] look at the context [N, S, D] and at themselves."""

    def __init__(self, config: LatentsConfig):
        super().__init__()
        self.heads, self.head_dim, wide = config.heads, config.head_dim, config.heads * config.head_dim
        self.context_layer_norm, self.latents_layer_norm = (nn.LayerNorm(config.size, eps=_EPS) for _ in range(2))
        self.q_proj, self.k_proj, self.v_proj = (Linear(config.size, wide, bias=False) for _ in range(3))
        self.output_proj = Linear(wide, config.size, bias=False)
        norms = [nn.LayerNorm(config.head_dim, eps=_EPS) if config.normed else None for _ in range(2)]
        self.q_layer_norm, self.k_layer_norm = norms

    def forward(self, latents: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        latents = self.latents_layer_norm(latents)
        seen, wide = torch.cat([self.context_layer_norm(context), latents], dim=1), self.heads * self.head_dim
        pairs = packed_linear(seen, [self.k_proj, self.v_proj])
        query, key = self._normed(self.q_layer_norm, self.q_proj(latents)), pairs[..., :wide]
        key = self._normed(self.k_layer_norm, key)
        return self.output_proj(attention(query, key, pairs[..., wide:], self.heads))

    def _normed(self, norm: nn.Module | None, x: torch.Tensor) -> torch.Tensor:
        """Each head of [N, L, heads · D]."""
        if norm is None:
            return x
        normed: torch.Tensor = norm(x.unflatten(2, (self.heads, self.head_dim)))
        return normed.flatten(2)


class _Mlp(nn.Module):
    def __init__(self, config: LatentsConfig):
        super().__init__()
        self.ln = nn.LayerNorm(config.size, eps=_EPS)
        self.fc = Linear(config.size, _WIDER * config.size, bias=False)
        self.c_proj = Linear(_WIDER * config.size, config.size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c_proj(activate(_ACTIVATION, self.fc(self.ln(x))))
