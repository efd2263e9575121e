"""A checkpoint's tokenizer, image processor and processor, as transformers itself reads them.

Folders that several versions and tools have saved into hold the same setting in several files. Which of them counts is
decided by transformers alone: what it loads is what gets exported, and the reference of every comparison. Two things
are chosen here: images run on Pillow, whether or not torchvision is installed, and of the part for video, which needs
it, only the settings are read.
"""

import inspect
from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any

from mllm_edge.errors import ConfigError, SourceError
from mllm_edge.export.checkpoint.quiet import quiet_transformers
from mllm_edge.export.checkpoint.source import Source
from mllm_edge.export.checkpoint.tokenizers import load_tokenizer

__all__ = [
    "for_images",
    "processor_class",
    "read_image_processor",
    "read_image_settings",
    "read_processor",
    "read_tokenizer",
    "read_video_settings",
    "stated_settings",
]

_OWN_FILES = "use this model's own files"
_OTHERS = ("video_processor", "audio_processor")  # parts for what is no image


def read_tokenizer(source: Source, cls: Any = None, **options: Any) -> Any:
    """transformers' tokenizer of the folder, by `cls` (default AutoTokenizer) and with `options` of its own; padding
    and truncation, which training may have left switched on in tokenizer.json, are off.

    Raises SourceError with transformers' reason when it cannot be loaded.
    """
    from transformers import AutoTokenizer

    try:
        with quiet_transformers():
            tokenizer = (cls or AutoTokenizer).from_pretrained(source.folder, **options)
    except Exception as e:  # the Rust side and the converters raise bare Exception
        load_tokenizer(source)  # names a file that is missing or damaged
        raise SourceError(
            f"{source.folder}: transformers cannot load the tokenizer ({_reason(e)})", _OWN_FILES
        ) from None
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.model_max_length = int(1e30)  # transformers' own number for no limit
    return tokenizer


def read_image_processor(source: Source, allowed: Collection[str]) -> Any:
    """transformers' image processor of the folder on its Pillow backend; one of the classes named `allowed` (without
    the endings of a backend).

    Raises ConfigError when the folder has none, when it is of another class, or when its settings are wrong.
    """
    from transformers import AutoImageProcessor

    _, stated = _image_settings(source)
    try:
        with quiet_transformers():
            processor = AutoImageProcessor.from_pretrained(source.folder, backend="pil")
    except Exception as e:
        _require_class(source, stated, allowed)
        raise ConfigError(
            f"{source.folder}: the image processor's settings are wrong ({_reason(e)})", _OWN_FILES
        ) from None
    _require_class(source, type(processor).__name__, allowed)
    return processor


def read_image_settings(source: Source, allowed: Collection[str]) -> dict[str, Any]:
    """The settings that transformers would give its image processor, for one that runs on torchvision alone; raises
    ConfigError when the folder has none, or when it names a class that is none of `allowed`."""
    settings, stated = _image_settings(source)
    if stated is not None:
        _require_class(source, stated, allowed)
    return settings


def _image_settings(source: Source) -> tuple[dict[str, Any], Any]:
    """The image processor's settings and the name of its class, where the files state one."""
    from transformers.image_processing_base import ImageProcessingMixin

    try:
        settings, _ = ImageProcessingMixin.get_image_processor_dict(source.folder)
    except OSError:
        raise ConfigError(
            f"{source.folder}: no preprocessor_config.json and no image_processor in processor_config.json",
            "copy the image processor's configuration beside config.json",
        ) from None
    return dict(settings), settings.get("image_processor_type") or settings.get("feature_extractor_type")


