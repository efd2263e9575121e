"""Fuyu: patches of an image through one linear layer, row by row as in a page of text, a Persimmon decoder.

A prompt has at most one image, which stands first; rows of patches end with a word of the vocabulary.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mllm_edge.errors import ConfigError
from mllm_edge.export.checkpoint.image_settings import resample_name, value_transforms
from mllm_edge.export.checkpoint.processor import OWN_PROCESSOR, load_processor, require_switched_on
from mllm_edge.export.checkpoint.source import Source
from mllm_edge.export.checkpoint.texts import Texts, read_texts
from mllm_edge.export.checkpoint.vocabulary import require_words
from mllm_edge.export.family import Checkpoint, Family, Parts
from mllm_edge.export.plan import TracedComponent, cell_ranges
from mllm_edge.spec import PIXELS, ImagePrompt, ImageSpec, PadToMultiple, Patchify, ShrinkInto, Stage, TensorSpec

__all__ = ["FAMILY"]

_PROJECTION, _CHANNELS = "model.vision_embed_tokens.", 3
_BEGIN, _ANSWER = "<s>", "<0x04>"  # stand before a question and behind it; fixed in the reference
_WORDS = ("|SPEAKER|", "|NEWLINE|")  # for a patch, and the end of a row; fixed, too
# For checkpoints that come without a template: images first, no turns.
_TEMPLATE = (
    "{% set shown = namespace(images='') %}{% for message in messages %}{% if message['content'] is not string %}"
    "{% for part in message['content'] %}{% if part['type'] != 'text' %}"
    "{% set shown.images = shown.images + '|SPEAKER|' %}{% endif %}{% endfor %}{% endif %}{% endfor %}"
    "{{ shown.images or '<s>' }}{% for message in messages %}{% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{{ part['text'] if part['type'] == 'text' else '' }}{% endfor %}{% endif %}"
    "{{ '' if loop.last else '\n' }}{% endfor %}"
)


def _describe(checkpoint: Checkpoint) -> Parts:
    from mllm_edge.export.vision.modules import Linear, channels_first

    top, hidden = checkpoint.top, checkpoint.decoder.hidden_size
    patch = top.positive("patch_size")
    top.require("num_channels", _CHANNELS)
    top.take("image_size")  # of no effect: images have any size
    image, values = _image_spec(checkpoint, patch), _CHANNELS * patch**2
    weight = checkpoint.weights.use(f"{_PROJECTION}weight", (hidden, values))
    projection = TracedComponent(
        Stage("vision_encoder", "vision", "image"),
        lambda: Linear(values, hidden),
        (TensorSpec(PIXELS, "float32", ("cells", *image.shape)),),
        (TensorSpec("image_features", "float32", ("cells", 1, hidden)),),
        _PROJECTION,
        {"weight": lambda: channels_first(weight(), patch)},
        cell_ranges(image),
    )
    return Parts((projection,), image, markers=(checkpoint.processor.image_newline_token, _BEGIN, _ANSWER))


def _load_processor(source: Source) -> Any:
    import torch
    from transformers import FuyuProcessor

    class Complete(FuyuProcessor):
        """Takes prompts with the image and the end of the question, which it would put there itself, and gives the
        model's own input; around a text without images it puts nothing."""

        def __call__(self, images: Any = None, text: Any = None, **options: Any) -> Any:
            if images is None:
                return super().__call__(text=text, **{**options, "add_special_tokens": False})
            prompts = [text] if isinstance(text, str) else text
            plain = [prompt.replace(self.image_token, "", 1).removesuffix(_ANSWER) for prompt in prompts]
            return super().__call__(images=images, text=plain, return_legacy_image_output=False, **options)

    require_words(source, _WORDS)  # for want of which transformers' own fails
    processor = load_processor(source, "FuyuProcessor", ("FuyuImageProcessor",), _TEMPLATE, cls=Complete)
    processor.chat_template += f"{{{{ '{_ANSWER}' if add_generation_prompt else '' }}}}"
    cut = processor.image_processor.patchify_image
    # It takes arrays and gives no batch, where the processor has tensors and asks for one.
    processor.image_processor.patchify_image = lambda image, patch_size=None: torch.from_numpy(
        cut(image.numpy(), patch_size)
    ).unsqueeze(0)
    return processor


def _texts(checkpoint: Checkpoint) -> Texts:
    """With the words that stand around patches and questions as tokens of their own: a vocabulary holds them as pieces
    of text, which would begin with a blank, and which anybody could spell."""
    from tokenizers import AddedToken, Tokenizer

    processor = checkpoint.processor
    texts = read_texts(checkpoint.source, processor, checkpoint.config.text_config.to_dict())
    tokenizer = Tokenizer.from_str(texts.tokenizer.to_str())
    named = (processor.image_token, processor.image_newline_token, _ANSWER)
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in named])
    return replace(texts, tokenizer=tokenizer, generation=replace(texts.generation, add_special_tokens=False))


def _image_features(model: Any, inputs: Mapping[str, Any]) -> tuple[Any, Any]:
    found = model.model.get_image_features(inputs[PIXELS], return_dict=True).last_hidden_state
    return found, found


def _pixel_values(model: Any, inputs: Mapping[str, Any]) -> Any:
    patch = model.config.patch_size
    return inputs[PIXELS].unflatten(1, (patch, patch, -1)).permute(0, 3, 1, 2).flatten(1)


def _image_spec(checkpoint: Checkpoint, patch: int) -> ImageSpec:
    source, processor = checkpoint.source, checkpoint.processor
    settings = processor.image_processor
    require_switched_on(source, settings, "do_resize", "do_pad")
    cell, size = dict(settings.patch_size), settings.size
    if cell != {"height": patch, "width": patch}:
        raise ConfigError(
            f"{source.folder}: the image processor's patch_size is {cell}, the model's {patch}", OWN_PROCESSOR
        )
    if size.height % patch or size.width % patch:
        raise ConfigError(
            f"{source.folder}: the image processor's size {size.height}×{size.width} px is no whole number of patches",
            OWN_PROCESSOR,
        )
    grey = int(settings.padding_value)
    if settings.padding_mode != "constant" or grey != settings.padding_value or not 0 <= grey <= 255:
        raise ConfigError(
            f"{source.folder}: the image processor's padding_mode is {settings.padding_mode!r}, padding_value "
            f"{settings.padding_value}",
            "supported: constant, with a whole number from 0 to 255",
        )
    transforms = (
        ShrinkInto(size.height, size.width, resample_name(settings.resample)),
        PadToMultiple(patch, (grey,) * _CHANNELS),
        *value_transforms(settings),
        Patchify(patch, 1, 1),
    )
    end = processor.image_newline_token
    single = f"{{image}}{end}{_BEGIN}"
    prompt = ImagePrompt(processor.image_token, checkpoint.token_id, single, between=end)
    return ImageSpec(transforms, prompt, patch, patch, features=1, most_images=1)


FAMILY = Family(
    name="fuyu",
    model_types=("fuyu",),
    decoders=("persimmon",),
    examples=("adept/fuyu-8b",),
    describe=_describe,
    load_processor=_load_processor,
    image_features=_image_features,
    pixel_values=_pixel_values,
    note="transformers' processor fails on the patches of its Pillow image processor: they are handed to it as tensors",
    text="model.language_model",
    vision="",
    texts=_texts,
)
