"""Gemma 3: SigLIP tower, pooled patches through a norm and a projection, a Gemma 3 decoder that looks at an image's
tokens both ways.

An image is stretched to one tile; in the prompt its tokens stand between a beginning and an end, on their own line.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mllm_edge.errors import ConfigError
from mllm_edge.export.checkpoint.config import OWN_CONFIG
from mllm_edge.export.checkpoint.image_settings import made_size, single_transforms
from mllm_edge.export.checkpoint.processor import load_processor, require_tile, require_tokens
from mllm_edge.export.checkpoint.source import Source
from mllm_edge.export.family import Checkpoint, Family, Parts
from mllm_edge.export.plan import tile_components
from mllm_edge.spec import ImagePrompt, ImageSpec

__all__ = ["FAMILY"]

_VISION, _CONNECTOR, _SIGLIP = "model.vision_tower.", "model.multi_modal_projector.", "siglip_vision_model"
# For checkpoints that come without a template; a system message begins the first turn.
_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] != 'system' %}{{ '<start_of_turn>' }}"
    "{{ 'model\n' if message['role'] == 'assistant' else message['role'] + '\n' }}"
    "{% if loop.index0 == 1 and messages[0]['role'] == 'system' %}"
    "{% for part in messages[0]['content'] %}{{ part['text'] }}{% endfor %}{{ '\n\n' }}{% endif %}"
    "{% for part in message['content'] %}"
    "{{ part['text'] | trim if part['type'] == 'text' else '<start_of_image>' }}{% endfor %}"
    "{{ '<end_of_turn>\n' }}{% endif %}{% endfor %}"
    "{{ '<start_of_turn>model\n' if add_generation_prompt else '' }}"
)


def _describe(checkpoint: Checkpoint) -> Parts:
    from mllm_edge.export.vision.gemma3 import PoolingConnector, pooling_derived
    from mllm_edge.export.vision.siglip import SiglipConfig, SiglipTower

    top, vision, text_hidden = checkpoint.top, checkpoint.vision, checkpoint.decoder.hidden_size
    kind, where = checkpoint.config.vision_config.model_type, checkpoint.source.folder / "config.json"
    if kind != _SIGLIP:
        raise ConfigError(f"{where}: vision_config.model_type = {kind!r}", f"supported: {_SIGLIP}")
    for unused in ("boi_token_index", "eoi_token_index"):  # the processor spells them
        top.take(unused)
    tower, tokens = SiglipConfig.read(vision), top.positive("mm_tokens_per_image")
    vision.take("vision_use_head")  # nothing here looks at what it pools
    side = math.isqrt(tokens)
    if side**2 != tokens or tower.patches % side:
        raise ConfigError(
            f"{where}: mm_tokens_per_image {tokens} of {tower.patches}×{tower.patches} patches", OWN_CONFIG
        )
    narrow = min((window for window in checkpoint.decoder.windows if window is not None), default=tokens)
    if narrow < tokens:
        raise ConfigError(
            f"{where}: text_config.sliding_window {narrow} is smaller than an image of {tokens} tokens",
            "only windows that hold an image are supported",
        )
    positions = f"{_VISION}embeddings.position_embedding.weight", (tower.grid**2, tower.hidden_size)
    encoder, connector = tile_components(
        lambda: SiglipTower(tower),
        lambda: PoolingConnector(tower.patches, side, tower.hidden_size, text_hidden, tower.norm_eps),
        (tower.channels, tower.tile, tower.tile),
        (tower.patches**2, tower.hidden_size),
        (tokens, text_hidden),
        (_VISION, _CONNECTOR),
        {"embeddings.positions": checkpoint.weights.use(*positions)},
    )
    derived = pooling_derived(checkpoint.weights, _CONNECTOR, tower.patches // side, tower.hidden_size, text_hidden)
    traced = encoder, replace(connector, derived=derived)
    image, markers = _image_spec(checkpoint, tower.tile, tokens)
    return Parts(traced, image, (f"{_VISION}head.",), markers)


def _load_processor(source: Source) -> Any:
    return load_processor(source, "Gemma3Processor", ("Gemma3ImageProcessor",), _TEMPLATE)


def _image_features(model: Any, inputs: Mapping[str, Any]) -> tuple[Any, Any]:
    import torch

    found = model.model.get_image_features(inputs["pixel_values"], return_dict=True)
    return found.last_hidden_state, torch.cat(list(found.pooler_output))


def _image_spec(checkpoint: Checkpoint, tile: int, tokens: int) -> tuple[ImageSpec, tuple[str, str]]:
    """And the tokens around an image's."""
    source, processor = checkpoint.source, checkpoint.processor
    settings, tokenizer = processor.image_processor, processor.tokenizer
    if settings.do_pan_and_scan:
        raise ConfigError(f"{source.folder}: do_pan_and_scan = True", "only false is supported: images are not cut")
    transforms = single_transforms(source, settings)
    require_tile(source, made_size(transforms), tile)
    require_tokens(source, f"image_seq_length = {processor.image_seq_length}", processor.image_seq_length, tokens)
    begin, end = tokenizer.boi_token, tokenizer.eoi_token
    prompt = ImagePrompt(
        tokenizer.image_token,
        checkpoint.token_id,
        f"\n\n{begin}{{image}}{end}\n\n",
        placeholder=begin,
    )
    return ImageSpec(transforms, prompt, tile, tile, tokens, both_ways="image"), (begin, end)


FAMILY = Family(
    name="gemma3",
    model_types=("gemma3",),
    decoders=("gemma3_text",),
    examples=("google/gemma-3-4b-it",),
    describe=_describe,
    load_processor=_load_processor,
    image_features=_image_features,
    image_token="image_token_index",
)
