"""Tiny random-weight checkpoints, made on the spot: the references of the parity tests."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLProcessor,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.idefics3.processing_idefics3 import Idefics3Processor
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from mllm_edge.export.checkpoint.processing import for_images

__all__ = [
    "LLAVA_TEMPLATE",
    "QWEN_TEMPLATE",
    "TEMPLATE",
    "Names",
    "as_on_the_hub",
    "byte_tokenizer",
    "make_tokenizer",
    "qwen_tokenizer",
    "save_state_dict",
    "save_qwen",
    "qwen_config",
    "random_model",
    "save_tiny_idefics3",
    "save_tiny_llava",
    "save_tiny_qwen2_vl",
]

TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% elif line['type'] == 'video' %}{{ '<video>' }}{% endif %}"
    "{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
_SPECIAL = ("<|im_start|>", "<end_of_utterance>", "<fake_token_around_image>", "<image>", "<global-img>")
_CLASSES: dict[str, tuple[Any, Any]] = {
    "idefics3": (Idefics3ForConditionalGeneration, Idefics3Config),
    "smolvlm": (SmolVLMForConditionalGeneration, SmolVLMConfig),
}


def make_tokenizer(rows: int = 6, cols: int = 6) -> PreTrainedTokenizerFast:
    """Byte-level BPE without merges (256 byte tokens) and the special tokens of SmolVLM."""
    tiles = [f"<row_{r}_col_{c}>" for r in range(1, rows + 1) for c in range(1, cols + 1)]
    return PreTrainedTokenizerFast(
        tokenizer_object=byte_tokenizer(*_SPECIAL, *tiles),
        bos_token="<|im_start|>",
        eos_token="<end_of_utterance>",
        pad_token="<|im_start|>",
    )


def byte_tokenizer(*special: str) -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    return core


def save_tiny_idefics3(
    folder: Path,
    *,
    text: Mapping[str, Any] | None = None,
    vision: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
    processor: Mapping[str, Any] | None = None,
    model_type: str = "idefics3",
    seed: int = 0,
    shard_size: str = "5GB",
) -> Any:
    """Save a random Idefics3 (or SmolVLM) with its processor files to `folder` and return the model in float32.

    `text`, `vision`, `config` and `processor` override the configuration and the image processor's settings. The
    defaults: 64 px tiles of 8 px patches, 2 + 2 layers, hidden sizes 64, up to 2 × 2 tiles.
    """
    tokenizer = make_tokenizer()
    architecture, config_class = _CLASSES[model_type]
    model = random_model(architecture, _config(config_class, tokenizer, text, vision, config), tokenizer, seed)
    model.save_pretrained(folder, max_shard_size=shard_size)
    _processor(tokenizer, model.config, processor).save_pretrained(folder)
    return model


def random_model(architecture: Any, config: Any, tokenizer: PreTrainedTokenizerFast, seed: int) -> Any:
    """A model of class `architecture` whose answers depend on every weight."""
    torch.manual_seed(seed)
    model = architecture(config).eval()
    for name, weight in model.named_parameters():
        is_norm = ("norm" in name.lower() or "layrnorm" in name) and name.endswith("weight")
        # Larger than the usual initialization: logits spread, and greedy choices are not ties.
        weight.data = 1 + 0.1 * torch.randn_like(weight) if is_norm else 0.15 * torch.randn_like(weight)
    model.tie_weights()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model


def _config(
    config_class: Any,
    tokenizer: PreTrainedTokenizerFast,
    text: Mapping[str, Any] | None,
    vision: Mapping[str, Any] | None,
    config: Mapping[str, Any] | None,
) -> Any:
    return config_class(
        text_config={
            "model_type": "llama",
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 320,
            "max_position_embeddings": 1024,
            "rms_norm_eps": 1e-5,
            **(text or {}),
        },
        vision_config={
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 64,
            "patch_size": 8,
            **(vision or {}),
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        **{"scale_factor": 2, "tie_word_embeddings": False, **(config or {})},
    )


def _processor(
    tokenizer: PreTrainedTokenizerFast, config: Any, settings: Mapping[str, Any] | None
) -> Idefics3Processor:
    tile = config.vision_config.image_size
    defaults = {"size": {"longest_edge": 2 * tile}, "max_image_size": {"longest_edge": tile}}
    image_processor = Idefics3ImageProcessorPil(**{**defaults, **(settings or {})})
    tile = image_processor.max_image_size["longest_edge"]
    tokens = (tile // config.vision_config.patch_size // config.scale_factor) ** 2
    return Idefics3Processor(image_processor, tokenizer, image_seq_len=tokens, chat_template=TEMPLATE)


# ---------------------------------------------------------------- LLaVA
LLAVA_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
_IMAGE_PROCESSORS = {"clip": CLIPImageProcessorPil, "llava": LlavaImageProcessorPil, "siglip": SiglipImageProcessorPil}
# What transformers 5 saves, a bare state dictionary, and what the hub's older checkpoints look like.
Names = Literal["saved", "state_dict", "hub"]


def save_tiny_llava(
    folder: Path,
    *,
    text: Mapping[str, Any] | None = None,
    vision: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
    images: str = "clip",
    image_settings: Mapping[str, Any] | None = None,
    template: str | None = LLAVA_TEMPLATE,
    names: Names = "saved",
    seed: int = 0,
    shard_size: str = "5GB",
) -> Any:
    """Save a random LLaVA with its processor files to `folder` and return the model in float32.

    The defaults: a CLIP tower of 48 px and 8 px patches with 3 layers, a Llama with 2, hidden sizes 64. `images` names
    the image processor, `image_settings` overrides its settings.
    """
    tokenizer = make_tokenizer()
    model = random_model(LlavaForConditionalGeneration, _llava_config(tokenizer, text, vision, config), tokenizer, seed)
    model.save_pretrained(folder, max_shard_size=shard_size)
    side, strategy = model.config.vision_config.image_size, model.config.vision_feature_select_strategy
    size = {"height": side, "width": side}
    sizes = {"size": size} if images == "siglip" else {"size": {"shortest_edge": side}, "crop_size": size}
    processor = LlavaProcessor(
        _IMAGE_PROCESSORS[images](**{**sizes, **(image_settings or {})}),
        tokenizer,
        patch_size=model.config.vision_config.patch_size,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=int(model.config.vision_config.model_type == "clip_vision_model"),
        chat_template=template,
    )
    processor.save_pretrained(folder)
    if names == "state_dict":
        save_state_dict(folder, model)
    elif names == "hub":
        as_on_the_hub(folder, processor)
    return model


def _llava_config(
    tokenizer: PreTrainedTokenizerFast,
    text: Mapping[str, Any] | None,
    vision: Mapping[str, Any] | None,
    config: Mapping[str, Any] | None,
) -> LlavaConfig:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    decoder = {"num_hidden_layers": 2, "num_key_value_heads": 2, "vocab_size": 320, "max_position_embeddings": 1024}
    tower = {"num_hidden_layers": 3, "image_size": 48, "patch_size": 8}
    return LlavaConfig(
        text_config={"model_type": "llama", **sizes, **decoder, **(text or {})},
        vision_config={"model_type": "clip_vision_model", **sizes, **tower, **(vision or {})},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        **(config or {}),
    )


def as_on_the_hub(folder: Path, processor: Any) -> None:
    """Give a LLaVA or its like older names of files and tensors, with the tables that older versions stored."""
    _rename(folder / "model.safetensors", lambda name: name.replace("_tower.", "_tower.vision_model."))
    stated = json.loads((folder / "processor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps(stated.pop("image_processor")))
    kept = {key: stated[key] for key in ("processor_class", "video_token") if key in stated}
    (folder / "processor_config.json").write_text(json.dumps(kept))
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": processor.chat_template}))
    (folder / "chat_template.jinja").unlink()


def _rename(path: Path, rename: Callable[[str], str]) -> None:
    tensors = {rename(name): tensor for name, tensor in load_file(path).items()}
    tensors["vision_tower.vision_model.embeddings.position_ids"] = torch.arange(37)[None]
    tensors["language_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(tensors, path)


# ---------------------------------------------------------------- Qwen2-VL
QWEN_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n{% else %}"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% elif content['type'] == 'video' %}"
    "<|vision_start|><|video_pad|><|vision_end|>{% else %}{{ content['text'] }}{% endif %}{% endfor %}"
    "<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_QWEN_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")


def qwen_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE without merges and the special tokens of Qwen2-VL."""
    core = byte_tokenizer(*_QWEN_SPECIAL, "<|image_pad|>", "<|video_pad|>")
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>")


