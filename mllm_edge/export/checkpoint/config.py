"""config.json as transformers understands it, read so that no setting that matters is overlooked."""

import difflib
import re
from collections.abc import Mapping
from typing import Any

from mllm_edge.errors import ConfigError
from mllm_edge.export.checkpoint.source import Source

__all__ = ["OWN_CONFIG", "ConfigReader", "check_layers", "load_config", "model_readers", "nearest", "text_part"]

OWN_CONFIG = "use the config.json that belongs to these weights"
_LAYERS = re.compile(r"num_\w*layers|n_layers?|depth|(en|de)coder_layers")
_LONGEST = 600  # characters of a reason
# Generation and bookkeeping settings: no effect on any tensor.
_INERT = {
    "_name_or_path",
    "_pad_token_id",
    "architectures",
    "attention_dropout",
    "bos_token_id",
    "chunk_size_feed_forward",
    "dtype",
    "eos_token_id",
    "id2label",
    "initializer_range",
    "is_encoder_decoder",
    "label2id",
    "model_type",
    "output_attentions",
    "output_hidden_states",
    "pad_token_id",
    "problem_type",
    "return_dict",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}


def nearest(word: str, known: list[str]) -> str:
    """The known name most like `word`, or '' when nothing resembles it."""
    return (difflib.get_close_matches(word, known, n=1, cutoff=0.4) or [""])[0]


class ConfigReader:
    """Reads a configuration and remembers what was read, so that no value that matters is overlooked.

    `values` are the checkpoint's own with the defaults of its configuration class filled in; `defaults` are those of
    the class alone. A key that the class does not know has no effect on the reference model either.
    """

    def __init__(self, where: str, values: Mapping[str, Any], defaults: Mapping[str, Any]):
        self._where, self._values, self._defaults = where, values, defaults
        self._taken: set[str] = set()

    def take(self, key: str, default: Any = None) -> Any:
        """The value of `key`, marked as handled."""
        self._taken.add(key)
        value = self._values.get(key)
        return default if value is None else value

    def require(self, key: str, *allowed: Any) -> Any:
        """The value of `key`, which must be one of `allowed`; raises ConfigError that names them."""
        value = self.take(key, allowed[0])
        if value not in allowed:
            raise ConfigError(
                f"{self._where}: {key} = {value!r} is not supported",
                f"supported: {', '.join(map(repr, allowed))}; check config.json for a mistake, or ask for this value",
            )
        return value

    def positive(self, key: str) -> int:
        """The value of `key`, a whole number from 1 on; raises ConfigError."""
        value = self.take(key)
        if not isinstance(value, int) or value < 1:
            raise ConfigError(f"{self._where}: {key} = {value!r}", "only a positive integer is supported")
        return value

    def side(self, key: str) -> int:
        """The value of `key`, a number or [n, n]; raises ConfigError for what is no square."""
        value = self.take(key)
        sides = value if isinstance(value, (list, tuple)) else [value, value]
        if len(sides) != 2 or sides[0] != sides[1] or not isinstance(sides[0], int):
            raise ConfigError(f"{self._where}: {key} = {value!r}", "only square images and patches are supported")
        return int(sides[0])

    def heads(
        self, size: str = "hidden_size", heads: str = "num_attention_heads", multiple: int = 1
    ) -> tuple[int, int]:
        """The values of `size` and `heads`; raises ConfigError where heads would not have a whole number of elements, a
        multiple of `multiple`."""
        width, count = self.positive(size), self.positive(heads)
        if width % (multiple * count):
            many = f", each of a multiple of {multiple} elements" if multiple > 1 else ""
            raise ConfigError(f"{self._where}: {size} {width} does not make {heads} {count} heads{many}", OWN_CONFIG)
        return width, count

    def finish(self) -> None:
        """Raise ConfigError when a value that differs from the class default was read by nobody."""
        for key, value in self._values.items():
            known = key in self._defaults and value != self._defaults[key]
            if known and key not in self._taken and key not in _INERT:
                raise ConfigError(
                    f"{self._where}: {key} = {value!r} changes the model, and this exporter does not handle it",
                    f"only its default {self._defaults[key]!r} is supported",
                )


def load_config(source: Source) -> Any:
    """config.json as transformers understands it; raises ConfigError where transformers refuses a value."""
    from transformers import AutoConfig

    where = source.folder / "config.json"
    try:
        config = AutoConfig.for_model(**dict(source.config))
    except Exception as e:  # its validation raises kinds of its own, wrapped in several layers
        reason, fix = _refusal(" ".join(str(e).split()))
        raise ConfigError(f"{where}: {reason}", fix) from None
    _tell_of_architecture(source)
    return config


def _refusal(reason: str) -> tuple[str, str]:
    """What transformers said, without the list of all that it knows, and what helps."""
    from transformers import CONFIG_MAPPING, __version__

    found = re.fullmatch(r"(.*?:? ?([\w.-]+)\.?) Should contain one of .*", reason)
    if found:
        near = nearest(found[2].strip("."), list(CONFIG_MAPPING))
        like = f"; the nearest that it knows is {near}" if near else ""
        return f"{found[1]} (transformers {__version__})", f"correct config.json, or install a newer transformers{like}"
    fix = "correct config.json"
    if "NoneType" in reason:
        fix = "take the key out of config.json: null is no value for it"
    return reason if len(reason) <= _LONGEST else f"{reason[:_LONGEST]} …", fix


def _tell_of_architecture(source: Source) -> None:
    """As in transformers, model_type decides; `architectures` may name another class."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    named = source.config.get("architectures")
    expected = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(source.model_type)
    if expected and isinstance(named, list) and named and expected not in named:
        source.notices.add(
            f"{source.folder / 'config.json'}: architectures is {named}, model_type {source.model_type!r}: read by "
            f"model_type as {expected}, as transformers does"
        )


def check_layers(source: Source, tensors: int) -> None:
    """Raise ConfigError for a configuration that counts more layers than the checkpoint has `tensors`: before anything
    is made for each of them."""
    parts = [("config.json", source.config)]
    while parts:
        where, values = parts.pop()
        for key, value in values.items():
            if isinstance(value, Mapping):
                parts.append((f"{where} {key}", value))
            elif _LAYERS.fullmatch(key) and isinstance(value, (int, float)) and value > tensors:
                raise ConfigError(
                    f"{source.folder / 'config.json'}{where.removeprefix('config.json')}: {key} = {value}, and the "
                    f"checkpoint holds {tensors} tensors",
                    OWN_CONFIG,
                )


def text_part(config: Any) -> Any:
    """The language model's part of a configuration: all of it, where it has no such part."""
    return getattr(config, "text_config", config)


def model_readers(
    source: Source, config: Any, vision: str = "vision_config"
) -> tuple[ConfigReader, ConfigReader, ConfigReader]:
    """Readers of a transformers configuration's own values, of its language model's and of its part `vision`, which may
    be none."""
    where, parts = str(source.folder / "config.json"), ("text_config", vision)

    def reader(label: str, part: Any) -> ConfigReader:
        values = {k: v for k, v in part.to_dict().items() if k not in parts}
        return ConfigReader(where + label, values, type(part)().to_dict())

    top = reader("", config)
    text = reader(" text_config", config.text_config) if hasattr(config, "text_config") else top
    return top, text, reader(f" {vision}", getattr(config, vision)) if vision else ConfigReader(where, {}, {})
