"""ViP-LLaVA: LLaVA whose connector begins with a norm, over hidden states of several layers of the tower.

The first position of a tile is always left out, which of CLIP is the class token.
"""

from collections.abc import Mapping
from typing import Any

from mllm_edge.export.checkpoint.source import Source
from mllm_edge.export.families.llava_parts import (
    SINGLE,
    read_llava_processor,
    read_vision,
    single_image_spec,
    tapped_states,
    with_text_config,
)
from mllm_edge.export.family import Checkpoint, Family, Parts

__all__ = ["FAMILY"]

# For checkpoints that come without a template: images first, then the text.
_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] != 'system' %}"
    "{{ '###' + ('Human' if message['role'] == 'user' else message['role'] | capitalize) + ': ' }}{% endif %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% endfor %}{{ '###Assistant:' if add_generation_prompt else '' }}"
)


def _describe(checkpoint: Checkpoint) -> Parts:
    top = checkpoint.top
    seen = read_vision(checkpoint, skip=True, norm_eps=float(top.take("projector_layernorm_eps")))
    top.take("image_seq_length")  # neither the reference's model nor its processor reads it
    image = single_image_spec(checkpoint, seen.tile, seen.tokens)
    return Parts(seen.components(checkpoint), image, seen.ignored(checkpoint))


def _load_processor(source: Source) -> Any:
    return read_llava_processor(source, "LlavaProcessor", SINGLE, _TEMPLATE)


def _image_features(model: Any, inputs: Mapping[str, Any]) -> tuple[Any, Any]:
    found = model.model.get_image_features(inputs["pixel_values"], return_dict=True)
    return tapped_states(model, found, skip=True), found.pooler_output.flatten(0, 1)


FAMILY = Family(
    name="vipllava",
    model_types=("vipllava",),
    decoders=("llama",),
    examples=("llava-hf/vip-llava-7b-hf",),
    describe=_describe,
    load_processor=_load_processor,
    image_features=_image_features,
    image_token="image_token_index",
    translated=with_text_config,
)
