"""The original layout of InternVL's checkpoints, `internvl_chat`: its config.json and names in transformers' terms, and
what its code has built in (how images are cut, the prompt)."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from mllm_edge.errors import ConfigError
from mllm_edge.export.checkpoint.config import OWN_CONFIG, ConfigReader
from mllm_edge.export.checkpoint.safetensors import Weights
from mllm_edge.export.checkpoint.source import Source
from mllm_edge.export.checkpoint.vocabulary import vocabulary
from mllm_edge.export.decoders import internlm2
from mllm_edge.export.decoders.fused import cut_groups

__all__ = ["IMAGE_TOKENS", "MODEL_TYPE", "RENAMES", "Chat", "chatml", "cut_vision_qkv", "read_chat", "translated"]

MODEL_TYPE = "internvl_chat"
# Architecture of the original llm_config → transformers' model type; InternLM2 is a Llama under other tensor names.
_LLMS = {
    "InternLM2ForCausalLM": "llama",
    "LlamaForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
IMAGE_TOKENS = ("<img>", "<IMG_CONTEXT>", "</img>")  # before an image, for each of its features, after it
# What the original classes assume where config.json says nothing.
_CHAT_DEFAULTS: Mapping[str, Any] = {
    "downsample_ratio": 0.5,
    "dynamic_image_size": False,
    "force_image_size": None,
    "max_dynamic_patch": 6,
    "min_dynamic_patch": 1,
    "pad2square": False,
    "ps_version": "v1",
    "select_layer": -1,
    "system_message": None,
    "template": None,
    "use_backbone_lora": 0,
    "use_llm_lora": 0,
    "use_thumbnail": False,
}
_VISION_DEFAULTS: Mapping[str, Any] = {
    "hidden_act": "gelu",
    "hidden_size": 3200,
    "image_size": 224,
    "intermediate_size": 12800,
    "layer_norm_eps": 1e-6,
    "norm_type": "rms_norm",
    "num_attention_heads": 25,
    "num_channels": 3,
    "num_hidden_layers": 48,
    "patch_size": 14,
    "qk_normalization": True,
    "qkv_bias": False,
}
_INTERNLM2_DEFAULTS: Mapping[str, Any] = {"bias": True, "vocab_size": 103168}
# The original code has these built in; 3 is bicubic.
_IMAGES: Mapping[str, Any] = {
    "image_mean": (0.485, 0.456, 0.406),
    "image_std": (0.229, 0.224, 0.225),
    "resample": 3,
}
# By `template`: the system message that the model was trained with, and what follows the end of a turn.
_2_0 = "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, 是一个有用无害的人工智能助手。"
_2_5 = "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"
_TEMPLATES = {"Hermes-2": (_2_0, ""), "internlm2-chat": (_2_0, ""), "internvl2_5": (_2_5, "\n")}
_END_OF_TURN = "<|im_end|>"
_CHATML = (
    "{% if system and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n' + system + end }}{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{{ image if part['type'] == 'image' else part['text'] }}{% endfor %}"
    "{% endif %}{{ end }}{% endfor %}{{ '<|im_start|>assistant\n' if add_generation_prompt else '' }}"
)
# Its names → transformers'.
RENAMES = (
    (r"^mlp1\.0\.", "model.multi_modal_projector.layer_norm."),
    (r"^mlp1\.1\.", "model.multi_modal_projector.linear_1."),
    (r"^mlp1\.3\.", "model.multi_modal_projector.linear_2."),
    (r"^vision_model\.", "model.vision_tower."),
    (r"\.class_embedding$", ".cls_token"),
    (r"\.position_embedding$", ".position_embeddings"),
    (r"\.patch_embedding\.", ".patch_embeddings.projection."),
    (r"\.encoder\.layers\.", ".encoder.layer."),
    (r"\.attn\.proj\.", ".attention.projection_layer."),
    (r"\.attn\.", ".attention."),
    (r"\.ls([12])$", r".lambda_\1"),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"^language_model\.model\.", "model.language_model."),
    (r"^language_model\.", ""),
    *internlm2.RENAMES,
)


@dataclass(frozen=True)
class Chat:
    """What the original code makes of a checkpoint.

    `config`: as transformers would write it. `images`: settings of the image processor; `overview`: several tiles are
    followed by the whole image. `template`: the chat template where the files hold none (None: unknown); `stop`: a
    token that ends answers beside those that the files name.
    """

    config: Mapping[str, Any]
    images: Mapping[str, Any]
    overview: bool
    template: str | None
    stop: str | None


def translated(source: Source) -> Source:
    """The source with its configuration as transformers would write it."""
    return replace(source, config=read_chat(source).config) if source.model_type == MODEL_TYPE else source


def cut_vision_qkv(weights: Weights, vision: Any, stack: str, fused: str = "attention.qkv") -> None:
    """Name the parts of the tower's fused projections as if they were stored one by one; `vision`: transformers'
    configuration of it, `stack`: the layers' name there, `fused`: what they call the projection."""
    size = vision.hidden_size
    for i in range(vision.num_hidden_layers):
        layer = f"model.vision_tower.{stack}.{i}."
        for kind, columns in (("weight", size), ("bias", None)) if vision.attention_bias else (("weight", size),):
            parts = {f"{layer}attention.{part}_proj.{kind}": 1 for part in "qkv"}
            cut_groups(weights, f"{layer}{fused}.{kind}", parts, groups=1, dim=size, row=columns)


