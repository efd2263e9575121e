"""LoRA adapters in PEFT's layout: merged into the weights of a checkpoint while these are read.

An adapter is a directory with `adapter_config.json` and `adapter_model.safetensors`, whose tensors are named
`base_model.model.<module>.lora_A.weight` and the like. A merged weight is W + scaling · B·A, in float32, whatever the
stored dtypes. Several adapters follow one another, each on top of the ones before.

Which module a name means is decided by transformers' own renaming of checkpoints, so an adapter fits whether it was
trained with today's module names or with those that the checkpoint on the hub still has. A checkpoint that transformers
does not know is merged by its own names.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mllm_edge.errors import ConfigError, WeightsError
from mllm_edge.export.checkpoint.adapter_files import CONFIG, WEIGHTS, Adapter, open_adapter
from mllm_edge.export.checkpoint.adapter_names import TOKENS, Part
from mllm_edge.export.checkpoint.safetensors import Change, Weights
from mllm_edge.export.checkpoint.skeleton import Skeleton, own_skeleton, skeleton

__all__ = ["Adapter", "Skeleton", "add_product", "merge", "open_adapter", "own_skeleton", "skeleton", "targeted"]

_BLOCK = 1024  # rows that are changed at a time: their delta is all the memory that a merge takes
_NUMBER = re.compile(r".*?\.[^.]*\.(\d+)\.")


def merge(weights: Weights, adapters: Sequence[Adapter], model: Skeleton, name: str) -> None:
    """Let `weights` give merged values from now on. `name` is the checkpoint's, for messages.

    Raises WeightsError for a tensor that has no place in the model or no partner in the adapter, ConfigError for a
    contradiction between an adapter's tensors and its configuration.
    """
    stored = {model.rename(tensor): tensor for tensor in weights}
    declared, model = model.tied, replace(model, tied=_really_tied(model.tied, weights, stored))
    for adapter in adapters:
        _Merger(adapter, weights, model, stored, name, declared).merge()


def _really_tied(tied: Mapping[str, str], weights: Weights, stored: Mapping[str, str]) -> dict[str, str]:
    """Without pairs that are stored as two different tensors: transformers leaves those two."""
    return {
        name: other
        for name, other in tied.items()
        if name not in stored or other not in stored or _equal(weights, stored[name], weights, stored[other])
    }


# ---------------------------------------------------------------- which modules
def _matches(patterns: Iterable[str], module: str) -> str | None:
    """The first pattern, a regular expression for the end of a name, that `module` has."""
    return next((p for p in patterns if re.match(rf"(.*\.)?({p})$", module)), None)


def _named(wanted: Any, module: str) -> bool:
    """Whether a list of name endings, or a regular expression for the whole name, has `module`."""
    if isinstance(wanted, str):
        return re.fullmatch(wanted, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in wanted)


def targeted(config: Mapping[str, Any], module: str) -> bool:
    """Whether the configuration gives `module` a LoRA, as PEFT reads it."""
    targets, excluded, layers = (config.get(k) for k in ("target_modules", "exclude_modules", "layers_to_transform"))
    if targets == "all-linear":
        return True
    if not targets or not _named(targets, module) or (excluded and _named(excluded, module)):
        return False
    if isinstance(targets, str) or module in targets or layers in (None, []):
        return True
    patterns = config.get("layers_pattern") or []
    patterns = [patterns] if isinstance(patterns, str) else patterns
    found = [re.match(rf"(?:^|.*?\.){p}\.(\d+)\.", module) for p in patterns] if patterns else [_NUMBER.match(module)]
    layer = next((int(match[1]) for match in found if match), None)
    return layer in ([layers] if isinstance(layers, int) else layers)


# ---------------------------------------------------------------- tensors
@dataclass(frozen=True)
class _Pair:
    """The two factors of a module's delta, as stored: `down` A and `up` B."""

    down: np.ndarray
    up: np.ndarray
    embedding: bool

    @property
    def rank(self) -> int:
        return int(self.down.shape[0])

    def factors(self, shape: tuple[int, ...], transposed: bool) -> tuple[np.ndarray, np.ndarray] | None:
        """Left [rows, r] and right [r, rest] factor of the delta of a weight of `shape`, None when they do not fit."""
        down, up = self.down, self.up
        if any(size != 1 for size in up.shape[2:]):
            return None
        if self.embedding or transposed:
            left, right = down.T, up.T
        else:
            left, right = up.reshape(up.shape[0], -1), down
        fits = left.shape[1] == right.shape[0] == self.rank and (left.shape[0], *right.shape[1:]) == shape
        return (left, right.reshape(self.rank, -1)) if fits else None


