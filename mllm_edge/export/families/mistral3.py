"""Mistral 3 with Pixtral's tower: images of any shape, whose patches are merged, and a Mistral decoder.

In the prompt an image's features stand row by row, a word between the rows and another behind the last.
"""

import importlib
import importlib.util
import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mllm_edge.errors import ConfigError
from mllm_edge.export.checkpoint.processor import load_processor
from mllm_edge.export.checkpoint.source import Source
from mllm_edge.export.families.pixtral_parts import pixtral_components, pixtral_image, pixtral_pixels, read_pixtral
from mllm_edge.export.family import Checkpoint, Family, Parts
from mllm_edge.spec import ImagePrompt

__all__ = ["FAMILY", "pixtral_processor"]

_VISION, _CONNECTOR = "model.vision_tower.", "model.multi_modal_projector."
# For checkpoints that come without a template; the word that asks for an answer is the one that ends the user's turn.
_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST]' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{{ part['text'] if part['type'] == 'text' else '[IMG]' }}{% endfor %}"
    "{% endif %}{{ '[/INST]' if add_generation_prompt or not loop.last else '' }}"
    "{% elif message['role'] == 'system' %}{{ '[SYSTEM_PROMPT]' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endif %}{{ '[/SYSTEM_PROMPT]' }}"
    "{% else %}{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endif %}{{ eos_token }}{% endif %}"
    "{% endfor %}"
)


def _describe(checkpoint: Checkpoint) -> Parts:
    from mllm_edge.export.vision.modules import ACTIVATIONS
    from mllm_edge.export.vision.siglip import Taps

    top, processor = checkpoint.top, checkpoint.processor
    tower = read_pixtral(checkpoint)
    taps = Taps.read(top, tower.layers).states
    if len(taps) > 1:
        stated = checkpoint.config.vision_feature_layer
        raise ConfigError(f"config.json: vision_feature_layer = {stated!r}", "only one layer is supported, such as -1")
    unused = tuple(f"{_VISION}transformer.layers.{i}." for i in range(taps[0], tower.layers))
    tower = replace(tower, layers=taps[0])
    words = processor.image_break_token, processor.image_end_token
    prompt = ImagePrompt(processor.image_token, checkpoint.token_id, single=f"{{image}}{words[1]}", between=words[0])
    # The processor tells its image processor so.
    multiple = processor.patch_size * processor.spatial_merge_size
    image = pixtral_image(checkpoint, tower, prompt, multiple)
    activation, bias = top.require("projector_hidden_act", *ACTIVATIONS), bool(top.take("multimodal_projector_bias"))
    traced = pixtral_components(checkpoint, tower, image, (_VISION, _CONNECTOR), activation, bias)
    return Parts(traced, image, unused, words)


def _load_processor(source: Source) -> Any:
    vision = source.config.get("vision_config") or {}
    of_model = {
        "patch_size": vision.get("patch_size") or 16,
        "spatial_merge_size": source.config.get("spatial_merge_size") or 2,
    }
    return load_processor(
        source, "PixtralProcessor", ("PixtralImageProcessor",), _TEMPLATE, lambda _: of_model, pixtral_processor()
    )


def pixtral_processor() -> Any:
    """transformers' PixtralProcessor, whose module asks the image processor for torchvision for one function, which the
    one for Pillow has, too."""
    module = "transformers.models.pixtral.{}"
    name, here = module.format("image_processing_pixtral"), module.format("processing_pixtral")
    if importlib.util.find_spec("torchvision") is None and here not in sys.modules:
        sys.modules[name] = importlib.import_module(module.format("image_processing_pil_pixtral"))
        try:
            importlib.import_module(here)
        finally:
            del sys.modules[name]
    return importlib.import_module(here).PixtralProcessor


def _image_features(model: Any, inputs: Mapping[str, Any]) -> tuple[Any, Any]:
    import torch

    found = model.model.get_image_features(inputs["pixel_values"], inputs["image_sizes"], return_dict=True)
    layers = model.config.vision_feature_layer
    hidden = found.hidden_states[layers if isinstance(layers, int) else layers[0]]
    return hidden.transpose(0, 1), torch.cat(list(found.pooler_output))


FAMILY = Family(
    name="mistral3",
    model_types=("mistral3",),
    decoders=("mistral",),
    examples=("mistralai/Mistral-Small-3.1-24B-Instruct-2503",),
    describe=_describe,
    load_processor=_load_processor,
    image_features=_image_features,
    pixel_values=pixtral_pixels,
    image_token="image_token_index",
)
