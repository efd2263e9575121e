"""Random checkpoints of whole vision-language models at real sizes, made on the spot in little memory."""

import json
import struct
import zlib
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any

import numpy as np

from tests import tiny

__all__ = ["GEOMETRIES", "smolvlm_256m", "write_random"]

_POOL = 1 << 24
_SHARD_BYTES = 2_000_000_000


def smolvlm_256m(folder: Path, longest_edge: int = 2048) -> None:
    """SigLIP-B/16 at 512 px, pixel shuffle by 4, SmolLM2-135M. Images are brought to `longest_edge` and cut into tiles
    of 512 px: 17 of a square one, and one alone where it is 512."""
    text = _text(576, 1536, 30, 9, 3, 49280, 1e5)
    vision = _vision(768, 3072, 12, 12, 512, 16)
    images = {"size": {"longest_edge": longest_edge}, "max_image_size": {"longest_edge": 512}}
    save = partial(tiny.save_tiny_idefics3, model_type="smolvlm")
    _write(folder, save, text, vision, {"scale_factor": 4}, images, {"image_seq_len": 64})


def llava_onevision_like(folder: Path) -> None:
    """SigLIP-so400m at 384 px and Qwen2-0.5B, as LLaVA."""
    text = {**_text(896, 4864, 24, 14, 2, 151936, 1e6), "model_type": "qwen2"}
    vision = {**_vision(1152, 4304, 27, 16, 384, 14), "model_type": "siglip_vision_model"}
    top = {"vision_feature_select_strategy": "full", "vision_feature_layer": -1}
    images = {"size": {"height": 384, "width": 384}}
    processor = {"patch_size": 14, "vision_feature_select_strategy": "full", "num_additional_image_tokens": 0}
    _write(folder, partial(tiny.save_tiny_llava, images="siglip"), text, vision, top, images, processor)


def internvl25_1b(folder: Path) -> None:
    """InternViT-300M at 448 px and Qwen2-0.5B, in transformers' layout."""
    from tests.tiny_internvl import save_tiny_internvl

    text = _text(896, 4864, 24, 14, 2, 151674, 1e6)
    vision = {**_vision(1024, 4096, 24, 16, 448, 14), "attention_bias": True}
    vision |= {"image_size": [448, 448], "patch_size": [14, 14]}
    images = {"size": {"height": 448, "width": 448}, "max_patches": 12}
    _write(folder, save_tiny_internvl, text, vision, {}, images, {"image_seq_length": 256})


def qwen2_vl_2b(folder: Path) -> None:
    """Qwen2-VL-2B with its own bounds on an image's pixels."""
    text = _text(1536, 8960, 28, 12, 2, 151936, 1e6)
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    vision = {"depth": 32, "embed_dim": 1280, "num_heads": 16, "mlp_ratio": 4, "patch_size": 14, "hidden_size": 1536}
    images = {"size": {"shortest_edge": 3136, "longest_edge": 12845056}, "patch_size": 14}
    _write(folder, tiny.save_tiny_qwen2_vl, text, vision, {}, images, {})


def llava_onevision_05b(folder: Path) -> None:
    """SigLIP-so400m at 384 px (26 layers), Qwen2-0.5B, up to 36 tiles whose features are brought to those of nine."""
    from tests.tiny_onevision import save_tiny_onevision

    text = {**_text(896, 4864, 24, 14, 2, 151936, 1e6), "model_type": "qwen2", "max_position_embeddings": 32768}
    sides = [[384 * rows, 384 * columns] for rows in range(1, 7) for columns in range(1, 7)]
    top = {"image_grid_pinpoints": sides, "vision_aspect_ratio": "anyres_max_9"}
    images = {"size": {"height": 384, "width": 384}, "image_grid_pinpoints": sides}
    processor = {"num_image_tokens": 729, "vision_aspect_ratio": "anyres_max_9"}
    _write(folder, save_tiny_onevision, text, _vision(1152, 4304, 26, 16, 384, 14), top, images, processor)


def qwen3_vl_2b(folder: Path) -> None:
    """Qwen3-VL-2B with its own bounds on an image's pixels."""
    _qwen3_vl(folder, 2048, 6144)


