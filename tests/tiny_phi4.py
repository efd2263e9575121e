"""Tiny random Phi-4 multimodal checkpoints."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import Phi4MultimodalConfig, Phi4MultimodalForCausalLM, PreTrainedTokenizerFast

from mllm_edge.export.families.phi4_multimodal import look_both_ways
from tests.tiny import Names, byte_tokenizer, random_model, save_state_dict

__all__ = ["PHI4_TEMPLATE", "save_tiny_phi4"]

_SPECIAL = (
    *("<|endoftext|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"),
    *("<|endoftext10|>", "<|endoftext11|>"),
)
PHI4_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}{{ '<|endoftext10|>' }}"
    "{% elif content['type'] == 'text' %}{{ content['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<|end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
_RANK, _ALPHA = 4, 8
_TARGETS = r"model.layers.\d+.((self_attn.(qkv|o)_proj)|(mlp.(gate_up|down)_proj))"


def save_tiny_phi4(
    folder: Path,
    *,
    text: Mapping[str, Any] | None = None,
    vision: Mapping[str, Any] | None = None,
    image_settings: Mapping[str, Any] | None = None,
    template: str | None = PHI4_TEMPLATE,
    adapter: bool = False,
    names: Names = "saved",
    seed: int = 0,
    shard_size: str = "5GB",
) -> Any:
    """Save a random Phi-4 multimodal with its processor files to `folder` and return the model in float32, whose tower
    looks at all patches; `adapter`: with the one for images in a folder of its own, which that model has merged.

    The defaults: up to 4 tiles of 64 px, patches of 8 px, 3 layers of the tower and 2 of the decoder, of sizes 32 and
    64.
    """
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_tokenizer(*_SPECIAL),
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        extra_special_tokens={"image_token": "<|endoftext10|>", "audio_token": "<|endoftext11|>"},
    )
    made = _config(tokenizer, text, vision)
    model = look_both_ways(random_model(Phi4MultimodalForCausalLM, made, tokenizer, seed))
    model.save_pretrained(folder, max_shard_size=shard_size)
    tokenizer.save_pretrained(folder)
    tower = made.vision_config
    images = {
        "image_processor_type": "Phi4MultimodalImageProcessorFast",
        "feature_extractor_type": "Phi4MultimodalFeatureExtractor",
        "size": {"height": tower.image_size, "width": tower.image_size},
        "patch_size": tower.patch_size,
        "dynamic_hd": 4,
        **(image_settings or {}),
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(images))
    (folder / "processor_config.json").write_text(json.dumps({"processor_class": "Phi4MultimodalProcessor"}))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    if names == "state_dict":
        save_state_dict(folder, model)
    if adapter:
        _adapt(folder / "vision-lora", model, seed)
    return model


def _adapt(folder: Path, model: Any, seed: int) -> None:
    """Write an adapter under the names that the published one has, and merge it into the model."""
    generator = torch.Generator().manual_seed(seed)
    factors: dict[str, torch.Tensor] = {}
    folder.mkdir()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.startswith("model.layers.") and name.endswith("_proj.weight"):
                rows, cols = weight.shape
                module = name.removesuffix(".weight")
                down, up = (0.1 * torch.randn(*s, generator=generator) for s in ((_RANK, cols), (rows, _RANK)))
                factors |= {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}
                weight += _ALPHA / _RANK * (up @ down)
    save_file(factors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": _RANK, "lora_alpha": _ALPHA}
    (folder / "adapter_config.json").write_text(json.dumps({**config, "target_modules": _TARGETS}))


def _config(
    tokenizer: PreTrainedTokenizerFast, text: Mapping[str, Any] | None, vision: Mapping[str, Any] | None
) -> Phi4MultimodalConfig:
    decoder = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": 320,
        "max_position_embeddings": 8192,
        "original_max_position_embeddings": 4096,
        "tie_word_embeddings": True,
        "rope_parameters": {
            **{"rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
            **{
                "short_factor": [1.0, 1.0, 1.1, 1.2, 1.5, 2.0, 2.5, 3.0],
                "long_factor": [1.0, 1.5, 2.0, 4.0, 8.0, 16.0, 20.0, 24.0],
            },
        },
        **(text or {}),
    }
    tower = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 64,
        "crop_size": 64,
        "patch_size": 8,
        **(vision or {}),
    }
    speech = {
        **{"hidden_size": 16, "intermediate_size": 16, "num_blocks": 1, "num_attention_heads": 2},
        **{"ext_pw_out_channel": 16, "depthwise_separable_out_channel": 16, "nemo_conv_channels": 16},
        **{"bias_max_distance": 4, "audio_token_id": tokenizer.convert_tokens_to_ids("<|endoftext11|>")},
    }
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return Phi4MultimodalConfig(
        **decoder,
        **ids,
        vision_config={**tower, "image_token_id": tokenizer.convert_tokens_to_ids("<|endoftext10|>")},
        audio_config=speech,
    )
