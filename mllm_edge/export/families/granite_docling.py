"""Granite-Docling (granite-for-docling): SigLIP tower, features of several of its layers, a Granite decoder, pages as
tiles.

A page is stretched to the grid of tiles that suits its shape, the whole page last; each tile is announced by its row
and column. The connector's coarse path is exported, which the reference takes unless it is asked for the fine one.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mllm_edge.errors import ConfigError
from mllm_edge.export.checkpoint.config import OWN_CONFIG
from mllm_edge.export.checkpoint.image_settings import resample_name, value_transforms
from mllm_edge.export.checkpoint.processor import load_processor, require_switched_on, require_tile, require_tokens
from mllm_edge.export.checkpoint.source import Source
from mllm_edge.export.family import Checkpoint, Family, Parts
from mllm_edge.export.plan import tile_components
from mllm_edge.spec import DEEPSTACK, ImagePrompt, ImageSpec, Resize, SelectTiles, TensorSpec

if TYPE_CHECKING:
    from mllm_edge.export.vision.granite_docling import GraniteDoclingConfig

__all__ = ["FAMILY"]

_VISION = "model.vision_model."
_CONNECTOR = f"{_VISION}connector."
_MOST_ROWS = 16  # and columns of tiles: the tokenizer has words for so many
# What only the fine path needs, and heads that guess tokens ahead.
_UNUSED = (f"{_CONNECTOR}fine.", "model.density_router.", "mtp.")
# For checkpoints that come without a template.
_TEMPLATE = (
    "{% for message in messages %}{{ '<|start_of_role|>' + message['role'] + '<|end_of_role|>' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{{ part['text'] if part['type'] == 'text' else '<image>' }}{% endfor %}"
    "{% endif %}{{ '<|end_of_text|>\n' }}{% endfor %}"
    "{{ '<|start_of_role|>assistant<|end_of_role|>' if add_generation_prompt else '' }}"
)


def _describe(checkpoint: Checkpoint) -> Parts:
    from mllm_edge.export.vision.granite_docling import (
        GraniteDoclingConfig,
        GraniteDoclingConnector,
        GraniteDoclingTower,
        granite_docling_derived,
    )

    weights, decoder, vision = checkpoint.weights, checkpoint.decoder, checkpoint.vision
    config = GraniteDoclingConfig.read(vision)
    for reader, unused in ((vision, "use_fine_route"), *((checkpoint.top, key) for key in _ROUTER)):
        reader.take(unused)
    if len(config.taps) > decoder.layers:
        raise ConfigError(
            f"vision_config: deepstack_visual_indexes = {list(config.taps)!r}, but the text model has "
            f"{decoder.layers} layers",
            OWN_CONFIG,
        )
    tower, tokens = config.tower, config.tokens
    positions = f"{_VISION}embeddings.position_embedding.weight", (tower.grid**2, tower.hidden_size)
    encoder, connector = tile_components(
        lambda: GraniteDoclingTower(config),
        lambda: GraniteDoclingConnector(config),
        (tower.channels, tower.tile, tower.tile),
        (tower.patches**2, tower.hidden_size),
        (tokens, config.outputs),
        (_VISION, _CONNECTOR),
        {"embeddings.positions": weights.use(*positions)},
    )
    shape = ("tiles", tokens, config.outputs)
    added = tuple(TensorSpec(f"{DEEPSTACK}{k}", "float32", shape) for k in range(len(config.taps)))
    derived = granite_docling_derived(config, weights, _CONNECTOR, decoder.embedding_scale)
    traced = replace(encoder, outputs=(*encoder.outputs, *added)), replace(connector, derived=derived)
    return Parts(traced, _image_spec(checkpoint, config), _UNUSED)


_ROUTER = ("density_router_hidden_size", "density_router_threshold", "density_router_loss_weight")


def _image_spec(checkpoint: Checkpoint, config: "GraniteDoclingConfig") -> ImageSpec:
    source, processor, settings = checkpoint.source, checkpoint.processor, checkpoint.processor.image_processor
    tile, stated = config.tower.tile, processor.image_seq_len
    require_tile(source, (settings.size.height, settings.size.width), tile)
    require_tokens(source, f"image_seq_len = {stated}", stated, config.tokens)
    require_switched_on(source, settings, "do_convert_rgb")
    for key in ("fine_route", "dense_max_patches"):
        if getattr(settings, key):
            raise ConfigError(
                f"{source.folder}: the image processor's {key} is {getattr(settings, key)!r}",
                "supported: the coarse path, and as many tiles for a page of any shape",
            )
    least, most = settings.min_patches, settings.max_patches if settings.crop_to_patches else 1
    if most > 1 and not 1 <= least <= most:
        raise ConfigError(
            f"{source.folder}: an image becomes at least {least} and at most {most} tiles", "use this model's own files"
        )
    resample = resample_name(settings.resample)
    split = SelectTiles(tile, least, most, True, resample, _MOST_ROWS) if most > 1 else Resize(tile, tile, resample)
    fake, whole = processor.fake_image_token, processor.global_image_tag
    of_tile = f"{fake}<row_{{row}}_col_{{col}}>{{image}}"
    prompt = ImagePrompt(
        processor.image_token,
        checkpoint.token_id,
        single=of_tile.replace("{row}", "1").replace("{col}", "1") + "\n",
        tile=of_tile,
        row_end="\n",
        overview=f"\n{fake}{whole}{{image}}{fake}",
    )
    return ImageSpec((split, *value_transforms(settings)), prompt, tile, tile, config.tokens)


def _load_processor(source: Source) -> Any:
    vision = source.config.get("vision_config") or {}

    def of_model(images: Any) -> dict[str, Any]:
        side = images.size.height // (vision.get("patch_size") or 16) // (vision.get("scale_factor") or 4)
        return {"image_seq_len": side**2}

    return load_processor(source, "GraniteDoclingProcessor", ("GraniteDoclingImageProcessor",), _TEMPLATE, of_model)


def _image_features(model: Any, inputs: Mapping[str, Any]) -> tuple[Any, Any]:
    """Features as the decoder multiplies them."""
    import torch

    found = model.model.get_image_features(inputs["pixel_values"], inputs["pixel_attention_mask"], return_dict=True)
    features = torch.cat(list(found.pooler_output))
    return found.last_hidden_state, features * model.config.text_config.embedding_multiplier


FAMILY = Family(
    name="granite_docling",
    model_types=("granite_docling",),
    decoders=("granite",),
    examples=("ibm-granite/granite-for-docling-500m",),
    describe=_describe,
    load_processor=_load_processor,
    image_features=_image_features,
    text="model.text_model",
    decoder_type=lambda config, weights: "granite",
)