def qwen3_vl_06b(folder: Path) -> None:
    """The tower of Qwen3-VL-2B before Qwen3-0.6B, which answers with printable ASCII alone."""
    _qwen3_vl(folder, 1024, 3072)
    _answer_in_ascii(folder)


def _qwen3_vl(folder: Path, hidden: int, inner: int) -> None:
    from tests.tiny_qwen3 import save_tiny_qwen3_vl

    text = {**_text(hidden, inner, 28, 16, 8, 151936, 5e6), "head_dim": 128}
    text["rope_parameters"] |= {"mrope_section": [24, 20, 20], "mrope_interleaved": True}
    sizes = {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16, "patch_size": 16}
    added = {"num_position_embeddings": 2304, "out_hidden_size": hidden, "deepstack_visual_indexes": [5, 11, 17]}
    images = {"size": {"shortest_edge": 65536, "longest_edge": 16777216}, "patch_size": 16}
    _write(folder, save_tiny_qwen3_vl, text, {**sizes, **added}, {}, images)


def deepseek_vl_13b(folder: Path) -> None:
    """SigLIP-L/16 at 384 px and DeepSeek-LLM-1.3B."""
    from tests.tiny_deepseek import save_tiny_deepseek_vl

    text = _text(2048, 5632, 24, 16, 16, 102400, 1e4)
    images = {"size": {"height": 384, "width": 384}}
    top = {"tie_word_embeddings": False}
    vision = _vision(1024, 4096, 24, 16, 384, 16)
    _write(folder, save_tiny_deepseek_vl, text, vision, top, images, {"num_image_tokens": 576})


def gemma3_4b(folder: Path) -> None:
    """SigLIP-so400m at 896 px and Gemma-3-4B: five layers with a window of 1024 tokens for each that sees all."""
    from tests.tiny_gemma3 import save_tiny_gemma3

    text = {**_text(2560, 10240, 34, 8, 4, 262208, 1e6), "head_dim": 256, "query_pre_attn_scalar": 256}
    text |= {"sliding_window": 1024}
    del text["rope_parameters"]  # its class has those of the two kinds of layers
    top = {"mm_tokens_per_image": 256}
    images = {"size": {"height": 896, "width": 896}}
    vision = _vision(1152, 4304, 27, 16, 896, 14)
    _write(folder, save_tiny_gemma3, text, vision, top, images, {"image_seq_length": 256})


def blip2_opt_27b(folder: Path) -> None:
    """EVA's ViT-g/14 at 224 px, a Q-Former of 12 layers and 32 queries, OPT-2.7B."""
    from tests.tiny_blip import save_tiny_blip_2

    sizes = {"hidden_size": 2560, "ffn_dim": 10240, "num_hidden_layers": 32, "num_attention_heads": 32}
    text = {**sizes, "word_embed_proj_dim": 2560, "vocab_size": 50304, "max_position_embeddings": 2048}
    queries = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    top = {"num_query_tokens": 32, "qformer_config": {**queries, "encoder_hidden_size": 1408, "vocab_size": 30522}}
    images, processor = {"size": {"height": 224, "width": 224}}, {"num_query_tokens": 32}
    _write(folder, save_tiny_blip_2, text, _vision(1408, 6144, 39, 16, 224, 14), top, images, processor)


def fast_vlm_05b(folder: Path) -> None:
    """FastViT-HD at 1024 px and Qwen2-0.5B."""
    from tests.tiny_fast_vlm import save_tiny_fast_vlm

    text = {**_text(896, 4864, 24, 14, 2, 151936, 1e6), "model_type": "qwen2"}
    images = {"size": {"shortest_edge": 1024}, "crop_size": {"height": 1024, "width": 1024}}
    vision = {"hidden_size": 3072, "model_args": {"inference_mode": True}}
    _write(folder, save_tiny_fast_vlm, text, vision, {}, images)


