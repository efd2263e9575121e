"""What the tensors of an adapter's file are, whoever wrote it.

PEFT's own names are `base_model.model.<module>.lora_A.weight`. A file that a training loop wrote from the model's state
has the adapter's name in them (`lora_A.default.weight`), lacks the prefix, or has the marks of what the model was
wrapped in (`module.`, `_orig_mod.`); it may hold copies of what was not trained, too.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mllm_edge.errors import WeightsError

__all__ = ["TOKENS", "Part", "parts_of"]

TOKENS = "trainable_tokens_delta"
_PREFIX = ["base_model", "model"]
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_LORA = {"lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector"}
# Copies of the base model's own, in the state of a wrapped model.
_COPIES = re.compile(r"\.(original_module|trainable_tokens_original)(\.|$)")


@dataclass(frozen=True)
class Part:
    """A tensor `key` of the file. `module`: of the model, as the adapter names it; `kind`: `lora_A.weight` and the
    like, `TOKENS`, or the name of a whole parameter (`weight`, `bias`) that was trained as it is."""

    key: str
    module: str
    kind: str

    @property
    def is_lora(self) -> bool:
        return self.kind.split(".")[0] in _LORA


def parts_of(keys: Iterable[str], where: Path) -> tuple[Part, ...]:
    """What the tensors `keys` of the file `where` are, copies of untrained ones left out.

    Raises WeightsError for names of two kinds, for more than one adapter, and for two names of the same.
    """
    names = {key: _words(key) for key in keys if not _COPIES.search(key)}
    prefixed = [key for key, words in names.items() if words[:2] == _PREFIX]
    if prefixed and len(prefixed) < len(names):
        key = next(key for key in names if key not in prefixed)
        raise WeightsError(f"{where}: tensor {key} is not named like the others ({prefixed[0]})", "save it with PEFT")
    if prefixed:
        names = {key: _without_wrapper(words[2:]) for key, words in names.items()}
    adapters = {name for words in names.values() if (name := _adapter(words))}
    if len(adapters) > 1:
        raise WeightsError(
            f"{where}: tensors of {len(adapters)} adapters: {', '.join(sorted(adapters))}",
            "save the one that you want alone: save_pretrained(DIR, selected_adapters=[NAME])",
        )
    found: dict[tuple[str, str], Part] = {}
    for key, words in names.items():
        part = _part(key, words, adapters or {"default"})
        other = found.setdefault((part.module, part.kind), part)
        if other is not part:
            raise WeightsError(f"{where}: tensors {other.key} and {key} are the same parameter", "save it with PEFT")
    return tuple(found.values())


def _words(key: str) -> list[str]:
    return _without_wrapper([word for word in key.split(".") if word not in _WRAPPERS])


def _without_wrapper(words: list[str]) -> list[str]:
    """Without the `module.` of a distributed model in front."""
    while words[:1] == ["module"] and len(words) > 2:
        words = words[1:]
    return words


def _tail(words: Sequence[str]) -> tuple[int, list[str], str]:
    """Where the LoRA's part stands in the name (−1: nowhere), what follows, and `.weight`, `.bias` or ''."""
    at = next((i for i, word in enumerate(words) if word in _LORA), -1)
    rest = list(words[at + 1 :]) if at >= 0 else []
    leaf = f".{rest.pop()}" if rest and rest[-1] in ("weight", "bias") else ""
    return at, rest, leaf


def _adapter(words: Sequence[str]) -> str:
    """The adapter's name where a tensor's holds it, else ''."""
    if TOKENS in words:
        return ".".join(words[words.index(TOKENS) + 1 :])
    return ".".join(_tail(words)[1])


def _part(key: str, words: list[str], adapters: set[str]) -> Part:
    at, _, leaf = _tail(words)
    if at >= 0:
        return Part(key, ".".join(words[:at]), words[at] + leaf)
    if TOKENS in words:
        return Part(key, ".".join(w for w in words[: words.index(TOKENS)] if w != "token_adapter"), TOKENS)
    if "modules_to_save" in words:
        at = words.index("modules_to_save")
        behind = words[at + 1 :]
        name = next((n for n in adapters if behind[: n.count(".") + 1] == n.split(".")), None)
        words = words[:at] + (behind if name is None else behind[name.count(".") + 1 :])
    words = [word for word in words if word not in ("base_layer", "token_adapter")]
    return Part(key, ".".join(words[:-1]), words[-1])
