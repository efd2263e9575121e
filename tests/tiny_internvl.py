"""Tiny random InternVL checkpoints, in transformers' layout and in the original one, and Qianfan-OCR's."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import (
    InternVLConfig,
    InternVLForConditionalGeneration,
    PreTrainedTokenizerFast,
    QianfanOCRConfig,
    QianfanOCRForConditionalGeneration,
)
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

from tests.tiny import Names, make_tokenizer, random_model

__all__ = [
    "INTERNVL_TEMPLATE",
    "internvl_tokenizer",
    "save_tiny_internvl",
    "save_tiny_internvl_chat",
    "save_tiny_qianfan_ocr",
]

INTERNVL_TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n'}}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}{{ '<IMG_CONTEXT>\n' }}"
    "{% elif content['type'] == 'video' %}{{ '<video>\n' }}"
    "{% elif content['type'] == 'text' %}{{ content['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{'<|im_end|>\n'}}{% endfor %}{% if add_generation_prompt %}{{'<|im_start|>assistant\n' }}{% endif %}"
)
_TOKENS = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
_ARCHITECTURES = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM"}


def internvl_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE without merges and the special tokens of InternVL."""
    core = make_tokenizer().backend_tokenizer
    core.add_special_tokens(["<|im_end|>", "<video>", *_TOKENS.values()])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|im_end|>",
        pad_token="<|im_start|>",
        extra_special_tokens={**_TOKENS, "video_token": "<video>"},
    )


def save_tiny_internvl(
    folder: Path,
    *,
    text: Mapping[str, Any] | None = None,
    vision: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
    images: Mapping[str, Any] | None = None,
    template: str | None = INTERNVL_TEMPLATE,
    names: Names = "saved",
    seed: int = 0,
    shard_size: str = "5GB",
) -> Any:
    """Save a random InternVL with its processor files to `folder` and return the model in float32.

    The defaults: tiles of 32 px and 4 px patches, 3 + 2 layers, hidden sizes 64, 16 tokens per tile, up to 6 tiles.
    `text`, `vision`, `config` and `images` override the configuration and the image processor's settings.
    """
    model = _model(internvl_tokenizer(), text, vision, config, seed)
    return _saved(folder, model, images, template, names, shard_size)


def save_tiny_qianfan_ocr(
    folder: Path,
    *,
    text: Mapping[str, Any] | None = None,
    vision: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
    images: Mapping[str, Any] | None = None,
    template: str | None = INTERNVL_TEMPLATE.replace("<IMG_CONTEXT>", "<image>"),
    names: Names = "saved",
    seed: int = 0,
    shard_size: str = "5GB",
) -> Any:
    """The same of Qianfan-OCR, which saves its weights under the names of the original layout."""
    text = {"model_type": "qwen3", "head_dim": 16, **(text or {})}
    classes = QianfanOCRForConditionalGeneration, QianfanOCRConfig
    model = _model(internvl_tokenizer(), text, vision, config, seed, classes)
    return _saved(folder, model, images, template, names, shard_size)


def _saved(
    folder: Path, model: Any, images: Mapping[str, Any] | None, template: str | None, names: Names, shard_size: str
) -> Any:
    tokenizer = internvl_tokenizer()
    model.save_pretrained(folder, max_shard_size=shard_size)
    if names == "state_dict":
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "model.safetensors")
    tokenizer.save_pretrained(folder)
    tile, tokens = _tile(model.config)
    size = {"height": tile, "width": tile}
    image_processor = GotOcr2ImageProcessorPil(**{"size": size, "max_patches": 6, **(images or {})})
    image_processor.save_pretrained(folder)
    (folder / "processor_config.json").write_text(json.dumps({"image_seq_length": tokens}))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return model


def save_tiny_internvl_chat(
    folder: Path,
    *,
    text: Mapping[str, Any] | None = None,
    vision: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
    top: Mapping[str, Any] | None = None,
    internlm2: bool = False,
    template: str | None = None,
    seed: int = 0,
    shards: int = 1,
) -> Any:
    """The same in the layout of the original code. `top` overrides the first level of config.json; `internlm2`: the
    Llama of the model is written as an InternLM2. Returns the model as transformers runs it, in float32."""
    tokenizer = internvl_tokenizer()
    if internlm2:
        text = {"model_type": "llama", **(text or {})}
    model = _model(tokenizer, text, vision, config, seed)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    _edit(folder / "tokenizer_config.json", internlm2, template)
    _save(folder, _original_tensors(model, internlm2), shards)
    (folder / "config.json").write_text(json.dumps({**_original_config(model.config, internlm2), **(top or {})}))
    return model


