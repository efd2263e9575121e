"""Processors whose image processor runs on torchvision alone in transformers, which no export needs: the one that the
reference gets here is ours, from the same settings."""

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

from mllm_edge.export.checkpoint.chat import chat_template
from mllm_edge.export.checkpoint.processing import (
    processor_class,
    read_image_settings,
    read_processor,
    read_tokenizer,
)
from mllm_edge.export.checkpoint.source import Source
from mllm_edge.runtime.prompt.image import load_image

__all__ = ["OWN_IMAGES", "load_with_own_images"]

OWN_IMAGES = "transformers' image processor runs on torchvision alone: images are processed by our own on both sides"
ModelInputs = Callable[[list[Any]], dict[str, Any]]


def load_with_own_images(
    source: Source,
    cls: Any,
    name: str,
    images: str,
    defaults: Mapping[str, Any],
    template: str,
    inputs_of: Callable[[SimpleNamespace], ModelInputs],
    **gaps: Any,
) -> Any:
    """transformers' processor of the folder, by `cls`: its class `name`, or one that stands on it. `images`: the name
    of its image processor, whose settings are those of the files and, where these leave one out, of `defaults`;
    `inputs_of` (these settings) makes, of RGB images, what it hands to the processor. `template` and `gaps`: for
    folders that come without."""
    processor_class(source, name, (name,))
    stated = read_image_settings(source, (images,))
    given = {key: value for key, value in stated.items() if key in defaults and value is not None}
    settings = SimpleNamespace(**{**defaults, **given})
    tokenizer = read_tokenizer(source)
    processor = read_processor(source, cls, _image_processor(settings, inputs_of(settings)), tokenizer, **gaps)
    processor.chat_template = chat_template(source, template, tokenizer)
    return processor


def _image_processor(settings: SimpleNamespace, model_inputs: ModelInputs) -> Any:
    """What transformers' own is to its processor and to the model."""
    from transformers.image_processing_utils import BaseImageProcessor
    from transformers.image_utils import make_flat_list_of_images

    class Images(BaseImageProcessor):
        valid_kwargs: Any = None  # its options are the settings

        def __call__(self, images: Any, *_: Any, **options: Any) -> Any:
            flat: Any = make_flat_list_of_images(images)
            return model_inputs([load_image(image) for image in flat])

    return Images(**vars(settings))