class _Merger:
    """One adapter on its way into the weights."""

    def __init__(
        self,
        adapter: Adapter,
        weights: Weights,
        model: Skeleton,
        stored: Mapping[str, str],
        checkpoint: str,
        declared: Mapping[str, str],
    ):
        self._declared = declared  # tied by the configuration, whether they are or not
        self._adapter, self._config = adapter, adapter.config
        self._weights, self._model, self._stored, self._checkpoint = weights, model, stored, checkpoint
        self._where = adapter.folder / WEIGHTS
        self._tensors = adapter.weights()

    def merge(self) -> None:
        modules: dict[str, dict[str, str]] = {}  # module → part → the tensor
        whole: dict[str, Part] = {}
        parts = self._adapter.parts()
        for part in parts:
            if part.is_lora:
                modules.setdefault(part.module, {})[part.kind] = part.key
            elif part.kind != TOKENS:
                whole[self._model.rename(f"{part.module}.{part.kind}")] = part
        for live, part in whole.items():
            self._replace(live, part, whole)
        self._check_saved(part.module for part in parts if not part.is_lora)
        for module, keys in modules.items():
            self._merge_module(module, keys)
        self._replace_tokens([part for part in parts if part.kind == TOKENS])
        used = {part.key for part in parts}
        unused = [key for key in self._tensors.unused() if key in used]
        if unused:
            raise WeightsError(
                f"{self._where}: tensor {unused[0]} cannot be merged", "only what PEFT's LoRA stores can be merged"
            )

    # ------------------------------------------------------------ whole tensors
    def _replace(self, live: str, part: Part, whole: Mapping[str, Part]) -> None:
        """A trained copy of a tensor: of `modules_to_save`, a bias, or an embedding stored along with its LoRA."""
        key, name = part.key, f"{part.module}.{part.kind}"
        other = self._model.tied.get(live)
        targets = self._both(live, name, other)
        shape = self._weights.shape(targets[0])
        if self._tensors.shape(key) != shape:
            raise self._wrong_shape(key, shape)
        self._tensors.use(key, shape)
        if other is not None and _equal(self._tensors, key, self._weights, targets[0]):
            return  # stored beside a LoRA, not trained
        if other is not None and not self._trained_as_one(key, whole.get(other)):
            raise self._shared(live, other, f"a {part.kind} of one of the two was trained (modules_to_save)")

        def change(values: np.ndarray, start: int) -> None:
            values[...] = self._tensors.rows(key, start, start + len(values))

        for target in targets:
            self._weights.alter(target, change)

    def _wrong_shape(self, key: str, shape: tuple[int, ...]) -> WeightsError:
        found = self._tensors.shape(key)
        if found[1:] != shape[1:]:
            return WeightsError(
                f"{self._where}: tensor {key} has shape {list(found)}, the model's {list(shape)}: {self._pedigree()}",
                "give the adapter of this model, or the model of this adapter",
            )
        return WeightsError(
            f"{self._where}: tensor {key} has shape {list(found)}, the model's {list(shape)}: "
            "the vocabulary was resized before the training",
            f"make the whole model once: model.resize_token_embeddings({found[0]}), PEFT's merge_and_unload, "
            "save_pretrained with the adapter's tokenizer; export that",
        )

    def _trained_as_one(self, key: str, other: Part | None) -> bool:
        """Whether the shared matrix is stored under its other name, too, with the same values (ensure_weight_tying)."""
        return other is not None and _equal(self._tensors, key, self._tensors, other.key)

    def _check_saved(self, modules: Iterable[str]) -> None:
        saved = set(modules)
        for wanted in self._config.get("modules_to_save") or ():
            if not any(re.match(rf"(^|.*\.){wanted}($|\..*)", module) for module in saved):
                raise WeightsError(
                    f"{self._where}: {CONFIG} says modules_to_save = {wanted}, but no tensor of it is here",
                    "the adapter is incomplete: save it again with PEFT",
                )

    # ------------------------------------------------------------ rows of embeddings
    def _replace_tokens(self, parts: Sequence[Part]) -> None:
        """Embeddings of single tokens (trainable_token_indices), which stand for the rows themselves."""
        wanted = self._config.get("trainable_token_indices")
        if wanted and not parts:
            raise WeightsError(
                f"{self._where}: {CONFIG} says trainable_token_indices = {wanted}, but no tensor of it is here",
                "the adapter is incomplete: save it again with PEFT",
            )
        changed: set[str] = set()
        for part in parts:
            live = self._model.rename(f"{part.module}.weight")
            other = self._declared.get(
                live
            )  # PEFT gives the head the same rows wherever config.json says that it is tied
            if other in changed:
                raise self._shared(live, str(other), "tokens of both were trained apart (trainable_token_indices)")
            changed.add(live)
            for target in self._both(live, f"{part.module}.weight", other):
                self._weights.alter(target, self._token_rows(part, live, wanted, self._weights.shape(target)))

    def _token_rows(self, part: Part, live: str, wanted: Any, shape: tuple[int, ...]) -> Change:
        if isinstance(wanted, Mapping):
            modules = (part.module, live.removesuffix(".weight"))
            wanted = next((ids for name, ids in wanted.items() if any(_named([name], m) for m in modules)), None)
        values = self._tensors.read(part.key)
        ids = np.asarray(wanted if isinstance(wanted, list) else [], dtype=object)
        whole = all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i < shape[0] for i in ids)
        if values.shape != (len(ids), *shape[1:]) or not whole or len(set(ids)) < len(ids):
            raise WeightsError(
                f"{self._where}: tensor {part.key} has shape {list(values.shape)}, which does not fit {CONFIG}'s "
                f"trainable_token_indices = {wanted} and embeddings {list(shape)}",
                "use the two files that belong together; a resized vocabulary has to be merged with PEFT first",
            )
        rows = {int(i): values[n] for n, i in enumerate(ids)}

        def change(part: np.ndarray, start: int) -> None:
            for row, value in rows.items():
                if start <= row < start + len(part):
                    part[row - start] = value

        return change

    # ------------------------------------------------------------ LoRA
    def _merge_module(self, module: str, keys: Mapping[str, str]) -> None:
        live = self._model.rename(f"{module}.weight").removesuffix(".weight")
        pair = self._pair(module, keys)
        target = self._target(f"{module}.weight")
        if not (targeted(self._config, module) or targeted(self._config, live)):
            raise ConfigError(
                f"{self._where}: there is a LoRA for {module}, but {CONFIG} does not target it",
                "use the two files that belong together",
            )
        scaling = self._scaling(module, live, pair)
        shape = self._weights.shape(target)
        transposed = live in self._model.transposed
        factors = pair.factors(shape, transposed)
        if factors is None:
            raise WeightsError(
                f"{self._where}: the LoRA of {module} is {list(pair.up.shape)} · {list(pair.down.shape)}, which "
                f"does not fit the model's weight {list(shape)}",
                f"{self._pedigree()}; a grouped convolution cannot be merged here",
            )
        magnitude = self._magnitude(module, keys, plain=not pair.embedding and not transposed and len(shape) == 2)
        self._weights.alter(target, _delta(*factors, scaling, magnitude))
        if "lora_B.bias" in keys:
            self._add_bias(module, keys["lora_B.bias"], scaling)

    def _pair(self, module: str, keys: Mapping[str, str]) -> _Pair:
        for down, up in (("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B")):
            if {down, up} <= set(keys):
                read = [self._tensors.read(keys[part]) for part in (down, up)]
                if any(factor.ndim < 2 or not factor.size for factor in read):
                    raise WeightsError(
                        f"{self._where}: the LoRA of {module} is empty or flat ({list(read[1].shape)} · "
                        f"{list(read[0].shape)}): shards of DeepSpeed or FSDP were not gathered when it was saved",
                        "save it again from all shards (deepspeed.zero.GatheredParameters, summon_full_params)",
                    )
                return _Pair(read[0], read[1], down == "lora_embedding_A")
        raise WeightsError(
            f"{self._where}: {module} has {', '.join(sorted(keys))} (tensor {min(keys.values())}), but not its partner",
            "the adapter is incomplete: fetch it again",
        )

    def _scaling(self, module: str, live: str, pair: _Pair) -> float:
        rank, alpha = (
            self._pattern(p, module, live, d) for p, d in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha"))
        )
        if rank != pair.rank:
            raise ConfigError(
                f"{self._where}: the LoRA of {module} has rank {pair.rank}, {CONFIG} says {rank}",
                "use the two files that belong together",
            )
        return alpha / (math.sqrt(rank) if self._config.get("use_rslora") else rank)

    def _pattern(self, table: str, module: str, live: str, default: str) -> Any:
        values = self._config.get(table) or {}
        key = _matches(values, live) or _matches(values, module)
        return self._config[default] if key is None else values[key]

    def _magnitude(self, module: str, keys: Mapping[str, str], plain: bool) -> np.ndarray | None:
        kind = next((p for p in keys if p.startswith("lora_magnitude_vector")), None)
        dora = bool(self._config.get("use_dora"))
        if dora != (kind is not None):
            raise WeightsError(
                f"{self._where}: {CONFIG} says use_dora = {dora}, but {module} "
                + ("has no lora_magnitude_vector" if dora else "has a lora_magnitude_vector"),
                "use the two files that belong together",
            )
        if kind is None:
            return None
        if not plain:
            raise ConfigError(
                f"{self._where}: use_dora on {module}: only DoRA of linear layers can be merged",
                "merge with PEFT (merge_and_unload), save the whole model and export that",
            )
        return self._tensors.read(keys[kind])

    def _add_bias(self, module: str, key: str, scaling: float) -> None:
        added = scaling * self._tensors.read(key)

        def change(values: np.ndarray, start: int) -> None:
            values += added[start : start + len(values)]

        self._weights.alter(self._target(f"{module}.bias"), change)

    # ------------------------------------------------------------ the model's side
    def _target(self, name: str) -> str:
        """The checkpoint's tensor for a parameter that the adapter names."""
        live = self._model.rename(name)
        target = self._stored.get(live)
        other = self._model.tied.get(live)
        if other is not None:
            raise self._shared(live, other, "it has a LoRA, whose delta PEFT adds to one of the two")
        if target is None:
            raise WeightsError(
                f"{self._where}: the model has no {name}, which the adapter changes: {self._pedigree()}",
                "give the adapter of this model, or the model of this adapter",
            )
        return target

    def _both(self, live: str, name: str, other: str | None) -> list[str]:
        """The checkpoint's tensors for a parameter and for the `other` one that it is tied to: one of them, or both."""
        found = [self._stored[n] for n in (live, other) if n is not None and n in self._stored]
        return found or [self._target(name)]

    def _shared(self, live: str, other: str, how: str) -> ConfigError:
        return ConfigError(
            f"{self._where}: the adapter changes {live}, which the model shares with {other}: {how}; "
            "merged into the one matrix, the model would not be what was trained",
            "untie them (tie_word_embeddings = False), merge with PEFT, save the whole model and export that",
        )

    def _pedigree(self) -> str:
        return f"the adapter was trained for {self._adapter.base}, the model is {self._checkpoint}"


