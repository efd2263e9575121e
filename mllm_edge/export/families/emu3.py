"""Emu3: an image of any size becomes words of the decoder's vocabulary, which a VQ-VAE's encoder chooses, row by row.

The decoder reads them as it reads text; it is not exported to write them. An image goes through convolutions whole. As
in transformers, images of one prompt are seen on a canvas that the largest of them sets.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from mllm_edge.errors import ConfigError
from mllm_edge.export.checkpoint.config import OWN_CONFIG
from mllm_edge.export.checkpoint.image_settings import resample_name, value_transforms
from mllm_edge.export.checkpoint.processor import OWN_PROCESSOR, load_processor, require_switched_on
from mllm_edge.export.checkpoint.source import Source
from mllm_edge.export.family import Checkpoint, Family, Parts
from mllm_edge.export.plan import TracedComponent
from mllm_edge.spec import (
    PIXELS,
    ImagePrompt,
    ImageSpec,
    ResizeToPixels,
    RowEnd,
    Stage,
    SymbolRange,
    TensorSpec,
)

__all__ = ["FAMILY"]

_VQ, _EMBEDDING = "model.vqmodel.", "model.text_model.embed_tokens.weight"
_WORD, _ROW_END, _FILE = "<|visual token ", "<|extra_200|>", "row_end.npy"
_RATIO = 200.0  # of an image's sides at most; fixed in the reference
# For checkpoints that come without a template: roles in capitals, images before text.
_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    "{% if message['content'] is string %}{{ message['content'] + ' ' }}{% else %}"
    "{% for part in message['content'] %}{{ '' if part['type'] == 'text' else '<image>' }}{% endfor %}"
    "{% for part in message['content'] %}{{ part['text'] + ' ' if part['type'] == 'text' else '' }}{% endfor %}"
    "{% endif %}{% endfor %}{{ 'ASSISTANT:' if add_generation_prompt else '' }}"
)


def _describe(checkpoint: Checkpoint) -> Parts:
    from mllm_edge.export.vision.emu3 import Emu3Config, Emu3Encoder, emu3_derived, quantizer_derived
    from mllm_edge.export.vision.vqgan import Codebook, codebook_derived

    weights, hidden, processor = checkpoint.weights, checkpoint.decoder.hidden_size, checkpoint.processor
    config, known = Emu3Config.read(checkpoint.vision), checkpoint.top.take("vocabulary_map") or {}
    words, image = _words(checkpoint.source, known, config.codes), _image_spec(checkpoint, config.cell)
    ranges = _ranges(image)
    seen = TensorSpec("vision_hidden", "float32", (1, config.latent, "rows", "cols"))
    traced = (
        TracedComponent(
            Stage("vision_encoder", "choice", "image"),
            lambda: Emu3Encoder(config),
            (TensorSpec(PIXELS, "float32", (1, config.channels, "height", "width")),),
            (seen,),
            f"{_VQ}encoder.",
            emu3_derived(config, weights, f"{_VQ}encoder."),
            ranges,
        ),
        TracedComponent(
            Stage("connector", "choice", "image"),
            lambda: Codebook(config.latent, config.code_size, config.codes, hidden),
            (seen,),
            (TensorSpec("image_features", "float32", (1, "cells", hidden)),),
            _VQ,
            codebook_derived(weights, f"{_VQ}quantize.embedding.weight", config.code_size, _EMBEDDING, words)
            | quantizer_derived(config, weights, _VQ),
            ranges,
        ),
    )
    around = (processor.image_start_token, processor.fake_token_around_image)
    embeddings = weights.use(_EMBEDDING, weights.shape(_EMBEDDING))
    blocks = [f"{_VQ}encoder.time_res_stack.{i}." for i in range(config.blocks)]
    return Parts(
        traced,
        image,
        (
            f"{_VQ}decoder.",
            f"{_VQ}post_quant_conv.",
            *(f"{b}norm{k}.num_batches_tracked" for b in blocks for k in (1, 2)),
        ),
        (*around, processor.eof_token, processor.image_end_token),
        arrays={_FILE: lambda: embeddings()[[known[_ROW_END]]]},
    )


def _words(source: Source, known: Mapping[str, int], codes: int) -> np.ndarray:
    """The word of each code [codes] int64: their numbers stand in the words' names."""
    found = {int(name[-8:-2]): token for name, token in known.items() if name.startswith(_WORD)}
    if sorted(found) != list(range(codes)) or _ROW_END not in known:
        raise ConfigError(
            f"{source.folder / 'config.json'}: vocabulary_map names {len(found)} words of images, and there are "
            f"{codes} codes; {_ROW_END} ends their rows",
            OWN_CONFIG,
        )
    return np.array([found[code] for code in range(codes)])


