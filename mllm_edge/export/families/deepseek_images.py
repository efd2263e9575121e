"""What DeepSeek-VL and its hybrid share: images scaled and padded to a square, and the form of a conversation."""

from typing import Any

from mllm_edge.errors import ConfigError
from mllm_edge.export.checkpoint.image_settings import resample_name, value_transforms
from mllm_edge.export.checkpoint.processor import require_switched_on
from mllm_edge.export.checkpoint.source import Source
from mllm_edge.export.family import Checkpoint
from mllm_edge.spec import PadToSquare, ResizeToSide, Transform

__all__ = ["TEMPLATE", "fitted", "require_siglip"]

_SIGLIP = "siglip_vision_model"
# For checkpoints that come without a template: what DeepSeek-VL was trained to see before the first question.
TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}{{ 'You are a helpful language and vision assistant. You are able to "
    "understand the visual content that the user provides, and assist the user with a variety of tasks using natural "
    "language.\n\n' }}{% endif %}"
    "{% for message in messages %}"
    "{{ message['role'] | capitalize + ': ' if message['role'] != 'system' else '' }}"
    "{% for part in message['content'] %}"
    "{{ part['text'] if part['type'] == 'text' else '<image_placeholder>' }}{% endfor %}"
    "{{ eos_token if message['role'] == 'assistant' else '\n\n' }}"
    "{% endfor %}{{ 'Assistant:' if add_generation_prompt else '' }}"
)


def require_siglip(checkpoint: Checkpoint) -> None:
    """Raise ConfigError for a tower of another kind."""
    kind = checkpoint.config.vision_config.model_type
    if kind != _SIGLIP:
        where = checkpoint.source.folder / "config.json"
        raise ConfigError(f"{where}: vision_config.model_type = {kind!r}", f"supported: {_SIGLIP}")


def fitted(source: Source, settings: Any) -> tuple[Transform, ...]:
    """What the image processor (transformers' object) makes of an image: a square of its `size`, padded with the mean
    colour; raises ConfigError."""
    require_switched_on(source, settings, "do_resize", "do_pad")
    side, least = settings.size.height, settings.min_size
    if least > side:
        raise ConfigError(f"{source.folder}: min_size {least} of images of {side} px", "use this model's own files")
    return (
        ResizeToSide(side, least, resample_name(settings.resample)),
        PadToSquare(tuple(settings.background_color)),
        *value_transforms(settings),
    )
