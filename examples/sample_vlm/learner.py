"""The training forward: the transformers model's own weights, in a form that is fast to train.

Sizes in shapes: B rows, L tokens of a packed row, P of them prefix, T = 256 patches, H and D the
widths of decoder and tower.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from layout import IMAGE_SIZE, IMAGE_TOKENS, PATCH_SIZE, SCALE_FACTOR
from scenes import CHARACTERS, COLOURS, KINDS
from torch import Tensor, nn
from transformers import Idefics3ForConditionalGeneration

SIDE = IMAGE_SIZE // PATCH_SIZE
IMAGE_START = 5
"""Prefix tokens before the image's."""
PREFIX = IMAGE_START + IMAGE_TOKENS + 1
BAND = 37
"""Chunk of the banded attention: no block of a packed row is longer than this."""


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """q [B, G * R, L, d] over k, v [B, G, L, d]; groups of R query heads share a key head."""
    b, heads, length, d = q.shape
    groups = k.shape[1]
    scores = (q.reshape(b, groups, -1, d) * d**-0.5) @ k.transpose(-1, -2)
    scores = scores.view(b, heads, length, -1)
    if bias is not None:
        scores = scores + bias
    weights = scores.float().softmax(-1).to(v.dtype)
    mixed = (weights.view(b, groups, -1, weights.shape[-1]) @ v).view(b, heads, length, d)
    return mixed.transpose(1, 2).reshape(b, length, heads * d)


def banded(x: Tensor, missing: float) -> Tensor:
    """Cut dimension 2 of x [B, G, N * BAND, ...] in chunks, each behind its predecessor.

    Gives [B, G, N, 2 * BAND, ...]; the first chunk's predecessor is filled with `missing`.
    """
    chunks = x.unflatten(2, (-1, BAND))
    first = torch.full_like(chunks[:, :, :1], missing)
    return torch.cat((torch.cat((first, chunks[:, :, :-1]), 2), chunks), 3)


