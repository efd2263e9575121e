"""InstructBLIP for video: InstructBLIP on the frames of a video, whose queries follow one another; Llama decoder.

Each frame is one tile. An image is a frame by itself: several of them are to the model what a video is.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mllm_edge.errors import ConfigError
from mllm_edge.export.checkpoint.config import load_config
from mllm_edge.export.checkpoint.processing import processor_class, read_processor, read_tokenizer, read_video_settings
from mllm_edge.export.checkpoint.processor import OWN_PROCESSOR
from mllm_edge.export.checkpoint.source import Source
from mllm_edge.export.families.instructblip_parts import (
    IDS,
    MASK,
    TEXT,
    TOLD,
    describe,
    instructblip_texts,
    second_tokenizer,
)
from mllm_edge.export.families.llava_parts import VIDEO_NOTE
from mllm_edge.export.families.qformer_parts import add_tokens, answering, begun, with_images_first
from mllm_edge.export.family import Checkpoint, Family, Parts
from mllm_edge.export.reference import load_reference
from mllm_edge.spec import VideoSpec

__all__ = ["FAMILY"]

_TOKEN, _IMAGE, _NAME = "<video>", "<image>", "InstructBlipVideoProcessor"
_SETTINGS = ("do_resize", "size", "resample", "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")


def _describe(checkpoint: Checkpoint) -> Parts:
    parts = describe(checkpoint, _TOKEN, _IMAGE)
    video = VideoSpec(parts.image.transforms, _TOKEN, checkpoint.token_id, features=parts.image.features)
    return replace(parts, image=replace(parts.image, video=video))


def _load_processor(source: Source) -> Any:
    from transformers import InstructBlipVideoProcessor

    class Complete(InstructBlipVideoProcessor):
        """Takes complete prompts with any number of images, which are the frames of one video."""

        image_processor: Any

        def __call__(self, images: Any = None, text: Any = None, return_tensors: Any = None, **options: Any) -> Any:
            texts, count = begun(self, text)
            made = super().__call__(text=texts, return_tensors=return_tensors)
            if images:
                add_tokens(made, count * self.num_query_tokens, self.tokenizer.convert_tokens_to_ids(_TOKEN))
                made["pixel_values"] = self.image_processor(images, return_tensors=return_tensors)["pixel_values"][None]
            return made

    processor_class(source, _NAME, (_NAME, "InstructBlipProcessor"))  # the other's checkpoints are opened as these, too
    queries = {"num_query_tokens": load_config(source).num_query_tokens}
    frames, tokenizer, further = _of_frames(source), read_tokenizer(source), second_tokenizer(source)
    processor = read_processor(source, Complete, frames, tokenizer, further, **queries)
    processor.image_processor = frames
    return with_images_first(source, processor, TOLD, _TOKEN)


def _of_frames(source: Source) -> Any:
    """transformers' image processor that sees an image as the folder's video processor sees a frame."""
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

    stated = read_video_settings(source, "InstructBlipVideoVideoProcessor")
    if stated is None:
        raise ConfigError(f"{source.folder}: no settings of a video processor", OWN_PROCESSOR)
    if stated.get("do_center_crop") or stated.get("do_sample_frames"):
        raise ConfigError(
            f"{source.folder}: the video processor's do_center_crop or do_sample_frames is true",
            "only false is supported: a video is given as its frames",
        )
    return BlipImageProcessorPil(**{key: value for key, value in stated.items() if key in _SETTINGS})


def _load_model(source: Source, decoder_layers: int | None) -> Any:
    from transformers import InstructBlipVideoForConditionalGeneration as Architecture

    return load_reference(source, decoder_layers, answering(Architecture, IDS, MASK, features="get_video_features"))


def _image_features(model: Any, inputs: Mapping[str, Any]) -> tuple[Any, Any]:
    given = {name: inputs[name] for name in ("pixel_values", IDS, MASK)}
    found = model.get_video_features(**given, return_dict=True)
    return found.last_hidden_state, found.pooler_output.flatten(0, 1)


FAMILY = Family(
    name="instructblipvideo",
    model_types=("instructblipvideo",),
    decoders=("llama", "t5"),
    examples=("Salesforce/instructblip-vicuna-7b",),
    describe=_describe,
    load_processor=_load_processor,
    image_features=_image_features,
    note=VIDEO_NOTE,
    image_token="video_token_index",
    load_model=_load_model,
    text=TEXT,
    head="language_model.lm_head",
    texts=instructblip_texts,
)
