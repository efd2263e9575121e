"""Ovis 2: a tower after AIMv2, features that are mixtures of visual words, tiles that cover the image, Qwen2.

As in transformers 5.24 a wide picture is cut into tiles one below the other, and a high one into tiles side by side.

The tokens around an image's features have embeddings of their own, which come from the table of visual words.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from mllm_edge.errors import ConfigError
from mllm_edge.export.checkpoint.config import OWN_CONFIG
from mllm_edge.export.checkpoint.image_settings import resample_name, value_transforms
from mllm_edge.export.checkpoint.processor import load_processor, require_switched_on, require_tile, require_tokens
from mllm_edge.export.checkpoint.source import Source
from mllm_edge.export.family import Checkpoint, Family, Parts
from mllm_edge.export.plan import tile_components
from mllm_edge.spec import CoverTiles, ImagePrompt, ImageSpec, ImageTokens, Resize

__all__ = ["FAMILY"]

_TOWER, _TABLE = "model.vision_tower.transformer.", "model.visual_embeddings_table.weight"
_AROUND = "image_tokens.npy"
_COVERED = 0.9  # of the image, fixed in the reference
_ATOM, _START, _GRID, _COL, _ROW, _END = (f"<IMG_{word}>" for word in ("ATOM", "START", "GRID", "COL", "ROW", "END"))
# For checkpoints that come without a template.
_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% for part in message['content'] %}"
    "{{ part['text'] if part['type'] == 'text' else '<image>\n' }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{{ '<|im_start|>assistant\n' if add_generation_prompt else '' }}"
)


def _describe(checkpoint: Checkpoint) -> Parts:
    from mllm_edge.export.vision.ovis2 import Ovis2Config, Ovis2Tower, VisualWords

    top, weights, hidden = checkpoint.top, checkpoint.weights, checkpoint.decoder.hidden_size
    for unused in ("vocab_size", "hidden_size"):  # of what the parts state themselves
        top.take(unused)
    tower = Ovis2Config.read(checkpoint.vision)
    indicators = tuple(top.take("visual_indicator_token_ids"))
    rows = tower.words + len(indicators)
    if weights.shape(_TABLE) != (rows, hidden):
        raise ConfigError(
            f"{checkpoint.source.folder / 'config.json'}: {tower.words} visual words and {len(indicators)} tokens "
            f"around them of {hidden} elements, and the table is {list(weights.shape(_TABLE))}",
            OWN_CONFIG,
        )
    table, tokens, width = weights.use(_TABLE, (rows, hidden)), tower.side**2, tower.hidden_size * tower.stride**2
    positions = f"{_TOWER}embeddings.position_embedding.weight", (tower.patches**2, tower.hidden_size)
    encoder, connector = tile_components(
        lambda: Ovis2Tower(tower),
        lambda: VisualWords(width, tower.words, hidden),
        (tower.channels, tower.tile, tower.tile),
        (tokens, width),
        (tokens, hidden),
        (_TOWER, "model."),
        {"embeddings.positions": weights.use(*positions)},
    )
    words = {"words.weight": lambda: np.ascontiguousarray(table()[: tower.words].T)}
    markers = (_START, _GRID, _COL, _ROW, _END)
    image = replace(_image_spec(checkpoint, tower.tile, tokens), around=ImageTokens(indicators, _AROUND))
    own = {_AROUND: lambda: table()[tower.words :]}
    return Parts((encoder, replace(connector, derived=words)), image, markers=markers, arrays=own)


def _load_processor(source: Source) -> Any:
    return load_processor(source, "Ovis2Processor", ("Ovis2ImageProcessor",), _TEMPLATE)


def _image_features(model: Any, inputs: Mapping[str, Any]) -> tuple[Any, Any]:
    found = model.model.get_image_features(inputs["pixel_values"], return_dict=True)
    return found.last_hidden_state, found.pooler_output.flatten(0, 1)


def _image_spec(checkpoint: Checkpoint, tile: int, tokens: int) -> ImageSpec:
    source, processor = checkpoint.source, checkpoint.processor
    settings = processor.image_processor
    require_switched_on(source, settings, "do_resize", "use_covering_area_grid")
    require_tile(source, (settings.size.height, settings.size.width), tile)
    require_tokens(source, f"image_seq_length = {processor.image_seq_length}", processor.image_seq_length, tokens)
    resample, most = resample_name(settings.resample), settings.max_patches if settings.crop_to_patches else 1
    split = CoverTiles(tile, most, _COVERED, resample) if most > 1 else Resize(tile, tile, resample)
    prompt = ImagePrompt(
        _ATOM,
        checkpoint.token_id,
        single=f"{_START}{{image}}{_GRID}{_END}",
        begin=f"{_START}{{image}}{_GRID}",
        tile="{image}",
        beside=_COL,
        between=_ROW,
        overview=_END,
        placeholder=processor.image_token,
    )
    return ImageSpec((split, *value_transforms(settings)), prompt, tile, tile, tokens)


FAMILY = Family(
    name="ovis2",
    model_types=("ovis2",),
    decoders=("qwen2",),
    examples=("thisisiron/Ovis2-1B-hf",),
    describe=_describe,
    load_processor=_load_processor,
    image_features=_image_features,
)