def widen(x: Tensor, spare: int, missing: float = 0.0) -> Tensor:
    """Pad dimension 2 of x [B, G, L] or [B, G, L, d] at its end."""
    return F.pad(x, (0, spare) if x.ndim == 3 else (0, 0, 0, spare), value=missing)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [B, heads, L, d] with cos, sin [B, 1, L, d / 2]."""
    a, b = x.float().chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)


class Learner(nn.Module):
    """A model, and auxiliary heads that name what is in every patch and are thrown away."""

    def __init__(self, vlm: Idefics3ForConditionalGeneration) -> None:
        super().__init__()
        self.vlm = vlm
        vision: Any = vlm.config.vision_config
        classes = (len(KINDS), len(COLOURS), len(CHARACTERS))
        self.heads = nn.ModuleList(nn.Linear(vision.hidden_size, 1 + count) for count in classes)
        text: Any = vlm.config.text_config
        turns = torch.arange(0, text.head_dim, 2).float() / text.head_dim
        frequencies = text.rope_parameters["rope_theta"] ** -turns
        self.frequencies: Tensor
        self.register_buffer("frequencies", frequencies, persistent=False)

    def tower(self, pixels: Tensor) -> Tensor:
        """uint8 [B, 128, 128, 3] to patch features [B, T, D]."""
        vision = self.vlm.model.vision_model
        config = vision.config
        b, heads = pixels.shape[0], config.num_attention_heads
        x = pixels.float() / 127.5 - 1.0
        x = x.view(b, SIDE, PATCH_SIZE, SIDE, PATCH_SIZE, 3).permute(0, 1, 3, 5, 2, 4)
        patch = vision.embeddings.patch_embedding
        x = F.linear(x.reshape(b, SIDE * SIDE, -1), patch.weight.flatten(1), patch.bias)
        x = x + vision.embeddings.position_embedding.weight
        for layer in vision.encoder.layers:
            attention = layer.self_attn
            projections = (attention.q_proj, attention.k_proj, attention.v_proj)
            weight = torch.cat([p.weight for p in projections])
            bias = torch.cat([p.bias for p in projections])
            qkv = F.linear(layer.layer_norm1(x), weight, bias)
            q, k, v = qkv.view(b, SIDE * SIDE, 3, heads, -1).permute(2, 0, 3, 1, 4)
            x = x + attention.out_proj(attend(q, k, v, None))
            hidden = F.gelu(layer.mlp.fc1(layer.layer_norm2(x)), approximate="tanh")
            x = x + layer.mlp.fc2(hidden)
        return vision.post_layernorm(x)

    def connect(self, features: Tensor) -> Tensor:
        """Pixel shuffle and projection: [B, T, D] to [B, T / 4, H]."""
        b, s = features.shape[0], SCALE_FACTOR
        x = features.view(b, SIDE // s, s, SIDE // s, s, -1).permute(0, 1, 3, 2, 4, 5)
        return self.vlm.model.connector.modality_projection.proj(x.reshape(b, IMAGE_TOKENS, -1))

    def decode(self, images: Tensor, ids: Tensor, block: Tensor) -> Tensor:
        """Logits [B, L - P, V] behind the prefix, from packed ids and block numbers [B, L]."""
        model = self.vlm.model.text_model
        config = model.config
        b, length = ids.shape
        eps, d = config.rms_norm_eps, config.head_dim
        x = model.embed_tokens(ids)
        image_end = IMAGE_START + IMAGE_TOKENS
        x = torch.cat((x[:, :IMAGE_START], images.to(x.dtype), x[:, image_end:]), 1)
        index = torch.arange(length)
        biases = self.biases(block)
        # A block's positions restart behind the prefix: index minus where its block began.
        first = (block[:, None, :] == block[:, :, None]).int().argmax(-1)
        position = torch.where(block == 0, index, index - first + PREFIX)
        angles = position[:, None, :, None].float() * self.frequencies
        cos, sin = angles.cos(), angles.sin()
        for layer in model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            normed = rms_norm(x, layer.input_layernorm.weight, eps)
            projections = (attention.q_proj, attention.k_proj, attention.v_proj)
            qkv = F.linear(normed, torch.cat([p.weight for p in projections]))
            heads, groups = config.num_attention_heads, config.num_key_value_heads
            qkv = qkv.view(b, length, -1, d).transpose(1, 2)
            q, k, v = qkv.split((heads, groups, groups), 1)
            mixed = self.mix(rotate(q, cos, sin), rotate(k, cos, sin), v, *biases)
            x = x + attention.o_proj(mixed)
            normed = rms_norm(x, layer.post_attention_layernorm.weight, eps)
            gate_up = F.linear(normed, torch.cat((mlp.gate_proj.weight, mlp.up_proj.weight)))
            gate, up = gate_up.chunk(2, -1)
            x = x + mlp.down_proj(F.silu(gate) * up)
        x = rms_norm(x[:, PREFIX:], model.norm.weight, eps)
        return F.linear(x, model.embed_tokens.weight)

    @staticmethod
    def biases(block: Tensor) -> tuple[Tensor, Tensor]:
        """Additive biases of prefix [P, P] and text [B, 1, N, BAND, P + 2 * BAND].

        A block needs the prefix and itself only, so its keys are the prefix, its chunk and the
        chunk before: half the work of a whole square.
        """
        order = torch.arange(PREFIX)
        prefix = torch.where(order[None, :] <= order[:, None], 0.0, -1e4)
        text = block[:, None, PREFIX:].int()
        text = widen(text, -text.shape[2] % BAND, 254)
        spots = torch.arange(text.shape[2])[None, None].expand_as(text)
        own, near = text.unflatten(2, (-1, BAND)), banded(text, 253)
        seen = own[..., :, None] == near[..., None, :]
        here, there = spots.unflatten(2, (-1, BAND)), banded(spots, 0)
        seen = seen & (there[..., None, :] <= here[..., :, None])
        band = torch.where(seen, 0.0, -1e4)
        return prefix.bfloat16(), F.pad(band, (PREFIX, 0)).bfloat16()

    @staticmethod
    def mix(q: Tensor, k: Tensor, v: Tensor, prefix: Tensor, text: Tensor) -> Tensor:
        """Attention of a packed row: q [B, heads, L, d], k, v [B, groups, L, d]."""
        b, heads, length, d = q.shape
        groups, chunks = k.shape[1], text.shape[2]
        start = attend(q[:, :, :PREFIX], k[:, :, :PREFIX], v[:, :, :PREFIX], prefix)
        spare = -(length - PREFIX) % BAND
        q = widen(q[:, :, PREFIX:], spare).view(b, groups, -1, chunks, BAND, d)
        keys, values = (
            torch.cat(
                (
                    x[:, :, None, :PREFIX].expand(-1, -1, chunks, -1, -1),
                    banded(widen(x[:, :, PREFIX:], spare), 0.0),
                ),
                3,
            )
            for x in (k, v)
        )
        q = q.transpose(2, 3).reshape(b, groups, chunks, -1, d) * d**-0.5
        scores = (q @ keys.transpose(-1, -2)).unflatten(3, (-1, BAND)) + text[:, :, :, None]
        weights = scores.float().softmax(-1).to(v.dtype).flatten(3, 4)
        rest = (weights @ values).view(b, groups, chunks, -1, BAND, d).permute(0, 2, 4, 1, 3, 5)
        rest = rest.reshape(b, chunks * BAND, heads * d)[:, : length - PREFIX]
        return torch.cat((start, rest), 1)

    def patch_loss(self, features: Tensor, labels: Tensor) -> Tensor:
        """Mean over the three heads; empty patches are many and count for little."""
        total = features.new_zeros(())
        for i, head in enumerate(self.heads):
            target = labels[:, i].reshape(-1).long()
            losses = F.cross_entropy(head(features).flatten(0, 1).float(), target, reduction="none")
            weight = torch.where(target == 0, 0.1, 1.0)
            total = total + (losses * weight).sum() / weight.sum()
        return total / len(self.heads)

    def look(self, pixels: Tensor, labels: Tensor) -> Tensor:
        """Loss of the auxiliary heads alone."""
        return self.patch_loss(self.tower(pixels), labels)

    def read(
        self, pixels: Tensor, labels: Tensor, ids: Tensor, block: Tensor, answer: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Loss per answer token, share of answer tokens guessed right, loss of the heads."""
        features = self.tower(pixels)
        logits = self.decode(self.connect(features), ids, block)[:, :-1]
        target = ids[:, PREFIX + 1 :].reshape(-1)
        weight = answer[:, PREFIX + 1 :].reshape(-1).float()
        logits = logits.flatten(0, 1).float()
        losses = F.cross_entropy(logits, target, reduction="none")
        right = (logits.detach().argmax(-1) == target).float()
        count = weight.sum()
        return (
            (losses * weight).sum() / count,
            (right * weight).sum() / count,
            self.patch_loss(features, labels),
        )
