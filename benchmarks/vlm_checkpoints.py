"""Random checkpoints of whole vision-language models at real sizes, made on the spot in little memory."""

import json
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

__all__ = ["smolvlm_256m", "write_random"]

_POOL = 1 << 24
_SHARD_BYTES = 2_000_000_000


def smolvlm_256m(folder: Path, seed: int = 0) -> None:
    """SmolVLM-256M: SigLIP-B/16 at 512 px, pixel shuffle by 4, SmolLM2-135M. Tokens are bytes: a prompt has more."""
    from transformers import SmolVLMConfig
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
    from transformers.models.idefics3.processing_idefics3 import Idefics3Processor

    from tests.tiny import TEMPLATE, make_tokenizer

    tokenizer = make_tokenizer()
    config = SmolVLMConfig(
        text_config={
            "model_type": "llama",
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "vocab_size": 49280,
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e5},
        },
        vision_config={
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "image_size": 512,
            "patch_size": 16,
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=4,
        tie_word_embeddings=True,
    )
    write_random(config, folder, seed)
    images = Idefics3ImageProcessorPil(size={"longest_edge": 2048}, max_image_size={"longest_edge": 512})
    Idefics3Processor(images, tokenizer, image_seq_len=64, chat_template=TEMPLATE).save_pretrained(folder)


def write_random(config: Any, folder: Path, seed: int = 0) -> None:
    """config.json, generation_config.json and weights in float16, one tensor at a time.

    Rows of matrices have heavy-tailed sizes and a few input channels of each norm are ten times larger, as in trained
    models; norms are near 1.
    """
    import torch
    from transformers import AutoModelForImageTextToText

    folder.mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    tied = set(getattr(model, "_tied_weights_keys", None) or {}) if config.tie_word_embeddings else set()
    shapes = {n: tuple(t.shape) for n, t in model.state_dict().items() if n not in tied}
    config.save_pretrained(folder)
    random = np.random.default_rng(seed)
    pool = (0.02 * random.standard_normal(_POOL, dtype=np.float32)).astype(np.float16)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(_shards(shapes), 1):
        file = f"model-{number:05}.safetensors"
        with (folder / file).open("wb") as f:
            _write_shard(f, {name: shapes[name] for name in names}, pool)
        weight_map |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")


def _shards(shapes: Mapping[str, tuple[int, ...]]) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name, shape in shapes.items():
        nbytes = 2 * int(np.prod(shape))
        if shards[-1] and size + nbytes > _SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += nbytes
    return shards


def _write_shard(f: IO[bytes], shapes: Mapping[str, tuple[int, ...]], pool: np.ndarray) -> None:
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * int(np.prod(shape))
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    f.write(struct.pack("<Q", len(text)) + text)
    for name, shape in shapes.items():
        f.write(_values(name, shape, pool).tobytes())


def _values(name: str, shape: tuple[int, ...], pool: np.ndarray) -> np.ndarray:
    """Numbers from the pool, from a place of the tensor's own."""
    count, start = int(np.prod(shape)), zlib.crc32(name.encode()) % len(pool)
    values = np.resize(np.roll(pool, -start), count).reshape(shape)
    random = np.random.default_rng(start)
    if "norm" in name and name.endswith("weight"):
        values = 1 + 5 * values
        values[random.choice(count, max(1, count // 200), replace=False)] *= 10
        return values.astype(np.float16)
    if len(shape) == 2:
        return (values * np.exp(0.5 * random.standard_normal((shape[0], 1)))).astype(np.float16)
    return values
