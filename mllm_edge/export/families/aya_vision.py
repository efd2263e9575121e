"""Aya Vision: SigLIP, four neighbouring patches a token through a gated connector, tiles with numbers, Cohere 2."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mllm_edge.errors import ConfigError
from mllm_edge.export.checkpoint.config import OWN_CONFIG
from mllm_edge.export.checkpoint.image_settings import resample_name, value_transforms
from mllm_edge.export.checkpoint.processor import load_processor, require_switched_on, require_tile, require_tokens
from mllm_edge.export.checkpoint.source import Source
from mllm_edge.export.families.llava_parts import SIGLIP, tapped_states
from mllm_edge.export.family import Checkpoint, Family, Parts
from mllm_edge.export.plan import tile_components
from mllm_edge.spec import ImagePrompt, ImageSpec, Resize, SelectTiles

__all__ = ["FAMILY"]

_VISION = "model.vision_tower."
# For checkpoints that come without a template: turns in the form of Command R, of which Aya is a descendant.
_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|START_OF_TURN_TOKEN|>' + {'user': '<|USER_TOKEN|>', 'assistant': '<|CHATBOT_TOKEN|>'}.get(message['role'], "
    "'<|SYSTEM_TOKEN|>') }}{% for part in message['content'] %}"
    "{{ part['text'] if part['type'] == 'text' else '<image>' }}{% endfor %}{{ '<|END_OF_TURN_TOKEN|>' }}{% endfor %}"
    "{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' if add_generation_prompt else '' }}"
)


def _translated(source: Source) -> Source:
    """With logits as they come: transformers' Cohere 2 multiplies them by `logit_scale`, and its Aya Vision does not.
    Greedy answers are the same."""
    text = source.config.get("text_config")
    if not isinstance(text, Mapping):
        return source
    return replace(source, config={**source.config, "text_config": {**text, "logit_scale": 1.0}})


def _describe(checkpoint: Checkpoint) -> Parts:
    from mllm_edge.export.vision.aya import GatedConnector
    from mllm_edge.export.vision.siglip import SiglipConfig, SiglipFeatures, Taps

    top, vision, hidden = checkpoint.top, checkpoint.vision, checkpoint.decoder.hidden_size
    kind, where = checkpoint.config.vision_config.model_type, checkpoint.source.folder / "config.json"
    if kind != SIGLIP:
        raise ConfigError(f"{where}: vision_config.model_type = {kind!r}", f"supported: {SIGLIP}")
    top.require("vision_feature_select_strategy", "full")
    vision.take("vision_use_head")
    taps = Taps.read(top, vision.take("num_hidden_layers"))
    tower, scale = SiglipConfig.read(vision, layers=max(taps.states)), top.positive("downsample_factor")
    inner, norm_eps = top.take("alignment_intermediate_size", hidden), top.take("adapter_layer_norm_eps")
    if tower.patches % scale or inner % 2 or len(taps.states) > 1:
        raise ConfigError(
            f"{where}: downsample_factor {scale} of {tower.patches} patches, alignment_intermediate_size {inner} in "
            f"halves, vision_feature_layer {top.take('vision_feature_layer')}: one layer, and whole numbers of both",
            OWN_CONFIG,
        )
    tokens, width = (tower.patches // scale) ** 2, tower.hidden_size
    positions = f"{_VISION}embeddings.position_embedding.weight", (tower.grid**2, width)
    traced = tile_components(
        lambda: SiglipFeatures(tower, taps),
        lambda: GatedConnector(tower.patches, scale, width, inner, hidden, norm_eps),
        (tower.channels, tower.tile, tower.tile),
        (tower.patches**2, width),
        (tokens, hidden),
        (_VISION, "model.multi_modal_projector."),
        {"embeddings.positions": checkpoint.weights.use(*positions)},
    )
    behind = range(tower.layers, checkpoint.config.vision_config.num_hidden_layers)
    unused = (*(f"encoder.layers.{i}." for i in behind), "post_layernorm.", "head.")
    begin, end = checkpoint.processor.start_of_img_token, checkpoint.processor.end_of_img_token
    image = _image_spec(checkpoint, tower.tile, tokens)
    return Parts(traced, image, tuple(_VISION + part for part in unused), (begin, end))


def _load_processor(source: Source) -> Any:
    return load_processor(source, "AyaVisionProcessor", ("GotOcr2ImageProcessor",), _TEMPLATE)


def _image_features(model: Any, inputs: Mapping[str, Any]) -> tuple[Any, Any]:
    found = model.model.get_image_features(inputs["pixel_values"], return_dict=True)
    return tapped_states(model, found, False), found.pooler_output.flatten(0, 1)


def _image_spec(checkpoint: Checkpoint, tile: int, tokens: int) -> ImageSpec:
    source, processor = checkpoint.source, checkpoint.processor
    settings = processor.image_processor
    require_switched_on(source, settings, "do_resize")
    require_tile(source, (settings.size.height, settings.size.width), tile)
    stated = (processor.img_size // processor.patch_size) ** 2
    require_tokens(source, f"img_size, patch_size and downsample_factor give {stated} tokens", stated, tokens)
    least, most = settings.min_patches, settings.max_patches
    if not 1 <= least <= most:
        raise ConfigError(
            f"{source.folder}: an image becomes at least {least} and at most {most} tiles", "use this model's own files"
        )
    resample = resample_name(settings.resample)
    # transformers' processor always selects tiles, whatever crop_to_patches says.
    split = SelectTiles(tile, least, most, True, resample) if most > 1 else Resize(tile, tile, resample)
    whole = f"{processor.tile_global_token}{{image}}{processor.end_of_img_token}"
    prompt = ImagePrompt(
        processor.img_patch_token,
        checkpoint.token_id,
        single=f"{processor.start_of_img_token}{whole}",
        begin=processor.start_of_img_token,
        tile=f"{processor.tile_token}_{{number}}{{image}}",
        overview=whole,
        placeholder=processor.image_token,
    )
    return ImageSpec((split, *value_transforms(settings)), prompt, tile, tile, tokens)


FAMILY = Family(
    name="aya_vision",
    model_types=("aya_vision",),
    decoders=("cohere2",),
    examples=("CohereForAI/aya-vision-8b",),
    describe=_describe,
    load_processor=_load_processor,
    image_features=_image_features,
    image_token="image_token_index",
    translated=_translated,
)
