"""The directory of a LoRA adapter: found, downloaded, and its configuration checked but for the fit to a model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mllm_edge.bundle import sha256
from mllm_edge.errors import ConfigError, SourceError, WeightsError
from mllm_edge.export.checkpoint.adapter_names import Part, parts_of
from mllm_edge.export.checkpoint.download import download_adapter
from mllm_edge.export.checkpoint.files import local_path, read_json
from mllm_edge.export.checkpoint.notices import Notices
from mllm_edge.export.checkpoint.safetensors import Weights, open_files

__all__ = ["CONFIG", "NONE", "WEIGHTS", "Adapter", "adapter_inside", "open_adapter", "open_adapters"]

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_TEMPLATE = "chat_template.jinja"
NONE = "none"  # in the place of a directory: not even the adapter that lies in the checkpoint's own
# Folders in a checkpoint's, by its model type, with the adapter that the model sees images with.
_FOR_IMAGES = {"phi4_multimodal": "vision-lora"}
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
    "trainable_token_indices",
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


@dataclass(frozen=True)
class Adapter:
    """An adapter on disk, checked but for its fit to a model. `config` is adapter_config.json; `name` what the user
    typed, `revision` the hub's commit (None for a directory)."""

    folder: Path
    config: Mapping[str, Any]
    name: str = ""
    revision: str | None = None

    @property
    def base(self) -> str:
        """The model that the adapter says it was trained for."""
        return str(self.config.get("base_model_name_or_path") or "an unnamed model")

    def weights(self) -> Weights:
        """The adapter's tensors; raises WeightsError for a damaged file."""
        return open_files([self.folder / WEIGHTS])

    def parts(self) -> tuple[Part, ...]:
        """What its tensors are; raises WeightsError as `parts_of`."""
        return parts_of(self.weights(), self.folder / WEIGHTS)

    def provenance(self) -> dict[str, Any]:
        """What the manifest says about the adapter."""
        return {
            "name": self.folder.resolve().name if self.revision is None else self.name,
            "revision": self.revision,
            "base_model": self.base,
            "rank": self.config["r"],
            "sha256": sha256(self.folder / WEIGHTS),
        }


def open_adapters(
    folder: Path, names: Sequence[str | Path], notices: Notices, model_type: object = None
) -> tuple[Adapter, ...]:
    """The adapter that lies in the checkpoint's own `folder`, if any, or that which models of its type see images with,
    and then those of `names`; `NONE` among the names leaves the first one out. Raises as `open_adapter`."""
    opened = [open_adapter(name) for name in names if str(name) != NONE]
    inside = None if NONE in map(str, names) else adapter_inside(folder, notices)
    if inside is None and NONE not in map(str, names) and model_type in _FOR_IMAGES:
        opened = _with_one_for_images(folder / _FOR_IMAGES[str(model_type)], opened, notices)
    if inside is not None and all(inside.folder.resolve() != other.folder.resolve() for other in opened):
        notices.add(
            f"{folder}: an adapter lies in the folder (trained for {inside.base}): it is merged, as transformers does "
            f"where PEFT is installed; --adapter {NONE} leaves it out, which is right if these weights hold it already"
        )
        opened.insert(0, inside)
    for adapter in opened:
        if adapter is not inside:
            _tell_of_own_files(folder, adapter, notices)
    return tuple(opened)


def _with_one_for_images(folder: Path, opened: list[Adapter], notices: Notices) -> list[Adapter]:
    """With the adapter of `folder` before the others, unless there is none or it is among them."""
    if any(folder.resolve() == other.folder.resolve() for other in opened):
        return opened
    if not (folder / CONFIG).is_file():
        notices.add(
            f"{folder}: no {CONFIG} here, and this model sees images with the adapter that belongs there: without it, "
            "the export is right only if these weights hold it already"
        )
        return opened
    notices.add(
        f"{folder}: the adapter that this model sees images with is merged, and answers to texts alone have it, too; "
        f"--adapter {NONE} leaves it out"
    )
    return [open_adapter(folder), *opened]


def _tell_of_own_files(folder: Path, adapter: Adapter, notices: Notices) -> None:
    """A tokenizer or chat template that was changed in training: the checkpoint's are carried, not the adapter's."""
    added, known = _tokens(adapter.folder), _tokens(folder)
    new = sorted(added - known) if known else []
    if new:
        more = f" and {len(new) - 1} more" if len(new) > 1 else ""
        notices.add(
            f"{adapter.name}: its tokenizer has {new[0]}{more}, which the checkpoint's lacks, which is taken"
            "; copy the adapter's tokenizer files over it where its tokens were trained"
        )
    own, other = adapter.folder / _TEMPLATE, folder / _TEMPLATE
    if own.is_file() and other.is_file() and own.read_bytes() != other.read_bytes():
        notices.add(f"{adapter.name}: its {_TEMPLATE} differs from the checkpoint's, which is taken")


def _tokens(folder: Path) -> set[str]:
    """The tokens that were added to the tokenizer of a folder, those that have a number of their own."""
    path = folder / "tokenizer.json"
    entries = read_json(path).get("added_tokens") if path.is_file() else None
    return {str(e.get("content")) for e in entries if isinstance(e, Mapping)} if isinstance(entries, list) else set()


def adapter_inside(folder: Path, notices: Notices) -> Adapter | None:
    """The adapter in a checkpoint's folder; raises as `open_adapter`."""
    weights = [name for name in (WEIGHTS, "adapter_model.bin") if (folder / name).is_file()]
    if not (folder / CONFIG).is_file():
        if weights:
            notices.add(f"{folder}: {weights[0]} without {CONFIG}, which says how to merge it: left aside")
        return None
    if not weights:
        notices.add(f"{folder}: {CONFIG} without an adapter's weights: left aside")
        return None
    try:
        return open_adapter(folder)
    except SourceError as e:
        raise type(e)(e.message, f"{e.fix}; or leave out the adapter in this folder: --adapter {NONE}") from None


def open_adapter(name: str | Path) -> Adapter:
    """Read and check the configuration of an adapter in a directory, or on the hub (`owner/name`). Raises SourceError
    when it is no adapter, ConfigError for an option that cannot be merged."""
    folder, revision = local_path(name), None
    if not folder.exists() and str(name).count("/") == 1 and not str(name).startswith((".", "/", "~", "file:")):
        folder, revision = download_adapter(str(name))
    if not (folder / CONFIG).is_file():
        named = next(iter(sorted(folder.glob(f"*/{CONFIG}"))), None)
        fix = "--adapter takes a directory that PEFT wrote, or a hub id owner/name"
        raise SourceError(f"{name}: no {CONFIG} here", f"--adapter {named.parent}" if named else fix)
    if not (folder / WEIGHTS).is_file():
        raise _no_weights(folder)
    config = read_json(folder / CONFIG)
    _check_options(folder / CONFIG, config)
    return Adapter(folder, config, str(name), revision)


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
