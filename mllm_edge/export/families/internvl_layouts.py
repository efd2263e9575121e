"""The two layouts that InternVL checkpoints come in, read as one.

`internvl` is transformers' own. `internvl_chat` is the original code's: its config.json and tensor names are translated
to transformers', and what its code has built in (how images are cut, the prompt) is spelled out.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from mllm_edge.errors import ConfigError, WeightsError
from mllm_edge.export.checkpoint.config import ConfigReader, load_config
from mllm_edge.export.checkpoint.safetensors import Weights
from mllm_edge.export.checkpoint.source import Source
from mllm_edge.export.checkpoint.vocabulary import vocabulary
from mllm_edge.export.decoders.fused import cut_groups

__all__ = ["Checkpoint", "Names", "cut_vision_qkv", "read_checkpoint"]

_DECODERS = ("llama", "qwen2", "qwen3")
# Architecture of the original llm_config → transformers' model type; InternLM2 is a Llama under other tensor names.
_LLMS = {
    "InternLM2ForCausalLM": "llama",
    "LlamaForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
_START, _CONTEXT, _END = "<img>", "<IMG_CONTEXT>", "</img>"
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


@dataclass(frozen=True)
class Names:
    """transformers' parameter names → the checkpoint's, by regular expressions that are applied in order."""

    renames: tuple[tuple[str, str], ...] = ()

    def stored(self, name: str) -> str:
        """What the checkpoint calls the parameter `name`, or the parameters that begin with it."""
        for pattern, new in self.renames:
            name = re.sub(pattern, new, name)
        return name


_TEXT = ((r"^model\.language_model", "language_model.model"), (r"^lm_head", "language_model.lm_head"))
# The hub's checkpoints and what transformers saves look like the first, a state dictionary like the second.
_TRANSFORMERS = (Names((*_TEXT, (r"^model\.", ""))), Names())
_ORIGINAL = (
    *_TEXT,
    (r"^model\.multi_modal_projector\.layer_norm", "mlp1.0"),
    (r"^model\.multi_modal_projector\.linear_1", "mlp1.1"),
    (r"^model\.multi_modal_projector\.linear_2", "mlp1.3"),
    (r"^model\.vision_tower\.", "vision_model."),
    (r"\.cls_token$", ".class_embedding"),
    (r"\.position_embeddings$", ".position_embedding"),
    (r"\.patch_embeddings\.projection\.", ".patch_embedding."),
    (r"\.encoder\.layer\.", ".encoder.layers."),
    (r"\.attention\.projection_layer\.", ".attn.proj."),
    (r"\.attention\.", ".attn."),
    (r"\.lambda_", ".ls"),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
)
# wq, wk and wv are parts of the stored wqkv.
_INTERNLM2 = (
    (r"\.embed_tokens\.", ".tok_embeddings."),
    (r"^language_model\.lm_head", "language_model.output"),
    (r"\.input_layernorm\.", ".attention_norm."),
    (r"\.post_attention_layernorm\.", ".ffn_norm."),
    (r"\.self_attn\.([qkvo])_proj\.", r".attention.w\1."),
    (r"\.mlp\.gate_proj\.", ".feed_forward.w1."),
    (r"\.mlp\.down_proj\.", ".feed_forward.w2."),
    (r"\.mlp\.up_proj\.", ".feed_forward.w3."),
)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint of either layout.

    `source`: with the configuration as transformers would write it; `config`: that as an InternVLConfig. `images`: the
    image processor's settings that the original code has built in; `overview`: several tiles are followed by the whole
    image. `image_tokens`: the words before an image, for each of its features, and after it. `template`: the chat
    template where the files hold none (None: unknown); `stop`: a token that ends answers beside those that the files
    name.
    """

    source: Source
    config: Any
    names: Names
    images: Mapping[str, Any]
    overview: bool
    image_tokens: tuple[str, str, str]
    template: str | None
    stop: str | None = None
    original: bool = False
    internlm2: bool = False


def read_checkpoint(source: Source, weights: Weights) -> Checkpoint:
    """Understand what is beside the weights; raises ConfigError, SourceError or WeightsError naming what is wrong."""
    return _original(source) if source.model_type == "internvl_chat" else _transformers(source, weights)


def cut_vision_qkv(checkpoint: Checkpoint, weights: Weights) -> None:
    """Name the parts of the original tower's fused projections as if they were stored one by one."""
    vision = checkpoint.config.vision_config
    size = vision.hidden_size
    for i in range(vision.num_hidden_layers):
        layer = checkpoint.names.stored(f"model.vision_tower.encoder.layer.{i}.attention.")
        for kind, columns in (("weight", size), ("bias", None)) if vision.attention_bias else (("weight", size),):
            parts = {f"{layer}{part}_proj.{kind}": 1 for part in "qkv"}
            cut_groups(weights, f"{layer}qkv.{kind}", parts, groups=1, dim=size, row=columns)


