"""LoRA adapters in PEFT's layout: merged into the weights of a checkpoint while these are read.

An adapter is a directory with `adapter_config.json` and `adapter_model.safetensors`, whose tensors are named
`base_model.model.<module>.lora_A.weight` and the like. A merged weight is W + scaling · B·A, in float32, whatever the
stored dtypes. Several adapters follow one another, each on top of the ones before.

Which module a name means is decided by transformers' own renaming of checkpoints, so an adapter fits whether it was
trained with today's module names or with those that the checkpoint on the hub still has.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mllm_edge.bundle import sha256
from mllm_edge.errors import ConfigError, SourceError, WeightsError
from mllm_edge.export.checkpoint.files import read_json
from mllm_edge.export.safetensors import Change, Weights, open_files

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Adapter", "Skeleton", "merge", "open_adapter", "skeleton"]

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_BLOCK = 1024  # rows that are changed at a time: their delta is all the memory that a merge takes
# Options that are read here, and those of training alone.
_READ = {
    "alpha_pattern",
    "base_model_name_or_path",
    "exclude_modules",
    "fan_in_fan_out",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "modules_to_save",
    "peft_type",
    "r",
    "rank_pattern",
    "target_modules",
    "use_dora",
    "use_rslora",
}
_TRAINING = {
    "auto_mapping",
    "bias",  # trained biases are stored, and every stored tensor is used
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "inference_mode",
    "loftq_config",
    "lora_bias",  # likewise
    "lora_dropout",
    "lora_ga_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
}
# Ways to start the training that leave the base weights alone.
_PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")
_NUMBER = re.compile(r".*?\.[^.]*\.(\d+)\.")


@dataclass(frozen=True)
class Adapter:
    """An adapter on disk, checked but for its fit to a model. `config` is adapter_config.json."""

    folder: Path
    config: Mapping[str, Any]

    @property
    def base(self) -> str:
        """The model that the adapter says it was trained for."""
        return str(self.config.get("base_model_name_or_path") or "an unnamed model")

    def weights(self) -> Weights:
        """The adapter's tensors; raises WeightsError for a damaged file."""
        return open_files([self.folder / WEIGHTS])

    def provenance(self) -> dict[str, Any]:
        """What the manifest says about the adapter."""
        return {
            "name": self.folder.resolve().name,
            "base_model": self.base,
            "rank": self.config["r"],
            "sha256": sha256(self.folder / WEIGHTS),
        }


@dataclass(frozen=True)
class Skeleton:
    """Names of a model as transformers has it today: what a checkpoint's names become, which parameters are one
    (`tied`: name → the other's name), and the modules that store their matrix [in, out] (`transposed`)."""

    rename: Callable[[str], str]
    tied: Mapping[str, str]
    transposed: frozenset[str]


def open_adapter(folder: str | Path) -> Adapter:
    """Read and check the configuration in `folder`. Raises SourceError when it is no adapter, ConfigError for an option
    that cannot be merged."""
    folder = Path(folder)
    if not (folder / CONFIG).is_file():
        raise SourceError(f"{folder}: no {CONFIG} here", "--adapter takes a directory that PEFT wrote")
    if not (folder / WEIGHTS).is_file():
        raise _no_weights(folder)
    config = read_json(folder / CONFIG)
    _check_options(folder / CONFIG, config)
    return Adapter(folder, config)


def merge(weights: Weights, adapters: Sequence[Adapter], model: Skeleton, name: str) -> None:
    """Let `weights` give merged values from now on. `name` is the checkpoint's, for messages.

    Raises WeightsError for a tensor that has no place in the model or no partner in the adapter, ConfigError for a
    contradiction between an adapter's tensors and its configuration.
    """
    stored = {model.rename(tensor): tensor for tensor in weights}
    for adapter in adapters:
        _Merger(adapter, weights, model, stored, name).merge()


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


