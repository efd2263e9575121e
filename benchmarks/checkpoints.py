"""Random decoder checkpoints at real geometries, made on the spot; weights differ per layer."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

__all__ = ["GEOMETRIES", "Geometry", "decoder_shapes", "write_checkpoint"]


@dataclass(frozen=True)
class Geometry:
    """Sizes of a Llama-like decoder, in elements."""

    name: str
    model_type: str
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    vocab_size: int
    rope_theta: float

    @property
    def config(self) -> dict[str, Any]:
        """config.json."""
        return {
            "model_type": self.model_type,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "vocab_size": self.vocab_size,
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta},
            "hidden_act": "silu",
            "tie_word_embeddings": True,
        }


# Sizes from the checkpoints' config.json: SmolLM2-135M and Qwen2-1.5B.
GEOMETRIES = {
    "S": Geometry("S", "llama", 576, 1536, 30, 9, 3, 49152, 1e5),
    "M": Geometry("M", "qwen2", 1536, 8960, 28, 12, 2, 151936, 1e6),
}


def write_checkpoint(geometry: Geometry, folder: Path, seed: int = 0) -> None:
    """config.json and model.safetensors in float16; nothing is done when they are there already."""
    if (folder / "model.safetensors").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    tensors = {name: _random(random, name, shape) for name, shape in decoder_shapes(geometry).items()}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(geometry.config), encoding="utf-8")


def decoder_shapes(geometry: Geometry) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the decoder's tensors, without the head."""
    hidden, inner = geometry.hidden_size, geometry.intermediate_size
    keys = geometry.kv_heads * hidden // geometry.heads
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (hidden, hidden),
        "self_attn.k_proj.weight": (keys, hidden),
        "self_attn.v_proj.weight": (keys, hidden),
        "self_attn.o_proj.weight": (hidden, hidden),
        "post_attention_layernorm.weight": (hidden,),
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
    }
    if geometry.model_type == "qwen2":
        layer |= {f"self_attn.{p}_proj.bias": (hidden if p == "q" else keys,) for p in "qkv"}
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (geometry.vocab_size, hidden)}
    shapes |= {f"model.layers.{i}.{name}": shape for i in range(geometry.layers) for name, shape in layer.items()}
    return shapes | {"model.norm.weight": (hidden,)}


def _random(random: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
    values = random.standard_normal(shape, dtype=np.float32)
    return (1 + 0.05 * values if "norm" in name else 0.03 * values).astype(np.float16)
