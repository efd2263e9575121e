"""The names of a model's parameters, whatever a checkpoint or an adapter calls them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mllm_edge.export.checkpoint.safetensors import Weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Skeleton", "own_skeleton", "skeleton"]


@dataclass(frozen=True)
class Skeleton:
    """Names of a model as transformers has it today: what a checkpoint's names become, which parameters are one
    (`tied`: name → the other's name), and the modules that store their matrix [in, out] (`transposed`)."""

    rename: Callable[[str], str]
    tied: Mapping[str, str]
    transposed: frozenset[str]


def skeleton(model: "PreTrainedModel") -> Skeleton:
    """The names of a transformers model, which may be on the meta device."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key
    from transformers.pytorch_utils import Conv1D

    renamings = [t for t in get_model_conversion_mapping(model) if isinstance(t, WeightRenaming)]
    known, prefix = model.state_dict(), str(model.base_model_prefix)
    return Skeleton(
        rename=lambda name: rename_source_key(name, renamings, [], prefix, known)[0],
        tied=_tied(model),
        transposed=frozenset(n for n, module in model.named_modules() if isinstance(module, Conv1D)),
    )


def own_skeleton(weights: Weights, config: Mapping[str, Any]) -> Skeleton:
    """The names of a checkpoint that transformers does not know: its own, and those that its language model has where
    that was wrapped alone. Embeddings are the head where the configuration says so and no head is stored."""
    parts = (config, *(config.get(key) for key in ("llm_config", "text_config", "language_config")))
    shared = any(isinstance(part, Mapping) and part.get("tie_word_embeddings") for part in parts)
    tied: dict[str, str] = {}
    for embeddings, head in (("model.embed_tokens", "lm_head"), ("model.tok_embeddings", "output")):
        one, other = (f"language_model.{name}.weight" for name in (embeddings, head))
        if shared and one in weights and other not in weights:
            tied |= {one: other, other: one}

    def rename(name: str) -> str:
        inner = f"language_model.{name}"
        return inner if name not in weights and (inner in weights or inner in tied) else name

    return Skeleton(rename, tied, frozenset())


def _tied(model: "PreTrainedModel") -> dict[str, str]:
    first: dict[int, str] = {}
    tied: dict[str, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        other = first.setdefault(id(parameter), name)
        if other != name:
            tied |= {name: other, other: name}
    return tied
