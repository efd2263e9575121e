"""Checkpoints with the image sizes, tiles, patches and widths of real models, and few layers: what an image becomes is
as in these, and their vision towers take longer than the ones here.

`TOWERS` has a row for each family: the model whose sizes these are, how many layers its tower has and how many there
are here (0: all, or no layers to count), and what the tests' own writer of tiny checkpoints is told.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["TOWERS", "Tower", "save"]

_FEW = 2


@dataclass(frozen=True)
class Tower:
    """`model`: whose sizes these are; `layers`: of its tower, `here`: of the one here; `told`: arguments of the writer.
    `narrower`: what is less than in the model beside that."""

    model: str
    layers: int
    told: Mapping[str, Any] = field(default_factory=dict)
    here: int = _FEW
    narrower: str = ""


def save(family: str, folder: Path) -> None:
    """Write the checkpoint of a family to `folder`."""
    from tests.families.row import rows
    from tests.timm_reference import stand_in_for_timm

    stand_in_for_timm()
    row, told = rows()[family], TOWERS[family].told
    first = row.configs[row.first]
    parts = {
        name: {**first.get(name, {}), **part} if isinstance(part, Mapping) else part for name, part in told.items()
    }
    context = {"max_position_embeddings": 65536}
    text = {**context, **first.get("text", {}), **parts.get("text", {})}
    row.save(folder, **{**first, **parts, "text": text})


def _vit(hidden: int, inner: int, heads: int, side: int, patch: int, layers: int = _FEW) -> dict[str, Any]:
    sizes = {"hidden_size": hidden, "intermediate_size": inner, "num_attention_heads": heads}
    return {**sizes, "num_hidden_layers": layers, "image_size": side, "patch_size": patch}


def _square(side: int) -> dict[str, Any]:
    return {"size": {"height": side, "width": side}}


def _grid(side: int, most: int) -> list[list[int]]:
    """Resolutions of at most so many tiles."""
    return [[side * r, side * c] for r in range(1, most + 1) for c in range(1, most + 1) if r * c <= most]


_CLIP_L = _vit(1024, 4096, 16, 336, 14, 3)
_SO400M = (1152, 4304, 16)
_EVA = {"vision": _vit(1408, 6144, 16, 224, 14)}
_INTERN_VIT: dict[str, Any] = {
    "vision": {**_vit(1024, 4096, 16, 448, 14, 3), "image_size": [448, 448], "patch_size": [14, 14]},
    "images": {"max_patches": 12},
}
_SAM = {"hidden_size": 768, "num_hidden_layers": 2, "num_attention_heads": 12, "mlp_dim": 3072, "output_channels": 256}
_SAM_GRID = {"image_size": 1024, "patch_size": 16, "window_size": 14, "global_attn_indexes": [1]}
_ANYRES = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
_QWEN2 = {"embed_dim": 1280, "num_heads": 16, "mlp_ratio": 4, "patch_size": 14, "depth": _FEW}
_QWEN25 = {"hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "patch_size": 14, "window_size": 112}
_QWEN3 = {"hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16, "patch_size": 16}
_QWEN_BOUNDS = {"min_pixels": 3136, "max_pixels": 12845056}

TOWERS: Mapping[str, Tower] = {
    "aria": Tower(
        "Aria",
        27,
        {
            "vision": _vit(*_SO400M, 980, 14),
            "config": {"projector_patch_to_query_dict": {"1225": 128, "4900": 256}},
        },
    ),
    "aya_vision": Tower(
        "Aya Vision 8B", 27, {"vision": _vit(*_SO400M, 364, 14), "image_settings": {"max_patches": 12}}
    ),
    "blip_2": Tower("BLIP-2 OPT-2.7B", 39, _EVA),
    "chameleon": Tower(
        "Chameleon 7B",
        0,
        {"vision": {"resolution": 512, "base_channels": 128, "channel_multiplier": [1, 1, 2, 2, 4]}},
        here=0,
    ),
    "deepseek_vl": Tower("DeepSeek-VL 1.3B", 24, {"vision": _vit(1024, 4096, 16, 384, 16)}),
    "deepseek_vl_hybrid": Tower(
        "DeepSeek-VL 7B", 24, {"vision": _vit(1024, 4096, 16, 384, 16), "high": {**_SAM, **_SAM_GRID}}
    ),
    "emu3": Tower(
        "Emu3",
        0,
        {
            "vision": {
                "base_channels": 32,
                "hidden_size": 128,
                "channel_multiplier": [1, 2, 2, 4],
                "num_res_blocks": 1,
            },
            "image_settings": {"min_pixels": 512 * 512, "max_pixels": 1024 * 1024},
        },
        here=0,
        narrower="an eighth of the channels",
    ),
    "fast_vlm": Tower(
        "FastVLM 0.5B",
        0,
        {
            "vision": {"hidden_size": 3072, "model_args": {"inference_mode": True}},
            "image_settings": {"size": {"shortest_edge": 1024}, "crop_size": {"height": 1024, "width": 1024}},
        },
        here=0,
    ),
    "florence2": Tower(
        "Florence-2 base",
        12,
        {
            "vision": {
                "embed_dim": [128, 256, 512, 1024],
                "num_heads": [4, 8, 16, 32],
                "num_groups": [4, 8, 16, 32],
                "depths": [1, 1, 1, 1],
                "patch_size": [7, 3, 3, 3],
                "patch_stride": [4, 2, 2, 2],
                "patch_padding": [3, 1, 1, 1],
                "patch_prenorm": [False, True, True, True],
                "window_size": 12,
                "max_position_embeddings": 50,
            },
            "image_settings": {**_square(768), "image_seq_length": 577},
        },
        here=4,
    ),
    "fuyu": Tower(
        "Fuyu 8B",
        1,
        {
            "text": {"hidden_size": 4096, "num_attention_heads": 64, "intermediate_size": 64, "num_hidden_layers": 1},
            "config": {"patch_size": 30},
            "image_settings": {"size": {"height": 1080, "width": 1920}},
        },
        here=1,
    ),
    "gemma3": Tower(
        "Gemma 3 4B",
        27,
        {
            "text": {"sliding_window": 1024},
            "vision": _vit(*_SO400M, 896, 14),
            "config": {"mm_tokens_per_image": 256},
        },
    ),
    "glm4v": Tower(
        "GLM-4.1V 9B",
        24,
        {
            "vision": {
                **{"hidden_size": 1536, "intermediate_size": 13696, "num_heads": 12, "patch_size": 14},
                **{"image_size": 336, "depth": _FEW},
            },
            "image_settings": {"size": {"shortest_edge": 112 * 112, "longest_edge": 28 * 28 * 15000}},
        },
    ),
    "got_ocr2": Tower("GOT-OCR 2", 12, {"vision": {**_SAM, **_SAM_GRID}}),
    "granite4_vision": Tower(
        "Granite 4 Vision",
        27,
        {"vision": _vit(*_SO400M, 384, 16, 3), "config": {"image_grid_pinpoints": _grid(384, 10)}},
        here=3,
    ),
    "granite_docling": Tower(
        "Granite-Docling 258M",
        12,
        {"vision": {**_vit(768, 3072, 12, 512, 16, 3), "scale_factor": 4}, "image_settings": {"max_patches": 12}},
        here=3,
    ),
    "idefics": Tower(
        "IDEFICS 9B",
        32,
        {
            "vision": {
                **{"embed_dim": 1280, "intermediate_size": 5120, "num_attention_heads": 16},
                **{"num_hidden_layers": _FEW, "image_size": 224, "patch_size": 14},
            }
        },
    ),
    "idefics2": Tower(
        "Idefics2 8B",
        27,
        {
            "vision": _vit(*_SO400M, 980, 14),
            "image_settings": {"size": {"shortest_edge": 378, "longest_edge": 980}, "do_image_splitting": True},
        },
    ),
    "idefics3": Tower(
        "SmolVLM 256M",
        12,
        {
            "vision": _vit(768, 3072, 12, 512, 16),
            "config": {"scale_factor": 4},
            "processor": {"size": {"longest_edge": 2048}, "max_image_size": {"longest_edge": 512}},
        },
    ),
    "instructblip": Tower("InstructBLIP 7B", 39, _EVA),
    "instructblipvideo": Tower("InstructBLIP 7B, video", 39, _EVA),
    "internvl": Tower(
        "InternVL 2.5 1B",
        24,
        _INTERN_VIT,
        here=3,
    ),
    "janus": Tower("Janus-Pro 1B", 24, {"vision": {**_vit(1024, 4096, 16, 384, 16), "mlp_ratio": 4}}),
    "lfm2_vl": Tower(
        "LFM2-VL 450M",
        12,
        {
            "vision": {
                **{"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "patch_size": 16},
                **{"num_hidden_layers": _FEW, "num_patches": 256},
            },
            "image_settings": {
                **{"tile_size": 512, "max_tiles": 10, "min_tiles": 2, "max_image_tokens": 256, "min_image_tokens": 64},
                **{"max_pixels_tolerance": 2.0, "max_num_patches": 1024, "encoder_patch_size": 16},
            },
        },
    ),
    "lighton_ocr": Tower(
        "LightOnOCR 1B",
        24,
        {
            "vision": {**_vit(1024, 4096, 16, 1540, 14, 3), "head_dim": 64},
            "image_settings": {"size": {"longest_edge": 1540}},
        },
        here=3,
    ),
    "llava": Tower("LLaVA 1.5 7B", 24, {"vision": _CLIP_L}, here=3),
    "llava_next": Tower("LLaVA-NeXT 7B", 24, {"vision": _CLIP_L, "config": {"image_grid_pinpoints": _ANYRES}}, here=3),
    "llava_next_video": Tower(
        "LLaVA-NeXT-Video 7B", 24, {"vision": _CLIP_L, "config": {"image_grid_pinpoints": _ANYRES}}, here=3
    ),
    "llava_onevision": Tower(
        "LLaVA-OneVision 0.5B",
        26,
        {
            "vision": _vit(*_SO400M, 384, 14, 3),
            "config": {
                "image_grid_pinpoints": [[384 * r, 384 * c] for r in range(1, 7) for c in range(1, 7)],
                "vision_aspect_ratio": "anyres_max_9",
            },
        },
        here=3,
    ),
    "mistral3": Tower(
        "Mistral Small 3.1",
        24,
        {
            "vision": {**_vit(1024, 4096, 16, 1540, 14, 3), "head_dim": 64},
            "image_settings": {"size": {"longest_edge": 1540}},
        },
        here=3,
    ),
    "mllama": Tower(
        "Llama 3.2 Vision 11B",
        40,
        {
            "vision": {
                **{"hidden_size": 1280, "intermediate_size": 5120, "attention_heads": 16, "image_size": 560},
                **{"patch_size": 14, "num_hidden_layers": 3, "num_global_layers": 2},
                "vision_output_dim": 3 * 1280,
            }
        },
        here=5,
    ),
    "ovis2": Tower("Ovis2 1B", 24, {"vision": _vit(1024, 2816, 8, 448, 14), "image_settings": {"max_patches": 9}}),
    "paligemma": Tower("PaliGemma 2 3B, 224 px", 27, {"vision": _vit(*_SO400M, 224, 14)}),
    "perception_lm": Tower(
        "Perception LM 1B",
        23,
        {"tower": {"embed_dim": 1024, "depth": _FEW, "img_size": [448, 448], "ref_feat_shape": [32, 32]}},
    ),
    "phi4_multimodal": Tower(
        "Phi-4 multimodal",
        27,
        {"vision": {**_vit(*_SO400M, 448, 14, 3), "crop_size": 448}, "image_settings": {"dynamic_hd": 36}},
        here=3,
    ),
    "qianfan_ocr": Tower(
        "Qianfan-OCR",
        24,
        _INTERN_VIT,
        here=3,
    ),
    "qwen2_5_vl": Tower(
        "Qwen2.5-VL 3B",
        32,
        {"vision": {**_QWEN25, "depth": 3, "fullatt_block_indexes": [1]}, "image_settings": _QWEN_BOUNDS},
        here=3,
    ),
    "qwen2_vl": Tower("Qwen2-VL 2B", 32, {"vision": _QWEN2, "image_settings": _QWEN_BOUNDS}),
    "qwen3_vl": Tower(
        "Qwen3-VL 2B",
        24,
        {
            "vision": {**_QWEN3, "depth": 3, "num_position_embeddings": 2304},
            "image_settings": {"min_pixels": 65536, "max_pixels": 16777216},
        },
        here=3,
    ),
    "video_llava": Tower("Video-LLaVA 7B", 24, {"vision": _vit(1024, 4096, 16, 224, 14, 3)}, here=3),
    "vipllava": Tower("ViP-LLaVA 7B", 24, {"vision": _CLIP_L}, here=3),
}