def save_tiny_qwen2_vl(
    folder: Path,
    *,
    text: Mapping[str, Any] | None = None,
    vision: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
    image_settings: Mapping[str, Any] | None = None,
    template: str | None = QWEN_TEMPLATE,
    names: Names = "saved",
    seed: int = 0,
    shard_size: str = "5GB",
) -> Any:
    """Save a random Qwen2-VL with its processor files to `folder` and return the model in float32.

    The defaults: 8 px patches, cells of 2 × 2, up to 64 cells, 2 + 2 layers, hidden sizes 64 (text) and 48 (tower).
    """
    tokenizer = qwen_tokenizer()
    model = random_model(
        Qwen2VLForConditionalGeneration, _qwen2_vl_config(tokenizer, text, vision, config), tokenizer, seed
    )
    processor = save_qwen(folder, model, Qwen2VLProcessor, tokenizer, image_settings, template, shard_size)
    if names == "state_dict":
        save_state_dict(folder, model)
    elif names == "hub":
        _qwen2_vl_as_on_the_hub(folder, processor)
    return model


def save_qwen(
    folder: Path,
    model: Any,
    processor_class: Any,
    tokenizer: PreTrainedTokenizerFast,
    image_settings: Mapping[str, Any] | None,
    template: str | None,
    shard_size: str,
) -> Any:
    """Save a model of Qwen's with a processor of that class, which is returned: up to 64 cells of 2 × 2 patches."""
    model.save_pretrained(folder, max_shard_size=shard_size)
    tower = model.config.vision_config
    sides = {"patch_size": tower.patch_size, "merge_size": tower.spatial_merge_size}
    frames = {"temporal_patch_size": tower.temporal_patch_size}
    bounds = {"min_pixels": 4 * 16**2, "max_pixels": 64 * 16**2}
    images = Qwen2VLImageProcessorPil(**{**sides, **frames, **bounds, **(image_settings or {})})
    processor = for_images(processor_class)(images, tokenizer, chat_template=template)
    processor.save_pretrained(folder)
    return processor


