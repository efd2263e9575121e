"""Tiny random Janus checkpoints."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import JanusConfig, JanusForConditionalGeneration, JanusProcessor, PreTrainedTokenizerFast
from transformers.models.janus.image_processing_pil_janus import JanusImageProcessorPil

from tests.tiny import Names, byte_tokenizer, random_model, save_state_dict

__all__ = ["JANUS_TEMPLATE", "save_tiny_janus"]

_NAMED = {
    "image_token": "<image_placeholder>",
    "boi_token": "<begin_of_image>",
    "eoi_token": "<end_of_image>",
}
JANUS_TEMPLATE = (
    "{% for message in messages %}{{ '<|User|>: ' if message['role'] == 'user' else '<|Assistant|>: ' }}"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}{{ '<image_placeholder>' }}"
    "{% else %}{{ content['text'] }}{% endif %}{% endfor %}"
    "{% if message['role'] == 'user' %}{{ '\n\n' }}{% else %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|Assistant|>:' }}{% endif %}"
)


def save_tiny_janus(
    folder: Path,
    *,
    text: Mapping[str, Any] | None = None,
    vision: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
    image_settings: Mapping[str, Any] | None = None,
    system_prompt: bool = True,
    template: str | None = JANUS_TEMPLATE,
    names: Names = "saved",
    seed: int = 0,
    shard_size: str = "5GB",
) -> Any:
    """Save a random Janus with its processor files to `folder` and return the model in float32.

    The defaults: a tower of 48 px and 8 px patches with 2 layers, a Llama with 2, hidden sizes 64, a codebook of 16.
    """
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_tokenizer("<|begin|>", "<|end|>", *_NAMED.values()),
        bos_token="<|begin|>",
        eos_token="<|end|>",
        pad_token="<|end|>",
        extra_special_tokens=_NAMED,
    )
    made = JanusConfig(**_config(tokenizer, text, vision, config))
    model = random_model(JanusForConditionalGeneration, made, tokenizer, seed)
    model.save_pretrained(folder, max_shard_size=shard_size)
    tower = made.vision_config
    images = JanusImageProcessorPil(
        **{"size": {"height": tower.image_size, "width": tower.image_size}, **(image_settings or {})}
    )
    JanusProcessor(
        images,
        tokenizer,
        chat_template=template,
        use_default_system_prompt=system_prompt,
        num_image_tokens=(tower.image_size // tower.patch_size) ** 2,
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
    tower = {"image_size": 48, "patch_size": 8, "mlp_ratio": 1.5, "projection_dim": 64}
    codes = {"embed_dim": 8, "num_embeddings": 16, "latent_channels": 8, "base_channels": 32, "num_res_blocks": 1}
    paints = {**codes, "channel_multiplier": [1, 1], "projection_dim": 64, "image_token_embed_dim": 64}
    return {
        "text_config": {"model_type": "llama", **sizes, **decoder, **(text or {})},
        "vision_config": {**sizes, **tower, **(vision or {})},
        "vq_config": paints,
        "image_token_id": tokenizer.convert_tokens_to_ids(_NAMED["image_token"]),
        **{"tie_word_embeddings": False, **(config or {})},
    }
