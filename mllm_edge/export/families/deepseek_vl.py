"""DeepSeek-VL: SigLIP tower, two-layer aligner, Llama decoder.

An image is scaled to the tile's side and padded to a square; in the prompt its placeholder stands once a feature.
"""

from collections.abc import Mapping
from typing import Any

from mllm_edge.export.checkpoint.config import load_config
from mllm_edge.export.checkpoint.processor import load_processor, require_tile, require_tokens
from mllm_edge.export.checkpoint.source import Source
from mllm_edge.export.families.deepseek_images import TEMPLATE, fitted, require_siglip
from mllm_edge.export.family import Checkpoint, Family, Parts
from mllm_edge.export.plan import tile_components
from mllm_edge.spec import ImagePrompt, ImageSpec

__all__ = ["FAMILY"]

_VISION = "model.vision_model."


def _describe(checkpoint: Checkpoint) -> Parts:
    from mllm_edge.export.vision.deepseek import Aligner
    from mllm_edge.export.vision.siglip import SiglipConfig, SiglipTower

    require_siglip(checkpoint)
    vision, text_hidden = checkpoint.vision, checkpoint.decoder.hidden_size
    tower = SiglipConfig.read(vision)
    vision.take("vision_use_head")  # nothing here looks at what it pools
    positions = f"{_VISION}embeddings.position_embedding.weight", (tower.grid**2, tower.hidden_size)
    tokens = tower.patches**2
    traced = tile_components(
        lambda: SiglipTower(tower),
        lambda: Aligner(tower.hidden_size, text_hidden),
        (tower.channels, tower.tile, tower.tile),
        (tokens, tower.hidden_size),
        (tokens, text_hidden),
        (_VISION, "model.aligner."),
        {"embeddings.positions": checkpoint.weights.use(*positions)},
    )
    return Parts(traced, _image_spec(checkpoint, tower.tile, tokens), (f"{_VISION}head.",))


def _load_processor(source: Source) -> Any:
    vision = load_config(source).vision_config
    patches = vision.image_size // vision.patch_size
    return load_processor(
        source,
        "DeepseekVLProcessor",
        ("DeepseekVLImageProcessor",),
        TEMPLATE,
        lambda _: {"num_image_tokens": patches**2},
    )


def _image_features(model: Any, inputs: Mapping[str, Any]) -> tuple[Any, Any]:
    import torch

    found = model.model.get_image_features(inputs["pixel_values"], return_dict=True)
    return found.last_hidden_state, torch.cat(list(found.pooler_output))


def _image_spec(checkpoint: Checkpoint, tile: int, tokens: int) -> ImageSpec:
    source, processor = checkpoint.source, checkpoint.processor
    settings = processor.image_processor
    require_tile(source, (settings.size.height, settings.size.width), tile)
    require_tokens(source, f"num_image_tokens = {processor.num_image_tokens}", processor.num_image_tokens, tokens)
    prompt = ImagePrompt(processor.image_token, checkpoint.token_id, "{image}")
    return ImageSpec(fitted(source, settings), prompt, tile, tile, tokens)


FAMILY = Family(
    name="deepseek_vl",
    model_types=("deepseek_vl",),
    decoders=("llama",),
    examples=("deepseek-community/deepseek-vl-1.3b-chat",),
    describe=_describe,
    load_processor=_load_processor,
    image_features=_image_features,
)