def _model(
    tokenizer: PreTrainedTokenizerFast,
    text: Mapping[str, Any] | None,
    vision: Mapping[str, Any] | None,
    config: Mapping[str, Any] | None,
    seed: int,
    classes: tuple[Any, Any] = (InternVLForConditionalGeneration, InternVLConfig),
) -> Any:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    decoder = {"num_hidden_layers": 2, "num_key_value_heads": 2, "vocab_size": 320, "max_position_embeddings": 1024}
    tower = {"num_hidden_layers": 3, "image_size": 32, "patch_size": 4}
    configuration = classes[1](
        text_config={"model_type": "qwen2", **sizes, **decoder, **(text or {})},
        vision_config={**sizes, "attention_bias": True, **tower, **(vision or {})},
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        **{"tie_word_embeddings": False, **(config or {})},
    )
    return random_model(classes[0], configuration, tokenizer, seed)


def _tile(config: InternVLConfig) -> tuple[int, int]:
    """Side of a tile in px, and its tokens."""
    side, patch = config.vision_config.image_size[0], config.vision_config.patch_size[0]
    return side, int(side // patch * config.downsample_ratio) ** 2


# ---------------------------------------------------------------- the original layout
def _original_config(config: InternVLConfig, internlm2: bool) -> dict[str, Any]:
    text, vision = config.text_config.to_dict(), config.vision_config.to_dict()
    rope = text.pop("rope_parameters")
    llm = {
        **text,
        "architectures": ["InternLM2ForCausalLM" if internlm2 else _ARCHITECTURES[text["model_type"]]],
        "model_type": "internlm2" if internlm2 else text["model_type"],
        "attn_implementation": "flash_attention_2",
        "rope_theta": rope["rope_theta"],
        "rope_scaling": None
        if rope["rope_type"] == "default"
        else {"type": rope["rope_type"], "factor": rope["factor"]},
        "tie_word_embeddings": config.tie_word_embeddings,
        "torch_dtype": "bfloat16",
    }
    if internlm2:
        llm["bias"] = False
    same = ("hidden_act", "hidden_size", "intermediate_size", "layer_norm_eps", "norm_type", "num_attention_heads")
    tower = {key: vision[key] for key in (*same, "num_channels", "num_hidden_layers")}
    tower.update(
        model_type="intern_vit_6b",
        drop_path_rate=0.1,
        image_size=vision["image_size"][0],
        initializer_factor=1.0,
        patch_size=vision["patch_size"][0],
        qk_normalization=vision["use_qk_norm"],
        qkv_bias=vision["attention_bias"],
        use_flash_attn=True,
    )
    return {
        "architectures": ["InternVLChatModel"],
        "auto_map": {"AutoModel": "modeling_internvl_chat.InternVLChatModel"},
        "downsample_ratio": config.downsample_ratio,
        "dynamic_image_size": True,
        "force_image_size": vision["image_size"][0],
        "llm_config": llm,
        "max_dynamic_patch": 6,
        "min_dynamic_patch": 1,
        "model_type": "internvl_chat",
        "pad2square": False,
        "ps_version": "v2",
        "select_layer": config.vision_feature_layer,
        "template": "internlm2-chat" if internlm2 else "internvl2_5",
        "torch_dtype": "bfloat16",
        "use_backbone_lora": 0,
        "use_llm_lora": 0,
        "use_thumbnail": True,
        "vision_config": tower,
    }


def _original_tensors(model: Any, internlm2: bool) -> dict[str, torch.Tensor]:
    state, config = model.state_dict(), model.config
    tensors = {}
    for i in range(config.vision_config.num_hidden_layers):
        tensors |= _vision_layer(state, f"model.vision_tower.encoder.layer.{i}.", f"vision_model.encoder.layers.{i}.")
    tower = "model.vision_tower.embeddings."
    tensors["vision_model.embeddings.class_embedding"] = state[f"{tower}cls_token"]
    tensors["vision_model.embeddings.position_embedding"] = state[f"{tower}position_embeddings"]
    for kind in ("weight", "bias"):
        tensors[f"vision_model.embeddings.patch_embedding.{kind}"] = state[f"{tower}patch_embeddings.projection.{kind}"]
        for number, name in (("0", "layer_norm"), ("1", "linear_1"), ("3", "linear_2")):
            tensors[f"mlp1.{number}.{kind}"] = state[f"model.multi_modal_projector.{name}.{kind}"]
    decoder = {k.removeprefix("model.language_model."): v for k, v in state.items() if "language_model" in k}
    if internlm2:
        decoder = _internlm2(decoder, config.text_config)
    tensors |= {f"language_model.model.{name}": tensor for name, tensor in decoder.items()}
    if not config.tie_word_embeddings:
        tensors[f"language_model.{'output' if internlm2 else 'lm_head'}.weight"] = state["lm_head.weight"]
    return tensors


def _vision_layer(state: Mapping[str, torch.Tensor], old: str, new: str) -> dict[str, torch.Tensor]:
    names = {"lambda_1": "ls1", "lambda_2": "ls2"}
    for kind in ("weight", "bias"):
        names |= {
            f"layernorm_before.{kind}": f"norm1.{kind}",
            f"layernorm_after.{kind}": f"norm2.{kind}",
            f"attention.projection_layer.{kind}": f"attn.proj.{kind}",
            f"mlp.fc1.{kind}": f"mlp.fc1.{kind}",
            f"mlp.fc2.{kind}": f"mlp.fc2.{kind}",
        }
    names |= {f"attention.{part}_norm.weight": f"attn.{part}_norm.weight" for part in "qk"}
    tensors = {new + there: state[old + here] for here, there in names.items() if old + here in state}
    for kind in ("weight", "bias"):
        parts = [state.get(f"{old}attention.{part}_proj.{kind}") for part in "qkv"]
        if parts[0] is not None:
            tensors[f"{new}attn.qkv.{kind}"] = torch.cat(parts)
    return tensors


def _internlm2(decoder: Mapping[str, torch.Tensor], config: Any) -> dict[str, torch.Tensor]:
    """q, k and v in one weight: for each key head its query heads, then itself, then its value head."""
    tensors = {"tok_embeddings.weight": decoder["embed_tokens.weight"], "norm.weight": decoder["norm.weight"]}
    group = config.num_attention_heads // config.num_key_value_heads
    for i in range(config.num_hidden_layers):
        q, k, v = (decoder[f"layers.{i}.self_attn.{part}_proj.weight"].split(config.head_dim) for part in "qkv")
        rows: list[torch.Tensor] = []
        for head in range(config.num_key_value_heads):
            rows += [*q[head * group : (head + 1) * group], k[head], v[head]]
        tensors[f"layers.{i}.attention.wqkv.weight"] = torch.cat(rows)
        for here, there in (
            ("self_attn.o_proj", "attention.wo"),
            ("mlp.gate_proj", "feed_forward.w1"),
            ("mlp.down_proj", "feed_forward.w2"),
            ("mlp.up_proj", "feed_forward.w3"),
            ("input_layernorm", "attention_norm"),
            ("post_attention_layernorm", "ffn_norm"),
        ):
            tensors[f"layers.{i}.{there}.weight"] = decoder[f"layers.{i}.{here}.weight"]
    return tensors


def _save(folder: Path, tensors: Mapping[str, torch.Tensor], shards: int) -> None:
    tensors = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return
    index = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = dict(list(tensors.items())[shard::shards])
        save_file(part, folder / file)
        index |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def _edit(path: Path, internlm2: bool, template: str | None) -> None:
    """What original checkpoints say of their tokenizer: no named image tokens, perhaps a class of their own code."""
    settings = json.loads(path.read_text())
    settings = {key: value for key, value in settings.items() if not key.endswith("_image_token")}
    for key in ("extra_special_tokens", "video_token"):
        settings.pop(key, None)
    if internlm2:
        settings["tokenizer_class"] = "InternLM2Tokenizer"
        settings["auto_map"] = {"AutoTokenizer": ["tokenization_internlm2.InternLM2Tokenizer", None]}
    if template is not None:
        settings["chat_template"] = template
    path.write_text(json.dumps(settings))
