"""Qwen3-VL: Qwen2-VL's images, a tower with learned positions beside its rope, features of some of its layers that are
added behind the first layers of a Qwen3 decoder, dense or with experts."""

from dataclasses import replace
from typing import Any

from mllm_edge.errors import ConfigError
from mllm_edge.export.checkpoint.config import OWN_CONFIG
from mllm_edge.export.checkpoint.processor import load_processor
from mllm_edge.export.checkpoint.source import Source
from mllm_edge.export.families.qwen_images import (
    END,
    START,
    TURNS,
    VISION,
    grid_rope,
    image_features,
    image_spec,
    patch_weights,
    read_patches,
    video_spec,
)
from mllm_edge.export.family import Checkpoint, Family, Parts
from mllm_edge.export.plan import cell_components
from mllm_edge.spec import LearnedPositions, Patchify, VideoSpec

__all__ = ["FAMILY"]

_POSITIONS = "vision_positions.npy"
# Of the video processor, where the files do not say otherwise.
_VIDEO_DEFAULTS = {
    "patch_size": 16,
    "size": {"shortest_edge": 128 * 32**2, "longest_edge": 768 * 32**2},
    "image_mean": (0.5,) * 3,
    "image_std": (0.5,) * 3,
}


def _describe(checkpoint: Checkpoint) -> Parts:
    from mllm_edge.export.vision.qwen3_vl import Qwen3VlConfig, Qwen3VlTower, qwen3_merger

    vision, decoder = checkpoint.vision, checkpoint.decoder
    patches = read_patches(vision)
    tower, stated = Qwen3VlConfig.read(vision, patches), vision.take("out_hidden_size")
    if stated != decoder.hidden_size:
        raise ConfigError(
            f"vision_config: out_hidden_size {stated}, but the text model's is {decoder.hidden_size}", OWN_CONFIG
        )
    if len(tower.taps) > decoder.layers:
        raise ConfigError(
            f"vision_config: deepstack_visual_indexes = {list(tower.taps)!r}, but the text model has {decoder.layers} "
            "layers",
            OWN_CONFIG,
        )
    hidden, grid = tower.sizes.hidden_size, tower.grid
    tables = (grid_rope(vision, hidden // tower.sizes.heads), LearnedPositions(_POSITIONS, grid, hidden, corners=True))
    image = replace(image_spec(checkpoint, patches, tables), video=_video_spec(checkpoint, patches))
    traced = cell_components(
        lambda: Qwen3VlTower(tower, decoder.hidden_size),
        lambda: qwen3_merger(tower, decoder.hidden_size),
        image,
        (hidden, decoder.hidden_size),
        (VISION, f"{VISION}merger."),
        patch_weights(checkpoint, patches, hidden),
        len(tower.taps),
    )
    positions = checkpoint.weights.use(f"{VISION}pos_embed.weight", (grid**2, hidden))
    return Parts(traced, image, markers=(START, END), images="grid", arrays={_POSITIONS: positions})


def _video_spec(checkpoint: Checkpoint, patches: Patchify) -> VideoSpec | None:
    """Each two frames as an image of their own, behind their time. A rendered text has the two words around the whole
    video; as in transformers up to 4.57 and the model's own code they give way to those around frames."""
    return video_spec(
        checkpoint,
        patches,
        "Qwen3VLVideoProcessor",
        _VIDEO_DEFAULTS,
        "ends",
        placeholder=f"{START}{checkpoint.processor.video_token}{END}",
        frame=f"<{{seconds}} seconds>{START}{{image}}{END}",
        together=True,
    )


def _load_processor(source: Source) -> Any:
    return load_processor(source, "Qwen3VLProcessor", ("Qwen2VLImageProcessor",), TURNS)


FAMILY = Family(
    name="qwen3_vl",
    model_types=("qwen3_vl", "qwen3_vl_moe"),
    decoders=("qwen3", "qwen3_moe"),
    examples=("Qwen/Qwen3-VL-2B-Instruct", "Qwen/Qwen3-VL-30B-A3B-Instruct", "nvidia/Cosmos-Reason2-2B"),
    describe=_describe,
    load_processor=_load_processor,
    image_features=image_features,
)
