"""FastVLM: FastViT-HD, whose convolutions leave few features of a large image, LLaVA's connector, a Qwen2 decoder.

An image is one square tile. transformers takes the tower from timm.
"""

from collections.abc import Mapping
from typing import Any

from mllm_edge.export.checkpoint.image_settings import made_size, single_transforms
from mllm_edge.export.checkpoint.processor import load_processor, require_tile
from mllm_edge.export.checkpoint.source import Source
from mllm_edge.export.families.llava_parts import SINGLE, single_image_spec
from mllm_edge.export.families.timm_parts import require_wrapper, with_timm
from mllm_edge.export.family import Checkpoint, Family, Parts
from mllm_edge.export.plan import tile_components

__all__ = ["FAMILY"]

_VISION, _CONNECTOR = "model.vision_tower.timm_model.", "model.multi_modal_projector."
# For checkpoints that come without a template: a system message first; in a message images first, then the text.
_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ '\n' + part['text'] }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{{ '<|im_start|>assistant\n' if add_generation_prompt else '' }}"
)


def _describe(checkpoint: Checkpoint) -> Parts:
    from mllm_edge.export.vision.clip import MlpConnector
    from mllm_edge.export.vision.fastvit import FastVit, FastVitConfig, fastvit_derived, fastvit_unused
    from mllm_edge.export.vision.modules import ACTIVATIONS

    top, text_hidden = checkpoint.top, checkpoint.decoder.hidden_size
    require_wrapper(checkpoint)
    tower = FastVitConfig.read(checkpoint.vision, _tile(checkpoint))
    activation = top.require("projector_hidden_act", *ACTIVATIONS)
    bias, size = bool(top.take("multimodal_projector_bias")), tower.hidden_size
    traced = tile_components(
        lambda: FastVit(tower),
        lambda: MlpConnector(size, text_hidden, activation, bias),
        (3, tower.tile, tower.tile),
        (tower.tokens, size),
        (tower.tokens, text_hidden),
        (_VISION, _CONNECTOR),
        fastvit_derived(tower, checkpoint.weights, _VISION),
    )
    image = single_image_spec(checkpoint, tower.tile, tower.tokens)
    return Parts(traced, image, fastvit_unused(tower, _VISION))


def _tile(checkpoint: Checkpoint) -> int:
    """The side in px of the images, which the image processor alone states."""
    size = made_size(single_transforms(checkpoint.source, checkpoint.processor.image_processor))
    side = 0 if size is None else size[0]
    require_tile(checkpoint.source, size, side)
    return side


def _load_processor(source: Source) -> Any:
    from mllm_edge.export.vision.fastvit import PATCH

    return load_processor(source, "LlavaProcessor", SINGLE, _TEMPLATE, lambda _: {"patch_size": PATCH})


def _image_features(model: Any, inputs: Mapping[str, Any]) -> tuple[Any, Any]:
    found = model.model.get_image_features(inputs["pixel_values"], return_dict=True)
    return found.last_hidden_state.flatten(2).transpose(1, 2), found.pooler_output.flatten(0, 1)


FAMILY = Family(
    name="fast_vlm",
    model_types=("fast_vlm",),
    decoders=("qwen2",),
    examples=("KamilaMila/FastVLM-0.5B",),
    describe=_describe,
    load_processor=_load_processor,
    image_features=_image_features,
    image_token="image_token_index",
    translated=with_timm,
)