def _tied(model: "PreTrainedModel") -> dict[str, str]:
    first: dict[int, str] = {}
    tied: dict[str, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        other = first.setdefault(id(parameter), name)
        if other != name:
            tied |= {name: other, other: name}
    return tied


# ---------------------------------------------------------------- configuration
def _no_weights(folder: Path) -> SourceError:
    if (folder / "adapter_model.bin").is_file():
        return WeightsError(
            f"{folder}: the adapter is pickled (adapter_model.bin), and unpickling can run code",
            'save it once as safetensors: python -c "import torch; from safetensors.torch import save_file; '
            f"save_file(torch.load('{folder}/adapter_model.bin', weights_only=True), '{folder}/{WEIGHTS}')\"",
        )
    return WeightsError(f"{folder}: no {WEIGHTS} here", "the download is incomplete: fetch the adapter again")


def _check_options(where: Path, config: Mapping[str, Any]) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise ConfigError(f"{where}: peft_type = {kind!r} is not supported", "only LORA adapters can be merged")
    if not isinstance(config.get("r"), int) or not isinstance(config.get("lora_alpha"), int | float):
        raise ConfigError(f"{where}: r and lora_alpha are not both numbers", "fetch the adapter again")
    start = config.get("init_lora_weights", True)
    if start not in _PLAIN_STARTS:
        raise ConfigError(
            f"{where}: init_lora_weights = {start!r} changed the base weights before the training",
            "save it as plain LoRA: model.save_pretrained(OUT, path_initial_model_for_weight_conversion=INITIAL)",
        )
    for key, value in config.items():
        if key not in _READ | _TRAINING and value not in (None, False, "", [], {}):
            raise ConfigError(
                f"{where}: {key} = {value!r} is not supported",
                "merge with PEFT (merge_and_unload), save the whole model and export that",
            )


def _matches(patterns: Iterable[str], module: str) -> str | None:
    """The first pattern, a regular expression for the end of a name, that `module` has."""
    return next((p for p in patterns if re.match(rf"(.*\.)?({p})$", module)), None)


def _named(wanted: Any, module: str) -> bool:
    """Whether a list of name endings, or a regular expression for the whole name, has `module`."""
    if isinstance(wanted, str):
        return re.fullmatch(wanted, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in wanted)


def _targeted(config: Mapping[str, Any], module: str) -> bool:
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
_LORA = re.compile(r"(.+)\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)(\.weight|\.bias|)")


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

    def __init__(self, adapter: Adapter, weights: Weights, model: Skeleton, stored: Mapping[str, str], checkpoint: str):
        self._adapter, self._config = adapter, adapter.config
        self._weights, self._model, self._stored, self._checkpoint = weights, model, stored, checkpoint
        self._where = adapter.folder / WEIGHTS
        self._tensors = adapter.weights()

    def merge(self) -> None:
        modules: dict[str, set[str]] = {}
        whole: dict[str, str] = {}
        for key in self._tensors:
            if not key.startswith(_PREFIX):
                raise WeightsError(f"{self._where}: tensor {key} is not one of an adapter", "save it again with PEFT")
            name = key.removeprefix(_PREFIX)
            match = _LORA.fullmatch(name)
            if match:
                modules.setdefault(match[1], set()).add(match[2] + match[3])
            else:
                whole[name] = key
        for name, key in whole.items():
            self._replace(name, key)
        self._check_saved(whole)
        for module, parts in modules.items():
            self._merge_module(module, parts)
        unused = self._tensors.unused()
        if unused:
            raise WeightsError(
                f"{self._where}: tensor {unused[0]} cannot be merged", "only what PEFT's LoRA stores can be merged"
            )

    # ------------------------------------------------------------ whole tensors
    def _replace(self, name: str, key: str) -> None:
        """A trained copy of a tensor: of `modules_to_save`, a bias, or an embedding stored along with its LoRA."""
        target = self._target(name.replace(".base_layer.", ".").replace(".modules_to_save.", "."))
        shape = self._weights.shape(target)
        if self._tensors.shape(key) != shape:
            raise WeightsError(
                f"{self._where}: tensor {key} has shape {list(self._tensors.shape(key))}, the model's {list(shape)}",
                "the vocabulary was resized in training: merge with PEFT (merge_and_unload), save and export that",
            )
        self._tensors.use(key, shape)

        def change(values: np.ndarray, start: int) -> None:
            values[...] = self._tensors.rows(key, start, start + len(values))

        self._weights.alter(target, change)

    def _check_saved(self, whole: Mapping[str, str]) -> None:
        modules = {name.rpartition(".")[0] for name in whole}
        for wanted in self._config.get("modules_to_save") or ():
            if not any(re.match(rf"(^|.*\.){wanted}($|\..*)", module) for module in modules):
                raise WeightsError(
                    f"{self._where}: {CONFIG} says modules_to_save = {wanted}, but no tensor of it is here",
                    "the adapter is incomplete: save it again with PEFT",
                )

    # ------------------------------------------------------------ LoRA
    def _merge_module(self, module: str, parts: set[str]) -> None:
        live = self._model.rename(f"{module}.weight").removesuffix(".weight")
        pair = self._pair(module, parts)
        target = self._target(f"{module}.weight")
        if not (_targeted(self._config, module) or _targeted(self._config, live)):
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
        magnitude = self._magnitude(module, parts, plain=not pair.embedding and not transposed and len(shape) == 2)
        self._weights.alter(target, _delta(*factors, scaling, magnitude))
        if "lora_B.bias" in parts:
            self._add_bias(module, scaling)

    def _pair(self, module: str, parts: set[str]) -> _Pair:
        for down, up in (("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B")):
            if {down, up} <= parts:
                read = [self._tensors.read(f"{_PREFIX}{module}.{part}") for part in (down, up)]
                return _Pair(read[0], read[1], down == "lora_embedding_A")
        raise WeightsError(
            f"{self._where}: {module} has {', '.join(sorted(parts))} but not its partner",
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

    def _magnitude(self, module: str, parts: set[str], plain: bool) -> np.ndarray | None:
        part = next((p for p in parts if p.startswith("lora_magnitude_vector")), None)
        dora = bool(self._config.get("use_dora"))
        if dora != (part is not None):
            raise WeightsError(
                f"{self._where}: {CONFIG} says use_dora = {dora}, but {module} "
                + ("has no lora_magnitude_vector" if dora else "has a lora_magnitude_vector"),
                "use the two files that belong together",
            )
        if part is None:
            return None
        if not plain:
            raise ConfigError(
                f"{self._where}: use_dora on {module}: only DoRA of linear layers can be merged",
                "merge with PEFT (merge_and_unload), save the whole model and export that",
            )
        return self._tensors.read(f"{_PREFIX}{module}.{part}")

    def _add_bias(self, module: str, scaling: float) -> None:
        added = scaling * self._tensors.read(f"{_PREFIX}{module}.lora_B.bias")

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
            raise ConfigError(
                f"{self._where}: the adapter changes {live}, which the model shares with {other}: "
                "merged, both would change, which is not what was trained",
                "untie them (tie_word_embeddings = False), merge with PEFT, save the whole model and export that",
            )
        if target is None:
            raise WeightsError(
                f"{self._where}: the model has no {name}, which the adapter changes: {self._pedigree()}",
                "give the adapter of this model, or the model of this adapter",
            )
        return target

    def _pedigree(self) -> str:
        return f"the adapter was trained for {self._adapter.base}, the model is {self._checkpoint}"


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
