"""Llama 3.2 Vision: images on a canvas of tiles, which the layers of cross-attention in a Llama decoder look at."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mllm_edge.errors import ConfigError
from mllm_edge.export.checkpoint.image_settings import resample_name, value_transforms
from mllm_edge.export.checkpoint.processor import OWN_PROCESSOR, load_processor, require_switched_on
from mllm_edge.export.checkpoint.source import Source
from mllm_edge.export.family import Checkpoint, Family, Parts
from mllm_edge.export.plan import TracedComponent, table_specs
from mllm_edge.spec import ENCODED, AspectRatioId, FitCanvas, ImagePrompt, ImageSpec, Stage, TensorSpec

if TYPE_CHECKING:
    from mllm_edge.export.vision.mllama import MllamaConfig

__all__ = ["FAMILY"]

_VISION = "model.vision_model."
# For checkpoints that come without a template.
_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{{ part['text'] if part['type'] == 'text' else '<|image|>' }}{% endfor %}{% endif %}{{ '<|eot_id|>' }}"
    "{% endfor %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' if add_generation_prompt else '' }}"
)


def _describe(checkpoint: Checkpoint) -> Parts:
    from mllm_edge.export.vision.mllama import MllamaConfig, MllamaTower, mllama_derived
    from mllm_edge.export.vision.modules import Linear

    tower, hidden = MllamaConfig.read(checkpoint.vision), checkpoint.decoder.hidden_size
    image = _image_spec(checkpoint, tower)
    shown = TensorSpec("pixel_values", "float32", (tower.tiles, *image.shape))
    tables = (spec for table in image.tables for spec in table_specs(table, 1))
    seen = TensorSpec("vision_hidden", "float32", (tower.tiles, tower.patches, tower.width))
    projected = TensorSpec(ENCODED, "float32", (tower.tiles, tower.patches, hidden))
    traced = (
        TracedComponent(
            Stage("vision_encoder", "vision", "image"),
            lambda: MllamaTower(tower),
            (shown, *tables),
            (seen,),
            _VISION,
            mllama_derived(tower, checkpoint.weights, _VISION),
        ),
        TracedComponent(
            Stage("connector", "connector", "image"),
            lambda: Linear(tower.width, hidden),
            (seen,),
            (projected,),
            "model.multi_modal_projector.",
        ),
    )
    return Parts(traced, image)


def _load_processor(source: Source) -> Any:
    return load_processor(source, "MllamaProcessor", ("MllamaImageProcessor",), _TEMPLATE)


def _image_features(model: Any, inputs: Mapping[str, Any]) -> tuple[Any, Any]:
    given = {key: inputs[key] for key in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")}
    hidden = model.model.vision_model(**given).last_hidden_state.flatten(0, 2)
    return hidden, model.model.multi_modal_projector(hidden).flatten(0, 1)


def _image_spec(checkpoint: Checkpoint, tower: "MllamaConfig") -> ImageSpec:
    source, processor = checkpoint.source, checkpoint.processor
    settings, tiles = processor.image_processor, tower.tiles
    require_switched_on(source, settings, "do_convert_rgb", "do_resize", "do_pad")
    size = (settings.size.height, settings.size.width)
    for what, stated, wanted in (
        ("size", size, (tower.tile, tower.tile)),
        ("max_image_tiles", settings.max_image_tiles, tiles),
    ):
        if stated != wanted:
            raise ConfigError(
                f"{source.folder}: the image processor's {what} is {stated!r}, the vision tower's {wanted!r}",
                OWN_PROCESSOR,
            )
    # An image's aspect_ratio_id is its grid's place among these for the processor, and among the stated ones for us.
    grids = tuple((rows, cols) for rows in range(1, tiles + 1) for cols in range(1, tiles // rows + 1))
    if tower.aspect_ratios != grids:
        raise ConfigError(
            f"{source.folder / 'config.json'}: supported_aspect_ratios {list(map(list, tower.aspect_ratios))}, but the "
            f"image processor numbers all grids of up to {tiles} tiles: {list(map(list, grids))}",
            OWN_PROCESSOR,
        )
    transforms = (FitCanvas(tower.tile, tiles, resample_name(settings.resample)), *value_transforms(settings))
    return ImageSpec(
        transforms,
        ImagePrompt(processor.image_token, checkpoint.token_id, "{image}"),
        tower.tile,
        tower.tile,
        tower.patches,
        tower.channels,
        tables=(AspectRatioId(tiles),),
        tiles=tiles,
        into="cross_attention",
    )


FAMILY = Family(
    name="mllama",
    model_types=("mllama",),
    decoders=("mllama",),
    examples=("meta-llama/Llama-3.2-11B-Vision-Instruct",),
    describe=_describe,
    load_processor=_load_processor,
    image_features=_image_features,
    image_token="image_token_index",
)