def _equal(one: Weights, name: str, other: Weights, other_name: str) -> bool:
    """Whether two tensors hold the same numbers, read some rows at a time."""
    if one.shape(name) != other.shape(other_name):
        return False
    count = one.shape(name)[0]
    pieces = [(i, min(i + _BLOCK, count)) for i in range(0, count, _BLOCK)]
    return all(np.array_equal(one.rows(name, *piece), other.rows(other_name, *piece)) for piece in pieces)


def add_product(left: np.ndarray, right: np.ndarray, scaling: float) -> Change:
    """Adds scaling · left [rows, r] · right [r, rest] to rows."""
    return _delta(left, right, scaling, None)


def _delta(left: np.ndarray, right: np.ndarray, scaling: float, magnitude: np.ndarray | None) -> Change:
    """Adds scaling · left·right to rows; with `magnitude` [rows] (DoRA) each row then gets that length."""

    def change(values: np.ndarray, start: int) -> None:
        rows = values.reshape(len(values), -1)
        for first in range(0, len(rows), _BLOCK):
            part = rows[first : first + _BLOCK]
            chosen = slice(start + first, start + first + len(part))
            part += scaling * (left[chosen] @ right)
            if magnitude is not None:
                part *= (magnitude[chosen] / np.linalg.norm(part, axis=1))[:, None]

    return change