GEOMETRIES: Mapping[str, Callable[[Path], None]] = {
    "SmolVLM-256M": smolvlm_256m,
    "LLaVA, SigLIP-so400m + Qwen2-0.5B": llava_onevision_like,
    "InternVL2.5-1B": internvl25_1b,
    "Qwen2-VL-2B": qwen2_vl_2b,
    "LLaVA-OneVision-0.5B": llava_onevision_05b,
    "Qwen3-VL-2B": qwen3_vl_2b,
    "Qwen3-VL, Qwen3-0.6B": qwen3_vl_06b,
    "DeepSeek-VL-1.3B": deepseek_vl_13b,
    "Gemma-3-4B": gemma3_4b,
    "BLIP-2 OPT-2.7B": blip2_opt_27b,
    "FastVLM-0.5B": fast_vlm_05b,
}


def _text(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, vocab: int, theta: float) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": hidden // heads,
        "vocab_size": vocab,
        "max_position_embeddings": 8192,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
    }


def _vision(hidden: int, inner: int, layers: int, heads: int, side: int, patch: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "image_size": side,
        "patch_size": patch,
    }


def _write(
    folder: Path,
    save: Callable[..., Any],
    text: Mapping[str, Any],
    vision: Mapping[str, Any],
    top: Mapping[str, Any],
    images: Mapping[str, Any],
    processor: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """A tiny checkpoint's files (its tokenizer knows bytes only), the sizes in them replaced, and weights to match."""
    from transformers import AutoConfig

    save(folder)
    (folder / "model.safetensors").unlink()
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    parts = {name: {**config[name], **part} for name, part in top.items() if isinstance(part, Mapping)}
    config = {**config, "tie_word_embeddings": True, **top, **parts}
    config["text_config"] = {**config["text_config"], "tie_word_embeddings": config["tie_word_embeddings"], **text}
    config["text_config"].pop("layer_types", None)  # of two layers
    config["vision_config"] = {**config["vision_config"], **vision}
    kind = config.pop("model_type")
    write_random(AutoConfig.for_model(kind, **config), folder)
    for name in ("processor_config.json", "preprocessor_config.json"):
        path = folder / name
        stated = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if "image_processor" in stated:
            stated["image_processor"] = {**stated["image_processor"], **images}
        elif "image_processor_type" in stated:
            stated = {**stated, **images}
        if stated:
            more = processor if name == "processor_config.json" else {}
            path.write_text(json.dumps({**stated, **more}), encoding="utf-8")


def _answer_in_ascii(folder: Path) -> None:
    """Shrink the tied embedding's rows of all tokens that are not one printable character of ASCII, so that none of
    them is ever the likeliest: an answer's text has then the ids that were answered, to whoever tokenizes it again."""
    stored = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    kept = [i for token, i in stored.items() if len(token) == 1 and "!" <= token <= "~"]
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))["weight_map"]
    (name,) = (name for name in weight_map if name.endswith("embed_tokens.weight"))
    path = folder / weight_map[name]
    with path.open("rb") as f:
        (length,) = struct.unpack("<Q", f.read(8))
        entry = json.loads(f.read(length))[name]
    begin, shape = 8 + length + entry["data_offsets"][0], tuple(entry["shape"])
    rows = np.memmap(path, np.float16, "r+", begin, shape)
    answered = rows[kept].copy()
    rows *= np.float16(0.01)
    rows[kept] = answered
    rows.flush()


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
    state = {n: t for n, t in model.state_dict().items() if n not in tied and t.is_floating_point()}
    shapes = {n: tuple(t.shape) for n, t in state.items()}
    config.save_pretrained(folder)
    random = np.random.default_rng(seed)
    pool = (0.02 * random.standard_normal(_POOL, dtype=np.float32)).astype(np.float16)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(_shards(shapes), 1):
        file = f"model-{number:05}.safetensors"
        with (folder / file).open("wb") as f:
            _write_shard(f, {name: shapes[name] for name in names}, pool)
        weight_map |= dict.fromkeys(names, file)
    total = {"total_size": sum(2 * int(np.prod(shape)) for shape in shapes.values())}
    index = {"metadata": total, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


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
    if name.endswith("running_var"):
        return np.abs(values) + np.float16(0.5)
    if len(shape) == 2:
        return values * np.exp(0.5 * random.standard_normal((shape[0], 1))).astype(np.float16)
    return values
