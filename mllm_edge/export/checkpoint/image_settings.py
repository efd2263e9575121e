"""A checkpoint's image processor settings, and the words of the bundle for them."""

from collections.abc import Sequence
from typing import Any

from mllm_edge.errors import ConfigError
from mllm_edge.export.checkpoint.source import Source
from mllm_edge.spec import (
    CenterCrop,
    Normalize,
    PadToSquare,
    Resample,
    Rescale,
    Resize,
    ResizeShortestEdge,
    Transform,
)

__all__ = ["made_size", "resample_name", "single_transforms", "value_transforms"]

# By Pillow's number.
_RESAMPLE: tuple[Resample, ...] = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")
_OWN_FILES = "use this model's own files"


def resample_name(number: int | None) -> Resample:
    """Pillow's filter number as a word; raises ConfigError for None, and for a number that Pillow does not have."""
    if not isinstance(number, int) or not 0 <= number < len(_RESAMPLE):
        raise ConfigError(f"preprocessor_config.json: resample = {number!r}", "Pillow's filters are 0 to 5")
    return _RESAMPLE[number]


def value_transforms(settings: Any) -> tuple[Transform, Transform]:
    """Rescale and Normalize, which every supported image processor (transformers' object) ends with; raises ConfigError
    when one is off, or cannot be applied to three channels."""
    for key in ("do_rescale", "do_normalize", "rescale_factor"):
        if not getattr(settings, key):
            wanted = "a number is needed, such as 1/255" if key == "rescale_factor" else "only true is supported"
            raise ConfigError(f"preprocessor_config.json: {key} = {getattr(settings, key)!r}", wanted)
    mean, std = (_channels(key, getattr(settings, key)) for key in ("image_mean", "image_std"))
    if not all(std):
        raise ConfigError(f"preprocessor_config.json: image_std = {list(std)} divides by zero", _OWN_FILES)
    return Rescale(float(settings.rescale_factor)), Normalize(mean, std)


def single_transforms(source: Source, processor: Any) -> tuple[Transform, ...]:
    """What an image processor like CLIP's or SigLIP's (transformers' object) makes of an image, which stays one; raises
    ConfigError."""
    resample, size, crop = resample_name(processor.resample), processor.size, processor.crop_size
    transforms: list[Transform] = []
    if getattr(processor, "do_pad", False):
        if not hasattr(processor, "pad_to_square"):
            raise ConfigError(f"{source.folder}: do_pad = True", "only LlavaImageProcessor pads")
        transforms.append(PadToSquare(tuple(int(value * 255) for value in processor.image_mean)))
    if processor.do_resize and size.height and size.width:
        transforms.append(Resize(size.height, size.width, resample))
    elif processor.do_resize and size.shortest_edge and not size.longest_edge:
        transforms.append(ResizeShortestEdge(size.shortest_edge, resample))
    elif processor.do_resize:
        raise ConfigError(
            f"{source.folder}: the image processor's size = {dict(size)}",
            "supported: shortest_edge, or height and width",
        )
    if processor.do_center_crop:
        transforms.append(CenterCrop(crop.height, crop.width))
    return (*transforms, *value_transforms(processor))


def made_size(transforms: Sequence[Transform]) -> tuple[int, int] | None:
    """(height, width) in px of what `single_transforms` make; None for images of any size."""
    size = next((t for t in reversed(transforms) if isinstance(t, (CenterCrop, Resize))), None)
    return None if size is None else (size.height, size.width)


def _channels(key: str, values: Any) -> tuple[float, ...]:
    channels = (values,) * 3 if isinstance(values, (int, float)) else values
    try:
        red, green, blue = (float(value) for value in channels)
    except (TypeError, ValueError):
        raise ConfigError(f"preprocessor_config.json: {key} = {values!r} is not three numbers", _OWN_FILES) from None
    return red, green, blue
