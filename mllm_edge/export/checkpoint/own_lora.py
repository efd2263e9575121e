"""LoRA factors that lie among a checkpoint's own weights, as InternVL's training code saves them.

With `use_llm_lora` or `use_backbone_lora` in config.json, that code wraps the language model or the vision tower in
PEFT and saves all of it: `language_model.base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight` beside
`…q_proj.lora_A.default.weight` and `…q_proj.lora_B.default.weight`. Its lora_alpha is always twice the rank, so a
merged weight is W + 2·B·A.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mllm_edge.errors import ConfigError, WeightsError
from mllm_edge.export.checkpoint.adapters import add_product
from mllm_edge.export.checkpoint.safetensors import Weights

__all__ = ["RANKS", "merged", "with_merged_settings"]

_SCALING = 2.0
RANKS = {"language_model": "use_llm_lora", "vision_model": "use_backbone_lora"}  # part → config.json's key
_WRAPPED = ".base_model.model."


def merged(weights: Weights, config: Mapping[str, Any], folder: Path) -> Weights:
    """The weights under the names that they have without LoRA, the factors merged into them.

    Raises WeightsError for factors without a partner or a weight, and for those of code whose scaling is unknown.
    """
    factors = [name for name in weights if _is_factor(name)]
    if not factors:
        return weights
    if config.get("model_type") != "internvl_chat":
        raise WeightsError(
            f"{folder}: there are LoRA factors among the weights ({factors[0]}), and nothing says how to scale them",
            "load the model as it was trained, merge (PEFT's merge_and_unload), save it and export that",
        )
    plain = weights.renamed({name: _plain(name) for name in weights if name not in set(factors)})
    pairs: dict[str, dict[str, str]] = {}
    for name in factors:
        module, side = _module(name)
        pairs.setdefault(module, {})[side] = name
    for module, sides in pairs.items():
        if set(sides) != {"lora_A", "lora_B"} or f"{module}.weight" not in plain:
            raise WeightsError(
                f"{folder}: {', '.join(sorted(sides.values()))}: no partner, or no weight to go with",
                "download the checkpoint again",
            )
        down, up = (weights.read(sides[side]) for side in ("lora_A", "lora_B"))
        shape = plain.shape(f"{module}.weight")
        if (up.shape[0], down.shape[1]) != shape or up.shape[1] != down.shape[0]:
            raise WeightsError(
                f"{folder}: the LoRA of {module} is {list(up.shape)} · {list(down.shape)}, its weight {list(shape)}",
                "download the checkpoint again",
            )
        plain.alter(f"{module}.weight", add_product(up, down, _SCALING))
    return plain


def with_merged_settings(config: Mapping[str, Any], weights: Weights, folder: Path) -> dict[str, Any]:
    """config.json as it is for the merged weights: of the parts whose factors are there, it says nothing of LoRA.
    Raises ConfigError where it states another rank."""
    settings = dict(config)
    for name in filter(_is_factor, weights):
        module, side = _module(name)
        key = RANKS.get(name.split(".")[0], "")
        rank = weights.shape(name)[0 if side == "lora_A" else -1]
        if config.get(key) and config[key] != rank:
            raise ConfigError(
                f"{folder / 'config.json'}: {key} = {config[key]}, but the LoRA of {module} has rank {rank}",
                "use the config.json that belongs to these weights",
            )
        settings[key] = 0
    return settings


def _is_factor(name: str) -> bool:
    return ".lora_A." in name or ".lora_B." in name


def _module(name: str) -> tuple[str, str]:
    """The module that a factor belongs to, and `lora_A` or `lora_B`."""
    side = "lora_A" if ".lora_A." in name else "lora_B"
    return _plain(name.partition(f".{side}.")[0]), side


def _plain(name: str) -> str:
    return name.replace(_WRAPPED, ".", 1).replace(".base_layer.", ".")
