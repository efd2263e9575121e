"""Tiny random Idefics2 checkpoints."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from transformers import (
    Idefics2Config,
    Idefics2ForConditionalGeneration,
    Idefics2Processor,
    PreTrainedTokenizerFast,
)
from transformers.models.idefics2.image_processing_pil_idefics2 import Idefics2ImageProcessorPil

from tests.tiny import Names, byte_tokenizer, random_model, save_state_dict

__all__ = ["IDEFICS2_TEMPLATE", "save_tiny_idefics2"]

IDEFICS2_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].capitalize() }}"
    "{% if message['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{ line['text'] }}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


def save_tiny_idefics2(
    folder: Path,
    *,
    text: Mapping[str, Any] | None = None,
    vision: Mapping[str, Any] | None = None,
    perceiver: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
    image_settings: Mapping[str, Any] | None = None,
    template: str | None = IDEFICS2_TEMPLATE,
    names: Names = "saved",
    seed: int = 0,
    shard_size: str = "5GB",
) -> Any:
    """Save a random Idefics2 with its processor files to `folder` and return the model in float32.

    The defaults: a tower trained on 64 px with 8 px patches and 2 layers, a resampler with 2 layers and 3 latents, a
    Mistral with 2 layers, hidden sizes 64, but 48 of the tower; images in quarters of 20 to 60 px.
    """
    core = byte_tokenizer("<pad>", "<s>", "</s>", "<fake_token_around_image>", "<image>", "<end_of_utterance>")
    core.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", core.token_to_id("<s>"))])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<pad>", pad_token="<pad>"
    )
    model = random_model(
        Idefics2ForConditionalGeneration, _config(tokenizer, text, vision, perceiver, config), tokenizer, seed
    )
    model.save_pretrained(folder, max_shard_size=shard_size)
    settings = {"size": {"shortest_edge": 20, "longest_edge": 60}, "do_image_splitting": True}
    images = Idefics2ImageProcessorPil(**{**settings, **(image_settings or {})})
    latents = model.config.perceiver_config.resampler_n_latents
    Idefics2Processor(images, tokenizer, image_seq_len=latents, chat_template=template).save_pretrained(folder)
    if names == "state_dict":
        save_state_dict(folder, model)
    elif names == "hub":
        _as_on_the_hub(folder)
    return model


def _config(
    tokenizer: PreTrainedTokenizerFast,
    text: Mapping[str, Any] | None,
    vision: Mapping[str, Any] | None,
    perceiver: Mapping[str, Any] | None,
    config: Mapping[str, Any] | None,
) -> Idefics2Config:
    sizes = {"intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": 2}
    decoder = {"hidden_size": 64, "num_key_value_heads": 2, "vocab_size": 320, "max_position_embeddings": 1024}
    decoder["rms_norm_eps"] = 1e-5
    heads = {"resampler_n_heads": 4, "num_key_value_heads": 2, "resampler_head_dim": 8}
    depth = {"resampler_n_latents": 3, "resampler_depth": 2, "hidden_size": 64, "rms_norm_eps": 1e-5}
    return Idefics2Config(
        text_config={"model_type": "mistral", **sizes, **decoder, **(text or {})},
        vision_config={**sizes, "hidden_size": 48, "image_size": 64, "patch_size": 8, **(vision or {})},
        perceiver_config={**heads, **depth, **(perceiver or {})},
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        **(config or {}),
    )


def _as_on_the_hub(folder: Path) -> None:
    """Older forms of files and names of a part."""
    stated = json.loads((folder / "processor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps(stated.pop("image_processor")))
    kept = {key: stated[key] for key in ("processor_class", "image_seq_len")}
    (folder / "processor_config.json").write_text(json.dumps(kept))
    config = json.loads((folder / "config.json").read_text())
    for part in ("vision_config", "perceiver_config"):
        config[part]["model_type"] = "idefics2"
    for key in ("hidden_size", "rms_norm_eps"):
        del config["perceiver_config"][key]
    (folder / "config.json").write_text(json.dumps(config))
    save_file(load_file(folder / "model.safetensors"), folder / "model.safetensors")
