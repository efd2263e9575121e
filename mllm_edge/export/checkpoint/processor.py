"""transformers' processor of a checkpoint: images, tokenizer and chat template."""

from collections.abc import Callable, Collection, Mapping
from types import MappingProxyType
from typing import Any

from mllm_edge.errors import ConfigError
from mllm_edge.export.checkpoint.chat import chat_template
from mllm_edge.export.checkpoint.processing import (
    processor_class,
    read_image_processor,
    read_processor,
    read_tokenizer,
)
from mllm_edge.export.checkpoint.source import Source

__all__ = ["OWN_PROCESSOR", "load_processor", "require_switched_on", "require_tile", "require_tokens"]

OWN_PROCESSOR = "use the preprocessor_config.json that belongs to this model"


def load_processor(
    source: Source,
    name: str,
    image_processors: Collection[str],
    template: str,
    of_model: Callable[[Any], Mapping[str, Any]] = lambda image_processor: {},
    cls: Any = None,
    further: Mapping[str, Any] = MappingProxyType({}),
) -> Any:
    """What transformers loads from the folder: its processor class `name` (or `cls`, where it stands elsewhere) over
    one of the `image_processors`; `template` for checkpoints that come without one. `of_model` (transformers' image
    processor) gives the settings that older files leave out, as the model has them; `further`: its other parts, by
    name."""
    import transformers

    processor_class(source, name, (name,))
    image_processor, tokenizer = read_image_processor(source, image_processors), read_tokenizer(source)
    processor = read_processor(
        source,
        cls or getattr(transformers, name),
        image_processor,
        tokenizer,
        further,
        **of_model(image_processor),
    )
    processor.chat_template = chat_template(source, template, tokenizer)
    return processor


def require_switched_on(source: Source, settings: Any, *keys: str) -> None:
    """Raise ConfigError unless the image processor (transformers' object) has these steps switched on."""
    for key in keys:
        if not getattr(settings, key):
            raise ConfigError(f"{source.folder}: the image processor's {key} is false", "only true is supported")


def require_tile(source: Source, size: tuple[int, int] | None, tile: int) -> None:
    """Raise ConfigError unless the image processor makes tiles of the vision tower's size; `size`: (height, width),
    None for images of any."""
    if size != (tile, tile):
        made = "images of any size" if size is None else f"tiles of {size[0]}×{size[1]} px"
        raise ConfigError(
            f"{source.folder}: the image processor makes {made}, the vision tower takes {tile}×{tile} px", OWN_PROCESSOR
        )


def require_tokens(source: Source, told: str, stated: int, tokens: int) -> None:
    """Raise ConfigError unless the processor's file states, as it is `told`, the number of tokens that the model makes
    of a tile."""
    if stated != tokens:
        raise ConfigError(
            f"{source.folder / 'processor_config.json'}: {told}, the model makes {tokens} tokens of a tile",
            "use the processor files that belong to this model",
        )