def read_chat(source: Source) -> Chat:
    """Understand config.json; raises ConfigError or SourceError naming what is wrong."""
    where = str(source.folder / "config.json")
    for part in ("llm_config", "vision_config"):
        if not isinstance(source.config.get(part), Mapping):
            raise ConfigError(f"{where}: no {part}", OWN_CONFIG)
    top = ConfigReader(where, {**_CHAT_DEFAULTS, **source.config}, _CHAT_DEFAULTS)
    version = top.take("ps_version")
    if version != "v2":
        raise ConfigError(f"{where}: ps_version = {version!r}", "only v2 is supported: no reference transposes tiles")
    for key in ("pad2square", "use_backbone_lora", "use_llm_lora"):
        top.require(key, _CHAT_DEFAULTS[key])
    vision = _vision_config(where, source.config["vision_config"])
    tile = top.take("force_image_size") or vision["image_size"]
    if tile != vision["image_size"]:
        raise ConfigError(
            f"{where}: force_image_size = {tile}, but the vision tower takes {vision['image_size']} px",
            "resize the position embeddings first, with the original code's own tool",
        )
    text = _text_config(where, source.config["llm_config"])
    config = {
        "model_type": "internvl",
        "text_config": text,
        "vision_config": vision,
        "downsample_ratio": top.take("downsample_ratio"),
        "vision_feature_layer": top.take("select_layer"),
        "tie_word_embeddings": bool(text.get("tie_word_embeddings", False)),
        "image_token_id": vocabulary(source).get(IMAGE_TOKENS[1], -1),  # its absence is found where all are checked
    }
    least, most = top.take("min_dynamic_patch"), top.take("max_dynamic_patch")
    images = {**_IMAGES, "size": {"height": tile, "width": tile}, "min_patches": least, "max_patches": most}
    if not top.take("dynamic_image_size"):
        images.update(min_patches=1, max_patches=1)
    system, template = top.take("system_message"), None
    if known := _TEMPLATES.get(top.take("template")):
        template = chatml(known[0] if system is None else system, known[1], IMAGE_TOKENS[1])
    overview = bool(top.take("use_thumbnail"))
    top.finish()
    return Chat(config, images, overview, template, template and _END_OF_TURN)


def _vision_config(where: str, stated: Mapping[str, Any]) -> dict[str, Any]:
    reader = ConfigReader(f"{where} vision_config", {**_VISION_DEFAULTS, **stated}, _VISION_DEFAULTS)
    renamed = {"qk_normalization": "use_qk_norm", "qkv_bias": "attention_bias"}
    config = {renamed.get(key, key): reader.take(key) for key in _VISION_DEFAULTS}
    if config["use_qk_norm"] and config["layer_norm_eps"] != _VISION_DEFAULTS["layer_norm_eps"]:
        raise ConfigError(
            f"{where} vision_config: layer_norm_eps = {config['layer_norm_eps']} with qk_normalization",
            f"the reference normalizes q and k with {_VISION_DEFAULTS['layer_norm_eps']} only",
        )
    return config


def _text_config(where: str, stated: Mapping[str, Any]) -> dict[str, Any]:
    """The decoder's configuration as transformers' class for it would write it."""
    from transformers import AutoConfig

    architecture = str((stated.get("architectures") or [None])[0])
    if architecture not in _LLMS:
        raise ConfigError(f"{where} llm_config: architectures = [{architecture!r}]", f"supported: {', '.join(_LLMS)}")
    kind = _LLMS[architecture]
    if architecture.startswith("InternLM2"):
        stated = {**_INTERNLM2_DEFAULTS, **stated}
        ConfigReader(f"{where} llm_config", stated, _INTERNLM2_DEFAULTS).require("bias", False)
    known = {*AutoConfig.for_model(kind).to_dict(), "rope_scaling", "rope_theta"} - {"architectures", "model_type"}
    return {"model_type": kind, **{key: value for key, value in stated.items() if key in known}}


def chatml(system: str, separator: str, image: str) -> str:
    """The chat template that begins with a system message of its own (if not '') unless it is given one."""
    values = {"system": system, "end": _END_OF_TURN + separator, "image": f"{image}\n"}
    return "".join(f"{{% set {name} = {value!r} %}}" for name, value in values.items()) + _CHATML
