"""PEFT's own merge of an adapter into a transformers model: what the export's merge is compared with.

PEFT knows today's module names only, and what it does not know it leaves out with a warning. So the tensors are given
to it under the names of the model at hand, and what it says it did with them is looked at.
"""

import warnings
from collections.abc import Collection, Mapping
from typing import Any

from mllm_edge.export.checkpoint.adapter_files import Adapter
from mllm_edge.export.checkpoint.adapter_names import TOKENS, Part
from mllm_edge.export.checkpoint.adapters import Skeleton, targeted

__all__ = ["merged_by_peft"]

_PREFIX = "base_model.model."


def merged_by_peft(model: Any, adapter: Adapter, names: Skeleton) -> tuple[Any, str]:
    """(`model` with what PEFT merged into it, what it left out or '' when that is nothing). Tensors of layers that this
    model lacks, because it is a shorter one, do not count."""
    import torch
    from peft import PeftConfig, get_peft_model, set_peft_model_state_dict

    parts = _named(adapter.parts(), names, {n for n, _ in model.named_parameters(remove_duplicate=False)})
    if not parts:
        return model, ""
    weights = adapter.weights()
    tensors = {_PREFIX + name: torch.from_numpy(weights.read(part.key)) for name, part in parts.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = None
        try:
            config = PeftConfig.from_pretrained(str(adapter.folder))
            _adjust(config, adapter.config, parts)
            wrapped = get_peft_model(model, config)
            result: Any = set_peft_model_state_dict(wrapped, tensors)
        except (KeyError, ValueError, RuntimeError, TypeError, AttributeError) as e:
            # Names or shapes that PEFT cannot place.
            return _unwrapped(model), " ".join(str(e).split())[:200] or type(e).__name__
        left = [key for key in result.unexpected_keys if key.startswith(_PREFIX)]
        return wrapped.merge_and_unload(), f"{left[0]} and {len(left) - 1} more" if left else ""


def _named(parts: Collection[Part], names: Skeleton, parameters: Collection[str]) -> dict[str, Part]:
    """Today's name of each tensor that has a place among `parameters` → the tensor."""
    found = {}
    adapted = {part.module for part in parts if part.is_lora}
    for part in parts:
        leaf = "weight" if part.is_lora or part.kind == TOKENS else part.kind
        live = names.rename(f"{part.module}.{leaf}")
        if live not in parameters:
            continue
        module = live.removesuffix(f".{leaf}")
        if part.kind == TOKENS:
            found[f"{module}.token_adapter.{TOKENS}"] = part
        elif part.is_lora:
            found[f"{module}.{part.kind}"] = part
        else:
            found[f"{module}.base_layer.{leaf}" if part.module in adapted else live] = part
    return found


def _adjust(config: Any, stated: Mapping[str, Any], parts: Mapping[str, Part]) -> None:
    """Start from plain zeros, since all tensors are given; and name the modules as the model does, where the adapter's
    configuration speaks of other names."""
    config.init_lora_weights, config.inference_mode, config.task_type = True, True, None
    live = {name.rpartition(f".{part.kind}")[0] for name, part in parts.items() if part.is_lora}
    if live and not all(targeted(stated, module) for module in live):
        config.target_modules = live
        config.exclude_modules = config.layers_to_transform = config.layers_pattern = None


def _unwrapped(model: Any) -> Any:
    """The model without whatever PEFT put into it before it gave up."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    for name, module in list(model.named_modules()):
        parent, _, child = name.rpartition(".")
        if isinstance(module, AuxiliaryTrainingWrapper):
            setattr(model.get_submodule(parent), child, module.original_module)
        elif isinstance(module, BaseTunerLayer):
            setattr(model.get_submodule(parent), child, module.get_base_layer())
    return model