def _ranges(image: ImageSpec) -> dict[str, SymbolRange]:
    """Sides of an image, and of its codes: up to twice those of the largest square."""
    (resize,) = (t for t in image.transforms if isinstance(t, ResizeToPixels))
    most = int(2 * resize.max_pixels**0.5) // resize.multiple
    cells = SymbolRange(usual=max(1, most // 3), most=most)
    pixels = SymbolRange(resize.multiple, cells.usual * resize.multiple, most * resize.multiple)
    return {"height": pixels, "width": pixels, "rows": cells, "cols": cells}


def _load_processor(source: Source) -> Any:
    from transformers import Emu3Processor

    class Complete(Emu3Processor):
        """Takes prompts with the beginning that it would put before them."""

        def __call__(self, images: Any = None, text: Any = None, **options: Any) -> Any:
            prompts = [text] if isinstance(text, str) else text
            plain = [prompt.removeprefix(self.bos_token) for prompt in prompts]
            return super().__call__(images=images, text=plain, **{**options, "add_special_tokens": True})

    processor = load_processor(source, "Emu3Processor", ("Emu3ImageProcessor",), _TEMPLATE, cls=Complete)
    processor.chat_template = "{{ bos_token }}" + processor.chat_template
    return processor


def _image_features(model: Any, inputs: Mapping[str, Any]) -> tuple[Any, Any]:
    import torch

    found = model.model.get_image_features(inputs[PIXELS], inputs["image_sizes"], return_dict=True)
    return found.last_hidden_state.squeeze(1), torch.cat(list(found.pooler_output))


def _image_spec(checkpoint: Checkpoint, cell: int) -> ImageSpec:
    source, processor = checkpoint.source, checkpoint.processor
    settings = processor.image_processor
    require_switched_on(source, settings, "do_resize", "do_convert_rgb")
    factor, least, most = settings.spatial_factor, settings.min_pixels, settings.max_pixels
    if not cell == factor == processor.downsample_ratio:
        raise ConfigError(
            f"{source.folder}: the encoder makes a code of {cell} px, the image processor multiples of {factor} px, "
            f"and the prompt counts {processor.downsample_ratio} px",
            OWN_PROCESSOR,
        )
    if not 0 < least <= most:
        raise ConfigError(f"{source.folder}: images of {least} to {most} px", OWN_PROCESSOR)
    transforms = (
        ResizeToPixels(factor, least, most, resample_name(settings.resample), _RATIO),
        *value_transforms(settings),
    )
    begin = f"{processor.image_start_token}{{rows}}*{{cols}}{processor.fake_token_around_image}"
    single = f"{begin}{{image}}{processor.eof_token}{processor.image_end_token}"
    prompt = ImagePrompt(processor.image_token, checkpoint.token_id, single)
    return ImageSpec(transforms, prompt, cell, cell, features=1, pack=(RowEnd(_FILE),), whole=True)


FAMILY = Family(
    name="emu3",
    model_types=("emu3",),
    decoders=("emu3_text_model",),
    examples=("BAAI/Emu3-Chat-hf",),
    describe=_describe,
    load_processor=_load_processor,
    image_features=_image_features,
    text="model.text_model",
    vision="vq_config",
)