def save_state_dict(folder: Path, model: Any) -> None:
    """Write the weights again, under the names that the model itself has for them."""
    save_file({k: v.clone().contiguous() for k, v in model.state_dict().items()}, folder / "model.safetensors")


def qwen_config(tokenizer: PreTrainedTokenizerFast, text: Mapping[str, Any] | None) -> dict[str, Any]:
    """What Qwen2-VL and its successors have in common: the placeholders' ids and a `text_config`."""
    ids = {
        f"{name}_token_id": tokenizer.convert_tokens_to_ids(token)
        for name, token in (
            ("image", "<|image_pad|>"),
            ("video", "<|video_pad|>"),
            ("vision_start", "<|vision_start|>"),
            ("vision_end", "<|vision_end|>"),
        )
    }
    decoder = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 320,
        "max_position_embeddings": 1024,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
        "bos_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    return {**ids, "text_config": {**decoder, **(text or {})}}


def _qwen2_vl_config(
    tokenizer: PreTrainedTokenizerFast,
    text: Mapping[str, Any] | None,
    vision: Mapping[str, Any] | None,
    config: Mapping[str, Any] | None,
) -> Qwen2VLConfig:
    shared = qwen_config(tokenizer, text)
    tower = {"depth": 2, "embed_dim": 48, "num_heads": 4, "mlp_ratio": 2, "patch_size": 8}
    tower = {**tower, "hidden_size": shared["text_config"]["hidden_size"], **(vision or {})}
    return Qwen2VLConfig(vision_config=tower, **{**shared, **(config or {})})


def _qwen2_vl_as_on_the_hub(folder: Path, processor: Qwen2VLProcessor) -> None:
    """Older forms of files: one flat configuration, `rope_scaling`, bounds as `min_pixels` and `max_pixels`."""
    config = json.loads((folder / "config.json").read_text())
    text, tower = config.pop("text_config"), config["vision_config"]
    rope = text.pop("rope_parameters")
    for key in ("layer_types", "model_type"):
        text.pop(key)
    tower = {key: value for key, value in tower.items() if key not in ("rope_parameters", "model_type", "in_channels")}
    tower = {**tower, "in_chans": 3, "spatial_patch_size": tower["patch_size"]}
    scaling = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    flat = {**text, "rope_theta": rope["rope_theta"], "rope_scaling": scaling, "vision_config": tower}
    (folder / "config.json").write_text(json.dumps({**config, **flat}))
    stated = json.loads((folder / "processor_config.json").read_text())["image_processor"]
    size = stated.pop("size")
    bounds = {"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"]}
    (folder / "preprocessor_config.json").write_text(json.dumps({**stated, **bounds}))
    (folder / "processor_config.json").unlink()
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": processor.chat_template}))
    (folder / "chat_template.jinja").unlink()