# ---------------------------------------------------------------- transformers' layout
def _transformers(source: Source, weights: Weights) -> Checkpoint:
    config = load_config(source)
    kind = config.text_config.model_type
    if kind not in _DECODERS:
        raise ConfigError(
            f"{source.folder / 'config.json'}: text_config.model_type = {kind!r}", f"supported: {', '.join(_DECODERS)}"
        )
    tokenizer = source.json("tokenizer_config.json")
    extra = tokenizer.get("extra_special_tokens")
    named = {**tokenizer, **(extra if isinstance(extra, Mapping) else {})}
    start, context, end = (
        str(named.get(f"{place}_image_token", default))
        for place, default in (("start", _START), ("context", _CONTEXT), ("end", _END))
    )
    names = next((n for n in _TRANSFORMERS if n.stored("model.language_model.embed_tokens.weight") in weights), None)
    if names is None:
        raise WeightsError(
            f"{source.folder}: the checkpoint has no tensor language_model.model.embed_tokens.weight",
            "the weights are not those of InternVLForConditionalGeneration, or a shard is missing",
        )
    template = _chatml("", "\n", context)
    return Checkpoint(source, config, names, {}, True, (start, context, end), template)


# ---------------------------------------------------------------- the original layout
def _original(source: Source) -> Checkpoint:
    where = str(source.folder / "config.json")
    for part in ("llm_config", "vision_config"):
        if not isinstance(source.config.get(part), Mapping):
            raise ConfigError(f"{where}: no {part}", "use the config.json that belongs to these weights")
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
    architecture, text = _text_config(where, source.config["llm_config"])
    config = {
        "model_type": "internvl",
        "text_config": text,
        "vision_config": vision,
        "downsample_ratio": top.take("downsample_ratio"),
        "vision_feature_layer": top.take("select_layer"),
        "tie_word_embeddings": bool(text.get("tie_word_embeddings", False)),
        "image_token_id": vocabulary(source).get(_CONTEXT, -1),  # its absence is found where all tokens are checked
    }
    least, most = top.take("min_dynamic_patch"), top.take("max_dynamic_patch")
    images = {**_IMAGES, "size": {"height": tile, "width": tile}, "min_patches": least, "max_patches": most}
    if not top.take("dynamic_image_size"):
        images.update(min_patches=1, max_patches=1)
    system, template = top.take("system_message"), None
    if known := _TEMPLATES.get(top.take("template")):
        template = _chatml(known[0] if system is None else system, known[1], _CONTEXT)
    overview = bool(top.take("use_thumbnail"))
    top.finish()
    translated = replace(source, config=config)
    internlm2 = architecture.startswith("InternLM2")
    return Checkpoint(
        source=translated,
        config=load_config(translated),
        names=Names((*_ORIGINAL, *_INTERNLM2) if internlm2 else _ORIGINAL),
        images=images,
        overview=overview,
        image_tokens=(_START, _CONTEXT, _END),
        template=template,
        stop=template and _END_OF_TURN,
        original=True,
        internlm2=internlm2,
    )


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


def _text_config(where: str, stated: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The decoder's architecture, and its configuration as transformers' class for it would write it."""
    from transformers import AutoConfig

    architecture = str((stated.get("architectures") or [None])[0])
    if architecture not in _LLMS:
        raise ConfigError(f"{where} llm_config: architectures = [{architecture!r}]", f"supported: {', '.join(_LLMS)}")
    kind = _LLMS[architecture]
    if architecture.startswith("InternLM2"):
        stated = {**_INTERNLM2_DEFAULTS, **stated}
        ConfigReader(f"{where} llm_config", stated, _INTERNLM2_DEFAULTS).require("bias", False)
    known = {*AutoConfig.for_model(kind).to_dict(), "rope_scaling", "rope_theta"} - {"architectures", "model_type"}
    return architecture, {"model_type": kind, **{key: value for key, value in stated.items() if key in known}}


def _chatml(system: str, separator: str, image: str) -> str:
    """The chat template that begins with a system message of its own (if not '') unless it is given one."""
    values = {"system": system, "end": _END_OF_TURN + separator, "image": f"{image}\n"}
    return "".join(f"{{% set {name} = {value!r} %}}" for name, value in values.items()) + _CHATML