def read_processor(
    source: Source,
    cls: Any,
    image_processor: Any,
    tokenizer: Any,
    further: Mapping[str, Any] = MappingProxyType({}),
    **gaps: Any,
) -> Any:
    """A processor of transformers' class `cls` with the settings of the folder; `further` are its other parts by name,
    `gaps` settings that older files leave out. Its `chat_template` is the folder's own, or None."""
    settings = {key: value for key, value in stated_settings(source).items() if value is not None}
    filled = sorted(key for key in gaps if key not in settings)
    if filled:
        shown = ", ".join(f"{key} = {gaps[key]!r}" for key in filled)
        source.notices.add(
            f"{source.folder}: the processor's files leave out what this model needs: {shown} is taken of it"
        )
    accepted = inspect.signature(cls.__init__).parameters
    known = {key: value for key, value in {**gaps, **settings}.items() if key in accepted}
    parts = {"image_processor": image_processor, "tokenizer": tokenizer, **further}
    parts |= {name: None for name in _OTHERS if name in accepted}
    with quiet_transformers():
        return for_images(cls)(**{**known, **parts})


def read_video_settings(source: Source, allowed: str) -> dict[str, Any] | None:
    """The settings that transformers would give its video processor, which runs on torchvision alone; None where the
    folder has none. Raises ConfigError when it names a class that is not the one `allowed`."""
    from transformers.video_processing_utils import BaseVideoProcessor

    try:
        settings, _ = BaseVideoProcessor.get_video_processor_dict(source.folder)
    except OSError:
        return None
    name = settings.get("video_processor_type")
    if name not in (None, allowed):
        raise ConfigError(f"{source.folder}: video processor {name!r} is not supported", f"supported: {allowed}")
    return {key: value for key, value in settings.items() if value is not None}


def processor_class(source: Source, default: str, allowed: Collection[str]) -> str:
    """The name of the processor class that transformers takes for the folder: the first that a file names, in its
    order, else the model's `default`. Raises ConfigError for a class that is none of `allowed`."""
    from transformers.image_processing_base import ImageProcessingMixin

    def of_images() -> dict[str, Any]:
        try:
            return dict(ImageProcessingMixin.get_image_processor_dict(source.folder)[0])
        except OSError:
            return {}

    readers = (lambda: stated_settings(source), of_images, lambda: source.json("tokenizer_config.json"))
    name = next((name for read in readers if (name := read().get("processor_class"))), default)
    if name not in allowed:
        raise ConfigError(
            f"{source.folder}: processor_class {name!r} is not supported", f"supported: {', '.join(sorted(allowed))}"
        )
    return str(name)


def stated_settings(source: Source) -> dict[str, Any]:
    """What transformers takes from the processor's files: processor_config.json and the chat templates beside it.

    Raises ConfigError where transformers refuses the folder's files.
    """
    from transformers import ProcessorMixin

    try:
        with quiet_transformers():
            settings, _ = ProcessorMixin.get_processor_dict(source.folder)
    except (OSError, KeyError, TypeError, ValueError) as e:
        raise ConfigError(
            f"{source.folder}: transformers cannot read the processor's files ({_reason(e)})", _OWN_FILES
        ) from None
    return dict(settings)


def for_images(cls: Any) -> Any:
    """A processor class of transformers that takes images and text only: its part for video needs torchvision, that for
    sounds is not exported."""
    from transformers import ProcessorMixin

    class Parts(ProcessorMixin):
        """Stands behind `cls`, which hands its parts on in their order, and none for video or sounds."""

        def __init__(self, *parts: Any, **settings: Any):
            super().__init__(*(part for part in parts if part is not None), **settings)

    class ForImages(cls, Parts):
        @classmethod
        def get_attributes(cls) -> list[str]:
            return [name for name in super().get_attributes() if name not in _OTHERS]

        # SmolVLM's own asks the part for video for its settings.
        apply_chat_template = ProcessorMixin.apply_chat_template

    ForImages.__name__ = cls.__name__
    return ForImages


def _require_class(source: Source, name: Any, allowed: Collection[str]) -> None:
    plain = str(name).removesuffix("Fast").removesuffix("Pil").replace("FeatureExtractor", "ImageProcessor")
    if plain not in allowed:
        raise ConfigError(
            f"{source.folder}: image processor {name!r} is not supported", f"supported: {', '.join(sorted(allowed))}"
        )


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
