"""Tiny random Gemma 3 checkpoints."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3Processor, PreTrainedTokenizerFast
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

from tests.tiny import Names, byte_tokenizer, random_model, save_state_dict

__all__ = ["GEMMA3_TEMPLATE", "save_tiny_gemma3"]

_NAMED = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
GEMMA3_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<start_of_turn>' }}"
    "{{ 'model' if message['role'] == 'assistant' else message['role'] }}{{ '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}{{ '<start_of_image>' }}"
    "{% else %}{{ content['text'] | trim }}{% endif %}{% endfor %}{% endif %}{{ '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)


def save_tiny_gemma3(
    folder: Path,
    *,
    text: Mapping[str, Any] | None = None,
    vision: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
    image_settings: Mapping[str, Any] | None = None,
    template: str | None = GEMMA3_TEMPLATE,
    names: Names = "saved",
    seed: int = 0,
    shard_size: str = "5GB",
) -> Any:
    """Save a random Gemma 3 with its processor files to `folder` and return the model in float32.

    The defaults: a SigLIP tower of 48 px and 8 px patches with 2 layers, 9 tokens of 2 × 2 patches each, a decoder with
    2 layers, hidden sizes 64; a window of 24.
    """
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_tokenizer(
            "<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>", *_NAMED.values()
        ),
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        extra_special_tokens=_NAMED,
    )
    made = _config(tokenizer, text, vision, config)
    model = random_model(Gemma3ForConditionalGeneration, made, tokenizer, seed)
    model.save_pretrained(folder, max_shard_size=shard_size)
    side = made.vision_config.image_size
    images = Gemma3ImageProcessorPil(**{"size": {"height": side, "width": side}, **(image_settings or {})})
    tokens = made.mm_tokens_per_image
    Gemma3Processor(images, tokenizer, chat_template=template, image_seq_length=tokens).save_pretrained(folder)
    if names == "state_dict":
        save_state_dict(folder, model)
    elif names == "hub":
        tensors = load_file(folder / "model.safetensors")
        save_file({_old(name): tensor for name, tensor in tensors.items()}, folder / "model.safetensors")
    return model


def _config(
    tokenizer: PreTrainedTokenizerFast,
    text: Mapping[str, Any] | None,
    vision: Mapping[str, Any] | None,
    config: Mapping[str, Any] | None,
) -> Gemma3Config:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": 2}
    heads = {"num_key_value_heads": 2, "head_dim": 16, "query_pre_attn_scalar": 24}
    layers = (text or {}).get("num_hidden_layers", sizes["num_hidden_layers"])
    kinds = [("sliding_attention", "full_attention")[i % 2] for i in range(layers)]
    windows = {"sliding_window": 24, "layer_types": kinds}
    decoder = {"vocab_size": 320, "max_position_embeddings": 1024, **heads, **windows}
    tower = {"image_size": 48, "patch_size": 8, "vision_use_head": False}
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in _NAMED.items()}
    return Gemma3Config(
        text_config={**sizes, **decoder, **(text or {})},
        vision_config={"model_type": "siglip_vision_model", **sizes, **tower, **(vision or {})},
        image_token_index=ids["image_token"],
        boi_token_index=ids["boi_token"],
        eoi_token_index=ids["eoi_token"],
        **{"mm_tokens_per_image": 9, **(config or {})},
    )


def _old(name: str) -> str:
    name = name.replace("model.language_model.", "language_model.model.").removeprefix("model.")
    return name if ".vision_model." in name else name.replace("vision_tower.", "vision_tower.vision_model.")
