"""LLaVA 1.5 and its relatives: CLIP or SigLIP tower, hidden states from inside it, two-layer connector.

An image is one square tile; in the prompt its placeholder is repeated once per feature.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from mllm_edge.errors import ConfigError
from mllm_edge.export.checkpoint.config import load_config
from mllm_edge.export.checkpoint.image_settings import single_transforms
from mllm_edge.export.checkpoint.processor import load_processor, require_tile, require_tokens
from mllm_edge.export.checkpoint.safetensors import Weights
from mllm_edge.export.checkpoint.source import Source
from mllm_edge.export.family import Checkpoint, Family, Parts
from mllm_edge.export.plan import tile_components
from mllm_edge.spec import (
    CenterCrop,
    ImagePrompt,
    ImageSpec,
    Resize,
)

if TYPE_CHECKING:
    from mllm_edge.export.vision.siglip import SiglipConfig

__all__ = ["FAMILY"]

_CLIP, _SIGLIP = "clip_vision_model", "siglip_vision_model"
_VISION = "model.vision_tower."
_PROCESSORS = ("CLIPImageProcessor", "LlavaImageProcessor", "SiglipImageProcessor")
# Vicuna's form, for checkpoints that come without a template: images first, then the text.
_TEMPLATE = (
    "{% for message in messages %}"
    "{{ message['role'] | upper + ': ' if message['role'] != 'system' else '' }}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] + ' ' }}{% endfor %}"
    "{% endfor %}{{ 'ASSISTANT:' if add_generation_prompt else '' }}"
)


def _translated(source: Source) -> Source:
    where = source.folder / "config.json"
    if "text_config" not in source.config:
        raise ConfigError(
            f"{where}: no text_config: this is not a checkpoint of LlavaForConditionalGeneration",
            "checkpoints of the original LLaVA code have conversions on the hub, such as llava-hf/llava-1.5-7b-hf",
        )
    kind = load_config(source).vision_config.model_type
    if kind not in (_CLIP, _SIGLIP):
        raise ConfigError(f"{where}: vision_config.model_type = {kind!r}", f"supported: {_CLIP}, {_SIGLIP}")
    return source


def _describe(checkpoint: Checkpoint) -> Parts:
    from mllm_edge.export.vision.clip import ClipFeatures, MlpConnector
    from mllm_edge.export.vision.modules import ACTIVATIONS
    from mllm_edge.export.vision.siglip import SiglipConfig, SiglipFeatures, Taps

    top, vision, text_hidden = checkpoint.top, checkpoint.vision, checkpoint.decoder.hidden_size
    is_clip = checkpoint.config.vision_config.model_type == _CLIP
    skip = top.require("vision_feature_select_strategy", "default", "full") == "default"
    taps = Taps.read(top, vision.take("num_hidden_layers"), int(skip))
    tower = SiglipConfig.read(vision, layers=max(taps.states))
    for unused in ("projection_dim", "vision_use_head", "initializer_factor"):  # of the tower's other uses
        vision.take(unused)
    top.take("image_seq_length")  # neither the reference's model nor its processor reads it
    activation = top.require("projector_hidden_act", *ACTIVATIONS)
    bias = bool(top.take("multimodal_projector_bias"))
    tokens, width = tower.patches**2 + is_clip - taps.skip, tower.hidden_size * len(taps.states)
    module, tile = ClipFeatures if is_clip else SiglipFeatures, tower.tile
    traced = tile_components(
        lambda: module(tower, taps),
        lambda: MlpConnector(width, text_hidden, activation, bias),
        (tower.channels, tile, tile),
        (tokens, width),
        (tokens, text_hidden),
        (_VISION, "model.multi_modal_projector."),
        {"embeddings.positions": _positions(checkpoint.weights, tower, is_clip)},
    )
    # Layers behind the last tap, the tower's own last norm and its head.
    behind = range(tower.layers, checkpoint.config.vision_config.num_hidden_layers)
    ignored = (*(f"encoder.layers.{i}." for i in behind), "post_layernorm.", "head.")
    return Parts(traced, _image_spec(checkpoint, tile, tokens), tuple(_VISION + part for part in ignored))


def _load_processor(source: Source) -> Any:
    config = load_config(source)
    return load_processor(
        source,
        "LlavaProcessor",
        _PROCESSORS,
        _TEMPLATE,
        lambda _: {
            "patch_size": config.vision_config.patch_size,
            "vision_feature_select_strategy": config.vision_feature_select_strategy,
            "num_additional_image_tokens": int(config.vision_config.model_type == _CLIP),
        },
    )


def _image_features(model: Any, inputs: Mapping[str, Any]) -> tuple[Any, Any]:
    import torch

    found = model.model.get_image_features(inputs["pixel_values"], return_dict=True)
    layers = model.config.vision_feature_layer
    states = [found.hidden_states[i] for i in ([layers] if isinstance(layers, int) else layers)]
    skip = int(model.config.vision_feature_select_strategy == "default")
    return torch.cat([state[:, skip:] for state in states], -1), torch.cat(list(found.pooler_output))


def _positions(weights: Weights, tower: "SiglipConfig", is_clip: bool) -> Callable[[], np.ndarray]:
    """Position embeddings; CLIP's class token is the same for all images, so it joins its own position."""
    table, size = f"{_VISION}embeddings.position_embedding.weight", tower.hidden_size
    if not is_clip:
        return weights.use(table, (tower.grid**2, size))
    return weights.with_row(table, (1 + tower.grid**2, size), f"{_VISION}embeddings.class_embedding", (size,))


def _image_spec(checkpoint: Checkpoint, tile: int, tokens: int) -> ImageSpec:
    source, processor = checkpoint.source, checkpoint.processor
    transforms = single_transforms(source, processor.image_processor)
    size = next((t for t in reversed(transforms) if isinstance(t, (CenterCrop, Resize))), None)
    require_tile(source, None if size is None else (size.height, size.width), tile)
    # What the processor's file states must give the features' number; the reference fails otherwise, when it runs.
    less = processor.vision_feature_select_strategy == "default"
    stated = (tile // processor.patch_size) ** 2 + processor.num_additional_image_tokens - less
    settings = "patch_size, num_additional_image_tokens and vision_feature_select_strategy"
    require_tokens(source, f"{settings} give {stated} tokens for an image", stated, tokens)
    prompt = ImagePrompt(processor.image_token, checkpoint.token_id, "{image}")
    return ImageSpec(transforms, prompt, tile, tile, tokens)


FAMILY = Family(
    name="llava",
    model_types=("llava",),
    decoders=("llama", "mistral", "qwen2", "gemma3_text"),
    examples=("llava-hf/llava-1.5-7b-hf",),
    describe=_describe,
    load_processor=_load_processor,
    image_features=_image_features,
    image_token="image_token_index",
    translated=_translated,
)
