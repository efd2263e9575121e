"""Tiny random Ovis 2 checkpoints."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import Ovis2Config, Ovis2ForConditionalGeneration, Ovis2Processor, PreTrainedTokenizerFast
from transformers.models.ovis2.image_processing_pil_ovis2 import Ovis2ImageProcessorPil

from tests.tiny import Names, byte_tokenizer, random_model, save_state_dict

__all__ = ["OVIS_TEMPLATE", "save_tiny_ovis2"]

_AROUND = tuple(f"<IMG_{word}>" for word in ("START", "GRID", "COL", "ROW", "END"))
_WORDS = ("<|im_start|>", "<|im_end|>", "<image>", "<IMG_ATOM>", *_AROUND)
OVIS_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}{{ '<image>\n' }}"
    "{% else %}{{ content['text'] }}{% endif %}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def save_tiny_ovis2(
    folder: Path,
    *,
    text: Mapping[str, Any] | None = None,
    vision: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
    image_settings: Mapping[str, Any] | None = None,
    template: str | None = OVIS_TEMPLATE,
    names: Names = "saved",
    seed: int = 0,
    shard_size: str = "5GB",
) -> Any:
    """Save a random Ovis 2 with its processor files to `folder` and return the model in float32.

    The defaults: a tower of 48 px and 8 px patches with 2 layers, 9 tokens of a tile, 50
    visual words, up to 6 tiles, a Qwen2 with 2 layers, hidden sizes 64.
    """
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_tokenizer("<|endoftext|>", *_WORDS),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=list(_WORDS),
    )
    made = Ovis2Config(**_config(tokenizer, text, vision, config))
    model = random_model(Ovis2ForConditionalGeneration, made, tokenizer, seed)
    model.save_pretrained(folder, max_shard_size=shard_size)
    tower = made.vision_config
    size = {"size": {"height": tower.image_size, "width": tower.image_size}, "crop_to_patches": True, "max_patches": 6}
    side = tower.image_size // tower.patch_size // tower.hidden_stride
    Ovis2Processor(
        Ovis2ImageProcessorPil(**{**size, **(image_settings or {})}),
        tokenizer,
        image_seq_length=side**2,
        chat_template=template,
    ).save_pretrained(folder)
    if names == "state_dict":
        save_state_dict(folder, model)
    return model


def _config(
    tokenizer: PreTrainedTokenizerFast,
    text: Mapping[str, Any] | None,
    vision: Mapping[str, Any] | None,
    config: Mapping[str, Any] | None,
) -> dict[str, Any]:
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}
    decoder = {"intermediate_size": 128, "num_key_value_heads": 2, "vocab_size": 320, "max_position_embeddings": 1024}
    tower = {"intermediate_size": 96, "image_size": 48, "patch_size": 8, "hidden_stride": 2, "vocab_size": 55}
    return {
        "text_config": {"model_type": "qwen2", **sizes, **decoder, **(text or {})},
        "vision_config": {**sizes, **tower, **(vision or {})},
        "hidden_size": 64,
        "vocab_size": 320,
        "image_token_id": tokenizer.convert_tokens_to_ids("<IMG_ATOM>"),
        "visual_indicator_token_ids": tokenizer.convert_tokens_to_ids(list(_AROUND)),
        **{"tie_word_embeddings": True, **(config or {})},
    }
