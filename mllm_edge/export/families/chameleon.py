"""Chameleon: an image becomes words of the decoder's own vocabulary, which a VQ-GAN's encoder chooses.

The decoder reads them as it reads text; it is not exported to write them.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from mllm_edge.errors import ConfigError
from mllm_edge.export.checkpoint.config import OWN_CONFIG
from mllm_edge.export.checkpoint.image_settings import made_size, single_transforms
from mllm_edge.export.checkpoint.processor import load_processor, require_tile, require_tokens
from mllm_edge.export.checkpoint.source import Source
from mllm_edge.export.family import Checkpoint, Family, Parts
from mllm_edge.export.plan import TracedComponent
from mllm_edge.graph.ranges import TILES
from mllm_edge.spec import PIXELS, ImagePrompt, ImageSpec, Stage, TensorSpec

__all__ = ["FAMILY"]

_VQ, _EMBEDDING, _WORD = "model.vqmodel.", "model.embed_tokens.weight", "IMGIMG"
# For checkpoints that come without a template: no turns, and a separator behind each part.
_TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{{ part['text'] if part['type'] == 'text' else '<image>' }}{% endfor %}"
    "{{ '' if loop.last else sep_token }}{% endfor %}"
)


def _describe(checkpoint: Checkpoint) -> Parts:
    from mllm_edge.export.vision.vqgan import Codebook, VqConfig, VqEncoder, codebook_derived

    weights, hidden = checkpoint.weights, checkpoint.decoder.hidden_size
    config = VqConfig.read(checkpoint.vision)
    words = _words(checkpoint, config.codes)
    rows = config.side // 2 ** (len(config.widths) - 1)
    seen = TensorSpec("vision_hidden", "float32", ("tiles", config.latent, rows, rows))
    traced = (
        TracedComponent(
            Stage("vision_encoder", "choice", "slice"),
            lambda: VqEncoder(config),
            (TensorSpec(PIXELS, "float32", ("tiles", config.channels, config.side, config.side)),),
            (seen,),
            f"{_VQ}encoder.",
            ranges={"tiles": TILES},
        ),
        TracedComponent(
            Stage("connector", "choice", "slice"),
            lambda: Codebook(config.latent, config.code_size, config.codes, hidden),
            (seen,),
            (TensorSpec("image_features", "float32", ("tiles", config.tokens, hidden)),),
            _VQ,
            codebook_derived(weights, f"{_VQ}quantize.embedding.weight", config.code_size, _EMBEDDING, words),
            {"tiles": TILES},
        ),
    )
    image, processor = _image_spec(checkpoint, config.side, config.tokens), checkpoint.processor
    markers = processor.image_start_token, processor.image_end_token
    return Parts(traced, image, (f"{_VQ}post_quant_conv.",), markers)


def _words(checkpoint: Checkpoint, codes: int) -> np.ndarray:
    """The word of each code [codes] int64: their numbers stand in the words' names, in letters for digits."""
    found = {}
    for name, token in (checkpoint.config.vocabulary_map or {}).items():
        if name.startswith(_WORD):
            digits = "".join(str(ord(letter) - ord("A")) for letter in name[len(_WORD) : -1])
            found[int(digits)] = token
    if sorted(found) != list(range(codes)):
        raise ConfigError(
            f"{checkpoint.source.folder / 'config.json'}: vocabulary_map names {len(found)} words of images, and there "
            f"are {codes} codes",
            OWN_CONFIG,
        )
    return np.array([found[code] for code in range(codes)])


def _load_processor(source: Source) -> Any:
    from transformers import ChameleonProcessor

    class Complete(ChameleonProcessor):
        """Takes prompts with the separator that it would put behind them."""

        def __call__(self, images: Any = None, text: Any = None, **options: Any) -> Any:
            return super().__call__(images=images, text=text, return_for_text_completion=True, **options)

    processor = load_processor(source, "ChameleonProcessor", ("ChameleonImageProcessor",), _TEMPLATE, cls=Complete)
    processor.chat_template += "{{ sep_token if add_generation_prompt else '' }}"
    return processor


def _image_features(model: Any, inputs: Mapping[str, Any]) -> tuple[Any, Any]:
    found = model.model.get_image_features(inputs[PIXELS], return_dict=True)
    return found.last_hidden_state, found.pooler_output.flatten(0, 1)


def _image_spec(checkpoint: Checkpoint, side: int, tokens: int) -> ImageSpec:
    source, processor = checkpoint.source, checkpoint.processor
    transforms = single_transforms(source, processor.image_processor)
    require_tile(source, made_size(transforms), side)
    require_tokens(source, f"image_seq_length = {processor.image_seq_length}", processor.image_seq_length, tokens)
    text = f"{processor.image_start_token}{{image}}{processor.image_end_token}"
    return ImageSpec(transforms, ImagePrompt(processor.image_token, checkpoint.token_id, text), side, side, tokens)


FAMILY = Family(
    name="chameleon",
    model_types=("chameleon",),
    decoders=("chameleon",),
    examples=("facebook/chameleon-7b",),
    describe=_describe,
    load_processor=_load_processor,
    image_features=_image_features,
    text="model",
    vision="vq_config",
)
