"""A random checkpoint with the sizes of LLaVA-1.5-7B, written shard by shard in little memory."""

import json
import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import numpy as np

from benchmarks.checkpoints import Geometry, decoder_shapes

__all__ = ["write_llava"]

Shapes = dict[str, tuple[int, ...]]

# Sizes from llava-hf/llava-1.5-7b-hf's config.json and its defaults.
_DECODER = Geometry("LLaVA-1.5-7B", "llama", 4096, 11008, 32, 32, 32, 32064, 1e4)
_TOWER: dict[str, Any] = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}
_SHARD_BYTES = 2_000_000_000
# Random numbers are drawn once; a tensor reads them round and round, from a place of its own.
_POOL = 1 << 24
_TOKENS = ("<unk>", "<s>", "</s>", "<image>", "USER:", "ASSISTANT:")


def write_llava(folder: Path, seed: int = 0, layers: int = _DECODER.layers) -> None:
    """Weights in float16 (14 GB with all `layers` of the decoder), and the small files that an export reads."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    weights = (0.02 * random.standard_normal(_POOL, dtype=np.float32)).astype(np.float16)
    norms = (1 + 0.05 * random.standard_normal(1 << 16, dtype=np.float32)).astype(np.float16)
    weight_map, decoder = dict[str, str](), replace(_DECODER, layers=layers)
    for number, shapes in enumerate(_shards({**_vision_shapes(), **_text_shapes(decoder)}), 1):
        file = f"model-{number:05}.safetensors"
        with (folder / file).open("wb") as f:
            _write_shard(f, shapes, weights, norms)
        weight_map |= dict.fromkeys(shapes, file)
    _write_json(folder / "model.safetensors.index.json", {"weight_map": weight_map})
    _write_settings(folder, decoder)


def _shards(shapes: Shapes) -> Iterator[Shapes]:
    shard: Shapes = {}
    for name, shape in shapes.items():
        if shard and 2 * sum(int(np.prod(s)) for s in [*shard.values(), shape]) > _SHARD_BYTES:
            yield shard
            shard = {}
        shard[name] = shape
    yield shard


def _write_shard(f: IO[bytes], shapes: Shapes, weights: np.ndarray, norms: np.ndarray) -> None:
    header, end = dict[str, Any](), 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * int(np.prod(shape))
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    f.write(struct.pack("<Q", len(text)) + text)
    for name, shape in shapes.items():
        is_norm = "norm" in name and name.endswith("weight")
        pool, left = norms if is_norm else weights, int(np.prod(shape))
        start = zlib.crc32(name.encode()) % len(pool)
        while left:
            part = pool[start : start + left]
            f.write(part.data)
            left, start = left - len(part), 0


def _text_shapes(decoder: Geometry) -> Shapes:
    shapes = {f"language_model.{name}": shape for name, shape in decoder_shapes(decoder).items()}
    return {**shapes, "language_model.lm_head.weight": (decoder.vocab_size, decoder.hidden_size)}


def _vision_shapes() -> Shapes:
    width, inner, patch = (int(_TOWER[k]) for k in ("hidden_size", "intermediate_size", "patch_size"))
    patches, text = (int(_TOWER["image_size"]) // patch) ** 2, _DECODER.hidden_size
    linears = {f"self_attn.{p}_proj": (width, width) for p in ("q", "k", "v", "out")}
    linears |= {"mlp.fc1": (inner, width), "mlp.fc2": (width, inner)}
    norms = ["pre_layrnorm", "post_layernorm"]
    layers: Shapes = {}
    for i in range(int(_TOWER["num_hidden_layers"])):
        layers |= {f"encoder.layers.{i}.{name}": shape for name, shape in linears.items()}
        norms += [f"encoder.layers.{i}.layer_norm{n}" for n in (1, 2)]
    shapes: Shapes = {
        "vision_tower.embeddings.class_embedding": (width,),
        "vision_tower.embeddings.patch_embedding.weight": (width, 3, patch, patch),
        "vision_tower.embeddings.position_embedding.weight": (1 + patches, width),
    }
    shapes |= {f"vision_tower.{norm}.{part}": (width,) for norm in norms for part in ("weight", "bias")}
    connector = {"multi_modal_projector.linear_1": (text, width), "multi_modal_projector.linear_2": (text, text)}
    for name, shape in [*((f"vision_tower.{n}", s) for n, s in layers.items()), *connector.items()]:
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return shapes


def _write_settings(folder: Path, decoder: Geometry) -> None:
    from tokenizers import Tokenizer, models

    text = {**decoder.config, "max_position_embeddings": 4096, "tie_word_embeddings": False}
    config: dict[str, Any] = {"model_type": "llava", "text_config": text, "vision_config": _TOWER}
    config |= {"image_token_index": _TOKENS.index("<image>"), "vision_feature_layer": -2}
    _write_json(folder / "config.json", config)
    side = int(_TOWER["image_size"])
    images: dict[str, Any] = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": side}}
    images["crop_size"] = side
    _write_json(folder / "preprocessor_config.json", images)
    vocabulary = {token: i for i, token in enumerate(_TOKENS)}
    Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>")).save(str(folder / "tokenizer.json"))


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data), encoding="utf-8")
