"""LightOnOCR: Pixtral's tower, a connector that merges patches, a Qwen3 decoder.

Images keep their shape; patches that make no whole square at the right and bottom are seen and become no token.
"""

from collections.abc import Mapping
from typing import Any

from mllm_edge.errors import ConfigError
from mllm_edge.export.checkpoint.processor import load_processor
from mllm_edge.export.checkpoint.source import Source
from mllm_edge.export.families.pixtral_parts import pixtral_components, pixtral_image, pixtral_pixels, read_pixtral
from mllm_edge.export.family import Checkpoint, Family, Parts
from mllm_edge.spec import ImagePrompt

__all__ = ["FAMILY"]

_VISION, _CONNECTOR = "model.vision_encoder.", "model.vision_projection."
# For checkpoints that come without a template: turns between <|im_start|> and <|im_end|>.
_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{{ part['text'] if part['type'] == 'text' else '<|image_pad|>' }}{% endfor %}"
    "{% endif %}{{ '<|im_end|>\n' }}{% endfor %}{{ '<|im_start|>assistant\n' if add_generation_prompt else '' }}"
)


def _describe(checkpoint: Checkpoint) -> Parts:
    tower, processor = read_pixtral(checkpoint), checkpoint.processor
    stated = processor.image_processor.patch_size
    sides = (stated, stated) if isinstance(stated, int) else (stated["height"], stated["width"])
    if sides[0] != sides[1]:
        raise ConfigError(f"{checkpoint.source.folder}: the image processor's patch_size is {stated}", "squares only")
    prompt = ImagePrompt(processor.image_token, checkpoint.token_id, single="{image}")
    image = pixtral_image(checkpoint, tower, prompt, sides[0])
    return Parts(pixtral_components(checkpoint, tower, image, (_VISION, _CONNECTOR), "gelu", bias=False), image)


def _load_processor(source: Source) -> Any:
    return load_processor(source, "LightOnOcrProcessor", ("PixtralImageProcessor",), _TEMPLATE)


def _image_features(model: Any, inputs: Mapping[str, Any]) -> tuple[Any, Any]:
    import torch

    found = model.model.get_image_features(inputs["pixel_values"], inputs["image_sizes"], return_dict=True)
    return found.last_hidden_state.transpose(0, 1), torch.cat(list(found.pooler_output))


FAMILY = Family(
    name="lighton_ocr",
    model_types=("lighton_ocr",),
    decoders=("qwen3",),
    examples=("lightonai/LightOnOCR-1B-1025", "lightonai/LightOnOCR-2-1B"),
    describe=_describe,
    load_processor=_load_processor,
    image_features=_image_features,
    pixel_values=pixtral_pixels,
)
