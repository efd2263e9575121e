"""A checkpoint's image processor settings, and the words of the bundle for them."""

from collections.abc import Mapping
from typing import Any

from mllm_edge.errors import ConfigError
from mllm_edge.export.source import Source
from mllm_edge.spec import Normalize, Resample, Rescale, Transform

__all__ = ["constructor_arguments", "image_settings", "resample_name", "value_transforms"]

# By Pillow's number.
_RESAMPLE: tuple[Resample, ...] = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")
_OWN_FILES = "use this model's own files"


def image_settings(source: Source) -> Mapping[str, Any]:
    """The image processor's own settings, from either file that may hold them; raises ConfigError without any."""
    settings = source.json("preprocessor_config.json") or source.json("processor_config.json").get("image_processor")
    if not settings:
        raise ConfigError(
            f"{source.folder}: no preprocessor_config.json and no image_processor in processor_config.json",
            "copy the image processor's configuration beside config.json",
        )
    return settings


def constructor_arguments(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that an image processor class of transformers takes: all but the names of classes."""
    return {k: v for k, v in settings.items() if not k.endswith("_type") and k not in ("processor_class", "auto_map")}


def resample_name(number: int) -> Resample:
    """Pillow's filter number as a word; raises ConfigError for a number that Pillow does not have."""
    if not 0 <= int(number) < len(_RESAMPLE):
        raise ConfigError(f"preprocessor_config.json: resample = {number!r}", "Pillow's filters are 0 to 5")
    return _RESAMPLE[int(number)]


def value_transforms(settings: Mapping[str, Any]) -> tuple[Transform, Transform]:
    """Rescale and Normalize, which every supported processor ends with; raises ConfigError when one is off, or cannot
    be applied to three channels."""
    for key in ("do_rescale", "do_normalize"):
        if not settings[key]:
            raise ConfigError(f"preprocessor_config.json: {key} = {settings[key]!r}", "only true is supported")
    mean, std = (_channels(key, settings[key]) for key in ("image_mean", "image_std"))
    if not all(std):
        raise ConfigError(f"preprocessor_config.json: image_std = {list(std)} divides by zero", _OWN_FILES)
    return Rescale(float(settings["rescale_factor"])), Normalize(mean, std)


def _channels(key: str, values: Any) -> tuple[float, ...]:
    channels = (values,) * 3 if isinstance(values, (int, float)) else values
    try:
        red, green, blue = (float(value) for value in channels)
    except (TypeError, ValueError):
        raise ConfigError(f"preprocessor_config.json: {key} = {values!r} is not three numbers", _OWN_FILES) from None
    return red, green, blue
